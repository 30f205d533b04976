"""The training loop: a generator of steps, and the run that keeps, draws and saves along it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpmctl import checkpoint, plot
from ddpmctl.build import (
    build_denoiser,
    build_ema,
    build_net,
    build_optimizer,
    precision_name,
    resolve_device,
    resolve_precision,
)
from ddpmctl.config import RunConfig
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.ema import EMA
from ddpmctl.core.losses import denoising_loss
from ddpmctl.core.noise import derive_seed, derived_generator
from ddpmctl.core.optim import LR_SCHEDULES
from ddpmctl.data.batches import Batches
from ddpmctl.data.dataset import ImageDataset
from ddpmctl.errors import CheckpointError, DivergenceError
from ddpmctl.images import grid, save_png, to_uint8
from ddpmctl.runfolder import RunFolder
from ddpmctl.sampling import generate

PATIENCE = 20
"""Steps in a row whose gradients are not finite before a run gives up."""


class TrainStep(NamedTuple):
    """One optimiser step. ``loss`` is a 0-dim tensor on the device: reading it waits for the device."""

    step: int
    loss: Tensor
    grad_norm: float
    lr: float
    applied: bool


class PreviewStep(NamedTuple):
    """One denoising step of a sample grid."""

    done: int
    total: int


class Saved(NamedTuple):
    """A file that is now there."""

    path: Path


Event = TrainStep | PreviewStep | Saved


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
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = int(state["step"])


def train_steps(state: TrainState, denoiser: Denoiser, batches: Batches, config: RunConfig) -> Iterator[TrainStep]:
    """Train from ``state.step`` to the end. Ho et al. 2020, algorithm 1.

    Every draw follows from (seed, step, purpose): stopping and going on changes nothing.
    """
    train, seed = config.train, config.seed
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
        for part in torch.arange(len(x0)).tensor_split(train.grad_accum):
            label_part = label[part].to(device) if label is not None else None
            part_loss = denoising_loss(
                denoiser, x0[part].to(device), t[part], eps[part].to(device), label_part, loss=config.diffusion.loss
            ) * (len(part) / len(x0))  # fmt: skip
            state.scaler.scale(part_loss).backward()  # type: ignore[no-untyped-call]
            loss += part_loss.detach()

        state.scaler.unscale_(state.optimizer)
        limit = train.grad_clip or math.inf
        grad_norm = float(nn.utils.clip_grad_norm_(state.net.parameters(), limit, foreach=True))
        applied = math.isfinite(grad_norm)
        if applied:
            state.scaler.step(state.optimizer)
            state.ema.update(state.net)
        state.scaler.update() if state.scaler.is_enabled() else None
        state.step = step
        yield TrainStep(step, loss, grad_norm, lr, applied)


class Run:
    """A run about to start or to go on: everything built and checked, nothing written yet.

    Raises :class:`DeviceError` for a device that is not there.
    """

    def __init__(self, config: RunConfig, dataset: ImageDataset, folder: RunFolder) -> None:
        self.config, self.dataset, self.folder = config, dataset, folder
        self.device = resolve_device(config.device)
        self.autocast = resolve_precision(config.precision, self.device)
        self.class_names = list(dataset.class_names)
        self.image_shape = (dataset.channels, *dataset.size)
        torch.manual_seed(derive_seed(config.seed, "init"))
        net = build_net(config, dataset.channels, len(self.class_names)).to(self.device)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast == torch.float16)
        self.state = TrainState(net, build_ema(config, net), build_optimizer(config, net), scaler)
        self.denoiser = build_denoiser(config, net, self.autocast)
        self.batches = Batches(dataset, config.train.batch_size, config.seed, config.data.hflip)
        self._window: list[tuple[float, float, bool]] = []
        self._bad_in_a_row = self._saved_step = 0
        self._clock = (time.monotonic(), 0)

    def restore(self, content: dict[str, Any], path: Path) -> None:
        """Go on from a checkpoint; raises :class:`CheckpointError` when it does not fit."""
        try:
            self.state.load_state_dict(content)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path}: does not fit this run", "resume with the settings it was made with"
            ) from error
        self._window = [(float(a), float(b), bool(c)) for a, b, c in content.get("window", [])]
        self._saved_step = self.state.step
        self._clock = (time.monotonic(), self.state.step)

    def train(self) -> Iterator[Event]:
        """Train, write metrics, draw grids and save; yields each thing as it happens."""
        train = self.config.train
        for done in train_steps(self.state, self.denoiser, self.batches, self.config):
            self._watch(done)
            yield done
            last = done.step == train.steps
            if last or done.step % train.save_every == 0:
                yield Saved(self.save())
            if last or (train.sample_every and done.step % train.sample_every == 0):
                yield from self.preview()

    def _watch(self, done: TrainStep) -> None:
        """Keep the numbers of a step; raise :class:`DivergenceError` when they have stopped being numbers."""
        self._window.append((float(done.loss), done.grad_norm, done.applied))
        self._bad_in_a_row = 0 if done.applied else self._bad_in_a_row + 1
        # Loss scaling of fp16 expects steps to be skipped until it has found its scale.
        if self._bad_in_a_row >= PATIENCE * (5 if self.state.scaler.is_enabled() else 1):
            raise DivergenceError(
                f"step {done.step}: gradients were not finite {self._bad_in_a_row} times in a row",
                "lower --lr, try --precision fp32, or set train.grad_clip=1; the last checkpoint is kept",
            )
        if done.step % self.config.train.log_every == 0 or done.step == self.config.train.steps:
            self._log(done)

    def _log(self, done: TrainStep) -> None:
        good = [(loss, norm) for loss, norm, applied in self._window if applied] or [(math.nan, math.nan)]
        now, since = time.monotonic(), self._clock
        rate = (done.step - since[1]) * self.config.train.batch_size / max(now - since[0], 1e-9)
        self.folder.append_metrics({
            "step": done.step,
            "epoch": f"{self.batches.epoch_of(done.step):.4f}",
            "loss": f"{sum(loss for loss, _ in good) / len(good):.6g}",
            "grad_norm": f"{sum(norm for _, norm in good) / len(good):.6g}",
            "lr": f"{done.lr:.6g}",
            "skipped": sum(not applied for _, _, applied in self._window),
            "images_per_s": f"{rate:.1f}",
        })  # fmt: skip
        self._window, self._clock = [], (now, done.step)

    def save(self) -> Path:
        """Write the checkpoint of this step, then drop the oldest."""
        path = self.folder.checkpoint_file(self.state.step)
        checkpoint.save(path, {
            **self.state.state_dict(),
            "config": self.config.to_dict(),
            "image_shape": list(self.image_shape),
            "class_names": self.class_names,
            "data": {"images": len(self.dataset.images), "fingerprint": self.dataset.fingerprint},
            "window": [list(item) for item in self._window],
        })  # fmt: skip
        self.folder.prune(self.config.train.keep)
        self._saved_step = self.state.step
        return path

    def saved(self) -> bool:
        """Whether the last checkpoint is of the present step."""
        return self._saved_step == self.state.step

    def sample_average(self, n: int, steps: int) -> Iterator[tuple[int, Tensor]]:
        """Denoise ``n`` images with the averaged weights; yields (steps done, uint8 images so far)."""
        train, classes = self.config.train, len(self.class_names)
        denoiser = build_denoiser(self.config, self.state.ema.net, self.autocast)
        labels = [i % classes for i in range(n)] if classes else None
        seed = derive_seed(self.config.seed, "preview")
        for i, (_, state) in enumerate(generate(
            denoiser, self.image_shape, n, seed=seed, sampler=train.sampler, steps=steps, device=self.device,
            labels=labels, batch_size=n,
        )):  # fmt: skip
            yield i + 1, to_uint8(state.x_t)

    def preview(self) -> Iterator[Event]:
        """Draw the sample grid of this step, always from the same noise, and the loss curve."""
        train, classes = self.config.train, len(self.class_names)
        steps = min(train.sample_steps, self.config.diffusion.timesteps)
        pictures = torch.empty(0)
        for done, states in self.sample_average(train.samples, steps):
            pictures = states
            yield PreviewStep(done, steps)
        path = self.folder.sample_file(self.state.step)
        columns = classes if 1 < classes <= train.samples else None
        made_with = {"kind": "preview", "step": self.state.step, "run": self.folder.path.name}
        save_png(path, grid(pictures, columns=columns), made_with)
        yield Saved(path)
        rows = self.folder.read_metrics()
        if plot.available() and rows:
            losses = [float(row["loss"]) for row in rows]
            plot.loss_curve(self.folder.loss_file, [int(row["step"]) for row in rows], losses)
        self._clock = (time.monotonic(), self.state.step)

    def precision(self) -> str:
        """What the network computes in: fp32, bf16 or fp16."""
        return precision_name(self.autocast)
