"""Names of the rows in a literal dict of another module, read without importing it.

Schedules, losses, samplers and the like each are a function and a row in a dict beside it. The command line and
the run file offer the same names, but must not import torch to print ``--help``: so the keys are read from the
source text.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable
from functools import cache
from pathlib import Path


@cache
def row_names(module: str, table: str) -> tuple[str, ...]:
    """Keys of the literal dict ``table`` at the top of ``ddpmctl.<module>``, in order.

    Raises ``LookupError`` when there is no such dict.
    """
    source = Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py").read_text("utf-8")
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if isinstance(value, ast.Dict) and any(isinstance(t, ast.Name) and t.id == table for t in targets):
            return tuple(k.value for k in value.keys if isinstance(k, ast.Constant) and isinstance(k.value, str))
    raise LookupError(f"no literal dict {table} in ddpmctl.{module}")


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``known``, or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""
