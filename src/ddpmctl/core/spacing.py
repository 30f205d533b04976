"""Spacing: which of the T levels a sampler visits on its way from T to 0.

A row is a function ``(schedule, steps) -> levels``: where the ``steps`` levels after T should lie, in any order of
nearness; :func:`spaced_timesteps` makes of them a grid that falls with every step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpmctl.core.schedule import NoiseSchedule


def linear(schedule: NoiseSchedule, steps: int) -> list[int]:
    """Evenly in t: T - i T / steps. The "trailing" of Lin et al. 2023, table 2, since the network is fed t - 1.

    (The two round a half the other way where T is odd.) Their "leading" and "linspace" start below T, or end above 0.
    """
    T = schedule.timesteps
    return [T - round(i * T / steps) for i in range(1, steps + 1)]


def quadratic(schedule: NoiseSchedule, steps: int) -> list[int]:
    """Evenly in sqrt(t): denser where little noise is left. Song et al. 2021 (DDIM), appendix D.2."""
    return [round(schedule.timesteps * (1 - i / steps) ** 2) for i in range(1, steps + 1)]


def karras(schedule: NoiseSchedule, steps: int) -> list[int]:
    """Evenly in sigma^(1/7), sigma = sqrt(1 - abar) / sqrt(abar), from T to level 1. Karras et al. 2022, equation 5."""
    sigma = torch.exp(-_ends(schedule)) ** (1 / 7)
    return _nearest(schedule, -7 * _evenly(sigma, steps).log())


def logsnr(schedule: NoiseSchedule, steps: int) -> list[int]:
    """Evenly in lambda from T to level 1. Lu et al. 2022 (DPM-Solver), on step sizes."""
    return _nearest(schedule, _evenly(_ends(schedule), steps))


def _ends(schedule: NoiseSchedule) -> Tensor:
    """lambda of T, and of level 1. Where that of T is infinite, the grid lies as if it began at T - 1."""
    lam = schedule.half_log_snr()
    return lam[[-1 if lam[-1].isfinite() else -2, 1]]


def _evenly(ends: Tensor, steps: int) -> Tensor:
    """``steps`` numbers evenly from the first of ``ends`` (2,) to the second, but the first itself."""
    share = torch.arange(1, steps, dtype=torch.float64) / max(steps - 1, 1)
    return ends[0] + share * (ends[1] - ends[0])


def _nearest(schedule: NoiseSchedule, lam: Tensor) -> list[int]:
    """The level 1..T whose lambda is nearest to each of ``lam``, and 0 at the end."""
    rising = schedule.half_log_snr()[1:].flip(0)
    middles = (rising[1:] + rising[:-1]) / 2
    return [*(schedule.timesteps - torch.searchsorted(middles, lam)).tolist(), 0]


SPACINGS: dict[str, Callable[[NoiseSchedule, int], list[int]]] = {
    "linear": linear,
    "trailing": linear,  # as diffusers calls it
    "quadratic": quadratic,
    "karras": karras,
    "logsnr": logsnr,
}


def spaced_timesteps(schedule: NoiseSchedule, steps: int, spacing: str = "linear") -> list[int]:
    """``steps`` + 1 levels that fall from T to 0, both included, as the row ``spacing`` of :data:`SPACINGS` has them.

    Where it asks for a level twice, the next one that is free is taken: so there are ``steps`` steps always, and
    ``steps`` = T is every level. Raises ``ValueError`` unless 1 <= steps <= T.
    """
    if not 1 <= steps <= schedule.timesteps:
        raise ValueError(f"steps must be 1 to {schedule.timesteps}")
    grid = [schedule.timesteps]
    for left, level in zip(range(steps - 1, -1, -1), SPACINGS[spacing](schedule, steps), strict=True):
        grid.append(max(left, min(grid[-1] - 1, level)))
    return grid
