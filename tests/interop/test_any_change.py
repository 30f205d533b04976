"""Whatever is changed in another tool's checkpoint, it is read, or refused in one line: nothing else comes out."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import saved

from ddpmctl.cli import main
from ddpmctl.errors import CheckpointError
from ddpmctl.interop import formats
from ddpmctl.interop.source import metadata_of, read_safetensors
from ddpmctl.interop.writing import tensors_as_bytes
from ddpmctl.parsing import shown

PTH = Path(__file__).parents[1] / "data" / "reference" / "seed-linear.pth"
STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 10**30, 0.5, -0.1, 1e-6, float("inf"), float("nan"), "", "0", "silu", "linear",
    "squaredcos_cap_v2", "\n", "\x1b[31m", "x" * 5000, [], [0], [1, 2], [32, 64], [[1]], [None], ["DownBlock2D"], {}, {"a": 1},
    ["AttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "AttnUpBlock2D"], ["DownBlock2D"] * 9, [0.1] * 1000,
]  # fmt: skip


def outcome(path: Path) -> bool:
    """Whether it is read."""
    try:
        loaded = formats.load(path)
    except CheckpointError as error:
        assert "\n" not in shown(error.problem) and len(error.problem) < 2500 and error.advice
        return False
    assert loaded.content["source"]
    return True


def test_any_value_of_any_key_of_a_folder(tmp_path: Path) -> None:
    saved(tmp_path / "pipe", "example")
    read, refused = 0, 0
    for name in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        file = tmp_path / "pipe" / name
        good = json.loads(file.read_text())
        for turn, key in enumerate(good):
            for value in STRANGE[turn % 3 :: 3]:
                file.write_text(json.dumps(good | {key: value}))
                if outcome(tmp_path / "pipe"):
                    read += 1
                else:
                    refused += 1
        file.write_text(json.dumps(good))
    assert read > 30 and refused > 150


@pytest.mark.parametrize("seed", range(40))
def test_any_tensors_in_a_pth(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    state: dict[str, Any] = dict(torch.load(PTH, weights_only=True))
    for _ in range(draw.randint(1, 3)):
        name = draw.choice([*state, "betas", "model.init_conv.weight", "model.downs.0.conv_1.weight", "model.downs.2.downsample.weight"])
        strange = [torch.zeros(0), torch.tensor(3), torch.zeros(2, 2), torch.zeros(3, dtype=torch.bool), torch.zeros(40, 32, 3, 3), 7, None, "x",
                   torch.zeros(1001), torch.full((1000,), 0.5), torch.zeros(2, 3).to_sparse(), torch.zeros(4, dtype=torch.complex64)]  # fmt: skip
        state[name] = draw.choice(strange)
        if draw.random() < 0.3:
            state[draw.choice(["model.downs.99999.x", "model.downs.07.conv_1.weight", "model.class_bias.weight", "ema_model."])] = torch.zeros(1)
        if draw.random() < 0.3:
            state.pop(draw.choice(list(state)))
    torch.save(state, tmp_path / "x.pth")
    outcome(tmp_path / "x.pth")


@pytest.mark.parametrize("key", ["config", "image_shape", "class_names", "step", "version", "source", "magic", "format", "digest", "ema steps"])
def test_any_value_in_a_safetensors_file(key: str, trained: Path, tmp_path: Path) -> None:
    assert main(["convert", str(trained), "x.safetensors", "-q"]) == 0
    tensors = read_safetensors(tmp_path / "x.safetensors")
    told = json.loads(metadata_of(tmp_path / "x.safetensors")["ddpmctl"])
    for value in STRANGE:
        (tmp_path / "x.safetensors").write_bytes(tensors_as_bytes(tensors, {"ddpmctl": json.dumps(told | {key: value})}))
        assert not outcome(tmp_path / "x.safetensors") or value == told[key]


def test_any_cut_of_a_file(trained: Path, tmp_path: Path) -> None:
    assert main(["convert", str(trained), "whole.safetensors", "-q"]) == 0
    data = (tmp_path / "whole.safetensors").read_bytes()
    for length in (1, 7, 8, 9, 20, 500, len(data) // 2, len(data) - 1):
        (tmp_path / "x.safetensors").write_bytes(data[:length])
        assert not outcome(tmp_path / "x.safetensors")
    shutil.copy(PTH, tmp_path / "x.pth")
    for length in (1, 7, 100, 9000, PTH.stat().st_size - 1):
        (tmp_path / "x.pth").write_bytes(PTH.read_bytes()[:length])
        assert not outcome(tmp_path / "x.pth")
