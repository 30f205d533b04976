"""An entry of the cache while it is being written."""

from __future__ import annotations

import math
import os
import re
import tempfile
from pathlib import Path

from ddpmctl.data.decode import Pixels
from ddpmctl.data.entry import INDEX, PIXELS, About, checksum_of, map_privately, remove_entry, write_index
from ddpmctl.data.records import Records

UNFINISHED = re.compile(r"images-\w+\.tmp")
"""Names of the folders in which entries are written."""


class Lost(Exception):
    """A disk has not kept what was written to it. Never leaves the data package."""


class Draft:
    """An entry for the folder ``cache`` being written, row by row up to ``shape`` (N, C, H, W), then :meth:`publish`-ed.

    :meth:`drop` it in the end, come what may: then nothing is left in the folder but a published entry.
    Everything raises ``OSError`` when there is no room.
    """

    def __init__(self, cache: Path, about: About, shape: tuple[int, ...]) -> None:
        self.about, self.place, self._row = about, cache / about.name, shape[1:]
        self.count = self._crc = 0
        self.folder = Path(tempfile.mkdtemp(prefix="images-", suffix=".tmp", dir=cache))
        try:
            self._file = (self.folder / PIXELS).open("xb", buffering=0)
            if hasattr(os, "posix_fallocate"):  # better none now than too little later
                os.posix_fallocate(self._file.fileno(), 0, math.prod(shape))
        except BaseException:
            self.drop()
            raise

    def write(self, rows: Pixels) -> None:
        """Add rows (K, C, H, W), contiguous. When it raises, those before are still there."""
        rest = rows.reshape(-1).data
        while rest:
            rest = rest[self._file.write(rest) :]
        self.count += len(rows)
        self._crc = checksum_of(rows, self._crc)

    def rows(self) -> Pixels:
        """All rows as they are on disk; raises :class:`Lost` when they are not what was written."""
        rows = map_privately(self.folder / PIXELS, (self.count, *self._row))
        if checksum_of(rows) != self._crc:
            raise Lost
        return rows

    def publish(self, records: Records, fingerprint: str) -> Pixels:
        """Make an entry of what was written: the rows, mapped from it."""
        shape = (self.count, *self._row)
        self._file.truncate(math.prod(shape))
        os.fsync(self._file.fileno())  # a server may tell only now that there is no room
        self._file.close()
        try:
            with (self.folder / INDEX).open("xb") as file:
                file.write(write_index(self.about, shape, self._crc, records, fingerprint))
                file.flush()
                os.fsync(file.fileno())
            remove_entry(self.place)
            self.folder.rename(self.place)
            return map_privately(self.place / PIXELS, shape)
        except OSError:  # another process was faster; the pixels are safe, and stay when the file loses its name
            return self.rows()

    def drop(self) -> None:
        """Remove what has not been published."""
        if hasattr(self, "_file"):
            self._file.close()
        remove_entry(self.folder)
