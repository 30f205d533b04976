"""The variational bound: how many nats an image costs under the reverse process, with each of the variances of VARIANCES."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.noise import derived_generator
from ddpmctl.core.samplers import VARIANCES, variances_of
from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.core.transfer import send

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
    """The bound on -log p(x0) of ``x0`` (B, C, H, W), for each of :func:`variances_of`, from the same ``draws`` + 1 estimates.

    ``x0`` on the CPU, where the sums are made in float64; the denoiser computes on ``device``, where ``label`` is.

    An image's noise follows from its number in ``numbers``. The sum over t is estimated without bias from one t in each
    of :func:`strata`, drawn evenly, times the length of the stratum (Nichol & Dhariwal 2021, section 3.3, weigh t too).
    Means and variances are those of :func:`ddpmctl.core.samplers.ddpm` with all T steps; the last one, t = 1, is the
    discretised decoder.
    """
    generators = [derived_generator("bound", number) for number in numbers]
    schedule, names = denoiser.schedule, variances_of(denoiser)
    cut = strata(schedule.timesteps, draws)
    shares = torch.stack([torch.rand(len(cut), generator=g, dtype=torch.float64) for g in generators])

    def nats(t: Tensor) -> dict[str, Tensor]:
        eps = torch.stack([torch.randn(x0.shape[1:], generator=g, dtype=x0.dtype) for g in generators])
        x_t = schedule.q_sample(x0, t, eps)
        found, _, fraction = denoiser.estimate(x_t.to(device), t, label)
        found, fraction = found.cpu().double(), None if fraction is None else fraction.cpu().double()
        each = {name: reverse_nats(schedule, name, x0.double(), found, t, fraction) for name in names}
        return {name: cost.flatten(1).sum(dim=1) for name, cost in each.items()}

    decoders = nats(torch.ones(len(x0), dtype=torch.int64))
    steps = {name: torch.zeros(len(x0), dtype=torch.float64) for name in names}
    for i, stratum in enumerate(cut):
        t = stratum.start + (shares[:, i] * len(stratum)).long()
        for name, cost in nats(t).items():
            steps[name] += len(stratum) * cost
    prior = _prior(schedule, x0.double())
    return {name: Bound(prior, steps[name], decoders[name]) for name in names}


def reverse_nats(
    schedule: NoiseSchedule, name: str, x0: Tensor, estimate: Tensor, t: Tensor, fraction: Tensor | None
) -> Tensor:
    """What the step from ``t`` (B,) on the CPU costs, by pixel: (B, C, H, W) like ``x0`` and its ``estimate``.

    KL(q(x_(t-1) | x_t, x0) || p(x_(t-1) | x_t)), and for t = 1 -log p(x0 | x_1); p has the row ``name`` of VARIANCES, of
    which ``learned`` goes by the ``fraction`` (B, C, H, W). Ho et al. 2020, equation 5.
    """
    # At t = 1, where q has no spread, there is no such divergence: that of t = 2 is not looked at.
    abar, beta, upper = schedule.alpha_bar, schedule.betas, t.clamp(min=min(2, schedule.timesteps))
    true = _beside(beta[upper] * (1 - abar[upper - 1]) / (1 - abar[upper]), x0)
    pull = _beside(abar[upper - 1] * (beta[upper] / (1 - abar[upper])).square(), x0)
    ours = _variance(schedule, name, t, fraction, x0)
    divergence = ((ours / true).log() + (true + pull * (estimate - x0).square()) / ours - 1) / 2
    first = (t == 1).view(-1, 1, 1, 1)
    if not first.any():
        return divergence
    # The mean of p at t = 1 is the estimate, as that of q is x0.
    return torch.where(send(first, x0.device), decoder_nats(x0, estimate, ours), divergence)


def _variance(schedule: NoiseSchedule, name: str, t: Tensor, fraction: Tensor | None, like: Tensor) -> Tensor:
    """sigma_t^2 of the reverse step from ``t`` to t - 1, (B, 1, 1, 1) or (B, C, H, W) as ``like`` is; never 0.

    The posterior variance of t = 1, which is 0, is that of t = 2, as in the code of Ho et al. and of Nichol & Dhariwal.
    """
    abar, beta = schedule.alpha_bar, schedule.betas
    shrink = torch.cat([torch.zeros(1, dtype=torch.float64), (1 - abar[:-1]) / (1 - abar[1:])])
    second = min(2, schedule.timesteps)
    shrink[1] = beta[second] * shrink[second] / beta[1]
    found: Tensor = VARIANCES[name](_beside(beta[t], like), _beside(shrink[t], like), fraction)
    return found


def _beside(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (B,) as (B, 1, 1, 1) of the dtype and device of ``like``."""
    return send(values.view(-1, 1, 1, 1).to(like.dtype), like.device)


def _prior(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """KL(q(x_T | x0) || N(0, 1)), (B,)."""
    abar = float(schedule.alpha_bar[-1])
    return (abar * x0.square() - abar - math.log(1 - abar)).flatten(1).sum(dim=1) / 2


def decoder_nats(x0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """-log of N(mean, variance) over the grey level of each pixel, (B, C, H, W). Ho et al. 2020, equation 13.

    The levels at the ends, 0 and 255, reach to infinity.
    """
    scale = (2 * variance).rsqrt()

    def below(edge: Tensor) -> Tensor:
        return (1 + torch.erf((edge - mean) * scale)) / 2

    low = torch.where(x0 < -1 + _HALF_LEVEL, 0.0, below(x0 - _HALF_LEVEL))
    high = torch.where(x0 > 1 - _HALF_LEVEL, 1.0, below(x0 + _HALF_LEVEL))
    return -(high - low).clamp(min=1e-12).log()
