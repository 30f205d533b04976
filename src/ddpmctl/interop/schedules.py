"""The noise schedule of another tool as one of ours: the same alpha_bar, or none."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpmctl.core.schedule import SCHEDULES, NoiseSchedule

TOLERANCE = 1e-6
"""Of signal and noise, sqrt(abar) and sqrt(1 - abar): theirs are float32. A beta_1 of 1.01e-4 for 1e-4 is 50 times as much."""


def named(betas: Tensor) -> tuple[str, bool] | None:
    """(name, zero_snr) of our schedule with these ``betas`` (T,), as :meth:`NoiseSchedule.named` takes them; None: none."""
    try:
        theirs = NoiseSchedule(betas, max_beta=1.0)
    except ValueError:
        return None
    zero_snr = bool(theirs.alpha_bar[-1] == 0)
    for name in SCHEDULES:
        if same(NoiseSchedule.named(name, theirs.timesteps, zero_snr=zero_snr), theirs):
            return name, zero_snr
    return None


def same(ours: NoiseSchedule, theirs: NoiseSchedule) -> bool:
    """Whether signal and noise are equal at every t, within :data:`TOLERANCE`."""
    gaps = (
        (ours.alpha_bar.sqrt() - theirs.alpha_bar.sqrt()).abs().max(),
        ((1 - ours.alpha_bar).sqrt() - (1 - theirs.alpha_bar).sqrt()).abs().max(),
    )
    return bool(torch.stack(gaps).max() <= TOLERANCE)
