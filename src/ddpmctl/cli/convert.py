"""``ddpmctl convert``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ddpmctl.checks import check_choices
from ddpmctl.cli import console
from ddpmctl.cli.options import Debug, Quiet, complete, reading, switch, tell_notes
from ddpmctl.parsing import parse_size, size_text


def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint or run folder of ddpmctl; folder of a diffusers DDPMPipeline; .safetensors of ddpmctl; .pth of the predecessor.")],
    out: Annotated[str, typer.Argument(metavar="DST", help="x.pt: of ddpmctl; x.safetensors: with the configuration embedded; folder/: of a diffusers DDPMPipeline.")],
    to: Annotated[str | None, typer.Option("--to", metavar="FORMAT", help="ddpmctl, diffusers or safetensors.  [default: by the ending of DST]", autocompletion=complete("interop.formats", "FORMATS"))] = None,
    size: Annotated[Any, typer.Option(metavar="SIZE", help="Of the images, where SRC does not say it: 64, or 48x64 (height x width).", parser=reading(parse_size))] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="What else SRC does not say, such as model.norm_groups and model.time_scale of a .pth; repeatable.")] = None,
    weights: Annotated[str | None, typer.Option(metavar="ema|raw", help="Keep averaged or last weights only.  [default: both; ema in a diffusers folder, which has one set]")] = None,
    overwrite: Annotated[bool, switch("--overwrite", "Replace what is there.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:  # fmt: skip
    """Turn a checkpoint of another tool into one of ddpmctl, and back.

    It holds weights and what they are of, but no optimiser: `train --init-from` starts a run with it. `sample`, `inspect` and `evaluate` take every SRC as it is.

    Example: `ddpmctl convert ddpm-church-256/ church.pt` or `ddpmctl convert runs/photos photos-diffusers/`
    """
    from ddpmctl.errors import ConfigError
    from ddpmctl.interop.formats import FORMATS, format_for, load, write
    from ddpmctl.interop.imported import weights_only
    from ddpmctl.runfile import flag_layer
    from ddpmctl.runfolder import checkpoint_in

    check_choices({"--weights": (weights, ("ema", "raw")), "--to": (to, tuple(FORMATS))})
    if size == "auto":
        raise ConfigError("--size auto: a checkpoint has no images to tell it from", "give a number, such as 64")
    given = flag_layer({"data.size": size_text(size) if size is not None else None}, settings or [])
    dst, name = Path(out), format_for(out, to)
    _check_place(dst, overwrite=overwrite, folder=FORMATS[name].ending == "")
    file = checkpoint_in(src)
    if os.path.realpath(dst) == os.path.realpath(file):  # not resolve(), which fails on a link to itself
        raise ConfigError(f"{dst}: is SRC itself", "choose another name")
    from ddpmctl.checkpoint import naming_a_good_one
    from ddpmctl.sampling import config_of, empty_net

    with naming_a_good_one():
        loaded = load(file, given)
    empty_net(loaded.content, config_of(loaded.content, file), file)
    tell_notes(loaded.notes)
    kept = weights_only(loaded.content, file, weights)
    write(dst, kept, name)
    _, height, width = loaded.content["image_shape"]
    parameters = sum(value.numel() for value in loaded.content["net"].values())
    console.note(f"{loaded.format} -> {name}: {parameters:,} numbers, images of {height}x{width}")
    console.note(f"saved: {dst}")
    return 0


def _check_place(dst: Path, *, overwrite: bool, folder: bool) -> None:
    """Raise where DST is there and may not be replaced, or cannot be made."""
    from ddpmctl.errors import OutputError
    from ddpmctl.files import check_place
    from ddpmctl.runfolder import run_of

    if dst.exists() and not overwrite:
        raise OutputError(f"{dst}: exists", "choose another name, or add --overwrite")
    if dst.exists() and dst.is_dir() != folder:
        raise OutputError(f"{dst}: exists and is {'a folder' if dst.is_dir() else 'no folder'}", "choose another name")
    if folder and Path.cwd().is_relative_to(os.path.realpath(dst)):
        raise OutputError(f"{dst}: the folder that this command runs in, or above it", "choose another name")
    place = dst.absolute().parent
    if place.name == "checkpoints" and (run := run_of(place)):
        raise OutputError(f"{dst}: among the checkpoints of {run}, which go on where they stopped", "write elsewhere")
    check_place(dst)
