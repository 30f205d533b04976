"""What a run has kept, and what it could not keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ddpmctl.errors import OutputError
from ddpmctl.events import Notice


class Kept(NamedTuple):
    """The last checkpoint of a run; 0 where there is none.

    ``step``: its step; ``pending``: it holds steps whose row of metrics was still to come. ``planned``: the newest step
    whose checkpoint was due, rather than added by a stop; ``tried``: the newest at which one was due.
    """

    step: int = 0
    planned: int = 0
    tried: int = 0
    pending: bool = False

    def due(self, step: int, every: int) -> bool:
        """Whether a multiple of ``every`` has come since the last try."""
        return step // every > self.tried // every


class Attempts:
    """Writes what a run can do without: what goes wrong is a :class:`Notice`, the same thing in a row one."""

    def __init__(self) -> None:
        self._failing: dict[Path, str] = {}

    def __call__(self, file: Path, write: Callable[[], object]) -> Iterator[Notice]:
        """``write()``, which is about ``file``."""
        try:
            write()
            self._failing.pop(file, None)
        except OutputError as error:
            if error.problem != self._failing.get(file):
                yield Notice(f"{error.problem}: going on, it is tried again later")
            self._failing[file] = error.problem
