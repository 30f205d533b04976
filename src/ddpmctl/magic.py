"""What a file is, told in words by its first bytes, whatever its name ends in."""

from __future__ import annotations

import zipfile
from pathlib import Path

EMPTY = "empty"
UNKNOWN = "of no known kind"
TEXT = "a text file"
PICKLE = "a Python pickle"
TORCH = "a PyTorch archive"
ZIP = "a zip archive"
SAFETENSORS = "a safetensors file"
CUT_ZIP = "a zip archive that is cut short or damaged"

_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"BM", "a BMP image"),
    (b"%PDF-", "a PDF file"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"\x80", PICKLE),
)


def what_is(path: Path) -> str:
    """The kind of the file ``path``: one of the constants above, ``"a PNG image"`` and the like.

    Reads the beginning, and of a zip archive the names in it. Raises ``OSError`` when it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return EMPTY
    if head.startswith(b"PK\x03\x04"):
        return _what_zip(path)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP image"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return SAFETENSORS
    found = next((kind for start, kind in _STARTS if head.startswith(start)), None)
    return found or (TEXT if _is_text(head) else UNKNOWN)


def is_pipeline(path: Path) -> bool:
    """Whether ``path`` is a folder as diffusers writes one; its network lies in ``unet/``, or beside ``model_index.json``."""
    return (path / "model_index.json").is_file() or (path / "unet" / "config.json").is_file()


def is_image(kind: str) -> bool:
    """Whether ``kind``, as :func:`what_is` told it, is an image."""
    return kind.endswith(" image")


def _what_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return CUT_ZIP
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program"
    if any(name.endswith("/data.pkl") for name in names):
        return TORCH
    return "a NumPy .npz file" if names and all(name.endswith(".npy") for name in names) else ZIP


def _is_text(head: bytes) -> bool:
    """UTF-8, which may end within a character, without control characters."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode()
    return all(char.isprintable() or char in "\t\r\n\f\ufeff" for char in text)
