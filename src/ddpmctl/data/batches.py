"""Batches as a pure function of (seed, step): the order of the data needs no state to resume."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ddpmctl.core.noise import derived_generator
from ddpmctl.data.dataset import ImageDataset
from ddpmctl.errors import DataError
from ddpmctl.images import from_uint8
from ddpmctl.stopping import Interrupted


class Batch(NamedTuple):
    """``x0``: float32 (B, C, H, W) in [-1, 1]. ``label``: int64 (B,), None for unconditional data."""

    x0: torch.Tensor
    label: torch.Tensor | None


class News(NamedTuple):
    """What one of several processes came to in its part of a batch: ``bad`` images, name and reason of each by where in the order it
    comes, and the ``fault`` that keeps it from reading on.
    """

    bad: dict[tuple[int, ...], tuple[str, str]]
    fault: DataError | Interrupted | None = None


class StepBatches(ABC):
    """The batches of a run of ``count`` images, by step.

    The samples of a run are numbered: number k = (step - 1) * batch_size + j lies in epoch k // N at place
    k % N of that epoch's order. So every image comes once an epoch, a batch may cross the border of epochs, and N may be
    smaller than the batch. With ``hflip`` each sample is mirrored left to right with probability 1/2, by (seed, step).
    ``bad``: images that turned out to be unreadable on the way, and why; of all processes, each of which gives its
    :meth:`news` of a step, and has to :meth:`take` those of all. ``asked``: whether the run is to stop; then images that are
    still waited for raise :class:`Interrupted`.
    """

    def __init__(self, count: int, batch_size: int, seed: int, hflip: bool) -> None:
        if batch_size < 1 or count < 1:
            raise ValueError("batches need images and a positive batch size")
        self.count, self.batch_size, self.seed, self.hflip = count, batch_size, seed, hflip
        self.bad: dict[str, str] = {}
        self.asked: Callable[[], object] = lambda: None
        self._unsaid: dict[tuple[int, ...], tuple[str, str]] = {}

    def __call__(self, step: int, part: slice = slice(None)) -> Batch:
        """That ``part`` of the batch of ``step``, which counts from 1. Raises ``ValueError`` below."""
        if step < 1:
            raise ValueError(f"steps count from 1, not {step}")
        pixels, label = self.pixels(step, part)
        if self.hflip:
            mirrored = self.flips(step)[part]
            pixels[mirrored] = pixels[mirrored].flip(-1)
        return Batch(from_uint8(pixels), label)

    @abstractmethod
    def pixels(self, step: int, part: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A copy of the images of that batch, uint8 (B, C, H, W), none mirrored yet, and their labels."""

    def flips(self, step: int) -> torch.Tensor:
        """Which samples of the batch of ``step`` are mirrored when ``hflip`` is on: bool (B,)."""
        return torch.rand(self.batch_size, generator=derived_generator(self.seed, "flip", step)) < 0.5

    def news(self, fault: DataError | Interrupted | None = None) -> News | None:
        """What this process came to and has not said yet, ``fault`` included; None: nothing."""
        bad, self._unsaid = self._unsaid, {}
        return News(bad, fault) if bad or fault else None

    def take(self, news: Sequence[News]) -> None:
        """Take in the news of all processes, those of this one among them. Raises its fault, and :class:`DataError` for too many bad ones, in all of them."""
        found = {place: image for one in news for place, image in one.bad.items()}  # several may have come to the same
        bad = [image for _, image in sorted(found.items())]
        self.bad.update(bad)
        self._judge(bad)
        for one in news:
            if one.fault:
                raise one.fault

    def _judge(self, bad: list[tuple[str, str]]) -> None:  # noqa: B027 - images in memory are good
        """Raise :class:`DataError` where with these ``bad`` ones, which are new, there are too many."""

    def epoch_of(self, step: int) -> float:
        """How many times the data has been gone through when ``step`` is done."""
        return step * self.batch_size / self.count

    def close(self) -> None:  # noqa: B027 - most have nothing to let go of
        """Let go of what is read ahead; to be called at the end."""


class Batches(StepBatches):
    """Batches of images that lie in memory: the order of an epoch is a permutation that follows from (seed, epoch).

    ``members``: indices of the N images to use, int64 (N,); all of the data set where None.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        seed: int,
        hflip: bool = False,
        *,
        members: torch.Tensor | None = None,
    ) -> None:
        self.members = torch.arange(len(dataset)) if members is None else members
        super().__init__(len(self.members), batch_size, seed, hflip)
        self.dataset = dataset
        self._orders: dict[int, torch.Tensor] = {}

    def pixels(self, step: int, part: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As every :class:`StepBatches`."""
        chosen = self.indices(step)[part]
        return self.dataset.images[chosen], None if self.dataset.labels is None else self.dataset.labels[chosen]

    def indices(self, step: int) -> torch.Tensor:
        """Which images make up the batch of ``step``: int64 (B,)."""
        number, end = (step - 1) * self.batch_size, step * self.batch_size
        parts = []
        while number < end:
            epoch, place = divmod(number, self.count)
            parts.append(self._order(epoch)[place : place + end - number])
            number += len(parts[-1])
        return torch.cat(parts)

    def _order(self, epoch: int) -> torch.Tensor:
        """The permutation of one epoch; the latest is kept, for the next steps need it again."""
        if epoch not in self._orders:
            generator = derived_generator(self.seed, "order", epoch)
            self._orders = {epoch: self.members[torch.randperm(self.count, generator=generator)]}
        return self._orders[epoch]
