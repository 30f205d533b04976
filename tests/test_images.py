"""Pixels, grids, PNG provenance and GIFs."""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddpmctl.errors import OutputError
from ddpmctl.images import flat, from_uint8, grid, read_provenance, save_gif, save_png, to_pil, to_uint8


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def pixels(image: Image.Image) -> Tensor:
    """(C, H, W) of a Pillow image."""
    array = np.array(image)
    return torch.from_numpy(array[..., None] if array.ndim == 2 else array).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("x", "value"),
    [
        (-1.0, 0), (1.0, 255), (1.01, 255), (3.0, 255), (-1.01, 0), (-40.0, 0), (0.0, 128), (0.9961, 255),
        (0.9960, 254), (math.inf, 255), (-math.inf, 0), (math.nan, 0),
    ],
)  # fmt: skip
def test_to_uint8_clamps_and_rounds(x: float, value: int) -> None:
    assert to_uint8(torch.full((1, 1, 1), x)).item() == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_to_uint8_takes_any_float_and_shape(dtype: torch.dtype) -> None:
    out = to_uint8(torch.tensor([[-2.0, -1.0, 0.5, 1.0, 2.0]], dtype=dtype))
    assert out.dtype == torch.uint8
    assert out.tolist() == [[0, 0, 191, 255, 255]]


def test_every_pixel_value_survives_the_way_there_and_back() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert from_uint8(values).min() == -1
    assert from_uint8(values).max() == 1
    assert torch.equal(to_uint8(from_uint8(values)), values)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_to_pil_keeps_every_pixel(channels: int, mode: str) -> None:
    image = noise(channels, 5, 7)
    shown = to_pil(image)
    assert (shown.mode, shown.size) == (mode, (7, 5))
    assert torch.equal(pixels(shown), image)


@pytest.mark.parametrize("bad", [torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4)])
def test_to_pil_refuses_what_is_no_image(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="not uint8"):
        to_pil(bad)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("columns", "padding", "scale"), [(2, 2, 1), (3, 0, 1), (5, 1, 3)])
def test_grid_pixel_by_pixel(channels: int, columns: int, padding: int, scale: int) -> None:
    n, height, width = 5, 4, 6
    images = noise(n, channels, height, width)
    picture = pixels(grid(images, columns=columns, padding=padding, scale=scale))
    rows = -(-n // columns)
    size = padding + rows * (height + padding), padding + columns * (width + padding)
    expected = torch.full((channels, *size), 255, dtype=torch.uint8)
    expected[3:] = 0
    for i in range(n):
        y, x = padding + i // columns * (height + padding), padding + i % columns * (width + padding)
        expected[:, y : y + height, x : x + width] = images[i]
    assert torch.equal(picture, expected.repeat_interleave(scale, 1).repeat_interleave(scale, 2))


@pytest.mark.parametrize(
    ("n", "size", "columns"),
    [(36, (8, 8), 6), (1, (8, 8), 1), (5, (8, 8), 3), (8, (8, 32), 2), (8, (32, 8), 6)],
)
def test_grid_is_near_square_by_default(n: int, size: tuple[int, int], columns: int) -> None:
    assert grid(noise(n, 1, *size), padding=0).width == columns * size[1]


def test_grid_never_has_more_columns_than_images() -> None:
    assert grid(noise(2, 3, 4, 4), columns=9, padding=0).size == (8, 4)


@pytest.mark.parametrize(("side", "scale"), [(32, 8), (100, 6), (600, 1)])
def test_automatic_scale_makes_small_grids_legible(side: int, scale: int) -> None:
    image = noise(1, 1, side, side)
    assert grid(image, padding=0, scale=None).width == side * scale


def test_grid_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        grid(torch.zeros(0, 3, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_keeps_pixels_and_provenance(tmp_path: Path, channels: int) -> None:
    image, told = noise(channels, 3, 4), {"seed": 7, "name": "Blume ✿", "list": [1, 2.5, None]}
    path = tmp_path / "new" / "folder" / "a.png"
    save_png(path, to_pil(image), told)
    with Image.open(path) as read:
        assert torch.equal(pixels(read), image)
        assert json.loads(read.info["ddpmctl"]) == told
    assert read_provenance(path) == told
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_provenance_turns_paths_into_text(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", to_pil(noise(1, 2, 2)), {"path": Path("a/b")})
    assert read_provenance(tmp_path / "a.png") == {"path": str(Path("a/b"))}


def test_png_without_provenance_says_nothing(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", to_pil(noise(1, 2, 2)))
    assert read_provenance(tmp_path / "a.png") is None


def chunk(kind: bytes, content: bytes, length: int | None = None) -> bytes:
    head = struct.pack(">I", len(content) if length is None else length)
    return head + kind + content + struct.pack(">I", zlib.crc32(kind + content))


PNG = b"\x89PNG\r\n\x1a\n"
IHDR = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
OURS = chunk(b"tEXt", b'ddpmctl\0{"a": 1}')


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PN",
        b"GIF89a" + OURS,
        PNG,
        PNG + IHDR + b"\0\0",
        PNG + IHDR + chunk(b"tEXt", b"ddpmctl\0{not json"),
        PNG + IHDR + chunk(b"tEXt", b"ddpmctl\0" + b"[" * 500_000),
        PNG + IHDR + chunk(b"tEXt", b"ddpmctl\0" + b"9" * 500_000),
        PNG + IHDR + chunk(b"tEXt", b"ddpmctl\0[1, 2]"),
        PNG + IHDR + chunk(b"tEXt", b"ddpmctl\0\xff\xfe{}"),
        PNG + IHDR + chunk(b"tEXt", b'other\0{"a": 1}'),
        PNG + IHDR + chunk(b"tEXt", b'ddpmctl\0{"a": 1}' + b" " * (1 << 20)),
        PNG + IHDR + chunk(b"tEXt", b'ddpmctl\0{"a": 1}', length=2**32 - 1),
        PNG + IHDR + chunk(b"IDAT", b"") + OURS,
        PNG + IHDR + chunk(b"tEXt", b"x\0") * 20_000 + OURS,
    ],
    ids=[
        "empty", "stub", "gif", "no chunks", "cut", "no json", "nested", "digits", "no dict", "no text",
        "other key", "too long", "lying length", "behind the pixels", "too many chunks",
    ],
)  # fmt: skip
def test_hostile_or_foreign_files_have_no_provenance(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert read_provenance(tmp_path / "a.png") is None


def test_provenance_is_found_behind_a_huge_chunk_that_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.write(PNG + IHDR + struct.pack(">I", 1 << 30) + b"zTXt")
        file.seek((1 << 30) + 4, 1)  # a hole, which takes no room on the disk
        file.write(OURS)
    assert read_provenance(path) == {"a": 1}


def frames(*greys: int, mode: str = "RGB") -> list[Image.Image]:
    return [Image.new("L", (8, 6), grey).convert(mode) for grey in greys]


def test_gif_loops_and_holds_the_last_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    save_gif(path, frames(0, 90, 200, 255), fps=5, hold_last=1.5, provenance={"seed": 3})
    with Image.open(path) as gif:
        assert gif.info["loop"] == 0
        assert json.loads(gif.info["comment"]) == {"seed": 3}
        durations = []
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
    assert durations == [200, 200, 200, 1500]
    assert [file.name for file in tmp_path.iterdir()] == ["a.gif"]


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("length", [1, 300, 100_000])
def test_gif_keeps_provenance_of_any_length(tmp_path: Path, mode: str, length: int) -> None:
    told = {"seed": 7, "name": "Blume ✿", "text": "x" * length}
    save_gif(tmp_path / "a.gif", frames(0, 90, mode=mode), provenance=told)
    assert read_provenance(tmp_path / "a.gif") == told
    save_gif(tmp_path / "b.gif", frames(0, 90, mode=mode))
    assert read_provenance(tmp_path / "b.gif") is None


GIF = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0)


@pytest.mark.parametrize(
    "content",
    [
        GIF[:9],
        GIF,
        GIF + b"!\xfe",
        GIF + b"!\xfe\x0dnot json at a\0;",
        GIF + b"!\xfe\xff{",
        GIF + b"!\xfe" + (b"\xff" + b"[" * 255) * 20_000,
        GIF + b"!\xff\x01x\0" * 20_000 + b'!\xfe\x08{"a": 1}\0;',
        GIF + b'\x2c!\xfe\x08{"a": 1}\0;',
    ],
    ids=["stub", "no blocks", "cut", "no json", "cut text", "too long", "too many blocks", "behind the pixels"],
)
def test_hostile_gifs_have_no_provenance(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.gif").write_bytes(content)
    assert read_provenance(tmp_path / "a.gif") is None


def test_equal_frames_become_one_that_lasts_as_long(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    save_gif(path, frames(0, 0, 200), fps=10, hold_last=0.1)
    with Image.open(path) as gif:
        assert gif.n_frames == 2
        assert gif.info["duration"] == 200


@pytest.mark.parametrize(("fps", "tick"), [(1000, 20), (50, 20), (30, 30), (1, 1000)])
def test_frame_rates_are_what_gif_can_do(tmp_path: Path, fps: float, tick: int) -> None:
    path = tmp_path / "a.gif"
    save_gif(path, frames(0, 255), fps=fps)
    with Image.open(path) as gif:
        assert gif.info["duration"] == tick


def test_grey_gif_is_lossless(tmp_path: Path) -> None:
    originals = [noise(1, 20, 30), 255 - noise(1, 20, 30)]
    save_gif(tmp_path / "a.gif", [to_pil(image) for image in originals])
    with Image.open(tmp_path / "a.gif") as gif:
        for i, image in enumerate(originals):
            gif.seek(i)
            assert torch.equal(pixels(gif.convert("L")), image)


def test_colour_gif_stays_close_and_white_stays_white(tmp_path: Path) -> None:
    ramp = torch.linspace(0, 255, 64).to(torch.uint8).expand(64, 64)
    picture = torch.stack([ramp, ramp.T, 255 - ramp])
    static = noise(3, 64, 64)
    for image in (picture, static):
        image[:, :8] = 255
    save_gif(tmp_path / "a.gif", [to_pil(picture), to_pil(static)])
    with Image.open(tmp_path / "a.gif") as gif:
        read = pixels(gif.convert("RGB"))
    assert (read[:, :8] == 255).all()
    assert (read.float() - picture.float()).abs().mean() < 12


def test_gif_lays_transparency_on_white(tmp_path: Path) -> None:
    save_gif(tmp_path / "a.gif", [Image.new("RGBA", (4, 4), (0, 0, 0, 0)), Image.new("RGBA", (4, 4), "red")])
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert flat(Image.new("LA", (1, 1))).mode == "RGB"


def test_gif_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no frames"):
        save_gif(tmp_path / "a.gif", [])


def test_what_cannot_be_written_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "a.png", tmp_path):
        with pytest.raises(OutputError, match="cannot be written") as caught:
            save_png(path, to_pil(noise(1, 2, 2)), {})
        assert str(path) in caught.value.problem


def test_same_picture_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_png(tmp_path / f"{name}.png", to_pil(noise(3, 9, 9)), {"seed": 1})
        save_gif(tmp_path / f"{name}.gif", [to_pil(noise(3, 9, 9))], provenance={"seed": 1})
    for ending in ("png", "gif"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()
