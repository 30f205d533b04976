"""A run: what it trains, and the metrics, grids and checkpoints that it leaves along the way."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddpmctl import checkpoint, plot
from ddpmctl.build import (
    build_denoiser,
    build_ema,
    build_net,
    build_optimizer,
    place,
    precision_name,
    resolve_device,
    resolve_precision,
)
from ddpmctl.config import RunConfig
from ddpmctl.core.noise import derive_seed
from ddpmctl.data.batches import Batches
from ddpmctl.data.dataset import ImageDataset
from ddpmctl.errors import CheckpointError, DivergenceError
from ddpmctl.images import grid, save_png, to_uint8
from ddpmctl.runfolder import RunFolder
from ddpmctl.sampling import Generated, generate
from ddpmctl.training import TrainState, TrainStep, train_steps

PATIENCE = 20
"""Steps in a row whose gradients are not finite before a run gives up."""


class PreviewStep(NamedTuple):
    """One denoising step of a sample grid."""

    done: int
    total: int


class Saved(NamedTuple):
    """A file that is now there."""

    path: Path


Event = TrainStep | PreviewStep | Saved


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
        net = place(build_net(config, dataset.channels, len(self.class_names)), self.device)
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
        if self._grid_is_due() and not self.folder.sample_file(self.state.step).exists():
            yield from self.preview()  # a stop came in between
        for done in train_steps(self.state, self.denoiser, self.batches, self.config):
            self._watch(done)
            yield done
            if done.step == self.config.train.steps or done.step % self.config.train.save_every == 0:
                yield Saved(self.save())
            if self._grid_is_due():
                yield from self.preview()

    def _grid_is_due(self) -> bool:
        train, step = self.config.train, self.state.step
        return step > 0 and (step >= train.steps or bool(train.sample_every and step % train.sample_every == 0))

    def finished(self) -> bool:
        """Whether all steps are done, saved and shown."""
        return self.state.step >= self.config.train.steps and self.folder.sample_file(self.state.step).exists()

    def _watch(self, done: TrainStep) -> None:
        """Keep the numbers of a step; raise :class:`DivergenceError` when they have stopped being numbers."""
        self._window.append((done.loss, done.grad_norm, done.applied))
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

    def sample_average(self, n: int, steps: int) -> Iterator[Generated]:
        """Denoise ``n`` images with the averaged weights, always from the same noise; yields every step."""
        classes = len(self.class_names)
        return generate(
            build_denoiser(self.config, self.state.ema.net, self.autocast),
            self.image_shape,
            n,
            seed=derive_seed(self.config.seed, "preview"),
            sampler=self.config.train.sampler,
            steps=steps,
            device=self.device,
            labels=[i % classes for i in range(n)] if classes else None,
            batch_size=min(n, self.config.train.batch_size),
        )

    def preview(self) -> Iterator[Event]:
        """Draw the sample grid of this step, and the loss curve."""
        train, classes = self.config.train, len(self.class_names)
        steps = min(train.sample_steps, self.config.diffusion.timesteps)
        total = -(-train.samples // min(train.samples, train.batch_size)) * steps
        pictures = torch.zeros(train.samples, *self.image_shape, dtype=torch.uint8)
        for done, (images, state) in enumerate(self.sample_average(train.samples, steps), start=1):
            if state.t == 0:
                pictures[images.start : images.stop] = to_uint8(state.x_t).cpu()
            yield PreviewStep(done, total)
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
