"""What stands at a path, looked at once however many formats ask, and never run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ddpmctl import checkpoint
from ddpmctl.errors import CheckpointError
from ddpmctl.magic import PICKLE, SAFETENSORS, TORCH, what_is
from ddpmctl.memory import out_of_memory

_LARGEST_JSON = 1 << 24
"""Bytes; a scheduler may hold 100,000 trained betas."""

_LARGEST_HEADER = 100_000_000
"""Bytes, as safetensors has it."""


class Source:
    """A file or folder that may be a checkpoint. Its properties raise :class:`CheckpointError` where it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def kind(self) -> str:
        """What :func:`ddpmctl.magic.what_is` says of a file; ``""`` for what is none, or cannot be read."""
        try:
            return what_is(self.path) if self.path.is_file() else ""
        except OSError:
            return ""  # the reader of our own checkpoints says what is wrong

    @cached_property
    def torch(self) -> Any:
        """What a file of PyTorch holds, as data only; None for a file of another kind."""
        return checkpoint.read(self.path) if self.kind in (TORCH, PICKLE) else None

    @cached_property
    def metadata(self) -> dict[str, str] | None:
        """The metadata of a safetensors file; None for a file of another kind."""
        return metadata_of(self.path) if self.kind == SAFETENSORS else None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises :class:`CheckpointError`."""
    try:
        # Not safe_open, whose tensors are the file itself: a disk that fails, or a file that is cut, would end the process.
        return safetensors.torch.load(path.read_bytes())
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        if out_of_memory(error):
            raise
        raise _damaged(path) from error


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises :class:`CheckpointError`."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= _LARGEST_HEADER else None
        found = header.get("__metadata__", {}) if isinstance(header, dict) else None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path) from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise _damaged(path)
    return found


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or cut short: it does not read back", "bring it back from a copy")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file. Raises :class:`CheckpointError`."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError("too large")
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", "bring it back from a copy") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON", "bring it back from a copy") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a JSON object", "bring it back from a copy")
    return found


def is_state(content: object) -> bool:
    """Whether ``content`` is a state_dict: names and dense tensors, some of them."""
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(
            isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
            for name, value in content.items()
        )
    )
