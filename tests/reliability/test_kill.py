"""SIGKILL at any moment, saves included, and the run goes on as if nothing had happened.

``DDPMCTL_KILLS`` is the number of kills: few by default, 50 in ``make soak``.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from ddpmctl.cli import main
from helpers import write_images
from runs import assert_same_run, assert_whole, steps_saved, train_process, wait_for

KILLS = int(os.environ.get("DDPMCTL_KILLS", "4"))

SETTINGS = """\
seed: 11
precision: PRECISION
data: {size: 16, hflip: true, conditional: true, holdout: 0.1, workers: 3}
diffusion: {timesteps: 20}
model: {base_channels: 8, channel_mults: [1, 2], num_res_blocks: 1, attention_levels: [1], dropout: 0.2, norm_groups: 4}
train: {steps: 1000000, batch_size: 6, grad_accum: 3, lr: 1e-3, ema_every: 2, save_every: 2, keep: 2, sample_every: 9,
        samples: 4, sample_steps: 3, log_every: 3, val_every: 7}
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_killed_at_random_moments_is_the_undisturbed_one(tmp_path: Path, precision: str) -> None:
    data = write_images(tmp_path / "photos", count=20)
    settings = tmp_path / "settings.yaml"
    settings.write_text(SETTINGS.replace("PRECISION", precision))
    run, base = tmp_path / "killed", [data, "-c", settings, "--out", tmp_path / "killed", "-q"]
    dice = random.Random(f"{precision} {KILLS}")
    kills = left_behind = 0
    while kills < KILLS:
        start = steps_saved(run)[-1] if (run / "run.yaml").exists() and steps_saved(run) else 0
        resume = ["--resume"] if (run / "run.yaml").exists() else []
        with train_process(*base, *resume) as process:
            if kills % 4 == 3:  # while it starts, reads and takes up the run
                time.sleep(dice.uniform(0, 4))
            else:
                goal = start + dice.randrange(1, 12)
                wait_for(lambda goal=goal: steps_saved(run) and steps_saved(run)[-1] >= goal, process)
                if kills % 2:  # in the middle of a save
                    wait_for(lambda: list((run / "checkpoints").glob(".ddpmctl-*.tmp")), process, pause=0)
                time.sleep(dice.uniform(0, 0.02 if kills % 2 else 0.1))
            process.kill()
            printed = process.communicate()[0]
            assert process.returncode == -9, printed
        kills += 1
        left_behind += len(list(run.rglob(".ddpmctl-*.tmp")))
        assert_whole(run)
    last = steps_saved(run)[-1] if steps_saved(run) else 0
    steps = ["--steps", str(last + 5)]
    assert main([str(word) for word in ("train", *base, "--resume", *steps)]) == 0
    undisturbed = tmp_path / "undisturbed"
    assert main([str(word) for word in ("train", data, "-c", settings, "--out", undisturbed, "-q", *steps)]) == 0
    assert_same_run(run, undisturbed)
    assert not list(run.rglob(".ddpmctl-*.tmp")), "a resumed run clears away what a kill left behind"
    print(f"\n{precision}: killed {kills} times on the way to step {last}, {left_behind} times in the middle of a write")


@pytest.mark.parametrize("workers", ["1", "2", "5"])
def test_the_number_of_workers_changes_nothing(tmp_path: Path, workers: str) -> None:
    data = write_images(tmp_path / "photos", count=20)
    settings = tmp_path / "settings.yaml"
    settings.write_text(SETTINGS.replace("PRECISION", "fp32"))
    base = ["train", str(data), "-c", str(settings), "-q", "--steps", "7", "--set", "data.cache=false"]
    assert main([*base, "--out", "a"]) == 0
    assert main([*base, "--out", "b", "--set", f"data.workers={workers}", "--steps", "4"]) == 0
    # The last row of a run is written whatever log_every says: begin with the state before it.
    assert main([*base, "--out", "c", "--set", f"data.workers={workers}"]) == 0
    assert_same_run(Path("a"), Path("c"))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_every_signal_saves_at_the_step_and_the_run_goes_on_exactly(tmp_path: Path, name: str) -> None:
    import signal

    data = write_images(tmp_path / "photos", count=20)
    settings = tmp_path / "settings.yaml"
    settings.write_text(SETTINGS.replace("PRECISION", "fp32").replace("save_every: 2", "save_every: 1000000"))
    run = tmp_path / "stopped"
    with train_process(data, "-c", settings, "--out", run) as process:
        wait_for(lambda: (run / "metrics.csv").exists() and len((run / "metrics.csv").read_bytes()) > 300, process)
        process.send_signal(getattr(signal, name))
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == 75, printed
    assert f"by {name}, saved" in printed and f"ddpmctl train --resume {run}" in printed
    [step] = steps_saved(run)
    steps = ["--steps", str(step + 4)]
    assert main(["train", "--resume", str(run), "-q", *steps]) == 0
    assert main(["train", str(data), "-c", str(settings), "--out", "whole", "-q", *steps, "--set", "train.save_every=1000000"]) == 0
    assert_same_run(run, Path("whole"))


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    import signal

    data = write_images(tmp_path / "photos", count=4, size=(64, 64))
    slow = ["--size", "64", "--steps", "1000", "--batch-size", "8", "--set", "model.base_channels=32", "--precision", "fp32"]
    run = tmp_path / "run"
    for _ in range(5):  # the second signal may come after the step's end, when the first has been obeyed
        shutil.rmtree(run, ignore_errors=True)
        with train_process(data, "--out", run, *slow, "--set", "train.log_every=1") as process:
            wait_for((run / "metrics.csv").exists, process)
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            printed = process.communicate(timeout=60)[0]
        assert process.returncode in (130, 75) and "Traceback" not in printed, printed
        if process.returncode == 130:
            break
    assert process.returncode == 130, "five times it was too late"
    assert steps_saved(run) == []


def test_nohup_is_obeyed(tmp_path: Path, photos: Path, tiny: Path) -> None:
    import signal

    run = tmp_path / "run"
    arguments = [photos, "-c", tiny, "--out", run, "--steps", "100000", "--set", "train.sample_every=0"]
    with train_process(*arguments, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        wait_for((run / "metrics.csv").exists, process)
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75


def test_max_time_saves_and_ends(photos: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", str(photos), "-c", str(tiny), "--out", "r", "--steps", "1000000", "--set", "train.sample_every=0"]
    begun = time.monotonic()
    assert main([*command, "--max-time", "3s"]) == 75
    assert 3 <= time.monotonic() - begun < 60
    assert "by --max-time, saved" in capsys.readouterr().out
    assert steps_saved(Path("r"))[-1] > 0
    assert main(["train", "--resume", "r", "-q", "--steps", str(steps_saved(Path("r"))[-1] + 1)]) == 0
