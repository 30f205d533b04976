"""A grid with a row for each class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ddpmctl.images import grid
from ddpmctl.noise_demo.figure import legible, spelled
from ddpmctl.sheet import LONGEST_TITLE, in_rows, titled, titles_of


@pytest.mark.parametrize(("n", "rows"), [(12, 3), (11, 3), (10, 3), (3, 3), (5, 1), (7, 7)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_image_is_in_its_row_in_turn(n, rows, channels):
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, channels, 2, 2)
    cells = in_rows(images, rows).reshape(rows, -1, channels, 2, 2)
    assert cells.shape[1] == -(-n // rows)
    for i in range(n):
        assert bool((cells[i % rows, i // rows] == i).all())
    blank = torch.tensor([255, 255, 255, 0] if channels == 4 else [255] * channels, dtype=torch.uint8)
    for row in range(rows):
        for column in range(len(range(row, n, rows)), cells.shape[1]):
            assert torch.equal(cells[row, column], blank.view(-1, 1, 1).expand(-1, 2, 2))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_titles_stand_on_the_left_and_leave_the_pixels_alone(channels):
    images = torch.randint(0, 256, (6, channels, 20, 20), dtype=torch.uint8)
    plain = grid(images, columns=3)
    page = titled(plain, ["cats", "a dog"])
    assert page.mode == plain.mode and page.height == plain.height
    margin = page.width - plain.width
    assert np.array_equal(np.asarray(page)[:, margin:], np.asarray(plain))
    ink = np.asarray(page.convert("L"))[:, :margin] < 128
    half = page.height // 2
    assert ink[:half].any() and ink[half:].any() and not ink[:, :5].all()


def test_a_long_title_is_cut():
    widths = [titled(Image.new("L", (9, 9)), ["x" * n]).width for n in (LONGEST_TITLE, LONGEST_TITLE + 1, 1000)]
    assert widths[1] == widths[2] <= widths[0]


@pytest.mark.parametrize("matplotlib", [True, False])
def test_letters_that_the_font_lacks_are_no_boxes(matplotlib, monkeypatch):
    """With the font of matplotlib, and with Pillow's own; what is drawn for a letter beyond Unicode's is that for none."""
    from ddpmctl.noise_demo import figure

    for cached in (figure.font, figure._has, figure._dejavu):
        cached.cache_clear()
    if matplotlib:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setattr(figure.plot, "available", lambda: False)
    try:
        assert legible("cats & dogs 12_x-y.z") and not legible("cat 猫")
        assert legible("кошки, ψυχή") == matplotlib
        assert titles_of(["cat", "猫", "犬 dog", "a\nb"]) == ["cat", "class 1", "class 2", "a\nb"]
        assert spelled("cat 猫 by 犬") == "cat ? by ?" and spelled("a\nb\x1b[31m") == r"a\nb\x1b[31m"
        plain = Image.new("RGB", (30, 40))
        assert titled(plain, ["猫", "a\tb"]).tobytes() == titled(plain, ["?", r"a\tb"]).tobytes()
    finally:
        for cached in (figure.font, figure._has, figure._dejavu):
            cached.cache_clear()
