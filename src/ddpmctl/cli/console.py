"""What the commands print: results and notes to stdout, warnings and errors to stderr, plain where not a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

PLAIN_SECONDS = 10.0
"""Where output is no terminal, a progress line at most this often."""

NARROW = 80
"""Columns of a terminal below which a progress line has no bar."""


class _State:
    quiet = False


def set_quiet(quiet: bool) -> None:
    """Silence notes, warnings and progress; errors and asked-for results stay."""
    _State.quiet = quiet


def result(text: str) -> None:
    """A result that was asked for: printed with ``--quiet`` too, without markup."""
    out.print(text, markup=False)


def heading(text: str) -> None:
    """A heading over results."""
    out.print(f"[bold cyan]{escape(text)}[/]")


def note(text: str, style: str = "") -> None:
    """A line that keeps the user informed."""
    if not _State.quiet:
        out.print(text, markup=False, style=style)


def field(name: str, text: str) -> None:
    """A named line of a summary."""
    if not _State.quiet:
        out.print(f"[bold cyan]{name:<10}[/] {escape(text)}")


def warn(text: str) -> None:
    """Something to know that stops nothing."""
    if not _State.quiet:
        err.print(f"[yellow]warning:[/] {escape(text)}")


def error(problem: str, advice: str) -> None:
    """What is wrong, and in a second line what to do."""
    err.print(f"[bold red]error:[/] {escape(problem)}")
    if advice:
        err.print(f"  [dim]->[/] {escape(advice)}")


class Bar:
    """Progress of one job: a Rich bar in a terminal, plain lines at a sane pace elsewhere, nothing when quiet."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.done = what, total, done
        self.live = out.is_terminal and not _State.quiet
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
        self._progress = Progress(*columns, console=out, disable=not self.live, expand=out.width >= NARROW)
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
        if not _State.quiet:
            self._progress.console.print(escape(text))

    def describe(self, what: str) -> None:
        """Change the words in front of the bar."""
        self._progress.update(self._task, description=escape(what))

    def update(self, done: int, info: str = "") -> None:
        """``done`` of ``total``, with a few words of numbers."""
        self.done = done
        self._progress.update(self._task, completed=done, info=escape(info))
        now = time.monotonic()
        if not self.live and not _State.quiet and (now - self._last >= PLAIN_SECONDS or done == self.total):
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
def reading(shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar over images being read that vanishes; yields what takes (done, total)."""
    progress = Bar("reading images", 1)

    def update(done: int, total: int) -> None:
        if shown:
            progress.start()
            progress.set_total(total)
            progress.update(done)

    try:
        yield update
    finally:
        progress.stop(leave=False)
