"""Samplers: from noise x_T to an image, one step at a time.

A sampler is a generator ``(denoiser, x_T, timesteps, *, noise, label, **options) -> SampleStep``. ``timesteps``
falls from T to 0 (:func:`spaced_timesteps`); ``noise`` is called for each fresh draw. What to show, keep or save is the
caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ddpmctl.core.denoiser import Denoiser


class SampleStep(NamedTuple):
    """State after a step: noise level ``t`` (0 at the end), ``x_t`` there, and the estimate ``x0`` that led to it."""

    t: int
    x_t: Tensor
    x0: Tensor


Noise = Callable[[], Tensor]


VARIANCES: dict[str, Callable[[float, float], float]] = {
    "beta": lambda beta, shrink: beta,
    "posterior": lambda beta, shrink: beta * shrink,
}
"""sigma^2 of ddpm out of beta and (1 - abar_s) / (1 - abar_t): right for data that is pure noise, and one single point.

Ho et al. 2020, section 3.2.
"""


def spaced_timesteps(timesteps: int, steps: int) -> list[int]:
    """``steps`` + 1 levels falling evenly from T to 0, both included; all of them when ``steps`` is T.

    Raises ``ValueError`` unless 1 <= steps <= T.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps must be 1 to {timesteps}")
    return [timesteps - round(i * timesteps / steps) for i in range(steps + 1)]


@torch.no_grad()
def ddpm(
    denoiser: Denoiser,
    x_T: Tensor,
    timesteps: Sequence[int],
    *,
    noise: Noise,
    label: Tensor | None = None,
    variance: str = "beta",
) -> Iterator[SampleStep]:
    """Ancestral sampling. Ho et al. 2020, equations 6 and 7 and algorithm 2, for any falling levels t > s.

    alpha = abar_t / abar_s and beta = 1 - alpha; sigma^2 is the row ``variance`` of :data:`VARIANCES`. No noise is added
    on the way to s = 0.
    """
    alpha_bar = denoiser.schedule.alpha_bar.tolist()
    x_t = x_T
    for t, s in pairwise(timesteps):
        alpha = alpha_bar[t] / alpha_bar[s]
        beta = 1 - alpha
        shrink = (1 - alpha_bar[s]) / (1 - alpha_bar[t])
        x0, _ = denoiser(x_t, t, label)
        x_t = math.sqrt(alpha_bar[s]) * beta / (1 - alpha_bar[t]) * x0 + math.sqrt(alpha) * shrink * x_t
        if s > 0:
            x_t = x_t + math.sqrt(VARIANCES[variance](beta, shrink)) * noise()
        yield SampleStep(s, x_t, x0)


@torch.no_grad()
def ddim(
    denoiser: Denoiser,
    x_T: Tensor,
    timesteps: Sequence[int],
    *,
    noise: Noise,
    label: Tensor | None = None,
    eta: float = 0.0,
) -> Iterator[SampleStep]:
    """Implicit sampling. Song et al. 2021, equations 12 and 16; ``eta`` = 0 adds no noise, 1 is ddpm's posterior."""
    alpha_bar = denoiser.schedule.alpha_bar.tolist()
    x_t = x_T
    for t, s in pairwise(timesteps):
        shrink = (1 - alpha_bar[s]) / (1 - alpha_bar[t])
        sigma = eta * math.sqrt(shrink * (1 - alpha_bar[t] / alpha_bar[s]))
        x0, eps = denoiser(x_t, t, label)
        x_t = math.sqrt(alpha_bar[s]) * x0 + math.sqrt(max(1 - alpha_bar[s] - sigma**2, 0)) * eps
        if sigma > 0:
            x_t = x_t + sigma * noise()
        yield SampleStep(s, x_t, x0)


SAMPLERS: dict[str, Callable[..., Iterator[SampleStep]]] = {
    "ddpm": ddpm,
    "ddim": ddim,
}
