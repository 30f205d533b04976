"""Plots, drawn with matplotlib where it is installed: ``pip install 'ddpmctl[plot]'``."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpmctl.errors import ConfigError, OutputError
from ddpmctl.files import output_errors, replacing

if TYPE_CHECKING:
    from PIL import Image

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""One colour a curve, told apart by colour-blind readers too (Okabe & Ito 2008)."""

MISSING = "matplotlib is not installed"
REMEDY = "pip install 'ddpmctl[plot]'"

_DPI = 100
_MAX_POINTS = 4000
_INK, _EDGE, _FAINT = "#222222", "#cccccc", "#e2e2e2"


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def loss_curve(
    path: Path,
    points: Sequence[tuple[float, float]],
    held_out: Sequence[tuple[float, float]] = (),
    *,
    title: str = "Training loss",
    smoothing: float = 0.02,
) -> None:
    """Write a PNG of the loss against the step: every value light, the smoothed curve strong, ``held_out`` as dots.

    ``points`` and ``held_out`` are (step, loss). ``smoothing`` is the share of the run that is averaged, at least a few
    values. The loss axis is logarithmic where the smoothed curve spans more than a factor of ten; values that are not
    finite are left out. Raises :class:`ddpmctl.errors.ConfigError` when matplotlib is missing,
    :class:`ddpmctl.errors.OutputError` when the file cannot be written.
    """
    figure, axes = _figure((800, 450))
    points = [(s, v) for s, v in points if math.isfinite(v)]
    smooth = _smoothed([v for _, v in points], max(min(5, len(points)), round(len(points) * smoothing)))
    # A line of many thousand jumps is a solid block, and too much for the renderer.
    every = max(1, math.ceil(len(points) / _MAX_POINTS))
    shown_steps, shown = [s for s, _ in points[::every]], [v for _, v in points[::every]]
    axes.plot(shown_steps, shown, color=COLOURS[0], alpha=0.3, lw=0.8, label="each value")
    marker = "o" if len(points) == 1 else ""
    axes.plot(shown_steps, smooth[::every], color=COLOURS[0], lw=1.8, marker=marker, label="smoothed")
    held_out = [(s, v) for s, v in held_out if math.isfinite(v)]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=COLOURS[1], lw=1.2, marker="o", ms=4, label="held out: averaged weights, unweighted loss")
    low, high = min(smooth, default=1), max(smooth, default=1)
    if low > 0 and high > 10 * low:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss", title=title)
    if points:
        axes.legend(frameon=False, loc="upper right")
    with output_errors(path), replacing(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def metrics_curve(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """:func:`loss_curve` of rows of ``metrics.csv``; raises :class:`ddpmctl.errors.OutputError`, whatever goes wrong.

    A picture is worth no run: neither what matplotlib runs into nor a damaged table ends one.
    """
    try:
        points = [(int(row["step"]), float(row["loss"])) for row in rows]
        held_out = [(int(row["step"]), float(row["val_loss"])) for row in rows if row["val_loss"]]
        loss_curve(path, points, held_out)
    except (ImportError, RuntimeError, ValueError, MemoryError, OSError, TypeError, AttributeError, ArithmeticError) as error:
        raise OutputError(f"{path}: cannot be drawn: {error}") from error


def snr_panel(
    curves: dict[str, list[float]],
    marks: Sequence[int],
    size_px: tuple[int, int],
    *,
    floor: float = -60.0,
    ceiling: float = 40.0,
) -> Image.Image:
    """SNR in dB against t = 0..T: a line for each of ``curves``, dots at the levels ``marks``.

    ``curves``: name -> T + 1 values, infinite ones allowed; what is outside ``floor``..``ceiling`` is not
    shown. ``size_px`` is (width, height). Raises :class:`ddpmctl.errors.ConfigError` when matplotlib is
    missing.
    """
    from PIL import Image

    figure, axes = _figure(size_px)
    for mark in marks:
        axes.axvline(mark, color=_EDGE, lw=0.8, zorder=0)
    axes.axhline(0, color=_INK, lw=0.8, ls=(0, (4, 3)), zorder=1)
    for (name, values), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
        axes.plot(range(len(values)), values, color=colour, lw=1.8, label=name)
        dots = [t for t in marks if floor <= values[t] <= ceiling]
        axes.plot(dots, [values[t] for t in dots], "o", color=colour, ms=4.5, mec="white", mew=0.8, zorder=3)
    last = max(len(values) for values in curves.values()) - 1
    axes.set(xlabel="t", ylabel="SNR (dB)", xlim=(-0.01 * last, 1.01 * last), ylim=(floor, ceiling))
    axes.legend(frameon=False, loc="upper right", ncols=len(curves), fontsize=9)
    canvas = figure.canvas
    canvas.draw()
    return Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def _figure(size_px: tuple[int, int]) -> tuple[Any, Any]:
    """A figure of its own, with no global state and no window, and its axes."""
    if not available():
        raise ConfigError(MISSING, REMEDY)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size_px[0] / _DPI, size_px[1] / _DPI), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(axis="y", color=_FAINT, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9)
    return figure, axes


def _smoothed(values: Sequence[float], window: int) -> list[float]:
    """Values averaged over about ``window`` neighbours: forgetting forwards, then backwards, so without lag.

    Weighted means of old and new: unlike moving sums, they carry no rounding error on from one huge value.
    """
    for _ in range(2):
        means: list[float] = []
        for i, value in enumerate(values):
            weight = max(1 / (i + 1), 2 / (window + 1))
            means.append((1 - weight) * means[-1] + weight * value if means else value)
        values = means[::-1]
    return list(values)
