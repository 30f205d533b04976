"""Signals that ask a run to stop: they are noted, and the loop ends at the next step boundary."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from ddpmctl.cli import console

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")


class StopFlag:
    """``with StopFlag() as stop:`` then ask ``stop.name``, None until a signal came. A second Ctrl-C interrupts."""

    def __init__(self) -> None:
        self.name: str | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        console.note(f"{self.name}: saving after this step; Ctrl-C again leaves at once")

    def __enter__(self) -> StopFlag:
        self._before = {getattr(signal, n): signal.getsignal(getattr(signal, n)) for n in _NAMES if hasattr(signal, n)}
        for number in self._before:
            signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
