"""Real processes of the real command, and what is left of their runs."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from ddpmctl import checkpoint

COMMAND = [sys.executable, "-m", "ddpmctl"]


@contextmanager
def train_process(*arguments: object, **options: object) -> Iterator[subprocess.Popen[str]]:
    """``ddpmctl train`` in a process of its own, its output in ``process.stdout``; killed when the block ends."""
    process = subprocess.Popen(
        [*COMMAND, "train", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def wait_for(
    condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 180, pause: float = 0.01
) -> None:
    """Until ``condition()`` holds; fails when it does not come, or the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"the process ended with {process.returncode}: {process.communicate()[0]}")
        if time.monotonic() > end:
            process.kill()
            pytest.fail(f"waited {seconds} s in vain: {process.communicate()[0]}")
        time.sleep(pause)


def steps_saved(run: Path) -> list[int]:
    """Steps of the checkpoints under their final names, oldest first."""
    return sorted(int(path.stem.partition("-")[2]) for path in (run / "checkpoints").glob("step-*.pt"))


def state_of(run: Path, step: int) -> dict:
    return checkpoint.load(run / "checkpoints" / f"step-{step:08d}.pt")


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def timeless(run: Path) -> list[dict[str, str]]:
    """The rows of the metrics but for the speed."""
    return [{key: value for key, value in row.items() if key != "images_per_s"} for row in rows(run)]


def assert_same(a: object, b: object, where: str = "") -> None:
    """Equal bit by bit, all the way down."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    else:
        assert a == b, where


def assert_same_run(a: Path, b: Path) -> None:
    """Last checkpoint, metrics and pictures are the same, whatever else was done on the way."""
    last = steps_saved(a)[-1]
    assert steps_saved(b)[-1] == last
    first, second = state_of(a, last), state_of(b, last)
    for part in ("net", "ema", "optimizer", "scaler", "step", "rollbacks", "window", "data"):
        assert_same(first[part], second[part], part)
    for row, other in zip(timeless(a), timeless(b), strict=True):
        assert row == other, f"{row}\n{other}"
    pictures = sorted(path.name for path in (a / "samples").iterdir())
    assert pictures == sorted(path.name for path in (b / "samples").iterdir()), pictures
    for name in pictures:
        assert Image.open(a / "samples" / name).tobytes() == Image.open(b / "samples" / name).tobytes(), name


def assert_whole(run: Path) -> None:
    """Everything under a final name can be read; what is unfinished has another name."""
    for path in (run / "checkpoints").glob("step-*.pt"):
        checkpoint.load(path)
    for path in (run / "samples").glob("step-*.png"):
        with Image.open(path) as image:
            image.load()
    if (run / "run.yaml").exists():
        assert yaml.safe_load((run / "run.yaml").read_text())["train"]
