"""Images between model and disk: [-1, 1] <-> uint8, grids, PNG and GIF files that know their origin."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from ddpmctl.files import output_errors, replacing

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's name for an image of 1, 3 or 4 channels."""

PROVENANCE_KEY = "ddpmctl"
"""Keyword of the PNG text chunk that holds the provenance."""

_MAX_PROVENANCE = 1 << 20
_MAX_CHUNKS = 10_000
_PNG = b"\x89PNG\r\n\x1a\n"


def to_uint8(x: Tensor) -> Tensor:
    """Pixels 0..255, uint8, out of ``x`` in [-1, 1], both (..., C, H, W).

    Values outside are clamped, so that bright pixels cannot wrap round; NaN, which no pixel can show, becomes
    black.
    """
    return ((x.float().nan_to_num(nan=-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """float32 in [-1, 1] out of uint8 pixels; :func:`to_uint8` gives exactly these pixels back."""
    return pixels.float() / 127.5 - 1


def to_pil(image: Tensor) -> Image.Image:
    """A Pillow image of uint8 (C, H, W), C = 1 (L), 3 (RGB) or 4 (RGBA), else ``ValueError``."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in MODES:
        raise ValueError(f"{image.dtype} {tuple(image.shape)} is not uint8 (C, H, W) with 1, 3 or 4 channels")
    channels, height, width = image.shape
    raw = image.permute(1, 2, 0).cpu().contiguous().numpy().tobytes()
    return Image.frombytes(MODES[channels], (width, height), raw)


def grid_columns(n: int, height: int, width: int, columns: int | None = None) -> int:
    """Images in a row of a grid of ``n``: ``columns``, or what makes the picture near-square."""
    return min(n, columns or math.ceil(math.sqrt(n * height / width)))


def grid_size(n: int, height: int, width: int, columns: int | None = None, padding: int = 2) -> tuple[int, int]:
    """Height and width in pixels of :func:`grid`, before it is enlarged."""
    columns = grid_columns(n, height, width, columns)
    return -(-n // columns) * (height + padding) + padding, columns * (width + padding) + padding


def grid(images: Tensor, columns: int | None = None, padding: int = 2, scale: int | None = 1) -> Image.Image:
    """One picture of uint8 (N, C, H, W): row by row, ``padding`` white pixels between and around.

    ``columns`` None: as many as make the picture near-square. ``scale`` repeats every pixel so many times
    each way. 1 keeps true pixels: row r starts at padding + r * (H + padding), likewise across. None chooses
    1 to 8, so that the picture is 512 pixels wide or more where that suffices. In RGBA the gaps are
    transparent. Raises ``ValueError`` when there is no image.
    """
    n, channels, height, width = images.shape
    if n == 0:
        raise ValueError("a grid of no images")
    columns = grid_columns(n, height, width, columns)
    down, across = height + padding, width + padding
    canvas = torch.full((channels, *grid_size(n, height, width, columns, padding)), 255, dtype=torch.uint8)
    if channels == 4:
        canvas[3] = 0
    for i, image in enumerate(images.cpu()):
        top, left = padding + i // columns * down, padding + i % columns * across
        canvas[:, top : top + height, left : left + width] = image
    if scale is None:
        scale = min(8, max(1, math.ceil(512 / canvas.shape[2])))
    return enlarged(to_pil(canvas), scale)


def enlarged(image: Image.Image, scale: int) -> Image.Image:
    """``image`` with every pixel repeated ``scale`` times each way: larger, and as sharp."""
    if scale == 1:
        return image
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def save_png(path: Path, image: Image.Image, provenance: dict[str, Any] | None = None) -> None:
    """Write a PNG in one step, with ``provenance`` as JSON in a text chunk; what JSON lacks becomes a string.

    Raises :class:`ddpmctl.errors.OutputError` when it cannot be written.
    """
    info = PngImagePlugin.PngInfo()
    if provenance is not None:
        info.add_text(PROVENANCE_KEY, _to_json(provenance))
    with output_errors(path), replacing(path) as file:
        image.save(file, "PNG", pnginfo=info)


def read_provenance(path: Path) -> dict[str, Any] | None:
    """What :func:`save_png` or :func:`save_gif` was told of an image; None for any other file.

    Reads no pixels, and no more than 1 MiB of whatever a stranger's file holds. Raises ``OSError`` when the
    file is missing or cannot be read.
    """
    with path.open("rb") as file:
        text = _gif_comment(file) or _text_chunk(file, PROVENANCE_KEY.encode() + b"\0")
    try:
        found = json.loads(text or b"")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _gif_comment(file: BinaryIO) -> bytes:
    """The first comment before the first image of a GIF; nothing, with the file at its start, where there is none."""
    comment = b""
    head = file.read(13)
    if head[:6] in (b"GIF87a", b"GIF89a") and len(head) == 13:
        if head[10] & 0x80:  # a palette for all images
            file.seek(3 * 2 ** ((head[10] & 7) + 1), 1)
        for _ in range(_MAX_CHUNKS):
            kind = file.read(2)
            if kind[:1] != b"!" or comment:  # an extension begins with it
                break
            while (length := file.read(1)) not in (b"", b"\0") and len(comment) <= _MAX_PROVENANCE:
                block = file.read(length[0])
                comment += block if kind == b"!\xfe" else b""
    file.seek(0)
    return comment


def _text_chunk(file: BinaryIO, keyword: bytes) -> bytes | None:
    """Content of the first tEXt chunk with ``keyword`` (ending in NUL) before the pixels of a PNG."""
    if file.read(len(_PNG)) != _PNG:
        return None
    for _ in range(_MAX_CHUNKS):
        head = file.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if len(head) < 8 or kind in (b"IDAT", b"IEND"):
            return None
        end = file.tell() + length + 4
        if kind == b"tEXt" and len(keyword) <= length <= _MAX_PROVENANCE and file.read(len(keyword)) == keyword:
            return file.read(length - len(keyword))
        file.seek(end)
    return None


def save_gif(
    path: Path,
    frames: Sequence[Image.Image],
    *,
    fps: float = 10.0,
    hold_last: float = 2.0,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write an endless GIF in one step: 1 / ``fps`` seconds a frame, the last one ``hold_last`` seconds.

    GIF counts in hundredths of a second, and viewers slow down below two of them, so ``fps`` is at most 50.
    Transparency is laid on white. Grey frames keep all 256 shades; colours share one palette, so that nothing
    flickers. Equal frames in a row become one that lasts as long. ``provenance`` goes into the file's
    comment. Raises ``ValueError`` for no frames, :class:`ddpmctl.errors.OutputError` when it cannot be
    written.
    """
    if not frames:
        raise ValueError("a GIF of no frames")
    tick = max(20, round(100 / fps) * 10)
    durations = [tick] * (len(frames) - 1) + [max(tick, round(hold_last * 100) * 10)]
    first, *others = _indexed([flat(frame) for frame in frames])
    with output_errors(path), replacing(path) as file:
        first.save(
            file, "GIF", save_all=True, append_images=others, duration=durations, loop=0, optimize=False,
            comment=_to_json(provenance).encode() if provenance is not None else b"",
        )  # fmt: skip


def flat(image: Image.Image) -> Image.Image:
    """``image`` in mode L or RGB; transparency is laid on white."""
    if image.mode != "RGBA":
        return image if image.mode in ("L", "RGB") else image.convert("RGB")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image)
    return canvas


def _indexed(frames: list[Image.Image]) -> list[Image.Image]:
    """The frames with one palette for all: as they are where grey, else 256 colours of a sample of them."""
    if all(frame.mode == "L" for frame in frames):
        return frames
    frames = [frame.convert("RGB") for frame in frames]
    sample = frames[:: max(1, len(frames) // 8)] + [frames[-1]]
    width, height = sample[0].size
    montage = Image.new("RGB", (width, height * len(sample)))
    for i, frame in enumerate(sample):
        montage.paste(frame, (0, i * height))
    colours = montage.quantize(256, method=Image.Quantize.MEDIANCUT).getpalette() or []
    triples = [colours[i : i + 3] for i in range(0, len(colours), 3)]
    # Pillow looks colours up in coarse boxes: what is nearly white must be just that, or paper turns grey.
    sharp = [[255] * 3 if min(c) >= 248 else [0] * 3 if max(c) <= 7 else c for c in triples]
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for colour in sharp for value in colour])
    return [frame.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]


def _to_json(provenance: dict[str, Any]) -> str:
    return json.dumps(provenance, default=str)
