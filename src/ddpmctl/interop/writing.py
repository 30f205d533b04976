"""Writing what other tools read: under the final name there is all of it, or what was there before."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ddpmctl.errors import OutputError
from ddpmctl.files import output_errors, replacing, sync_folder


def tensors_as_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file. Tensors may share memory or not be contiguous."""
    return safetensors.torch.save({name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}, dict(metadata))


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """A folder ``path`` of ``files``, by their names within it, in place of one that holds no others.

    It is made beside it, flushed to disk, and renamed when it is whole: a power cut between that and the renaming of what
    was there leaves both, under temporary names. Raises :class:`OutputError`.
    """
    with output_errors(path):
        check_replaceable(path, files)
        path = path.absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        new, old = (path.parent / f".ddpmctl-{secrets.token_hex(6)}.tmp" for _ in range(2))
        try:
            for name, data in files.items():
                with replacing(new / name, check=lambda _: None) as file:
                    file.write(data)
            if path.exists():
                path.rename(old)
            try:
                new.rename(path)
            except BaseException:
                if old.exists():
                    old.rename(path)
                raise
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(path: Path, ours: Mapping[str, object]) -> None:
    """Raise :class:`OutputError` where ``path`` is no folder, or holds more than files named ``ours``."""
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir() or path.is_symlink():
        raise OutputError(f"{path}: exists and is no folder", "choose another name")
    for folder, _, names in os.walk(path):
        for name in names:
            inside = (Path(folder) / name).relative_to(path).as_posix()
            if inside not in ours:
                raise OutputError(f"{path}: holds {inside}, which is none of the files written here", "choose another name")
