"""What the commands print: results and notes to stdout, warnings and errors to stderr, plain where not a terminal.

A line stays one, and moves no cursor, whatever is in the names that it tells: see :func:`shown`.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ddpmctl.parsing import shown

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

PLAIN_SECONDS = 10.0
"""Where output is no terminal, a progress line at most this often."""

NARROW = 80
"""Columns of a terminal below which a progress line has no bar."""

_ECHO = len("^C^C")


class _State:
    quiet = False
    asked = False  # whether stdout carries a result, not only notes
    mute = False  # whether another process of the same job does the printing
    voice: Callable[[], str | None] | None = None


class Outlet:
    """A standard stream whose end is no end of the program: once it cannot be written, all that comes is dropped.

    ``fault`` is the first error: ``BrokenPipeError`` where the reader went away (``| head``), another where a disk is
    full or a terminal gone. All else that a stream has, it has.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.fault: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop."""
        if self.fault is None:
            try:
                self._stream.write(text)
            except OSError as error:
                self._close(error)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        if self.fault is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._close(error)

    def _close(self, error: OSError) -> None:
        """Lead what is still in the stream's buffer to nowhere, or the interpreter would fail on it as it exits."""
        self.fault = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def outlets() -> Iterator[None]:
    """Within it nothing that is printed can fail: see :class:`Outlet`."""
    _State.asked = False
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be text that the terminal can show
            stream.reconfigure(errors="backslashreplace")
    # A stream that was closed before the program began is None, and everyone knows how to drop what goes there.
    sys.stdout, sys.stderr = (cast(TextIO, Outlet(stream)) if stream else stream for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def expect_result() -> None:
    """What goes to stdout was asked for, though it did not come through :func:`result`."""
    _State.asked = True


def lost_result() -> str | None:
    """Why a result that was asked for did not get to stdout. None: it did, or its reader had enough of it."""
    stream = sys.stdout
    if not _State.asked:
        return None
    if not isinstance(stream, Outlet):
        return "it is closed"
    stream.flush()
    fault = stream.fault
    return None if fault is None or fault.errno == errno.EPIPE else fault.strerror or str(fault)


def set_quiet(quiet: bool) -> None:
    """Silence notes, warnings and progress; errors and asked-for results stay."""
    _State.quiet = quiet


def be_mute(mute: bool) -> None:
    """Print nothing at all, for another process of the same job does; errors see :func:`give_voice`."""
    _State.mute, _State.voice = mute, None


def give_voice(voice: Callable[[], str | None]) -> None:
    """Ask ``voice`` before an error is printed: the name that goes before it, empty for none; None: it is not printed."""
    _State.voice = voice


def is_quiet() -> bool:
    """Whether notes are silenced."""
    return _State.quiet or _State.mute


def result(text: str) -> None:
    """A result that was asked for: printed with ``--quiet`` too, without markup."""
    _State.asked = True
    if not _State.mute:
        out.print(text, markup=False)


def heading(text: str) -> None:
    """A heading over results."""
    _State.asked = True
    if not _State.mute:
        out.print(f"[bold cyan]{escape(text)}[/]")


def note(text: str, style: str = "") -> None:
    """A line that keeps the user informed."""
    if not is_quiet():
        out.print(shown(text), markup=False, style=style)


def field(name: str, text: str) -> None:
    """A named line of a summary."""
    if not is_quiet():
        out.print(f"[bold cyan]{name:<10}[/] {escape(shown(text))}")


def warn(text: str) -> None:
    """Something to know that stops nothing."""
    if not is_quiet():
        err.print(f"[yellow]warning:[/] {escape(shown(text))}")


def error(problem: str, advice: str) -> None:
    """What is wrong, and in a second line what to do."""
    name = _State.voice() if _State.voice else None if _State.mute else ""
    if name is None:
        return
    err.print(f"[bold red]error:[/] {escape(shown(f'{name}: {problem}' if name else problem))}")
    if advice:
        err.print(f"  [dim]->[/] {escape(shown(advice))}")


class _Progress(Progress):
    """A bar that leaves room at its right for the ``^C`` that a terminal echoes.

    Without it the echo goes to the next line, and the bar is drawn again below a stale copy of itself.
    """

    def get_renderables(self) -> Iterator[RenderableType]:
        for table in super().get_renderables():
            yield Constrain(table, max(1, out.width - _ECHO))


class Bar:
    """Progress of one job: a Rich bar in a terminal, plain lines at a sane pace elsewhere, nothing when quiet."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.done = what, total, done
        self.live = out.is_terminal and not out.is_dumb_terminal and not is_quiet()
        self._last = time.monotonic()
        columns: list[ProgressColumn] = [
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[info]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
        ]
        if out.width < NARROW:  # the numbers matter more than the bar
            columns = [columns[0], *columns[2:4], columns[5]]
        self._progress = _Progress(*columns, console=out, disable=not self.live, expand=out.width >= NARROW)
        self._task = self._progress.add_task(escape(what), total=total, completed=done, info="")

    def start(self) -> None:
        """Show the bar."""
        self._progress.start()

    def stop(self, *, leave: bool = True) -> None:
        """Leave the bar as it stands, or remove it."""
        self._progress.live.transient = not leave
        self._progress.stop()

    def set_total(self, total: int) -> None:
        """For jobs whose size is known only after they began."""
        if total != self.total:
            self.total = total
            self._progress.update(self._task, total=total)

    def note(self, text: str) -> None:
        """A line above the bar."""
        if not is_quiet():
            self._progress.console.print(escape(shown(text)))

    def describe(self, what: str) -> None:
        """Change the words in front of the bar."""
        self._progress.update(self._task, description=escape(what))

    def update(self, done: int, info: str = "") -> None:
        """``done`` of ``total``, with a few words of numbers."""
        self.done = done
        self._progress.update(self._task, completed=done, info=escape(info))
        now = time.monotonic()
        if not self.live and not is_quiet() and (now - self._last >= PLAIN_SECONDS or done == self.total):
            self._last = now
            out.print(escape(f"{self.what} {done}/{self.total} {info}".rstrip()))


@contextmanager
def bar(what: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A :class:`Bar` that is stopped whatever happens inside."""
    shown = Bar(what, total, done)
    shown.start()
    try:
        yield shown
    finally:
        shown.stop()


@contextmanager
def reading(shown: bool = True, what: str = "reading images") -> Iterator[Callable[[int, int], None]]:
    """A bar over ``what`` is being done that vanishes; yields what takes (done, total)."""
    progress = Bar(what, 1)

    def update(done: int, total: int) -> None:
        if shown:
            progress.start()
            progress.set_total(total)
            progress.update(done)

    try:
        yield update
    finally:
        progress.stop(leave=False)
