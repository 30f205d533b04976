"""What several tests need."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

TINY = """\
seed: 3
precision: fp32
data: {size: 16}
diffusion: {timesteps: 20}
model: {base_channels: 8, channel_mults: [1, 2], num_res_blocks: 1, attention_levels: [1], dropout: 0.1, norm_groups: 4}
train: {steps: 6, batch_size: 4, lr: 1e-3, save_every: 4, sample_every: 4, samples: 4, sample_steps: 4, log_every: 2}
"""
"""A run file that trains in a second."""


def write_images(folder: Path, count: int = 12, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Path:
    """``count`` images of random pixels, (height, width) ``size``, half of them in each of two class folders."""
    random = np.random.default_rng(0)
    for i in range(count):
        channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
        pixels = random.integers(0, 256, (*size, *channels), dtype=np.uint8)
        path = folder / ("cats" if i % 2 else "dogs") / f"image {i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels, mode).save(path)
    return folder


def spoilt(path: Path) -> bytes:
    """The bytes of a checkpoint with a bit of its weights changed: between two records a change would mean nothing."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    data[largest.header_offset + largest.file_size // 2] ^= 8
    return bytes(data)


def spoil_gradients(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int, int], bool], value: float = np.nan) -> None:
    """Make the loss and all gradients ``value`` at the steps of which ``bad(step, rollbacks)`` says so."""
    from ddpmctl import training

    plain = training.add_gradients

    def spoilt(state: training.TrainState, *args: object) -> torch.Tensor:
        loss = plain(state, *args)  # type: ignore[arg-type]
        if bad(state.step + 1, state.rollbacks):
            for p in state.net.parameters():
                if p.grad is not None:
                    p.grad.fill_(value)
            loss = loss * value
        return loss

    monkeypatch.setattr(training, "add_gradients", spoilt)


class Means(torch.nn.Module):
    """Features of images in no time: sixteen numbers of each."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float().mean(1), 4).flatten(1) / 128
