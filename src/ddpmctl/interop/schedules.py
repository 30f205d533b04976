"""The noise schedule of another tool as one of ours: the same alpha_bar, or none."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ddpmctl.config import LEAST_SHIFT, MOST_SHIFT
from ddpmctl.core.schedule import SCHEDULES, NoiseSchedule

TOLERANCE = 1e-6
"""Of signal and noise, sqrt(abar) and sqrt(1 - abar): theirs are float32. A beta_1 of 1.01e-4 for 1e-4 is 50 times as much."""


class Named(NamedTuple):
    """What :meth:`NoiseSchedule.named` takes."""

    name: str
    shift: float
    zero_snr: bool


def named(betas: Tensor) -> Named | None:
    """Our schedule with these ``betas`` (T,); None: there is none."""
    try:
        theirs = NoiseSchedule(betas, max_beta=1.0)
    except ValueError:
        return None
    zero_snr = bool(theirs.alpha_bar[-1] == 0)
    for name in SCHEDULES:
        plain = NoiseSchedule.named(name, theirs.timesteps, zero_snr=zero_snr)
        if same(plain, theirs):
            return Named(name, 1.0, zero_snr)
        for shift in _shifts(plain, theirs, at=1 if zero_snr else theirs.timesteps // 2):
            if same(NoiseSchedule.named(name, theirs.timesteps, shift=shift, zero_snr=zero_snr), theirs):
                return Named(name, shift, zero_snr)
    return None


def _shifts(plain: NoiseSchedule, theirs: NoiseSchedule, *, at: int) -> tuple[float, ...]:
    """By which ``theirs`` may be ``plain`` shifted: as a person would write it, and as exactly as it can be told.

    Read off ``at`` a level: the middle tells it best, but zero terminal SNR leaves only level 1 as it was.
    """
    shift = float((plain.half_log_snr()[at] - theirs.half_log_snr()[at]).exp())
    as_told = (float(f"{shift:.{digits}g}") for digits in (3, 5, 12))
    return tuple(shift for shift in as_told if LEAST_SHIFT <= shift <= MOST_SHIFT)


def same(ours: NoiseSchedule, theirs: NoiseSchedule) -> bool:
    """Whether signal and noise are equal at every t, within :data:`TOLERANCE`."""
    gaps = (
        (ours.alpha_bar.sqrt() - theirs.alpha_bar.sqrt()).abs().max(),
        ((1 - ours.alpha_bar).sqrt() - (1 - theirs.alpha_bar).sqrt()).abs().max(),
    )
    return bool(torch.stack(gaps).max() <= TOLERANCE)
