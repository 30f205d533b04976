"""``ddpmctl noise-demo``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpmctl.cli import console
from ddpmctl.cli.options import Debug, Quiet, Show, choices, complete, switch, tell_model
from ddpmctl.cli.showing import shower

if TYPE_CHECKING:
    from ddpmctl.config import RunConfig
    from ddpmctl.core.schedule import NoiseSchedule
    from ddpmctl.data.picture import Picture
    from ddpmctl.noise_demo.demo import Demo, Estimator
    from ddpmctl.sampling import Model

_SCHEDULES = ("core.schedule", "SCHEDULES")
_LONGEST = 160
_MOST_PIXELS = 50_000_000
_MOST_WIDTH = 32_000
_MOST_STILL, _MOST_GIF = 100, 300  # a figure of 17,000 pixels, an animation of 12 seconds
_STILL_FRAMES, _GIF_FRAMES, _GIF_SECONDS = 9, 41, 4


def noise_demo(
    image: Annotated[Path, typer.Argument(metavar="IMG", help="The picture.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="A .png, or a .gif that goes from t = 0 to T."),
    ] = Path("noise-demo.png"),
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            metavar=choices(*_SCHEDULES),
            help="Noise schedule; repeat to compare.  [default: all]",
            autocompletion=complete(*_SCHEDULES),
        ),
    ] = None,
    timesteps: Annotated[
        str | None, typer.Option(metavar="COUNT", help="T, the number of noising steps.  [default: 1000]")
    ] = None,
    at: Annotated[str | None, typer.Option(metavar="T,T,...", help="Noise levels to show, as in 0,50,200.")] = None,
    frames: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT",
            help=f"Levels, evenly from 0 to T, at most {_MOST_STILL}, or {_MOST_GIF} in a .gif.  "
            f"[default: {_STILL_FRAMES}, or {_GIF_FRAMES} in a .gif]",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help=f"64 or 48x64 (height x width), cropped.  [default: as it is, at most {_LONGEST} pixels]",
        ),
    ] = None,
    seed: Annotated[str | None, typer.Option(metavar="COUNT", help="Which noise.  [default: 0]")] = None,
    ckpt: Annotated[
        Path | None,
        typer.Option(
            metavar="CKPT",
            help="Checkpoint or run folder: take its schedule and size, and show its estimate of the picture "
            "at each level.",
        ),
    ] = None,
    class_name: Annotated[
        str | None,
        typer.Option(
            "--class", metavar="NAME", help="Class that the checkpoint takes the picture for.  [default: its first]"
        ),
    ] = None,
    show: Show = False,
    overwrite: Annotated[bool, switch("--overwrite", "Replace FILE.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Show how noise takes over a picture, level by level.

    Below each frame stand abar, the share of the picture's variance that is left, and the signal-to-noise
    ratio. All frames have the same noise.

    Example: `ddpmctl noise-demo cat.jpg -o cat.gif --schedule linear --schedule cosine`
    """
    from ddpmctl import plot
    from ddpmctl.data.picture import Picture
    from ddpmctl.errors import ConfigError
    from ddpmctl.images import save_gif, save_png
    from ddpmctl.runfile import flag_layer, resolve

    shown = shower(show, moment=0.5)
    animated = _check_output(output, image, overwrite)
    flags = {"diffusion.timesteps": timesteps, "data.size": size, "seed": seed}
    names: list[str | None] = list(schedule) if schedule else [None]
    wanted = [resolve(flag_layer({**flags, "diffusion.schedule": name})) for name in names]
    levels = _levels(at, frames, None if ckpt else wanted[0].diffusion.timesteps, animated)
    if class_name is not None and not ckpt:
        raise ConfigError(f"--class {class_name}: there is no model to take it", "name one with --ckpt")
    picture = Picture(image)
    if ckpt:
        given = {"--schedule": schedule, "--timesteps": timesteps, "--size": size}
        demo = _with_model(picture, ckpt, class_name, wanted, [flag for flag, value in given.items() if value])
        levels = _levels(at, frames, demo.timesteps, animated)
    else:
        demo = _with_schedules(picture, wanted, own_schedules=bool(schedule), own_size=size is not None)
    _check_size(demo, len(levels), animated)
    if not plot.available():
        console.warn(f"drawn without the curve of the signal-to-noise ratio: {plot.MISSING} ({plot.REMEDY})")
    told = {
        "kind": "noise-demo",
        "image": str(image),
        "seed": wanted[0].seed,
        **demo.facts(),
        "levels": levels,
        "flags": {"schedule": schedule, "timesteps": timesteps, "size": size, "ckpt": str(ckpt) if ckpt else None,
                  "class": class_name},
    }  # fmt: skip
    if animated:
        fps = min(25.0, max(1.0, len(levels) / _GIF_SECONDS))
        save_gif(output, list(demo.animation(levels)), fps=fps, provenance=told)
    else:
        save_png(output, demo.still(levels), told)
    console.note(f"saved: {output}")
    shown(output)
    return 0


def _check_output(output: Path, image: Path, overwrite: bool) -> bool:
    """Whether an animation is wanted. Raises for another kind of file, and for one that is there."""
    from ddpmctl.errors import ConfigError, OutputError
    from ddpmctl.files import check_place

    kind = output.suffix.lower()
    if kind not in (".png", ".gif"):
        raise ConfigError(f"--out {output}: neither .png nor .gif", "give -o NAME.png, or -o NAME.gif to animate")
    if output.is_dir():
        raise OutputError(f"{output}: a folder", "give another name with -o")
    if output.exists() and image.exists() and output.samefile(image):
        raise OutputError(f"{output}: is the picture itself", "give another name with -o")
    if output.exists() and not overwrite:
        raise OutputError(f"{output}: exists", "add --overwrite, or give another name with -o")
    check_place(output)
    return kind == ".gif"


def _levels(at: str | None, frames: str | None, timesteps: int | None, animated: bool) -> list[int]:
    """The noise levels to show. While T is not known, anything up to the largest T passes."""
    from ddpmctl.errors import ConfigError
    from ddpmctl.noise_demo.levels import even_levels, parse_levels

    last, most = 100_000 if timesteps is None else timesteps, _MOST_GIF if animated else _MOST_STILL
    if at is not None and frames is not None:
        raise ConfigError("--at and --frames both say which levels to show", "leave one of them out")
    if at is not None:
        levels = parse_levels(at, last)
    else:
        default = min(last + 1, _GIF_FRAMES if animated else _STILL_FRAMES)
        levels = even_levels(last, default if frames is None else _count(frames))
    if len(levels) > most:
        advice = f"show {most} or fewer" + ("" if animated else f", or up to {_MOST_GIF} with -o NAME.gif")
        raise ConfigError(f"{'--frames' if at is None else '--at'}: {len(levels):,} levels are too many", advice)
    return levels


def _count(frames: str) -> int:
    from ddpmctl.errors import ConfigError
    from ddpmctl.parsing import parse_count

    try:
        return parse_count(frames)
    except ValueError as error:
        raise ConfigError(f"--frames: {error}", "give the number of levels, such as --frames 9") from error


def _with_schedules(picture: Picture, wanted: Sequence[RunConfig], *, own_schedules: bool, own_size: bool) -> Demo:
    """A demo of named schedules: the wanted ones, or all."""
    from ddpmctl.core.schedule import NoiseSchedule
    from ddpmctl.rows import row_names

    config = wanted[0]
    names = [c.diffusion.schedule for c in wanted] if own_schedules else row_names(*_SCHEDULES)
    size = config.data.size if own_size else "auto"
    pixels = picture.pixels(picture.fitting(_LONGEST) if size == "auto" else size)
    schedules = {name: NoiseSchedule.named(name, config.diffusion.timesteps) for name in names}
    return _demo(pixels, config.seed, schedules)


def _with_model(
    picture: Picture, ckpt: Path, class_name: str | None, wanted: Sequence[RunConfig], flags: Sequence[str]
) -> Demo:
    """A demo of a checkpoint's schedule with its estimates. Raises where one of ``flags`` contradicts it."""
    import torch

    from ddpmctl.checkpoint import naming_a_good_one
    from ddpmctl.errors import ConfigError
    from ddpmctl.noise_demo.demo import Estimator
    from ddpmctl.noise_demo.figure import legible
    from ddpmctl.parsing import size_text
    from ddpmctl.sampling import load_model

    with naming_a_good_one():
        model = load_model(ckpt)
    tell_model(model)
    channels, height, width = model.image_shape
    data, diffusion = model.config.data, model.config.diffusion
    for config in wanted:
        for flag, asked, has in (
            ("--schedule", config.diffusion.schedule, diffusion.schedule),
            ("--timesteps", config.diffusion.timesteps, diffusion.timesteps),
            ("--size", size_text(config.data.size), size_text((height, width))),
        ):
            if flag in flags and asked not in (has, "auto"):
                raise ConfigError(f"{flag} {asked}: {model.path} was trained with {has}", f"leave {flag} or --ckpt out")
    pixels = picture.pixels((height, width), channels, fit=data.fit, background=data.background)
    label, source = None, model.path.name
    if name := _class_of(model, class_name):
        number = model.label_of(name)
        label = torch.tensor([number], device=model.device)
        source = f"{source}, class {name if legible(name) else number}"
    estimator = Estimator(model.denoiser, model.device, label, source, model.digest)
    name = diffusion.schedule if diffusion.shift == 1 else f"{diffusion.schedule}, shift {diffusion.shift:g}"
    return _demo(pixels, wanted[0].seed, {name: model.denoiser.schedule}, estimator)


def _class_of(model: Model, asked: str | None) -> str | None:
    """The class asked for, or the first; None for a model without classes. Raises :class:`ConfigError` for another."""
    from ddpmctl.errors import ConfigError
    from ddpmctl.rows import nearest

    names = model.class_names
    if asked is None:
        if len(names) > 1:
            console.note(f"as class {names[0]}, the first of {len(names)}: give another with --class")
        return names[0] if names else None
    if not names:
        raise ConfigError(f"--class {asked}: {model.path} was trained without classes", "leave --class out")
    if asked not in names:
        raise ConfigError(f"--class {asked}: no such class{nearest(asked, names)}", f"classes: {', '.join(names)}")
    return asked


def _demo(pixels: Any, seed: int, schedules: dict[str, NoiseSchedule], estimator: Estimator | None = None) -> Demo:
    import torch

    from ddpmctl.core.noise import derived_generator
    from ddpmctl.noise_demo.demo import Demo

    eps = torch.randn((1, *pixels.shape), generator=derived_generator(seed, "noise-demo"))
    return Demo(pixels, eps, schedules, estimator)


def _check_size(demo: Demo, levels: int, animated: bool) -> None:
    """A figure or an animation of sane size."""
    from ddpmctl.errors import ConfigError

    problem = ""
    if demo.shown_pixels(levels) > _MOST_PIXELS:
        problem = f"more than {_MOST_PIXELS // 10**6} million pixels"
    elif not animated and demo.shown_width(levels) > _MOST_WIDTH:
        problem = f"more than {_MOST_WIDTH:,} pixels side by side"
    if problem:
        raise ConfigError(
            f"{levels} levels of this size are {problem}",
            "show fewer levels with --frames or --at, fewer schedules, or a smaller --size",
        )
