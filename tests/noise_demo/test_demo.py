"""What the figure shows, pixel by pixel, and how it is laid out."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddpmctl import plot
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.images import flat, to_pil, to_uint8
from ddpmctl.noise_demo import figure
from ddpmctl.noise_demo.demo import Demo, Estimator
from ddpmctl.noise_demo.levels import level, noised

LEVELS = [0, 3, 10]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where matplotlib is not installed: no panel, Pillow's own font."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    figure.font.cache_clear()
    figure._dejavu.cache_clear()
    yield
    figure.font.cache_clear()
    figure._dejavu.cache_clear()


def make(channels: int = 3, height: int = 100, width: int = 200, names: tuple[str, ...] = ("linear", "cosine")) -> Demo:
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)
    eps = torch.randn((1, *picture.shape), generator=generator)
    return Demo(picture, eps, {name: NoiseSchedule.named(name, 10) for name in names})


def found_in(page: Image.Image, image: Image.Image) -> bool:
    """Whether ``image`` stands somewhere on the page, exactly."""
    big, small = (
        np.asarray(page.convert("RGB")).astype(int),
        np.asarray(flat(image).convert("RGB")).astype(int),
    )
    height, width = small.shape[:2]
    starts = (big[: big.shape[0] - height + 1, : big.shape[1] - width + 1] == small[0, 0]).all(axis=2)
    return any(
        (big[y, x : x + width] == small[0]).all() and (big[y : y + height, x : x + width] == small).all()
        for y, x in np.argwhere(starts)
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.usefixtures("plain")
def test_every_frame_is_on_the_page_as_it_is(channels: int) -> None:
    demo = make(channels)
    page = demo.still(LEVELS)
    for schedule in demo.schedules.values():
        for t in LEVELS:
            assert found_in(page, to_pil(to_uint8(noised(demo.picture, demo.eps, schedule, t)[0])))
    assert not found_in(page, to_pil(255 - demo.picture if channels < 4 else demo.picture.flip(1)))
    assert page.getpixel((0, 0)) == (255, 255, 255)


def test_headings_titles_and_labels_belong_to_the_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[figure.Heading], list[figure.Row]]] = []

    def draw(headings: list[figure.Heading], rows: list[figure.Row], *rest: object, **more: object) -> Image.Image:
        drawn.append((headings, rows))
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr("ddpmctl.noise_demo.demo.draw", draw)
    demo = make(1, 8, 8)
    demo.still(LEVELS)
    headings, rows = drawn[0]
    assert [heading.text for heading in headings] == ["t = 0", "t = 3", "t = 10"]
    assert [row.title for row in rows] == ["linear, T = 10", "cosine, T = 10"]
    for row, schedule in zip(rows, demo.schedules.values(), strict=True):
        assert [cell.lines for cell in row.cells] == [level(schedule, t).lines() for t in LEVELS]
    list(demo.animation([3]))
    headings, rows = drawn[1]
    assert [heading.text for heading in headings] == ["linear", "cosine"]
    assert [cell.lines for cell in rows[0].cells] == [level(s, 3).lines() for s in demo.schedules.values()]


@pytest.mark.parametrize(
    ("size", "scale"),
    [((1, 1), 160), ((28, 28), 6), ((32, 16), 5), ((64, 64), 2), ((160, 20), 1), ((500, 500), 1)],
)
def test_small_pictures_are_enlarged_by_whole_pixels(size: tuple[int, int], scale: int) -> None:
    demo = make(1, *size)
    assert demo.scale == scale
    assert demo.shown_pixels(3) == 3 * 2 * size[0] * size[1] * scale**2


@pytest.mark.usefixtures("plain")
def test_the_animation_keeps_its_size_and_shows_one_level_a_frame() -> None:
    demo = make(1, 64, 48)
    pages = list(demo.animation(LEVELS))
    assert len(pages) == len(LEVELS)
    assert len({page.size for page in pages}) == 1
    picture = to_pil(demo.picture).resize((96, 128), Image.Resampling.NEAREST)
    assert [found_in(page, picture) for page in pages] == [True, False, False]


@pytest.mark.skipif(not plot.available(), reason="matplotlib is an extra")
def test_the_panel_stands_below_and_moves_with_the_level() -> None:
    demo = make(1, 32, 32)
    pages = [np.asarray(page)[-250:] for page in demo.animation([2, 7])]
    assert pages[0].shape == pages[1].shape
    assert (pages[0] != pages[1]).any()
    assert demo.still([0, 5]).height > 200 + 2 * 160


@pytest.mark.usefixtures("plain")
def test_estimates_are_the_denoisers_x0() -> None:
    demo = make(3, 80, 160, ("linear",))
    asked: list[tuple[int, object]] = []

    def net(x: Tensor, t_index: Tensor, label: Tensor | None) -> Tensor:
        asked.append((int(t_index), label))
        return x * 0 + 0.25

    label = torch.zeros(1, dtype=torch.long)
    denoiser = Denoiser(net, demo.schedules["linear"], "x0")
    with_model = Demo(
        demo.picture,
        demo.eps,
        demo.schedules,
        Estimator(denoiser, torch.device("cpu"), label, "step.pt", "ab"),
    )
    page = with_model.still(LEVELS)
    assert [t for t, _ in asked] == [2, 9]
    assert all(given is label for _, given in asked)
    assert found_in(page, Image.new("RGB", (160, 80), (159, 159, 159)))
    assert with_model.facts()["checkpoint"] == "ab"
    assert with_model.still([0]).size[0] > 0
    assert len(list(with_model.animation([0, 10]))) == 2


@pytest.mark.usefixtures("plain")
def test_without_dejavu_no_symbol_is_missing() -> None:
    for symbol, spelled in (("ᾱ = 1", "abar = 1"), ("SNR −3.0 dB", "SNR -3.0 dB"), ("SNR ∞", "SNR infinite")):
        assert figure.spelled(symbol) == spelled
        assert spelled.isascii()


@pytest.mark.usefixtures("plain")
def test_a_long_title_widens_the_page() -> None:
    cell = figure.Cell(Image.new("L", (10, 10)))
    narrow = figure.draw([figure.Heading("t = 0")], [figure.Row("a", [cell])])
    wide = figure.draw([figure.Heading("t = 0")], [figure.Row("a" * 80, [cell])])
    assert wide.width > figure.text_width("a" * 80, 15) > narrow.width
