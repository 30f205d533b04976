"""What counts as an image file, and the one exception for a file that is none."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

MAX_FILE_BYTES = 256 * 2**20
"""Largest file that is read, packed or not."""

# Pillow only stubs these, or draws them with another program (EPS would start Ghostscript on a stranger's
# file), or they hold no picture that anybody trains on.
_NOT_RASTER = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IMT", "IPTC", "MCIDAS", "MPEG", "SPIDER", "WMF", "XVTHUMB"})

# All plugins are registered here, once: Pillow would do it lazily, from several threads at a time.
Image.init()

# Formats without a magic number come last, for they try to parse whatever they are given.
FORMATS: tuple[str, ...] = tuple(
    sorted((f for f in Image.OPEN if f not in _NOT_RASTER), key=lambda f: Image.OPEN[f][1] is None)
)
"""Pillow formats that are opened, whatever the ending of the file says."""

EXTENSIONS: frozenset[str] = frozenset(
    ending for ending, form in Image.registered_extensions().items() if form in (*FORMATS, "MPO")
)
"""Endings of image files, in lower case with the dot."""


class BadImage(Exception):
    """One file cannot be used; ``reason`` says why in a few words. Never leaves the data package.

    ``lasting``: it lies in the content, so that reading it again is of no use before the file changes.
    """

    def __init__(self, reason: str, *, lasting: bool = True) -> None:
        super().__init__(reason)
        self.reason, self.lasting = reason, lasting


def read_file(path: str | Path) -> bytes:
    """The bytes of a file; raises :class:`BadImage` for more than a file may have, and ``OSError``."""
    with open(path, "rb", buffering=0) as stream:  # noqa: PTH123 - there may be a million
        if os.fstat(stream.fileno()).st_size > MAX_FILE_BYTES:
            raise BadImage(f"more than {MAX_FILE_BYTES // 2**20} MiB")
        return stream.readall()
