"""Courses: where a sample begins, and how it goes from there, when a picture has a part in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.inpainting import repaint, rounds
from ddpmctl.core.interpolation import encode, slerp
from ddpmctl.core.samplers import SAMPLERS, SampleStep
from ddpmctl.core.schedule import NoiseSchedule

JUMP_SHARE = 1 / 25
"""How far inpainting leaps back, as a share of the steps: 10 of 250 in RePaint."""


class Course:
    """From pure noise down the whole grid of levels; other courses say in what they differ."""

    def levels(self, grid: list[int]) -> list[int]:
        """Those of ``grid``, which falls from T to 0, that are gone through."""
        return grid

    def states(self, grid: list[int]) -> int:
        """How many steps :meth:`walk` takes through the levels ``grid``."""
        return len(grid) - 1

    def first(self, schedule: NoiseSchedule, t: int, images: range, noise: Callable[[], Tensor]) -> Tensor:
        """The images numbered ``images`` as they begin at level ``t``, (B, C, H, W)."""
        return noise()

    def walk(
        self, sampler: str, denoiser: Denoiser, x_T: Tensor, grid: list[int], **options: Any
    ) -> Iterator[SampleStep]:
        """From ``x_T`` down the levels ``grid`` by a row of SAMPLERS; a level may come more than once, 0 comes last."""
        return SAMPLERS[sampler](denoiser, x_T, grid, **options)


FROM_NOISE = Course()


@dataclass(frozen=True)
class Start(Course):
    """An image to start from in place of noise: ``pixels`` (C, H, W) in [-1, 1], and how much of it is to change.

    ``strength`` in (0, 1] is the share of the steps that are taken, from their noise level on: at 1 next to
    nothing of the image is left. Meng et al. 2022 (SDEdit), algorithm 1.
    """

    pixels: Tensor
    strength: float

    def levels(self, grid: list[int]) -> list[int]:
        taken = max(1, round((len(grid) - 1) * self.strength))
        return grid[-taken - 1 :]

    def first(self, schedule: NoiseSchedule, t: int, images: range, noise: Callable[[], Tensor]) -> Tensor:
        eps = noise()
        return schedule.q_sample(self.pixels.to(eps).expand_as(eps), t, eps)


@dataclass(frozen=True)
class Inpaint(Course):
    """An image of which a part is drawn anew: ``pixels`` (C, H, W) in [-1, 1], ``anew`` bool (1, H, W), true there.

    ``resample``: how often each part of the way is gone, 1 or more. See :func:`ddpmctl.core.inpainting.repaint`.
    """

    pixels: Tensor
    anew: Tensor
    resample: int

    def states(self, grid: list[int]) -> int:
        return sum(s < t for t, s in pairwise(rounds(grid, self.resample, _jump(grid))))

    def walk(
        self, sampler: str, denoiser: Denoiser, x_T: Tensor, grid: list[int], **options: Any
    ) -> Iterator[SampleStep]:
        return repaint(
            SAMPLERS[sampler], denoiser, x_T, grid, known=self.pixels.to(x_T), anew=self.anew.to(x_T.device),
            resample=self.resample, jump=_jump(grid), **options,
        )  # fmt: skip


def _jump(grid: list[int]) -> int:
    return max(1, round((len(grid) - 1) * JUMP_SHARE))


@dataclass(frozen=True)
class Between(Course):
    """Images out of noise that is given: ``x_T`` (N, C, H, W), one for each."""

    x_T: Tensor

    def first(self, schedule: NoiseSchedule, t: int, images: range, noise: Callable[[], Tensor]) -> Tensor:
        return self.x_T[images.start : images.stop].to(noise())  # of which only the device is wanted


def encoded(
    denoiser: Denoiser, pixels: Tensor, grid: list[int], label: Tensor | None, on_step: Callable[[], object]
) -> Tensor:
    """The noise at T of ``pixels`` (B, C, H, W) in [-1, 1], of the same shape; ``on_step`` is called after each step."""
    x_t = pixels
    for state in encode(denoiser, pixels, grid[::-1], label=label):
        x_t = state.x_t
        on_step()
    return x_t


def frames_between(a: Tensor, b: Tensor, frames: int) -> Between:
    """``frames`` images, two or more, on the way from noise ``a`` to noise ``b``, both (C, H, W) and both included."""
    a, b = a.cpu(), b.cpu()  # not every device has float64
    return Between(torch.stack([slerp(a, b, i / (frames - 1)) for i in range(frames)]))
