"""The training loss: network output against its target, at the levels of :mod:`ddpmctl.core.draws`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpmctl.core.bound import reverse_nats
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.transfer import send

LOSSES: dict[str, Callable[..., Tensor]] = {
    "l2": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
}


def min_snr(snr: Tensor) -> Tensor:
    """min(SNR, 5) / SNR: levels with little noise, of which there are many, no longer drown the others.

    Hang et al. 2023 (Min-SNR-gamma), section 3.4.
    """
    return 5 / snr.clamp(min=5)


def p2(snr: Tensor) -> Tensor:
    """1 / (1 + SNR): less on the last, imperceptible details. Choi et al. 2022 (P2), equation 8 with k = gamma = 1."""
    return 1 / (1 + snr)


WEIGHTINGS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "uniform": None,
    "min_snr": min_snr,
    "p2": p2,
}
"""How much a level counts by its SNR, as a factor on the squared error of eps, whatever the network predicts.

``uniform``: every level counts the same in the network's own target, which is something else for each prediction.
"""


VLB_WEIGHT = 0.001
"""lambda of Nichol & Dhariwal 2021, equation 16: how much the bound counts beside the loss of the prediction."""


def level_weights(denoiser: Denoiser, t: Tensor, weighting: str) -> Tensor:
    """Factors (B,) float64 on the loss in the network's own target at levels ``t``, (B,) on the CPU, 1..T."""
    of_snr, alpha_bar = WEIGHTINGS[weighting], denoiser.schedule.alpha_bar[t]
    snr = alpha_bar / (1 - alpha_bar)
    return torch.ones_like(snr) if of_snr is None else of_snr(snr) * denoiser.prediction.weight(snr)


def denoising_loss(
    denoiser: Denoiser,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    label: Tensor | None = None,
    *,
    loss: str = "l2",
    weighting: str = "uniform",
    weights: Tensor | None = None,
    vlb_weight: float = 0.0,
) -> Tensor:
    """Mean loss over the batch, a float32 scalar. Ho et al. 2020, equation 14 (for l2, eps and uniform).

    With ``vlb_weight`` so many times T times :func:`variance_loss` is added, T because the bound is a sum over t:
    Nichol & Dhariwal 2021, equation 16.

    ``x0``, ``eps``: (B, C, H, W); ``t``: (B,) on the CPU, 1..T; ``label``: (B,) or None. ``loss`` is a row of
    :data:`LOSSES`, ``weighting`` one of :data:`WEIGHTINGS`; ``weights`` (B,): those of a draw of t, None: 1.
    """
    x_t = denoiser.schedule.q_sample(x0, t, eps)
    prediction, fraction = denoiser.split(denoiser.output(x_t, t, label))
    target = denoiser.target(x0, t, eps)
    if WEIGHTINGS[weighting] is None and weights is None and not vlb_weight:
        return LOSSES[loss](prediction, target)
    each = LOSSES[loss](prediction, target, reduction="none").flatten(1).mean(1)
    each = each * send(level_weights(denoiser, t, weighting).to(each.dtype), each.device)
    if vlb_weight and fraction is not None:
        bits = variance_loss(denoiser, x0, x_t, t, prediction, fraction)
        each = each + vlb_weight * denoiser.schedule.timesteps * bits
    return (each if weights is None else each * send(weights.to(each.dtype), each.device)).mean()


def loss_of_each(
    denoiser: Denoiser, x0: Tensor, t: Tensor, eps: Tensor, label: Tensor | None = None, *, loss: str = "l2"
) -> Tensor:
    """The loss of each image of a batch, (B,) float32, every one counting the same; arguments are those of :func:`denoising_loss`."""
    prediction, _ = denoiser.split(denoiser.output(denoiser.schedule.q_sample(x0, t, eps), t, label))
    return LOSSES[loss](prediction, denoiser.target(x0, t, eps), reduction="none").flatten(1).mean(1)


def variance_loss(
    denoiser: Denoiser, x0: Tensor, x_t: Tensor, t: Tensor, prediction: Tensor, fraction: Tensor
) -> Tensor:
    """What the step from ``t`` costs with the learned variance, (B,) bits a pixel: for the variance to learn from alone.

    The mean is held fast, so that the prediction learns from its own loss. Nichol & Dhariwal 2021, section 3.1.
    """
    schedule = denoiser.schedule
    estimate, _ = denoiser.prediction.split(prediction.detach(), x_t, *schedule.at(t, x_t))
    nats = reverse_nats(schedule, "learned", x0, estimate, t, fraction)
    return nats.flatten(1).mean(1) / math.log(2)
