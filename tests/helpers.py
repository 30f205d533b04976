"""What several tests need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


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
