"""Interpolation: from images to the noise that a deterministic sampler makes them of, and the way from one to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.samplers import SampleStep


@torch.no_grad()
def encode(
    denoiser: Denoiser, x0: Tensor, timesteps: Sequence[int], *, label: Tensor | None = None
) -> Iterator[SampleStep]:
    """Noise out of images (B, C, H, W): ddim's equation upwards. Song et al. 2021 (DDIM), section 4.3, equation 13.

    ``timesteps`` rise from 0 to T. In x / sqrt(abar) and sigma = sqrt(1 - abar) / sqrt(abar) a step is Euler's, with
    eps as it is at its start; once more with eps as that finds it at its end, it all but undoes ddim's step down. Two
    evaluations a step bring the image back closer than twice the steps do. At level 0, of which the network knows
    nothing, it is asked for level 1.
    """
    alpha_bar = denoiser.schedule.alpha_bar
    signal, spread = alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist()
    x_s = x0
    for s, t in pairwise(timesteps):
        x_t, level = x_s, max(s, 1)
        for _ in range(2):
            estimate, eps = denoiser(x_t, level, label)
            ratio = signal[t] / signal[s]  # written so that it holds where nothing is left of the image at T
            x_t, level = ratio * x_s + (spread[t] - ratio * spread[s]) * eps, t
        yield SampleStep(t, x_t, estimate)
        x_s = x_t


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """On the arc from ``a`` (``share`` = 0) to ``b`` (1), both of any one shape. Shoemake 1985, equation for Slerp.

    The length goes evenly from that of ``a`` to that of ``b``: noise of many values has all but one length, and on the
    straight line it would be shorter midway, which is no noise that a model has seen. Where ``b`` is the opposite of
    ``a`` or next to it, no arc is defined, or it is the straight line: that line is taken.
    """
    x, y = a.double(), b.double()
    length_x, length_y = x.norm(), y.norm()
    angle = torch.acos(((x * y).sum() / (length_x * length_y)).clamp(-1, 1))
    if not torch.sin(angle) > 1e-6:  # nor is there an angle where one is 0
        return torch.lerp(a, b, share)
    arc = (torch.sin((1 - share) * angle) * x / length_x + torch.sin(share * angle) * y / length_y) / torch.sin(angle)
    between: Tensor = torch.lerp(length_x, length_y, share) * arc
    return between.to(a.dtype)
