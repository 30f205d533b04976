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
from ddpmctl.images import from_uint8
from ddpmctl.sampling import Model
from ddpmctl.validation import DRAWS, QUARTERS, Validated, Validation, split

LOSS_DRAWS = QUARTERS * DRAWS
BOUND_IMAGES, BOUND_DRAWS = 64, 32


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


def fixed_noise_loss(model: Model, dataset: ImageDataset, which: Tensor, batch_size: int, progress: Progress) -> Validated:
    """``val_loss`` of training, and its quarters, over the images ``which``."""
    walk = Validation(dataset, which, model.config.diffusion.loss)(model.denoiser, model.device, batch_size)
    try:
        while True:
            busy = next(walk)
            progress(busy.done, busy.total)
    except StopIteration as stop:
        found: Validated = stop.value
        return found


def bits_per_dim(
    model: Model, dataset: ImageDataset, which: Tensor, batch_size: int, progress: Progress
) -> dict[str, Bits]:
    """The bound over 64 of ``which``, for each of :func:`variances_of`; without guidance, which has no likelihood.

    Estimates of the clean image are kept within [-1, 1] as in sampling.
    """
    denoiser = copy.copy(model.denoiser)
    denoiser.guidance = 1.0
    which = which[torch.randperm(len(which), generator=derived_generator("evaluated"))][:BOUND_IMAGES]
    found: dict[str, list[Tensor]] = {name: [] for name in variances_of(denoiser)}
    for start in range(0, len(which), batch_size):
        batch = which[start : start + batch_size]
        label = None if dataset.labels is None else dataset.labels[batch].to(model.device)
        numbers = range(start, start + len(batch))
        bounds = variational_bound(
            denoiser, from_uint8(dataset.images[batch]), numbers, draws=BOUND_DRAWS, label=label, device=model.device
        )
        for name, bound in bounds.items():
            found[name].append(bound.bits_per_dim(math.prod(model.image_shape)))
        progress(start + len(batch), len(which))
    return {name: _summary(torch.cat(parts)) for name, parts in found.items()}


def _summary(bits: Tensor) -> Bits:
    error = float(bits.std()) / math.sqrt(len(bits)) if len(bits) > 1 else None
    return Bits(float(bits.mean()), error)
