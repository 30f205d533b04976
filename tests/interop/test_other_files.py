"""Safetensors of ours and of others, denoising-diffusion-pytorch, and what is no checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddpmctl import checkpoint
from ddpmctl.cli import main
from ddpmctl.errors import CheckpointError, ConfigError, Exit
from ddpmctl.interop import formats
from ddpmctl.runfile import flag_layer
from ddpmctl.runfolder import checkpoint_in
from runs import assert_same


@pytest.fixture
def file(trained: Path, tmp_path: Path) -> Path:
    assert main(["convert", str(trained), "x.safetensors", "-q"]) == 0
    return tmp_path / "x.safetensors"


def test_a_safetensors_file_holds_all_to_the_bit(trained: Path, file: Path, tmp_path: Path) -> None:
    there, here = checkpoint.load(checkpoint_in(trained)), formats.load(file).content
    for part in ("net", "config", "image_shape", "class_names", "step", "version"):
        assert_same(here[part], there[part], part)
    assert_same(here["ema"], there["ema"], "ema")
    assert "optimizer" not in here and here["source"]["format"] == "ddpmctl"
    assert main(["convert", "x.safetensors", "y.pt", "-q"]) == 0
    assert main(["convert", "y.pt", "y.safetensors", "-q"]) == 0
    assert (tmp_path / "y.safetensors").read_bytes() == file.read_bytes()
    assert checkpoint.load(tmp_path / "y.pt")["digest"] == here["digest"]


def test_any_tool_reads_its_tensors(trained: Path, file: Path) -> None:
    there = checkpoint.load(checkpoint_in(trained))
    tensors = load_file(file)
    assert_same({f"ema.{k}": v for k, v in there["ema"]["net"].items()} | {f"net.{k}": v for k, v in there["net"].items()}, tensors)
    with safe_open(file, framework="pt") as opened:
        told = json.loads(opened.metadata()["ddpmctl"])
    assert told["config"] == there["config"] and told["image_shape"] == [3, 16, 16]


def test_one_set_of_weights_is_kept_once(trained: Path, tmp_path: Path) -> None:
    for weights in ("ema", "raw"):
        assert main(["convert", str(trained), f"{weights}.safetensors", "--weights", weights, "-q"]) == 0
        assert all(name.startswith("ema.") for name in load_file(tmp_path / f"{weights}.safetensors"))
    there = checkpoint.load(checkpoint_in(trained))
    assert_same(formats.load(tmp_path / "raw.safetensors").content["ema"]["net"], there["net"])
    assert_same(formats.load(tmp_path / "ema.safetensors").content["net"], there["ema"]["net"])


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def rewritten(file: Path, told: object) -> None:
    save_file(load_file(file), file, {"format": "pt", "ddpmctl": told if isinstance(told, str) else json.dumps(told)})


@pytest.mark.parametrize("case", ["a weight", "the step", "no digest", "not JSON", "a list", "deep", "cut", "no optimizer"])
def test_a_changed_file_is_refused(file: Path, case: str) -> None:
    told = json.loads(metadata_of(file)["ddpmctl"])
    if case == "a weight":
        tensors = load_file(file)
        tensors["ema.conv_in.bias"] = tensors["ema.conv_in.bias"] + 1
        save_file(tensors, file, {"format": "pt", "ddpmctl": json.dumps(told)})
    elif case == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        lists = {"the step": told | {"step": 7}, "not JSON": "{", "a list": [1], "deep": "[" * 5000}
        rewritten(file, lists.get(case, {k: v for k, v in told.items() if k != ("source" if case == "no optimizer" else "digest")}))
    with pytest.raises(CheckpointError) as caught:
        formats.load(file)
    assert "damaged" in caught.value.problem and caught.value.advice


def test_safetensors_of_others(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="without the configuration") as caught:
        formats.load(tmp_path / "other.safetensors")
    assert "model_index.json" in caught.value.advice


def model_n() -> dict[str, object]:
    """Keys and shapes as ``Trainer.save`` of denoising-diffusion-pytorch 2.3 writes them, for ``Unet(16, dim_mults=(1, 2))``."""
    net = {
        "init_conv.weight": (16, 3, 7, 7), "init_conv.bias": (16,), "time_mlp.1.weight": (64, 16), "time_mlp.1.bias": (64,),
        "downs.0.0.mlp.1.weight": (32, 64), "downs.0.0.block1.proj.weight": (16, 16, 3, 3), "downs.0.0.block1.norm.g": (1, 16, 1, 1),
        "downs.0.2.mem_kv": (2, 4, 32, 4), "downs.0.2.to_qkv.weight": (384, 16, 1, 1), "downs.0.3.1.weight": (32, 64, 1, 1),
        "mid_attn.mem_kv": (2, 4, 4, 32), "final_conv.weight": (3, 16, 1, 1),
    }  # fmt: skip
    model = {f"model.{name}": torch.zeros(shape) for name, shape in net.items()} | {"betas": torch.zeros(10)}
    ema = {f"ema_model.{name}": value for name, value in model.items()} | {"initted": torch.tensor(True), "step": torch.tensor(3)}
    return {"step": 3, "model": model, "opt": {"state": {}, "param_groups": []}, "ema": ema, "scaler": None, "version": "2.3.4"}


@pytest.mark.parametrize("command", [["inspect", "model-3.pt"], ["sample", "model-3.pt"], ["convert", "model-3.pt", "x.pt"]])
@pytest.mark.parametrize("bare", [False, True])
def test_denoising_diffusion_pytorch_is_a_clear_no(command: list[str], bare: bool, capsys: pytest.CaptureFixture[str]) -> None:
    content = model_n()
    torch.save(content["model"] if bare else content, "model-3.pt")
    assert main(command) == Exit.CHECKPOINT
    shown = capsys.readouterr().err
    assert "model-3.pt: the network of denoising-diffusion-pytorch, which ddpmctl cannot have: a first convolution of 7x7" in shown
    assert "RMS norms" in shown and len(shown.strip().splitlines()) == 2
    assert not Path("x.pt").exists()


@pytest.mark.parametrize("content", [{"weight": torch.zeros(3)}, [1], {}, None, {"model": 3}, {"betas": 1, "model.init_conv.weight": 2}])
def test_what_is_no_checkpoint(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt: not a ddpmctl checkpoint"):
        formats.load(tmp_path / "x.pt")


def test_settings_are_not_given_to_what_says_them(trained: Path, file: Path) -> None:
    for path in (checkpoint_in(trained), file):
        with pytest.raises(ConfigError, match=r"--size: .* says that itself"):
            formats.load(path, flag_layer({"data.size": "32"}))


def test_a_row_of_the_table_is_all_that_a_format_takes(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(source: formats.Source, given: formats.Layer) -> formats.Loaded | None:
        if source.path.suffix != ".link":
            return None
        return formats.load(Path(source.path.read_text()))._replace(format="link")

    monkeypatch.setitem(formats.FORMATS, "link", formats.Format("a file that names another", read))
    (tmp_path / "x.link").write_text(str(checkpoint_in(trained)))
    assert main(["sample", "x.link", "-n", "1", "--steps", "2", "-o", "x.png"]) == 0
    assert main(["convert", "x.link", "x.pt"]) == 0
