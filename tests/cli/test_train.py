"""``ddpmctl train`` by its real command line on real files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from ddpmctl import checkpoint, preflight
from ddpmctl.cli import main
from ddpmctl.errors import Exit
from helpers import spoil_gradients, write_images
from runs import assert_same, rows, state_of


def test_a_run_folder_holds_what_is_promised(photos, tiny, capsys):
    assert main(["train", str(photos), "-c", str(tiny)]) == 0
    run = Path("runs/my photos")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000004.pt", "step-00000006.pt"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step-00000004.png", "step-00000006.png"]
    assert [int(row["step"]) for row in rows(run)] == [2, 4, 6]
    assert all(float(row["loss"]) > 0 for row in rows(run))
    saved = yaml.safe_load((run / "run.yaml").read_text())
    assert saved["train"]["steps"] == 6 and saved["data"]["size"] == 16 and saved["data"]["channels"] == 3
    assert Image.open(run / "loss.png").width > 300
    printed = capsys.readouterr().out
    for word in ("12 images of 16x16", "parameters", "fp32", "6 steps of 4 images = 2.0 epochs", "runs/my photos"):
        assert word in printed, word
    assert printed.strip().splitlines()[-1].strip().startswith("ddpmctl sample 'runs/my photos'")


def test_flags_beat_the_run_file_and_the_seed_decides(photos, tiny):
    for out, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert main(["train", str(photos), "-c", str(tiny), "--out", out, "--steps", "2", "--seed", seed, "-q"]) == 0
    a, b, c = (state_of(Path(out), 2) for out in "abc")
    assert_same(a["net"], b["net"])
    assert not torch.equal(a["net"]["conv_in.weight"], c["net"]["conv_in.weight"])


def test_old_checkpoints_go_the_newest_stay(photos, tiny):
    command = [
        "train",
        str(photos),
        "-c",
        str(tiny),
        "--out",
        "r",
        "-q",
        "--set",
        "train.save_every=1",
        "--set",
        "train.keep=2",
    ]
    assert main(command) == 0
    assert [p.name for p in sorted(Path("r/checkpoints").iterdir())] == ["step-00000005.pt", "step-00000006.pt"]


@pytest.mark.parametrize("extra", [
    [],
    ["--set", "data.hflip=true", "--set", "data.conditional=true"],
    ["--set", "train.grad_accum=3", "--precision", "bf16"],
    ["--set", "model.norm=batch", "--set", "train.ema_warmup=copy", "--set", "train.ema_start=3"],
    ["--set", "train.lr_schedule=cosine_flat", "--set", "train.optimizer=adamw", "--set", "train.log_every=3"],
    ["--set", "diffusion.t_sampling=stratified", "--set", "train.grad_accum=2"],
    ["--set", "diffusion.t_sampling=importance", "--set", "diffusion.weighting=min_snr"],
    ["--set", "diffusion.zero_terminal_snr=true", "--set", "diffusion.shift=2", "--prediction", "v", "--set", "diffusion.t_sampling=importance"],
    ["--set", "diffusion.learn_variance=true", "--set", "train.grad_accum=2", "--set", "train.sampler=ddpm"],
], ids=["plain", "flips and labels", "accumulation in bf16", "batch norm", "lr schedule", "stratified", "importance",
        "zero terminal SNR", "learned variance"])  # fmt: skip
def test_a_resumed_run_is_the_uninterrupted_one(photos, tiny, extra):
    command = ["train", str(photos), "-c", str(tiny), "-q", *extra]
    assert main([*command, "--out", "whole", "--steps", "8"]) == 0
    # The step at which it stops lies within an epoch (3 steps) and within a row of metrics.
    assert main([*command, "--out", "parts", "--steps", "8", "--set", "train.save_every=5"]) == 0
    Path("parts/checkpoints/step-00000008.pt").unlink()
    assert main([*command, "--out", "parts", "--steps", "8", "--resume"]) == 0
    whole, parts = state_of(Path("whole"), 8), state_of(Path("parts"), 8)
    for part in ("net", "ema", "optimizer", "step", "window"):
        assert_same(whole[part], parts[part], part)
    timeless = [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows(Path("parts"))]
    assert timeless == [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows(Path("whole"))]
    for picture in Path("whole/samples").iterdir():
        other = Path("parts/samples") / picture.name
        assert Image.open(other).tobytes() == Image.open(picture).tobytes(), picture.name


def test_resume_needs_only_the_run_folder_and_goes_on_with_more_steps(photos, tiny, capsys):
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", "-q"]) == 0
    assert main(["train", "--resume", "r", "--steps", "10"]) == 0
    assert state_of(Path("r"), 10)["ema"]["steps"] == 10
    printed = capsys.readouterr().out
    assert "changed: train.steps: 6 -> 10" in printed and "from step 6" in printed
    assert main(["train", "--resume", "r"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_resume_passes_over_a_damaged_checkpoint(photos, tiny, capsys):
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", "-q"]) == 0
    newest = Path("r/checkpoints/step-00000006.pt")
    newest.write_bytes(newest.read_bytes()[:-2000])
    assert main(["train", "--resume", "r"]) == 0
    shown = capsys.readouterr()
    assert "step-00000006.pt" in shown.err and "from step 4" in shown.out
    assert state_of(Path("r"), 6)["step"] == 6


def test_resume_with_no_readable_checkpoint_is_refused_and_loses_nothing(photos, tiny, capsys):
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", "-q"]) == 0
    for file in Path("r/checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    before = {path: path.stat().st_mtime_ns for path in Path("r").rglob("*")}
    assert main(["train", "--resume", "r"]) == Exit.CHECKPOINT
    assert "none of its checkpoints" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in Path("r").rglob("*")} == before


def test_a_damaged_checkpoint_never_takes_the_place_of_a_good_one(photos, tiny):
    command = ["-q", "--set", "train.keep=1", "--set", "train.save_every=2", "--set", "train.sample_every=0"]
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", "-q", "--set", "train.save_every=2"]) == 0
    Path("r/checkpoints/step-00000006.pt").write_bytes(b"damaged")
    assert main(["train", "--resume", "r", *command, "--steps", "5"]) == 0
    # The newest, and beside it the newest that was due, to which a run that diverges would go back.
    assert [checkpoint.load(file)["step"] for file in sorted(Path("r/checkpoints").glob("step-*.pt"))] == [4, 5]
    # What could not be read is set aside, not deleted.
    assert Path("r/checkpoints/step-00000006.pt.aside").read_bytes() == b"damaged"


def test_resume_without_the_checkpoints_that_were_there_is_refused(photos, tiny, capsys):
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", "-q"]) == 0
    for file in Path("r/checkpoints").iterdir():
        file.unlink()
    before = Path("r/metrics.csv").read_bytes()
    assert main(["train", "--resume", "r"]) == Exit.CHECKPOINT
    assert "its checkpoints are gone" in capsys.readouterr().err
    assert Path("r/metrics.csv").read_bytes() == before


def test_settings_of_the_optimiser_that_change_on_resume_hold(photos, tiny):
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", "-q", "--steps", "2"]) == 0
    changed = ["--set", "train.weight_decay=0.5", "--set", "train.beta1=0.5", "--steps", "3"]
    assert main(["train", "--resume", "r", "-q", *changed]) == 0
    [group] = state_of(Path("r"), 3)["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.5 and group["betas"][0] == 0.5


def test_a_grid_that_a_stop_cut_short_is_drawn_on_resume(photos, tiny, capsys):
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", "-q"]) == 0
    last = Path("r/samples/step-00000006.png")
    before = Image.open(last).tobytes()
    last.unlink()
    assert main(["train", "--resume", "r"]) == 0
    assert Image.open(last).tobytes() == before
    assert "nothing to do" not in capsys.readouterr().out


def test_nothing_to_do_writes_nothing(photos, tiny, capsys):
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", "-q"]) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("r").rglob("*")}
    for extra in (["--steps", "3"], ["--dry-run"]):
        assert main(["train", "--resume", "r", *extra]) == 0
        assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("r").rglob("*")} == before


def test_names_with_brackets_are_names(photos, tiny, capsys):
    assert main(["train", str(photos), "-c", str(tiny), "--out", "run[red][/b]", "--steps", "1"]) == 0
    assert "ddpmctl sample 'run[red][/b]'" in capsys.readouterr().out


def test_an_unwritable_metrics_file_is_a_clear_error(photos, tiny, capsys):
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", "-q", "--steps", "1"]) == 0
    Path("r/metrics.csv").unlink()
    Path("r/metrics.csv").mkdir()
    assert main(["train", "--resume", "r", "--steps", "4"]) == Exit.OUTPUT
    assert "metrics.csv" in capsys.readouterr().err


def test_out_of_memory_has_its_code(photos, tiny, capsys, monkeypatch):
    def no_room(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr("ddpmctl.training.denoising_loss", no_room)
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r"]) == Exit.DEVICE
    shown = capsys.readouterr().err
    assert "20 GiB" in shown and "--batch-size" in shown


def test_fp16_scales_the_loss_skips_steps_and_resumes(photos, tiny):
    command = ["train", str(photos), "-c", str(tiny), "-q", "--precision", "fp16", "--set", "train.log_every=1"]
    assert main([*command, "--out", "whole", "--steps", "6"]) == 0
    assert main([*command, "--out", "parts", "--steps", "6", "--set", "train.save_every=3"]) == 0
    Path("parts/checkpoints/step-00000006.pt").unlink()
    assert main(["train", "--resume", "parts", "-q"]) == 0
    whole, parts = state_of(Path("whole"), 6), state_of(Path("parts"), 6)
    assert whole["scaler"]["scale"] > 1
    for part in ("net", "ema", "optimizer", "scaler"):
        assert_same(whole[part], parts[part], part)


def test_a_step_whose_gradients_are_not_finite_changes_nothing(photos, tiny, monkeypatch):
    spoil_gradients(monkeypatch, lambda step, rollbacks: step == 2)
    command = ["train", str(photos), "-c", str(tiny), "-q", "--out", "r", "--set", "train.save_every=1",
               "--set", "train.keep=9", "--set", "train.log_every=1"]  # fmt: skip
    assert main([*command, "--steps", "2"]) == 0
    assert main([*command, "--steps", "3", "--resume"]) == 0
    first, second, third = (state_of(Path("r"), step) for step in (1, 2, 3))
    assert_same(first["net"], second["net"])
    assert_same(first["optimizer"], second["optimizer"])
    assert not torch.equal(third["net"]["conv_out.weight"], first["net"]["conv_out.weight"])
    assert [row["skipped"] for row in rows(Path("r"))] == ["0", "1", "0"]


@pytest.mark.parametrize("flags", [
    ["--schedule", "cosine"], ["--set", "model.base_channels=16"], ["--size", "8"], ["--seed", "9"],
    ["--batch-size", "5"], ["--prediction", "x0"],
])  # fmt: skip
def test_resume_refuses_what_changes_the_learning(photos, tiny, capsys, flags):
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", "-q", "--steps", "1"]) == 0
    before = (Path("r/run.yaml").read_bytes(), sorted(Path("r/checkpoints").iterdir()))
    assert main(["train", "--resume", "r", *flags]) == Exit.CONFIG
    assert "--force" in capsys.readouterr().err
    assert (Path("r/run.yaml").read_bytes(), sorted(Path("r/checkpoints").iterdir())) == before


def test_resume_notices_other_images(photos, tiny, capsys):
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", "-q"]) == 0
    next(photos.rglob("*.png")).unlink()
    assert main(["train", "--resume", "r", "--steps", "8"]) == Exit.CONFIG
    assert "not the images" in capsys.readouterr().err
    assert main(["train", "--resume", "r", "--steps", "8", "--force", "-q"]) == 0


def test_an_existing_folder_is_refused_or_replaced_when_asked(photos, tiny, capsys):
    command = ["train", str(photos), "-c", str(tiny), "--out", "r", "-q", "--steps", "1"]
    assert main(command) == 0
    before = {p: p.stat().st_mtime_ns for p in Path("r").rglob("*")}
    assert main(command) == Exit.OUTPUT
    assert "--resume" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in Path("r").rglob("*")} == before
    Path("r/notes.txt").write_text("mine")
    assert main([*command[:-2], "--steps", "2", "--overwrite"]) == 0
    assert [p.name for p in Path("r/checkpoints").iterdir()] == ["step-00000002.pt"]
    assert Path("r/notes.txt").read_text() == "mine"


def test_overwrite_leaves_a_stranger_folder_alone(photos, tiny):
    Path("thesis").mkdir()
    Path("thesis/chapter.txt").write_text("all of it")
    assert main(["train", str(photos), "-c", str(tiny), "--out", "thesis", "--overwrite"]) == Exit.OUTPUT
    assert [p.name for p in Path("thesis").iterdir()] == ["chapter.txt"]


def test_dry_run_writes_nothing_and_tells_memory_and_time(photos, tiny, capsys):
    before = sorted(Path().rglob("*"))
    assert main(["train", str(photos), "-c", str(tiny), "--dry-run", "--steps", "5000"]) == 0
    assert sorted(Path().rglob("*")) == before
    printed = capsys.readouterr().out
    assert "memory:" in printed and "expected:" in printed and "5,000 steps" in printed


def test_previews_start_from_the_same_noise_and_change_with_the_weights(photos, tiny):
    assert (
        main(
            ["train", str(photos), "-c", str(tiny), "--out", "r", "-q", "--set", "train.sample_every=3", "--lr", "0.02"]
        )
        == 0
    )
    assert (
        main(
            [
                "train",
                str(photos),
                "-c",
                str(tiny),
                "--out",
                "again",
                "-q",
                "--set",
                "train.sample_every=3",
                "--lr",
                "0.02",
            ]
        )
        == 0
    )
    first, last = (Image.open(f"r/samples/step-0000000{k}.png").tobytes() for k in (3, 6))
    assert first != last
    assert first == Image.open("again/samples/step-00000003.png").tobytes()


def test_data_smaller_than_a_batch_grey_and_oblong(tmp_path, tiny, capsys):
    data = write_images(tmp_path / "few", count=2, size=(16, 32), mode="L")
    assert main(["train", str(data), "-c", str(tiny), "--out", "r", "--size", "16x32"]) == 0
    assert state_of(Path("r"), 6)["image_shape"] == [1, 16, 32]
    assert "memorise" in capsys.readouterr().err


def test_the_learning_rate_of_a_schedule_is_in_the_metrics(photos, tiny):
    command = ["train", str(photos), "-c", str(tiny), "--out", "r", "-q", "--lr", "0.01", "--steps", "20",
               "--set", "train.lr_schedule=geometric", "--set", "train.log_every=1"]  # fmt: skip
    assert main(command) == 0
    rates = [float(row["lr"]) for row in rows(Path("r"))]
    assert rates[:2] == [0.01, 0.01] and rates[-2:] == pytest.approx([1e-4, 1e-4]) and len(set(rates)) == 10


def test_diverging_training_stops_with_its_own_code(photos, tiny, capsys):
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", "--steps", "200", "--lr", "1e30", "-q",
                 "--set", "train.grad_clip=0", "--set", "train.save_every=1", "--set", "train.sample_every=0"]) == Exit.DIVERGED  # fmt: skip
    assert "--lr" in capsys.readouterr().err


def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_happened(photos, tiny):
    base = [sys.executable, "-m", "ddpmctl", "train", str(photos), "-c", str(tiny), "--out", "r", "--steps", "100000",
            "--set", "train.sample_every=0", "--set", "train.save_every=100000"]  # fmt: skip
    with subprocess.Popen(base, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 120
        while not Path("r/metrics.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == Exit.STOPPED, printed
    assert "ddpmctl train --resume r" in printed
    [saved] = Path("r/checkpoints").iterdir()
    step = checkpoint.load(saved)["step"]
    assert main(["train", "--resume", "r", "--steps", str(step + 2), "-q"]) == 0
    assert main(["train", str(photos), "-c", str(tiny), "--out", "whole", "--steps", str(step + 2), "-q",
                 "--set", "train.sample_every=0"]) == 0  # fmt: skip
    assert_same(state_of(Path("whole"), step + 2)["net"], state_of(Path("r"), step + 2)["net"])


BAD = {
    "missing data": (["train", "nowhere"], Exit.DATA, "nowhere"),
    "no data": (["train"], Exit.CONFIG, "DATA"),
    "empty folder": (["train", "empty"], Exit.DATA, "empty"),
    "no readable image": (["train", "broken"], Exit.DATA, "broken"),
    "size the levels do not divide": (["train", "photos", "--size", "15"], Exit.CONFIG, "15"),
    "size that is none": (["train", "photos", "--size", "big"], Exit.CONFIG, "--size"),
    "unknown key": (["train", "photos", "-c", "typo.yaml"], Exit.CONFIG, "typo.yaml:2: train.stepz"),
    "wrong type": (["train", "photos", "-c", "type.yaml"], Exit.CONFIG, "type.yaml:1: train.lr"),
    "wrong range": (["train", "photos", "--set", "model.dropout=1.5"], Exit.CONFIG, "--set model.dropout"),
    "missing run file": (["train", "photos", "-c", "none.yaml"], Exit.CONFIG, "none.yaml"),
    "missing device": (["train", "photos", "--device", "cuda:7"], Exit.DEVICE, "cuda:7"),
    "device that is none": (["train", "photos", "--device", "tpu"], Exit.CONFIG, "--device"),
    "zero steps": (["train", "photos", "--steps", "0"], Exit.CONFIG, "--steps"),
    "steps that are none": (["train", "photos", "--steps", "many"], Exit.CONFIG, "--steps"),
    "negative lr": (["train", "photos", "--lr", "-1"], Exit.CONFIG, "--lr"),
    "unknown schedule": (["train", "photos", "--schedule", "cosin"], Exit.CONFIG, "cosine"),
    "unknown loss": (["train", "photos", "--loss", "l3"], Exit.CONFIG, "--loss"),
    "unknown flag": (["train", "photos", "--stepz", "3"], Exit.CONFIG, "--stepz"),
    "bad --set": (["train", "photos", "--set", "steps"], Exit.CONFIG, "section.key=value"),
    "nothing to resume": (["train", "photos", "--resume"], Exit.CHECKPOINT, "nothing to resume"),
    "unwritable place": (["train", "photos", "--out", "photos/dogs/image 0.png/run"], Exit.OUTPUT, "image 0.png"),
    "a text as data": (["train", "typo.yaml"], Exit.DATA, "typo.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_before_any_work(case, tmp_path, capsys):
    command, code, words = BAD[case]
    write_images(tmp_path / "photos", count=3)
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/a.png").write_bytes(b"not a picture")
    Path("typo.yaml").write_text("train:\n  stepz: 100\n")
    Path("type.yaml").write_text("train: {lr: fast}\n")
    before = sorted(Path().rglob("*"))
    assert main(command) == code
    shown = capsys.readouterr()
    assert words in shown.err
    assert "Traceback" not in shown.err and len(shown.err.strip().splitlines()) <= 2
    assert sorted(Path().rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_a_clear_error(photos, tiny):
    Path("locked").mkdir(mode=0o500)
    assert main(["train", str(photos), "-c", str(tiny), "--out", "locked/run"]) == Exit.OUTPUT


def test_offset_noise_is_common_to_a_channel_and_follows_from_the_seed(photos, tiny, monkeypatch):
    from ddpmctl import training

    plain, seen = training.denoising_loss, []

    def spy(denoiser, x0, t, eps, label, **options):
        seen.append(eps)
        return plain(denoiser, x0, t, eps, label, **options)

    monkeypatch.setattr(training, "denoising_loss", spy)
    command = ["train", str(photos), "-c", str(tiny), "-q", "--steps", "2", "--set", "train.sample_every=0"]
    assert main([*command, "--out", "without"]) == 0
    without, seen[:] = list(seen), []
    assert main([*command, "--out", "with", "--set", "diffusion.offset_noise=0.2"]) == 0
    for plain_eps, eps in zip(without, seen, strict=True):
        offset = eps - plain_eps
        assert torch.allclose(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-6)
        assert 0.05 < offset[:, :, 0, 0].std() < 0.5 and offset[:, :, 0, 0].unique().numel() == offset[:, :, 0, 0].numel()


def test_a_weighting_changes_training_and_not_the_held_out_loss(photos, tiny):
    command = ["train", str(photos), "-c", str(tiny), "-q", "--steps", "1", "--set", "data.holdout=0.2", "--set", "train.sample_every=0"]
    assert main([*command, "--out", "uniform"]) == 0
    assert main([*command, "--out", "weighted", "--set", "diffusion.weighting=p2"]) == 0
    [uniform], [weighted] = rows(Path("uniform")), rows(Path("weighted"))
    assert float(weighted["loss"]) < float(uniform["loss"]), "weights of eps are at most 1"
    assert float(weighted["val_loss"]) == pytest.approx(float(uniform["val_loss"]), rel=0.01)


def test_a_precision_that_is_slow_on_this_processor_is_told(photos, tiny, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "times_slower", lambda autocast, device: 130.4 if autocast else 1.0)
    for precision in ("bf16", "fp32"):
        assert main(["train", str(photos), "-c", str(tiny), "--steps", "1", "--precision", precision, "--out", precision]) == 0
        told = "precision bf16: this processor takes 130 times as long" in " ".join(capsys.readouterr().err.split())
        assert told == (precision == "bf16")
