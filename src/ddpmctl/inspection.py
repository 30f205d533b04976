"""What a checkpoint, a run, a run file, a data set or a picture is, as plain dicts: for the screen and for ``--json``."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpmctl import outline
from ddpmctl.config import RunConfig
from ddpmctl.describe import count_text
from ddpmctl.errors import CheckpointError, ConfigError, DdpmctlError
from ddpmctl.magic import ZIP, is_image, is_pipeline, what_is

Facts = dict[str, Any]
"""Headings to facts; a fact is a scalar, a list, or a dict of scalars."""

MOST_DECODED = 10_000
"""Images that are decoded to tell what is in a folder; of more, only the headers are read."""


def kind_of(path: Path) -> str:
    """``run``, ``data``, ``picture``, ``run file`` or ``checkpoint``; raises :class:`ConfigError` when there is nothing.

    A folder of diffusers is a checkpoint.
    """
    from ddpmctl.data.names import read_name

    if read_name(path):
        return "data"
    if not path.exists():
        raise ConfigError(
            f"{path}: no such file or folder", "give a checkpoint, run folder, run file, data, or a PNG or GIF of ddpmctl"
        )
    if path.is_dir():
        from ddpmctl.runfolder import run_of

        return "run" if run_of(path) else "checkpoint" if is_pipeline(path) else "data"
    if path.suffix.lower() in (".yaml", ".yml"):
        return "run file"
    if path.suffix.lower() == ".zip":
        return "data"
    try:
        found = what_is(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", "mend its rights") from error
    return "picture" if is_image(found) else "data" if found == ZIP else "checkpoint"


def inspect_checkpoint(path: Path) -> Facts:
    """What a checkpoint holds, in any of the formats that are read."""
    from ddpmctl import averages, checkpoint
    from ddpmctl.build import build_ema
    from ddpmctl.interop import formats
    from ddpmctl.sampling import config_of, empty_net

    with checkpoint.naming_a_good_one():
        loaded = formats.load(path)
    content = loaded.content
    config = config_of(content, path)
    channels, height, width = content["image_shape"]
    classes = list(content["class_names"])
    step, images = content["step"], content["data"]["images"] if content.get("data") else None
    net = empty_net(content, config, path)
    ema = build_ema(config, net)
    ema.steps = content["ema"]["steps"]
    averaged = {"decay": config.train.ema_decay, "warm-up": config.train.ema_warmup, "steps": ema.steps,
                "decay now": round(ema.decay_now(), 6), "--ema-length": averages.lengths(path, content) or "no snapshots"}  # fmt: skip
    return {
        "what": {"kind": "checkpoint", "path": str(path), "format": loaded.format, "digest": content["digest"],
                 "written by": f"ddpmctl {content['version']}" if loaded.format in ("ddpmctl", "safetensors") else loaded.format,
                 "size": f"{_bytes(path) / 2**20:.1f} MiB"},
        **({"notes": list(loaded.notes)} if loaded.notes else {}),
        **({"converted": {**content["source"], "optimiser": "none: --init-from starts a run with it"}} if content.get("source") else {}),
        "training": {**_progress(config, step, images), **({"KID": content["kid"]} if "kid" in content else {})},
        "images": {"shape (C, H, W)": [channels, height, width], "trained on": images or "not known", "classes": classes or "none"},
        **({"ema": averaged} if ema.steps else {}),
        **_network(config, (channels, height, width), len(classes)),
        "config": config.to_dict(),
    }  # fmt: skip


def inspect_run(path: Path) -> Facts:
    """What a run folder holds: progress, newest numbers and checkpoint."""
    from ddpmctl.runfolder import RunFolder, run_of

    path = run_of(path) or path
    folder = RunFolder(path)
    config = _run_file_config(folder.run_file)
    rows, files = folder.metrics.read(), folder.checkpoint_files()
    facts: Facts = {
        "what": {"kind": "run folder", "path": str(path)},
        "progress": {
            "steps": f"{int(rows[-1]['step']) if rows else 0:,} of {config.train.steps:,}",
            "last metrics": ", ".join(f"{key} {value}" for key, value in rows[-1].items()) if rows else "none yet",
            "checkpoints": [file.name for file in files] or "none yet",
            "sample grids": len(list(folder.samples.glob("*.png"))),
        },
    }
    if not files:
        return {**facts, "config": config.to_dict()}
    found = folder.newest_good(lambda text: facts["progress"].update({"damaged": text}))
    if found is None:
        raise CheckpointError(f"{path}: none of its checkpoints can be read", "start the run again with --overwrite")
    newest = inspect_checkpoint(found[0])
    newest["newest checkpoint"] = newest.pop("what")
    return {**facts, "newest checkpoint": newest.pop("newest checkpoint"), **newest}


def inspect_run_file(path: Path) -> Facts:
    """What a run file asks for. A size or channels left open are taken as 64x64 and RGB."""
    from ddpmctl.rules import check_size

    config = _run_file_config(path)
    data = config.data
    size = (64, 64) if data.size == "auto" else data.size
    channels = 3 if data.channels == "auto" else data.channels
    check_size(config, size)
    auto = [f"data.{key}" for key in ("size", "channels") if getattr(data, key) == "auto"]
    assumed = [f"{channels} channels, {size[0]}x{size[1]}, where {' and '.join(auto)} is auto"] if auto else []
    if data.conditional:
        assumed.append("no classes: how many there are, the images say")
    what = {"kind": "run file", "path": str(path), **({"assumed": "; ".join(assumed)} if assumed else {})}
    return {"what": what, **_network(config, (channels, *size), 0), "config": config.to_dict()}


def inspect_data(path: Path, progress: Callable[[int, int], None] | None = None) -> Facts:
    """What a folder or zip of images holds. Every image is decoded, so that what would be refused is known.

    That has been done where training has left its records in the cache, and is too much for more than :data:`MOST_DECODED`.
    """
    from ddpmctl.data.cache import Cache
    from ddpmctl.data.named import whole
    from ddpmctl.data.names import read_shards
    from ddpmctl.data.pool import worker_count
    from ddpmctl.data.scan import find_images
    from ddpmctl.data.shards import index_of
    from ddpmctl.data.stream import look
    from ddpmctl.data.survey import survey

    cache, shards = Cache.of_user(), read_shards(whole(path))
    if shards is not None:
        report, _ = look(index_of(shards, worker_count("auto"), cache, progress))
    else:
        known = cache.records_of(path) if cache else None
        report = survey(find_images(path), full=True, most=MOST_DECODED, known=known, progress=progress)
    facts = report.to_dict()
    bad = facts.pop("bad")
    groups = {key: facts.pop(key) for key in ("sizes", "modes", "formats", "classes")}
    return {
        "what": {"kind": "data", "path": str(path)},
        "images": facts,
        **{key: groups[key] for key in groups if groups[key]},
        "refused": {item["name"]: item["reason"] for item in bad} or "none",
        "notes": report.warnings() or "none",
    }


def inspect_picture(path: Path) -> Facts:
    """How a PNG or GIF was made, and the command that makes it again. Raises :class:`ConfigError` for others."""
    from ddpmctl.images import read_provenance

    made_with = read_provenance(path)
    if made_with is None:
        raise ConfigError(
            f"{path}: {what_is(path)}, not made by ddpmctl",
            "give a PNG or GIF that sample, train or noise-demo wrote, or a folder of images",
        )
    facts: Facts = {"what": {"kind": "picture", "path": str(path)}, "made with": made_with}
    command = command_of(made_with, path)
    if command:
        facts["command"] = command
    return facts


_FLAGS = ("sampler", "steps", "spacing", "eta", "variance", "threshold", "guidance", "guidance-interval", "init", "strength", "inpaint", "mask", "resample", "frames", "class", "seed", "weights", "ema-length", "precision", "columns", "scale")


def command_of(made_with: Facts, path: Path) -> str | None:
    """The command line that makes the picture ``path`` again; None for a kind that no single command makes."""
    kind, out = made_with.get("kind"), path.name
    if kind == "sample":
        if "image" in made_with:  # one of a folder
            out = f"{path.absolute().parent.name}/"
        pair = made_with.get("interpolate")  # one flag of two words, and --frames says how many
        many = ["--interpolate", *pair] if isinstance(pair, list) else ["-n", made_with.get("n")]
        words = ["ddpmctl", "sample", made_with.get("path"), *many, "-o", out]
        flags = {name: made_with.get(name) for name in _FLAGS}
        if made_with.get("clip") is False:  # as thresholds were called before
            flags["threshold"] = "none"
    elif kind == "noise-demo":
        words = ["ddpmctl", "noise-demo", made_with.get("image"), "-o", out]
        levels, given = made_with.get("levels"), made_with.get("flags")
        flags = {"at": ",".join(map(str, levels)) if isinstance(levels, list) else None, "seed": made_with.get("seed")}
        flags |= given if isinstance(given, dict) else {}
    else:
        return None
    for name, value in flags.items():
        for word in value if isinstance(value, list) else [value]:
            words += [f"--{name}", word] if word is not None else []
    return shlex.join(str(word) for word in words)


def _run_file_config(path: Path) -> RunConfig:
    from ddpmctl.runfile import read_run_file, resolve

    return resolve(read_run_file(path))


def _bytes(path: Path) -> int:
    """Of a file, or of all in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def _progress(config: RunConfig, step: int, images: int | None) -> Facts:
    if images is None:
        return {"step": f"{step:,}" if step else "not known"}
    seen = step * config.train.batch_size
    return {
        "step": f"{step:,} of {config.train.steps:,}",
        "images seen": f"{seen:,}",
        "epochs": round(seen / images, 2),
    }


def _network(config: RunConfig, shape: tuple[int, int, int], num_classes: int) -> Facts:
    """Parameters by block, FLOPs, and the schedule with its terminal signal-to-noise ratio."""
    blocks = outline.network(config, shape, num_classes)
    flops = 2 * sum(block.multiply_adds for block in blocks)
    batch, diffusion, alpha_bar = config.train.batch_size, config.diffusion, outline.alpha_bar(config)
    return {
        "parameters": {"total": sum(block.parameters for block in blocks), **{block.name: block.parameters for block in blocks}},
        "cost": {"one image, forward": f"{count_text(flops)}FLOP",
                 f"one training step, batch {batch}": f"{count_text(3 * flops * batch)}FLOP (backward counted as twice forward)"},
        "schedule": {"name": diffusion.schedule, **({"shift": diffusion.shift} if diffusion.shift != 1 else {}),
                     "timesteps": len(alpha_bar) - 1,
                     "abar_T": float(f"{alpha_bar[-1]:.4g}"),
                     "terminal SNR": f"{outline.snr_db(alpha_bar[-1]):.2f} dB",
                     "SNR at T/2": f"{outline.snr_db(alpha_bar[(len(alpha_bar) - 1) // 2]):.2f} dB"},
    }  # fmt: skip


INSPECTORS: dict[str, Callable[..., Facts]] = {
    "checkpoint": inspect_checkpoint,
    "run": inspect_run,
    "run file": inspect_run_file,
    "data": inspect_data,
    "picture": inspect_picture,
}


def inspect_path(path: Path, progress: Callable[[int, int], None] | None = None) -> Facts:
    """All there is to say about ``path``. Raises the :class:`DdpmctlError` of its kind."""
    kind = kind_of(path)
    try:
        return inspect_data(path, progress) if kind == "data" else INSPECTORS[kind](path)
    except OSError as error:
        raise DdpmctlError(f"{path}: cannot be read: {error.strerror}", "mend its rights") from error
