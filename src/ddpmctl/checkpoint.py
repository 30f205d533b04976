"""Checkpoints: one plain dict of scalars, lists and tensors, saved so that a crash cannot lose it.

A checkpoint is self-describing: format, version, resolved configuration, shape of the images, step, network, average and
optimiser. A digest over its content is stored in it and checked when it is read. Nothing in a file is ever run.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpmctl import __version__
from ddpmctl.errors import CheckpointError, OutputError

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
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            torch.save({**body, "digest": digest}, file)
            file.flush()
            os.fsync(file.fileno())
        if load(Path(temporary))["digest"] != digest:
            raise OSError("what was written does not read back")
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError, CheckpointError) as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise OutputError(
            f"{path}: cannot be saved: {error}", "free space or mend the folder; earlier ones are kept"
        ) from error
    return digest


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` last through a power cut, where the system lets folders be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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
