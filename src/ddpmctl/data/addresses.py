"""Files behind http: and https: addresses, read so that a server which falls silent keeps nobody from leaving."""

from __future__ import annotations

import io
import string
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from threading import Event, Thread
from typing import Any, TypeVar
from urllib.parse import quote

MARKS = ("Content-Length", "Last-Modified", "ETag")
"""What a server may say of a file that is another when the file is."""

NEVER = Event()
"""For those who read to the end."""

_PAUSES = (1, 3, 10)
"""Seconds before an address is tried again that fell silent."""
_PATIENCE = 60.0
_LOOK_EVERY = 0.2
_AT_ONCE = 2**20

T = TypeVar("T")


class ChangedError(ValueError):
    """A file is another than it was."""


def is_address(place: str) -> bool:
    """Whether it is one rather than a file."""
    return place.startswith(("http://", "https://"))


def pauses(place: str) -> Iterator[float]:
    """Seconds to wait before each further try; of a file there is none."""
    return iter(_PAUSES if is_address(place) else ())


def pause(waits: Iterator[float], problem: Exception, error: Exception, stop: Event) -> None:
    """Wait until what met ``error`` is tried again; raises ``problem`` where that is over, or would not help.

    Raises ``CancelledError`` when told to ``stop``.
    """
    seconds = next(waits, None)
    refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
    if seconds is None or refused or isinstance(error, ChangedError):
        raise problem from error
    if stop.wait(seconds):
        raise CancelledError


class Answer(io.RawIOBase):
    """The file at ``address``, as it comes. ``marks``: what the server says of it, "" where it does not: see :data:`MARKS`.

    The server is listened to in threads of which none keeps the program from ending. Raises ``CancelledError`` soon after ``stop``
    is set, ``OSError`` or an error of :mod:`http.client` where there is nothing to be had.
    """

    def __init__(self, address: str, stop: Event = NEVER) -> None:
        self._stop, self._listening = stop, False
        self._answer: Any = None
        self._answer = self._patiently(lambda: urllib.request.urlopen(_spelled(address), timeout=_PATIENCE))
        self.marks: list[str] = [self._answer.headers.get(key, "") for key in MARKS]

    def readable(self) -> bool:
        """As of every file that is read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As of every file."""
        answer = self._answer
        content = self._patiently(lambda: answer.read(len(buffer)))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Hang up; what is still listened to is let go when that comes to its end, for until then it cannot be closed."""
        if self._answer is not None and not self._listening:
            self._answer.close()
        super().close()

    def _patiently(self, work: Callable[[], T]) -> T:
        self._listening = True
        future = Future[T]()
        Thread(target=_settle, args=(future, work), name="address", daemon=True).start()
        while not wait([future], _LOOK_EVERY).done:
            if self._stop.is_set():
                raise CancelledError
        self._listening = False
        return future.result()


def opened(address: str, marks: Sequence[object], stop: Event = NEVER) -> io.BufferedReader:
    """The file at ``address``; raises :class:`ChangedError` where any of its ``marks`` is another now. Otherwise as :class:`Answer`."""
    answer = Answer(address, stop)
    for key, before, now in zip(MARKS, marks, answer.marks, strict=True):
        if before and now and before != now:
            answer.close()
            raise ChangedError(f"changed since the run looked at it: another {key}")
    return io.BufferedReader(answer, _AT_ONCE)


def _spelled(address: str) -> str:
    """As a server is asked for it: spaces and letters like ``ü`` behind the host by their numbers, which Python would refuse, and tell all of it."""
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host}{slash}{quote(path, safe=string.punctuation)}"


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the answer is waited for
        future.set_exception(error)
