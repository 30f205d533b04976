"""``ddpmctl cache``: what it shows, what it removes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ddpmctl.cli import console, main
from ddpmctl.errors import Exit


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDPMCTL_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_training_fills_it_and_clear_empties_it(
    photos: Path, tiny: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == f"0 bytes of at most 20.0 GiB in {place}\n"
    assert main(["train", str(photos), "-c", str(tiny), "--steps", "1", "--quiet"]) == 0
    assert main(["train", str(photos), "-c", str(tiny), "--steps", "1", "--size", "8x16", "--out", "b", "--quiet"]) == 0
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    capsys.readouterr()

    assert main(["cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["data", "images", "size", "fit", "room", "last", "used"]
    assert re.fullmatch(rf"{photos} +12 +8x16 rgb +crop +\d\.\d KiB +\d{{4}}-\d\d-\d\d \d\d:\d\d *", lines[1])
    assert re.fullmatch(rf"{photos} +12 +16x16 rgb +crop .*", lines[2])
    assert lines[3] == f"{size / 1024:.1f} KiB of at most 20.0 GiB in {place}"

    assert main(["cache", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["folder"], facts["limit"], facts["bytes"]) == (str(place), 20 * 2**30, size)
    assert [entry["shape"] for entry in facts["entries"]] == [[12, 3, 8, 16], [12, 3, 16, 16]]
    assert facts["entries"][0]["data"] == str(photos) and facts["entries"][0]["fit"] == "crop"

    (place / "mine.txt").write_text("stays")
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"{size / 1024:.1f} KiB freed in {place}\n"
    assert [path.name for path in place.iterdir()] == ["mine.txt"]
    assert main(["cache", "--clear", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "folder": str(place), "limit": 20 * 2**30, "bytes": 0, "entries": [], "freed": 0,
    }  # fmt: skip


def test_no_cache_with_the_setting_off(photos: Path, tiny: Path, place: Path) -> None:
    command = ["train", str(photos), "-c", str(tiny), "--steps", "1", "--quiet", "--cache", "off"]
    assert main(command) == 0
    assert not place.exists()


def test_what_is_damaged_or_half_written_is_shown_and_removed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged, unfinished = place / "images-0123456789abcdef-0123456789abcdef", place / "images-x_1.tmp"
    for folder in (damaged, unfinished):
        folder.mkdir(parents=True)
        (folder / "pixels").write_bytes(bytes(2000))
    (damaged / "index").write_bytes(b'x\n{"root": 5}\n')
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "(damaged)" in shown and "(being written)" in shown
    assert main(["cache", "--clear", "--quiet"]) == 0
    assert capsys.readouterr().out == f"3.9 KiB freed in {place}\n"
    assert list(place.iterdir()) == []


def test_what_cannot_be_removed_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guest = place / "images-0123456789abcdef-0123456789abcdef" / "theirs"
    guest.parent.mkdir(parents=True)
    guest.write_text("a guest")
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"0 bytes freed in {place}; 1 could not be removed\n"
    assert guest.exists()


def test_a_wrong_limit_is_two_lines(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DDPMCTL_CACHE_SIZE", "much")
    assert main(["cache"]) == Exit.CONFIG
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2 and "DDPMCTL_CACHE_SIZE: 'much' is not a size such as 500M or 5G" in shown[0]


def test_no_home(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("DDPMCTL_CACHE")
    monkeypatch.setattr("ddpmctl.data.cache.user_cache_path", lambda name: Path("~") / name)
    assert main(["cache"]) == 0
    assert "DDPMCTL_CACHE" in capsys.readouterr().err


def test_a_long_path_in_a_narrow_terminal(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place / "images-0123456789abcdef-0123456789abcdef"
    folder.mkdir(parents=True)
    head = {"root": "/data/[red]" + "long/" * 30 + "\n", "shape": [1, 1, 2, 3], "fit": "pad"}
    (folder / "index").write_text(f"0\n{json.dumps(head)}\n")
    program = "from ddpmctl.cli import console, main; console.out._force_terminal = True; main(['cache'])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "xterm"},
    )  # fmt: skip
    lines = done.stdout.splitlines()[:-1]
    assert len(lines) > 2 and max(map(len, lines)) <= 80
    assert "[red]" in lines[1] and "1  2x3 grey  pad" in lines[1]


def test_it_needs_no_torch(place: Path) -> None:
    program = "import sys; from ddpmctl.cli import main; code = main(['cache']); sys.exit('torch' in sys.modules or code)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and str(place) in done.stdout


def test_help_says_where_and_how_large(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "width", 200)
    assert main(["cache", "--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("DDPMCTL_CACHE", "DDPMCTL_CACHE_SIZE", "20G", "--cache off", "--clear", "Example: ddpmctl cache"):
        assert word in shown.replace("`", "")
