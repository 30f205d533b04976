"""Stamps of a million files: calls of the system take seconds, and only processes share them out.

Threads do not: each call is so short that they stand in each other's way.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from ddpmctl.data import stamps
from ddpmctl.data.pool import elsewhere
from ddpmctl.data.stamps import COLUMNS, stamps_of

_PORTION = 50_000
"""Files for which another process is worth its start: 10 ms."""


class Stamper:
    """Takes names below the folder ``root`` as they are found, and stamps them meanwhile in other ``processes``."""

    def __init__(self, root: str, processes: int) -> None:
        self.root, self._names, self._portions = root, list[str](), list[tuple[list[str], Future[bytes]]]()
        self._pool = ThreadPoolExecutor(processes - 1) if processes > 1 else None

    def add(self, names: list[str]) -> None:
        """More names."""
        self._names += names
        if self._pool and len(self._names) >= _PORTION:
            self._portions.append((self._names, self._pool.submit(elsewhere, stamps.__file__, self.root, self._names)))
            self._names = []

    def finish(self) -> bytes:
        """The stamps of all names, in order: :data:`COLUMNS` int64 each."""
        found = [stamps_of(self.root, self._names)]
        for names, portion in reversed(self._portions):  # those that no process has begun are left to this one
            known = b"" if portion.cancel() else portion.result()
            found.append(known if len(known) == 8 * COLUMNS * len(names) else stamps_of(self.root, names))
        if self._pool:
            self._pool.shutdown()
        return b"".join(reversed(found))
