"""One image file to uint8 pixels, whatever its mode, depth, orientation or condition.

Embedded colour profiles are ignored: pixel values are taken as sRGB.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageColor, UnidentifiedImageError

from ddpmctl.data.formats import FORMATS, BadImage
from ddpmctl.data.headers import MAX_PIXELS, Probe
from ddpmctl.data.modes import Fill, fill_value, is_grey, to_eight_bit, to_mode
from ddpmctl.errors import ConfigError
from ddpmctl.parsing import shown
from ddpmctl.rows import nearest

# Images above this many pixels are decoded one at a time, so that memory does not grow with the threads.
_HUGE = 25_000_000
_one_huge_image = threading.Lock()

# What Pillow's parsers raise on broken bytes. Warnings are among them for those who run with -W error.
_FAULTS = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError,
    RuntimeError, EOFError, MemoryError, ImportError, Warning, struct.error, zlib.error,
    Image.DecompressionBombError, ImageCms.PyCMSError,
)  # fmt: skip

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

Pixels = npt.NDArray[np.uint8]


def _crop(image: Image.Image, size: tuple[int, int], colour: Fill) -> Image.Image:
    """Scale until ``size`` (width, height) is filled, and cut the middle."""
    width, height = size
    scale = max(width / image.width, height / image.height)
    if scale == 1:  # cut at whole pixels: half of one would blur an image that needs no scaling
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))
    left_over, top_over = max(0.0, image.width - width / scale), max(0.0, image.height - height / scale)
    box = (left_over / 2, top_over / 2, image.width - left_over / 2, image.height - top_over / 2)
    return _resize(image, size, box)


def _pad(image: Image.Image, size: tuple[int, int], colour: Fill) -> Image.Image:
    """The whole image in the middle of ``size`` (width, height); shrunk where too large, never enlarged."""
    width, height = size
    scale = min(1.0, width / image.width, height / image.height)
    if scale < 1:
        image = _resize(image, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    canvas = Image.new(image.mode, size, colour)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def _stretch(image: Image.Image, size: tuple[int, int], colour: Fill) -> Image.Image:
    """Exactly ``size`` (width, height), whatever becomes of the proportions."""
    return _resize(image, size)


FITS: dict[str, Callable[[Image.Image, tuple[int, int], Fill], Image.Image]] = {
    "crop": _crop,
    "pad": _pad,
    "stretch": _stretch,
}


@cache
def parse_colour(text: str) -> tuple[int, int, int]:
    """An opaque colour as (red, green, blue), 0..255; raises :class:`ConfigError` naming data.background."""
    try:
        colour = ImageColor.getrgb(text.strip())
    except ValueError as error:
        raise ConfigError(
            f"data.background: {text!r} is not a colour{nearest(text.lower(), ImageColor.colormap)}",
            "give a name such as white or grey, or #rrggbb",
        ) from error
    if not all(0 <= part <= 255 for part in colour):
        raise ConfigError(f"data.background: {text!r} is out of range", "give 0 to 255, or 0% to 100%")
    if len(colour) != 3:
        raise ConfigError(f"data.background: {text!r} is see-through", "give an opaque colour: #rrggbb")
    return colour[0], colour[1], colour[2]


def probe(raw: bytes, *, full: bool = False) -> Probe:
    """Look at the header of an image file, or decode all of it with ``full``; raises :class:`BadImage`."""
    with _faults():
        image = _open(raw)
        described = _describe(image, raw)
        if full:
            with _huge(image):
                image.load()
        return described


def decode(raw: bytes, *, size: tuple[int, int], channels: int, fit: str, background: str) -> Pixels:
    """Pixels (height, width, channels) in 0..255 of one image file.

    ``size`` is (height, width); ``channels`` 1, 3 or 4; ``fit`` a key of :data:`FITS`. An image that has the
    size already is not resampled. Transparency is laid on ``background`` unless there are 4 channels.
    Raises :class:`BadImage` for bytes that are no usable image, :class:`ConfigError` for the background.
    """
    return examine(raw, size=size, channels=channels, fit=fit, background=background)[1]


def examine(raw: bytes, *, size: tuple[int, int], channels: int, fit: str, background: str) -> tuple[Probe, Pixels]:
    """:func:`probe` and :func:`decode` in one reading."""
    height, width = size
    mode, colour, place = _MODES[channels], parse_colour(background), FITS[fit]
    with _faults():
        image = _open(raw)
        described = _describe(image, raw)
        if image.format in ("JPEG", "MPO"):
            # The decoder can shrink by 2, 4 or 8 at no cost; twice the target leaves work to a good filter.
            sides = (width, height) if described.size == (image.height, image.width) else (height, width)
            image.draft(None, (2 * sides[0], 2 * sides[1]))
        with _huge(image):
            image.load()
            flat = to_mode(to_eight_bit(_upright(image)), mode, colour)
            if flat.size != (width, height):
                flat = place(flat, (width, height), fill_value(colour, mode))
        return described, np.array(flat, dtype=np.uint8).reshape(height, width, channels)


@contextmanager
def quiet() -> Iterator[None]:
    """:func:`hushed`, and silence what libtiff prints: nothing else is printed on stderr meanwhile."""
    with hushed(), _nothing_on_descriptor(2):
        yield


@contextmanager
def hushed() -> Iterator[None]:
    """Silence Pillow's warnings and log: what is wrong with an image is in the report.

    Both belong to the whole process, so enter this in the main thread, around the threads that decode.
    """
    log = logging.getLogger("PIL")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    finally:
        log.setLevel(level)


@contextmanager
def _nothing_on_descriptor(number: int) -> Iterator[None]:
    """Libraries in C print to the descriptor itself: within the block it leads nowhere."""
    try:
        kept = os.dup(number)
    except OSError:  # closed before the program began
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, number)
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _faults() -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError as error:
        raise BadImage("not an image that can be read") from error
    except MemoryError as error:
        raise BadImage("too large for the memory", lasting=False) from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than {MAX_PIXELS // 10**6} million pixels") from error
    except _FAULTS as error:
        text = str(error).partition("\n")[0] or type(error).__name__
        if not isinstance(error, OSError | SyntaxError | ImportError):  # those are written for people
            text = f"damaged file: {text}"
        reason = "truncated" if "truncated" in text.lower() else shown(text[:120])
        # a library that Pillow misses may be there the next time
        raise BadImage(reason, lasting=not isinstance(error, ImportError)) from error


def _huge(image: Image.Image) -> threading.Lock | nullcontext[None]:
    return _one_huge_image if image.width * image.height > _HUGE else nullcontext()


def _open(raw: bytes) -> Image.Image:
    if not raw:
        raise BadImage("empty file")
    image = Image.open(io.BytesIO(raw), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"more than {MAX_PIXELS // 10**6} million pixels")
    if not image.width * image.height:
        raise BadImage("no pixels")
    return image


def _describe(image: Image.Image, raw: bytes) -> Probe:
    width, height = image.size
    tags = getattr(image, "tag_v2", None)
    if image.format == "TIFF" and tags:  # only newer versions of Pillow give the upright size here
        width, height = tags.get(256, width), tags.get(257, height)
    if _orientation(image, raw) >= 5:
        width, height = height, width
    return Probe(
        mode=image.mode,
        size=(height, width),
        format=image.format or "?",
        # a phone's MPO holds depth maps, a PSD its layers: neither is a sequence
        animated=image.format not in ("MPO", "PSD") and bool(getattr(image, "is_animated", False)),
        grey=is_grey(image),
        alpha=image.has_transparency_data,
    )


def _orientation(image: Image.Image, raw: bytes) -> int:
    """EXIF orientation 1..8; 1 where it is missing or cannot be read, for the pixels may still be good."""
    if image.format == "PNG":
        # It may stand behind the pixels, so Pillow decodes them to look for it: not where there is none.
        if not any(mark in raw for mark in (b"eXIf", b"Raw profile type exif", b"tiff:Orientation")):
            return 1
        image.load()
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _FAULTS:
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _upright(image: Image.Image) -> Image.Image:
    # Asked again after loading: TIFF images turn themselves upright and forget their orientation.
    turn = _UPRIGHT.get(_orientation(image, b"eXIf"))
    return image if turn is None else image.transpose(turn)


def _resize(
    image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    """Bicubic with antialiasing; Pillow weighs colours by their alpha, so that no halo appears."""
    return image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
