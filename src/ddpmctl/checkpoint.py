"""Checkpoints: one plain dict of scalars, lists and tensors, saved so that a crash cannot lose it.

A checkpoint is self-describing: format, version, resolved configuration, shape of the images, step, network, average and
optimiser. A digest over its content is stored in it and checked when it is read. Nothing in a file is ever run.
"""

from __future__ import annotations

import hashlib
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpmctl import __version__
from ddpmctl.contents import fault_of
from ddpmctl.errors import CheckpointError
from ddpmctl.files import output_errors, replacing
from ddpmctl.magic import CUT_ZIP, EMPTY, PICKLE, TEXT, TORCH, UNKNOWN, what_is
from ddpmctl.memory import out_of_memory

FORMAT = 1
_OURS = "give a run folder, or a checkpoint in it: runs/NAME/checkpoints/step-*.pt"


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


class Kind(NamedTuple):
    """A kind of file that is kept this way: what it calls itself, and what is strange about its content, or None."""

    magic: str
    fault_of: Callable[[Mapping[str, Any]], str | None]


CHECKPOINT = Kind("ddpmctl checkpoint", fault_of)


def sealed(content: Mapping[str, Any], kind: Kind = CHECKPOINT) -> dict[str, Any]:
    """``content`` as it is saved: with what it calls itself, its version unless it has one, and its digest."""
    body = {"magic": kind.magic, "format": FORMAT, "version": __version__, **content}
    return {**body, "digest": digest_of(body)}


def save(path: Path, content: Mapping[str, Any], kind: Kind = CHECKPOINT) -> str:
    """Write ``content`` to ``path`` and return its digest.

    It goes to a temporary file in the same folder, is flushed to disk, read back, and only then renamed: under the final
    name there is always a whole checkpoint. Raises :class:`OutputError` when it cannot be written.
    """
    whole = sealed(content, kind)
    digest = str(whole["digest"])

    def check(temporary: Path) -> None:
        try:
            if load(temporary, kind)["digest"] == digest:
                return
        except CheckpointError as error:
            raise OSError(0, "what was written does not read back") from error
        raise OSError(0, "what was written does not read back")

    with output_errors(path), replacing(path, check=check) as file:
        try:
            torch.save(whole, file)
        except RuntimeError as error:  # torch hides the error of the file behind its own
            cause = error.__context__
            if cause is not None and not isinstance(cause, Exception):
                raise cause from None  # an interrupt
            raise cause if isinstance(cause, OSError) else OSError(0, "no space left, or an error of the disk") from error
    return digest


class DamagedError(CheckpointError):
    """A checkpoint that does not read back whole, or that holds what none of ours does."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}", "use another checkpoint, or bring this one back from a copy")
        self.path = path


def load(path: Path, kind: Kind = CHECKPOINT) -> dict[str, Any]:
    """Read and check a checkpoint, or another kind of file that is kept as one; all tensors on the CPU.

    Raises :class:`DamagedError` for one that is damaged, :class:`CheckpointError` when it is missing, carries code, is
    of another kind or of a newer format.
    """
    return checked(path, read(path), kind)


def read(path: Path) -> Any:
    """What a file of PyTorch holds, whoever wrote it, as data only and on the CPU. Raises as :func:`load`."""
    return _read(path, _kind_of(path))


def seems_whole(path: Path, kind: Kind) -> bool:
    """Whether ``path`` looks like such a file that is there to its end; its weights are left unread, and its digest unchecked."""
    try:
        content = _read(path, _kind_of(path), mmap=True)
    except CheckpointError:
        return False
    return isinstance(content, dict) and content.get("magic") == kind.magic


def checked(path: Path, content: Any, kind: Kind = CHECKPOINT) -> dict[str, Any]:
    """``content``, read from ``path``, when it is one of ours and whole. Raises as :func:`load`."""
    if not isinstance(content, dict) or content.get("magic") != kind.magic:
        raise CheckpointError(f"{path}: not a {kind.magic}", _OURS)
    if type(content.get("format")) is not int or content["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {str(content.get('format'))[:20]} is not {FORMAT}", "use a newer ddpmctl"
        )
    digest = content.pop("digest", None)
    try:
        good = digest == digest_of(content)
    except (RuntimeError, TypeError, ValueError):  # tensors of kinds that we do not save, and the like
        good = False
    if not good:
        raise DamagedError(path, "damaged: its content does not match its digest")
    fault = kind.fault_of(content)
    if fault:
        raise DamagedError(path, fault)
    return {**content, "digest": digest}


def step_of(file: Path) -> int:
    """The step that a checkpoint or sample grid is named after; -1 for another name, such as step-5-best.pt."""
    match = re.fullmatch(r"step-(\d+)", file.stem)
    return int(match[1]) if match else -1


def files_in(folder: Path) -> list[Path]:
    """The checkpoints of ``folder`` by their names, of most steps first. Raises ``OSError``."""
    return sorted((file for file in folder.glob("step-*.pt") if step_of(file) >= 0), key=step_of, reverse=True)


@contextmanager
def naming_a_good_one() -> Iterator[None]:
    """Within it the error of a damaged checkpoint names the newest good one beside it, or says that there is none."""
    try:
        yield
    except DamagedError as error:
        good = _newest_good_beside(error.path)
        none = "there is no good one beside it: bring one back from a copy"
        raise CheckpointError(error.problem, f"the newest good one is {good}" if good else none) from error


def _newest_good_beside(path: Path) -> Path | None:
    """The checkpoint of the most steps in the same folder that reads back whole."""
    for file in files_in(path.parent):
        if file == path:
            continue
        try:
            load(file)
        except CheckpointError:
            continue
        return file
    return None


def _kind_of(path: Path) -> str:
    """``TORCH`` or ``PICKLE``; raises for a file that no checkpoint looks like, and says what it is instead."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint", _OURS)
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file, so not a checkpoint", _OURS)
    try:
        kind = what_is(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", "mend its rights, or its disk") from error
    damages = {
        EMPTY: "empty: never written to the end, or its content was lost",
        CUT_ZIP: "damaged or cut short",
        UNKNOWN: "damaged, or not a checkpoint at all",
    }
    if kind in damages:
        raise DamagedError(path, damages[kind])
    if kind in (TORCH, PICKLE):
        return kind
    run = next((folder for folder in path.parents if (folder / "checkpoints").is_dir()), None)
    advice = f"it belongs to {run}: give that folder" if run else _OURS
    if kind == TEXT and not run and path.suffix.lower() in (".yaml", ".yml"):
        advice = f"train with it first: ddpmctl train DATA --config {path}"
    raise CheckpointError(f"{path}: {kind}, not a checkpoint", advice)


def _read(path: Path, kind: str, *, mmap: bool = False) -> Any:
    """What the file holds, as data only; with ``mmap`` tensors stay in it until they are used.

    Raises :class:`CheckpointError` or :class:`DamagedError`.
    """
    try:
        if kind == TORCH:
            _check_pickle(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about pickles of other versions
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError,
            IndexError, ImportError, MemoryError, OverflowError, AssertionError, struct.error, zipfile.BadZipFile,
            zlib.error) as error:  # fmt: skip
        raise _fault(path, kind, error) from error


def _check_pickle(path: Path) -> None:
    """Raise ``BadZipFile`` where the checksum of an archive's pickle is wrong: torch believes what it finds there."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("/data.pkl"):
                archive.read(name)


def _fault(path: Path, kind: str, error: Exception) -> CheckpointError:
    """What is wrong with a file that cannot be read, in our words."""
    if out_of_memory(error):
        return CheckpointError(f"{path}: does not fit into memory", "free memory, or use another machine")
    # torch names a class or function that it does not know to be harmless, and has not called it.
    named = re.search(r"GLOBAL ([\w.]{1,100})", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if named or (kind == PICKLE and _names_code(path)):
        code = f" ({named[1]})" if named else ""
        return CheckpointError(f"{path}: refused: it carries code{code}, none of which was run", _OURS)
    if kind == PICKLE:  # what we save is an archive: this was never one of ours
        return CheckpointError(f"{path}: {PICKLE}, not a ddpmctl checkpoint", _OURS)
    return DamagedError(path, "damaged: it does not read back")


def _names_code(path: Path) -> bool:
    """Whether a pickle, of any protocol, names a class or function. Only looks at it."""
    try:
        with path.open("rb") as file:
            return any(code.name in ("GLOBAL", "STACK_GLOBAL", "INST") for code, _, _ in pickletools.genops(file))
    except (OSError, ValueError):  # no whole pickle
        return False
