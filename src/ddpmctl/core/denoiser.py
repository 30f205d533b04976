"""The denoiser: a network, a schedule and a prediction type make a function from x_t to (x0, eps).

It alone interprets the network's output, and it alone knows that the network counts steps from 0.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpmctl.core.prediction import PREDICTIONS
from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.core.thresholds import THRESHOLDS
from ddpmctl.core.transfer import send


class Estimate(NamedTuple):
    """What a denoiser makes of x_t: ``x0`` and ``eps`` (B, C, H, W).

    ``fraction``: where between its least and its largest the variance of the reverse step lies, as the network says, 0 to
    1 but not forced to be (B, C, H, W); None where it says nothing.
    """

    x0: Tensor
    eps: Tensor
    fraction: Tensor | None


class Denoiser:
    """``denoiser(x_t, t, label) -> (x0, eps)``.

    ``threshold``: the row of :data:`THRESHOLDS` that keeps x0 within [-1, 1]; eps is made to agree with it.
    ``autocast``: dtype in which the network computes, None for float32; what goes in and comes out is of the dtype of
    x_t. ``null_label``: the class that stands for none, where the network has one. ``guidance``: w of :meth:`guided`,
    1 for none, and ``interval``: its lowest and highest t, as shares of T. ``learned_variance``: the network's output has
    a second half, of as many channels, from which :meth:`split` makes the fraction of an :class:`Estimate`.
    """

    def __init__(
        self,
        net: nn.Module | Callable[..., Tensor],
        schedule: NoiseSchedule,
        prediction: str = "eps",
        *,
        threshold: str = "clip",
        autocast: torch.dtype | None = None,
        null_label: int | None = None,
        guidance: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        learned_variance: bool = False,
    ) -> None:
        """Raises ``ValueError`` for a guidance without a null label, and for eps where alpha_bar_T is 0."""
        if prediction == "eps" and schedule.alpha_bar[-1] == 0:
            raise ValueError("eps says nothing of x0 where alpha_bar is 0")
        if guidance != 1 and null_label is None:
            raise ValueError("guidance needs a network with a null label")
        self.net, self.schedule, self.prediction = net, schedule, PREDICTIONS[prediction]
        self.null_label, self.guidance, self.interval = null_label, guidance, interval
        self.threshold, self.autocast = THRESHOLDS[threshold], autocast
        self.learned_variance = learned_variance

    def output(self, x_t: Tensor, t: int | Tensor, label: Tensor | None = None) -> Tensor:
        """What the network says, in the dtype of x_t: (B, C, H, W), or of twice the channels with a learned variance.

        ``t``: int or (B,) on the CPU, 1..T.
        """
        # Published DDPM networks are fed 0..T-1: the one place where t becomes an index.
        t_index = send(torch.as_tensor(t).reshape(-1) - 1, x_t.device).expand(len(x_t))
        with torch.autocast(x_t.device.type, self.autocast) if self.autocast else nullcontext():
            output = self.net(x_t, t_index, label)
        return output.to(x_t.dtype)

    def split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction (B, C, H, W) and the fraction in an :meth:`output`, which says -1 to 1 for 0 to 1.

        Nichol & Dhariwal 2021, section 3.1; the range is that of their code.
        """
        if not self.learned_variance:
            return output, None
        prediction, variance = output.chunk(2, dim=1)
        return prediction, (1 + variance) / 2

    def guided(self, x_t: Tensor, t: int | Tensor, label: Tensor | None = None) -> Tensor:
        """Classifier-free guidance: none + w (label - none), w = ``guidance``. Ho & Salimans 2022, equation 6 (w - 1 there).

        Said of the output, it holds for x0, eps and v alike, which follow from each other by affine maps. Outside of
        the interval w is 1 (Kynkaanniemi et al. 2024). Both go through the network in one batch. A learned variance is
        that with the label.
        """
        level, (low, high) = torch.as_tensor(t).reshape(-1), self.interval
        share = level.double() / self.schedule.timesteps
        inside = (low <= share) & (share <= high)
        if label is None or self.null_label is None or self.guidance == 1 or not inside.any():
            return self.output(x_t, t, label)
        none = torch.full_like(label, self.null_label)
        both = self.output(torch.cat([x_t, x_t]), level.expand(len(x_t)).repeat(2), torch.cat([label, none]))
        with_label, without = both.chunk(2)
        w = send(torch.where(inside, self.guidance, 1.0).to(x_t.dtype), x_t.device).view(-1, 1, 1, 1)
        if self.learned_variance:
            prediction, variance = with_label.chunk(2, dim=1)
            without = without.chunk(2, dim=1)[0]
            return torch.cat([without + w * (prediction - without), variance], dim=1)
        return without + w * (with_label - without)

    def target(self, x0: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """What the network should predict, (B, C, H, W)."""
        return self.prediction.target(x0, eps, *self.schedule.at(t, x0))

    def __call__(self, x_t: Tensor, t: int | Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Estimates (x0, eps), each (B, C, H, W), of the clean image and the noise in x_t."""
        x0, eps, _ = self.estimate(x_t, t, label)
        return x0, eps

    def estimate(self, x_t: Tensor, t: int | Tensor, label: Tensor | None = None) -> Estimate:
        """All that the network says of x_t, (B, C, H, W), guided and within the threshold."""
        signal, noise = self.schedule.at(t, x_t)
        prediction, fraction = self.split(self.guided(x_t, t, label))
        x0, eps = self.prediction.split(prediction, x_t, signal, noise)
        if self.threshold:
            x0 = self.threshold(x0)
            eps = (x_t - signal * x0) / noise
        return Estimate(x0, eps, fraction)
