"""Where decoded pixels are put: an entry of the cache, the memory, or a file that nobody can name."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from types import TracebackType

import numpy as np

from ddpmctl.data.cache import Cache, update
from ddpmctl.data.decode import Pixels
from ddpmctl.data.draft import Draft
from ddpmctl.data.entry import About, Entry, Record, Records, contents, unchanged
from ddpmctl.errors import DataError

IN_MEMORY_BYTES = 2 * 2**30
"""What is larger and not cached is kept in an unnamed temporary file and paged in by the system as it is used."""


class PixelRows:
    """Rows of pixels, added one by one; in the end one array (N, C, H, W). A context manager.

    As long as the rows are those of the entry in the cache, that is used as it is. With the first that is not, they
    are copied to a new place: the next entry of the cache, or where there can be none, :func:`allocate`.
    ``stamps``: of every file that may give a row, by name. ``known``: what need not be read, for it is remembered.
    """

    def __init__(self, about: About, stamps: Mapping[str, str], cache: Cache | None) -> None:
        self.about, self.cache = about, cache
        self.old: Entry | None = cache.open(about) if cache else None
        self.known: Records = unchanged(self.old.records, stamps) if self.old else {}
        self.count = 0
        self._old_contents = contents(self.old.records) if self.old else []
        self._shape = (len(stamps), about.channels, *about.size)
        self._draft: Draft | None = None
        self._array = np.empty(0, np.uint8)

    def remembered(self, record: Record) -> Pixels | None:
        """The pixels (C, H, W) of one that is ``known``; None of a bad file."""
        return self.old.pixels[record.row] if self.old and record.content else None

    def add(self, content: str, pixels: Pixels) -> int:
        """Add a row (C, H, W) made of a file of that ``content`` (sha256 in hex); returns its number.

        Raises :class:`DataError` when there is no room on any disk, :class:`Lost` when a disk fails.
        """
        # Like content gives like pixels, so a file that was only touched or read again for safety costs no copy.
        if not self._moved and self._old_contents[self.count : self.count + 1] != [content]:
            self._move()
        if self._moved:
            self._put(self.count, pixels[None])
        self.count += 1
        return self.count - 1

    def finish(self, records: Records) -> Pixels:
        """All rows (N, C, H, W); they and ``records`` are what the cache remembers. Raises as :meth:`add` does."""
        if not self._moved and self.count < len(self._old_contents):
            self._move()
        pixels = self._finished(records)
        if self.cache:
            self.cache.trim()
        return pixels

    def _finished(self, records: Records) -> Pixels:
        if self.old and not self._moved:
            if records != self.old.records:
                update(self.old, self.about, records)
            return self.old.pixels
        if self._draft and self.count:
            try:
                return self._draft.publish(records)
            except OSError:
                self._retreat()
        return self._array[: self.count]

    @property
    def _moved(self) -> bool:
        """Whether rows are put in a new place."""
        return self._draft is not None or self._array.size > 0

    def _move(self) -> None:
        """Find a new place, and put the rows so far there."""
        self._draft = self.cache.draft(self.about, self._shape) if self.cache else None
        if self._draft is None:
            self._array = allocate(self._shape)
        if self.old and self.count:
            self._put(0, self.old.pixels[: self.count])

    def _put(self, start: int, rows: Pixels) -> None:
        """Put rows (K, C, H, W) behind the ``start`` ones that are there."""
        if self._draft:
            try:
                return self._draft.write(np.ascontiguousarray(rows))
            except OSError:
                self._retreat()
        self._array[start : start + len(rows)] = rows
        return None

    def _retreat(self) -> None:
        """Go on without the cache, for it cannot be written."""
        assert self._draft
        self._array = allocate(self._shape)
        if self._draft.count:
            self._array[: self._draft.count] = self._draft.rows()
        self._draft.drop()
        self._draft = None

    def __enter__(self) -> PixelRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._draft:
            self._draft.drop()


def allocate(shape: tuple[int, ...]) -> Pixels:
    """An uninitialised array in memory, or above ``IN_MEMORY_BYTES`` on a file that nobody can name.

    Raises :class:`DataError` when there is no room for the file.
    """
    wanted = math.prod(shape)
    if wanted <= IN_MEMORY_BYTES:
        return np.empty(shape, dtype=np.uint8)
    folder = tempfile.gettempdir()
    try:
        if shutil.disk_usage(folder).free < wanted:
            raise OSError("too little room")
        with tempfile.TemporaryFile() as file:
            # Claim the room now: a full disk would otherwise kill the process at some later write.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, wanted)
            return np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
    except OSError as error:
        raise DataError(
            f"{folder}: {wanted / 2**30:.1f} GiB for decoded images: {error.strerror or error}",
            "set TMPDIR to a folder on a larger disk, or use fewer or smaller images",
        ) from error
