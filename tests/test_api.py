"""ddpmctl from Python gives what the commands give."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ddpmctl
from ddpmctl.api.arguments import in_python
from ddpmctl.api.scores import Evaluation
from ddpmctl.cli import main
from ddpmctl.config import known_keys
from ddpmctl.errors import CheckpointError, ConfigError, DataError, OutputError
from ddpmctl.images import to_uint8
from ddpmctl.run import Run
from ddpmctl.training import TrainStep
from helpers import TINY, write_images
from runs import assert_same_run, steps_saved

ROOT = Path(__file__).parents[1]
SMALL = {"steps": 6, "size": 16, "base_channels": 8, "norm_groups": 4, "batch_size": 4, "log_every": 2, "timesteps": 20,
         "samples": 4, "sample_steps": 2, "precision": "fp32"}  # fmt: skip


def by_command(*arguments: object) -> np.ndarray:
    """uint8 (N, H, W, C) of ``ddpmctl sample``."""
    assert main(["sample", *map(str, arguments), "-o", "made.npz", "--overwrite", "-q"]) == 0
    return np.load("made.npz")["images"]


def pixels(images: torch.Tensor) -> np.ndarray:
    return to_uint8(images).permute(0, 2, 3, 1).numpy()


def test_import_takes_no_torch_and_names_what_there_is() -> None:
    script = ("import sys, ddpmctl; assert set(ddpmctl.__all__) <= set(dir(ddpmctl)); print('torch' in sys.modules); "
              "print(all(hasattr(ddpmctl, name) for name in ddpmctl.__all__), 'torch' in sys.modules)")  # fmt: skip
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True", "True"]
    with pytest.raises(AttributeError, match="no_such_thing"):
        ddpmctl.no_such_thing  # noqa: B018


def test_images_are_those_of_the_command(trained: Path) -> None:
    model = ddpmctl.load(trained)
    images = model.sample(n=5, seed=7)
    assert images.dtype == torch.float32 and images.shape == (5, 3, 16, 16) and images.abs().max() <= 1
    assert np.array_equal(pixels(images), by_command(trained, "-n", 5, "--seed", 7))
    assert main(["sample", str(trained), "-n", "3", "--seed", "7", "-o", "files/", "-q"]) == 0
    for i, picture in enumerate(model.pictures(3, 7)):
        assert picture.mode == "RGB" and picture.tobytes() == Image.open(f"files/{i:05d}.png").tobytes()


@pytest.mark.parametrize(
    ("how", "flags"),
    [
        ({"quality": "fast"}, ["--quality", "fast"]),
        ({"sampler": "ddim", "steps": 7, "eta": 0.5, "spacing": "quadratic"},
         ["--sampler", "ddim", "--steps", 7, "--eta", 0.5, "--spacing", "quadratic"]),
        ({"sampler": "ddpm", "variance": "posterior", "threshold": "none"},
         ["--sampler", "ddpm", "--variance", "posterior", "--threshold", "none"]),
        ({"batch_size": 2, "steps": 3}, ["--batch-size", 2, "--steps", 3]),
    ],
)  # fmt: skip
def test_arguments_are_the_flags_of_the_command(trained: Path, how: dict[str, object], flags: list[object]) -> None:
    images = ddpmctl.load(trained).sample(4, 1, **how)
    assert np.array_equal(pixels(images), by_command(trained, "-n", 4, "--seed", 1, *flags))


def test_raw_weights_and_other_formats(trained: Path) -> None:
    expected = by_command(trained, "-n", 2, "--weights", "raw")
    assert np.array_equal(pixels(ddpmctl.load(trained, weights="raw").sample(2)), expected)
    for name in ("model.safetensors", "pipeline/"):
        assert main(["convert", str(trained), name, "--weights", "raw", "-q"]) == 0
        assert np.array_equal(pixels(ddpmctl.load(name).sample(2)), expected)
    file = sorted((trained / "checkpoints").glob("step-*.pt"))[-1]
    model = ddpmctl.load(str(file))
    assert (model.path, model.step, model.class_names) == (file, 6, []) and "3x16x16" in repr(model)


def test_classes(trained_classes: Path) -> None:
    model = ddpmctl.load(trained_classes)
    assert model.class_names == ["cats", "dogs"]
    in_turn = model.sample(4)
    assert torch.equal(in_turn, model.sample(4, labels=[0, 1, 0, 1]))
    assert np.array_equal(pixels(in_turn), by_command(trained_classes, "-n", 4))
    dogs = model.sample(4, class_name="dogs")
    assert torch.equal(dogs, model.sample(4, labels=np.ones(4, int))) and not torch.equal(dogs, in_turn)
    assert np.array_equal(pixels(dogs), by_command(trained_classes, "-n", 4, "--class", "dogs"))


@pytest.mark.parametrize(
    ("how", "flags"),
    [
        ({"n": 3, "init": "a.png", "strength": 0.4}, ["-n", 3, "--init", "a.png", "--strength", 0.4]),
        ({"n": 2, "inpaint": Path("a.png"), "mask": "half.png", "steps": 5, "resample": 2},
         ["-n", 2, "--inpaint", "a.png", "--mask", "half.png", "--steps", 5, "--resample", 2]),
        ({"interpolate": ("a.png", Path("b.png")), "frames": 3, "steps": 4},
         ["--interpolate", "a.png", "b.png", "--frames", 3, "--steps", 4]),
        ({"interpolate": ("a.png", "b.png")}, ["--interpolate", "a.png", "b.png"]),
    ],
    ids=["init", "inpaint", "interpolate", "interpolate as usual"],
)  # fmt: skip
def test_pictures_to_begin_with_are_those_of_the_command(trained: Path, photos: Path, how: dict[str, Any], flags: list[object]) -> None:
    for name, file in zip(("a.png", "b.png"), sorted(photos.rglob("*.png")), strict=False):
        file.rename(name)
    half = Image.new("L", (16, 16))
    half.paste(255, (8, 0, 16, 16))
    half.save("half.png")
    images = ddpmctl.load(trained).sample(seed=3, **how)
    assert np.array_equal(pixels(images), by_command(trained, "--seed", 3, *flags))


def test_one_class_goes_from_picture_to_picture(trained_classes: Path) -> None:
    Image.effect_noise((24, 16), 90).save("a.png")
    model = ddpmctl.load(trained_classes)
    with pytest.raises(ConfigError, match=r"interpolate: the model draws several classes") as found:
        model.sample(interpolate=("a.png", "a.png"))
    assert found.value.advice == "name it with class_name: cats, dogs"
    assert len(model.pictures(interpolate=("a.png", "a.png"), frames=2, class_name="dogs", steps=2)) == 2


def test_evaluations_are_those_of_the_command(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch_fidelity")
    data, how = trained.parent / "photos", {"n": 8, "sampler": "ddim", "steps": 2, "seed": 4, "batch_size": 5}
    capsys.readouterr()
    flags = [word for name, value in how.items() for word in ("-n" if name == "n" else f"--{name.replace('_', '-')}", str(value))]
    assert main(["evaluate", str(trained), str(data), "--json", *flags]) == 0
    facts = json.loads(capsys.readouterr().out)
    found = ddpmctl.evaluate(trained, str(data), **how)
    assert found.facts == facts and found == Evaluation.of(facts)
    assert (found.kid, found.spread) == (facts["distances"]["kid"], facts["distances"]["kid_spread"])
    assert found.recall == facts["distances"]["recall"] and found.loss == facts["loss"]["mean"] and not found.memorised
    assert set(found.bits_per_dim) == {"beta", "posterior"} and len(found.warnings) == 2

    sheet = ddpmctl.evaluate(trained, data, n=6, steps=1, sheet="near.png", sheet_of=2)
    assert Path("near.png").is_file() and sheet.memorised == {} and len(sheet.warnings) == 3
    sets = ddpmctl.evaluate(data, data, n=12, size=(8, 8), cache=False)
    assert sets.frechet == pytest.approx(0, abs=1e-3) and sets.precision == 1 and sets.loss is None and sets.bits_per_dim == {}


def test_a_sheet_that_cannot_be_written_is_told_and_the_numbers_are_there(
    trained: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("torch_fidelity")

    def no_space(*args: object) -> None:
        raise OutputError("near.png: cannot be written: No space left on device", "free space")

    monkeypatch.setattr("ddpmctl.evaluation.facts.save_png", no_space)
    found = ddpmctl.evaluate(trained, trained.parent / "photos", n=6, steps=1, sheet="near.png", sheet_of=2)
    assert found.kid > 0 and found.facts["memorised"]["sheet"] is None
    assert "near.png: cannot be written: No space left on device" in [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("said", "ours"),
    [
        ("--ema-length 0.1: raw weights", "ema_length 0.1: raw weights"),
        ("leave --class out", "leave class_name out"),
        ("-n 9: not with --interpolate", "n 9: not with interpolate"),
        ("x: exists, add --resume, or train with --set model.label_dropout=0.1", "x: exists, add resume=True, or train with label_dropout=0.1"),
        ("if they have moved: ddpmctl train NEW --resume --out x", "if they have moved: ddpmctl train NEW --resume --out x"),
        ("my--photos/-n 4/x: --out y--z.png", "my--photos/-n 4/x: out y--z.png"),
    ],
)  # fmt: skip
def test_flags_become_arguments(said: str, ours: str) -> None:
    assert in_python(said) == ours


def test_guidance_is_asked_for_with_each_sample(tmp_path: Path) -> None:
    write_images(tmp_path / "photos")
    run = ddpmctl.train("photos", out="guided", conditional=True, label_dropout=0.5, **SMALL)
    model = run.load()
    plain = model.sample(2)
    guided = model.sample(2, guidance=3.0, guidance_interval=(0.1, 0.9))
    assert np.array_equal(pixels(guided), by_command("guided", "-n", 2, "--guidance", 3, "--guidance-interval", "0.1:0.9"))
    assert not torch.equal(plain, guided) and torch.equal(plain, model.sample(2))


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda run: ddpmctl.load("nowhere"), CheckpointError, "nowhere"),
        (lambda run: ddpmctl.load(run, device="gpu"), ConfigError, "device: 'gpu'"),
        (lambda run: ddpmctl.load(run, weights="best"), ConfigError, "weights: 'best'"),
        (lambda run: ddpmctl.load(run, weights="raw", ema_length=0.1), ConfigError, "ema_length 0.1"),
        (lambda run: ddpmctl.load(run).sample(0), ConfigError, "n 0: must"),
        (lambda run: ddpmctl.load(run).sample(seed=-1), ConfigError, "seed: -1"),
        (lambda run: ddpmctl.load(run).sample(quality="good"), ConfigError, "quality: 'good'"),
        (lambda run: ddpmctl.load(run).sample(steps=21), ConfigError, "steps 21: the model has 20"),
        (lambda run: ddpmctl.load(run).sample(eta=1.5, sampler="ddim"), ConfigError, "eta 1.5"),
        (lambda run: ddpmctl.load(run).sample(eta=0.5), ConfigError, "no such option"),
        (lambda run: ddpmctl.load(run).sample(class_name="bag"), ConfigError, "class_name bag: "),
        (lambda run: ddpmctl.load(run).sample(1, labels=[0]), ConfigError, "without classes"),
        (lambda run: ddpmctl.load(run).sample(guidance=2), ConfigError, "guidance 2"),
        (lambda run: ddpmctl.load(run).sample(guidance_interval=(0.9, 0.1)), ConfigError, "guidance_interval 0.9:0.1"),
        (lambda run: ddpmctl.load(run).sample(guidance_interval=(0.2, 0.8)), ConfigError, "guidance_interval 0.2:0.8: there is no"),
        (lambda run: ddpmctl.load(run).sample(variance="learned", sampler="ddpm"), ConfigError, "variance learned"),
        (lambda run: ddpmctl.load(run).sample(init="no.png"), DataError, "no.png: cannot be read"),
        (lambda run: ddpmctl.load(run).sample(strength=0.5), ConfigError, "strength 0.5: there is no picture to change"),
        (lambda run: ddpmctl.load(run).sample(inpaint="a.png"), ConfigError, "inpaint a.png: what is to be drawn anew"),
        (lambda run: ddpmctl.load(run).sample(interpolate="ab"), ConfigError, "interpolate: 'ab' is not two pictures"),
        (lambda run: ddpmctl.load(run).sample(interpolate=("a.png",)), ConfigError, "is not two pictures"),
        (lambda run: ddpmctl.load(run).sample(4, interpolate=("a.png", "b.png")), ConfigError, "n 4: not with interpolate"),
        (lambda run: ddpmctl.load(run).sample(frames=4), ConfigError, "frames 4: goes with interpolate only"),
        (lambda run: ddpmctl.evaluate("nowhere", "photos"), ConfigError, "nowhere: no such"),
        (lambda run: ddpmctl.evaluate(run, "photos", n=3), ConfigError, "n 3: must be 5 to"),
        (lambda run: ddpmctl.evaluate(run, "photos", size=8), ConfigError, "size: "),
        (lambda run: ddpmctl.evaluate("photos", "photos", size="8 by 8"), ConfigError, "size: '8 by 8'"),
        (lambda run: ddpmctl.evaluate("photos", "photos", class_name="cats"), ConfigError, "class_name: photos: it is images"),
        (lambda run: ddpmctl.evaluate(run, "photos", device="gpu"), ConfigError, "device: 'gpu'"),
        (lambda run: ddpmctl.evaluate(run, "photos", sheet="x.gif"), ConfigError, "sheet x.gif"),
        (lambda run: ddpmctl.train("no-photos"), DataError, "no-photos"),
        (lambda run: ddpmctl.train(), ConfigError, "no DATA"),
        (lambda run: ddpmctl.train(run), ConfigError, "a run folder"),
        (lambda run: ddpmctl.train("photos", stepps=3), ConfigError, "did you mean 'steps'"),
        (lambda run: ddpmctl.train("photos", model=8), ConfigError, "model: a section"),
        (lambda run: ddpmctl.train("photos", model={"widht": 8}), ConfigError, "model.widht"),
        (lambda run: ddpmctl.train("photos", steps="many"), ConfigError, "train.steps"),
        (lambda run: ddpmctl.train("photos", max_time="soon"), ConfigError, "max_time: 'soon'"),
        (lambda run: ddpmctl.train("photos", out=run), OutputError, "exists"),
        (lambda run: ddpmctl.train("nothing", resume=True), CheckpointError, "nothing"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    trained: Path, photos: Path, call: Callable[[Path], object], kind: type[ddpmctl.DdpmctlError], words: str
) -> None:
    photos.rename("photos")
    before = sorted(trained.rglob("*"))
    with pytest.raises(kind, match=re.escape(words)) as found:
        call(trained)
    assert found.value.advice or kind is ConfigError
    assert "--" not in re.sub("`ddpmctl .*`", "", f"{found.value.problem} {found.value.advice}")
    assert sorted(trained.rglob("*")) == before and not Path("runs").exists()


def test_labels_are_checked(trained_classes: Path) -> None:
    model = ddpmctl.load(trained_classes)
    for labels, words in (([0], "1 of them for 2"), ([0, 2], "not 0 to 1"), ([0, -1], "not 0 to 1")):
        with pytest.raises(ConfigError, match=words):
            model.sample(2, labels=labels)
    with pytest.raises(ConfigError, match="not with class_name"):
        model.sample(2, class_name="dogs", labels=[0, 0])


def test_a_run_is_that_of_the_command(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    assert main(["train", str(photos), "-c", "tiny.yaml", "--out", "by-command", "-q", "--lr", "2e-3"]) == 0
    run = ddpmctl.train(photos, config="tiny.yaml", out=Path("from-python"), lr=2e-3)
    assert_same_run(Path("by-command"), Path("from-python"))
    assert run.folder == Path("from-python") and run.checkpoint == run.folder / "checkpoints" / "step-00000006.pt"
    assert [row["step"] for row in run.metrics] == [2, 4, 6] and run.metrics[0]["loss"] > 0
    assert run.stopped is None and run.load().step == 6


def test_settings_by_name_by_section_and_by_key() -> None:
    names = [key.rpartition(".")[2] for key in known_keys()]
    assert len(names) == len(set(names))
    from ddpmctl.runfile import keyword_layer

    layer = keyword_layer({"lr": 1e-3, "seed": 2, "model": {"dropout": 0}, "train.samples": 4, "size": None, "init_from": Path("a")})
    assert layer.values == {"train.lr": 1e-3, "seed": 2, "model.dropout": 0, "train.samples": 4, "train.init_from": "a"}


def test_a_loop_left_early_is_saved_and_goes_on(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = ddpmctl.train(photos, out="whole", **SMALL)
    assert "fewer than 100" in caplog.text
    for event in ddpmctl.train_events(photos, out="parts", **SMALL):
        if isinstance(event, TrainStep) and event.step == 3:
            break
    assert steps_saved(Path("parts")) == [3]
    assert main(["train", "--resume", "parts", "-q"]) == 0  # the folder is free again, too
    assert_same_run(whole.folder, Path("parts"))
    again = ddpmctl.train("parts", resume=True)
    assert again.stopped is None and steps_saved(Path("parts")) == [3, 6]


def test_an_interrupt_is_saved_and_told(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    account = Run._account

    def interrupted(self: Run):
        yield from account(self)
        if self.state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "_account", interrupted)
    run = ddpmctl.train(photos, out="run", **SMALL)
    assert run.stopped == "SIGINT" and steps_saved(run.folder)[-1] in (2, 3)
    assert ddpmctl.train(run.folder, resume=True).stopped is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_notices_go_to_the_log(photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from ddpmctl import plot

    monkeypatch.setattr(plot, "metrics_curve", lambda *_: (_ for _ in ()).throw(OutputError("loss.png: full")))
    with caplog.at_level(logging.WARNING, "ddpmctl"):
        ddpmctl.train(photos, out="run", **SMALL)
    assert any("loss.png: full" in record.message for record in caplog.records)
