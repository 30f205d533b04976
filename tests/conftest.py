"""Small real images, a small run file, and one run trained by the real command for all tests that need one."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpmctl.cli import main
from helpers import TINY, write_images

# Tiny networks: a second thread costs more than it gives. As many here as in the processes that tests start, for
# sums over another number of threads are other sums.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


_tried: Counter[str] = Counter()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """How many random inputs there were, told to the process that reports where tests run in several."""
    _tried.update(getattr(sys.modules.get("fuzzing"), "TRIED", {}))
    getattr(session.config, "workeroutput", {})["tried"] = dict(_tried)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of pytest-xdist has ended."""
    _tried.update(getattr(node, "workeroutput", {}).get("tried", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many random inputs there were, if there were any."""
    if tried := _tried:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in tried.items())
        terminalreporter.write_line(f"fuzzing: {tried.total():,} inputs tried ({kinds})")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images are kept in a folder of the session, by commands that tests start too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPMCTL_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("DDPMCTL_CACHE_SIZE", raising=False)
        yield


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a command writes to a relative path lands in the test's own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve 16x16 colour images in two class folders."""
    return write_images(tmp_path / "my photos")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A run file that trains in a second."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder, six steps long; tests only read it."""
    folder = tmp_path_factory.mktemp("trained")
    write_images(folder / "photos")
    (folder / "tiny.yaml").write_text(TINY)
    command = ["train", str(folder / "photos"), "-c", str(folder / "tiny.yaml"), "--out", str(folder / "run"), "-q"]
    assert main(command) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def trained_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished conditional run on oblong grey images."""
    folder = tmp_path_factory.mktemp("classes")
    write_images(folder / "photos", size=(16, 24), mode="L")
    (folder / "tiny.yaml").write_text(TINY)
    command = ["train", str(folder / "photos"), "-c", str(folder / "tiny.yaml"), "--out", str(folder / "run"), "-q",
               "--size", "16x24", "--set", "data.conditional=true", "--prediction", "v", "--schedule", "cosine"]  # fmt: skip
    assert main(command) == 0
    return folder / "run"
