"""The command line. Modules here import nothing heavy at the top: what needs torch is imported inside a command."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import typer

from ddpmctl import process
from ddpmctl.cli import console, together
from ddpmctl.cli.app import app
from ddpmctl.errors import DdpmctlError, Exit
from ddpmctl.memory import out_of_memory
from ddpmctl.stopping import SIGNALS

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_NO_NAMES = {errno.ENAMETOOLONG: "longer than names can be here", errno.ELOOP: "a link that leads to itself"}
"""Errors of the system for names that nothing can have, wherever they are looked up first."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    ``--debug`` shows the traceback of a user's error too; a bug always shows its own.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    process.tune()
    together.remember(args)
    try:
        code = _answered(args)
    except Exception:
        if together.several():
            traceback.print_exc()
            together.leave(Exit.BUG)
        raise
    together.leave(code)
    return code


def _answered(args: list[str]) -> int:
    """Exit code of one command, once all that it has to say is said."""
    with console.outlets():
        console.be_mute(together.follows())
        try:
            with _signals_raised():
                code = _outcome(args)
        except _Signalled as signalled:
            console.error(f"interrupted by {signalled.signal.name}", "")
            return 128 + signalled.signal  # as a shell numbers a program that a signal ended
        if {"-h", "--help"} & set(args) or not args:
            console.expect_result()
        lost = console.lost_result()
        if lost and code == Exit.OK:
            console.error(f"stdout: cannot be written: {lost}", "free space, or send the output elsewhere")
            return Exit.OUTPUT
        return code


def _outcome(args: list[str]) -> int:
    """Exit code of one command: the one place where errors become lines and numbers."""
    try:
        if together.follows() and not set(args[:1]) & set(together.COMMANDS):
            return Exit.OK  # what the first process alone does
        code = int(app(args=args, prog_name="ddpmctl", standalone_mode=False) or Exit.OK)
        if code == Exit.INTERRUPTED:  # newer Typer turns the interrupt into a number
            raise KeyboardInterrupt
        return code
    except DdpmctlError as error:
        if "--debug" in args:
            console.err.print_exception()
        console.error(error.problem, error.advice)
        return error.exit_code
    except PermissionError as error:
        console.error(f"{error.filename}: permission denied", "mend its rights, or name another place")
        return Exit.OUTPUT
    except OSError as error:
        if error.errno not in _NO_NAMES or error.filename is None:
            raise
        console.error(f"{os.fsdecode(error.filename)}: {_NO_NAMES[error.errno]}", "give another name")
        return Exit.CONFIG
    except _UsageError as error:
        if not error.format_message():  # type: ignore[attr-defined]
            return Exit.CONFIG  # no command at all: the help has been shown
        console.error(error.format_message(), _help_hint(error))  # type: ignore[attr-defined]
        return Exit.CONFIG
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if "--debug" in args:
            console.err.print_exception()
        console.error(f"out of memory: {str(error).partition(chr(10))[0][:160]}", _memory_advice(args))
        return Exit.DEVICE
    except (KeyboardInterrupt, typer.Abort):
        console.error("interrupted", "")
        return Exit.INTERRUPTED


class _Signalled(BaseException):
    """A signal asks the program to end; on its way up, whoever is half-way through a file removes it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Within it SIGTERM, SIGHUP and SIGUSR1 raise :class:`_Signalled`, once; later ones let the cleaning up finish.

    What was ignored before (``nohup``) stays so. Python handles signals in the main thread only: elsewhere nothing changes.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in SIGNALS if name != "SIGINT" and main_thread and hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]

    def handle(number: int, frame: FrameType | None) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)
        raise _Signalled(number)

    for number in ours:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _help_hint(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"see `{context.command_path if context else 'ddpmctl'} --help`"


def _memory_advice(args: list[str]) -> str:
    """Which flags of the command save memory."""
    if "sample" in args[:1]:
        return "lower --batch-size; for many images lower -n, or use -o folder/, which keeps none of them in memory"
    if "evaluate" in args[:1]:
        return "lower --batch-size; then -n, for samples and features are kept in memory"
    if "train" in args[:1]:
        return "lower --batch-size or --size; train.grad_accum=2 keeps the batch and halves the memory"
    return "give a smaller --size, or fewer --frames" if "noise-demo" in args[:1] else "free memory"
