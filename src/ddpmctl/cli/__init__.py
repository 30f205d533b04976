"""The command line. Modules here import nothing heavy at the top: what needs torch is imported inside a command."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

import typer

from ddpmctl.cli import console
from ddpmctl.cli.app import app
from ddpmctl.errors import DdpmctlError, Exit

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: the one place where errors become lines and numbers.

    ``--debug`` shows the traceback of a user's error too; a bug always shows its own.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be text that the terminal can show
            stream.reconfigure(errors="backslashreplace")
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        # How long a thread that waits for others keeps its core (read when torch is loaded). With the library's own
        # choice one busy neighbour slows training on two cores 29 times; with this one 9 times, and it costs 7 %
        # on an idle machine. Giving the core up at once (PASSIVE): 4 times, but 60 % on an idle machine.
        os.environ["GOMP_SPINCOUNT"] = "10000"
    try:
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
    except _UsageError as error:
        if not error.format_message():  # type: ignore[attr-defined]
            return Exit.CONFIG  # no command at all: the help has been shown
        console.error(error.format_message(), _help_hint(error))  # type: ignore[attr-defined]
        return Exit.CONFIG
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        if "--debug" in args:
            console.err.print_exception()
        console.error(
            f"out of memory: {str(error).partition(chr(10))[0][:160]}",
            "lower --batch-size or --size; when training, train.grad_accum=2 keeps the batch and halves the memory",
        )
        return Exit.DEVICE
    except (KeyboardInterrupt, typer.Abort):
        console.error("interrupted", "")
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`| head`): keep the interpreter from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK


def _help_hint(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"see `{context.command_path if context else 'ddpmctl'} --help`"


def _out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine ran out of memory; told by name, since torch may not be loaded."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
