"""A loss that can be compared: held-out images, and always the same noise."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor

from ddpmctl.config import MOST_HELD_OUT
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.losses import loss_of_each
from ddpmctl.core.noise import derived_generator
from ddpmctl.core.transfer import send
from ddpmctl.data.batches import Batch
from ddpmctl.data.dataset import ImageDataset
from ddpmctl.events import Busy
from ddpmctl.images import from_uint8
from ddpmctl.ranks import ALONE, Ranks, Word
from ddpmctl.turns import Work, as_fits, rounds

QUARTERS = 4
DRAWS = 64
"""Noised images a quarter of 1..T."""

AT_ONCE = 32
"""Of them at most, so that eight processes have a share each."""


class Validated(NamedTuple):
    """The loss on held-out images: its mean over all t, and over each quarter of 1..T, least noise first."""

    loss: float
    quarters: tuple[float, ...]


def hold_out(n: int, share: float) -> tuple[Tensor, Tensor]:
    """Indices (to train on, held out) of ``n`` images, int64 and sorted.

    The choice follows from ``n`` and ``share`` alone, so that runs with different seeds can be compared.
    """
    held = min(int(n * share), MOST_HELD_OUT)
    order = torch.randperm(n, generator=derived_generator("held out"))
    return order[held:].sort().values, order[:held].sort().values


def split(dataset: ImageDataset, share: float) -> tuple[Tensor, Tensor]:
    """:func:`hold_out` of the images in ``dataset``, or as shards have it, of which some may be there that are trained on."""
    if dataset.held is None:
        return hold_out(len(dataset), share)
    trained = torch.ones(len(dataset), dtype=torch.bool)
    trained[dataset.held] = False
    return trained.nonzero().flatten(), dataset.held


class Pictures(NamedTuple):
    """A few images of a data set, to be looked at again and again: ``images`` uint8 (K, C, H, W); ``labels`` int64 (K,), or None."""

    images: Tensor
    labels: Tensor | None

    @classmethod
    def of(cls, dataset: ImageDataset, which: Tensor) -> Pictures:
        """A copy of the images ``which``, indices (K,)."""
        return cls(dataset.images[which], None if dataset.labels is None else dataset.labels[which])

    def batch(self, numbers: Tensor) -> Batch:
        """Those of ``numbers`` (B,), which count from 0, on the CPU."""
        return Batch(from_uint8(self.images[numbers]), None if self.labels is None else self.labels[numbers])


class Validation:
    """The loss of a denoiser on the held-out images ``held`` of ``dataset``; ``kind`` is a row of LOSSES.

    Draw k takes image k modulo their number, in an order that mixes classes, a t spread evenly over its quarter, and
    noise that depends on k alone: two networks, or two steps of a run, differ by their weights only.
    """

    def __init__(self, dataset: ImageDataset, held: Tensor, kind: str) -> None:
        order = torch.randperm(len(held), generator=derived_generator("validation order"))
        self.count, self.kind = len(held), kind
        self.pictures = Pictures.of(dataset, held[order[: QUARTERS * DRAWS]])

    def __call__(
        self, denoiser: Denoiser, device: torch.device, batch_size: int, ranks: Ranks = ALONE
    ) -> Generator[Busy, None, Validated]:
        """Draw and measure, with all ``ranks``; yields along the way. ``batch_size`` changes the last digits only."""
        pieces = torch.split(torch.arange(QUARTERS * DRAWS), min(batch_size, AT_ONCE))
        found: list[Tensor] = []
        for losses in rounds(ranks, Word.LOSSES, self.work(denoiser, device), pieces):
            found += losses
            yield Busy("validating", sum(map(len, found)), QUARTERS * DRAWS)
        quarters = torch.cat(found).view(QUARTERS, DRAWS).mean(dim=1).tolist()
        return Validated(sum(quarters) / QUARTERS, tuple(quarters))

    def work(self, denoiser: Denoiser, device: torch.device) -> Work:
        """What makes of the numbers of draws, (B,), their losses, (B,) float64: in every process the same."""
        timesteps = denoiser.schedule.timesteps

        @torch.no_grad()
        def losses(numbers: Tensor) -> Tensor:
            x0, label = self.pictures.batch(numbers % len(self.pictures.images))
            # Stratified: draw d of a quarter stands in the middle of its share of 1..T.
            t = torch.tensor([1 + int((number + 0.5) / (QUARTERS * DRAWS) * timesteps) for number in numbers.tolist()])
            eps = torch.stack(
                [torch.randn(x0.shape[1:], generator=derived_generator("validation", number)) for number in numbers.tolist()]
            )
            label = None if label is None else send(label, device)
            return loss_of_each(denoiser, send(x0, device), t, send(eps, device), label, loss=self.kind).cpu().double()

        return as_fits(losses, device)
