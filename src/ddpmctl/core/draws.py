"""Draws of t: which noise levels a training step looks at, and how much each counts so that the loss stays unbiased.

A row is a function ``(denoiser, n, weighting, generator) -> Draw``; all it draws is from the generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.losses import level_weights

PIXEL_STD = 0.5
"""Of pixels in [-1, 1], about (Karras et al. 2022, table 1, sigma_data)."""


class Draw(NamedTuple):
    """Levels ``t`` (n,) int64 in 1..T, and ``weights`` (n,) float64, 1 / (T p(t)); None where all are 1. On the CPU."""

    t: Tensor
    weights: Tensor | None = None


def uniform(denoiser: Denoiser, n: int, weighting: str, generator: torch.Generator) -> Draw:
    """Each t by itself, all alike. Ho et al. 2020, algorithm 1."""
    return Draw(torch.randint(1, denoiser.schedule.timesteps + 1, (n,), generator=generator))


def stratified(denoiser: Denoiser, n: int, weighting: str, generator: torch.Generator) -> Draw:
    """Each t alike, and the batch spread evenly over 1..T, so that the loss varies less from batch to batch.

    Kingma et al. 2021 (VDM), appendix I.1.
    """
    T = denoiser.schedule.timesteps
    return Draw(1 + (T * _spread(n, generator)).long().clamp(max=T - 1))


def importance(denoiser: Denoiser, n: int, weighting: str, generator: torch.Generator) -> Draw:
    """More of the levels at which the loss is large, each counting less for it, and spread as :func:`stratified` is.

    The weighted loss keeps its mean, and varies least where p(t) is as sqrt(E[L_t^2]). Nichol & Dhariwal 2021,
    equation 18; that root is not measured as they do, but known beforehand: see :func:`probabilities`.
    """
    p = probabilities(denoiser, weighting)
    index = torch.searchsorted(p.cumsum(0), _spread(n, generator), right=True).clamp(max=len(p) - 1)
    return Draw(1 + index, 1 / (len(p) * p[index]))


T_SAMPLINGS: dict[str, Callable[[Denoiser, int, str, torch.Generator], Draw]] = {
    "uniform": uniform,
    "stratified": stratified,
    "importance": importance,
}


def probabilities(denoiser: Denoiser, weighting: str) -> Tensor:
    """p(t) of :func:`importance` for t = 1..T, (T,) float64: half of it even, half as the expected loss.

    The even half keeps every weight below 2, however far the loss of real images is from the expected one (Hesterberg
    1995, on defensive mixtures).
    """
    loss = expected_loss(denoiser, weighting)
    return (1 / len(loss) + loss / loss.sum()) / 2


def expected_loss(denoiser: Denoiser, weighting: str) -> Tensor:
    """Weighted l2 loss that the best denoiser of Gaussian pixels has at t = 1..T, (T,) float64.

    Given x_t, x0 has the variance s^2 (1 - abar) / (s^2 abar + 1 - abar), with s = :data:`PIXEL_STD`.
    """
    abar = denoiser.schedule.alpha_bar[1:]
    signal, noise = abar.sqrt(), (1 - abar).sqrt()
    off = (PIXEL_STD**2 * (1 - abar) / (PIXEL_STD**2 * abar + 1 - abar)).sqrt()
    # Where x0 is off by this, eps is by -a / s of it; a target is linear in both.
    error = denoiser.prediction.target(off, -signal / noise * off, signal, noise)
    return error.square() * level_weights(denoiser, torch.arange(1, len(abar) + 1), weighting)


def _spread(n: int, generator: torch.Generator) -> Tensor:
    """(u + i / n) mod 1 for i = 0..n-1, u even in [0, 1), in random order: (n,) float64, each even in [0, 1).

    The order is random because a batch may be cut into parts, of which batch norm wants all levels.
    """
    u = torch.rand(1, generator=generator, dtype=torch.float64)
    return ((u + torch.arange(n, dtype=torch.float64) / n) % 1)[torch.randperm(n, generator=generator)]
