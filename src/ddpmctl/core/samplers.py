"""Samplers: from noise x_T to an image, one step at a time.

A sampler is a generator ``(denoiser, x_T, timesteps, *, noise, label, **options) -> SampleStep``. ``timesteps``
falls from T to 0 (:mod:`ddpmctl.core.spacing`); ``noise`` is called for each fresh draw. What to show, keep or save
is the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpmctl.core.denoiser import Denoiser


class SampleStep(NamedTuple):
    """State after a step: noise level ``t`` (0 at the end), ``x_t`` there, and the estimate ``x0`` that led to it."""

    t: int
    x_t: Tensor
    x0: Tensor


Noise = Callable[[], Tensor]


VARIANCES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "beta": lambda beta, shrink, fraction: beta,
    "posterior": lambda beta, shrink, fraction: beta * shrink,
    "learned": lambda beta, shrink, fraction: beta * shrink ** (1 - fraction),
}
"""sigma^2 of ddpm out of beta, shrink = (1 - abar_s) / (1 - abar_t) and the network's fraction, each a number or a tensor.

``beta`` is right for data that is pure noise, ``posterior`` for one single point: Ho et al. 2020, section 3.2. ``learned``
lies between them, exp(v log beta + (1 - v) log(beta shrink)): Nichol & Dhariwal 2021, equation 15.
"""


def variances_of(denoiser: Denoiser) -> list[str]:
    """The rows of :data:`VARIANCES` that ``denoiser`` can go by, its own first: what ddpm takes unless told."""
    fixed = [name for name in VARIANCES if name != "learned"]
    return ["learned", *fixed] if denoiser.learned_variance else fixed


@torch.no_grad()
def ddpm(
    denoiser: Denoiser,
    x_T: Tensor,
    timesteps: Sequence[int],
    *,
    noise: Noise,
    label: Tensor | None = None,
    variance: str | None = None,
) -> Iterator[SampleStep]:
    """Ancestral sampling. Ho et al. 2020, equations 6 and 7 and algorithm 2, for any falling levels t > s.

    alpha = abar_t / abar_s and beta = 1 - alpha; sigma^2 is the row ``variance`` of :data:`VARIANCES`, None: the first of
    :func:`variances_of`. No noise is added on the way to s = 0. Raises ``ValueError`` for ``learned`` where it is not.
    """
    if variance == "learned" and not denoiser.learned_variance:
        raise ValueError("the denoiser has not learned a variance")
    sigma_squared = VARIANCES[variance or variances_of(denoiser)[0]]
    alpha_bar = denoiser.schedule.alpha_bar.tolist()
    x_t = x_T
    for t, s in pairwise(timesteps):
        alpha = alpha_bar[t] / alpha_bar[s]
        beta = 1 - alpha
        shrink = (1 - alpha_bar[s]) / (1 - alpha_bar[t])
        x0, _, fraction = denoiser.estimate(x_t, t, label)
        x_t = math.sqrt(alpha_bar[s]) * beta / (1 - alpha_bar[t]) * x0 + math.sqrt(alpha) * shrink * x_t
        if s > 0:
            squared = sigma_squared(beta, shrink, fraction)
            x_t = x_t + (squared.sqrt() if isinstance(squared, Tensor) else math.sqrt(squared)) * noise()
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


@torch.no_grad()
def dpm_solver(
    denoiser: Denoiser, x_T: Tensor, timesteps: Sequence[int], *, noise: Noise, label: Tensor | None = None
) -> Iterator[SampleStep]:
    """DPM-Solver++(2M): the linear part of the equation solved exactly, x0 extrapolated to the middle of the step.

    Lu et al. 2022 (DPM-Solver++), algorithm 2, with h = lambda_s - lambda_t:

        x_s = sqrt((1 - abar_s) / (1 - abar_t)) x_t + sqrt(abar_s) (1 - e^-h) x0_midway

    Second order; the first step and the one to s = 0, where lambda is infinite, are of first order, which is ddim.
    """
    signal, sigma, lam = _coefficients(denoiser)
    x_t, past = x_T, list[Estimate]()
    for t, s in pairwise(timesteps):
        h = lam[s] - lam[t]
        x0, _ = denoiser(x_t, t, label)
        past = [*past[-1:], (lam[t], x0)]
        x_t = sigma[s] / sigma[t] * x_t - signal[s] * math.expm1(-h) * _midway(past, lam[s])
        yield SampleStep(s, x_t, x0)


@torch.no_grad()
def dpm_solver_sde(
    denoiser: Denoiser, x_T: Tensor, timesteps: Sequence[int], *, noise: Noise, label: Tensor | None = None
) -> Iterator[SampleStep]:
    """SDE-DPM-Solver++(2M): :func:`dpm_solver` for the stochastic equation, with noise z at every step but the last.

    Lu et al. 2022 (DPM-Solver++), on diffusion SDEs:

        x_s = sqrt((1 - abar_s) / (1 - abar_t)) e^-h x_t + sqrt(abar_s) (1 - e^-2h) x0_midway
              + sqrt((1 - abar_s) (1 - e^-2h)) z

    Its steps of first order are those of ddpm with variance ``posterior``.
    """
    signal, sigma, lam = _coefficients(denoiser)
    x_t, past = x_T, list[Estimate]()
    for t, s in pairwise(timesteps):
        h = lam[s] - lam[t]
        x0, _ = denoiser(x_t, t, label)
        past = [*past[-1:], (lam[t], x0)]
        x_t = sigma[s] / sigma[t] * math.exp(-h) * x_t - signal[s] * math.expm1(-2 * h) * _midway(past, lam[s])
        if s > 0:
            x_t = x_t + sigma[s] * math.sqrt(-math.expm1(-2 * h)) * noise()
        yield SampleStep(s, x_t, x0)


@torch.no_grad()
def unipc(
    denoiser: Denoiser, x_T: Tensor, timesteps: Sequence[int], *, noise: Noise, label: Tensor | None = None
) -> Iterator[SampleStep]:
    """UniPC-2: predict x_s as :func:`dpm_solver` does, and correct it when x0 is known there, for third order.

    Zhao et al. 2023, multistep, B(h) = e^h - 1 ("bh2"), predicting data. Evaluations: one a step, for x0 at the
    prediction of x_s stands in for x0 at the corrected one. It costs two more images in memory than dpm_solver does,
    and helps where x0 is smooth in lambda: less where it is clipped, or steps are very few.
    """
    signal, sigma, lam = _coefficients(denoiser)
    x_t, x_u, past = x_T, x_T, list[Estimate]()
    for i, (t, s) in enumerate(pairwise(timesteps)):
        x0, _ = denoiser(x_t, t, label)
        past = [*past[-2:], (lam[t], x0)]
        if i > 0:
            u = timesteps[i - 1]
            x_t = sigma[t] / sigma[u] * x_u - signal[t] * math.expm1(lam[u] - lam[t]) * _between(past)
        x_u = x_t
        x_t = sigma[s] / sigma[t] * x_t - signal[s] * math.expm1(lam[t] - lam[s]) * _midway(past, lam[s])
        yield SampleStep(s, x_t, x0)


@torch.no_grad()
def heun(
    denoiser: Denoiser, x_T: Tensor, timesteps: Sequence[int], *, noise: Noise, label: Tensor | None = None
) -> Iterator[SampleStep]:
    """Heun's method on dx/dsigma = eps. Karras et al. 2022, algorithm 1 without its noise.

    It runs in x / sqrt(abar) and sigma = sqrt(1 - abar) / sqrt(abar), where Euler's step is ddim's. Second order, for
    two evaluations a step but one at the last. It needs levels spaced by their noise (``karras``, ``logsnr``): where a
    schedule ends in next to no signal, as cosine does, even steps in t begin with a leap in sigma that it overshoots.
    From where there is no signal at all, and sigma is infinite, the same step is made in x / sqrt(1 - abar) and 1 / sigma,
    along which x0 is the slope.
    """
    signal, spread, lam = _coefficients(denoiser)
    sigma = [math.exp(-lam_t) for lam_t in lam]
    x_t = x_T
    for t, s in pairwise(timesteps):
        x0, eps = denoiser(x_t, t, label)
        x_t = signal[s] * x0 + spread[s] * eps
        if s > 0:
            x0_s, eps_s = denoiser(x_t, s, label)
            bend = x0_s - x0 if math.isinf(sigma[t]) else (sigma[s] - sigma[t]) * (eps_s - eps)
            x_t = x_t + signal[s] * bend / 2
        yield SampleStep(s, x_t, x0)


Estimate = tuple[float, Tensor]
"""lambda_t, and x0 as it was estimated there."""


def _coefficients(denoiser: Denoiser) -> tuple[list[float], list[float], list[float]]:
    """sqrt(abar_t), sqrt(1 - abar_t) and lambda_t for t = 0..T: alpha, sigma and lambda of Lu et al. and Zhao et al."""
    alpha_bar = denoiser.schedule.alpha_bar
    return alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist(), denoiser.schedule.half_log_snr().tolist()


def _midway(past: list[Estimate], lam_s: float) -> Tensor:
    """x0 halfway from the last of ``past`` to ``lam_s``, on the line through the last two; the last where that ends.

    Where lambda_u is minus infinity the line is level.
    """
    lam_t, x0 = past[-1]
    if len(past) < 2 or math.isinf(lam_s):
        return x0
    lam_u, x0_u = past[-2]
    return x0 + (lam_s - lam_t) / (lam_t - lam_u) / 2 * (x0 - x0_u)


def _between(past: list[Estimate]) -> Tensor:
    """Mean of x0 over the step between the last two of ``past``, by e^lambda, on the parabola through the last three.

    The midpoint where there are two, which needs no finite lambda_u: it is the trapezoid in e^lambda.
    Zhao et al. 2023, with tau = (lambda - lambda_u) / (lambda_t - lambda_u).
    """
    (lam_u, x0_u), (lam_t, x0_t) = past[-2:]
    if len(past) < 3:
        return (x0_u + x0_t) / 2
    lam_w, x0_w = past[-3]
    h = lam_t - lam_u
    tau_w = (lam_w - lam_u) / h
    mean_tau = -1 / h - 1 / math.expm1(-h)
    mean_tau_2 = -2 * mean_tau / h - 1 / math.expm1(-h)
    rho_w = (mean_tau - mean_tau_2) / (1 - tau_w)
    return x0_u + rho_w / tau_w * (x0_w - x0_u) + (mean_tau - rho_w) * (x0_t - x0_u)


SAMPLERS: dict[str, Callable[..., Iterator[SampleStep]]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm++": dpm_solver,
    "dpm++sde": dpm_solver_sde,
    "unipc": unipc,
    "heun": heun,
}


def evaluations(sampler: str, steps: int) -> int:
    """How often the row ``sampler`` calls the network in so many steps that end at 0."""
    return 2 * steps - 1 if sampler == "heun" else steps
