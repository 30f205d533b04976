"""The command line. Modules here import nothing heavy at the top: what needs torch is imported inside a command."""

from __future__ import annotations

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
    try:
        return int(app(args=args, prog_name="ddpmctl", standalone_mode=False) or Exit.OK)
    except DdpmctlError as error:
        if "--debug" in args:
            console.err.print_exception()
        console.error(error.problem, error.advice)
        return error.exit_code
    except _UsageError as error:
        console.error(error.format_message(), _help_hint(error))  # type: ignore[attr-defined]
        return Exit.CONFIG
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
