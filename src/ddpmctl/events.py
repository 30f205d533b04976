"""What happens between the steps of a run, for whoever shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Saved(NamedTuple):
    """A file that is now there."""

    path: Path


class Logged(NamedTuple):
    """A row of ``metrics.csv``, whether it could be written or waits."""

    row: Mapping[str, object]


class Back(NamedTuple):
    """The run has gone back to ``step``, and makes again what came after."""

    step: int


class Notice(NamedTuple):
    """Something that went wrong, and that the run goes on after."""

    text: str


class Busy(NamedTuple):
    """Something between two steps of training, such as drawing a grid: ``done`` of ``total``."""

    what: str
    done: int
    total: int
