"""A tiny network that has seen four images only must give these four back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpmctl.cli import main

RUN_FILE = """\
precision: fp32
data: {{size: 8}}
diffusion: {{timesteps: 200, schedule: cosine, prediction: {prediction}}}
model: {{base_channels: 16, channel_mults: [1, 2], num_res_blocks: 1, attention_levels: [], dropout: 0, norm_groups: 4}}
train: {{steps: 1000, batch_size: 32, lr: 3e-3, lr_schedule: cosine, save_every: 100k, sample_every: 0, samples: 4}}
"""


def four_images() -> np.ndarray:
    """Half black, half white: left, right, top and bottom; uint8 (4, 8, 8)."""
    images = np.zeros((4, 8, 8), dtype=np.uint8)
    images[0, :, :4] = images[1, :, 4:] = images[2, :4] = images[3, 4:] = 255
    return images


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_four_images_come_back(prediction):
    Path("four").mkdir()
    for i, image in enumerate(four_images()):
        Image.fromarray(image).save(f"four/{i}.png")
    Path("run.yaml").write_text(RUN_FILE.format(prediction=prediction))
    assert main(["train", "four", "-c", "run.yaml", "--out", "run", "-q"]) == 0
    assert main(["sample", "run", "-n", "32", "-o", "new.npz", "-q"]) == 0
    new = np.load("new.npz")["images"][..., 0].astype(float)
    distances = np.abs(new[:, None] - four_images()[None].astype(float)).mean(axis=(2, 3))
    nearest = distances.min(axis=1)
    # Two images that differ are at least 127 apart: within 12 there is no doubt which one it is.
    assert (nearest < 12).mean() >= 0.9, nearest
    assert set(distances.argmin(axis=1)) == {0, 1, 2, 3}
