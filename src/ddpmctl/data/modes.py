"""Every mode that Pillow opens to grey, RGB or RGBA of 8 bits."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

Fill = int | tuple[int, ...]


def is_grey(image: Image.Image) -> bool:
    """Whether the mode, or every palette colour in use, has no colour. Loads palette images."""
    if image.mode not in ("P", "PA"):
        return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
    palette = np.array(image.getpalette("RGB") or [], dtype=np.int64).reshape(-1, 3)
    counts = np.array(image.histogram()[: len(palette)])
    used = palette[: len(counts)][counts > 0]
    return bool((used == used[:, :1]).all())


def to_eight_bit(image: Image.Image) -> Image.Image:
    """The same picture in mode L or RGB, or RGBA where it has transparency."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_numbers(image)
    if image.mode == "La":
        image = image.convert("LA")
    wanted = "RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB"
    return image if image.mode == wanted else image.convert(wanted)  # converting to the same mode copies


def _from_numbers(image: Image.Image) -> Image.Image:
    """16-bit or 32-bit grey: integers are 0..65535, floats are 0..1 if they all lie there, else 0..255."""
    values = np.array(image, dtype=np.float32)
    transparent = image.info.get("transparency")
    alpha = np.where(values == transparent, 0, 255) if isinstance(transparent, int) else None
    if image.mode == "F":
        np.nan_to_num(values, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
        if values.min() >= 0 and values.max() <= 1:
            values *= 255
    else:
        values /= 257
    grey = Image.fromarray(np.clip(np.rint(values, out=values), 0, 255, out=values).astype(np.uint8))
    if alpha is None:
        return grey
    rgba = grey.convert("RGBA")
    rgba.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return rgba


def to_mode(image: Image.Image, mode: str, background: tuple[int, int, int]) -> Image.Image:
    """From L, RGB or RGBA to another of them; transparency that ``mode`` lacks is laid on ``background``."""
    if image.mode == "RGBA" and mode != "RGBA":
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(image, mask=image)
        image = canvas
    return image if image.mode == mode else image.convert(mode)


@cache
def fill_value(colour: tuple[int, int, int], mode: str) -> Fill:
    """The colour around padded images; see-through where the mode can be."""
    if mode == "RGBA":
        return (*colour, 0)
    value = Image.new("RGB", (1, 1), colour).convert(mode).getpixel((0, 0))
    assert isinstance(value, int | tuple)
    return value
