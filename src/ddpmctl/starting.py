"""What a sample begins with: pure noise, or pictures that flags of ``ddpmctl sample`` name, or arguments of ``Model.sample``.

Each kind is a :class:`Beginning`: its flags are checked and its files read before anything else is done, and once the
model is known it says which :class:`ddpmctl.editing.Course` the sample takes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpmctl.checks import check_counts
from ddpmctl.errors import ConfigError, DataError
from ddpmctl.plans import INPAINTING, INTERPOLATION, Plan

if TYPE_CHECKING:
    from torch import Tensor

    from ddpmctl.data.picture import Picture
    from ddpmctl.data.report import Progress
    from ddpmctl.editing import Course
    from ddpmctl.outputs import Sink
    from ddpmctl.sampling import Model

IMAGES, FRAMES, STRENGTH, RESAMPLE = 64, 9, 0.6, 5
"""What -n, --frames, --strength and --resample are where they are not given."""

_MOST_IMAGES = 10_000_000
_MOST_FRAMES = 1000
_MOST_RESAMPLE = 1000


class Beginning:
    """Pure noise; the others say in what they differ.

    ``flag``: theirs. ``counted``: the flag that says how many images. ``rows``: the plans to choose from; None: all.
    """

    flag, counted = "", "-n"
    rows: dict[str, Plan] | None = None

    def __init__(self, n: int | None) -> None:
        """Raises :class:`ConfigError` for flags out of range, as the others do, and :class:`DataError` for bad files."""
        check_counts({"-n": n})
        self.n = IMAGES if n is None else n
        if self.n > _MOST_IMAGES:
            raise ConfigError(
                f"-n {n:,}: at most {_MOST_IMAGES:,} at once", "make them in parts, with another --seed each"
            )

    def sinks(self) -> dict[str, type[Sink]]:
        """The kinds of output."""
        from ddpmctl.outputs import SINKS

        return SINKS

    def check(self, way: Plan, quality: str | None, eta: float | None) -> None:
        """Raise :class:`ConfigError` for a plan that does not go with it."""
        if self.rows and way.sampler not in self.rows:
            # It came from one of the two flags; without them the plan is one of the rows.
            named = f"--quality {quality}, which is {way.sampler}" if quality else f"--sampler {way.sampler}"
            raise ConfigError(f"{named}: not with {self.flag}", f"use --sampler {' or '.join(self.rows)}")

    def facts(self) -> dict[str, Any]:
        """What the provenance of an image says of it."""
        return {"n": self.n}

    def told(self) -> str:
        """What the first line of the output says of it."""
        return ""

    def columns(self) -> int | None:
        """Images in a row of the grid, where the flag does not say."""
        return None

    def course(self, model: Model, labels: list[int] | None, warn: Callable[[str], object]) -> Course:
        """The way that the sample takes; ``warn`` is told what may not be meant."""
        from ddpmctl.editing import FROM_NOISE

        return FROM_NOISE

    def ready(self, course: Course, model: Model, grid: list[int], labels: list[int] | None, progress: Progress) -> Course:
        """That way once what takes time is done, which is after all else has been checked."""
        return course


class FromPicture(Beginning):
    """``--init``: variations of a picture."""

    flag = "--init"

    def __init__(self, n: int | None, init: Path, strength: float | None) -> None:
        super().__init__(n)
        self.strength = STRENGTH if strength is None else strength
        if not 0 < self.strength <= 1:
            raise ConfigError(f"--strength {strength}: must be above 0, and at most 1", "0.3 changes little, 0.8 much")
        self.picture = _read(init)

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "init": str(self.picture.path), "strength": self.strength}

    def told(self) -> str:
        return f" from {self.picture.path} at strength {self.strength:g},"

    def course(self, model: Model, labels: list[int] | None, warn: Callable[[str], object]) -> Course:
        from ddpmctl.editing import Start

        return Start(_fitted(self.picture, model), self.strength)


class Inpainting(Beginning):
    """``--inpaint``: a part of a picture drawn anew."""

    flag = "--inpaint"
    rows = INPAINTING

    def __init__(self, n: int | None, inpaint: Path, mask: Path | None, resample: int | None) -> None:
        super().__init__(n)
        if mask is None:
            raise ConfigError(f"--inpaint {inpaint}: what is to be drawn anew?",
                              "add --mask M.png: white is drawn anew, black is kept")  # fmt: skip
        self.resample = RESAMPLE if resample is None else resample
        if not 1 <= self.resample <= _MOST_RESAMPLE:
            raise ConfigError(f"--resample {resample}: must be 1 to {_MOST_RESAMPLE}", "10 is what the paper takes")
        self.picture, self.mask = _read(inpaint), _read(mask)

    def facts(self) -> dict[str, Any]:
        names = {"inpaint": str(self.picture.path), "mask": str(self.mask.path)}
        return {**super().facts(), **names, "resample": self.resample}

    def told(self) -> str:
        return f" the white of {self.mask.path} in {self.picture.path}, each step {self.resample} times,"

    def course(self, model: Model, labels: list[int] | None, warn: Callable[[str], object]) -> Course:
        from ddpmctl.editing import Inpaint

        size = model.image_shape[1:]
        anew = self.mask.mask(size, self.picture.probe.size, fit=model.config.data.fit)
        if not anew.any():
            raise DataError(f"{self.mask.path}: nothing of it is white in {size[0]}x{size[1]} pixels, so nothing would be drawn",
                            "make white what is to be drawn anew, and black what is kept")  # fmt: skip
        if anew.all():
            warn(f"{self.mask.path}: all of it is white, so nothing of {self.picture.path} is kept")
        return Inpaint(_fitted(self.picture, model), anew, self.resample)


class Interpolation(Beginning):
    """``--interpolate``: the way from one picture to another."""

    flag, counted = "--interpolate", "--frames"
    rows = INTERPOLATION

    def __init__(self, n: int | None, pair: tuple[Path, Path], frames: int | None) -> None:
        if n is not None:
            raise ConfigError(f"-n {n}: not with --interpolate", "leave it out; --frames says how many images")
        self.n = FRAMES if frames is None else frames
        if not 2 <= self.n <= _MOST_FRAMES:
            raise ConfigError(f"--frames {frames}: must be 2 to {_MOST_FRAMES}", "the two pictures are among them")
        self.pair = [_read(path) for path in pair]

    def sinks(self) -> dict[str, type[Sink]]:
        from ddpmctl.outputs import FILM_SINKS

        return FILM_SINKS

    def check(self, way: Plan, quality: str | None, eta: float | None) -> None:
        super().check(way, quality, eta)
        if eta:
            raise ConfigError(f"--eta {eta}: not with --interpolate, whose pictures noise would change", "leave it out")

    def facts(self) -> dict[str, Any]:
        return {"interpolate": [str(picture.path) for picture in self.pair], "frames": self.n}

    def told(self) -> str:
        return " from {} to {},".format(*(picture.path for picture in self.pair))

    def columns(self) -> int | None:
        return self.n

    def course(self, model: Model, labels: list[int] | None, warn: Callable[[str], object]) -> Course:
        if labels is not None and len(set(labels)) > 1:
            raise ConfigError("--interpolate: the model draws several classes, and both pictures are to be of one",
                              f"name it with --class: {', '.join(model.class_names)}")  # fmt: skip
        return super().course(model, labels, warn)

    def ready(self, course: Course, model: Model, grid: list[int], labels: list[int] | None, progress: Progress) -> Course:
        from ddpmctl.editing import frames_between

        done, total = count(1), 2 * (len(grid) - 1)
        a, b = (_encoded(picture, model, grid, labels, lambda: progress(next(done), total)) for picture in self.pair)
        return frames_between(a, b, self.n)


def beginning(
    n: int | None, *, init: Path | None, strength: float | None, inpaint: Path | None, mask: Path | None,
    resample: int | None, interpolate: tuple[Path, Path] | None, frames: int | None,
) -> Beginning:  # fmt: skip
    """What the flags ask for; raises :class:`ConfigError` for two at once, and for flags of one that is not asked for."""
    asked = {"--init": init, "--inpaint": inpaint, "--interpolate": interpolate}
    names = [flag for flag, value in asked.items() if value is not None]
    if len(names) > 1:
        raise ConfigError(f"{names[1]}: not with {names[0]}", "leave one of the two out")
    for flag, value, needed in (
        ("--strength", strength, "--init"), ("--mask", mask, "--inpaint"), ("--resample", resample, "--inpaint"),
        ("--frames", frames, "--interpolate"),
    ):  # fmt: skip
        if value is not None and needed not in names:
            why = "there is no picture to change" if needed == "--init" else f"goes with {needed} only"
            raise ConfigError(f"{flag} {value}: {why}", f"add {needed}, or leave {flag} out")
    if init is not None:
        return FromPicture(n, init, strength)
    if inpaint is not None:
        return Inpainting(n, inpaint, mask, resample)
    return Interpolation(n, interpolate, frames) if interpolate is not None else Beginning(n)


def _read(path: Path) -> Picture:
    from ddpmctl.data.picture import Picture

    return Picture(path)


def _fitted(picture: Picture, model: Model) -> Tensor:
    """The picture as the model's own images are, of their size, channels and fit: (C, H, W) in [-1, 1]."""
    from ddpmctl.images import from_uint8

    channels, height, width = model.image_shape
    data = model.config.data
    return from_uint8(picture.pixels((height, width), channels, fit=data.fit, background=data.background))


def _encoded(
    picture: Picture, model: Model, grid: list[int], labels: list[int] | None, on_step: Callable[[], object]
) -> Tensor:
    """The noise of a picture, (C, H, W)."""
    import torch

    from ddpmctl.editing import encoded

    pixels = _fitted(picture, model).unsqueeze(0).to(model.device)
    label = torch.tensor(labels[:1], device=model.device) if labels is not None else None
    return encoded(model.denoiser, pixels, grid, label, on_step)[0]
