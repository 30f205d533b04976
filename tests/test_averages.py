"""Snapshots of averages from the real command: any length afterwards, and nothing lost over stops, kills and faults."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpmctl import averages, checkpoint
from ddpmctl.cli import main
from ddpmctl.core.power import PowerEMA
from ddpmctl.sampling import load_model
from helpers import spoil_gradients
from runs import assert_same

SNAPSHOTS = ["--set", "train.ema_snapshot_every=2", "--set", "train.keep=20", "--set", "train.save_every=1"]


@pytest.fixture
def run(photos: Path, tiny: Path) -> Path:
    assert main(["train", str(photos), "--config", str(tiny), "--steps", "12", "--out", "r", *SNAPSHOTS, "-q"]) == 0
    return Path("r")


def names(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "averages").iterdir())


def load(run: Path, step: int) -> dict:
    return checkpoint.load(run / "checkpoints" / f"step-{step:08d}.pt")


def test_a_length_built_afterwards_is_the_average_of_all_steps(run):
    """Every step has a checkpoint here: the average is taken over their weights, by its definition."""
    nets = [load_model(run / "checkpoints" / f"step-{step:08d}.pt", "cpu", weights="raw").denoiser.net for step in range(1, 13)]
    start = load(run, 1)["net"]
    for length, tolerance in ((0.05, 1e-6), (0.08, 0.05), (0.1, 1e-6), (0.2, 0.05)):
        model = load_model(run, "cpu", ema_length=length)
        average = PowerEMA(load_model(run, "cpu").denoiser.net, length)
        for net in nets:
            average.update(net)
        assert model.ema_error < 0.15
        for (name, built), exact in zip(model.denoiser.net.named_parameters(), average.net.parameters(), strict=True):
            moved = (exact - start[name]).norm().item()
            assert (built - exact).norm().item() <= tolerance * max(moved, 1e-3), (length, name)


def test_statistics_of_batch_norm_are_those_of_the_step_and_not_combined(photos: Path, tiny: Path) -> None:
    """Combined with factors of either sign, variances could be negative, and images black."""
    batch_norm = ["--set", "model.norm=batch", "--steps", "8", "--out", "r", *SNAPSHOTS, "-q"]
    assert main(["train", str(photos), "--config", str(tiny), *batch_norm]) == 0
    last = dict(load_model(Path("r"), "cpu", weights="raw").denoiser.net.named_buffers())
    for length in (0.03, 0.05, 0.2):
        found = dict(load_model(Path("r"), "cpu", ema_length=length).denoiser.net.named_buffers())
        assert any("running_var" in name for name in found)
        assert_same(found, last)


def test_inspect_names_the_lengths_and_sample_takes_them(run, capsys):
    assert main(["inspect", str(run), "--json"]) == 0
    lengths = json.loads(capsys.readouterr().out)["ema"]["--ema-length"]
    assert 0.05 in lengths and 0.1 in lengths and 0.01 not in lengths
    assert names(run) == [f"step-{step:08d}.pt" for step in range(2, 13, 2)]
    assert main(["sample", str(run), "-n", "2", "--steps", "3", "--ema-length", "0.1", "-o", "a.png"]) == 0
    assert "averaged over 0.1 of the run" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", "a.png", "--json"]) == 0
    command = json.loads(capsys.readouterr().out)["command"]
    assert "--ema-length 0.1" in command


def test_a_length_that_the_snapshots_hardly_give_is_warned_of(run, capsys):
    assert main(["sample", str(run), "-n", "1", "--steps", "2", "--ema-length", "0.01", "-o", "a.png"]) == 0
    assert "only roughly" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--ema-length", "0.5"], "--ema-length 0.5: must be"), (["--ema-length", "nan"], "--ema-length nan: must be"),
     (["--ema-length", "0"], "--ema-length 0: must be"), (["--ema-length", "0.1", "--weights", "raw"], "raw weights are not averaged")],
)  # fmt: skip
def test_lengths_that_cannot_be(trained, capsys, flags, said):
    for command in (["sample", str(trained), "-o", "a.png"], ["evaluate", str(trained), "my photos"]):
        assert main([*command, *flags]) != 0
        assert said in " ".join(capsys.readouterr().err.split())


def test_a_run_without_snapshots_says_how_to_have_them(trained, capsys):
    assert main(["sample", str(trained), "--ema-length", "0.1", "-o", "a.png"]) != 0
    error = " ".join(capsys.readouterr().err.split())
    assert "without snapshots" in error and "train.ema_snapshot_every" in error
    assert main(["inspect", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ema"]["--ema-length"] == "no snapshots"


def test_resume_goes_on_with_the_same_averages(run, photos, tiny):
    started = ["train", str(photos), "--config", str(tiny), "--out", "s", *SNAPSHOTS, "-q"]
    assert main([*started, "--steps", "5"]) == 0
    assert main(["train", "--resume", "s", "--steps", "12", "-q"]) == 0
    whole, resumed = load(run, 12), load(Path("s"), 12)
    for one, other in zip(whole["powers"], resumed["powers"], strict=True):
        assert all(torch.equal(one["net"][name], other["net"][name]) for name in one["net"])
    digests = [
        [checkpoint.load(file, averages._SNAPSHOT)["digest"] for file in sorted((r / "averages").iterdir())]
        for r in (run, Path("s"))
    ]
    assert digests[0] == digests[1]


def test_snapshots_cannot_start_half_way(photos, tiny, capsys):
    assert main(["train", str(photos), "--config", str(tiny), "--steps", "4", "--out", "s", "-q"]) == 0
    assert main(["train", "--resume", "s", "--steps", "8", "--set", "train.ema_snapshot_every=2"]) != 0
    error = " ".join(capsys.readouterr().err.split())
    assert "train.ema_snapshot_every: 0 when the run started, now 2" in error and "add --force" in error
    assert main(["train", "--resume", "s", "--steps", "8", "--set", "train.ema_snapshot_every=2", "--force", "-q"]) == 0
    assert names(Path("s")) == ["step-00000004.pt", "step-00000006.pt", "step-00000008.pt"]
    first = checkpoint.load(Path("s/averages/step-00000004.pt"), averages._SNAPSHOT)["powers"]
    for power in first:  # as if the weights had been these all along
        assert all(torch.equal(power["net"][name], value) for name, value in load(Path("s"), 4)["net"].items())


def test_snapshots_may_be_rarer_or_end_half_way(run, photos, tiny, capsys):
    """Training and the averages themselves do not depend on when one looks at them."""
    started = ["train", str(photos), "--config", str(tiny), *SNAPSHOTS, "--steps", "5", "-q"]
    for out, every in (("rarer", "3"), ("none", "0")):
        assert main([*started, "--out", out]) == 0
        assert main(["train", "--resume", out, "--steps", "12", "--set", f"train.ema_snapshot_every={every}"]) == 0
        assert f"changed: train.ema_snapshot_every: 2 -> {every}" in capsys.readouterr().out
        for part in ("net", "ema", "optimizer"):
            assert_same(load(run, 12)[part], load(Path(out), 12)[part], part)
    for one, other in zip(load(run, 12)["powers"], load(Path("rarer"), 12)["powers"], strict=True):
        assert_same(one, other, "powers")
    assert names(Path("rarer")) == [f"step-{step:08d}.pt" for step in (2, 4, 6, 9, 12)]
    assert names(Path("none")) == ["step-00000002.pt", "step-00000004.pt"]
    assert "powers" not in load(Path("none"), 12)
    capsys.readouterr()
    assert main(["train", "--resume", "none", "--steps", "14", "--set", "train.ema_snapshot_every=2"]) != 0
    assert "0 when the run started, now 2" in " ".join(capsys.readouterr().err.split())


def test_snapshots_past_the_step_gone_back_to_are_taken_again(photos, tiny, monkeypatch):
    """Where the run diverged: those of the lost stretch do not stay."""
    spoil_gradients(monkeypatch, lambda step, rollbacks: step > 6 and not rollbacks)
    settings = ["--set", "train.ema_snapshot_every=2", "--set", "train.save_every=5", "--set", "train.bad_steps=2"]
    assert main(["train", str(photos), "--config", str(tiny), "--steps", "12", "--out", "r", *settings, "-q"]) == 0
    assert names(Path("r")) == [f"step-{step:08d}.pt" for step in range(2, 13, 2)]
    with (Path("r") / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)][-1] == 12
    assert load_model(Path("r"), "cpu", ema_length=0.08).ema_error < 0.3


def test_steps_that_changed_nothing_count_as_time(photos, tiny, monkeypatch):
    spoil_gradients(monkeypatch, lambda step, rollbacks: step in (3, 4))
    assert main(["train", str(photos), "--config", str(tiny), "--steps", "8", "--out", "r", *SNAPSHOTS, "-q"]) == 0
    average = PowerEMA(load_model(Path("r"), "cpu").denoiser.net, 0.1)
    for step in (1, 2, 2, 2, 5, 6, 7, 8):
        average.update(load_model(Path("r") / "checkpoints" / f"step-{step:08d}.pt", "cpu", weights="raw").denoiser.net)
    built = load_model(Path("r"), "cpu", ema_length=0.1).denoiser.net
    for mine, exact in zip(built.parameters(), average.net.parameters(), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-6)


def test_the_others_do_without_a_damaged_snapshot(run, capsys):
    file = run / "averages" / "step-00000004.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    command = ["sample", str(run), "-n", "2", "--steps", "2", "--ema-length", "0.08", "--overwrite", "-o"]
    assert main([*command, "a.png"]) == 0
    warned = " ".join(capsys.readouterr().err.split())
    assert "warning:" in warned and "step-00000004.pt: damaged" in warned and "going on without it" in warned
    file.unlink()
    assert main([*command, "b.png"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()
    for other in (run / "averages").iterdir():
        other.write_bytes(b"")
    assert main([*command, "c.png"]) == 0  # the checkpoint holds averages itself
    warned = " ".join(capsys.readouterr().err.split())
    assert warned.count("going on without it") == 4


def test_inspect_counts_only_the_snapshots_that_are_there_to_their_end(run, capsys):
    def told() -> list[float]:
        capsys.readouterr()
        assert main(["inspect", str(run), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["ema"]["--ema-length"]

    whole, files = told(), sorted((run / "averages").iterdir())
    cut, empty, other, text, *_ = files
    cut.write_bytes(cut.read_bytes()[:-100])
    empty.write_bytes(b"")
    other.write_bytes((run / "checkpoints" / "step-00000012.pt").read_bytes())
    text.write_text("hello")
    damaged = told()
    for file in (cut, empty, other, text):
        file.unlink()
    assert damaged == told() and set(damaged) < set(whole)


def test_snapshots_of_another_network_are_refused(run, photos, tiny, capsys):
    other = ["--set", "model.base_channels=16", "--out", "other", "--steps", "2"]
    assert main(["train", str(photos), "--config", str(tiny), *SNAPSHOTS, *other, "-q"]) == 0
    (Path("other") / "averages" / "step-00000002.pt").replace(run / "averages" / "step-00000002.pt")
    assert main(["sample", str(run), "-n", "1", "--steps", "2", "--ema-length", "0.08", "-o", "a.png"]) != 0
    assert "of another network" in " ".join(capsys.readouterr().err.split())


def test_a_snapshot_is_no_checkpoint_and_the_reverse(run, capsys):
    assert main(["sample", str(run / "averages" / "step-00000004.pt"), "-o", "a.png"]) != 0
    assert "not a ddpmctl checkpoint" in " ".join(capsys.readouterr().err.split())


def test_overwrite_leaves_no_snapshots_behind(run, photos, tiny):
    assert main(["train", str(photos), "--config", str(tiny), "--steps", "2", "--out", "r", "--overwrite", "-q"]) == 0
    assert not (run / "averages").exists() or not names(run)
