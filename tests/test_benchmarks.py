"""The benchmark of speed runs, and counts what it says it counts."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ddpmctl.config import RunConfig
from ddpmctl.outline import network

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("speed")


def test_work_is_that_of_the_network(speed: ModuleType) -> None:
    counted = sum(block.multiply_adds for block in network(RunConfig(), (3, 32, 32), 0))
    assert speed.flops(speed.Setting()) == pytest.approx(2 * counted, rel=1e-3)
    assert speed.flops(speed.Setting()) == pytest.approx(12.44e9, rel=0.001)  # attention included


def test_contestants_train_by_turns_in_processes_of_their_own(speed: ModuleType) -> None:
    pytest.importorskip("diffusers")
    tiny = speed.Setting(base=16, mults=(1, 2), blocks=1, groups=4, size=8, batch=2)
    names = ["ddpmctl", "plain PyTorch, fp32", "diffusers, fp32"]
    found = speed.by_turns(names, tiny, rounds=1)
    assert list(found) == names
    assert all(0 < timed.seconds < 60 and timed.memory > 2**25 for timed in found.values())


def test_tables_that_are_not_measured_again_stay(speed: ModuleType, tmp_path: Path) -> None:
    title, other = (speed.TABLES[name][0] for name in ("training", "profiles"))
    page = tmp_path / "RESULTS.md"
    page.write_text(speed.page({title: "old", other: "### A\n\nkept"}))
    sections = speed.sections_of(page)
    assert sections[other].strip() == "### A\n\nkept"
    again = speed.page({**sections, title: "new"})
    assert "old" not in again.split("## Same quality")[0].split(title)[1]
    assert again.count("## Same quality") == page.read_text().count("## Same quality") == 1
    assert "kept" in again


def test_quality_of_one_run_file_is_not_told_as_that_of_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    quality = importlib.import_module("quality")
    one, other, out = tmp_path / "one.yaml", tmp_path / "other.yaml", tmp_path / "out"
    one.write_text("seed: 1")
    other.write_text("seed: 2")
    quality.keep_config(one, out)
    quality.keep_config(one, out)
    with pytest.raises(SystemExit, match="give another --out"):
        quality.keep_config(other, out)
    assert [file.name for file in out.iterdir()] == ["one.yaml"]


def test_without_the_peers_it_names_the_extra(
    speed: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["speed.py"])
    with pytest.raises(SystemExit, match=r"\[bench\]"):
        speed.main()
