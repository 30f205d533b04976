"""The variational bound: how many nats an image costs under the reverse process, for the fixed variances of VARIANCES."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.noise import derived_generator
from ddpmctl.core.samplers import VARIANCES

_HALF_LEVEL = 1 / 255  # of a grey level, in [-1, 1]


class Bound(NamedTuple):
    """The parts of the bound, each (B,) float64 in nats over all pixels. Ho et al. 2020, equation 5.

    ``prior``: L_T, what of the image is left in x_T. ``steps``: L_1 + ... + L_(T-1). ``decoder``: L_0.
    """

    prior: Tensor
    steps: Tensor
    decoder: Tensor

    def bits_per_dim(self, dims: int) -> Tensor:
        """(B,) float64, for images of ``dims`` pixels times channels."""
        return (self.prior + self.steps + self.decoder) / (dims * math.log(2))


def strata(timesteps: int, draws: int) -> list[range]:
    """2..T cut into at most ``draws`` ranges, shorter where there is less noise and a step costs most."""
    if draws >= timesteps - 1:
        return [range(t, t + 1) for t in range(2, timesteps + 1)]
    edges = sorted({1 + round((timesteps - 1) * (i / draws) ** 2) for i in range(draws + 1)})
    return [range(low + 1, high + 1) for low, high in pairwise(edges)]


@torch.no_grad()
def variational_bound(
    denoiser: Denoiser,
    x0: Tensor,
    numbers: Sequence[int],
    *,
    draws: int = 32,
    label: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Bound]:
    """The bound on -log p(x0) of ``x0`` (B, C, H, W), for each row of VARIANCES, from the same ``draws`` + 1 estimates.

    ``x0`` on the CPU, where the sums are made in float64; the denoiser computes on ``device``, where ``label`` is.

    An image's noise follows from its number in ``numbers``. The sum over t is estimated without bias from one t in each
    of :func:`strata`, drawn evenly, times the length of the stratum (Nichol & Dhariwal 2021, section 3.3, weigh t too).
    Means and variances are those of :func:`ddpmctl.core.samplers.ddpm` with all T steps; the last one, t = 1, is the
    discretised decoder, and where its variance is 0 (``posterior``) it has that of t = 2, as in the code of Ho et al.
    """
    generators = [derived_generator("bound", number) for number in numbers]
    cut = strata(denoiser.schedule.timesteps, draws)
    shares = torch.stack([torch.rand(len(cut), generator=g, dtype=torch.float64) for g in generators])

    def estimate(t: Tensor) -> Tensor:
        eps = torch.stack([torch.randn(x0.shape[1:], generator=g, dtype=x0.dtype) for g in generators])
        x_t = denoiser.schedule.q_sample(x0, t, eps)
        return torch.stack([x_t, denoiser(x_t.to(device), t, label)[0].cpu()]).double()

    # q(x_0 | x_1, x_0) has no spread, and its mean is x_0: so that of p is the estimate.
    _, mean = estimate(torch.ones(len(x0), dtype=torch.int64))
    decoders = {name: _decoder(x0.double(), mean, _variance(denoiser, name, 1)) for name in VARIANCES}
    steps = {name: torch.zeros(len(x0), dtype=torch.float64) for name in VARIANCES}
    for i, stratum in enumerate(cut):
        t = stratum.start + (shares[:, i] * len(stratum)).long()
        _, estimated = estimate(t)
        error = (estimated - x0.double()).square().flatten(1)
        for name, total in steps.items():
            total += len(stratum) * _step(denoiser, name, t, error)
    prior = _prior(denoiser, x0.double())
    return {name: Bound(prior, steps[name], decoders[name]) for name in VARIANCES}


def _variance(denoiser: Denoiser, name: str, t: int) -> float:
    """sigma_t^2 of the reverse step from t, of the row ``name`` of VARIANCES; never 0."""
    abar, betas = denoiser.schedule.alpha_bar, denoiser.schedule.betas

    def at(t: int) -> float:
        return VARIANCES[name](float(betas[t]), float((1 - abar[t - 1]) / (1 - abar[t])))

    return at(t) or at(min(2, denoiser.schedule.timesteps))


def _step(denoiser: Denoiser, name: str, t: Tensor, error: Tensor) -> Tensor:
    """KL(q(x_(t-1) | x_t, x0) || p(x_(t-1) | x_t)), (B,), of ``error`` (B, dims), the squared errors of x0; t > 1."""
    abar, betas = denoiser.schedule.alpha_bar, denoiser.schedule.betas
    true = betas[t] * (1 - abar[t - 1]) / (1 - abar[t])
    ours = torch.tensor([_variance(denoiser, name, int(level)) for level in t], dtype=torch.float64)
    apart = abar[t - 1] * betas[t].square() / (1 - abar[t]).square() / ours
    constant = ((ours / true).log() + true / ours - 1) * error.shape[1]
    return (constant + apart * error.sum(dim=1)) / 2


def _prior(denoiser: Denoiser, x0: Tensor) -> Tensor:
    """KL(q(x_T | x0) || N(0, 1)), (B,)."""
    abar = float(denoiser.schedule.alpha_bar[-1])
    return (abar * x0.square() - abar - math.log(1 - abar)).flatten(1).sum(dim=1) / 2


def _decoder(x0: Tensor, mean: Tensor, variance: float) -> Tensor:
    """-log of N(mean, variance) over the grey level of each pixel, (B,). Ho et al. 2020, equation 13.

    The levels at the ends, 0 and 255, reach to infinity.
    """

    def below(edge: Tensor) -> Tensor:
        share: Tensor = torch.special.ndtr((edge - mean) / math.sqrt(variance))
        return share

    low = torch.where(x0 < -1 + _HALF_LEVEL, 0.0, below(x0 - _HALF_LEVEL))
    high = torch.where(x0 > 1 - _HALF_LEVEL, 1.0, below(x0 + _HALF_LEVEL))
    return -(high - low).clamp(min=1e-12).log().flatten(1).sum(dim=1)
