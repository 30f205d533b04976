"""Exponential moving average of the weights, with its own state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _gradual(ema: EMA) -> float:
    """min(decay, (1 + n) / (10 + n)) for update n: the average spans a fixed share of a short run."""
    updates = ema.steps // ema.every
    return min(ema.decay, (1 + updates) / (10 + updates))


def _copy(ema: EMA) -> float:
    """A plain copy of the weights for the first ``start`` steps, then the full decay."""
    return 0.0 if ema.steps <= ema.start else ema.decay


def _none(ema: EMA) -> float:
    """The full decay from the first step: the random start stays in the average for a long time."""
    return ema.decay


WARMUPS: dict[str, Callable[[EMA], float]] = {
    "gradual": _gradual,
    "copy": _copy,
    "none": _none,
}


class _Tensors:
    """What is in a network: to look for it at every step would take as long as to average it."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.parameters: list[torch.Tensor] = list(net.parameters())
        self.buffers = list(net.buffers())


class EMA:
    """Averaged copy of a network: ``ema.net``, in eval mode. Buffers (batch-norm statistics) are copied.

    ``warmup`` is a row of :data:`WARMUPS`; ``start`` belongs to its "copy"; ``every``: steps between updates.
    """

    def __init__(
        self, net: nn.Module, decay: float = 0.9999, *, warmup: str = "gradual", start: int = 0, every: int = 1
    ) -> None:
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.decay, self.warmup, self.start, self.every = decay, warmup, start, every
        self.steps = 0
        self._mine = _Tensors(self.net)
        self._theirs = self._mine

    def decay_now(self) -> float:
        """The decay that the last update used: 0 copies the weights, 1 keeps the average."""
        return WARMUPS[self.warmup](self)

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Take in the weights after an optimiser step: average <- decay * average + (1 - decay) * weights."""
        self.steps += 1
        if self.steps % self.every:
            return
        if self._theirs.net is not net:
            self._theirs = _Tensors(net)
        torch._foreach_lerp_(self._mine.parameters, self._theirs.parameters, 1 - self.decay_now())
        for kept, new in zip(self._mine.buffers, self._theirs.buffers, strict=True):
            kept.copy_(new)

    def state_dict(self) -> dict[str, Any]:
        """Averaged weights and the step counter."""
        return {"net": self.net.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`; raises ``RuntimeError`` when the weights do not fit."""
        self.net.load_state_dict(state["net"], strict=True)
        self.steps = int(state["steps"])
