"""One entry of the cache: the pixels of a data set as they left the decoder, and what is known of each file.

An entry is a folder of two files. ``pixels`` holds the uint8 rows (C, H, W) of the usable images one after the
other. ``index`` has a line with the sha256 of all that follows, a line of JSON that says what the entry is for, and
what is remembered of the files, as :mod:`ddpmctl.data.records` packs it.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import sys
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import features

from ddpmctl.config import DataConfig
from ddpmctl.data import decode, formats, modes, records
from ddpmctl.data.decode import Pixels, parse_colour
from ddpmctl.data.named import identity
from ddpmctl.data.records import Records, pack, unpack

PIXELS = "pixels"
INDEX = "index"
FEATURES = "features.npz"
_CHUNK = 64 * 2**20

Index = tuple[dict[str, Any], Records]
"""What an entry is for, and what is remembered."""


@dataclass(frozen=True)
class About:
    """What an entry is for: the data, and every setting on which pixels depend. ``size`` is (height, width)."""

    root: str
    size: tuple[int, int]
    channels: int
    fit: str
    background: tuple[int, int, int]

    @classmethod
    def of(cls, config: DataConfig, root: Path, size: tuple[int, int], channels: int) -> About:
        """``size`` and ``channels`` are those that the ``auto`` of ``config`` came to."""
        return cls(identity(root), size, channels, config.fit, parse_colour(config.background))

    @property
    def name(self) -> str:
        """The name of the entry's folder."""
        settings = repr((self.size, self.channels, self.fit, self.background))
        return f"{name_of_data(Path(self.root))}-{short_digest(settings)}"


def name_of_data(root: Path) -> str:
    """How the names of all entries for one folder or zip begin."""
    return f"images-{short_digest(repr((decoder_version(), identity(root))))}"


def short_digest(text: str) -> str:
    """Half a sha256, for names."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@cache
def decoder_version() -> str:
    """Changes with what makes an entry of files: our own source, Pillow, and the libraries below it."""
    sources = (decode.__file__, formats.__file__, modes.__file__, records.__file__, __file__)
    digest = hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()
    libraries = [features.version(name) for name in ("jpg", "jpg_2000", "libtiff", "webp")]
    return f"{digest[:16]} {PIL.__version__} {libraries}"


@dataclass(frozen=True)
class Entry:
    """An entry opened: its pixels (N, C, H, W), which can be changed in memory only, its records and their fingerprint."""

    folder: Path
    pixels: Pixels
    crc: int
    records: Records
    fingerprint: str


def write_index(about: About, shape: tuple[int, ...], crc: int, records: Records, fingerprint: str) -> bytes:
    """The content of ``index`` for pixels of ``shape`` (N, C, H, W) and checksum ``crc``."""
    head = {**asdict(about), "decoder": decoder_version(), "shape": shape, "crc": crc, "fingerprint": fingerprint}
    body = json.dumps(head).encode("ascii") + b"\n" + pack(records)
    return hashlib.sha256(body).hexdigest().encode("ascii") + b"\n" + body


def read_head(folder: Path) -> dict[str, Any]:
    """What the entry is for, with its ``shape``, not verified; raises ``OSError`` or ``ValueError``."""
    with (folder / INDEX).open("rb") as file:
        file.readline()
        head = json.loads(file.readline(2**20))
    shape = head.get("shape") if isinstance(head, dict) and isinstance(head.get("root"), str) else None
    if not isinstance(shape, list) or len(shape) != 4 or not all(isinstance(side, int) for side in shape):
        raise ValueError("not an index")
    return dict(head)


def read_index(folder: Path) -> Index:
    """What the entry is for and its records, verified; raises ``OSError`` or ``ValueError`` when damaged."""
    checksum, _, body = (folder / INDEX).read_bytes().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode("ascii") != checksum:
        raise ValueError("damaged index")
    head, _, packed = body.partition(b"\n")
    return json.loads(head), unpack(packed)


def open_entry(folder: Path, about: About, index: Index | None = None) -> Entry:
    """Open and verify; raises ``OSError`` or ``ValueError`` when it is missing, damaged or of another version.

    ``index``: that of this entry, where it has been read already.
    """
    head, records = index or read_index(folder)
    expected = json.loads(json.dumps({**asdict(about), "decoder": decoder_version()}))
    if any(head[key] != value for key, value in expected.items()):
        raise ValueError("an entry for something else")
    pixels = map_privately(folder / PIXELS, tuple(head["shape"]))
    if (folder / PIXELS).stat().st_size != pixels.nbytes or checksum_of(pixels) != head["crc"]:
        raise ValueError("damaged pixels")
    return Entry(folder, pixels, head["crc"], records, head["fingerprint"])


def map_privately(path: Path, shape: tuple[int, ...]) -> Pixels:
    """Uint8 file as an array of ``shape`` that can be written to without a trace in the file.

    Raises ``OSError``, and ``ValueError`` where the file is shorter.
    """
    size = math.prod(shape)
    with path.open("rb") as file:
        if sys.platform == "win32":
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        else:
            # Linux refuses to map more than the memory has room for, in case all of it were written to. The flag
            # says that it will not be; Python names it from 3.13 on.
            unreserved = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
            flags, protection = mmap.MAP_PRIVATE | unreserved, mmap.PROT_READ | mmap.PROT_WRITE
            mapped = mmap.mmap(file.fileno(), size, flags=flags, prot=protection)
    return np.frombuffer(mapped, dtype=np.uint8).reshape(shape)


def checksum_of(pixels: Pixels, crc: int = 0) -> int:
    """CRC-32 of the bytes of a contiguous array, going on from ``crc``, that of the bytes before."""
    flat = pixels.reshape(-1).data
    for start in range(0, len(flat), _CHUNK):
        crc = zlib.crc32(flat[start : start + _CHUNK], crc)
    return crc


def files_of(place: Path) -> list[Path]:
    """The files that we have written in the folder of an entry."""
    names = [place / INDEX, place / PIXELS, place / FEATURES, *place.glob(".ddpmctl-*.tmp")]
    return [path for path in names if path.is_file() and not path.is_symlink()]


def remove_entry(place: Path) -> None:
    """Remove an entry, the index first, so that nobody opens half of one; what others put there stays."""
    with suppress(OSError):
        if not place.is_symlink():
            for path in files_of(place):
                path.unlink()
            place.rmdir()
