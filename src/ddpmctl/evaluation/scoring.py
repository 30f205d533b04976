"""KID while training: samples of the averaged weights against images of the data set."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddpmctl.core.denoiser import Denoiser
from ddpmctl.data.dataset import ImageDataset
from ddpmctl.errors import ConfigError
from ddpmctl.evaluation.distances import FEWEST, check_enough, kid
from ddpmctl.evaluation.features import extract, load_features
from ddpmctl.evaluation.sets import chosen
from ddpmctl.events import Busy
from ddpmctl.images import to_uint8
from ddpmctl.preview import Preview
from ddpmctl.ranks import ALONE, Ranks, Word
from ddpmctl.turns import Work, rounds

FEATURES = "efficientnet-lite0"
"""What needs nothing but its package."""

_BATCH = 64


class Scored(NamedTuple):
    """KID of ``n`` samples, and its standard deviation over subsets of a half."""

    kid: float
    spread: float
    n: int


class Scoring:
    """Compares ``n`` samples, the first of which ``grid`` shows, with as many images of ``dataset``, always the same ones.

    They are drawn by ``denoiser`` with the sampler and steps of the grid. ``n`` is cut to how many images there are; of shards, those held out. Of several
    ``ranks`` each does its share, batch by batch. Raises :class:`ConfigError` where
    the extra ``metrics`` is missing, :class:`DataError` for too few images.
    """

    def __init__(self, dataset: ImageDataset, n: int, denoiser: Denoiser, grid: Preview, ranks: Ranks = ALONE) -> None:
        self.dataset, self.n, self.denoiser, self.grid, self.ranks = dataset, min(n, len(dataset)), denoiser, grid, ranks
        if dataset.stream and self.n < FEWEST:
            raise ConfigError(f"train.evaluate_every: KID compares with the held-out images of shards, and there are {self.n}", "raise data.holdout")
        check_enough(self.n)
        self.net = load_features(FEATURES, grid.device)
        self._real: Tensor | None = None

    def __call__(self) -> Generator[Busy, None, Scored]:
        """Draw and measure; yields along the way."""
        if self._real is None:
            which = chosen(self.dataset, self.n, self.grid.seed)
            images = torch.split(self.dataset.images[which], _BATCH)
            self._real = yield from self._together(Word.FEATURES, images, "features of images")
        numbers = torch.split(torch.arange(self.n), min(self.n, self.grid.batch_size))
        samples = yield from self._together(Word.SAMPLES, numbers, "samples")
        found = yield from self._together(Word.FEATURES, torch.split(samples, _BATCH), "features of samples")
        return Scored(*kid(found.double(), self._real.double(), self.n // 2, self.grid.seed), self.n)

    def _together(self, word: Word, pieces: Sequence[Tensor], what: str) -> Generator[Busy, None, Tensor]:
        done: list[Tensor] = []
        for made in rounds(self.ranks, word, self.works()[word], pieces):
            done += made
            yield Busy(what, sum(map(len, done)), self.n)
        return torch.cat(done)

    def works(self) -> dict[Word, Work]:
        """What every process does for the one that leads."""
        return {Word.SAMPLES: self._samples, Word.FEATURES: self._features}

    def _features(self, images: Tensor) -> Tensor:
        return extract(images, self.net, self.grid.device, batch_size=_BATCH)

    def _samples(self, numbers: Tensor) -> Tensor:
        """The images of these numbers, one after another, uint8 (B, C, H, W)."""
        walk = self.grid.walk(self.denoiser, range(int(numbers[0]), int(numbers[-1]) + 1), self.grid.steps)
        return torch.cat([to_uint8(state.x_t).cpu() for _, state in walk if state.t == 0])
