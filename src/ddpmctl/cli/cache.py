"""``ddpmctl cache``."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

from ddpmctl.cli import console
from ddpmctl.cli.options import Debug, Quiet, switch
from ddpmctl.parsing import shown

if TYPE_CHECKING:
    from rich.text import Text

    from ddpmctl.data.cache import Cache, Found


def cache(
    clear: Annotated[bool, switch("--clear", "Remove all of it. The images themselves stay as they are.")] = False,
    as_json: Annotated[bool, switch("--json", "Print JSON.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Show or clear the decoded images, and the features of images, that are kept for later runs.

    Training decodes each image once; until the file changes, later runs take its pixels from here. What was used least
    recently makes way for what is new. Where: `$DDPMCTL_CACHE`, else the system's place for caches. How large:
    `$DDPMCTL_CACHE_SIZE` (20G), and never more than half of what the disk has free. `train --cache off` does without.

    Example: `ddpmctl cache` or `ddpmctl cache --clear`
    """
    from ddpmctl.data.cache import Cache

    kept = Cache.of_user()
    if kept is None:
        console.warn("there is no home folder, so nothing is kept; name a folder in $DDPMCTL_CACHE")
        return 0
    freed = kept.clear() if clear else 0
    found = sorted(kept.found(), key=lambda entry: entry.used, reverse=True)
    if as_json:
        facts = _facts(kept, found) | ({"freed": freed} if clear else {})
        console.result(json.dumps(facts, indent=2))
    elif clear:
        left = f"; {len(found)} could not be removed" if found else ""
        console.result(f"{_size(freed)} freed in {kept.folder}{left}")
    else:
        _show(kept, found)
    return 0


def _facts(kept: Cache, found: list[Found]) -> dict[str, Any]:
    """Plain scalars, lists and dicts: bytes, seconds since 1970, ``shape`` (N, C, H, W); null where it is unknown."""
    entries = [
        {"data": entry.head.get("root"), "shape": entry.head.get("shape"), "fit": entry.head.get("fit"),
         "features": entry.head.get("features"), "bytes": entry.bytes, "used": entry.used, "folder": str(entry.folder)}
        for entry in found
    ]  # fmt: skip
    total = sum(entry.bytes for entry in found)
    return {"folder": str(kept.folder), "limit": kept.limit, "bytes": total, "entries": entries}


def _show(kept: Cache, found: list[Found]) -> None:
    """A table of what is kept, and a line of how much that is and where."""
    from rich.table import Table

    console.expect_result()
    table = Table(box=None, header_style="bold cyan", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("data", overflow="fold")
    for name in ("images", "size", "fit", "room", "last used"):
        table.add_column(name, justify="right" if name in ("images", "room") else "left", no_wrap=True)
    for entry in found:
        table.add_row(*_row(entry))
    if not console.out.is_terminal:  # no width to keep to
        table.width = console.out.measure(table, options=console.out.options.update(width=10_000)).maximum
    if found:
        console.out.print(table)
    total = sum(entry.bytes for entry in found)
    console.result(f"{_size(total)} of at most {_size(kept.limit)} in {kept.folder}")


def _row(entry: Found) -> list[Text]:
    """One line of the table."""
    from rich.text import Text

    used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
    if entry.head:
        count, channels, height, width = entry.head["shape"]
        colours = {1: "grey", 3: "rgb", 4: "rgba"}.get(channels, str(channels))
        what = [shown(entry.head["root"]), f"{count:,}", f"{height}x{width} {colours}" if height else "", _fit(entry)]
    else:
        what = ["(being written)" if entry.unfinished else "(damaged)", "", "", ""]
    return [Text(word) for word in (*what, _size(entry.bytes), used)]


def _fit(entry: Found) -> str:
    """``crop``, and of features which."""
    return ", ".join(str(entry.head[key]) for key in ("fit", "features") if entry.head.get(key))


def _size(size: float) -> str:
    """``8.4 MiB``, in units of 1024."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"
