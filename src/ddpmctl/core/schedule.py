"""The noise schedule: how much of the image is left at each of T noise levels.

Tables are float64 and stay on the CPU; coefficients are computed there and cast where they are used, since
1 - alpha_bar near t = 0 loses most of its digits in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpmctl.core.transfer import send


def linear(timesteps: int) -> Tensor:
    """betas (T,) evenly from 1e-4 to 0.02 at T = 1000, scaled by 1000/T so that abar_T hardly depends on T.

    Ho et al. 2020, section 4.
    """
    scale = 1000 / timesteps
    return torch.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=torch.float64)


def cosine(timesteps: int) -> Tensor:
    """betas (T,) of alpha_bar = cos^2((t/T + s) / (1 + s) * pi/2), s = 0.008. Nichol & Dhariwal 2021, equation 17."""
    s = 0.008
    t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    return _betas_of(torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2)


def sigmoid(timesteps: int) -> Tensor:
    """betas (T,) of alpha_bar falling as a sigmoid from -3 to 3. Jabri et al. 2022, appendix B, tau = 1."""
    t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    falling = torch.sigmoid(3 - 6 * t)
    return _betas_of((falling - falling[-1]) / (falling[0] - falling[-1]))


def _betas_of(alpha_bar: Tensor) -> Tensor:
    """betas (T,) out of alpha_bar (T+1,): beta_t = 1 - abar_t / abar_{t-1}."""
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "linear": linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
}

MAX_BETA = 0.999
"""Cap on every beta of a row, before it is shifted: the last step must not divide by zero (Nichol & Dhariwal 2021, section 3.2)."""


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """betas (T,) float64 with abar_T = 0: sqrt(abar) shifted and scaled, so that it is 0 at T and unchanged at 1.

    Lin et al. 2023, algorithm 1. The last beta is 1. Raises ``ValueError`` for T < 2, where the two ends are one.
    """
    if len(betas) < 2:
        raise ValueError("zero terminal SNR needs two steps or more")
    root = torch.cumprod(1 - betas.double(), dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return _betas_of(torch.cat([torch.ones(1, dtype=torch.float64), root**2]))


def shifted(betas: Tensor, shift: float) -> Tensor:
    """betas (T,) float64 of ``shift`` times the noise beside the image: SNR / shift^2 at every t.

    Hoogeboom et al. 2023 (simple diffusion), section 3.1, where the shift is the size over that which the schedule was made for: the
    larger or flatter an image, the more noise it shows through.
    """
    alpha_bar = torch.cumprod(1 - betas.double(), dim=0)
    noisier = alpha_bar / (alpha_bar + shift**2 * (1 - alpha_bar))
    return _betas_of(torch.cat([torch.ones(1, dtype=torch.float64), noisier]))


class NoiseSchedule:
    """Tables over t = 0..T, where 0 is the clean image.

    ``betas``, ``alphas``, ``alpha_bar``: (T+1,) float64 on the CPU; beta_0 = 0, alpha_bar_0 = 1. alpha_bar_T is 0 where
    beta_T is 1, which a ``max_beta`` of 1 allows.
    """

    def __init__(self, betas: Tensor, *, max_beta: float = MAX_BETA) -> None:
        """``betas``: (T,) in (0, 1], for t = 1..T, cut at ``max_beta``. Raises ``ValueError`` when they are out of range."""
        if betas.ndim != 1 or not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError("betas must be one row of numbers in (0, 1]")
        self.betas = torch.cat([torch.zeros(1, dtype=torch.float64), betas.double().cpu().clamp(max=max_beta)])
        self.alphas = 1 - self.betas
        self.alpha_bar = torch.cumprod(self.alphas, dim=0)

    @classmethod
    def named(cls, name: str, timesteps: int, *, shift: float = 1.0, zero_snr: bool = False) -> NoiseSchedule:
        """The schedule of row ``name`` in :data:`SCHEDULES`, then :func:`shifted`; with ``zero_snr`` after :func:`zero_terminal_snr`."""
        betas = SCHEDULES[name](timesteps).clamp(max=MAX_BETA)
        if shift != 1:
            betas = shifted(betas, shift)
        return cls(zero_terminal_snr(betas) if zero_snr else betas, max_beta=1.0)

    @property
    def timesteps(self) -> int:
        """T, the number of noising steps."""
        return len(self.betas) - 1

    def at(self, t: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal sqrt(abar_t) and noise sqrt(1 - abar_t), of the dtype and device of ``like`` and broadcast to it.

        ``t``: int, or (B,) on the CPU; 0..T. Returns two tensors of shape (1 or B, 1, ..., 1).
        """
        index = torch.as_tensor(t).reshape(-1)
        abar = self.alpha_bar[index].reshape(-1, *[1] * (like.ndim - 1))
        pair = send(torch.stack([abar.sqrt(), (1 - abar).sqrt()]).to(like.dtype), like.device)
        return pair[0], pair[1]

    def q_sample(self, x0: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps. Ho et al. 2020, equation 4. All (B, C, H, W)."""
        signal, noise = self.at(t, x0)
        return signal * x0 + noise * eps

    def half_log_snr(self) -> Tensor:
        """lambda_t = log(sqrt(abar_t) / sqrt(1 - abar_t)), (T+1,) float64; falls with t, infinite at t = 0.

        At T it is minus infinity where alpha_bar_T is 0, and so is :meth:`snr_db`.

        Lu et al. 2022 (DPM-Solver), section 3.1: the variable in which the sampler's equation is nearly linear.
        """
        return (self.alpha_bar.log() - (1 - self.alpha_bar).log()) / 2

    def snr_db(self) -> Tensor:
        """Signal-to-noise ratio 10 log10(abar_t / (1 - abar_t)) in dB, (T+1,) float64; infinite at t = 0."""
        return 10 * torch.log10(self.alpha_bar / (1 - self.alpha_bar))
