"""``ddpmctl inspect`` on each kind of thing."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from ddpmctl import __version__, checkpoint
from ddpmctl.cli import main
from ddpmctl.config import RunConfig
from ddpmctl.core.unet import Attention
from ddpmctl.errors import Exit
from ddpmctl.inspection import command_of
from ddpmctl.runfile import read_run_file, resolve
from ddpmctl.sampling import load_model


def facts(capsys: pytest.CaptureFixture[str], *command: str) -> dict:
    capsys.readouterr()
    assert main(["inspect", *command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_checkpoint(trained, capsys):
    path = trained / "checkpoints" / "step-00000006.pt"
    found = facts(capsys, str(path))
    content, net = checkpoint.load(path), load_model(path).denoiser.net
    assert found["what"]["kind"] == "checkpoint" and found["what"]["digest"] == content["digest"]
    assert found["what"]["written by"] == f"ddpmctl {__version__}"
    assert found["training"] == {"step": "6 of 6", "images seen": "24", "epochs": 2.0}
    assert found["images"]["shape (C, H, W)"] == [3, 16, 16]
    blocks = dict(found["parameters"])
    total = blocks.pop("total")
    assert total == sum(blocks.values()) == sum(p.numel() for p in net.parameters())
    assert found["ema"]["steps"] == 6 and found["ema"]["decay now"] == pytest.approx(7 / 16, abs=1e-6)
    assert found["schedule"]["timesteps"] == 20
    assert found["config"]["train"]["batch_size"] == 4


def multiply_adds(net: nn.Module, x: torch.Tensor) -> int:
    """Those of convolutions, linear layers and attention, counted layer by layer in a real forward pass."""
    total = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, Attention):
            pixels = output.shape[2] * output.shape[3]
            total += 2 * pixels * pixels * output.shape[1]

    for module in net.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        net(x, torch.zeros(1, dtype=torch.long), None)
    return total


def test_flops_are_two_a_multiply_add(trained, capsys):
    found = facts(capsys, str(trained / "run.yaml"))
    number, unit = found["cost"]["one image, forward"].split()
    expected = 2 * multiply_adds(load_model(trained).denoiser.net, torch.zeros(1, 3, 16, 16))
    assert unit == "MFLOP" and float(number) * 1e6 == pytest.approx(expected, rel=5e-3)


def test_the_cifar_run_file_has_the_parameters_of_the_paper(capsys):
    example = Path(__file__).parents[2] / "examples" / "cifar10.yaml"
    assert facts(capsys, str(example))["parameters"]["total"] == 35_746_307


def test_a_run_folder(trained_classes, capsys):
    found = facts(capsys, str(trained_classes))
    assert found["what"]["kind"] == "run folder"
    assert found["progress"]["steps"] == "6 of 6" and found["progress"]["sample grids"] == 2
    assert found["images"]["classes"] == ["cats", "dogs"]
    assert found["images"]["shape (C, H, W)"] == [1, 16, 24]


def test_a_run_folder_that_has_not_saved_yet(trained, tmp_path, capsys):
    run = tmp_path / "young"
    run.mkdir()
    (run / "run.yaml").write_text((trained / "run.yaml").read_text())
    assert facts(capsys, str(run))["progress"]["checkpoints"] == "none yet"


def test_data_counts_and_says_what_would_be_refused(photos, capsys):
    (photos / "cats" / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    Image.new("L", (40, 30)).save(photos / "dogs" / "grey.BMP")
    (photos / "notes.txt").write_text("no image")
    found = facts(capsys, str(photos))
    assert found["images"]["usable"] == 13 and found["images"]["ignored"] == 1
    assert found["sizes"] == {"16x16": 12, "30x40": 1}
    assert found["classes"] == {"cats": 6, "dogs": 7}
    assert list(found["refused"]) == ["cats/broken.jpg"]


def test_of_very_many_images_only_headers_are_read_but_what_training_found_is_known(photos, tiny, capsys, monkeypatch):
    whole = Image.effect_noise((64, 64), 90)
    whole.save(photos / "cats" / "cut.png")
    raw = (photos / "cats" / "cut.png").read_bytes()
    (photos / "cats" / "cut.png").write_bytes(raw[: len(raw) // 2])
    assert list(facts(capsys, str(photos))["refused"]) == ["cats/cut.png"]
    monkeypatch.setattr("ddpmctl.inspection.MOST_DECODED", 5)
    found = facts(capsys, str(photos))
    assert found["images"]["usable"] == 13 and found["refused"] == "none"
    assert "13 of 13 images were known by the header only: training decodes all" in found["notes"]
    monkeypatch.setattr("ddpmctl.data.records.TICK_NS", 0)
    assert main(["train", str(photos), "-c", str(tiny), "--dry-run", "-q"]) == 0
    found = facts(capsys, str(photos))
    assert list(found["refused"]) == ["cats/cut.png"] and not any("header" in note for note in found["notes"])


def test_a_run_file(tiny, capsys):
    found = facts(capsys, str(tiny))
    assert found["what"]["kind"] == "run file" and "channels" in found["what"]["assumed"]
    assert resolve(read_run_file(tiny)).to_dict() == found["config"] | {"data": found["config"]["data"]}
    assert "shift" not in found["schedule"] and "classes" not in found["what"]["assumed"]
    assert "classes" in facts(capsys, str(Path(__file__).parents[2] / "examples" / "quickstart.yaml"))["what"]["assumed"]
    tiny.write_text(tiny.read_text().replace("timesteps: 20", "timesteps: 20, shift: 4"))
    assert facts(capsys, str(tiny))["schedule"]["shift"] == 4


def test_the_screen_shows_the_same_facts(trained, capsys):
    assert main(["inspect", str(trained)]) == 0
    printed = capsys.readouterr().out
    for words in ("run folder", "terminal SNR", "middle.0", "decay now", "batch_size"):
        assert words in printed, words


def test_defaults_are_a_run_file_that_explains_every_key(capsys):
    assert main(["inspect", "--defaults"]) == 0
    printed = capsys.readouterr().out
    Path("defaults.yaml").write_text(printed)
    assert resolve(read_run_file(Path("defaults.yaml"))) == RunConfig()
    assert yaml.safe_load(printed)["train"]["ema_decay"] == 0.9999
    assert all("#" in line for line in printed.splitlines())


def test_a_gif_of_ours_names_its_command(trained, capsys):
    assert main(["sample", str(trained), "-n", "2", "--steps", "3", "-o", "way.gif", "-q"]) == 0
    found = facts(capsys, "way.gif")
    assert found["what"]["kind"] == "picture" and found["made with"]["kind"] == "sample"
    before = Path("way.gif").read_bytes()
    assert main([*shlex.split(found["command"])[1:], "--overwrite", "-q"]) == 0
    assert Path("way.gif").read_bytes() == before
    Image.radial_gradient("L").save("a picture.png")
    assert main(["noise-demo", "a picture.png", "-o", "demo.gif", "--frames", "3", "-q"]) == 0
    assert "noise-demo 'a picture.png' -o demo.gif" in facts(capsys, "demo.gif")["command"]


def test_the_folder_of_checkpoints_means_its_run(trained, capsys):
    assert facts(capsys, str(trained / "checkpoints")) == facts(capsys, str(trained))


def test_a_damaged_checkpoint_sends_to_the_newest_good_one(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    for name in ("step-00000006.pt", "step-00000008.pt"):
        (tmp_path / "run" / "checkpoints" / name).write_bytes(b"PK\x03\x04 cut")
    assert main(["inspect", "run/checkpoints/step-00000006.pt"]) == Exit.CHECKPOINT
    shown = capsys.readouterr().err
    assert "cut short" in shown and "newest good one is run/checkpoints/step-00000004.pt" in shown


@pytest.mark.parametrize("part", ["net", "ema", "image_shape", "config"])
@pytest.mark.parametrize("command", ["inspect", "sample"])
def test_a_checkpoint_whose_parts_do_not_fit_each_other_is_refused(command, part, trained, trained_classes, capsys):
    content, other = (checkpoint.load(next(run.glob("checkpoints/*6.pt"))) for run in (trained, trained_classes))
    del content["digest"]
    checkpoint.save(Path("mixed.pt"), {**content, "optimizer": {"state": {}, "param_groups": []}, part: other[part]})
    capsys.readouterr()
    assert main([command, "mixed.pt"]) == Exit.CHECKPOINT
    problem, _ = capsys.readouterr().err.splitlines()
    assert "mixed.pt" in problem and "fit its configuration" in problem


def test_an_image_shape_that_the_network_cannot_halve_is_refused(trained, capsys):
    content = checkpoint.load(trained / "checkpoints" / "step-00000006.pt")
    del content["digest"]
    content["config"]["data"]["size"] = "auto"
    checkpoint.save(Path("odd.pt"), {**content, "image_shape": [3, 16, 15]})
    assert main(["inspect", "odd.pt"]) == Exit.CHECKPOINT
    assert "16x15 do not fit" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code"), [
    ("nothing", Exit.CONFIG), ("other.png", Exit.CONFIG), ("text.pt", Exit.CHECKPOINT), ("bad.yaml", Exit.CONFIG),
    ("other.gif: a GIF image, not made by ddpmctl", Exit.CONFIG), ("photo: a JPEG image", Exit.CONFIG),
    ("metrics.csv: a text file", Exit.CHECKPOINT), ("empty.pt: empty", Exit.CHECKPOINT),
    ("empty", Exit.DATA), ("broken.zip", Exit.DATA),
])  # fmt: skip
def test_what_cannot_be_inspected_is_a_clear_error(name, code, capsys):
    for picture, kind in (("other.png", "png"), ("other.gif", "gif"), ("photo", "jpeg")):
        Image.new("L", (4, 4)).save(picture, kind)
    Path("metrics.csv").write_text("step,loss\n")
    Path("empty.pt").touch()
    Path("text.pt").write_text("hello")
    Path("bad.yaml").write_text("train: [1")
    Path("empty").mkdir()
    Path("broken.zip").write_bytes(b"PK\x03\x04 no zip")
    assert main(["inspect", name.partition(":")[0]]) == code
    shown = capsys.readouterr().err
    assert name in shown and "Traceback" not in shown


def test_a_picture_from_before_thresholds_keeps_its_command():
    made_with = {"kind": "sample", "path": "run", "n": 2, "sampler": "ddim", "steps": 50, "clip": False, "seed": 0}
    assert command_of(made_with, Path("x.png")) == (
        "ddpmctl sample run -n 2 -o x.png --sampler ddim --steps 50 --threshold none --seed 0"
    )
