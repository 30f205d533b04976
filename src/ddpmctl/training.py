"""The training loop: a generator of steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ddpmctl.config import RunConfig
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.ema import EMA
from ddpmctl.core.losses import denoising_loss
from ddpmctl.core.noise import derive_seed, derived_generator
from ddpmctl.core.optim import LR_SCHEDULES
from ddpmctl.data.batches import Batches


class TrainStep(NamedTuple):
    """One optimiser step; it is not ``applied`` where loss or gradients are not finite."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    applied: bool


@dataclass
class TrainState:
    """All that changes while training; with the configuration and the data it determines the rest of the run."""

    net: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain dict for a checkpoint."""
        return {
            "step": self.step,
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`; raises ``RuntimeError`` or ``ValueError`` when it does not fit."""
        self.net.load_state_dict(state["net"], strict=True)
        self.ema.load_state_dict(state["ema"])
        # Moments are taken over, settings are not: those of this run hold.
        groups = [
            {**old, **{key: value for key, value in new.items() if key != "params"}}
            for old, new in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = int(state["step"])


def train_steps(state: TrainState, denoiser: Denoiser, batches: Batches, config: RunConfig) -> Iterator[TrainStep]:
    """Train from ``state.step`` to the end. Ho et al. 2020, algorithm 1.

    Every draw follows from (seed, step, purpose): stopping and going on changes nothing.
    """
    train, seed, kind, parts = config.train, config.seed, config.diffusion.loss, config.train.grad_accum
    timesteps, device = denoiser.schedule.timesteps, next(state.net.parameters()).device
    while state.step < train.steps:
        step = state.step + 1
        lr = train.lr * LR_SCHEDULES[train.lr_schedule](step, train.steps, train.lr_warmup)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(derive_seed(seed, step, "dropout"))
        x0, label = batches(step)
        t = torch.randint(1, timesteps + 1, (len(x0),), generator=derived_generator(seed, step, "t"))
        eps = torch.randn(x0.shape, generator=derived_generator(seed, step, "eps"))

        state.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        labels = label.tensor_split(parts) if label is not None else [None] * parts
        for x0_part, t_part, eps_part, label_part in zip(
            x0.tensor_split(parts), t.tensor_split(parts), eps.tensor_split(parts), labels, strict=True
        ):
            on_device = label_part.to(device) if label_part is not None else None
            part_loss = denoising_loss(denoiser, x0_part.to(device), t_part, eps_part.to(device), on_device, loss=kind)
            part_loss = part_loss * (len(x0_part) / len(x0))
            state.scaler.scale(part_loss).backward()  # type: ignore[no-untyped-call]
            loss += part_loss.detach()

        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(state.net.parameters(), train.grad_clip or math.inf, foreach=True)
        loss_now, grad_norm = torch.stack([loss, norm]).tolist()
        applied = math.isfinite(loss_now) and math.isfinite(grad_norm)
        if applied:
            state.scaler.step(state.optimizer)
            state.ema.update(state.net)
        state.scaler.update()
        state.step = step
        yield TrainStep(step, loss_now, grad_norm, lr, applied)
