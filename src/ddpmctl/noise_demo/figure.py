"""A figure of small pictures: columns with headings, rows with titles, lines of text below each picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ddpmctl import plot
from ddpmctl.images import flat
from ddpmctl.parsing import shown

MARGIN, GAP = 24, 12
_TEXT, _TITLE = 13, 15
_LINE, _TITLE_LINE = 18, 28
_INK, _SOFT, _EDGE = "#111111", "#555555", "#cccccc"
_WIDEST = "SNR −88.8 dB"

_PLAIN = str.maketrans({"ᾱ": "abar", "−": "-", "∞": "infinite", "₀": "0", "…": "..."})


class Cell(NamedTuple):
    """A picture (None leaves the place empty) and the lines below it."""

    image: Image.Image | None
    lines: Sequence[str] = ()


class Row(NamedTuple):
    """Cells side by side under a title; ``colour`` puts a dash of it before the title."""

    title: str
    cells: Sequence[Cell]
    colour: str | None = None


class Heading(NamedTuple):
    """What stands above a column."""

    text: str
    colour: str | None = None


Panel = Callable[[int], Image.Image]
"""Makes a picture for the foot of the figure, as wide as it is told in pixels."""


def draw(headings: Sequence[Heading], rows: Sequence[Row], panel: Panel | None = None, title: str = "") -> Image.Image:
    """The figure, RGB on white. Its size follows from pictures, headings, titles and the number of lines."""
    labels = [text_width(_WIDEST)] + [text_width(heading.text) + 44 * bool(heading.colour) for heading in headings]
    column = max(labels + [cell.image.width for row in rows for cell in row.cells if cell.image])
    titles = max([text_width(row.title, _TITLE) + 24 for row in rows] + [text_width(title, _TITLE)])
    content = len(headings) * (column + GAP) - GAP
    width = max(content, titles, 480 if panel else 0)
    foot = panel(width) if panel else None
    heights = [_height(row) for row in rows]
    top = MARGIN + (_TITLE_LINE if title else 0)
    height = top + _LINE + sum(heights) + (foot.height + GAP if foot else 0) + MARGIN

    page = Image.new("RGB", (width + 2 * MARGIN, height), "white")
    pen = ImageDraw.Draw(page)
    left = MARGIN + (width - content) // 2
    centres = [left + i * (column + GAP) + column // 2 for i in range(len(headings))]
    if title:
        _text(pen, (page.width // 2, MARGIN), title, "ma", _INK, _TITLE)
    y = top
    for heading, x in zip(headings, centres, strict=True):
        _text(pen, (x, y), heading.text, "ma", _INK)
        if heading.colour:
            _dash(pen, x - text_width(heading.text) // 2 - 22, y + 8, heading.colour)
    y += _LINE
    for row, row_height in zip(rows, heights, strict=True):
        _row(page, row, centres, left, y)
        y += row_height
    if foot:
        page.paste(foot, (MARGIN, y + GAP))
    return page


def _row(page: Image.Image, row: Row, centres: Sequence[int], left: int, y: int) -> None:
    pen = ImageDraw.Draw(page)
    if row.title:
        if row.colour:
            _dash(pen, left, y + 16, row.colour)
        _text(pen, (left + (24 if row.colour else 0), y + 6), row.title, "la", _INK, _TITLE)
        y += _TITLE_LINE
    below = y + _tallest(row) + 5
    for cell, x in zip(row.cells, centres, strict=True):
        if cell.image:
            corner = (x - cell.image.width // 2, y + 1)
            page.paste(flat(cell.image), corner)
            far = (corner[0] + cell.image.width, corner[1] + cell.image.height)
            pen.rectangle((corner[0] - 1, corner[1] - 1, *far), outline=_EDGE)
        for i, line in enumerate(cell.lines):
            _text(pen, (x, below + i * _LINE), line, "ma", _SOFT)


def _height(row: Row) -> int:
    lines = max(len(cell.lines) for cell in row.cells)
    return (_TITLE_LINE if row.title else 0) + _tallest(row) + 8 + lines * _LINE + GAP // 2


def _tallest(row: Row) -> int:
    return max((cell.image.height for cell in row.cells if cell.image), default=0)


def text_width(text: str, size: int = _TEXT) -> int:
    """Width of a line in pixels."""
    return round(font(size).getlength(spelled(text)))


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, which comes with matplotlib and has the symbols; Pillow's own font where it is missing."""
    file = _dejavu()
    return ImageFont.truetype(str(file), size) if file else ImageFont.load_default(size)


@cache
def _dejavu() -> Path | None:
    if not plot.available():
        return None
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return file if file.is_file() else None


def spelled(text: str) -> str:
    """``text`` as it is drawn: one line, and where the font has no letter, another spelling or a question mark."""
    text = shown(text) if _dejavu() else shown(text).translate(_PLAIN)
    return "".join(char if _has(char) else "?" for char in text)


def legible(text: str) -> bool:
    """Whether the font has all letters of ``text``."""
    return all(map(_has, shown(text)))


@cache
def _has(char: str) -> bool:
    face = font(_TEXT)
    try:
        mask, missing = face.getmask(char), face.getmask("\U0010ffff")  # of which no font has a letter
    except UnicodeEncodeError:  # Pillow's font of pixels
        return False
    return mask.size != missing.size or bytes(mask) != bytes(missing)


def _text(pen: ImageDraw.ImageDraw, xy: tuple[int, int], text: str, anchor: str, fill: str, size: int = _TEXT) -> None:
    pen.text(xy, spelled(text), fill=fill, font=font(size), anchor=anchor)


def _dash(pen: ImageDraw.ImageDraw, x: int, y: int, colour: str) -> None:
    pen.rounded_rectangle((x, y - 2, x + 16, y + 1), 1, fill=colour)
