"""What a network and a schedule come to, by arithmetic alone: ``inspect`` tells it without waiting seconds for PyTorch.

The networks are those of :mod:`ddpmctl.core.unet` and the schedules those of :mod:`ddpmctl.core.schedule`, said again in
numbers; ``tests/test_outline.py`` holds them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from operator import mul
from typing import NamedTuple

from ddpmctl.config import RunConfig


class Block(NamedTuple):
    """A part of the network: its name, how many parameters it has, and multiply-adds of one image forward."""

    name: str
    parameters: int
    multiply_adds: int


def network(config: RunConfig, shape: tuple[int, int, int], num_classes: int) -> list[Block]:
    """The parts of the network for images of ``shape`` (C, H, W), as :func:`ddpmctl.build.build_net` makes it."""
    return list(_Counter(config, shape, num_classes).blocks())


class _Counter:
    """Walks through the network as its constructor does. A pair is (parameters, multiply-adds)."""

    def __init__(self, config: RunConfig, shape: tuple[int, int, int], num_classes: int) -> None:
        self.model, self.channels = config.model, shape[0]
        self.outputs = 2 * self.channels if config.diffusion.learn_variance else self.channels
        self.sides = [(side + 2 * self.model.padding) // self.model.patch for side in shape[1:]]
        width = self.model.time_embedding
        self.width = {"auto": 4 * self.model.base_channels, "none": 0}[width] if isinstance(width, str) else width
        self.classes = num_classes + bool(self.model.label_dropout) if num_classes else 0

    def blocks(self) -> Iterator[Block]:
        """Each part, in the order of the network."""
        model, base = self.model, self.model.base_channels
        widths = [base * mult for mult in model.channel_mults]
        counts = model.num_res_blocks if isinstance(model.num_res_blocks, list) else [model.num_res_blocks] * len(widths)
        if self.width:
            yield Block("time", (base + 1) * self.width + (self.width + 1) * self.width, (base + self.width) * self.width)
        yield self._conv("conv_in", self.channels * model.patch**2, base, 0)
        channels, skips, name = base, [base], _numbered("down")
        for level, width in enumerate(widths):
            for _ in range(counts[level]):
                yield self._residual(next(name), channels, width, level, level in model.attention_levels)
                channels = width
                skips.append(channels)
            if level != len(widths) - 1:
                yield self._conv(next(name), channels, channels, level + 1)
                skips.append(channels)
        for number, attention in enumerate((model.middle_attention, False)):
            yield self._residual(f"middle.{number}", channels, channels, len(widths) - 1, attention)
        name = _numbered("up")
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(counts[level] + 1):
                yield self._residual(next(name), channels + skips.pop(), width, level, level in model.attention_levels)
                channels = width
            if level:
                yield self._conv(next(name), channels, channels, level - 1)
        if model.norm != "none":
            yield Block("norm_out", self._norm(channels), 0)
        yield self._conv("conv_out", channels, self.outputs * model.patch**2, 0)

    def _pixels(self, level: int) -> int:
        return math.prod(side // 2**level for side in self.sides)

    def _norm(self, channels: int) -> int:
        return 0 if self.model.norm == "none" else 2 * channels

    def _conv(self, name: str, inputs: int, outputs: int, level: int, kernel: int = 3) -> Block:
        weights = inputs * outputs * kernel**2
        return Block(name, weights + outputs, weights * self._pixels(level))

    def _residual(self, name: str, inputs: int, outputs: int, level: int, attention: bool) -> Block:
        parts = [self._conv("", inputs, outputs, level), self._conv("", outputs, outputs, level)]
        parameters = self._norm(inputs) + self._norm(outputs) + self.classes * outputs
        if self.width:
            parts.append(Block("", (self.width + 1) * outputs, self.width * outputs))
        if inputs != outputs:
            parts.append(self._conv("", inputs, outputs, level, 1))
        if attention:
            parts += [self._conv("", outputs, 3 * outputs, level, 1), self._conv("", outputs, outputs, level, 1)]
            parts.append(Block("", self._norm(outputs), 2 * self._pixels(level) ** 2 * outputs))
        return Block(name, parameters + sum(part.parameters for part in parts), sum(part.multiply_adds for part in parts))


def _numbered(name: str) -> Iterator[str]:
    number = 0
    while True:
        yield f"{name}.{number}"
        number += 1


def alpha_bar(config: RunConfig) -> list[float]:
    """abar_0 to abar_T of the schedule, as :func:`ddpmctl.build.build_schedule` makes it."""
    diffusion = config.diffusion
    betas = [min(beta, _MAX_BETA) for beta in BETAS[diffusion.schedule](diffusion.timesteps)]
    table = list(accumulate((1 - beta for beta in betas), mul, initial=1.0))
    if diffusion.shift != 1:
        table = [value / (value + diffusion.shift**2 * (1 - value)) for value in table]
    if not diffusion.zero_terminal_snr:
        return table
    root = [math.sqrt(value) for value in table[1:]]
    return [1.0, *(((value - root[-1]) * root[0] / (root[0] - root[-1])) ** 2 for value in root)]


def snr_db(abar: float) -> float:
    """Signal-to-noise ratio in dB; infinite where there is no noise, minus infinity where there is nothing else."""
    return 10 * math.log10(abar / (1 - abar)) if 0 < abar < 1 else math.copysign(math.inf, abar - 0.5)


def _linear(timesteps: int) -> list[float]:
    first, last = 0.1 / timesteps, 20 / timesteps
    return [first + (last - first) * t / max(timesteps - 1, 1) for t in range(timesteps)]


def _cosine(timesteps: int) -> list[float]:
    s = 0.008
    return _betas_of([math.cos((t / timesteps + s) / (1 + s) * math.pi / 2) ** 2 for t in range(timesteps + 1)])


def _sigmoid(timesteps: int) -> list[float]:
    falling = [1 / (1 + math.exp(6 * t / timesteps - 3)) for t in range(timesteps + 1)]
    return _betas_of([(value - falling[-1]) / (falling[0] - falling[-1]) for value in falling])


def _betas_of(alpha_bar: list[float]) -> list[float]:
    return [1 - after / before for before, after in pairwise(alpha_bar)]


BETAS: dict[str, Callable[[int], list[float]]] = {
    "linear": _linear,
    "cosine": _cosine,
    "sigmoid": _sigmoid,
}
"""The rows of :data:`ddpmctl.core.schedule.SCHEDULES`."""

_MAX_BETA = 0.999
