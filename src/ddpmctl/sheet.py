"""A grid with a row for each class, and its name beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ddpmctl.noise_demo.figure import font, legible, spelled, text_width

LONGEST_TITLE = 30
"""Letters of a title; longer ones are cut."""

_SIZE = 12


def in_rows(images: Tensor, rows: int) -> Tensor:
    """uint8 (N, C, H, W) of which image i belongs to row i modulo ``rows``, in the order of a grid of that many rows.

    Where a row has fewer than others, blank images end it: white, or in RGBA transparent.
    """
    wide = -(-len(images) // rows)
    cells = torch.full((rows * wide, *images.shape[1:]), 255, dtype=torch.uint8)
    if images.shape[1] == 4:
        cells[:, 3] = 0
    place = torch.arange(rows * wide).reshape(rows, wide).T.reshape(-1)
    cells[place[: len(images)]] = images
    return cells


def titles_of(class_names: Sequence[str]) -> list[str]:
    """A title for each class: its name, or where the font has not all of its letters its number, ``class 3``."""
    return [name if legible(name) else f"class {number}" for number, name in enumerate(class_names)]


def titled(picture: Image.Image, titles: Sequence[str]) -> Image.Image:
    """``picture`` with a title on the left of each of its rows, which are equally high."""
    lines = [spelled(title) for title in titles]
    texts = [line if len(line) <= LONGEST_TITLE else f"{line[: LONGEST_TITLE - 3]}..." for line in lines]
    margin = max(text_width(text, _SIZE) for text in texts) + 2 * _SIZE
    page = Image.new(picture.mode, (margin + picture.width, picture.height), "white")
    page.paste(picture, (margin, 0))
    pen, high = ImageDraw.Draw(page), picture.height / len(texts)
    for i, text in enumerate(texts):
        pen.text((margin - _SIZE, (i + 0.5) * high), text, fill="black", font=font(_SIZE), anchor="rm")
    return page
