"""Stamps: what is another when a file is.

Run as a program it stamps the names that it is given on stdin, for :mod:`ddpmctl.data.stamper`; so it imports little.
"""

from __future__ import annotations

import marshal
import os
import sys
from array import array

Stamp = tuple[int, ...]
"""Size in bytes, and times of the last change of the content and of anything in ns."""

GONE: Stamp = (-1, 0, 0)
COLUMNS = 3

_MOST = 2**63 - 1


def stamp(path: str) -> Stamp:
    """The stamp of one file, which is not opened; :data:`GONE` when there is none.

    No program can set the second time back: a file may be replaced by one of the same size and date.
    """
    try:
        return _kept(os.stat(path))  # noqa: PTH116 - twice as fast as pathlib
    except OSError:
        return GONE


def stamps_of(root: str, names: list[str]) -> bytes:
    """The stamps of ``names`` below the folder ``root``, :data:`COLUMNS` int64 each."""
    # In tight lines, for there may be a million files; from an open folder the way to each is shorter.
    stamps, stat = array("q"), os.stat
    try:
        handle = os.open(root, os.O_RDONLY) if stat in os.supports_dir_fd else None
    except OSError:
        return array("q", GONE * len(names)).tobytes()
    prefix = f"{root}/" if handle is None else ""
    try:
        for name in names:
            try:
                found = stat(prefix + name, dir_fd=handle)
                stamps.extend((found.st_size, found.st_mtime_ns, found.st_ctime_ns))
            except OverflowError:
                stamps.extend(_kept(found))
            except OSError:
                stamps.extend(GONE)
    finally:
        if handle is not None:
            os.close(handle)
    return stamps.tobytes()


def _kept(found: os.stat_result) -> Stamp:
    """The stamp out of what the system tells; years that no int64 of nanoseconds can count to become the last that it can."""
    times = (max(-_MOST, min(_MOST, time)) for time in (found.st_mtime_ns, found.st_ctime_ns))
    return (found.st_size, *times)


if __name__ == "__main__":
    sys.stdout.buffer.write(stamps_of(*marshal.load(sys.stdin.buffer)))
