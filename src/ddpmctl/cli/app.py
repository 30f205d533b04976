"""The Typer application: one function a command, each in a module of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from ddpmctl import __version__
from ddpmctl.cli import console
from ddpmctl.cli.cache import cache
from ddpmctl.cli.command import Command
from ddpmctl.cli.convert import convert
from ddpmctl.cli.evaluate import evaluate
from ddpmctl.cli.inspect import inspect
from ddpmctl.cli.noise_demo import noise_demo
from ddpmctl.cli.sample import sample
from ddpmctl.cli.train import train
from ddpmctl.errors import EXIT_MEANINGS

_EXIT_CODES = "  \n".join(f"{code.value:>3}  {meaning}" for code, meaning in EXIT_MEANINGS.items())

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=f"**Exit codes**\n\n{_EXIT_CODES}",
)


def _version(value: bool) -> None:
    if value:
        console.result(f"ddpmctl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """A folder of images in, a trained denoising diffusion model and new images out.

    Start with `ddpmctl train PHOTOS/ --dry-run`, then without it, then `ddpmctl sample runs/PHOTOS -o new.png`.
    """


for command, name in (
    (train, "train"),
    (sample, "sample"),
    (evaluate, "evaluate"),
    (noise_demo, "noise-demo"),
    (inspect, "inspect"),
    (convert, "convert"),
    (cache, "cache"),
):
    app.command(name, cls=Command)(command)
