"""Words of a run file or a command line as values: counts, sizes and devices, as people write them."""

from __future__ import annotations

import os
import re
from decimal import Decimal
from fractions import Fraction
from typing import Literal

_COUNT = re.compile(r"(\d[\d_]{0,40}\.?\d{0,40}(?:e\+?\d{1,3})?)([kmb]?)", re.IGNORECASE)
_DURATION = re.compile(r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m(?:in)?)?(?:(\d{1,9})s)?", re.IGNORECASE)
_CLOCK = re.compile(r"(?:(\d{1,9})-)?(\d{1,9}):([0-5]?\d):([0-5]?\d)")
SLASHES = tuple({"/", os.sep})
"""What the name of a folder may end in."""

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def written(value: object) -> str:
    """``value`` as it stands in a message: its start and its end where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits.
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-40:]}"


def shown(name: str) -> str:
    """``name`` fit for a terminal, a log or JSON: control characters and undecodable bytes as escapes."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def parse_count(value: object) -> int:
    """A whole number as people write it: ``100k``, ``1.5M``, ``1_000``, ``1e5``.

    Raises ``ValueError`` for anything else, fractions and negative numbers included.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < 2**63:
            return value
    elif isinstance(value, float | str):
        text = repr(value) if isinstance(value, float) else value.strip()
        if match := _COUNT.fullmatch(text):
            number = Fraction(Decimal(match[1].replace("_", ""))) * _SUFFIX[match[2].lower()]
            if number < 2**63 and number.denominator == 1:
                return int(number)
    raise ValueError(f"{written(value)} is not a whole number such as 500, 1_000, 100k, 1.5M or 1e5")


def parse_duration(text: str) -> int:
    """Seconds of ``3h50m``, ``90m``, ``1d12h``, ``45s`` or, as batch systems write it, ``1-12:00:00``.

    Raises ``ValueError`` for anything else, and for no time at all.
    """
    match = _DURATION.fullmatch(text.strip()) or _CLOCK.fullmatch(text.strip())
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise ValueError(f"{written(text)} is not a time such as 3h50m, 90m, 1d12h or 03:50:00")
    return total


def parse_shares(text: str) -> tuple[float, float]:
    """``0.2:0.8``, two shares of which the first is not the larger; raises ``ValueError`` for anything else."""
    low, _, high = text.partition(":")
    try:
        shares = (float(low), float(high))
    except ValueError:
        shares = (1.0, 0.0)
    if not 0 <= shares[0] <= shares[1] <= 1:
        raise ValueError(f"{written(text)} is not two shares such as 0.2:0.8, from 0 to 1")
    return shares


def parse_size(value: object) -> Literal["auto"] | tuple[int, int]:
    """``64``, ``"48x64"`` (height x width), ``[48, 64]`` or ``auto``; raises ``ValueError`` for anything else."""
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool):
        sides = (value, value)
    elif isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int for v in value):
        sides = (value[0], value[1])
    elif isinstance(value, str) and (match := re.fullmatch(r"(\d{1,6})(?:[x×](\d{1,6}))?", value.strip(), re.I)):
        sides = (int(match[1]), int(match[2] or match[1]))
    else:
        raise ValueError(f"{written(value)} is not a size such as 64, 48x64 (height x width) or auto")
    if not all(1 <= side <= 4096 for side in sides):
        raise ValueError(f"{written(value)} is out of range: each side is 1 to 4096 pixels")
    return sides


def size_text(size: Literal["auto"] | tuple[int, int]) -> str | int:
    """The shortest spelling that :func:`parse_size` reads back: ``64``, ``"48x64"`` or ``"auto"``."""
    if size == "auto":
        return "auto"
    return size[0] if size[0] == size[1] else f"{size[0]}x{size[1]}"


def parse_device(value: object) -> str:
    """``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; raises ``ValueError`` for anything else.

    N is 0 to 127: PyTorch takes ``cuda:256`` for ``cuda:0``, and stumbles over ``cuda:01``.
    """
    if isinstance(value, str) and re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9][0-9]?|1[01][0-9]|12[0-7]))?", value):
        return value
    raise ValueError(f"{written(value)} is not a device: auto, cpu, cuda, cuda:N or mps")


def parse_devices(text: str) -> tuple[str, ...]:
    """``0,1`` (GPUs), ``cuda:0,cuda:1``, ``cpu,cpu`` or ``all``: the device of each process; raises ``ValueError`` for others."""
    if text == "all":
        return ("all",)
    names = tuple(f"cuda:{name}" if name.isdigit() else name for name in text.replace(" ", "").split(","))
    for name in names:
        if parse_device(name) in ("auto", "mps", "cuda"):
            raise ValueError(f"{written(name)} is not one device of several: a number of a GPU, cuda:N or cpu")
    if len({name.partition(":")[0] for name in names}) > 1:
        raise ValueError(f"{written(text)} has GPUs and the CPU together")
    twice = next((name for name in names if name != "cpu" and names.count(name) > 1), None)
    if twice:
        raise ValueError(f"{written(text)} names {twice} more than once")
    return names


def check_name(text: str) -> str:
    """``text``, where a folder or file can be called so; raises ``ValueError`` where the system has no such names."""
    try:
        usable = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise ValueError(f"{written(text)} cannot be the name of a folder or file")
    return text
