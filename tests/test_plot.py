"""Plots: drawn, well-behaved without matplotlib, and free of global state."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from ddpmctl import plot
from ddpmctl.errors import ConfigError, OutputError

needs_matplotlib = pytest.mark.skipif(not plot.available(), reason="matplotlib is an extra")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plot.available()
    for draw in (
        lambda: plot.loss_curve(tmp_path / "a.png", [(1, 1.0)]),
        lambda: plot.snr_panel({"a": [1.0, 2.0]}, [0], (300, 200)),
    ):
        with pytest.raises(ConfigError) as caught:
            draw()
        assert "ddpmctl[plot]" in caught.value.advice
    assert not list(tmp_path.iterdir())


def test_importing_the_module_imports_neither_matplotlib_nor_torch() -> None:
    code = "import sys, ddpmctl.plot; sys.exit(bool({'matplotlib', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_smoothing_averages_without_lag() -> None:
    assert plot._smoothed([4, 2, 0, 6], 1) == [4, 2, 0, 6]
    bump = plot._smoothed([0.0] * 20 + [1.0] + [0.0] * 20, 5)
    assert bump.index(max(bump)) == 20
    assert max(bump) < 0.5
    assert plot._smoothed([3.0] * 50, 7) == pytest.approx([3.0] * 50)
    assert plot._smoothed([1.0, 1e20, *[1.0] * 300], 2)[-1] == pytest.approx(1.0)
    assert plot._smoothed([], 3) == []


@needs_matplotlib
@pytest.mark.parametrize(
    "losses",
    [
        [], [0.5], [0.5, 0.4, 0.3], [1.0, math.nan, math.inf, 0.001], [0.0] * 5, [-1.0, 1.0],
        [2.0**-i for i in range(20_000)],
    ],
    ids=["none", "one", "few", "not finite", "zero", "negative", "very many"],
)  # fmt: skip
def test_any_history_can_be_drawn(tmp_path: Path, losses: list[float]) -> None:
    plot.loss_curve(tmp_path / "new" / "loss.png", list(enumerate(losses)))
    with Image.open(tmp_path / "new" / "loss.png") as image:
        assert image.size == (800, 450)
    assert len(list((tmp_path / "new").iterdir())) == 1
    assert "matplotlib.pyplot" not in sys.modules


@needs_matplotlib
@pytest.mark.parametrize(("last", "scale"), [(0.2, "linear"), (0.05, "log")])
def test_the_loss_axis_is_logarithmic_where_the_range_calls_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: float, scale: str
) -> None:
    figure, axes = plot._figure((400, 300))
    monkeypatch.setattr(plot, "_figure", lambda size: (figure, axes))
    losses = [1.0] * 100 + [math.nan] + [last] * 100
    plot.loss_curve(tmp_path / "loss.png", list(enumerate(losses)))
    assert axes.get_yscale() == scale
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")
    assert list(axes.lines[0].get_xdata()) == [s for s in range(201) if s != 100]
    assert list(axes.lines[0].get_ydata()) == [1.0] * 100 + [last] * 100


@needs_matplotlib
def test_a_loss_curve_that_cannot_be_written_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        plot.loss_curve(tmp_path, [(1, 1.0), (2, 0.5)])
    assert str(tmp_path) in caught.value.problem


@needs_matplotlib
def test_snr_panel_has_the_size_and_a_colour_for_each_curve() -> None:
    curves = {"a": [math.inf, 20.0, 0.0, -50.0], "b": [math.inf, 30.0, 10.0, -300.0]}
    panel = plot.snr_panel(curves, [0, 1, 3], (480, 240))
    assert (panel.size, panel.mode) == ((480, 240), "RGB")
    array = np.asarray(panel).reshape(-1, 3)
    assert (array[0] == 255).all()
    for colour in plot.COLOURS[:2]:
        assert (array == ImageColor.getrgb(colour)).all(axis=1).any()
    assert not (array == ImageColor.getrgb(plot.COLOURS[2])).all(axis=1).any()


@needs_matplotlib
def test_same_curve_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot.loss_curve(tmp_path / name, [(1, 1.0), (2, 0.5), (3, 0.4)])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
