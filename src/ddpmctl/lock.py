"""A folder that one process has for itself, and knows again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from ddpmctl.errors import OutputError
from ddpmctl.files import output_errors


class FolderLock:
    """Keeps other processes from ``folder`` until :meth:`release`, or the end of this process, however it comes.

    The file ``.lock`` in it stays: whoever deletes it could take a lock away from another.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / ".lock"
        self._held: _Held | None = None

    def take(self) -> None:
        """Make the folder and lock it; raises :class:`OutputError` when another process has it, or it cannot be made."""
        if self._held is None:
            self._held = self._take()

    def release(self) -> None:
        """Let others have the folder."""
        if self._held is not None:
            self._held.let_go()
            self._held = None

    def lost(self) -> bool:
        """Whether the folder was taken, and is now moved, deleted or replaced, or its lock is."""
        return self._held is not None and (self.replaced() or _identity(self.file) != self._held.file_id)

    def replaced(self) -> bool:
        """Whether the folder was taken, and what is under its name now is not that folder."""
        return self._held is not None and _identity(self.folder) != self._held.folder_id

    def retake(self) -> None:
        """Lock the folder that has the name now, and let the lost one go; raises as :meth:`take`, and then keeps that."""
        now = self._take()
        self.release()
        self._held = now

    def _take(self) -> _Held:
        lock = FileLock(self.file)
        with output_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
            except Timeout as error:
                raise OutputError(
                    f"{self.folder}: another process is training in it", "wait until it ends, or give another --out"
                ) from error
            # Held open, the number of a deleted folder is not given to another.
            handle = os.open(self.folder, os.O_RDONLY) if os.name == "posix" else None
            return _Held(lock, handle, _identity(self.folder), _identity(self.file))


class _Held(NamedTuple):
    lock: FileLock
    handle: int | None
    folder_id: tuple[int, int] | None
    file_id: tuple[int, int] | None

    def let_go(self) -> None:
        if self.handle is not None:
            os.close(self.handle)
        self.lock.release()


def _identity(place: Path) -> tuple[int, int] | None:
    """What a file or folder is, whatever its name; None where nothing can be reached."""
    try:
        found = place.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
