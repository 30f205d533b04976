"""A folder that one process has for itself, and knows again."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock, Timeout

from ddpmctl.errors import OutputError
from ddpmctl.files import output_errors


class FolderLock:
    """Keeps other processes from ``folder`` until :meth:`release`, or the end of this process, however it comes.

    The file ``.lock`` in it stays: whoever deletes it could take a lock away from another.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / ".lock"
        self._taken = False
        self._lock: FileLock | None = None
        self._handle: int | None = None

    def take(self) -> None:
        """Make the folder and lock it; raises :class:`OutputError` when another process has it, or it cannot be made."""
        if self._lock is not None:
            return
        lock = FileLock(self.file)
        with output_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
            except Timeout as error:
                raise OutputError(
                    f"{self.folder}: another process is training in it", "wait until it ends, or give another --out"
                ) from error
            self._lock, self._taken = lock, True
            self._file_id = _identity(self.file)
            if os.name == "posix":  # held open, its number is not given to another folder
                self._handle = os.open(self.folder, os.O_RDONLY)
                self._folder_id = _identity(self._handle)

    def release(self) -> None:
        """Let others have the folder."""
        self._let_go()
        self._taken = False

    def lost(self) -> bool:
        """Whether the folder was taken, and is now moved, deleted or replaced, or its lock is."""
        if not self._taken:
            return False
        return self._lock is None or self.replaced() or _identity(self.file) != self._file_id

    def replaced(self) -> bool:
        """Whether the folder was taken, and what is under its name now is not that folder."""
        return self._handle is not None and _identity(self.folder) != self._folder_id

    def retake(self) -> None:
        """Lock the folder of that name anew; raises as :meth:`take`, and counts as lost until it works."""
        self._let_go()
        self.take()

    def _let_go(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _identity(place: Path | int) -> tuple[int, int] | None:
    """What a file or folder is, whatever its name; None where nothing can be reached."""
    try:
        found = os.stat(place)  # noqa: PTH116 - a path or an open file
    except OSError:
        return None
    return found.st_dev, found.st_ino
