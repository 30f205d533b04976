"""Where decoded pixels are put: an entry of the cache, the memory, or a file that nobody can name."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from types import TracebackType

import numpy as np

from ddpmctl.data.cache import Cache, update
from ddpmctl.data.decode import Pixels
from ddpmctl.data.draft import Draft
from ddpmctl.data.entry import About, Entry
from ddpmctl.data.records import Contents, Numbers, Records, places_in
from ddpmctl.data.scan import Listing
from ddpmctl.errors import DataError

IN_MEMORY_BYTES = 2 * 2**30
"""What is larger and not cached is kept in an unnamed temporary file and paged in by the system as it is used."""

_STEP_BYTES = 16 * 2**20


class PixelRows:
    """Rows of pixels, added one by one; in the end one array (N, C, H, W). A context manager.

    As long as the rows are those of the entry in the cache, that is used as it is. With the first that is not, they
    are copied to a new place: the next entry of the cache, or where there can be none, :func:`allocate`.
    ``listing``: the files that may give a row. ``known``: where each of them stands in the records of the entry, int64
    (N,), -1 where it has to be read. ``longest``: files that may be put together in one step, so that little is in memory.
    """

    def __init__(self, about: About, listing: Listing, cache: Cache | None) -> None:
        self.about, self.cache = about, cache
        self.old: Entry | None = cache.open(about) if cache else None
        self.known: Numbers = np.full(len(listing), -1, dtype=np.int64)
        self._old_good, self._old_contents = np.empty(0, np.bool_), np.empty((0, 32), np.uint8)
        if self.old:
            self.known = places_in(self.old.records, listing.names, listing.stamps)
            self._old_good = self.old.records.good
            self._old_contents = self.old.records.contents[self._old_good]
        self._old_rows = np.cumsum(self._old_good) - 1
        self.count = 0
        self._shape = (len(listing), about.channels, *about.size)
        self.longest = max(1, _STEP_BYTES // math.prod(self._shape[1:]))
        self._draft: Draft | None = None
        self._array = np.empty(0, np.uint8)

    def unaltered(self, listing: Listing) -> Entry | None:
        """The entry, where it is of these very files and all of them are as they were."""
        same = self.old is not None and listing.names == self.old.records.names and bool((self.known >= 0).all())
        return self.old if same else None

    def keep(self, places: Numbers) -> None:
        """Add the rows of the good ones of the files at ``places`` in the records of the entry. Raises as :meth:`add` does."""
        assert self.old
        places = places[self._old_good[places]]
        if not len(places):
            return
        rows = self._old_rows[places]
        beside = rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all())  # each other: no copy
        pixels = self.old.pixels[rows[0] : rows[-1] + 1] if beside else self.old.pixels[rows]
        self.add(self.old.records.contents[places], pixels)

    def add(self, contents: Contents, pixels: Pixels) -> None:
        """Add rows (K, C, H, W) made of files of these ``contents``.

        Raises :class:`DataError` when there is no room on any disk, :class:`Lost` when a disk fails.
        """
        # Like content gives like pixels, so a file that was only touched or read again for safety costs no copy.
        stop = self.count + len(contents)
        if not self._moved and not np.array_equal(self._old_contents[self.count : stop], contents):
            self._move()
        if self._moved:
            self._put(self.count, pixels)
        self.count = stop

    def finish(self, records: Records, fingerprint: str) -> Pixels:
        """All rows (N, C, H, W); they and ``records`` are what the cache remembers. Raises as :meth:`add` does."""
        pixels = self.old.pixels if self.old and records is self.old.records else self._finished(records, fingerprint)
        if self.cache:
            self.cache.trim()
        return pixels

    def _finished(self, records: Records, fingerprint: str) -> Pixels:
        if not self._moved and self.count < len(self._old_contents):
            self._move()
        if self.old and not self._moved:
            update(self.old, self.about, records, fingerprint)
            return self.old.pixels
        if self._draft and self.count:
            try:
                return self._draft.publish(records, fingerprint)
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
