"""Which settings a resumed run has, and what it says about them."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import yaml

from ddpmctl import checkpoint
from ddpmctl.cli import main
from ddpmctl.errors import Exit
from helpers import write_images
from runs import assert_same_run, rows, state_of, steps_saved


@pytest.fixture
def run(photos: Path, tiny: Path) -> Path:
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", "-q"]) == 0
    return Path("r")


def edit(run: Path, section: str, key: str, value: object) -> None:
    settings = yaml.safe_load((run / "run.yaml").read_text())
    settings[section][key] = value
    (run / "run.yaml").write_text(yaml.safe_dump(settings))


def test_rows_that_another_version_left_unwritten_come_without_its_own_columns(run):
    file = run / "checkpoints" / "step-00000006.pt"
    content = checkpoint.load(file)
    del content["digest"]
    checkpoint.save(file, {**content, "unwritten": [{"step": 5, "loss": "0.5", "colour": "red"}]})
    assert main(["train", "--resume", str(run), "--steps", "8", "-q"]) == 0
    assert [row["loss"] for row in rows(run) if row["step"] == "5"] == ["0.5"]


def test_settings_edited_in_run_yaml_hold_on_resume(run, capsys):
    edit(run, "train", "steps", 8)
    edit(run, "train", "lr", 5e-4)
    capsys.readouterr()
    assert main(["train", "--resume", "r"]) == 0
    printed = capsys.readouterr().out
    assert "changed: train.steps: 6 -> 8" in printed and "changed: train.lr: 0.001 -> 0.0005" in printed
    assert rows(run)[-1]["step"] == "8" and float(rows(run)[-1]["lr"]) == 5e-4


def test_an_edit_of_run_yaml_that_changes_the_learning_is_refused(run, capsys):
    edit(run, "diffusion", "schedule", "cosine")
    assert main(["train", "--resume", "r", "--steps", "8"]) == Exit.CONFIG
    shown = capsys.readouterr().err
    assert "diffusion.schedule: linear when the run started, now cosine" in shown and "--force" in shown


def test_a_run_yaml_with_a_mistake_names_file_and_line(run, capsys):
    edit(run, "train", "stepz", 8)
    assert main(["train", "--resume", "r"]) == Exit.CONFIG
    assert "r/run.yaml:" in capsys.readouterr().err


def test_more_steps_that_were_asked_for_survive_a_kill_before_the_next_save(run, capsys):
    """What was typed last is in run.yaml before training begins, so the bare command goes on with it."""
    edit(run, "train", "steps", 9)
    assert main(["train", "--resume", "r"]) == 0
    assert steps_saved(run)[-1] == 9
    for step in steps_saved(run):
        if step > 6:
            (run / "checkpoints" / f"step-{step:08d}.pt").unlink()
    assert main(["train", "--resume", "r", "-q"]) == 0
    assert steps_saved(run)[-1] == 9


@pytest.mark.parametrize(("flags", "key"), [
    (["--set", "data.workers=3"], "data.workers"),
    (["--set", "train.sample_every=2"], "train.sample_every"),
    (["--set", "train.val_every=3"], "train.val_every"),
    (["--set", "train.keep=7"], "train.keep"),
    (["--set", "data.cache=false"], "data.cache"),
    (["--device", "auto"], "device"),
    (["--set", "train.grad_accum=2"], "train.grad_accum"),
])  # fmt: skip
def test_harmless_settings_may_change(run, capsys, flags, key):
    edit_first = main(["train", "--resume", "r", "--steps", "7", *flags])
    assert edit_first == 0
    if key != "device":  # auto is what it was
        assert f"changed: {key}:" in capsys.readouterr().out
    assert state_of(run, 7)["step"] == 7


def test_images_that_have_moved_are_found_by_name(run, photos, capsys, tmp_path):
    photos.rename(tmp_path / "elsewhere")
    assert main(["train", "--resume", "r", "--steps", "8"]) == Exit.DATA
    assert "ddpmctl train NEW-PLACE --resume --out r" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "elsewhere"), "--resume", "--out", "r", "--steps", "8"]) == 0
    assert "changed: data.path" in capsys.readouterr().out


def test_a_run_beside_its_images_does_not_become_part_of_them(tmp_path, tiny, monkeypatch):
    """``cd photos; ddpmctl train .`` puts the run, with its sample grids, into the folder of images."""
    photos = write_images(tmp_path / "here")
    shutil.copy(tiny, photos / "tiny.yaml")
    monkeypatch.chdir(photos)
    assert main(["train", ".", "-c", "tiny.yaml", "-q"]) == 0
    assert (photos / "runs" / "here" / "samples").is_dir()
    assert main(["train", ".", "-c", "tiny.yaml", "-q", "--resume", "--steps", "8"]) == 0
    assert state_of(photos / "runs" / "here", 8)["data"]["images"] == 12


def test_a_run_of_an_older_release_without_the_new_keys_resumes(run):
    settings = yaml.safe_load((run / "run.yaml").read_text())
    for section, key in (("data", "holdout"), ("data", "cache"), ("train", "val_every"), ("train", "bad_steps")):
        del settings[section][key]
    (run / "run.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--resume", "r", "--steps", "8", "-q"]) == 0


def test_a_stop_then_a_kill_does_not_write_a_row_twice(photos, tiny):
    """The stop comes before the row of its step is written; what goes on from there is killed before it saves."""
    from ddpmctl.stopping import StopFlag

    command = ["train", str(photos), "-c", str(tiny), "-q", "--set", "train.log_every=1", "--set", "train.save_every=100"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopFlag, "reason", lambda self: "SIGTERM")
        assert main([*command, "--out", "s", "--steps", "9"]) == 75
    assert steps_saved(Path("s")) == [1] and rows(Path("s")) == []
    kept = (Path("s") / "checkpoints" / "step-00000001.pt").read_bytes()
    assert main(["train", "--resume", "s", "-q"]) == 0
    (Path("s") / "checkpoints" / "step-00000009.pt").unlink()
    (Path("s") / "checkpoints" / "step-00000001.pt").write_bytes(kept)
    assert main(["train", "--resume", "s", "-q"]) == 0
    assert [row["step"] for row in rows(Path("s"))] == [str(step) for step in range(1, 10)]


def test_repeated_stops_keep_no_more_checkpoints_than_asked_for(photos, tiny):
    from ddpmctl.stopping import StopFlag

    command = ["train", str(photos), "-c", str(tiny), "-q", "--set", "train.keep=2", "--set", "train.save_every=100"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopFlag, "reason", lambda self: "SIGTERM")
        assert main([*command, "--out", "s", "--steps", "9"]) == 75
        for _ in range(3):
            assert main(["train", "--resume", "s", "-q"]) == 75
    assert len(steps_saved(Path("s"))) <= 2


def test_a_checkpoint_that_somebody_put_aside_is_neither_read_nor_deleted(run):
    aside = run / "checkpoints" / "step-00000004-best.pt"
    shutil.copy(run / "checkpoints" / "step-00000004.pt", aside)
    assert main(["train", "--resume", "r", "--steps", "9", "-q", "--set", "train.keep=1", "--set", "train.save_every=1"]) == 0
    assert aside.exists()


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00garbage\n", b'"' + b"x" * 200_000 + b'"\n', "²,1,2\n".encode()])
def test_metrics_that_are_damaged_do_not_keep_a_run_from_going_on(run, damage):
    with (run / "metrics.csv").open("ab") as file:
        file.write(damage)
    assert main(["train", "--resume", "r", "--steps", "8", "-q"]) == 0
    assert rows(run)[-1]["step"] == "8"


def test_a_run_is_taken_up_from_another_folder(run, tmp_path, monkeypatch):
    """The images were named by a path that means nothing there."""
    settings = yaml.safe_load((run / "run.yaml").read_text())
    assert Path(settings["data"]["path"]).is_absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--resume", "../r", "--steps", "7", "-q"]) == 0
    assert steps_saved(tmp_path / "r")[-1] == 7


@pytest.mark.parametrize("what", ["validating", "sampling"])
def test_a_stop_between_two_steps_changes_nothing(photos, tiny, monkeypatch, what):
    """In the middle of the held-out loss, or of a sample grid: the row and the grid come when the run goes on."""
    from ddpmctl.cli.run_report import Shown
    from ddpmctl.events import Busy

    plain = Shown.event

    def stopping(self, bar, event):
        plain(self, bar, event)
        if isinstance(event, Busy) and event.what == what and self.run.state.step == 4:
            signal.raise_signal(signal.SIGTERM)

    command = ["train", str(photos), "-c", str(tiny), "-q", "--set", "data.holdout=0.2", "--set", "train.val_every=4"]
    assert main([*command, "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Shown, "event", stopping)
        assert main([*command, "--out", "r"]) == Exit.STOPPED
    assert steps_saved(Path("r")) == [4] and not Path("r/samples/step-00000004.png").exists()
    assert main(["train", "--resume", "r", "-q"]) == 0
    assert_same_run(Path("whole"), Path("r"))


def test_metrics_of_another_release_keep_what_both_know(run):
    text = (run / "metrics.csv").read_text().splitlines()
    (run / "metrics.csv").write_text("\n".join([text[0] + ",colour", *(line + ",red" for line in text[1:])]) + "\n")
    assert main(["train", "--resume", "r", "--steps", "8", "-q"]) == 0
    assert [row["step"] for row in rows(run)] == ["2", "4", "6", "8"]


def test_a_stop_at_the_very_end_keeps_the_last_row_when_more_steps_follow(photos, tiny):
    from ddpmctl.cli.run_report import Shown
    from ddpmctl.training import TrainStep

    plain = Shown.event

    def stopping(self, bar, event):
        plain(self, bar, event)
        if isinstance(event, TrainStep) and event.step == 7:
            signal.raise_signal(signal.SIGTERM)

    command = ["train", str(photos), "-c", str(tiny), "-q", "--steps", "7"]
    assert main([*command, "--out", "whole"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shown, "event", stopping)
        assert main([*command, "--out", "r"]) == Exit.STOPPED
    assert main(["train", "--resume", "r", "-q"]) == 0
    assert_same_run(Path("whole"), Path("r"))
    for name in ("whole", "r"):
        assert main(["train", "--resume", name, "-q", "--steps", "10"]) == 0
    assert_same_run(Path("whole"), Path("r"))


def test_moments_in_another_layout_are_those_of_the_same_weights(photos):
    """Those of a run on another kind of device are contiguous, where weights here have channels last."""
    import torch

    from ddpmctl.config import DataConfig, RunConfig
    from ddpmctl.data.dataset import load_images
    from ddpmctl.learner import new_learner
    from ddpmctl.training import train_steps

    config = RunConfig.model_validate({
        "device": "cpu", "precision": "fp32", "train": {"batch_size": 2, "steps": 4},
        "model": {"base_channels": 8, "channel_mults": [1, 2], "num_res_blocks": 1, "norm_groups": 4},
    })  # fmt: skip
    dataset = load_images(DataConfig(size=(16, 16)), photos)

    def trained(halfway):
        learner = new_learner(config, dataset, torch.device("cpu"))
        for done in train_steps(learner.state, learner.denoiser, learner.batches, config):
            if done.step == 2:
                halfway(learner.state)
        return learner.state.net.state_dict()

    def in_another_layout(state):
        saved = state.state_dict()
        moments = {i: {name: value.clone(memory_format=torch.contiguous_format) for name, value in kinds.items()}
                   for i, kinds in saved["optimizer"]["state"].items()}  # fmt: skip
        state.load_state_dict({**saved, "optimizer": {**saved["optimizer"], "state": moments}})

    plain = trained(lambda state: None)
    for name, value in trained(in_another_layout).items():
        assert torch.equal(value, plain[name]), name
