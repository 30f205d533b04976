"""KID while training: samples of the averaged weights against images of the data set."""

from __future__ import annotations

from collections.abc import Generator
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

FEATURES = "efficientnet-lite0"
"""What needs nothing but its package."""

_BATCH = 64


class Scored(NamedTuple):
    """KID of ``n`` samples, and its standard deviation over subsets of a half."""

    kid: float
    spread: float
    n: int


class Scoring:
    """Compares ``n`` samples, the first of which the grid shows, with as many images of ``dataset``, always the same ones.

    ``n`` is cut to how many of those there are; of shards, those held out. Raises :class:`ConfigError` where the extra ``metrics`` is missing,
    :class:`DataError` for too few images.
    """

    def __init__(self, dataset: ImageDataset, n: int, seed: int, device: torch.device) -> None:
        self.dataset, self.n, self.seed, self.device = dataset, min(n, len(dataset)), seed, device
        if dataset.stream and self.n < FEWEST:
            raise ConfigError(f"train.evaluate_every: KID compares with the held-out images of shards, and there are {self.n}", "raise data.holdout")
        check_enough(self.n)
        self.net = load_features(FEATURES, device)
        self._real: Tensor | None = None

    def __call__(self, denoiser: Denoiser, grid: Preview) -> Generator[Busy, None, Scored]:
        """Draw with the sampler and steps of ``grid``, and measure; yields along the way."""
        if self._real is None:
            which = chosen(self.dataset, self.n, self.seed)
            self._real = yield from self._features(self.dataset.images[which], "features of images")
        samples = torch.empty((self.n, *grid.shape), dtype=torch.uint8)
        for images, state in grid.walk(denoiser, self.n, grid.steps):
            if state.t == 0:
                samples[images.start : images.stop] = to_uint8(state.x_t).cpu()
                yield Busy("samples", images.stop, self.n)
        found = yield from self._features(samples, "features of samples")
        return Scored(*kid(found.double(), self._real.double(), self.n // 2, self.seed), self.n)

    def _features(self, images: Tensor, what: str) -> Generator[Busy, None, Tensor]:
        parts = []
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH]
            parts.append(extract(batch, self.net, self.device, batch_size=_BATCH))
            yield Busy(what, start + len(batch), len(images))
        return torch.cat(parts)
