"""What several tests need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
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
