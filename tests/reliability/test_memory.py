"""Too little memory: the batch goes in more parts and stays one batch; samples come in smaller batches."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, ImageChops

from ddpmctl import preflight, sampling, training
from ddpmctl.cli import main
from ddpmctl.errors import Exit
from ddpmctl.memory import available_bytes, out_of_memory
from runs import assert_same, rows, state_of, steps_saved, train_process


def no_room_above(monkeypatch: pytest.MonkeyPatch, most: int, *, after_step: int = -1) -> None:
    """Training runs out of memory with more than ``most`` images at once, once it is past ``after_step``."""
    plain, draw = training.denoising_loss, training.add_gradients
    now = {"step": 0}

    def loss(denoiser, x0, t, eps, label=None, **options):
        if len(x0) > most and now["step"] > after_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return plain(denoiser, x0, t, eps, label, **options)

    def counted(state, *args):
        now["step"] = state.step
        return draw(state, *args)

    monkeypatch.setattr(training, "denoising_loss", loss)
    monkeypatch.setattr(training, "add_gradients", counted)
    monkeypatch.setattr(preflight, "add_gradients", counted)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_batch_that_does_not_fit_goes_in_parts_from_the_first_step(photos, tiny, monkeypatch, capsys, norm):
    command = ["train", str(photos), "-c", str(tiny), "--set", f"model.norm={norm}", "--batch-size", "8"]
    with monkeypatch.context() as patch:
        no_room_above(patch, 2)
        assert main([*command, "--out", "little"]) == 0
    assert "out of memory: a batch of 8 goes in 4 parts, and stays one batch" in capsys.readouterr().err
    assert main([*command, "--out", "parts", "--set", "train.grad_accum=4", "-q"]) == 0
    little, parts = state_of(Path("little"), 6), state_of(Path("parts"), 6)
    for part in ("net", "ema", "optimizer"):
        assert_same(little[part], parts[part], part)
    # What was found out is kept: for a resumed run, and for who reads the settings.
    assert yaml.safe_load(Path("little/run.yaml").read_text())["train"]["grad_accum"] == 4
    assert little["config"]["train"]["grad_accum"] == 4


def test_memory_that_runs_short_later_does_not_end_the_run(photos, tiny, monkeypatch, capsys):
    no_room_above(monkeypatch, 2, after_step=2)
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r"]) == 0
    assert "a batch of 4 goes in 2 parts" in capsys.readouterr().err
    assert [row["step"] for row in rows(Path("r"))] == ["2", "4", "6"]
    assert state_of(Path("r"), 6)["config"]["train"]["grad_accum"] == 2


def test_one_image_that_does_not_fit_is_an_error(photos, tiny, monkeypatch, capsys):
    no_room_above(monkeypatch, 0)
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r"]) == Exit.DEVICE
    assert "20 GiB" in capsys.readouterr().err


def test_a_dry_run_tries_memory_too_and_writes_nothing(photos, tiny, monkeypatch, capsys):
    no_room_above(monkeypatch, 2)
    assert main(["train", str(photos), "-c", str(tiny), "--dry-run"]) == 0
    assert "a batch of 4 goes in 2 parts" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_failed_trial_does_not_cost_the_run_that_it_was_to_replace(photos, tiny, monkeypatch):
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", "-q"]) == 0
    before = {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()}
    no_room_above(monkeypatch, 0)
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", "--overwrite"]) == Exit.DEVICE
    assert {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()} == before


def test_a_grid_that_does_not_fit_is_drawn_in_parts(photos, tiny, monkeypatch, capsys):
    plain = sampling.SAMPLERS["ddim"]

    def narrow(denoiser, x_t, *args, **options):
        if len(x_t) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        yield from plain(denoiser, x_t, *args, **options)

    command = ["train", str(photos), "-c", str(tiny)]
    with monkeypatch.context() as patch:
        patch.setitem(sampling.SAMPLERS, "ddim", narrow)
        assert main([*command, "--out", "little"]) == 0
    assert "sample grids are drawn with 2 images at once" in capsys.readouterr().err
    assert main([*command, "--out", "enough", "-q"]) == 0
    little, enough = (Image.open(f"{run}/samples/step-00000006.png") for run in ("little", "enough"))
    assert max(high for _, high in ImageChops.difference(little, enough).getextrema()) <= 1


def test_trying_memory_changes_nothing(photos, tiny, monkeypatch):
    command = ["train", str(photos), "-c", str(tiny), "-q", "--set", "model.norm=batch"]
    assert main([*command, "--out", "tried"]) == 0
    monkeypatch.setattr(preflight, "preflight", lambda run: iter(()))
    assert main([*command, "--out", "untried"]) == 0
    for part in ("net", "ema", "optimizer"):
        assert_same(state_of(Path("tried"), 6)[part], state_of(Path("untried"), 6)[part], part)


@pytest.mark.parametrize("output", ["x.png", "x.npz", "x.gif", "folder/"])
def test_samples_come_in_smaller_batches(trained, monkeypatch, capsys, output):
    plain = sampling.SAMPLERS["ddim"]
    tried = []

    def narrow(denoiser, x_t, *args, **options):
        tried.append(len(x_t))
        if len(x_t) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        yield from plain(denoiser, x_t, *args, **options)

    command = ["sample", str(trained), "-n", "10", "--sampler", "ddim", "--steps", "4"]
    with monkeypatch.context() as patch:
        patch.setitem(sampling.SAMPLERS, "ddim", narrow)
        assert main([*command, "-o", output]) == 0
    assert tried == [10, 5, 3, 3, 3, 1]
    shown = capsys.readouterr()
    assert "out of memory" in shown.err and "3 images at once" in shown.err
    assert main([*command, "-o", f"other-{output}", "--batch-size", "3", "-q"]) == 0
    if output == "x.png":
        assert Image.open("x.png").tobytes() == Image.open("other-x.png").tobytes()
    if output == "folder/":
        for path in Path("folder").glob("*.png"):
            assert path.read_bytes() or path.name
            assert Image.open(path).tobytes() == Image.open(Path("other-folder") / path.name).tobytes()


def test_main_memory_is_reckoned_before_the_system_ends_the_process(photos, tiny):
    """With room for a handful of images the batch is cut; with the room that there is, it is not.

    In processes of their own: in this one there may be much room that was used before and is free again.
    """
    wide = ["--set", "model.base_channels=32", "--size", "64", "--batch-size", "32", "--steps", "1", "--set", "train.samples=1"]
    command = ["train", str(photos), "-c", str(tiny), *wide]
    program = "import sys; from ddpmctl import cli, preflight; preflight.available_bytes = lambda: int(sys.argv[1]); sys.exit(cli.main(sys.argv[2:]))"

    def train(free: int, out: str) -> tuple[str, int]:
        done = subprocess.run([sys.executable, "-c", program, str(free), *command, "--out", out], capture_output=True, text=True, check=True)
        return done.stderr, state_of(Path(out), 1)["config"]["train"]["grad_accum"]

    shown, parts = train(150 * 2**20, "little")
    assert "32 images at once would take" in shown and "0.1 free" in shown and parts > 1
    assert train(2**40, "enough")[1] == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space hold on Linux")
def test_a_real_process_with_too_little_memory_trains_all_the_same(tmp_path, photos):
    """2 GiB of address space beyond what the libraries take by themselves; the whole batch needs more."""
    libraries = "import torch, matplotlib.pyplot, ddpmctl.run; torch.ones(9, 9, requires_grad=True).sum().backward();"
    peak = "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmPeak')))"
    done = subprocess.run([sys.executable, "-c", libraries + peak], capture_output=True, text=True, check=True)
    limit = int(done.stdout) * 1024 + 2**31
    # Much memory and little to compute.
    flags = ["--size", "128", "--batch-size", "192", "--steps", "1", "--precision", "fp32", "--set", "train.samples=1",
             "--set", "train.sample_steps=1", "--set", "model.base_channels=16", "--set", "model.norm_groups=4",
             "--set", "model.channel_mults=[1, 1, 1, 1]", "--set", "model.attention_levels=[]", "--set", "model.num_res_blocks=1"]  # fmt: skip
    with train_process(photos, "--out", tmp_path / "r", *flags,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))) as process:  # fmt: skip
        printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    assert "a batch of 192 goes in" in printed
    assert steps_saved(tmp_path / "r") == [1]


def test_available_memory_is_a_sane_number():
    free = available_bytes()
    assert free is None or 2**20 < free < 2**50


def test_the_peak_of_a_piece_of_work():
    """In a process of its own: in this one there may be that much room that was used before and is free again."""
    program = (
        "import torch; from ddpmctl.memory import peak_bytes;"
        "print(peak_bytes(lambda: torch.ones(300 * 2**20, dtype=torch.uint8)) or 300 * 2**20)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 290 * 2**20 < int(done.stdout) < 320 * 2**20


@pytest.mark.parametrize(("error", "expected"), [
    (MemoryError(), True),
    (torch.OutOfMemoryError("CUDA out of memory."), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("could not create a primitive"), True),
    (RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"), False),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    (OSError(12, "Cannot allocate memory"), False),
    (ValueError("out of memory"), False),
])  # fmt: skip
def test_what_counts_as_out_of_memory(error, expected):
    assert out_of_memory(error) is expected
