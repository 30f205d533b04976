"""What a model makes of real images: the fixed-noise loss, and bits per dimension by the variational bound."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddpmctl.core.bound import variational_bound
from ddpmctl.core.noise import derived_generator
from ddpmctl.core.samplers import variances_of
from ddpmctl.data.dataset import ImageDataset
from ddpmctl.data.report import Progress
from ddpmctl.ranks import Ranks, Word
from ddpmctl.sampling import Model
from ddpmctl.turns import Work, as_fits, rounds
from ddpmctl.validation import DRAWS, QUARTERS, Pictures, Validated, Validation, split

LOSS_DRAWS = QUARTERS * DRAWS
BOUND_IMAGES, BOUND_DRAWS = 64, 32
_AT_ONCE = 8  # of these images at most, so that eight processes have a share each


class Bits(NamedTuple):
    """Bits per dimension: the mean over images and its standard error (None of one image), which counts the draw of t too."""

    mean: float
    error: float | None


def unseen(model: Model, dataset: ImageDataset) -> tuple[Tensor, str]:
    """Indices of the images to measure on, and what they are.

    Where ``dataset`` is what the run was trained on, those that it held out: so that the loss is its ``val_loss``.
    Where it is another, or nothing was held out, all of them.
    """
    everything = torch.arange(len(dataset))
    if dataset.fingerprint == model.fingerprint:
        held = split(dataset, model.config.data.holdout)[1]
        return (held, "images that training held out") if len(held) else (everything, "images trained on")
    return everything, "images of DATA"


class Likelihood:
    """What is measured of ``model`` on the images of :func:`unseen`; it holds those few that are looked at, and no network.

    ``of``: what they are, ``count``: how many there are.
    """

    def __init__(self, model: Model, dataset: ImageDataset) -> None:
        which, self.of = unseen(model, dataset)
        self.count = len(which)
        self.validation = Validation(dataset, which, model.config.diffusion.loss)
        order = torch.randperm(len(which), generator=derived_generator("evaluated"))
        self.pictures = Pictures.of(dataset, which[order[:BOUND_IMAGES]])

    def works(self, model: Model) -> dict[Word, Work]:
        """What every process does for the process that leads."""
        return {Word.LOSSES: self.validation.work(model.denoiser, model.device), Word.BITS: self._bits(model)}

    def loss(self, model: Model, batch_size: int, ranks: Ranks, progress: Progress) -> Validated:
        """``val_loss`` of training, and its quarters, by all ``ranks``."""
        walk = self.validation(model.denoiser, model.device, batch_size, ranks)
        try:
            while True:
                busy = next(walk)
                progress(busy.done, busy.total)
        except StopIteration as stop:
            found: Validated = stop.value
            return found

    def bits_per_dim(self, model: Model, batch_size: int, ranks: Ranks, progress: Progress) -> dict[str, Bits]:
        """The bound over 64 of the images, for each of :func:`variances_of`, by all ``ranks``."""
        total, found = len(self.pictures.images), list[Tensor]()
        for bits in rounds(ranks, Word.BITS, self._bits(model), torch.split(torch.arange(total), min(batch_size, _AT_ONCE))):
            found += bits
            progress(sum(map(len, found)), total)
        return dict(zip(variances_of(model.denoiser), map(_summary, torch.cat(found).unbind(dim=1)), strict=True))

    def _bits(self, model: Model) -> Work:
        """Of the numbers of images, (B,), bits per dimension by each variance, (B, V) float64.

        Without guidance, which has no likelihood. Estimates of the clean image are kept within [-1, 1] as in sampling.
        """
        denoiser = copy.copy(model.denoiser)
        denoiser.guidance = 1.0

        def bits(numbers: Tensor) -> Tensor:
            x0, label = self.pictures.batch(numbers)
            label = None if label is None else label.to(model.device)
            bounds = variational_bound(denoiser, x0, numbers.tolist(), draws=BOUND_DRAWS, label=label, device=model.device)
            return torch.stack([bound.bits_per_dim(math.prod(model.image_shape)) for bound in bounds.values()], dim=1)

        return as_fits(bits, model.device)


def _summary(bits: Tensor) -> Bits:
    error = float(bits.std()) / math.sqrt(len(bits)) if len(bits) > 1 else None
    return Bits(float(bits.mean()), error)
