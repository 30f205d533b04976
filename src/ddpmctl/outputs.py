"""Where samples go: a grid, a file each, an animation, or an array, by the ending of the path."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ddpmctl.errors import ConfigError, OutputError
from ddpmctl.files import check_place
from ddpmctl.images import enlarged, grid, grid_columns, grid_size, read_provenance, save_gif, save_png, to_pil
from ddpmctl.npz import NpzWriter
from ddpmctl.parsing import SLASHES
from ddpmctl.sheet import in_rows, titled

GIF_FRAMES = 40
GIF_WIDTH = 320
FILM_FPS = 10.0
FILM_REST = 6
"""Frames that the first and the last image of a film stay for."""

LONGEST_SIDE = 65_535
"""Pixels along a side of a picture: a GIF cannot have more, and few programs show more."""

MOST_PIXELS = 2**27
"""Pixels of a grid, 11,585 each way. Larger ones take gigabytes to make, and Pillow refuses to open them."""

MOST_GIF_PIXELS = 2**28
"""Pixels of all frames of an animation together, which are in memory at once."""


class Job(NamedTuple):
    """What is about to be made: ``n`` images of ``shape`` (C, H, W) in ``steps`` steps each, and how.

    ``flag``: the one that says how many, for errors. ``rows``: titles of the rows of a grid; image i goes into row i
    modulo their number.
    """

    path: Path
    n: int
    shape: tuple[int, int, int]
    steps: int
    made_with: dict[str, Any]
    columns: int | None = None
    scale: int | None = None
    flag: str = "-n"
    rows: Sequence[str] = ()

    def cells(self) -> int:
        """Images of the grid, with the blank ones at the ends of its rows."""
        return -(-self.n // len(self.rows)) * len(self.rows) if self.rows else self.n

    def wide(self) -> int | None:
        """Images in a row of the grid; None: as makes it near-square."""
        return -(-self.n // len(self.rows)) if self.rows else self.columns


class Sink:
    """Takes finished images, and states on the way where it ``wants_states``; complete when its block ends well.

    ``titled``: its rows may have titles. ``shaped_by``: the flags that say how it looks.
    """

    wants_states = titled = False
    shaped_by: Sequence[str] = ()

    def __init__(self, job: Job) -> None:
        self.job = job
        self.check()
        self.pictures = torch.zeros(self.kept(job), dtype=torch.uint8)

    def check(self) -> None:
        """Raise a :class:`DdpmctlError` for an output too large to be made."""

    def kept(self, job: Job) -> tuple[int, ...]:
        """Shape of what is held in memory until the end."""
        return (0,)

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()

    def add_images(self, images: range, pixels: Tensor) -> None:
        """Finished images ``images``, uint8 (B, C, H, W)."""

    def add_state(self, images: range, left: int, pixels: Tensor) -> None:
        """The same images with ``left`` steps to go."""

    def finish(self) -> None:
        """Write what is still to be written."""


class GridSink(Sink):
    """One PNG with all images."""

    titled = True
    shaped_by: Sequence[str] = ("--columns", "--scale")

    def check(self) -> None:
        _check_grid(self.job, MOST_PIXELS)

    def kept(self, job: Job) -> tuple[int, ...]:
        return (job.n, *job.shape)

    def add_images(self, images: range, pixels: Tensor) -> None:
        self.pictures[images.start : images.stop] = pixels.cpu()

    def finish(self) -> None:
        job = self.job
        save_png(job.path, _finished(_grid(self.pictures, job), job.scale or 1, job), job.made_with)


class GifSink(Sink):
    """The grid on its way from noise to images, at most :data:`GIF_FRAMES` steps of it."""

    wants_states = titled = True
    shaped_by: Sequence[str] = ("--columns", "--scale")

    def __init__(self, job: Job) -> None:
        count = min(job.steps, GIF_FRAMES)
        self.frame_of = {job.steps - round(i * job.steps / count): i for i in range(count + 1)}
        super().__init__(job)

    def check(self) -> None:
        _check_grid(self.job, MOST_GIF_PIXELS // len(self.frame_of))

    def kept(self, job: Job) -> tuple[int, ...]:
        return (len(self.frame_of), job.n, *job.shape)

    def add_state(self, images: range, left: int, pixels: Tensor) -> None:
        if left in self.frame_of:
            self.pictures[self.frame_of[left], images.start : images.stop] = pixels.cpu()

    def finish(self) -> None:
        job = self.job
        frames = [_grid(state, job) for state in self.pictures]
        # Noise does not compress: an animation of a few hundred pixels is a megabyte.
        scale = job.scale or max(1, GIF_WIDTH // max(frames[0].size))
        frames = [_finished(frame, scale, job) for frame in frames]
        save_gif(job.path, frames, fps=15, hold_last=2.5, provenance=job.made_with)


class FilmSink(GridSink):
    """The images one after another, forth and back, with a rest at either end."""

    shaped_by: Sequence[str] = ("--scale",)

    def check(self) -> None:
        job, (height, width) = self.job, self.job.shape[1:]
        side = math.isqrt(MOST_GIF_PIXELS // (2 * job.n * height * width))
        if not side:
            raise ConfigError(f"{job.flag} {job.n:,}: an animation too large to be made", f"lower {job.flag}")
        if (job.scale or 1) > (most := min(side, LONGEST_SIDE // max(height, width))):
            raise ConfigError(f"--scale {job.scale}: an animation too large to be made", f"give --scale {most} or less")

    def finish(self) -> None:
        job = self.job
        scale = job.scale or max(1, GIF_WIDTH // max(job.shape[1:]))
        first, *inner, last = (enlarged(to_pil(image), scale) for image in self.pictures)
        # Equal frames in a row become one that lasts as long.
        frames = [first] * FILM_REST + inner + [last] * FILM_REST + inner[::-1]
        save_gif(job.path, frames, fps=FILM_FPS, hold_last=1 / FILM_FPS, provenance=job.made_with)


class NpzSink(Sink):
    """uint8 (N, H, W, C) under the key ``images``; memory does not grow with N."""

    def check(self) -> None:
        job = self.job
        need = job.n * math.prod(job.shape)
        place = next(folder for folder in job.path.absolute().parents if folder.exists())
        free = shutil.disk_usage(place).free
        if need > free:
            raise OutputError(
                f"{job.path}: {job.flag} {job.n:,} makes {need / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free",
                f"lower {job.flag}, free space, or write elsewhere",
            )

    def __enter__(self) -> Sink:
        channels, height, width = self.job.shape
        self.writer = NpzWriter(self.job.path, self.job.n, (height, width, channels))
        self.writer.__enter__()
        return self

    def add_images(self, images: range, pixels: Tensor) -> None:
        self.writer.write(pixels)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.__exit__(kind, error, trace)


class FolderSink(Sink):
    """A PNG for each image, named by its number; written as they are finished."""

    def __enter__(self) -> Sink:
        self.stale = {file.name: file for file in _numbered(self.job.path)}
        return self

    def add_images(self, images: range, pixels: Tensor) -> None:
        for i, image in zip(images, pixels, strict=True):
            save_png(self.job.path / f"{i:05d}.png", to_pil(image), {**self.job.made_with, "image": i})
            self.stale.pop(f"{i:05d}.png", None)

    def finish(self) -> None:
        for file in self.stale.values():
            file.unlink(missing_ok=True)


SINKS: dict[str, type[Sink]] = {
    ".png": GridSink,
    ".gif": GifSink,
    ".npz": NpzSink,
    "": FolderSink,
}

FILM_SINKS: dict[str, type[Sink]] = {**SINKS, ".gif": FilmSink}
"""For images that belong one after another."""


def choose_output(
    out: str | Path | None, *, overwrite: bool, sinks: dict[str, type[Sink]] = SINKS
) -> tuple[Path, type[Sink]]:
    """Path and kind of the output, one of ``sinks``; without one, the first free ``samples-K.png``. ``new.v2/`` is a folder.

    Raises :class:`ConfigError` for an unknown ending, :class:`OutputError` for a place that is taken.
    """
    if out is None:
        out = next(p for i in range(10**9) if not (p := Path(f"samples-{i}.png")).exists())
    path = Path(out)
    kind = sinks.get("" if path.is_dir() or str(out).endswith(SLASHES) else path.suffix.lower())
    if kind is None:
        raise ConfigError(f"-o {out}: unknown ending '{path.suffix}'", f"use .png, .gif, .npz, or a folder: -o {out}/")
    if kind is FolderSink and path.exists() and not path.is_dir():
        raise OutputError(f"{path}: a file, where a folder is to be", "choose another name, or one with .png, .gif or .npz")
    taken = any(path.iterdir()) if path.is_dir() else path.exists()
    if taken and not overwrite:
        what = "exists and is not empty" if path.is_dir() else "exists"
        raise OutputError(f"{path}: {what}", "choose another name, or add --overwrite")
    check_place(path)
    return path, kind


def check_shape(path: Path, kind: type[Sink], given: dict[str, int | None]) -> None:
    """Flag -> how the output ``path`` is to look; raises :class:`ConfigError` for one that its ``kind`` does not go by."""
    for flag, value in given.items():
        if value is not None and flag not in kind.shaped_by:
            of = "an animation of one image after another" if kind is FilmSink else "images as they are, and no grid"
            raise ConfigError(f"{flag} {value}: {path} holds {of}", f"leave {flag} out, or use -o x.png")


def _grid(pictures: Tensor, job: Job) -> Image.Image:
    """The images of ``job``, uint8 (N, C, H, W), as one picture."""
    return grid(in_rows(pictures, len(job.rows)) if job.rows else pictures, columns=job.wide())


def _finished(picture: Image.Image, scale: int, job: Job) -> Image.Image:
    """The grid enlarged, with the titles of its rows where it has any."""
    picture = enlarged(picture, scale)
    return titled(picture, job.rows) if job.rows else picture


def _check_grid(job: Job, most: int) -> None:
    """Raise :class:`ConfigError` that names the flag which makes a grid larger than ``most`` pixels."""

    def largest(columns: int | None) -> int:
        """The largest scale that fits; 0 where none does."""
        size = grid_size(job.cells(), *job.shape[1:], columns)
        return min(math.isqrt(most // math.prod(size)), LONGEST_SIDE // max(size))

    scale, fitting = job.scale or 1, largest(job.wide())
    if scale <= fitting:
        return
    if fitting:
        flag, advice = f"--scale {scale}", f"give --scale {fitting} or less"
    elif scale <= largest(None):
        flag, advice = f"{job.wide()} columns", f"give --columns {grid_columns(job.n, *job.shape[1:])}"
    else:
        flag, advice = f"{job.flag} {job.n:,}", f"lower {job.flag}, or use -o folder/ or an .npz, which hold any number"
    height, width = (side * scale for side in grid_size(job.cells(), *job.shape[1:], job.wide()))
    raise ConfigError(f"{flag}: a picture of {width:,} x {height:,} pixels is too large to be made", advice)


def _numbered(folder: Path) -> Iterable[Path]:
    """Images of an earlier sample in ``folder``; raises :class:`OutputError` for a numbered picture that is not ours."""
    found = [file for file in folder.glob("*.png") if re.fullmatch(r"\d{5,}", file.stem)] if folder.is_dir() else []
    for file in found:
        if read_provenance(file) is None:
            raise OutputError(f"{file}: not made by ddpmctl, so not replaced", "choose another folder")
    return found
