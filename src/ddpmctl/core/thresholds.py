"""Thresholds: what is done to an estimate of the clean image that leaves [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

PERCENTILE = 0.995


def clip(x0: Tensor) -> Tensor:
    """Each pixel to the nearest of [-1, 1]. Ho et al. 2020 in their code."""
    return x0.clamp(-1, 1)


def dynamic(x0: Tensor) -> Tensor:
    """Each image cut at s = the 99.5th percentile of abs(x0), and divided by s; as ``clip`` where s is below 1.

    Saharia et al. 2022 (Imagen), section 2.3. ``x0``: (B, C, H, W); some releases of PyTorch take 2^24 values an image at most.
    """
    s = x0.abs().flatten(1).quantile(PERCENTILE, dim=1).clamp(min=1).view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-s, s) / s


THRESHOLDS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "clip": clip,
    "dynamic": dynamic,
    "none": None,
}
