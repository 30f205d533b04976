"""Arguments of Python in place of flags: what is common to all functions."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddpmctl.data.names import place_of
from ddpmctl.errors import ConfigError, DdpmctlError
from ddpmctl.parsing import parse_count

Place = str | Path
logger = logging.getLogger("ddpmctl")

_OTHERS = {"-n": "n", "--class": "class_name"} | {f"--{name}": f"{name}=True" for name in ("resume", "force", "overwrite")}
_FLAG = re.compile(r"(?P<command>ddpmctl \w+ .*)|(?<!\S)(?:--set \w+\.(?P<key>\w+=)|(?P<flag>--[a-z]+(?:-[a-z]+)*|-n)(?![\w-]))")


def in_python(text: str) -> str:
    """A message in which flags have become arguments: ``--ema-length 0.1`` is ``ema_length 0.1``. Command lines stay."""

    def argument(found: re.Match[str]) -> str:
        flag = found["flag"]
        return _OTHERS.get(flag, flag[2:].replace("-", "_")) if flag else found["key"] or found["command"]

    return _FLAG.sub(argument, text)


@contextmanager
def as_arguments() -> Iterator[None]:
    """Within it, or in a function that it decorates, errors name arguments where those of the command name flags."""
    try:
        yield
    except DdpmctlError as error:
        ours = type(error)(in_python(error.problem), in_python(error.advice))
        raise ours.with_traceback(error.__traceback__) from error.__cause__


def path_of(place: Place | None) -> Path | None:
    """``place`` as a path, or as the address that it is."""
    return None if place is None else place_of(place)


def seed_of(seed: int) -> int:
    """``seed``, where the command would take it; raises :class:`ConfigError`."""
    try:
        return parse_count(seed)
    except ValueError as error:
        raise ConfigError(f"--seed: {error}", "give a whole number of at least 0") from error
