"""The training loss: t uniform in 1..T, network output against its target."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ddpmctl.core.denoiser import Denoiser

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
}


def denoising_loss(
    denoiser: Denoiser, x0: Tensor, t: Tensor, eps: Tensor, label: Tensor | None = None, *, loss: str = "l2"
) -> Tensor:
    """Mean loss over the batch, a float32 scalar. Ho et al. 2020, equation 14 (for l2 and eps).

    ``x0``, ``eps``: (B, C, H, W); ``t``: (B,) on the CPU, 1..T; ``label``: (B,) or None.
    """
    x_t = denoiser.schedule.q_sample(x0, t, eps)
    return LOSSES[loss](denoiser.output(x_t, t, label), denoiser.target(x0, t, eps))
