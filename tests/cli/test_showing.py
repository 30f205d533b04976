"""Pictures in the terminal: their pixels in a real one, a line of why not elsewhere."""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ddpmctl.cli import main, showing
from ddpmctl.cli.showing import _columns

CELL = re.compile(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m(▀+)")


def in_terminal(*arguments: object, columns: int = 80, lines: int = 40) -> str:
    """What the command writes to a terminal of its own."""
    import fcntl
    import pty
    import termios

    child, terminal = pty.fork()
    if not child:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        settings = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        os.execvpe(sys.executable, [sys.executable, "-m", "ddpmctl", *map(str, arguments)], {**inherited, **settings})
    told = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            part = b""
        if not part:
            break
        told += part
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, told.decode()
    os.close(terminal)
    return told.decode()


def cells(told: str) -> list[list[tuple[int, ...]]]:
    """The colours of each half block, upper and lower, line by line."""
    lines = [[tuple(map(int, match.groups()[:6])) for match in CELL.finditer(line) for _ in match[7]] for line in told.splitlines()]
    return [line for line in lines if line]


needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="no such terminals there")


@needs_terminal
def test_a_sample_is_shown_pixel_by_pixel(trained: Path) -> None:
    pytest.importorskip("textual_image")
    found = cells(in_terminal("sample", trained, "-n", 1, "--steps", 2, "-o", "one.png", "--show"))
    picture = Image.open("one.png").convert("RGB")
    width, height = picture.size
    assert (len(found[0]), len(found)) == (width, height // 2)  # there is room for all of it
    for y, line in enumerate(found):
        for x, colours in enumerate(line):
            assert colours == (*picture.getpixel((x, 2 * y)), *picture.getpixel((x, 2 * y + 1)))


@pytest.mark.slow
@needs_terminal
def test_grids_of_training_and_a_noise_demo_are_shown(photos: Path, tiny: Path) -> None:
    pytest.importorskip("textual_image")
    told = in_terminal("train", photos, "-c", tiny, "--out", "run", "--show")
    assert len(cells(told)) >= 2 * 18 and told.index("step-00000004.png") < told.index("▀")
    picture = next(photos.rglob("*.png"))
    assert len(cells(in_terminal("noise-demo", picture, "-o", "demo.gif", "--frames", 3, "--show", lines=20))) in (15, 16)


def test_elsewhere_it_says_why_not(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("textual_image")
    assert main(["sample", str(trained), "-n", "1", "--steps", "2", "-o", "a.png", "--show"]) == 0
    out = capsys.readouterr().out
    assert out.count("--show: nothing is shown, for stdout is no terminal") == 1 and "▀" not in out
    assert main(["sample", str(trained), "-n", "1", "--steps", "2", "-o", "b.png", "--show", "-q"]) == 0
    assert capsys.readouterr().out == ""


@needs_terminal
def test_a_terminal_without_a_size_ends_nothing(trained: Path) -> None:
    pytest.importorskip("textual_image")
    told = in_terminal("sample", trained, "-n", 1, "--steps", 2, "-o", "a.png", "--show", lines=0, columns=0)
    assert "does not tell its size" in told and "▀" not in told


@pytest.mark.slow
@needs_terminal
def test_what_is_no_picture_is_not_shown(trained: Path) -> None:
    pytest.importorskip("textual_image")
    told = in_terminal("sample", trained, "-n", 1, "--steps", 2, "-o", "a.npz", "--show")
    assert "a.npz is no picture" in told and "▀" not in told


@pytest.mark.parametrize("command", [lambda run: ["sample", str(run)], lambda run: ["train", str(run / "photos")]])
def test_the_package_that_is_missing_is_named(
    command: Callable[[Path], list[str]], trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(showing, "find_spec", lambda name: None)
    assert main([*command(trained), "--show"]) == 2
    assert "ddpmctl[show]" in capsys.readouterr().err and not list(Path().glob("samples-*")) and not Path("runs").exists()


@pytest.mark.parametrize(
    ("size", "room", "columns"),
    [((20, 20), (80, 40), 20), ((500, 100), (80, 40), 80), ((100, 500), (80, 24), 8), ((500, 500), (80, 24), 40), ((9, 900), (5, 2), 1)],
)
def test_a_picture_fits_the_terminal(size: tuple[int, int], room: tuple[int, int], columns: int) -> None:
    assert _columns(size, room) == columns
