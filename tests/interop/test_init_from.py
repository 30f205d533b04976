"""``train --init-from``: the weights are those of the checkpoint, to the bit, and all else begins anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from pipelines import saved
from torch import Tensor

from ddpmctl import checkpoint
from ddpmctl.cli import main
from ddpmctl.errors import Exit
from ddpmctl.interop import formats
from ddpmctl.run import Run
from helpers import TINY, spoil_gradients
from runs import assert_same, assert_same_run, state_of

PTH = Path(__file__).parents[1] / "data" / "reference" / "seed-linear.pth"
SHORT = ["--steps", "4", "--batch-size", "4", "--precision", "fp32", "--set", "train.samples=4", "--set", "train.sample_steps=2",
         "--set", "train.save_every=2", "--set", "train.log_every=2", "--set", "train.sample_every=2"]  # fmt: skip


def weights_at_start(monkeypatch: pytest.MonkeyPatch, *command: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Run]:
    """Raw and averaged weights as training begins."""
    found: list[tuple[dict[str, Tensor], dict[str, Tensor], Run]] = []
    begin = Run.begin

    def look(run: Run) -> None:
        copy = lambda net: {name: value.clone() for name, value in net.state_dict().items()}
        found.append((copy(run.state.net), copy(run.state.ema.net), run))
        assert (run.state.step, run.state.ema.steps, len(run.state.optimizer.state)) == (0, 0, 0)
        begin(run)

    monkeypatch.setattr(Run, "begin", look)
    assert main(["train", *command]) == 0
    return found[0]


@pytest.mark.parametrize("source", ["pipe", "old.pth", "run", "run.safetensors"])
def test_a_run_starts_with_these_weights(source: str, photos: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(Path("pipe"))
    shutil.copy(PTH, "old.pth")
    shutil.copytree(trained, "run")
    assert main(["convert", "run", "run.safetensors", "-q"]) == 0
    size = ["--size", "16"] if source == "old.pth" else []
    net, ema, run = weights_at_start(monkeypatch, str(photos), "--init-from", source, "--out", "new", *SHORT, *size)
    there = formats.load(Path(source) if source != "run" else trained / "checkpoints" / "step-00000006.pt").content
    assert_same(net, there["net"])
    assert_same(ema, there["ema"]["net"])
    assert run.config.data.size == (16, 16)
    for section in ("model", "diffusion"):
        assert run.config.to_dict()[section] == there["config"][section]
    kept = state_of(Path("new"), 4)
    named = Path("run/checkpoints/step-00000006.pt") if source == "run" else Path(source)  # the very file, where it is one of a run
    assert kept["step"] == 4 and kept["config"]["train"]["init_from"] == str(named.absolute())
    assert not torch.equal(kept["net"]["conv_in.weight"], there["net"]["conv_in.weight"])


def test_weights_in_the_folder_to_be_replaced_are_refused_and_stay(
    photos: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, "run")
    before = sorted(Path("run").rglob("*"))
    for source in ("run", "run/checkpoints/step-00000006.pt"):
        assert main(["train", str(photos), "--init-from", source, "--out", "run", "--overwrite", *SHORT]) == 2
        assert "--init-from" in capsys.readouterr().err
    assert sorted(Path("run").rglob("*")) == before


def test_the_size_may_be_another(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(Path("pipe"))
    _, _, run = weights_at_start(monkeypatch, str(photos), "--init-from", "pipe", "--size", "32x16", *SHORT)
    assert run.config.data.size == (32, 16)


def test_what_stops_goes_on_and_what_died_before_a_checkpoint_starts_again_with_them(photos: Path) -> None:
    saved(Path("pipe"))
    start = [str(photos), "--init-from", "pipe", *SHORT]
    assert main(["train", *start, "--out", "whole"]) == 0
    assert main(["train", *start, "--out", "parts", "--steps", "2"]) == 0
    assert main(["train", "--resume", "parts", "--steps", "4"]) == 0
    assert_same_run(Path("whole"), Path("parts"))
    shutil.copytree("whole", "died")
    forget_all_but_the_settings(Path("died"))
    assert main(["train", "--resume", "died"]) == 0
    assert_same_run(Path("whole"), Path("died"))


def test_a_run_that_diverges_goes_back_to_these_weights(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(Path("pipe"))
    spoil_gradients(monkeypatch, lambda step, rollbacks: rollbacks == 0)
    begun = []
    start_with = Run.start_with
    monkeypatch.setattr(Run, "start_with", lambda run, content, path: (begun.append(path), start_with(run, content, path))[1])
    command = [str(photos), "--init-from", "pipe", *SHORT, "--set", "train.bad_steps=1", "--lr", "1e-12", "--out", "new"]
    assert main(["train", *command]) == 0
    assert len(begun) == 2
    there = formats.load(Path("pipe")).content["net"]
    for name, value in state_of(Path("new"), 4)["net"].items():
        torch.testing.assert_close(value, there[name], rtol=0, atol=1e-9)


def test_what_a_checkpoint_leaves_open_may_be_given(photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By flags, a run file, and the run file of the run itself; also where it goes back to the start."""
    shutil.copy(PTH, "old.pth")
    given = ["--set", "model.norm_groups=8", "--set", "model.time_scale=0.5", "--size", "16"]
    with pytest.MonkeyPatch.context() as patch:
        spoil_gradients(patch, lambda step, rollbacks: rollbacks == 0)
        command = [str(photos), "--init-from", "old.pth", "--out", "one", *SHORT, *given, "--set", "train.bad_steps=1"]
        _, _, run = weights_at_start(patch, *command)
    assert (run.config.model.norm_groups, run.config.model.time_scale, run.config.data.size) == (8, 0.5, (16, 16))
    told = capsys.readouterr().out
    assert "model.activation silu" in told and "norm_groups" not in told and "data.size" not in told
    assert state_of(Path("one"), 4)["config"]["model"]["norm_groups"] == 8
    Path("mine.yaml").write_text("data: {size: 16}\nmodel: {norm_groups: 8, time_scale: 0.5}\n")
    assert main(["train", str(photos), "-c", "mine.yaml", "--init-from", "old.pth", "--out", "two", *SHORT]) == 0
    assert main(["train", "-c", "two/run.yaml", "--out", "three"]) == 0
    assert_same_run(Path("two"), Path("three"))
    assert state_of(Path("two"), 4)["config"]["model"] == state_of(Path("one"), 4)["config"]["model"]


@pytest.mark.parametrize(
    ("words", "told"),
    [("model.norm_groups=5", "--set model.norm_groups: 5 does not divide"), ("model.norm=none", "of its tensors do not fit"),
     ("model.base_channels=64", "--set model.base_channels: 64, 32 there")],
)  # fmt: skip
def test_what_it_leaves_open_must_fit(photos: Path, words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(PTH, "old.pth")
    assert main(["train", str(photos), "--init-from", "old.pth", "--size", "16", "--set", words, "--out", "new"]) != 0
    assert told in capsys.readouterr().err
    assert not Path("new").exists()


def forget_all_but_the_settings(run: Path) -> None:
    """As if the run had died before its first checkpoint."""
    for path in (*(run / "checkpoints").iterdir(), run / ".saved", run / "metrics.csv", *(run / "samples").iterdir()):
        path.unlink()


def test_weights_that_were_replaced_are_noticed_where_the_run_starts_again(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(Path("pipe"))
    saved(Path("other"), seed=1)
    assert main(["train", str(photos), "--init-from", "pipe", *SHORT, "--out", "run"]) == 0
    shutil.copytree("run", "whole")
    forget_all_but_the_settings(Path("run"))
    Path("pipe").rename("kept")
    shutil.copytree("other", "pipe")
    capsys.readouterr()
    for command in (["--resume", "run"], ["-c", "run/run.yaml", "--out", "again"]):
        assert main(["train", *command]) == Exit.CHECKPOINT
        shown = capsys.readouterr().err
        assert "pipe: other weights than those that the run began with" in shown and "bring them back" in shown
    assert not Path("again").exists()
    assert main(["train", "-c", "run/run.yaml", "--init-from", "other", "--out", "another"]) == 0
    assert main(["train", "--resume", "whole", "--steps", "6"]) == 0  # it needs them no more
    shutil.rmtree("pipe")
    assert main(["convert", "kept", "pipe/"]) == 0  # other files, the same weights
    assert main(["train", "--resume", "run", "--steps", "6"]) == 0
    assert_same_run(Path("whole"), Path("run"))


def test_weights_that_were_replaced_are_noticed_where_a_run_diverges(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(Path("pipe"))

    def bad(step: int, rollbacks: int) -> bool:
        saved(Path("pipe"), seed=1)
        return True

    spoil_gradients(monkeypatch, bad)
    command = [str(photos), "--init-from", "pipe", *SHORT, "--set", "train.bad_steps=1", "--out", "new"]
    assert main(["train", *command]) == Exit.DIVERGED
    shown = capsys.readouterr().err
    assert "training diverged" in shown and "pipe: other weights than those that the run began with" in shown


@pytest.mark.parametrize("digest", ["abc", "0" * 63 + "G", "12"])
def test_a_digest_that_is_none(photos: Path, digest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(photos), "--set", f"train.init_digest={digest}", "--dry-run"]) == Exit.CONFIG
    assert "--set train.init_digest" in capsys.readouterr().err


CONTRADICTIONS: dict[str, tuple[list[str], list[str]]] = {
    "a width": (["--set", "model.base_channels=64"], ["--set model.base_channels: 64, 32 there"]),
    "several keys": (
        ["--timesteps", "50", "--set", "model.channel_mults=[1,2,2]", "--set", "model.time_order=cos_sin"],
        ["--timesteps: 50, 1000 there", "model.channel_mults: [1, 2, 2], [1, 2] there", "model.time_order: cos_sin, sin_cos there"],
    ),
    "the schedule": (["--schedule", "cosine"], ["--schedule: cosine, linear there"]),
    "the prediction": (["--prediction", "v"], ["--prediction: v, eps there"]),
    "classes": (["--set", "data.conditional=true"], ["data.conditional: True, False there"]),
    "grey": (["--set", "data.channels=grey"], ["data.channels: 1, 3 there"]),
    "a variance": (["--set", "diffusion.learn_variance=true"], ["diffusion.learn_variance: True, False there"]),
    "a run file": (["-c", "tiny.yaml"], ["tiny.yaml:4: diffusion.timesteps: 20, 1000 there", "tiny.yaml:5: model.norm_groups: 4, 8 there"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_names_every_key(case: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(Path("pipe"))
    Path("tiny.yaml").write_text(TINY)
    flags, words = CONTRADICTIONS[case]
    assert main(["train", str(photos), "--init-from", "pipe", "--out", "new", *flags]) == Exit.CONFIG
    shown = capsys.readouterr().err
    assert all(word in shown for word in words), shown
    assert len(shown.strip().splitlines()) == 2 and not Path("new").exists()


def test_settings_that_say_the_same_otherwise_are_no_contradiction(photos: Path) -> None:
    saved(Path("pipe"))
    flags = ["--set", "model.num_res_blocks=[2,2]", "--set", "model.time_embedding=auto", "--set", "data.channels=auto", "--schedule", "linear"]
    assert main(["train", str(photos), "--init-from", "pipe", "--out", "new", *SHORT, *flags, "--dry-run"]) == 0
    assert not Path("new").exists()


def test_classes_are_counted(trained_classes: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained_classes, "run")
    assert main(["train", str(photos), "--init-from", "run", "--out", "new", *SHORT]) == 0
    assert state_of(Path("new"), 4)["class_names"] == ["cats", "dogs"]
    (photos / "mice").mkdir()
    shutil.copy(next((photos / "cats").iterdir()), photos / "mice")
    assert main(["train", str(photos), "--init-from", "run", "--out", "more", *SHORT]) == Exit.CONFIG
    assert "knows 2 classes, the images have 3" in capsys.readouterr().err
    shutil.rmtree(photos / "mice")
    (photos / "cats").rename(photos / "birds")
    assert main(["train", str(photos), "--init-from", "run", "--out", "others", *SHORT]) == 0
    assert "class cats of run is birds here" in capsys.readouterr().err


BAD: dict[str, tuple[list[str], Exit, str]] = {
    "nothing there": (["photos", "--init-from", "nowhere"], Exit.CHECKPOINT, "nowhere: no such checkpoint"),
    "images": (["photos", "--init-from", "photos"], Exit.CHECKPOINT, "without checkpoints"),
    "resume of a converted one": (["--resume", "pipe.pt"], Exit.CHECKPOINT, "--init-from pipe.pt"),
    "resume of a pipeline": (["--resume", "pipe"], Exit.CHECKPOINT, "--init-from pipe"),
    "resume of a .pth": (["--resume", "old.pth"], Exit.CHECKPOINT, "--init-from old.pth"),
    "resume of one of a run": (["--resume", "run/checkpoints/step-00000006.pt"], Exit.CHECKPOINT, "train --resume"),
    "resume of one of a run, or anew": (["--resume", "run/checkpoints/step-00000006.pt"], Exit.CHECKPOINT, "--init-from run/checkpoints/step-00000006.pt"),
    "resume of the best": (["--resume", "run/checkpoints/best.pt"], Exit.CHECKPOINT, "best.pt: the checkpoint of the lowest KID so far"),
    "resume of the best, or anew": (["--resume", "run/checkpoints/best.pt"], Exit.CHECKPOINT, "--init-from run/checkpoints/best.pt"),
    "resume of a run of a converted one": (["--resume", "copied"], Exit.CHECKPOINT, "weights only"),
    "resume with other weights": (["--resume", "run", "--init-from", "pipe", "--steps", "9"], Exit.CONFIG, "train.init_from"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, photos: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos.rename("photos")
    saved(Path("pipe"))
    shutil.copy(PTH, "old.pth")
    assert main(["convert", "pipe", "pipe.pt", "-q"]) == 0
    for name in ("run", "copied"):
        shutil.copytree(trained, name)
    for file in Path("copied/checkpoints").iterdir():
        file.unlink()
    shutil.copy("pipe.pt", "copied/checkpoints/step-00000009.pt")
    shutil.copy("run/checkpoints/step-00000006.pt", "run/checkpoints/best.pt")
    command, code, words = BAD[case]
    assert main(["train", *command]) == code
    shown = capsys.readouterr().err
    assert words in shown, shown
    assert "Traceback" not in shown and len(shown.strip().splitlines()) <= 2


def test_the_run_file_trains_the_same_again(photos: Path) -> None:
    saved(Path("pipe"))
    assert main(["train", str(photos), "--init-from", "pipe", "--out", "one", *SHORT]) == 0
    assert yaml.safe_load(Path("one/run.yaml").read_text())["train"]["init_from"] == str(Path("pipe").absolute())
    assert main(["train", "-c", "one/run.yaml", "--out", "two"]) == 0
    assert_same_run(Path("one"), Path("two"))


def test_a_converted_checkpoint_says_that_it_has_no_optimiser(tmp_path: Path, trained: Path) -> None:
    assert main(["convert", str(trained), "x.pt", "-q"]) == 0
    content = checkpoint.load(tmp_path / "x.pt")
    assert content["source"]["format"] == "ddpmctl" and not {"optimizer", "data", "powers"} & content.keys()
