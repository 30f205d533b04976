"""Flags that several commands share, and the choices that they offer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpmctl.cli import console
from ddpmctl.rows import row_names

if TYPE_CHECKING:
    from ddpmctl.sampling import Model


def choices(module: str, table: str) -> str:
    """Names of a table for a help text: ``linear|cosine|sigmoid``."""
    return "|".join(row_names(module, table))


def complete(module: str, table: str) -> Callable[[str], list[str]]:
    """Shell completion from a table's names."""
    return lambda incomplete: [name for name in row_names(module, table) if name.startswith(incomplete)]


def weights_text(weights: str, step: int, length: float | None) -> str:
    """Which weights, in words; those of another tool are of no step that is known."""
    averaged = f", averaged over {length:g} of the run" if length is not None else ""
    return f"{weights} weights{f' of step {step:,}' if step else ''}{averaged}"


def tell_notes(notes: tuple[str, ...]) -> None:
    """What is to be said of a checkpoint of another tool."""
    for text in notes:
        console.note(text)


def tell_model(model: Model) -> None:
    """What is to be said of a model before it is used."""
    for text in model.notes:
        console.note(text)
    for text in model.warnings():
        console.warn(text)


def reading(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of one flag: ``ValueError`` becomes an error that names the flag."""

    def parser(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error

    parser.__name__ = "value"
    return parser


def switch(name: str, text: str, panel: str | None = None, **options: Any) -> Any:
    """An option that is on or off; its help shows no type."""
    return typer.Option(name, help=text, metavar="", rich_help_panel=panel, **options)


def _quiet(value: bool) -> bool:
    console.set_quiet(value)
    return value


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.", metavar="", callback=_quiet, rich_help_panel="General")]  # fmt: skip
Show = Annotated[bool, switch("--show", "Draw pictures in the terminal, too. Needs the extra show.")]
Debug = Annotated[bool, switch("--debug", "Show the traceback of an error.", "General")]
Devices = Annotated[str | None, typer.Option("--devices", metavar="LIST", help="A process for each: 0,1 (GPUs), all, or cpu,cpu; several machines: torchrun, see docs/distributed.md.", rich_help_panel="Several processes")]  # fmt: skip
