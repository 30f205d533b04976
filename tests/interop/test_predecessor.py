"""The predecessor's checkpoints, read whole: the reference gives its recorded numbers, and what does not fit is listed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpmctl.build import build_net
from ddpmctl.cli import main
from ddpmctl.config import RunConfig
from ddpmctl.core.samplers import ddpm
from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.core.unet import UNet
from ddpmctl.errors import CheckpointError, ConfigError, Exit
from ddpmctl.interop import formats
from ddpmctl.runfile import flag_layer
from ddpmctl.sampling import load_model

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
PTH = REFERENCE / "seed-linear.pth"


@pytest.fixture(scope="module")
def numbers() -> dict[str, Tensor]:
    with np.load(REFERENCE / "seed-linear.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(PTH, weights_only=True)
    return found


@pytest.mark.parametrize("converted", [None, "x.pt", "x.safetensors"])
@pytest.mark.parametrize(("weights", "key"), [("raw", "eps_model"), ("ema", "eps_ema")])
def test_the_reference_gives_its_recorded_numbers(numbers, weights, key, converted) -> None:
    if converted:
        assert main(["convert", str(PTH), converted, "--size", "16"]) == 0
    model = load_model(Path(converted or PTH), "cpu", weights=weights, threshold="none")
    with torch.no_grad():
        out = model.denoiser.output(numbers["x"], numbers["t"] + 1)
    torch.testing.assert_close(out, numbers[key], rtol=1e-5, atol=1e-5)
    if weights == "ema":
        for step in (0, 1, 50, 999):
            state = next(ddpm(model.denoiser, numbers["x"], [step + 1, step], noise=lambda: numbers["noise"], variance="beta"))
            torch.testing.assert_close(state.x_t, numbers[f"next_{step}"], rtol=1e-5, atol=1e-5)


def test_what_is_read_off_and_what_is_assumed() -> None:
    loaded = formats.load(PTH)
    model = loaded.content["config"]["model"]
    assert (model["base_channels"], model["channel_mults"], model["num_res_blocks"]) == (32, [1, 1], 1)
    assert (model["attention_levels"], model["time_embedding"], model["middle_attention"]) == ([1], 64, True)
    diffusion = loaded.content["config"]["diffusion"]
    assert (diffusion["schedule"], diffusion["timesteps"], diffusion["prediction"]) == ("linear", 1000, "eps")
    for words in ("model.norm_groups 32", "model.time_scale 1.0", "data.size 64"):
        assert words in loaded.notes[0]


def test_what_it_does_not_say_can_be_given(numbers: dict[str, Tensor]) -> None:
    words = ["model.norm_groups=8", "model.time_scale=0.5"]
    given = formats.load(PTH, flag_layer({"data.size": "16x24"}, words))
    assert given.content["image_shape"] == [3, 16, 24]
    model = given.content["config"]["model"]
    assert (model["norm_groups"], model["time_scale"]) == (8, 0.5)
    for words in ("norm_groups", "time_scale", "data.size"):
        assert words not in given.notes[0]
    with pytest.raises(ConfigError, match=r"--set model\.base_channels: .* says that itself: 32"):
        formats.load(PTH, flag_layer({}, ["model.base_channels=64"]))
    with pytest.raises(ConfigError, match=r"--set model\.norm_groups: 5 does not divide"):
        formats.load(PTH, flag_layer({}, ["model.norm_groups=5"]))
    with pytest.raises(ConfigError, match=r"--set model\.nrm: no such key"):
        formats.load(PTH, flag_layer({}, ["model.nrm=5"]))


def test_a_size_that_does_not_fit_what_was_assumed_says_how_to_give_another(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"model": {"base_channels": 32, "channel_mults": [1] * 8, "num_res_blocks": 1, "attention_levels": []}})
    written(tmp_path / "old.pth", config)
    with pytest.raises(CheckpointError, match="64 pixels do not halve evenly 7 times") as caught:
        formats.load(tmp_path / "old.pth")
    assert "ddpmctl convert" in caught.value.advice and caught.value.advice.endswith("--size 128")
    with pytest.raises(ConfigError, match="--size: 192 pixels do not halve evenly 7 times") as caught_too:
        formats.load(tmp_path / "old.pth", flag_layer({"data.size": 192}))
    assert caught_too.value.advice == "give --size 128 or 256"
    assert formats.load(tmp_path / "old.pth", flag_layer({"data.size": 128})).content["image_shape"] == [3, 128, 128]


def as_there(net: UNet) -> dict[str, Tensor]:
    """The weights of ``net`` under the predecessor's names, written down from its description."""
    found = {}
    for name, value in net.state_dict().items():
        for pattern, theirs in (
            (r"^time\.linear_1", "time_mlp.1"), (r"^time\.linear_2", "time_mlp.3"), (r"^conv_in", "init_conv"),
            (r"^norm_out", "out_norm"), (r"^conv_out", "out_conv"), (r"^middle", "mid"),
            (r"^down\.(\d+)\.(weight|bias)$", r"downs.\1.downsample.\2"), (r"^up\.(\d+)\.(weight|bias)$", r"ups.\1.upsample.1.\2"),
            (r"^down\.", "downs."), (r"^up\.", "ups."), (r"\.conv_2\.", ".conv_2.1."), (r"\.skip\.", ".residual_connection."),
            (r"\.qkv\.", ".to_qkv."), (r"attention\.out\.", "attention.to_out."),
        ):  # fmt: skip
            name = re.sub(pattern, theirs, name)
        found[name] = value
    return found


NETWORKS: dict[str, dict[str, Any]] = {
    "four levels": {"channel_mults": [1, 2, 4, 8], "num_res_blocks": 3, "attention_levels": [1]},
    "classes": {"channel_mults": [1, 2], "attention_levels": [0, 1]},
    "no time": {"channel_mults": [1, 2], "attention_levels": [], "time_embedding": "none"},
    "batch norm": {"channel_mults": [1, 2], "norm": "batch"},
    "no norm": {"channel_mults": [1, 2], "norm": "none"},
    "one level": {"channel_mults": [1], "attention_levels": [0]},
    "few channels": {"base_channels": 8, "norm_groups": 8, "channel_mults": [1, 2]},
    "a wide first level": {"channel_mults": [2, 2]},
}  # fmt: skip


def written(path: Path, config: RunConfig, classes: int = 0, schedule: str = "cosine") -> UNet:
    torch.manual_seed(1)
    net = build_net(config, 3, classes).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.1 if parameter.ndim == 1 else 0.0, 0.1)
    weights, tables = as_there(net), NoiseSchedule.named(schedule, 50)
    there = {f"model.{name}": value for name, value in weights.items()}
    there |= {f"ema_model.{name}": value + (value.is_floating_point()) for name, value in weights.items()}
    torch.save(there | {"betas": tables.betas[1:].float(), "alphas": tables.alphas[1:].float()}, path)
    return net


@pytest.mark.parametrize("name", NETWORKS)
def test_other_structures_are_read_off(name: str, tmp_path: Path) -> None:
    config = RunConfig.model_validate({"model": {"base_channels": 32, "num_res_blocks": 2, **NETWORKS[name]}, "data": {"conditional": name == "classes"}})
    classes = 3 if name == "classes" else 0
    net = written(tmp_path / "old.pth", config, classes)
    model = load_model(tmp_path / "old.pth", "cpu", weights="raw")
    there = config.model.model_dump() | {"time_embedding": "none" if name == "no time" else 4 * config.model.base_channels}
    assert model.config.model.model_dump() == there
    assert model.config.diffusion.schedule == "cosine" and model.denoiser.schedule.timesteps == 50
    assert model.class_names == ["0", "1", "2"][:classes]
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 40])
    label = torch.tensor([0, 2]) if classes else None
    with torch.no_grad():
        here, there = model.denoiser.net.double()(x.double(), t, label), net.double()(x.double(), t, label)
    assert (here - there).abs().max() < 1e-9 * there.abs().max()


WRONG = {
    "a tensor missing": (lambda s: s.pop("ema_model.mid.0.norm_1.weight"), "ema_model.mid.0.norm_1.weight (missing)"),
    "a tensor more": (lambda s: s.update({"model.extra.weight": torch.zeros(1)}), "model.extra.weight (not known)"),
    "another shape": (lambda s: s.update({"model.mid.0.conv_1.weight": torch.zeros(3, 3, 3, 3)}), "model.mid.0.conv_1.weight (3x3x3x3, not 32x32x3x3)"),
    "no average": (lambda s: [s.pop(n) for n in list(s) if n.startswith("ema_model.")], "ema_model.time_mlp.1.weight (missing)"),
    "a table more": (lambda s: s.update({"gammas": torch.zeros(1)}), "gammas: not known"),
    "other betas": (lambda s: s.update({"betas": s["betas"] * 1.01}), "betas: neither"),
    "betas of another kind": (lambda s: s.update({"betas": torch.zeros(2, 2)}), "betas: neither"),
    "a first convolution that is none": (lambda s: s.update({"model.init_conv.weight": torch.zeros(3)}), "model.init_conv.weight: of another kind"),
    "no first block": (lambda s: s.pop("model.downs.0.conv_1.weight"), "model.downs.0.conv_1.weight: missing"),
    "no blocks": (lambda s: [s.pop(n) for n in list(s) if ".downs." in n], "model.downs: must be at least 1"),
    "whole numbers": (lambda s: s.update({"ema_model.mid.0.norm_1.weight": torch.ones(32, dtype=torch.int64)}), "ema_model.mid.0.norm_1.weight (int64, not float32)"),
    "half precision of another width": (lambda s: s.update({"model.downs.0.conv_1.weight": torch.zeros(40, 32, 3, 3)}), "not all whole multiples"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_listed(state: dict[str, Tensor], case: str, tmp_path: Path) -> None:
    changed = dict(state)
    spoil, words = WRONG[case]
    spoil(changed)
    torch.save(changed, tmp_path / "old.pth")
    with pytest.raises(CheckpointError) as caught:
        formats.load(tmp_path / "old.pth")
    assert words in caught.value.problem and "\n" not in caught.value.problem


def test_a_long_list_is_cut(state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({name: value for name, value in state.items() if ".mid." not in name}, tmp_path / "old.pth")
    assert main(["inspect", "old.pth"]) == Exit.CHECKPOINT
    shown = capsys.readouterr().err
    assert "of its tensors do not fit" in shown and " more" in shown and len(shown.strip().splitlines()) == 2
