"""What the network predicts - eps, x0 or v - and the way from each to (x0, eps).

With signal a = sqrt(abar_t) and noise s = sqrt(1 - abar_t), x_t = a x0 + s eps ties the three together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """One way to train the network.

    ``target(x0, eps, signal, noise)`` is what the network should give;
    ``split(output, x_t, signal, noise)`` turns its output into (x0, eps).
    ``weight(snr)``: so many times the squared error of the output is the squared error of eps, with snr = a^2 / s^2.
    """

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    split: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    weight: Callable[[Tensor], Tensor]


def eps_target(x0: Tensor, eps: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """The noise itself. Ho et al. 2020, equation 14."""
    return eps


def eps_split(output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """x0 = (x_t - s eps) / a."""
    return (x_t - noise * output) / signal, output


def x0_target(x0: Tensor, eps: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """The clean image."""
    return x0


def x0_split(output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """eps = (x_t - a x0) / s."""
    return output, (x_t - signal * output) / noise


def v_target(x0: Tensor, eps: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """v = a eps - s x0. Salimans & Ho 2022, section 4."""
    return signal * eps - noise * x0


def v_split(output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """x0 = a x_t - s v, eps = s x_t + a v: the rotation back, since a^2 + s^2 = 1."""
    return signal * x_t - noise * output, noise * x_t + signal * output


def eps_weight(snr: Tensor) -> Tensor:
    """It is the same error."""
    return torch.ones_like(snr)


def x0_weight(snr: Tensor) -> Tensor:
    """An error e of eps is one of -e s / a of x0."""
    return snr


def v_weight(snr: Tensor) -> Tensor:
    """An error e of eps is one of e / a of v, since a^2 + s^2 = 1."""
    return snr / (1 + snr)


PREDICTIONS: dict[str, Prediction] = {
    "eps": Prediction(eps_target, eps_split, eps_weight),
    "x0": Prediction(x0_target, x0_split, x0_weight),
    "v": Prediction(v_target, v_split, v_weight),
}
