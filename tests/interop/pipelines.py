"""Small networks and folders as diffusers makes them, of the structures that are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: E402 - after the check that it is there

SMALL = {"sample_size": 16, "layers_per_block": 1, "block_out_channels": [32, 64], "norm_num_groups": 8}
BLOCKS = {
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
GOOGLE = {"attention_head_dim": None, "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6}
"""In what google's networks differ from the defaults of ``UNet2DModel``, which the unconditional example trains."""

NETWORKS: dict[str, dict[str, Any]] = {
    "google": {**BLOCKS, **GOOGLE, "layers_per_block": 2},
    "google, three levels": {
        **GOOGLE, "block_out_channels": [32, 32, 64],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    "example": BLOCKS,
    "grey, oblong, wide time": {**BLOCKS, "in_channels": 1, "out_channels": 1, "sample_size": [8, 24], "time_embedding_dim": 48},
    "no attention in the middle": {**BLOCKS, "add_attention": False, "attention_head_dim": 16},
    "no attention": {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "add_attention": False},
    "learned variance": {**BLOCKS, **GOOGLE, "out_channels": 6},
}  # fmt: skip

CIFAR10 = {
    **GOOGLE, "sample_size": 32, "block_out_channels": [128, 256, 256, 256], "layers_per_block": 2, "norm_num_groups": 32,
    "act_fn": "silu", "in_channels": 3, "out_channels": 3, "center_input_sample": False, "mid_block_scale_factor": 1,
    "time_embedding_type": "positional",
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
CHURCH = {
    **CIFAR10, "sample_size": 256, "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}  # fmt: skip
EXAMPLE = {
    "sample_size": 64, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}  # fmt: skip
"""The real ones, at full size."""


def network(name: str = "google", seed: int = 0, **options: Any) -> UNet2DModel:
    """One of :data:`NETWORKS` with random weights, also where diffusers begins with ones and zeros."""
    torch.manual_seed(seed)
    net = UNet2DModel(**{**SMALL, **NETWORKS[name], **options}).eval().requires_grad_(False)
    for parameter in net.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    return net


def pipeline(net: UNet2DModel, **options: Any) -> DDPMPipeline:
    """``net`` and a scheduler of ``options``."""
    pipe = DDPMPipeline(unet=net, scheduler=DDPMScheduler(**options))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def saved(path: Path, name: str = "google", scheduler: dict[str, Any] | None = None, **options: Any) -> UNet2DModel:
    """Write a folder as diffusers does; returns its network."""
    net = network(name, **options)
    learned = {"variance_type": "learned_range"} if net.config.out_channels == 2 * net.config.in_channels else {}
    pipeline(net, **learned, **(scheduler or {})).save_pretrained(path)
    return net
