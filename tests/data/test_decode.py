"""Decoding: pixel values known in advance for every mode, orientation, depth and fit; hostile bytes."""

from __future__ import annotations

import io
import logging
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from ddpmctl.data import decode as module
from ddpmctl.data.decode import FITS, decode, parse_colour, probe, quiet
from ddpmctl.data.formats import BadImage
from ddpmctl.errors import ConfigError
from ddpmctl.rows import row_names


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(raw: bytes, size=None, channels=3, fit="stretch", background="white") -> np.ndarray:
    return decode(raw, size=size or probe(raw).size, channels=channels, fit=fit, background=background)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand, for what Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_rows_are_read_without_import() -> None:
    assert row_names("data.decode", "FITS") == tuple(FITS) == ("crop", "pad", "stretch")


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF"])
def test_right_size_is_untouched(form: str, fit: str) -> None:
    array = noise(5, 7)
    assert (pixels(encode(Image.fromarray(array), form), fit=fit) == array).all()


def test_rgba_right_size_is_untouched_even_where_transparent() -> None:
    array = noise(5, 7, 4)
    array[0, 0, 3] = 0
    assert (pixels(encode(Image.fromarray(array, "RGBA")), channels=4) == array).all()


def test_grey_and_colour() -> None:
    grey = encode(Image.new("L", (2, 2), 90))
    assert pixels(grey, channels=3).tolist() == [[[90, 90, 90]] * 2] * 2
    assert pixels(grey, channels=4).tolist() == [[[90, 90, 90, 255]] * 2] * 2
    red = encode(Image.new("RGB", (2, 2), (255, 0, 0)))
    assert pixels(red, channels=1).tolist() == [[[76]] * 2] * 2  # 0.299 * 255
    assert probe(grey).grey and not probe(red).grey


def test_sixteen_bits() -> None:
    values = np.array([[0, 257, 200 * 257, 65535, 300]], dtype=np.uint16)
    for form in ("PNG", "TIFF"):
        raw = encode(Image.fromarray(values), form)
        assert pixels(raw, channels=1)[0, :, 0].tolist() == [0, 1, 200, 255, 1]
        assert probe(raw).grey
    pgm = b"P5 5 1 65535\n" + values.astype(">u2").tobytes()
    assert pixels(pgm, channels=1)[0, :, 0].tolist() == [0, 1, 200, 255, 1]
    big_endian = encode(Image.frombytes("I;16B", (5, 1), values.astype(">u2").tobytes()), "TIFF")
    assert pixels(big_endian, channels=1)[0, :, 0].tolist() == [0, 1, 200, 255, 1]


def test_32_bit_integers_are_clipped() -> None:
    raw = encode(Image.fromarray(np.array([[-5, 514, 70000]], dtype=np.int32)), "TIFF")
    assert probe(raw).mode == "I"
    assert pixels(raw, channels=1)[0, :, 0].tolist() == [0, 2, 255]


def test_16_bit_transparent_value() -> None:
    rows = b"\0" + struct.pack(">HH", 257, 514)
    trns = struct.pack(">I", 2) + b"tRNS" + struct.pack(">H", 514)
    raw = png(2, 1, 16, 0, rows, trns + struct.pack(">I", zlib.crc32(trns[4:])))
    assert pixels(raw, channels=4).tolist() == [[[1, 1, 1, 255], [2, 2, 2, 0]]]
    assert pixels(raw, channels=1).tolist() == [[[1], [255]]]


def test_floats() -> None:
    def tiff(*values: float) -> bytes:
        return encode(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")

    assert pixels(tiff(0, 0.5, 1), channels=1)[0, :, 0].tolist() == [0, 128, 255]
    assert pixels(tiff(-3, 0.5, 100, 300), channels=1)[0, :, 0].tolist() == [0, 0, 100, 255]
    broken = tiff(float("nan"), float("inf"), float("-inf"), 7)
    assert pixels(broken, channels=1)[0, :, 0].tolist() == [0, 255, 0, 7]


def test_one_bit() -> None:
    raw = encode(Image.fromarray(np.array([[True, False]])))
    assert probe(raw).mode == "1" and probe(raw).grey
    assert pixels(raw, channels=1).tolist() == [[[255], [0]]]


def test_palette() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 9, 9, 9])
    image.putdata([0, 1, 2])
    assert pixels(encode(image)).tolist() == [[[255, 0, 0], [0, 255, 0], [9, 9, 9]]]
    assert not probe(encode(image)).alpha and not probe(encode(image)).grey
    for transparency in (1, b"\xff\x00\xff"):
        raw = encode(image, transparency=transparency)
        assert probe(raw).alpha
        assert pixels(raw, background="#0000ff").tolist() == [[[255, 0, 0], [0, 0, 255], [9, 9, 9]]]
        assert pixels(raw, channels=4)[0, :, 3].tolist() == [255, 0, 255]


def test_palette_of_greys_is_grey_by_the_colours_in_use() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([7, 7, 7, 255, 0, 0, 80, 80, 80])
    image.putdata([0, 2])
    raw = encode(image)
    assert probe(raw).mode == "P" and probe(raw).grey
    assert pixels(raw, channels=1).tolist() == [[[7], [80]]]


def test_alpha_is_laid_on_the_background() -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(10, 20, 30, 255), (200, 0, 0, 0), (200, 100, 0, 51)])
    expected = [[[10, 20, 30], [0, 0, 255], [40, 20, 204]]]
    assert pixels(encode(image), background="blue").tolist() == expected
    assert pixels(encode(image, "WEBP", lossless=True, exact=True), background="blue").tolist() == expected


def test_grey_with_alpha() -> None:
    image = Image.new("LA", (2, 1))
    image.putdata([(100, 255), (100, 0)])
    raw = encode(image)
    assert probe(raw).grey and probe(raw).alpha
    assert pixels(raw, background="#102030").tolist() == [[[100, 100, 100], [0x10, 0x20, 0x30]]]
    assert pixels(raw, channels=1, background="#202020").tolist() == [[[100], [0x20]]]


@pytest.mark.parametrize(("mode", "value"), [("RGB", (1, 2, 3)), ("L", 5), ("1", 1)])
def test_one_transparent_colour(mode: str, value: object) -> None:
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), 1 if mode == "1" else value)
    raw = encode(image, transparency=255 if mode == "1" else value)
    assert probe(raw).alpha
    assert pixels(raw, background="red").tolist() == [[[255, 0, 0], [0, 0, 0]]]


def test_premultiplied_modes() -> None:
    half = Image.new("RGBA", (1, 1), (200, 100, 0, 128)).convert("RGBa")
    seen = module.to_eight_bit(half)
    assert seen.mode == "RGBA" and np.allclose(seen.getpixel((0, 0)), (200, 100, 0, 128), atol=1)
    grey = Image.new("LA", (1, 1), (200, 128)).convert("La")
    assert np.allclose(module.to_eight_bit(grey).getpixel((0, 0)), (200, 200, 200, 128), atol=1)
    palette = Image.new("PA", (1, 1))
    palette.putpalette([10, 20, 30])
    palette.putpixel((0, 0), (0, 77))
    assert module.to_eight_bit(palette).getpixel((0, 0)) == (10, 20, 30, 77)


def test_cmyk() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert pixels(encode(image, "TIFF"))[0, 0].tolist() == [255, 0, 0]
    assert np.allclose(pixels(encode(image, "JPEG", quality=100))[8, 8], [255, 0, 0], atol=2)


def test_ycbcr_lab_and_hsv() -> None:
    ycbcr = Image.new("RGB", (1, 1), (255, 0, 0)).convert("YCbCr")
    assert np.allclose(module.to_eight_bit(ycbcr).getpixel((0, 0)), (255, 0, 0), atol=2)
    lab = Image.new("LAB", (2, 2), (255, 128, 128))  # L = 100, a = b = 0: white
    assert np.allclose(pixels(encode(lab, "TIFF"))[0, 0], [255, 255, 255], atol=3)
    assert module.to_eight_bit(Image.new("HSV", (1, 1), (0, 255, 255))).getpixel((0, 0)) == (255, 0, 0)


# ---------------------------------------------------------------- orientation and sequences

STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(form: str, orientation: int) -> None:
    upright = noise(4, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    raw = encode(stored, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    assert probe(raw).size == (4, 6)
    assert (pixels(raw) == upright).all()


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_of_a_large_jpeg(orientation: int) -> None:
    upright = np.zeros((400, 800, 3), np.uint8)
    upright[:200, :400], upright[:200, 400:], upright[200:, :400] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    raw = encode(stored, "JPEG", exif=exif, quality=95, subsampling=0)
    small = pixels(raw, size=(20, 40))
    assert np.abs(small.astype(int) - upright[10::20, 10::20]).max() < 40
    assert np.abs(small[5, 5].astype(int) - (250, 0, 0)).max() < 5


@pytest.mark.parametrize("size", [(20, 40), (40, 20), (10, 80)])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("fit", FITS)
def test_shrinking_in_the_jpeg_decoder_costs_no_quality(orientation: int, size: tuple, fit: str) -> None:
    blobs = Image.fromarray(noise(100, 50)).resize((200, 800), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encode(blobs.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=98, subsampling=0)
    lossless = encode(Image.open(io.BytesIO(raw)), "PNG", exif=exif)
    difference = pixels(raw, size, fit=fit).astype(int) - pixels(lossless, size, fit=fit)
    assert np.abs(difference).mean() < 4


def test_broken_exif_does_not_cost_the_image() -> None:
    exif = b"Exif\0\0MM\0\x2a\xff\xff\xff\xff" + b"\xff" * 9
    raw = encode(Image.new("RGB", (8, 8), "red"), "JPEG", exif=exif)
    with quiet():
        assert probe(raw).size == (8, 8)
        assert pixels(raw).shape == (8, 8, 3)


def test_libtiff_prints_nothing_either(capfd: pytest.CaptureFixture[str]) -> None:
    raw = encode(Image.fromarray(noise(64, 64)), "TIFF", compression="tiff_deflate")
    with quiet(), pytest.raises(BadImage):
        os.write(2, b"as libraries in C do it")
        pixels(raw[:1000] + bytes(500) + raw[1500:], (64, 64))
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_picture_of_a_sequence(form: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    raw = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert probe(raw).animated
    assert (pixels(raw) == (255, 0, 0)).all()
    assert not probe(encode(frames[0], form)).animated


# ---------------------------------------------------------------- geometry


def test_crop_without_scaling_cuts_whole_pixels() -> None:
    array = noise(4, 9)
    raw = encode(Image.fromarray(array))
    assert (pixels(raw, size=(4, 4), fit="crop") == array[:, 2:6]).all()
    tall = noise(9, 4)
    assert (pixels(encode(Image.fromarray(tall)), size=(4, 4), fit="crop") == tall[2:6]).all()


def test_crop_scales_to_fill_and_keeps_the_middle() -> None:
    array = np.zeros((40, 120, 3), np.uint8)
    array[:, :40], array[:, 40:80], array[:, 80:] = 10, 120, 240
    small = pixels(encode(Image.fromarray(array)), size=(10, 10), fit="crop")
    assert (small[:, 2:8] == 120).all()  # the outer columns feel the neighbours by the width of the filter
    wide = pixels(encode(Image.fromarray(array)), size=(10, 30), fit="crop")
    assert [wide[5, x, 0] for x in (3, 15, 26)] == [10, 120, 240]


def test_crop_of_awkward_sizes_never_fails() -> None:
    for width, height in [(1, 1), (1, 997), (997, 1), (333, 77), (64, 63)]:
        raw = encode(Image.new("L", (width, height), 50))
        assert (pixels(raw, size=(13, 29), channels=1, fit="crop") == 50).all()


def test_pad_shrinks_but_never_enlarges() -> None:
    raw = encode(Image.new("RGB", (4, 2), "black"))
    out = pixels(raw, size=(6, 8), fit="pad", background="#0a141e")
    expected = np.full((6, 8, 3), (10, 20, 30), np.uint8)
    expected[2:4, 2:6] = 0
    assert (out == expected).all()
    large = pixels(encode(Image.new("RGB", (80, 40), "black")), size=(8, 8), fit="pad", background="red")
    assert (large[2:6] == 0).all() and (large[:2] == (255, 0, 0)).all() and (large[6:] == (255, 0, 0)).all()
    sliver = pixels(encode(Image.new("RGB", (1000, 1), "black")), size=(8, 8), fit="pad")
    assert (sliver == 0).all(axis=(1, 2)).sum() == 1


def test_padding_is_see_through_in_rgba_and_grey_in_grey() -> None:
    raw = encode(Image.new("RGB", (2, 2), "black"))
    out = pixels(raw, size=(4, 4), channels=4, fit="pad")
    assert out[0, 0].tolist() == [255, 255, 255, 0] and out[1, 1].tolist() == [0, 0, 0, 255]
    assert pixels(raw, size=(4, 4), channels=1, fit="pad", background="red")[0, 0].tolist() == [76]


def test_stretch_ignores_proportions() -> None:
    array = np.repeat(np.array([[0], [200]], np.uint8), 20, axis=0).repeat(10, axis=1)
    out = pixels(encode(Image.fromarray(array)), size=(10, 30), channels=1)
    assert (out[:3] == 0).all() and (out[7:] == 200).all() and out.shape == (10, 30, 1)


def test_shrinking_averages_instead_of_picking() -> None:
    checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    out = pixels(encode(Image.fromarray(checks)), size=(8, 8), channels=1)
    assert np.abs(out.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("channels", [3, 4])
def test_transparent_pixels_leave_no_halo(channels: int) -> None:
    image = Image.new("RGBA", (64, 64), (255, 0, 255, 0))  # hidden magenta around a black square
    image.paste((0, 0, 0, 255), (16, 16, 48, 48))
    out = pixels(encode(image), size=(16, 16), channels=channels)
    red, green = out[..., 0].astype(int), out[..., 1].astype(int)
    if channels == 4:
        red, green = (c[out[..., 3] > 0] for c in (red, green))
        assert out[0, 0, 3] == 0 and out[8, 8].tolist() == [0, 0, 0, 255]
    assert np.abs(red - green).max() <= 1


# ---------------------------------------------------------------- colours and bad files


def test_colours() -> None:
    assert parse_colour("white") == (255, 255, 255)
    assert parse_colour("#0a141e") == (10, 20, 30)
    out_of_range = ("rgb(300,0,0)", "rgb(200%,0%,0%)", "hsv(0,999%,50%)", "rgb(" + "9" * 30 + ",0,0)")
    for wrong in ("wite", "#12345", "", "#11223344", "x" * 200, *out_of_range):
        with pytest.raises(ConfigError, match=r"data\.background"):
            parse_colour(wrong)
    with pytest.raises(ConfigError, match="did you mean 'white'"):
        parse_colour("wite")


def bomb(width: int, height: int) -> bytes:
    return png(width, height, 8, 0, b"\0" * 100)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty"),
        (b"hello, I am a text", "not an image"),
        (b"\0" * 5000, "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        (encode(Image.fromarray(noise(50, 50)), "PNG")[:3000], "truncated"),
        (encode(Image.fromarray(noise(50, 50)), "JPEG")[:900], "truncated"),
        (encode(Image.fromarray(noise(50, 50)), "BMP")[:900], "truncated"),
        (bomb(30000, 30000), "million pixels"),
        (bomb(2**31 - 1, 2**31 - 1), "million pixels"),
        (bomb(12000, 12000), "truncated"),
    ],
    ids=["empty", "text", "zeros", "stub", "eps", "png", "jpeg", "bmp", "bomb", "absurd", "large"],
)
def test_bad_files_have_a_short_reason(raw: bytes, reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet(), pytest.raises(BadImage, match=reason) as caught:
            decode(raw, size=(8, 8), channels=3, fit="crop", background="white")
    assert logging.getLogger("PIL").level == logging.NOTSET
    assert len(caught.value.reason) <= 120 and caught.value.reason.isprintable()


def test_warnings_turned_into_errors_do_not_escape() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage):
            probe(bomb(12000, 12000))


def test_flipped_bytes_never_escape() -> None:
    rng = np.random.default_rng(1)
    base = Image.fromarray(noise(12, 12)).quantize(16)
    for form in ("PNG", "GIF", "TIFF", "BMP", "JPEG", "WEBP", "PPM", "TGA", "ICO", "PCX", "SGI"):
        image = base if form in ("PNG", "GIF") else base.convert("RGB")
        good = encode(image, form, **({"sizes": [(12, 12)]} if form == "ICO" else {}))
        for _ in range(25):
            raw = bytearray(good[: rng.integers(1, len(good) + 1)] if rng.random() < 0.3 else good)
            for place in rng.integers(0, min(len(raw), 200), size=4):
                raw[place] = rng.integers(0, 256)
            try:
                with quiet():
                    out = decode(bytes(raw), size=(8, 8), channels=3, fit="crop", background="white")
            except BadImage:
                continue
            assert out.shape == (8, 8, 3)


def test_huge_images_take_turns_and_come_out_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = encode(Image.fromarray(noise(40, 40)))
    before = pixels(raw, size=(8, 8))
    entered: list[bool] = []
    lock = module._one_huge_image

    class Turn:
        def __enter__(self) -> None:
            entered.append(lock.acquire())

        def __exit__(self, *error: object) -> None:
            lock.release()

    monkeypatch.setattr(module, "_one_huge_image", Turn())
    pixels(raw, size=(8, 8))
    assert not entered
    monkeypatch.setattr(module, "_HUGE", 1599)
    assert (decode(raw, size=(8, 8), channels=3, fit="stretch", background="white") == before).all()
    assert len(entered) == 1 and not lock.locked()


def test_too_many_pixels_whatever_pillow_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = encode(Image.fromarray(noise(40, 40)))
    monkeypatch.setattr(module, "MAX_PIXELS", 1600)
    assert probe(raw).size == (40, 40)
    monkeypatch.setattr(module, "MAX_PIXELS", 1599)
    with pytest.raises(BadImage, match="million pixels"):
        probe(raw)


# ---------------------------------------------------------------- draft mode


def photograph(height: int, width: int) -> bytes:
    """A JPEG with soft ground, edges and noise."""
    rows, columns = np.mgrid[:height, :width]
    soft = np.stack([128 + 80 * np.sin(rows / 90 + c) * np.cos(columns / (70 + 9 * c)) for c in range(3)], axis=-1)
    soft[(rows - height / 2) ** 2 + (columns - width / 3) ** 2 < (height / 4) ** 2] = (230, 40, 60)
    grain = np.random.default_rng(0).normal(0, 6, soft.shape)
    return encode(Image.fromarray(np.clip(soft + grain, 0, 255).astype(np.uint8)), "JPEG", quality=90)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(64, 64), (100, 30), (33, 200)])
def test_draft_mode_is_close_to_the_full_decode(monkeypatch, size, fit):
    """On average within one grey level of 255, and never off by more than a tenth of the range."""
    raw = photograph(768, 1024)
    fast = pixels(raw, size, fit=fit).astype(int)
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", lambda *_: None)
    full = pixels(raw, size, fit=fit).astype(int)
    assert np.abs(fast - full).mean() < 1 and np.abs(fast - full).max() <= 25


@pytest.mark.parametrize("turned", [1, 6])
@pytest.mark.parametrize("target", [(64, 64), (8, 90), (200, 20), (383, 512), (768, 1024)])
def test_draft_mode_never_goes_below_twice_the_target(monkeypatch, target, turned):
    sizes = []
    draft = JpegImagePlugin.JpegImageFile.draft

    def note(image, mode, size):
        draft(image, mode, size)
        sizes.append(image.size)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", note)
    exif = Image.Exif()
    exif[0x0112] = turned
    image = Image.open(io.BytesIO(photograph(768, 1024)))
    whole = (768, 1024) if turned == 1 else (1024, 768)
    pixels(encode(image, "JPEG", exif=exif), target, fit="stretch")
    (width, height), *more = sizes
    seen = (height, width) if turned == 1 else (width, height)
    assert not more and all(side >= min(2 * wanted, full) for side, wanted, full in zip(seen, target, whole, strict=True))
