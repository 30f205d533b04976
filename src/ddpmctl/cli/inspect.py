"""``ddpmctl inspect``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ddpmctl.cli import console
from ddpmctl.cli.options import Debug, Quiet, switch
from ddpmctl.parsing import shown

_LONGEST_LIST = 40


def inspect(
    what: Annotated[str | None, typer.Argument(metavar="WHAT", help="Checkpoint, run folder, run file, folder or .zip of images, tar shards, torchvision:NAME, hf:NAME, or a PNG or GIF that ddpmctl made.")] = None,
    as_json: Annotated[bool, switch("--json", "Print JSON.")] = False,
    defaults: Annotated[bool, switch("--defaults", "Print a run file with every key, its default and its meaning.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:  # fmt: skip
    """Tell what something is.

    Example: `ddpmctl inspect runs/photos` or `ddpmctl inspect --defaults > run.yaml`
    """
    from ddpmctl.errors import ConfigError

    if defaults:
        from ddpmctl.config import RunConfig
        from ddpmctl.runfile import to_yaml

        console.result(to_yaml(RunConfig(), comments=True).rstrip())
        return 0
    if what is None:
        raise ConfigError(
            "nothing to inspect", "name a checkpoint, run folder, run file, data or picture, or use --defaults"
        )
    from ddpmctl.data.names import place_of
    from ddpmctl.inspection import inspect_path

    with console.reading(shown=not as_json) as progress:
        facts = inspect_path(place_of(what), progress)
    if as_json:
        import json

        console.result(json.dumps(facts, indent=2, default=str))
    else:
        _show(facts)
    return 0


def _show(facts: dict[str, Any]) -> None:
    """A heading and its facts, one a line."""
    for heading, content in facts.items():
        if not isinstance(content, dict):
            lines = content if isinstance(content, list) else [content]
            console.heading(heading)
            for line in lines:
                console.result(f"  {shown(str(line))}")
            continue
        console.heading(heading)
        items = list(_flat(content))
        width = max((len(key) for key, _ in items), default=0)
        for key, value in items[:_LONGEST_LIST] if heading != "config" else items:
            console.result(f"  {shown(key):<{width}}  {shown(value)}")
        if len(items) > _LONGEST_LIST and heading != "config":
            console.result(f"  ... and {len(items) - _LONGEST_LIST} more (all with --json)")


def _flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines = []
    for key, value in content.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{key}.")
        else:
            number = isinstance(value, int) and not isinstance(value, bool)
            text = f"{value:,}" if number else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append((f"{prefix}{key}", text))
    return lines
