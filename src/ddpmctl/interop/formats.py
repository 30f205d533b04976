"""The table of formats that checkpoints come in and go out. Another one is a row, and a function that reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ddpmctl import checkpoint
from ddpmctl.errors import CheckpointError, ConfigError
from ddpmctl.interop import diffusers, lucidrains, predecessor, safetensors
from ddpmctl.interop.imported import Loaded, Wishes, check_numbers
from ddpmctl.interop.source import Source
from ddpmctl.parsing import SLASHES
from ddpmctl.runfile import Layer


class Format(NamedTuple):
    """``read(source, given)``: the checkpoint, or None where it is none of this format; ``given``: what the user says of it.

    ``write(path, content)``: a checkpoint without an optimiser, to a path that ends in ``ending`` ("": a folder); None
    where we only read.
    """

    what: str
    read: Callable[[Source, Layer], Loaded | None]
    write: Callable[[Path, Mapping[str, Any]], object] | None = None
    ending: str | None = None


def read_ours(source: Source, given: Layer) -> Loaded | None:
    """A checkpoint as ``train`` and ``convert`` write it."""
    content = source.torch
    if not isinstance(content, dict) or content.get("magic") != checkpoint.CHECKPOINT.magic:
        return None
    return Loaded("ddpmctl", checkpoint.checked(source.path, content))


FORMATS: dict[str, Format] = {
    "ddpmctl": Format("a checkpoint of ddpmctl", read_ours, checkpoint.save, ".pt"),
    "diffusers": Format("the folder of a DDPMPipeline", diffusers.read, diffusers.write, ""),
    "safetensors": Format("a safetensors file of ddpmctl", safetensors.read, safetensors.write, ".safetensors"),
    "denoising-diffusion-pytorch": Format("a model-N.pt", lucidrains.read),
    "predecessor": Format("a .pth of the predecessor", predecessor.read),
}
"""Asked in this order which of them a file is: a state_dict of the fourth has some names of the fifth."""

NOTHING_GIVEN = Layer({})


def load(path: Path, given: Layer = NOTHING_GIVEN) -> Loaded:
    """The checkpoint at ``path`` in any of :data:`FORMATS`; what it leaves open is taken from ``given``, or as we see fit.

    Raises :class:`CheckpointError` for what is in none of them, and for weights that are no numbers; :class:`ConfigError`
    for a setting in ``given``, unless that are :class:`Wishes`, that the checkpoint itself says.
    """
    source = Source(path)
    for row in FORMATS.values():
        loaded = row.read(source, given)
        if loaded is not None:
            break
    else:
        if source.torch is not None:
            problem = f"{path}: not a ddpmctl checkpoint, and of no other tool that it knows"
            raise CheckpointError(problem, "give a run folder, or what `ddpmctl convert --help` names")
        loaded = Loaded("ddpmctl", checkpoint.load(path))  # raises, and says what the file is instead
    for key in given.values:
        if loaded.format in ("ddpmctl", "safetensors") and not isinstance(given, Wishes):
            raise ConfigError(f"{given.origins.get(key, key)}: {path} says that itself", "leave it out")
    check_numbers(loaded.content, path)
    return loaded


def format_for(out: str | Path, name: str | None) -> str:
    """The row of :data:`FORMATS` to write at ``out``: ``name``, or by its ending; ``new.v2/`` is a folder.

    Raises :class:`ConfigError`.
    """
    path, folder = Path(out), str(out).endswith(SLASHES)
    writable = {row: format for row, format in FORMATS.items() if format.write}
    if name is not None:
        if name not in writable:
            raise ConfigError(f"--to {name}: is only read, not written", f"write {' or '.join(writable)}")
        if folder and writable[name].ending:
            raise ConfigError(f"{out}: {name} is a file, not a folder", "leave the / out, or choose another format")
        return name
    ending = "" if folder or path.is_dir() else path.suffix.lower()
    for row, format in writable.items():
        if format.ending == ending:
            return row
    raise ConfigError(
        f"{path}: no format ends in {ending}",
        f".pt is ddpmctl's, .safetensors, a folder is diffusers' ({path}/); or name it with --to",
    )


def write(path: Path, content: Mapping[str, Any], name: str) -> None:
    """Write a checkpoint without an optimiser in the format ``name``; raises :class:`OutputError`, and as the format does."""
    writer = FORMATS[name].write
    if writer is None:
        raise CheckpointError(f"{path}: {name} is only read, not written", "choose another format")
    writer(path, content)
