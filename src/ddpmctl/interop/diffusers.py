"""Folders of Hugging Face diffusers: a ``DDPMPipeline``, or one that differs from it in the scheduler only.

::

    model_index.json                                  what it is made of
    unet/config.json                                  the network; in the uploads of 2022 beside model_index.json
    unet/diffusion_pytorch_model.safetensors          its weights, or .bin
    scheduler/scheduler_config.json                   the process; in the uploads of 2022 beside model_index.json

diffusers itself is not needed, and nothing in the folder is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpmctl import checkpoint
from ddpmctl.errors import CheckpointError, ConfigError
from ddpmctl.interop import scheduler, unet2d
from ddpmctl.interop.imported import Loaded, Settings, imported
from ddpmctl.interop.naming import diffusers_names, renewed
from ddpmctl.interop.source import Source, is_state, read_json, read_safetensors
from ddpmctl.interop.writing import tensors_as_bytes, write_folder
from ddpmctl.magic import is_pipeline
from ddpmctl.runfile import Layer, config_layer, resolve

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors")
_VERSION = "0.30.0"
"""Of diffusers: the oldest that the folders we write are tried with."""


def read(source: Source, given: Layer) -> Loaded | None:
    """The network and process of a folder; one set of weights, raw and averaged alike. None for what is no such folder."""
    path = source.path
    if not is_pipeline(path):
        return None
    index_file = path / "model_index.json"
    kinds = read_json(index_file) if index_file.is_file() else {}
    if "unet" in kinds and (not isinstance(kinds["unet"], list) or kinds["unet"][-1:] != ["UNet2DModel"]):
        raise CheckpointError(f"{index_file}: unet: {str(kinds['unet'])[:100]} is no UNet2DModel", "use diffusers for it")
    others = [str(name) for name in kinds if name not in ("unet", "scheduler") and not str(name).startswith("_")]
    if others:
        raise CheckpointError(
            f"{index_file}: {', '.join(others)[:100]}: a pipeline of more than a network and a scheduler", "use diffusers for it"
        )
    config_file = _one_of(path, "unet/config.json", "config.json")
    settings = Settings()
    two_halves = unet2d.settings_of(config_file, read_json(config_file), settings)
    scheduler_file = _one_of(path, "scheduler/scheduler_config.json", "scheduler_config.json")
    flags = scheduler.settings_of(scheduler_file, read_json(scheduler_file), settings, two_halves=two_halves)
    weights_file, state = _weights(config_file.parent)
    return imported(
        "diffusers", path, settings, given, {"": state}, lambda config, ours: diffusers_names(config.model, ours),
        file=weights_file, source=flags.source(), notes=[flags.note()],
    )  # fmt: skip


def _one_of(path: Path, *names: str) -> Path:
    for name in names:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path / names[0]}: missing", "give the whole folder of a DDPMPipeline, as save_pretrained writes it")


def _weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        cut = next(iter(sorted(folder.glob("*.index.json"))), None)
        advice = "bring it back from a copy"
        if cut:
            advice = "its weights are in several files: save it again with a larger max_shard_size"
        raise CheckpointError(f"{folder / _WEIGHTS[0]}: missing", advice)
    state: Any = read_safetensors(file) if file.suffix == ".safetensors" else checkpoint.read(file)
    if not is_state(state):
        raise CheckpointError(f"{file}: holds no weights by name", "bring it back from a copy")
    return file, renewed(state)


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write the averaged weights of ``content`` and what they are of as the folder ``path``; it may replace such a folder.

    Raises :class:`ConfigError` for a network that ``UNet2DModel`` is not, :class:`OutputError` when it cannot be written.
    """
    config = resolve(config_layer(content["config"], str(path)))
    channels, height, width = content["image_shape"]
    config = config.model_copy(update={"data": config.data.model_copy(update={"channels": channels})})
    strange = unet2d.misfits(config, content["class_names"])
    if strange:
        raise ConfigError(
            f"{path}: diffusers' UNet2DModel has no {', no '.join(strange)}", "write a .safetensors or .pt file instead"
        )
    weights: Mapping[str, Tensor] = content["ema"]["net"]
    state: dict[str, Tensor] = {}
    for ours, theirs in diffusers_names(config.model, weights).items():
        for name, part in zip(theirs, weights[ours].chunk(len(theirs)), strict=True):
            linear = ".attentions." in name and part.ndim == 4
            state[name] = part.flatten(1) if linear else part
    index = {
        "_class_name": "DDPMPipeline", "_diffusers_version": _VERSION,
        "scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"],
    }  # fmt: skip
    unet = {**unet2d.config_of(config, (height, width)), "_diffusers_version": _VERSION}
    process = {**scheduler.config_of(config), "_diffusers_version": _VERSION}
    files = {
        "model_index.json": index, "unet/config.json": unet, "scheduler/scheduler_config.json": process,
    }  # fmt: skip
    write_folder(path, {
        **{name: (json.dumps(value, indent=2) + "\n").encode() for name, value in files.items()},
        f"unet/{_WEIGHTS[0]}": tensors_as_bytes(state, {"format": "pt"}),
    })  # fmt: skip
