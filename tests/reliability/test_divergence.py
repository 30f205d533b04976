"""Numbers that stop being numbers: nothing of them stays, the run goes back, and in the end it says why it gave up."""

from __future__ import annotations

import math
import re
import signal
from pathlib import Path

import pytest
import torch

from ddpmctl import checkpoint, training
from ddpmctl.cli import main
from ddpmctl.errors import Exit
from helpers import spoil_gradients
from runs import assert_same, assert_same_run, rows, state_of, steps_saved, timeless

BASE = ["--set", "train.bad_steps=3", "--set", "train.save_every=4", "--set", "train.log_every=1", "-q"]


def train(photos: Path, tiny: Path, out: str, *flags: str) -> int:
    return main(["train", str(photos), "-c", str(tiny), "--out", out, *BASE, *flags])


def assert_finite(run: Path) -> None:
    for step in steps_saved(run):
        content = state_of(run, step)
        for part in (content["net"], content["ema"]["net"], *content["optimizer"]["state"].values()):
            assert all(torch.isfinite(tensor).all() for tensor in part.values() if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_step_leaves_no_trace(photos, tiny, monkeypatch, norm, value):
    spoil_gradients(monkeypatch, lambda step, rollbacks: step == 3, value)
    flags = ["--set", f"model.norm={norm}", "--set", "train.save_every=1", "--set", "train.keep=9"]
    assert train(photos, tiny, "r", *flags, "--steps", "3") == 0
    before, after = state_of(Path("r"), 2), state_of(Path("r"), 3)
    for part in ("net", "optimizer"):
        assert_same(before[part], after[part], part)
    # The average takes in the weights as they stood, with its usual share for step 3.
    for name, weights in before["net"].items():
        expected = torch.lerp(before["ema"]["net"][name], weights, 1 - 4 / 13) if weights.is_floating_point() else weights
        if "running" in name:
            expected = weights
        assert_same(expected, after["ema"]["net"][name], name)
    assert [row["skipped"] for row in rows(Path("r"))] == ["0", "0", "1"]
    assert_finite(Path("r"))


def test_images_that_are_no_numbers_do_not_reach_batch_norm(photos, tiny, monkeypatch):
    """Here the forward pass itself is spoilt, and with it the statistics that batch norm gathers."""
    plain = training.denoising_loss

    def spoilt(denoiser, x0, t, eps, label=None, **options):
        bad = spoilt.step == 3
        return plain(denoiser, x0 * (math.nan if bad else 1), t, eps, label, **options)

    draw = training.add_gradients

    def counted(state, *args):
        spoilt.step = state.step + 1
        return draw(state, *args)

    monkeypatch.setattr(training, "denoising_loss", spoilt)
    monkeypatch.setattr(training, "add_gradients", counted)
    spoilt.step = 0
    flags = ["--set", "model.norm=batch", "--set", "train.save_every=1", "--set", "train.keep=9"]
    assert train(photos, tiny, "r", *flags, "--steps", "3") == 0
    before, after = state_of(Path("r"), 2), state_of(Path("r"), 3)
    assert any("running_mean" in name for name in before["net"])
    assert_same(before["net"], after["net"])
    assert_finite(Path("r"))


def test_the_run_goes_back_and_goes_on_with_half_the_lr_and_other_draws(photos, tiny, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        spoil_gradients(patch, lambda step, rollbacks: step > 5 and rollbacks == 0)
        assert train(photos, tiny, "r", "--steps", "10") == 0
    assert [row["step"] for row in rows(Path("r"))] == [str(step) for step in range(1, 11)]
    assert [float(row["lr"]) for row in rows(Path("r"))] == [1e-3] * 4 + [5e-4] * 6
    assert state_of(Path("r"), 10)["rollbacks"] == 1
    assert_finite(Path("r"))
    # The oracle: an undisturbed run to step 4, said to have gone back once, and gone on.
    assert train(photos, tiny, "o", "--steps", "10") == 0
    for step in steps_saved(Path("o"))[1:]:
        (Path("o") / "checkpoints" / f"step-{step:08d}.pt").unlink()
    [path] = Path("o/checkpoints").iterdir()
    content = {key: value for key, value in checkpoint.load(path).items() if key != "digest"}
    without_rollback = content["net"]
    checkpoint.save(path, {**content, "rollbacks": 1})
    assert train(photos, tiny, "o", "--steps", "10", "--resume") == 0
    assert_same_run(Path("r"), Path("o"))
    # And the draws were others: the same lr without them gives other weights.
    checkpoint.save(path, {**content, "rollbacks": 0})
    for step in steps_saved(Path("o"))[1:]:
        (Path("o") / "checkpoints" / f"step-{step:08d}.pt").unlink()
    assert train(photos, tiny, "o", "--steps", "10", "--resume", "--lr", "5e-4") == 0
    ours, other = state_of(Path("r"), 10)["net"], state_of(Path("o"), 10)["net"]
    assert not torch.equal(ours["conv_out.weight"], other["conv_out.weight"])
    assert not torch.equal(ours["conv_out.weight"], without_rollback["conv_out.weight"])


def test_going_back_is_told(photos, tiny, monkeypatch, capsys):
    spoil_gradients(monkeypatch, lambda step, rollbacks: step > 5 and rollbacks < 2)
    command = ["train", str(photos), "-c", str(tiny), "--out", "r", *BASE[:-1], "--steps", "9"]
    assert main(command) == 0
    shown = capsys.readouterr().err
    assert "step 8: gradients or loss were not finite 3 steps in a row; the losses before:" in shown
    assert "back to step 4 with half the lr, 1 of 3 times" in shown and "2 of 3 times" in shown


def test_before_the_first_checkpoint_it_goes_back_to_the_start(photos, tiny, monkeypatch):
    with monkeypatch.context() as patch:
        spoil_gradients(patch, lambda step, rollbacks: rollbacks == 0)
        assert train(photos, tiny, "r", "--steps", "3") == 0
    final = state_of(Path("r"), 3)
    assert final["rollbacks"] == 1 and final["ema"]["steps"] == 3
    assert [row["step"] for row in rows(Path("r"))] == ["1", "2", "3"]
    # The weights began as those of any run with this seed do.
    assert train(photos, tiny, "o", "--steps", "3", "--lr", "1e-30") == 0
    assert torch.allclose(state_of(Path("o"), 3)["net"]["conv_in.weight"], final["net"]["conv_in.weight"], atol=0.01)


def test_a_run_that_cannot_be_helped_stops_with_the_diagnosis(photos, tiny, monkeypatch, capsys):
    attempts = []

    def bad(step: int, rollbacks: int) -> bool:
        attempts.append((step, rollbacks))
        return step > 5

    with monkeypatch.context() as patch:
        spoil_gradients(patch, bad)
        assert train(photos, tiny, "r", "--steps", "100") == Exit.DIVERGED
    assert sorted(set(attempts)) == sorted([(s, 0) for s in range(1, 9)] + [(s, r) for r in (1, 2, 3) for s in range(5, 9)])
    shown = capsys.readouterr().err
    problem, _ = shown.strip().splitlines()
    for words in ("after 3 rollbacks", "step 8:", "the losses before:", "largest gradient norm", ".weight at step 5"):
        assert words in problem, words
    for words in ("--lr", "ddpmctl train --resume r", "; lr 0.00013"):
        assert words in shown, words
    assert steps_saved(Path("r")) == [4]
    assert_finite(Path("r"))
    assert main(["train", "--resume", "r", "--lr", "1e-4", "--steps", "6", "-q"]) == 0


def test_weights_that_overflow_take_the_run_back_at_once(photos, tiny, capsys):
    """A learning rate that throws the weights out of float32 in one step."""
    flags = ["--lr", "1e39", "--set", "train.grad_clip=0", "--set", "train.max_rollbacks=1", "--steps", "9"]
    assert train(photos, tiny, "r", *flags) == Exit.DIVERGED
    shown = capsys.readouterr().err
    assert "the weights overflowed" in shown and "--set train.grad_clip=1" not in shown.partition("try")[0]
    assert steps_saved(Path("r")) == []


def test_an_optimiser_that_overflows_is_not_saved(photos, tiny, monkeypatch, capsys):
    """Weights and gradients are finite, Adam's moments are not: the look at what is about to be saved finds them."""
    from ddpmctl.core.optim import OPTIMIZERS

    class Broken(torch.optim.Adam):
        spoilt = False

        def step(self, *args: object, **kwargs: object) -> None:
            super().step(*args, **kwargs)
            first = next(iter(self.state.values()))
            if first["step"] == 6 and not Broken.spoilt:
                Broken.spoilt = True
                first["exp_avg_sq"].fill_(math.inf)

    monkeypatch.setitem(OPTIMIZERS, "adam", Broken)
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", *BASE[:-1], "--steps", "9"]) == 0
    assert "step 8: not finite: optimiser: exp_avg_sq of parameter 0: back to step 4" in capsys.readouterr().err
    assert state_of(Path("r"), 8)["rollbacks"] == 1
    assert_finite(Path("r"))


def test_a_run_killed_after_it_went_back_repeats_itself(photos, tiny, monkeypatch):
    """It forgets that it went back, diverges again, goes back again: and is the same run."""
    spoil_gradients(monkeypatch, lambda step, rollbacks: step > 5 and rollbacks == 0)
    assert train(photos, tiny, "r", "--steps", "10") == 0
    assert train(photos, tiny, "k", "--steps", "10") == 0
    for step in steps_saved(Path("k"))[1:]:
        (Path("k") / "checkpoints" / f"step-{step:08d}.pt").unlink()
    assert train(photos, tiny, "k", "--steps", "10", "--resume") == 0
    assert_same_run(Path("r"), Path("k"))


def test_fp16_has_more_patience(photos, tiny, monkeypatch):
    spoil_gradients(monkeypatch, lambda step, rollbacks: 3 <= step < 3 + 10)
    assert train(photos, tiny, "r", "--steps", "16", "--precision", "fp16") == 0
    final = state_of(Path("r"), 16)
    assert final["rollbacks"] == 0
    assert sum(int(row["skipped"]) for row in rows(Path("r"))) >= 10
    assert_finite(Path("r"))


def test_clipping_is_that_of_torch(photos, tiny, monkeypatch):
    """Gradients and norm equal ``torch.nn.utils.clip_grad_norm_``, for a norm above the limit and one below."""
    from ddpmctl.core.optim import OPTIMIZERS

    seen: list[list[torch.Tensor]] = []

    class Spy(torch.optim.Adam):
        def step(self, *args: object, **kwargs: object) -> None:
            super().step(*args, **kwargs)
            seen.append([p.grad.clone() for g in self.param_groups for p in g["params"] if p.grad is not None])

    raw: list[list[torch.Tensor]] = []
    plain = training.add_gradients

    def remembered(state, *args):
        loss = plain(state, *args)
        raw.append([p.grad.clone() for p in state.net.parameters() if p.grad is not None])
        return loss

    monkeypatch.setitem(OPTIMIZERS, "adam", Spy)
    monkeypatch.setattr(training, "add_gradients", remembered)
    for limit in (0.01, 1000.0):
        seen.clear()
        raw.clear()
        assert train(photos, tiny, f"r{limit}", "--steps", "2", "--set", f"train.grad_clip={limit}") == 0
        for clipped, grads in zip(seen, raw, strict=True):
            parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            torch.nn.utils.clip_grad_norm_(parameters, limit)
            for parameter, ours in zip(parameters, clipped, strict=True):
                assert torch.allclose(parameter.grad, ours, rtol=1e-6, atol=0)


def test_a_long_bad_streak_in_fp16_does_not_scale_the_gradients_away(photos, tiny, monkeypatch):
    """60 halvings of the loss scale would leave gradients of zero, and a loss that stands still without a word."""
    spoil_gradients(monkeypatch, lambda step, rollbacks: 3 <= step < 63)
    flags = ["--precision", "fp16", "--set", "train.bad_steps=50", "--set", "train.save_every=64", "--steps", "66"]
    assert train(photos, tiny, "r", *flags) == 0
    last = [row for row in rows(Path("r")) if int(row["step"]) > 63]
    assert all(float(row["grad_norm"]) > 0 for row in last)
    assert state_of(Path("r"), 66)["scaler"]["scale"] >= 1


def test_within_a_bad_streak_nothing_is_saved_until_it_is_over(photos, tiny, monkeypatch):
    spoil_gradients(monkeypatch, lambda step, rollbacks: step in (4, 5))
    assert train(photos, tiny, "r", "--steps", "9", "--set", "train.keep=9") == 0
    assert steps_saved(Path("r")) == [6, 8, 9]


@pytest.mark.parametrize("stopped_at", [5, 6, 7])
def test_a_rollback_goes_to_the_same_place_whatever_stops_have_saved(photos, tiny, monkeypatch, stopped_at):
    """Stopped before the divergence (5), or within its bad streak: what was saved then is not what is gone back to."""
    spoil_gradients(monkeypatch, lambda step, rollbacks: step > 5 and rollbacks == 0)
    keep = ["--set", "train.keep=1", "--set", "train.sample_every=0"]
    assert train(photos, tiny, "whole", "--steps", "10", *keep) == 0
    assert train(photos, tiny, "r", "--steps", str(stopped_at), *keep) == 0
    assert steps_saved(Path("r")) == [4, stopped_at], "the one that was due is kept beside the newest"
    (Path("r") / "samples" / f"step-{stopped_at:08d}.png").unlink()
    assert train(photos, tiny, "r", "--steps", "10", "--resume", *keep) == 0
    assert (Path("r/checkpoints") / f"step-{stopped_at:08d}.pt.aside").exists()
    assert_same_run(Path("whole"), Path("r"))


def test_a_rollback_passes_over_a_damaged_checkpoint_and_says_so(photos, tiny, monkeypatch, capsys):
    spoil_gradients(monkeypatch, lambda step, rollbacks: step == 10 and rollbacks == 0)
    plain = training.add_gradients

    def damaging(state, *args):
        if state.step + 1 == 10:
            newest = Path("r/checkpoints/step-00000008.pt")
            newest.write_bytes(newest.read_bytes()[:5000])
        return plain(state, *args)

    monkeypatch.setattr(training, "add_gradients", damaging)
    flags = ["--set", "train.bad_steps=1", "--steps", "12"]
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", *BASE[2:-1], *flags]) == 0
    shown = capsys.readouterr().err
    assert "step-00000008.pt: damaged" in shown and "back to step 4 with half the lr" in shown
    assert Path("r/checkpoints/step-00000008.pt.aside").stat().st_size == 5000
    assert [row["step"] for row in rows(Path("r"))] == [str(step) for step in range(1, 13)]


def test_a_rollback_on_a_full_disk_waits_with_what_it_has_to_write(photos, tiny, monkeypatch, capsys):
    """For three tries nothing of metrics.csv can be rewritten; nothing else is written before, and every row comes once."""
    from ddpmctl.errors import OutputError
    from ddpmctl.table import Table

    spoil_gradients(monkeypatch, lambda step, rollbacks: step > 5 and rollbacks == 0)
    plain, tries = Table.cut, []

    def cut(self):
        if self.void_after == 4:
            tries.append(self.void_after)
            if len(tries) <= 3:
                raise OutputError(f"{self.path}: cannot be written: No space left on device", "")
        plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(Table, "cut", cut)
        assert main(["train", str(photos), "-c", str(tiny), "--out", "r", *BASE[:-1], "--steps", "10"]) == 0
    assert len(tries) == 4
    assert "metrics.csv: cannot be written: No space left on device: going on" in capsys.readouterr().err
    assert train(photos, tiny, "o", "--steps", "10") == 0
    assert_same_run(Path("r"), Path("o"))


def test_a_learning_rate_given_by_hand_is_the_one_that_is_used(photos, tiny, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        spoil_gradients(patch, lambda step, rollbacks: step > 3 and rollbacks == 0)
        assert train(photos, tiny, "r", "--steps", "6") == 0
    command = ["train", "--resume", "r", "--set", "train.log_every=1"]
    capsys.readouterr()
    assert main([*command, "--steps", "8"]) == 0
    assert "from step 6, lr halved once" in " ".join(capsys.readouterr().out.split())
    assert main([*command, "--steps", "10", "--lr", "4e-4"]) == 0
    assert "halved" not in capsys.readouterr().out
    assert main([*command, "--steps", "12"]) == 0
    found = [float(row["lr"]) for row in rows(Path("r"))]
    assert found == [5e-4] * 8 + [4e-4] * 4
    assert state_of(Path("r"), 12)["rollbacks"] == 1 and state_of(Path("r"), 12)["pardoned"] == 1


def test_metrics_that_cannot_be_rewritten_after_a_rollback_cost_no_checkpoint(photos, tiny, monkeypatch):
    """They stay as they are; the checkpoints know which rows count no more, and a later process puts them right."""
    from ddpmctl.errors import OutputError
    from ddpmctl.table import Table

    spoil_gradients(monkeypatch, lambda step, rollbacks: step > 5 and rollbacks == 0)
    plain = Table.cut

    def cut(self):
        if self.void_after == 4:
            raise OutputError(f"{self.path}: cannot be written: Input/output error", "")
        plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(Table, "cut", cut)
        assert train(photos, tiny, "r", "--steps", "10") == 0
    assert steps_saved(Path("r")) == [4, 8, 10] and [row["step"] for row in rows(Path("r"))][-1] != "10"
    assert main(["train", "--resume", "r", "-q"]) == 0
    assert train(photos, tiny, "o", "--steps", "10") == 0
    assert timeless(Path("r")) == timeless(Path("o"))


@pytest.mark.parametrize("when", ["validating", "after"])
def test_a_stop_at_a_step_that_is_due_and_a_later_rollback_keep_the_row_of_that_step(photos, tiny, monkeypatch, when):
    from ddpmctl.cli.run_report import Shown
    from ddpmctl.events import Busy
    from ddpmctl.training import TrainStep

    spoil_gradients(monkeypatch, lambda step, rollbacks: step > 5 and rollbacks == 0)
    plain = Shown.event

    def stopping(self, bar, event):
        plain(self, bar, event)
        busy = isinstance(event, Busy) and event.what == "validating"
        if self.run.state.step == 4 and (busy if when == "validating" else isinstance(event, TrainStep)):
            signal.raise_signal(signal.SIGTERM)

    flags = ["--set", "train.log_every=2", "--set", "train.val_every=4", "--set", "data.holdout=0.2", "--steps", "10"]
    assert train(photos, tiny, "whole", *flags) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Shown, "event", stopping)
        assert train(photos, tiny, "r", *flags) == Exit.STOPPED
    assert main(["train", "--resume", "r", "-q"]) == 0
    assert_same_run(Path("whole"), Path("r"))


def test_a_rollback_outlives_metrics_that_cannot_be_read(photos, tiny, monkeypatch):
    spoil_gradients(monkeypatch, lambda step, rollbacks: step > 5 and rollbacks == 0)
    plain = training.add_gradients

    def breaking(state, *args):
        file = Path("r/metrics.csv")
        if state.step == 6 and not state.rollbacks and file.is_file():
            file.rename("aside.csv")
            file.mkdir()
        if state.step == 6 and state.rollbacks and file.is_dir():
            file.rmdir()
            Path("aside.csv").rename(file)
        return plain(state, *args)

    monkeypatch.setattr(training, "add_gradients", breaking)
    assert train(photos, tiny, "r", "--steps", "10") == 0
    assert [row["step"] for row in rows(Path("r"))] == [str(step) for step in range(1, 11)]


def test_weights_of_another_run_in_the_folders_place_are_never_gone_back_to(photos, tiny, monkeypatch, capsys):
    assert train(photos, tiny, "other", "--steps", "8", "--seed", "99") == 0
    spoil_gradients(monkeypatch, lambda step, rollbacks: step > 5)
    plain = training.add_gradients

    def swapping(state, *args):
        if state.step == 5 and Path("other").exists():
            Path("r").rename("mine")
            Path("other").rename("r")
        return plain(state, *args)

    monkeypatch.setattr(training, "add_gradients", swapping)
    assert train(photos, tiny, "r", "--steps", "12") == Exit.DIVERGED
    assert "its folder was moved away, deleted or replaced" in capsys.readouterr().err


@pytest.mark.parametrize("last_bad", [7, 8, 99])
def test_a_run_that_looks_only_now_and_then_comes_to_the_same(photos, tiny, monkeypatch, last_bad):
    """The steps between the fault and the look are taken back with the others."""
    from ddpmctl import run

    flags = ["--set", "train.log_every=5", "--set", "train.save_every=10", "--set", "train.sample_every=0", "--steps", "25"]
    spoil_gradients(monkeypatch, lambda step, rollbacks: 6 <= step <= last_bad and rollbacks == 0)
    with monkeypatch.context() as patch:
        patch.setattr(run, "LOOK_EVERY", 1)
        assert train(photos, tiny, "often", *flags) == 0
    assert train(photos, tiny, "seldom", *flags) == 0
    assert state_of(Path("seldom"), 25)["rollbacks"] == (last_bad > 7)
    assert_same_run(Path("often"), Path("seldom"))


def test_a_held_out_loss_that_jumps_is_told_once(photos, tiny, capsys):
    flags = ["--set", "train.val_every=2", "--set", "data.holdout=0.2", "--set", "train.ema_decay=0", "--steps", "4"]
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", *flags]) == 0
    assert "jumped" not in capsys.readouterr().err
    assert main(["train", "--resume", "r", "--steps", "10", "--lr", "1"]) == 0
    told = re.findall(r"step (\d+): the held-out loss has jumped to [\d.]+, from [\d.]+ at step (\d+)", " ".join(capsys.readouterr().err.split()))
    measured = {int(row["step"]): float(row["val_loss"]) for row in rows(Path("r")) if row["val_loss"]}
    assert list(measured) == [2, 4, 6, 8, 10]
    jumps = [(str(step), str(step - 2)) for step in (4, 6, 8, 10) if measured[step] > 2 * measured[step - 2]]
    assert told == jumps and ("6", "4") in jumps and len(jumps) < 3
