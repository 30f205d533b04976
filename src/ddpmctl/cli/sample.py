"""``ddpmctl sample``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpmctl.checks import check_choices, check_counts, check_ema_length, check_guidance
from ddpmctl.cli import console
from ddpmctl.cli.options import (
    Debug,
    Devices,
    Quiet,
    Show,
    choices,
    complete,
    reading,
    switch,
    tell_model,
    weights_text,
)
from ddpmctl.cli.showing import shower
from ddpmctl.cli.together import devices_of, follows, joined, spread_over
from ddpmctl.parsing import parse_count, parse_device, parse_shares
from ddpmctl.starting import FRAMES, RESAMPLE, STRENGTH, beginning

if TYPE_CHECKING:
    from ddpmctl.editing import Course
    from ddpmctl.outputs import Sink
    from ddpmctl.plans import Plan
    from ddpmctl.ranks import Ranks
    from ddpmctl.sampling import Model

_HOW = "How"
_PICTURES = "With pictures"


def sample(
    ckpt: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint, of other tools too (see `convert`), or run folder: its newest one.")],
    n: Annotated[int | None, typer.Option("-n", metavar="COUNT", help="How many images.  [default: 64]", parser=reading(parse_count))] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="PATH", help="x.png: a grid; x.gif: noise to image; x.npz: uint8 (N,H,W,C); folder/: a file each.  [default: samples-0.png, -1, ...]")] = None,
    quality: Annotated[str | None, typer.Option(metavar=choices("plans", "QUALITIES"), help="Sampler, steps and spacing in one word; flags for one of them override it.  [default: balanced]", autocompletion=complete("plans", "QUALITIES"), rich_help_panel=_HOW)] = None,
    sampler: Annotated[str | None, typer.Option(metavar=choices("core.samplers", "SAMPLERS"), help="dpm++, unipc, heun: few steps; ddpm: as trained; dpm++sde: few steps, with noise.  [default: of the quality]", autocompletion=complete("core.samplers", "SAMPLERS"), rich_help_panel=_HOW)] = None,
    steps: Annotated[int | None, typer.Option(metavar="COUNT", help="Denoising steps, 1 to T.  [default: of the quality; with --sampler alone: ddpm T, ddim 50, heun and dpm++sde 30, others 20; with --inpaint 100]", parser=reading(parse_count), rich_help_panel=_HOW)] = None,
    spacing: Annotated[str | None, typer.Option(metavar=choices("core.spacing", "SPACINGS"), help="Which levels of noise the steps stop at: even in t, sqrt(t), sigma^(1/7) or log-SNR.  [default: of the quality or sampler]", autocompletion=complete("core.spacing", "SPACINGS"), rich_help_panel=_HOW)] = None,
    eta: Annotated[float | None, typer.Option(metavar="0..1", help="Noise that ddim adds at each step.  [default: 0]", rich_help_panel=_HOW)] = None,
    variance: Annotated[str | None, typer.Option(metavar=choices("core.samplers", "VARIANCES"), help="Noise that ddpm adds.  [default: learned where the model has it, else beta]", autocompletion=complete("core.samplers", "VARIANCES"), rich_help_panel=_HOW)] = None,
    threshold: Annotated[str, typer.Option(metavar=choices("core.thresholds", "THRESHOLDS"), help="Keep each estimate of the clean image within [-1, 1]: cut, or scaled by its 99.5th percentile.", autocompletion=complete("core.thresholds", "THRESHOLDS"), rich_help_panel=_HOW)] = "clip",
    class_name: Annotated[str | None, typer.Option("--class", metavar="NAME|all", help="Class to draw; all: each in turn.  [default: all]", rich_help_panel=_HOW)] = None,
    guidance: Annotated[float, typer.Option(metavar="W", help="Draw what is more of its class than of others: 1 is none, 2 to 4 much. Needs training with model.label_dropout.", rich_help_panel=_HOW)] = 1.0,
    guidance_interval: Annotated[str | None, typer.Option(metavar="LO:HI", help="Levels of noise at which to guide, as shares of T.  [default: 0:1]", rich_help_panel=_HOW)] = None,
    seed: Annotated[int, typer.Option(metavar="COUNT", help="Same seed, same images.", parser=reading(parse_count), rich_help_panel=_HOW)] = 0,
    batch_size: Annotated[int, typer.Option(metavar="COUNT", help="Images at once; changes memory, not images.", parser=reading(parse_count))] = 64,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.  [default: auto]", parser=reading(parse_device))] = None,
    devices: Devices = None,
    precision: Annotated[str, typer.Option(metavar="fp32|bf16|fp16", help="What the network computes in; less than fp32 is faster on some devices, but then images depend a little on their batch.")] = "fp32",
    weights: Annotated[str, typer.Option(metavar="ema|raw", help="Averaged or last weights.", rich_help_panel=_HOW)] = "ema",
    ema_length: Annotated[float | None, typer.Option(metavar="0.01..0.28", help="Weights averaged over this share of the training time, for a run with train.ema_snapshot_every; `inspect` names those to be had.", rich_help_panel=_HOW)] = None,
    columns: Annotated[int | None, typer.Option(metavar="COUNT", help="Images in a row of the grid.  [default: near-square; of several classes a row each]", parser=reading(parse_count))] = None,
    scale: Annotated[int | None, typer.Option(metavar="COUNT", help="Enlarge every pixel of a grid so many times.  [default: 1, .gif as fits]", parser=reading(parse_count))] = None,
    init: Annotated[Path | None, typer.Option("--init", metavar="IMG", help="Start from a picture, noised, in place of pure noise: -n variations of it.", rich_help_panel=_PICTURES)] = None,
    strength: Annotated[float | None, typer.Option(metavar="0..1", help=f"How much of --init changes: the share of the steps that are taken.  [default: {STRENGTH}]", rich_help_panel=_PICTURES)] = None,
    inpaint: Annotated[Path | None, typer.Option(metavar="IMG", help="Draw a part of a picture anew, -n times, and keep the rest. By ddpm or ddim.", rich_help_panel=_PICTURES)] = None,
    mask: Annotated[Path | None, typer.Option(metavar="M.png", help="Which part: white is drawn anew, black is kept, greys from 128 count as white. Stretched to the size of --inpaint.", rich_help_panel=_PICTURES)] = None,
    resample: Annotated[int | None, typer.Option(metavar="COUNT", help=f"How often each stretch of --inpaint is gone, so that new and old fit: 1 is fast, 10 thorough.  [default: {RESAMPLE}]", parser=reading(parse_count), rich_help_panel=_PICTURES)] = None,
    interpolate: Annotated[tuple[Path, Path] | None, typer.Option(metavar="A B", help="The way from picture A to picture B: .png a row, .gif forth and back. By ddim.", rich_help_panel=_PICTURES)] = None,
    frames: Annotated[int | None, typer.Option(metavar="COUNT", help=f"Images of --interpolate, A and B among them.  [default: {FRAMES}]", parser=reading(parse_count), rich_help_panel=_PICTURES)] = None,
    show: Show = False,
    overwrite: Annotated[bool, switch("--overwrite", "Replace what is there.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:  # fmt: skip
    """Make new images with a trained model.

    Example: `ddpmctl sample runs/photos -n 64 -o new.png`
    """
    from ddpmctl.outputs import Job, Sink, check_shape, choose_output
    from ddpmctl.plans import Recipe

    interval = _interval(guidance, guidance_interval)
    recipe = Recipe(quality, sampler, steps, spacing, eta, variance, threshold, guidance, interval)
    check_choices({"--weights": (weights, ("ema", "raw")), "--precision": (precision, ("fp32", "bf16", "fp16"))})
    check_counts({"--batch-size": batch_size, "--columns": columns, "--scale": scale})
    check_ema_length(ema_length, weights)
    begun = beginning(n, init=init, strength=strength, inpaint=inpaint, mask=mask, resample=resample,
                      interpolate=interpolate, frames=frames)  # fmt: skip
    each, shown = devices_of(devices, device), shower(show)
    # Process 0 writes: the others may come when its file is there already.
    path, sink = (Path(), Sink) if follows() else choose_output(out, overwrite=overwrite, sinks=begun.sinks())
    if not follows():
        check_shape(path, sink, {"--columns": columns, "--scale": scale})
    from ddpmctl.checkpoint import naming_a_good_one
    from ddpmctl.core.samplers import evaluations
    from ddpmctl.runfolder import checkpoint_in
    from ddpmctl.sampling import levels, load_model, sampler_options

    way = recipe.plan(begun.rows)
    begun.check(way, quality, eta)
    options = sampler_options(way.sampler, recipe)
    code = spread_over(each)
    if code is not None:
        return code
    with joined() as ranks:
        place = ranks.device(device or "auto", each)
        with naming_a_good_one():
            file = ranks.share(checkpoint_in(ckpt) if ranks.leads else None)
            model = load_model(file, str(place), weights=weights, ema_length=ema_length, threshold=threshold, precision=precision,
                               guidance=guidance, interval=interval)  # fmt: skip
        tell_model(model)
        way = model.fitted(way, recipe)
        steps, n = way.steps, begun.n
        labels = model.labels_for(class_name, n)
        course = begun.course(model, labels, console.warn)
        grid = levels(model.denoiser.schedule, way, course)
        taken, states = len(grid) - 1, course.states(grid)
        guided = {"guidance": guidance, "guidance-interval": guidance_interval} if guidance != 1 else {}
        made_with = {
            "kind": "sample", "checkpoint": model.digest, "path": str(model.path), "step": model.step, **begun.facts(), "seed": seed,
            **way._asdict(), **options, "threshold": threshold, **guided, "weights": weights, "ema-length": ema_length, "precision": model.precision,
            "class": class_name if labels is not None else None, "columns": columns, "scale": scale,
        }  # fmt: skip
        columns = columns or begun.columns()
        several = columns is None and labels is not None and len(set(labels)) > 1 and n >= len(model.class_names)
        rows = _titles(model.class_names) if several and sink.titled else ()
        output = sink(Job(path, n, model.image_shape, taken, made_with, columns, scale, begun.counted, rows))
        told = f" guidance {guidance:g} in {interval[0]:g}:{interval[1]:g}, a batch of two for each image," if guided else ""
        some = f"the last {taken} of {steps} steps" if init else f"{steps} steps"
        told = begun.told() + told
        console.note(f"{way.sampler}, {some} ({evaluations(way.sampler, states)} evaluations), {way.spacing} spacing,"
                     f" threshold {threshold},{told} {n} images of {model.image_shape[1]}x{model.image_shape[2]},"
                     f" {weights_text(weights, model.step, ema_length)}, {model.device}, {model.precision}")  # fmt: skip
        with console.reading(what="encoding") as progress:
            course = begun.ready(course, model, grid, labels, progress)
        with output as target:
            _run(model, target, labels, way, course, ranks, seed=seed, options=options, batch_size=min(batch_size, n))
        console.note(f"saved: {path}")
        if ranks.leads:
            shown(path)
    return 0


def _titles(class_names: list[str]) -> list[str]:
    """What the rows of the classes are called in a picture, with a word where that is not their names."""
    from ddpmctl.sheet import titles_of

    titles = titles_of(class_names)
    others = [f"{title} is {name}" for title, name in zip(titles, class_names, strict=True) if title != name]
    if others:
        more = ", ..." if len(others) > 5 else ""
        console.warn(f"the font lacks letters of some class names, which are numbers in the picture: {', '.join(others[:5])}{more}")
    return titles


def _interval(guidance: float, text: str | None) -> tuple[float, float]:
    """The shares of T between which to guide."""
    from ddpmctl.errors import ConfigError

    check_guidance(guidance)
    if text is None:
        return 0.0, 1.0
    if guidance == 1:
        raise ConfigError(f"--guidance-interval {text}: there is no guidance", "add --guidance")
    try:
        return parse_shares(text)
    except ValueError as error:
        raise ConfigError(f"--guidance-interval: {error}", "0:1 is always") from error


def _run(
    model: Model, target: Sink, labels: list[int] | None, way: Plan, course: Course, ranks: Ranks, *,
    seed: int, options: dict[str, Any], batch_size: int,
) -> None:  # fmt: skip
    """Walk the sampler under a progress bar; hand finished images, and for a GIF all states, to the output."""
    from ddpmctl.core.noise import ImageNoise
    from ddpmctl.images import to_uint8
    from ddpmctl.making import made_by_all
    from ddpmctl.sampling import Generated, generate, levels

    job, done, finished = target.job, 0, 0
    n, schedule = job.n, model.denoiser.schedule
    grid = levels(schedule, way, course)
    states = course.states(grid)
    left_at = {t: left for left, t in enumerate(reversed(grid))}

    def on_smaller(size: int) -> None:
        console.warn(f"out of memory: going on with {size} images at once")
        bar.set_total(done + -(-(n - finished) // size) * states)

    def walk(images: range, at_once: int, smaller: Callable[[int], object]) -> Iterator[Generated]:
        return generate(
            model.denoiser, job.shape, images, seed=seed, way=way,
            device=model.device, course=course, labels=labels, batch_size=at_once, options=options, on_smaller=smaller,
        )  # fmt: skip

    every_state = ranks.share(target.wants_states)
    if target.wants_states:
        noise = ImageNoise(seed, range(n), job.shape)
        target.add_state(range(n), job.steps, to_uint8(course.first(schedule, grid[0], range(n), noise)))
    with console.bar("sampling", -(-n // min(batch_size, ranks.most(n))) * states) as bar:
        for made in made_by_all(ranks, n, batch_size, walk, states, every_state=every_state, on_smaller=on_smaller):
            done += made.steps
            if made.pixels is not None:
                if every_state:  # of a level that comes more than once the last state stays
                    target.add_state(made.images, left_at[made.t], made.pixels)
                if made.t == 0:
                    target.add_images(made.images, made.pixels)
                    finished = made.images.stop
            bar.update(done, f"{finished}/{n} images")
