"""Writing what other tools read: under the final name there is all of it, or what was there before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ddpmctl.errors import OutputError
from ddpmctl.files import beside, output_errors, replacing, sync_folder


def tensors_as_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file. Tensors may share memory or not be contiguous."""
    return safetensors.torch.save({name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}, dict(metadata))


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """A folder ``path`` of ``files``, by their names within it; they may replace those there, which holds no others.

    A new folder is made beside it and renamed when it is whole. In one that is there the files alone are replaced, each
    keeping its permissions: first all are written under temporary names and flushed to disk, then the old ones set aside,
    then the new ones renamed, the last of ``files`` as the last. So a power cut in between leaves a folder in which that
    one is missing, but no mixture. Raises :class:`OutputError`.
    """
    with output_errors(path):
        check_replaceable(path, files)
        path = path.absolute()
        if path.exists():
            _replace_files({path / name: data for name, data in files.items()})
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        new = beside(path)
        try:
            for name, data in files.items():
                _write(new / name, data)
            new.rename(path)
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise


def _replace_files(files: Mapping[Path, bytes]) -> None:
    """All of ``files`` at once, or none; folders that are missing are made."""
    staged, aside = {file: beside(file) for file in files}, dict[Path, Path]()
    placed, made = list[Path](), list[Path]()
    try:
        for file, data in files.items():
            if not file.parent.exists():
                file.parent.mkdir()
                made.append(file.parent)
            _write(staged[file], data)
            if file.exists():
                shutil.copymode(file, staged[file])
        for file in reversed(staged):
            if file.exists() or file.is_symlink():
                aside[file] = beside(file)
                file.rename(aside[file])
        for file, new in staged.items():
            new.rename(file)
            placed.append(file)
        for folder in {file.parent for file in files}:
            sync_folder(folder)
    except BaseException:
        for file in (*placed, *staged.values()):
            file.unlink(missing_ok=True)
        for file, old in aside.items():
            if old.exists() or old.is_symlink():
                old.rename(file)
        for folder in made:
            folder.rmdir()
        raise
    for old in aside.values():
        old.unlink()


def _write(file: Path, data: bytes) -> None:
    with replacing(file, check=lambda _: None) as stream:
        stream.write(data)


def check_replaceable(path: Path, ours: Mapping[str, object]) -> None:
    """Raise :class:`OutputError` where ``path`` is no folder, or holds more than files named ``ours`` and empty folders."""
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir() or path.is_symlink():
        raise OutputError(f"{path}: exists and is no folder", "choose another name")
    for folder, folders, names in os.walk(path):
        for name in (*folders, *names):
            there = Path(folder) / name
            inside = there.relative_to(path).as_posix()
            if name in folders and (there.is_symlink() or inside in ours):
                kind = "a link to a folder" if there.is_symlink() else "a folder"
                raise OutputError(f"{path}: holds {inside}, {kind}, which is not replaced", "choose another name")
            if name in names and inside not in ours:
                raise OutputError(f"{path}: holds {inside}, which is none of the files written here", "choose another name")
