"""``--show``: pictures in the terminal, as it can draw them: kitty's protocol, sixels (iTerm2 too), or half blocks of colour."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from ddpmctl.cli import console
from ddpmctl.errors import ConfigError

Show = Callable[[Path], None]
_LINES_BESIDE = 4
"""Lines of the terminal that a picture leaves to the words around it."""


def shower(wanted: bool, *, moment: float = 1.0) -> Show:
    """What shows a PNG, or of a GIF the frame at ``moment``, 0 the first and 1 the last; nothing unless ``wanted``.

    Asks the terminal what it can draw, so it comes before any bar. Where there is no terminal, that is said, once.
    Raises :class:`ConfigError` where the package is missing.
    """
    if not wanted or console.is_quiet():
        return lambda file: None
    if find_spec("textual_image") is None:
        raise ConfigError("--show: needs the package textual-image", "pip install 'ddpmctl[show]', or leave --show out")
    if why := _cannot():
        console.note(f"--show: nothing is shown, for {why}")
        return lambda file: None
    logging.getLogger("textual_image").setLevel(logging.ERROR)  # how large a cell is it asks for, and may do without
    from textual_image.renderable import Image

    def show(file: Path) -> None:
        from PIL import Image as Pictures

        if file.suffix.lower() not in (".png", ".gif"):
            console.note(f"--show: {file} is no picture; .png and .gif are shown")
            return
        with Pictures.open(file) as picture:
            picture.seek(round(moment * (getattr(picture, "n_frames", 1) - 1)))
            flat = picture.convert("RGB")
        width = _columns(flat.size, console.out.size)
        try:
            console.out.print(Image(flat, width=width, height="auto"))
        except Exception as error:  # noqa: BLE001 - of whatever another's package fails, training goes on
            console.warn(f"--show: {file} cannot be shown: {str(error) or type(error).__name__}")

    return show


def _columns(size: tuple[int, int], room: tuple[int, int]) -> int:
    """How wide a picture of ``size`` (width, height) is drawn in a terminal of ``room``, in cells, twice as high as wide."""
    (width, height), (columns, lines) = size, room
    return max(1, min(width, columns, 2 * max(1, lines - _LINES_BESIDE) * width // height))


def _cannot() -> str:
    """Why nothing can be shown; "" where it can."""
    if not console.out.is_terminal or console.out.is_dumb_terminal:
        return "stdout is no terminal"
    if console.out.no_color:
        return "NO_COLOR is set"
    try:
        # It is asked by way of stdin; and what a process in the background asks would stop it.
        if not sys.__stdin__ or not sys.__stdin__.isatty() or not sys.__stdout__ or not sys.__stdout__.isatty():
            return "stdin is no terminal"
        if hasattr(os, "tcgetpgrp") and os.tcgetpgrp(sys.__stdin__.fileno()) != os.getpgrp():
            return "it runs in the background"
        if not all(os.get_terminal_size(sys.__stdout__.fileno())):
            return "the terminal does not tell its size"
    except (OSError, ValueError):
        return "stdin is no terminal"
    return ""
