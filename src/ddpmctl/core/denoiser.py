"""The denoiser: a network, a schedule and a prediction type make a function from x_t to (x0, eps).

It alone interprets the network's output, and it alone knows that the network counts steps from 0.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ddpmctl.core.prediction import PREDICTIONS
from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.core.thresholds import THRESHOLDS


class Denoiser:
    """``denoiser(x_t, t, label) -> (x0, eps)``.

    ``threshold``: the row of :data:`THRESHOLDS` that keeps x0 within [-1, 1]; eps is made to agree with it.
    ``autocast``: dtype in which the network computes, None for float32; what goes in and comes out is of the dtype of
    x_t.
    """

    def __init__(
        self,
        net: nn.Module | Callable[..., Tensor],
        schedule: NoiseSchedule,
        prediction: str = "eps",
        *,
        threshold: str = "clip",
        autocast: torch.dtype | None = None,
    ) -> None:
        self.net, self.schedule, self.prediction = net, schedule, PREDICTIONS[prediction]
        self.threshold, self.autocast = THRESHOLDS[threshold], autocast

    def output(self, x_t: Tensor, t: int | Tensor, label: Tensor | None = None) -> Tensor:
        """What the network says, (B, C, H, W) in the dtype of x_t. ``t``: int or (B,) on the CPU, 1..T."""
        # Published DDPM networks are fed 0..T-1: the one place where t becomes an index.
        t_index = (torch.as_tensor(t).reshape(-1) - 1).expand(len(x_t)).to(x_t.device)
        with torch.autocast(x_t.device.type, self.autocast) if self.autocast else nullcontext():
            output = self.net(x_t, t_index, label)
        return output.to(x_t.dtype)

    def target(self, x0: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """What the network should say, (B, C, H, W)."""
        return self.prediction.target(x0, eps, *self.schedule.at(t, x0))

    def __call__(self, x_t: Tensor, t: int | Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Estimates (x0, eps), each (B, C, H, W), of the clean image and the noise in x_t."""
        signal, noise = self.schedule.at(t, x_t)
        x0, eps = self.prediction.split(self.output(x_t, t, label), x_t, signal, noise)
        if self.threshold:
            x0 = self.threshold(x0)
            eps = (x_t - signal * x0) / noise
        return x0, eps
