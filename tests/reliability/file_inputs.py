"""Random damage to files, and what it is done to: images of every common kind, and zips of strange members."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
import zlib
from functools import cache
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from PIL import Image, features

_NUMBERS = [0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
_HEAD = 80
"""Most of what can be a lie stands in the first bytes."""


@st.composite
def damaged(draw: DrawFn, data: bytes, other: bytes = b"") -> bytes:
    """``data`` with one to four changes: bits, bytes, numbers, cuts, insertions, parts of itself or of ``other``."""
    for _ in range(draw(st.integers(1, 4))):
        size = len(data)
        at = draw(st.integers(0, min(size, _HEAD)) | st.integers(0, size) | st.integers(max(0, size - _HEAD), size))
        length = draw(st.integers(1, 16) | st.integers(1, max(1, size)))
        kind = draw(st.sampled_from(["bit", "number", "cut", "end", "insert", "double", "splice", "zeros"]))
        if kind == "bit" and at < size:
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif kind == "number":
            code = draw(st.sampled_from(["<H", ">H", "<I", ">I", "B"]))
            number = draw(st.sampled_from(_NUMBERS)) & (256 ** struct.calcsize(code) - 1)
            data = data[:at] + struct.pack(code, number) + data[at + struct.calcsize(code) :]
        elif kind == "cut":
            data = data[:at] + data[at + length :]
        elif kind == "end":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(max_size=20)) + data[at:]
        elif kind == "double":
            data = data[: at + length] + data[at:]
        elif kind == "splice":
            data = data[:at] + other[at : at + length] + data[at + length :]
        elif kind == "zeros":
            data = data[:at] + bytes(min(length, 4000)) + data[at + length :]
    return data


@st.composite
def flipped(draw: DrawFn, data: bytes) -> bytes:
    """``data`` with one to three bits the other way."""
    changed = bytearray(data)
    for at in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=3)):
        changed[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


@cache
def images() -> dict[str, bytes]:
    """Small whole images by name, whose ending is right."""
    dice = np.random.default_rng(5)
    pixels = dice.integers(0, 256, (6, 9, 4), dtype=np.uint8)
    rgba, wide = Image.fromarray(pixels, "RGBA"), dice.integers(0, 65536, (6, 9), dtype=np.uint16)
    rgb, grey, real = rgba.convert("RGB"), rgba.convert("L"), Image.fromarray(dice.random((6, 9), dtype=np.float32))
    palette, bits = rgb.quantize(9), grey.convert("1")
    turned = Image.Exif()
    turned[0x0112] = 6
    found: dict[str, bytes] = {}

    def add(name: str, image: Image.Image, **options: object) -> None:
        if name.endswith(("jp2", "webp", "avif")) and not features.check({"jp2": "jpg_2000"}.get(name[-3:], name[-4:])):
            return
        stream = io.BytesIO()
        image.save(stream, Image.registered_extensions()[f".{name.rpartition('.')[2]}"], **options)
        found[name] = stream.getvalue()

    for mode, image in {"rgb": rgb, "grey": grey, "rgba": rgba, "p": palette, "bits": bits, "la": rgba.convert("LA")}.items():
        add(f"{mode}.png", image)
    add("wide.png", Image.fromarray(wide))
    add("turned.png", rgb, exif=turned)
    add("see-through.png", palette, transparency=b"\x00\xff\x80")
    add("moving.png", rgb, save_all=True, append_images=[rgb.rotate(180)])
    for mode, image in {"rgb": rgb, "grey": grey, "cmyk": rgb.convert("CMYK")}.items():
        add(f"{mode}.jpg", image)
    add("turned.jpg", rgb, exif=turned, progressive=True, subsampling=2)
    add("a.gif", palette)
    add("see-through.gif", palette, transparency=3)
    add("moving.gif", palette, save_all=True, append_images=[palette.rotate(180), bits], loop=0)
    for mode, image in {"rgb": rgb, "grey": grey, "p": palette, "bits": bits, "rgba": rgba}.items():
        add(f"{mode}.bmp", image)
    for form in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        add(f"{form}.tif", rgb, compression=form)
    add("wide.tif", Image.fromarray(wide))
    add("real.tif", real)
    add("turned.tif", rgb, exif=turned)
    add("fax.tif", bits, compression="group4")
    add("several.tif", rgb, save_all=True, append_images=[grey])
    add("lossy.webp", rgb)
    add("exact.webp", rgba, lossless=True)
    add("moving.webp", rgb, save_all=True, append_images=[rgb.rotate(180)])
    add("a.ppm", rgb)
    add("a.pgm", grey)
    add("a.pbm", bits)
    found["plain.ppm"] = b"P3 # text\n9 6\n255\n" + " ".join(map(str, pixels[..., :3].ravel())).encode()
    add("a.tga", rgba)
    add("a.pcx", rgb)
    add("a.ico", rgba)
    add("a.sgi", rgb)
    add("a.jp2", rgb)
    add("a.dds", rgba)
    add("a.avif", rgb)
    return found


_ENDINGS = ["png", "PNG", "jpg", "jpeg", "gif", "bmp", "tif", "tiff", "webp", "ppm", "tga", "ico", "jp2", "psd", "pcx", "sgi", "xbm", "mpo"]  # fmt: skip


class ImageFile(NamedTuple):
    """What lies in the folder."""

    name: str
    raw: bytes


@st.composite
def image_files(draw: DrawFn) -> ImageFile:
    """An image, nearly always damaged, at times with another ending; or bytes that were never one."""
    name = draw(st.sampled_from(sorted(images())))
    raw = images()[name]
    kind = draw(st.integers(0, 19))
    if kind == 0:
        raw = draw(st.binary(max_size=200))
    elif kind > 1:
        raw = draw(damaged(raw, images()[draw(st.sampled_from(sorted(images())))]))
        if name.endswith("png") and draw(st.booleans()):
            raw = with_right_checksums(raw)
    if draw(st.integers(0, 4)) == 4:
        name = f"a.{draw(st.sampled_from(_ENDINGS))}"
    return ImageFile(name, raw)


def with_right_checksums(raw: bytes) -> bytes:
    """A PNG whose chunks lie without being found out by their checksums."""
    out, at = bytearray(raw[:8]), 8
    while at + 12 <= len(raw):
        length = int.from_bytes(raw[at : at + 4], "big")
        body = raw[at + 4 : at + 8 + length]
        out += raw[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out) + raw[at:]


class Member(NamedTuple):
    """An image in a zip, by itself ``good`` or not. ``colour``: of all its pixels, no two the same."""

    name: str
    colour: tuple[int, int, int]
    good: bool

    @property
    def path(self) -> str:
        """Where it would be unpacked to."""
        return "/".join(part for part in self.name.replace("\\", "/").split("/") if part not in ("", "."))


class Zip(NamedTuple):
    """A zip: its bytes, what was put into it, and whether what it says of that can be believed."""

    raw: bytes
    members: list[Member]
    honest: bool

    def certain(self) -> set[tuple[int, int, int]]:
        """Colours of the images that must be found in an honest one."""
        paths = [member.path for member in self.members]
        return {member.colour for member in self.members if member.good and paths.count(member.path) == 1}

    def refused(self) -> set[str]:
        """Names of the images in an honest one that must not be read from there."""
        return {member.name.replace("\\", "/") for member in self.members if member.name in _EVIL and member.name.endswith("g")}


_NAMES = [
    "a.png", "b.PNG", "rose/a.png", "rose/b c.png", "lily/a.png", "top/rose/a.png", "./a.png", "rose//a.png", "rose/./b.png", "ä/日本.png",
    "a\\b.png", "rose\\a.png", "x" * 300 + ".png", "d/" * 200 + "a.png", "CON.png", "a.png.png", " a .png", "\x1b[31mred.png", "a\nb.png",
    "a\u202eb.png", "?.png", "~/a.png", "%2e%2e/a.png", "OUTSIDE.png",
]  # fmt: skip
_EVIL = [
    "../up.png", "../../OUTSIDE.png", "a/../../b.png", "a/..", "/etc/abs.png", "//server/x.png", "C:/x.png", "c:x.png", "C:\\x.png",
    "..\\up.png", "\\x.png", "a/../b.png", "../a.jpg", "a:b.png",
]  # fmt: skip
_NO_IMAGES = ["notes.txt", ".hidden.png", "__MACOSX/._a.png", "inner.zip", "rose/", "a.png/", "", "a", ".png", "a.", ".git/a.png", "rose/..png", "..a.png/b.png"]  # fmt: skip
_FAULTS = ["", "", "", "", "encrypted", "lzma", "bzip2", "method", "size", "packed size", "checksum", "offset", "link", "folder"]


@cache
def square(colour: tuple[int, int, int]) -> bytes:
    """A PNG of 4x4 pixels."""
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(stream, "PNG")
    return stream.getvalue()


@st.composite
def zips(draw: DrawFn) -> Zip:
    """A zip of images, strange in many ways, and half the time damaged."""
    stream, members, honest = io.BytesIO(), list[Member](), draw(st.booleans())
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as archive:
        warnings.simplefilter("ignore")  # names that come twice
        for number in range(draw(st.integers(1, 6))):
            name = draw(st.sampled_from(_NAMES) | st.sampled_from(_NAMES + _EVIL + _NO_IMAGES))
            fault, colour = draw(st.sampled_from(_FAULTS)), (40 * number + 5, draw(st.integers(0, 255)), 99)
            info = zipfile.ZipInfo(name)
            info.filename = name  # as it is, backslashes too
            info.external_attr = {"link": 0o120777, "folder": 0o040755}.get(fault, 0o100644) << 16
            info.compress_type = {"lzma": zipfile.ZIP_LZMA, "bzip2": zipfile.ZIP_BZIP2}.get(
                fault, draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
            )
            inner = b"../../OUTSIDE.png" if fault == "link" else square(colour)
            archive.writestr(info, inner)
            _lie(info, fault, draw(st.sampled_from(_NUMBERS)))
            wrong = name in _EVIL or name in _NO_IMAGES or fault not in ("", "folder")
            members.append(Member(name, colour, not wrong))
            honest = honest and fault not in ("size", "packed size", "offset")
        archive.comment = draw(st.sampled_from([b"", b"PK\x05\x06" + bytes(18), b"x" * 500]))
    raw = stream.getvalue()
    if honest:
        honest = not archive.comment.startswith(b"PK")
        return Zip(draw(st.sampled_from([b"", b"", b"MZ junk"])) + raw, members, honest)
    return Zip(draw(damaged(raw, raw[::-1])), members, honest)


def _lie(info: zipfile.ZipInfo, fault: str, number: int) -> None:
    """Make the directory at the end of the zip say something else than is so."""
    if fault == "encrypted":
        info.flag_bits |= 1
    elif fault == "method":
        info.compress_type = 99
    elif fault == "size":
        info.file_size = number
    elif fault == "packed size":
        info.compress_size = number
    elif fault == "checksum":
        info.CRC ^= number | 1
    elif fault == "offset":
        info.header_offset = number
