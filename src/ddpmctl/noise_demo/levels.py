"""Noise levels: which ones to show, the numbers that belong to each, and the picture at them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.errors import ConfigError
from ddpmctl.images import from_uint8
from ddpmctl.parsing import parse_count


class Level(NamedTuple):
    """One noise level t of a schedule: abar_t, and 10 log10(abar_t / (1 - abar_t)), infinite at t = 0 and where abar is 0."""

    t: int
    alpha_bar: float
    snr_db: float

    def lines(self) -> tuple[str, str]:
        """Both numbers as they stand below a picture."""
        return f"ᾱ = {share(self.alpha_bar)}", f"SNR {decibels(self.snr_db)}"


def level(schedule: NoiseSchedule, t: int) -> Level:
    """The numbers of level ``t``, 0..T."""
    return Level(t, float(schedule.alpha_bar[t]), float(schedule.snr_db()[t]))


def share(value: float) -> str:
    """A number in 0..1 with the digits that tell it from 0 and 1: ``0.532``, ``0.99989``, ``4.0e−5``."""
    if value in (0, 1):
        return f"{value:.0f}"
    if value < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e−{abs(int(exponent))}"
    digits = 3
    if value < 0.01:
        digits = 4
    elif value >= 0.9995:
        digits = min(12, -math.floor(math.log10(1 - value) + 1e-9))
    return f"{value:.{digits}f}"


def decibels(value: float) -> str:
    """``−3.2 dB``, ``∞`` or ``−∞``."""
    # Adding 0.0 takes the sign from a rounded -0.0.
    text = f"{value:.0f}".replace("inf", "∞") if math.isinf(value) else f"{round(value, 1) + 0.0:.1f} dB"
    return text.replace("-", "−")


def even_levels(timesteps: int, count: int) -> list[int]:
    """``count`` levels evenly from 0 to T, both included; one alone is T. Raises :class:`ConfigError`."""
    if not 1 <= count <= timesteps + 1:
        raise ConfigError(
            f"--frames: {count} is not in 1..{timesteps + 1}",
            f"there are {timesteps + 1} levels, 0 to {timesteps}",
        )
    return [round(i * timesteps / (count - 1)) for i in range(count)] if count > 1 else [timesteps]


def parse_levels(text: str, timesteps: int) -> list[int]:
    """Levels out of ``0,50,1k``, in the order given. Raises :class:`ConfigError` naming ``--at``."""
    try:
        levels = [parse_count(word) for word in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--at: {error}", "give levels with commas between: --at 0,50,200") from error
    for t in levels:
        if not 0 <= t <= timesteps:
            raise ConfigError(f"--at: {t} is not in 0..{timesteps}", "0 is the clean picture, T is noise")
    return levels


def noised(picture: Tensor, eps: Tensor, schedule: NoiseSchedule, t: int) -> Tensor:
    """x_t (1, C, H, W) of a uint8 picture (C, H, W) and noise (1, C, H, W)."""
    return schedule.q_sample(from_uint8(picture)[None], t, eps)


def psnr_db(picture: Tensor, estimate: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images; infinite when they are equal."""
    error = (picture.double() - estimate.double()).square().mean()
    return float(10 * torch.log10(255**2 / error))
