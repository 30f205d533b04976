"""Random inputs, many of them: how many, what they may do meanwhile, and what must hold of every command.

``DDPMCTL_FUZZ`` is a factor on the number of inputs: 1 by default and the same inputs every time; with more than 1, as
``make soak`` has it, new ones each time.
"""

from __future__ import annotations

import faulthandler
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, settings

from ddpmctl.cli import console, main
from ddpmctl.errors import Exit
from runs import COMMAND

FACTOR = float(os.environ.get("DDPMCTL_FUZZ", "1"))
TRIED: Counter[str] = Counter()
"""Inputs so far, by kind; told at the end of the session."""

CPU_SECONDS, SECONDS = 10.0, 120.0
"""What one command may take: of the processor, and of the clock of a machine that others use too."""


def inputs(count: int, *, shrink: bool = True) -> Callable[[Any], Any]:
    """Decorator of a test that tries ``count`` random inputs, times the factor.

    ``shrink``: whether a failing input is made as small as it can be, which takes minutes where each takes seconds.
    """
    phases = [Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])]
    return settings(
        max_examples=max(1, round(count * FACTOR)),
        derandomize=FACTOR <= 1,
        database=None,
        deadline=None,  # see no_hang
        phases=phases,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


class _TooSlow(BaseException):
    """Not an ``Exception``, so that nothing on the way takes it for one of its own."""


@contextmanager
def no_hang() -> Iterator[None]:
    """Fail when the block takes too long; where not even a signal gets through, print where, and end the process."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TooSlow

    clocks = {signal.SIGPROF: (signal.ITIMER_PROF, CPU_SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, SECONDS)}
    before = {number: signal.signal(number, ring) for number in clocks}
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True, file=sys.__stderr__ or 2)
    try:
        for which, seconds in clocks.values():
            signal.setitimer(which, seconds)
        yield
    except _TooSlow as error:
        raise AssertionError(f"took more than {CPU_SECONDS} s of the processor, or {SECONDS} s") from error
    finally:
        for number, (which, _) in clocks.items():
            signal.setitimer(which, 0)
            signal.signal(number, before[number])
        faulthandler.cancel_dump_traceback_later()


_CHANGING = {"os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.mkfifo"}
_PAIRS = {"os.rename", "os.link", "os.symlink"}
_NEVER = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.bind"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_watch: tuple[tuple[str, ...], list[str]] | None = None


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """Python tells every opening of a file and every change of a folder before it happens; hooks cannot be taken away."""
    if _watch is None:
        return
    allowed, found = _watch
    if event in _NEVER:
        found.append(f"{event} {args[:2]}")
        return
    if event == "open":
        paths = [(args[0], -1)] if isinstance(args[2], int) and args[2] & _WRITING else []
    elif event in _CHANGING:
        paths = [(args[0], args[-1])]
    elif event in _PAIRS:
        paths = [(args[0], -1), (args[1], -1)] if event == "os.rename" else [(args[1], -1)]
    else:
        return
    for path, folder in paths:
        if isinstance(path, int) or path is None:
            continue
        whole = os.path.join(f"/proc/self/fd/{folder}" if isinstance(folder, int) and folder >= 0 else "", os.fsdecode(path))  # fmt: skip # noqa: PTH118
        parent, name = os.path.split(whole)
        place = os.path.join(os.path.realpath(parent), name)  # noqa: PTH118
        if not place.startswith(allowed) and "__pycache__" not in place:
            found.append(f"{event} {place}")


sys.addaudithook(_audit)


@contextmanager
def writes_only(*places: Path) -> Iterator[None]:
    """Fail when the block, in any thread, changes something outside ``places`` and the cache, or starts a program."""
    global _watch
    always = [os.environ["DDPMCTL_CACHE"], "/proc/self/", f"/proc/{os.getpid()}/", os.devnull]
    found: list[str] = []
    _watch = (*map(os.path.realpath, [*always, *places]),), found
    try:
        yield
    finally:
        _watch = None
    assert not found, f"changed what is not its own: {found}"


@contextmanager
def sandbox() -> Iterator[Path]:
    """A folder of its own to be in, within another that must not change."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        here = Path(name) / "outer" / "here"
        here.mkdir(parents=True)
        os.chdir(here)
        try:
            yield here
        finally:
            os.chdir(before)
        left = sorted(str(path) for path in Path(name).rglob("*") if not path.is_relative_to(here))
        assert left == [str(here.parent)], left


Snapshot = dict[str, tuple[int, int, int]]


def snapshot(folder: Path) -> Snapshot:
    """What lies in ``folder``, with what changes when it does."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        is_folder = path.is_dir() and not path.is_symlink()
        found[str(path.relative_to(folder))] = (0, 0, 0) if is_folder else (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


class Done(NamedTuple):
    """A command that has ended."""

    args: tuple[str, ...]
    code: int
    out: str
    err: str


def run(*args: str, places: Sequence[Path] = ()) -> Done:
    """``ddpmctl ARGS`` in this process. Fails when it hangs, or writes elsewhere than to ``places``."""
    console.set_quiet(False)
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n", write_through=True) for _ in range(2))
    with ExitStack() as stack:
        for context in (redirect_stdout(out), redirect_stderr(err), no_hang(), writes_only(*places)):
            stack.enter_context(context)
        warned = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.resetwarnings()
        for unseen in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", unseen)
        code = main(list(args))
    assert not warned, [str(warning) for warning in warned]
    return Done(args, code, *(stream.buffer.getvalue().decode() for stream in (out, err)))  # type: ignore[attr-defined]


def process(*args: str) -> Done:
    """The same in a process of its own."""
    done = subprocess.run(
        [*COMMAND, *args], capture_output=True, timeout=SECONDS, check=False, stdin=subprocess.DEVNULL
    )  # fmt: skip
    return Done(args, done.returncode, done.stdout.decode(), done.stderr.decode())


def check(done: Done, *names: str) -> None:
    """The promise of the README: an exit code of the table and, unless it is 0, one line what is wrong with which of
    ``names``, and one line what to do."""
    told = f"{done.args} -> {done.code}\n{done.out}\n{done.err}"
    assert "Traceback" not in done.out + done.err, told
    assert done.code in set(Exit) - {Exit.BUG}, told
    lines = [line for line in done.err.split("\n") if line and not line.startswith("warning: ")]
    if done.code == Exit.OK:
        assert not lines, told
        return
    assert lines and lines[0].startswith("error: ") and len(lines[0]) > len("error: "), told
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("  -> ")), told
    assert all(char.isprintable() for line in lines for char in line), told
    assert all(len(line) < 1000 + sum(map(len, done.args)) for line in lines), told
    check_named("\n".join(lines), names)


def check_named(text: str, names: Sequence[str]) -> None:
    """One of ``names`` stands in ``text`` as a word, as it is or with what cannot be printed escaped."""
    forms = {form for name in names if name.strip() for form in (name, name.encode("unicode_escape").decode(), name.replace("\n", r"\x0a"))}
    pattern = "|".join(rf"(?<!\w){re.escape(form)}(?!\w)" for form in forms)
    assert re.search(pattern, text), (text, names)
