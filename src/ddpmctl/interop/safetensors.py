"""Safetensors files with the configuration embedded: weights that any tool can read, and that ddpmctl can sample.

Tensors are ``ema.NAME`` and ``net.NAME`` (the raw weights; left out where they are the same), by the names of our network.
The metadata has one entry of ours, ``ddpmctl``: JSON with all else that a checkpoint without an optimiser holds, and its
digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpmctl import checkpoint
from ddpmctl.errors import CheckpointError
from ddpmctl.files import output_errors, replacing
from ddpmctl.interop.imported import Loaded
from ddpmctl.interop.source import Source, read_safetensors
from ddpmctl.interop.writing import tensors_as_bytes
from ddpmctl.runfile import Layer

_KEY = "ddpmctl"


def read(source: Source, given: Layer) -> Loaded | None:
    """The checkpoint in a file of ours; None for what is no safetensors file.

    Raises :class:`CheckpointError` for one that others wrote, or that is damaged.
    """
    path, metadata = source.path, source.metadata
    if metadata is None:
        return None
    if _KEY not in metadata:
        raise CheckpointError(
            f"{path}: a safetensors file without the configuration that ddpmctl embeds",
            "if diffusers wrote it, give the folder with model_index.json instead",
        )
    damaged = checkpoint.DamagedError(path, "damaged: its content does not match its digest")
    tensors = read_safetensors(path)
    try:
        told = json.loads(metadata[_KEY])
        digest, ema_steps = told.pop("digest"), told.pop("ema steps")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise damaged from error
    ema = {name.removeprefix("ema."): value for name, value in tensors.items() if name.startswith("ema.")}
    net = {name.removeprefix("net."): value for name, value in tensors.items() if name.startswith("net.")}
    content = {**told, "digest": digest, "net": net or ema, "ema": {"net": ema, "steps": ema_steps}}
    return Loaded("safetensors", checkpoint.checked(path, content))


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint without an optimiser; raises :class:`OutputError`."""
    whole = checkpoint.sealed(content)
    ema, net = whole["ema"]["net"], whole["net"]
    tensors = {f"ema.{name}": value for name, value in ema.items()}
    if not _equal(ema, net):
        tensors |= {f"net.{name}": value for name, value in net.items()}
    told = {key: value for key, value in whole.items() if key not in ("net", "ema")}
    metadata = {_KEY: json.dumps({**told, "ema steps": whole["ema"]["steps"]})}  # of several their order would vary
    with output_errors(path), replacing(path, check=lambda _: None) as file:
        file.write(tensors_as_bytes(tensors, metadata))


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
