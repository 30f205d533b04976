"""Checkpoints: one plain dict of scalars, lists and tensors, saved so that a crash cannot lose it.

A checkpoint is self-describing: format, version, resolved configuration, shape of the images, step, network, average and
optimiser. A digest over its content is stored in it and checked when it is read. Nothing in a file is ever run.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpmctl import __version__
from ddpmctl.errors import CheckpointError
from ddpmctl.files import output_errors, replacing

FORMAT = 1
MAGIC = "ddpmctl checkpoint"
_NEEDED = ("config", "image_shape", "class_names", "step", "net", "ema")


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 over keys, scalars and tensor bytes of ``content``, whatever the layout of the file."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            sha.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
            sha.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            sha.update(f"dict {len(value)}".encode())
            for key in sorted(value, key=repr):
                sha.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, Sequence) and not isinstance(value, str):
            sha.update(f"list {len(value)}".encode())
            for item in value:
                add(item)
        else:
            sha.update(f"{type(value).__name__} {value!r}".encode())

    add(content)
    return sha.hexdigest()


def save(path: Path, content: Mapping[str, Any]) -> str:
    """Write ``content`` to ``path`` and return its digest.

    It goes to a temporary file in the same folder, is flushed to disk, read back, and only then renamed: under the final
    name there is always a whole checkpoint. Raises :class:`OutputError` when it cannot be written.
    """
    body = {"magic": MAGIC, "format": FORMAT, "version": __version__, **content}
    digest = digest_of(body)

    def check(temporary: Path) -> None:
        try:
            if load(temporary)["digest"] == digest:
                return
        except CheckpointError as error:
            raise OSError(0, "what was written does not read back") from error
        raise OSError(0, "what was written does not read back")

    with output_errors(path), replacing(path, check=check) as file:
        try:
            torch.save({**body, "digest": digest}, file)
        except RuntimeError as error:  # torch hides the error of the file behind its own
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(0, "no space left, or an error of the disk") from error
    return digest


def load(path: Path) -> dict[str, Any]:
    """Read and check a checkpoint; all tensors on the CPU.

    Raises :class:`CheckpointError` when it is missing, carries code, is damaged, of another kind or of a newer format.
    """
    other = "give a checkpoint that `ddpmctl train` wrote, such as runs/NAME/checkpoints/step-*.pt"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint", other) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused: damaged, or it carries code", other) from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError,
            zipfile.BadZipFile, OverflowError, AssertionError, MemoryError) as error:  # fmt: skip
        reason = str(error).partition("\n")[0][:120]
        raise CheckpointError(f"{path}: not a checkpoint, or damaged: {reason}", other) from error
    if not isinstance(content, dict) or content.get("magic") != MAGIC:
        raise CheckpointError(f"{path}: not a ddpmctl checkpoint", other)
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {content.get('format')} is not {FORMAT}", "use a newer ddpmctl"
        )
    digest = content.pop("digest", None)
    if digest != digest_of(content) or any(key not in content for key in _NEEDED):
        raise CheckpointError(f"{path}: damaged: its content does not match its digest", "use an earlier checkpoint")
    return {**content, "digest": digest}
