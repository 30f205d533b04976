"""Checks of what is asked for, before anything is read: each raises :class:`ConfigError` that names the flag."""

from __future__ import annotations

import math

from ddpmctl.errors import ConfigError
from ddpmctl.rows import nearest


def check_choices(given: dict[str, tuple[str | None, tuple[str, ...]]]) -> None:
    """Flag -> its value and the names to choose from; raises :class:`ConfigError` for one that is none of them."""
    for flag, (value, names) in given.items():
        if value is not None and value not in names:
            raise ConfigError(f"{flag}: {value!r} is not one of {', '.join(names)}{nearest(value, names)}", "")


def check_counts(given: dict[str, int | None]) -> None:
    """Flag -> how many; raises :class:`ConfigError` for less than one."""
    for flag, number in given.items():
        if number is not None and number < 1:
            raise ConfigError(f"{flag} {number}: must be at least 1", "give a larger number")


def check_guidance(guidance: float) -> None:
    """Raise :class:`ConfigError` for a weight that guidance cannot have."""
    if not 0 <= guidance < math.inf:
        raise ConfigError(f"--guidance {guidance}: must be a number of at least 0", "1 is none, 2 to 4 is much")


def check_ema_length(length: float | None, weights: str) -> None:
    """Raise :class:`ConfigError` for a length of weights that are not averaged."""
    if length is not None and weights != "ema":
        raise ConfigError(f"--ema-length {length:g}: {weights} weights are not averaged", "leave --weights out")
