"""What happens between the steps of a run, for whoever shows it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Saved(NamedTuple):
    """A file that is now there."""

    path: Path


class Notice(NamedTuple):
    """Something that went wrong, and that the run goes on after."""

    text: str


class Busy(NamedTuple):
    """Something between two steps of training, such as drawing a grid: ``done`` of ``total``."""

    what: str
    done: int
    total: int
