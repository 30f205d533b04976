"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ddpmctl.errors import OutputError


@contextmanager
def replacing(path: Path, *, check: Callable[[Path], None] | None = None) -> Iterator[BinaryIO]:
    """A new binary file that takes the place of ``path`` when the block ends well, and vanishes otherwise.

    Missing folders are made. It is written beside ``path``, so that the change of name is one step. With ``check`` it is
    also flushed to disk and read back by ``check(temporary)`` before that step, and the step lasts through a power cut.
    Raises ``OSError``; wrap it in :func:`output_errors`.
    """
    if path.exists() and not path.is_file():
        raise OSError(0, "a folder or device of that name is in the way")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    file = temporary.open("xb")
    try:
        with file:
            yield file
            if check:
                file.flush()
                os.fsync(file.fileno())
        if check:
            check(temporary)
        temporary.replace(path)
        if check:
            sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def beside(path: Path) -> Path:
    """A name in the folder of ``path`` for what is to take its place; those that a crash leaves are known by it."""
    return path.parent / f".ddpmctl-{secrets.token_hex(6)}.tmp"


def there(path: Path) -> bool:
    """Whether ``path`` is there and can be reached; a disk that fails has nothing."""
    try:
        return path.exists()
    except OSError:
        return False


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn what goes wrong with writing inside the block into an :class:`OutputError` that names ``path``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise OutputError(
            f"{path}: cannot be written: {reason}", "free space, mend the folder's rights, or write elsewhere"
        ) from error


def check_place(path: Path) -> None:
    """Raise :class:`OutputError` where ``path`` cannot be made: its nearest folder is none, or may not be written."""
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists() or folder.is_symlink())
    if path.exists() and path.is_file():
        place = path.absolute().parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        reason = "may not be written" if place.is_dir() else "is not a folder"
        raise OutputError(f"{path}: cannot be made: {place} {reason}", "choose another place")


def sync_folder(folder: Path) -> None:
    """Make a change of name in ``folder`` last, where the system can do that with folders."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(handle)
