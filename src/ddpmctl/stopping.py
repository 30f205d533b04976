"""What asks a run to stop: signals, and the time that it was given. The loop asks, and ends at a step boundary."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
"""Those that ask a program to stop, as far as the system has them."""


class Interrupted(Exception):
    """A stop was asked for while something was waited for that may not come."""


class StopFlag:
    """``with StopFlag() as stop:`` then ask ``stop.reason()``, None until there is one. A second Ctrl-C interrupts.

    ``deadline``: a time of ``time.monotonic()``, and ``limit`` what to call it. ``quiet``: a signal is not answered on stderr.
    ``elsewhere``: the number of a signal that another process of the same job has got, 0 for none.
    """

    def __init__(
        self, deadline: float | None = None, limit: str = "", elsewhere: Callable[[], int] = lambda: 0, *, quiet: bool = False
    ) -> None:
        self._deadline, self._limit, self._elsewhere, self._quiet = deadline, limit, elsewhere, quiet
        self._signal: str | None = None

    def number(self) -> int:
        """The number of the signal that came to this process, 0 where there was none."""
        return signal.Signals[self._signal].value if self._signal else 0

    def reason(self) -> str | None:
        """The name of the signal that came, or the limit that has passed."""
        if self._signal is None and self._elsewhere():
            self._signal = signal.Signals(self._elsewhere()).name
        if self._signal is None and self._deadline is not None and time.monotonic() >= self._deadline:
            return self._limit
        return self._signal

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name
        if not self._quiet:
            # Not by way of sys.stdout: the signal may have come while that was being written to.
            text = f"\n{self._signal}: saving after this step; Ctrl-C again leaves at once\n"
            with suppress(OSError):  # nobody is listening any more
                os.write(2, text.encode())

    def __enter__(self) -> StopFlag:
        # Python handles signals in the main thread only: elsewhere there is none to wait for.
        names = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        # What the caller ignores stays ignored: `nohup` and `command &` of a script ask for that.
        self._before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
