"""Inpainting: a sampler that makes what is missing of a picture, and fits it to what is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.samplers import Noise, SampleStep


def rounds(timesteps: Sequence[int], resample: int, jump: int) -> list[int]:
    """The levels of ``timesteps``, of which each ``jump`` steps are gone ``resample`` times: down, and back up in one leap.

    Lugmayr et al. 2022 (RePaint), appendix on the schedule: counted from the end, so that the last step, to 0, is gone
    once, and the part that is less than ``jump`` steps long is the noisiest.
    """
    steps, path = len(timesteps) - 1, [timesteps[0]]
    for i in range(1, steps + 1):
        path.append(timesteps[i])
        if i < steps and (steps - i - 1) % jump == 0:
            path += (resample - 1) * list(timesteps[max(0, i - jump) : i + 1])
    return path


@torch.no_grad()
def repaint(
    sampler: Callable[..., Iterator[SampleStep]],
    denoiser: Denoiser,
    x_T: Tensor,
    timesteps: Sequence[int],
    *,
    known: Tensor,
    anew: Tensor,
    resample: int,
    jump: int,
    noise: Noise,
    label: Tensor | None = None,
    **options: object,
) -> Iterator[SampleStep]:
    """Paint what is missing of a picture. Lugmayr et al. 2022 (RePaint), algorithm 1, with jumps.

    ``known``: the picture x_0, (C, H, W); ``anew``: bool (1, H, W), true where it is missing. After each step the rest
    is q(x_s | x_0) of the picture with fresh noise, and at s = 0 the picture itself. What was drawn did not know that
    noise, and so fits the rest badly: ``resample`` times the sampler goes ``jump`` steps, leaping back by
    q(x_t | x_s), and each time the parts come to fit better. ``sampler``: one that remembers no earlier steps.
    """
    schedule = denoiser.schedule
    alpha_bar = schedule.alpha_bar.tolist()
    x_t = x_T
    for t, s in pairwise(rounds(timesteps, resample, jump)):
        if s > t:
            alpha = alpha_bar[s] / alpha_bar[t]
            x_t = math.sqrt(alpha) * x_t + math.sqrt(1 - alpha) * noise()
            continue
        [state] = sampler(denoiser, x_t, [t, s], noise=noise, label=label, **options)
        x_t = torch.where(anew, state.x_t, schedule.q_sample(known.expand_as(x_t), s, noise()))
        yield SampleStep(s, x_t, state.x0)
