from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import ddpmctl
from ddpmctl.rows import nearest, row_names

SOURCE = Path(ddpmctl.__file__).parent


def used_tables() -> list[tuple[str, str]]:
    """Every (module, table) pair of words in the source that names rows, wherever it is asked for."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and len(node.args) == 2:
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                words = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
                if name in ("_row", "row_names", "choices", "complete") and len(words) == 2:
                    found.add((words[0], words[1]))
    return sorted(found)


@pytest.mark.parametrize(("module", "table"), used_tables())
def test_names_read_from_the_source_are_the_keys_of_the_table(module, table):
    imported = getattr(importlib.import_module(f"ddpmctl.{module}"), table)
    assert row_names(module, table) == tuple(imported)
    assert all(isinstance(name, str) for name in imported)


def test_tables_of_the_run_file_and_of_flags_are_among_those():
    assert {
        ("core.schedule", "SCHEDULES"), ("core.prediction", "PREDICTIONS"), ("core.losses", "LOSSES"),
        ("core.unet", "NORMS"), ("core.unet", "ACTIVATIONS"), ("core.samplers", "SAMPLERS"),
        ("core.optim", "LR_SCHEDULES"), ("core.optim", "OPTIMIZERS"), ("core.ema", "WARMUPS"),
        ("data.decode", "FITS"), ("core.spacing", "SPACINGS"), ("core.thresholds", "THRESHOLDS"), ("plans", "QUALITIES"),
    } <= set(used_tables())  # fmt: skip


@pytest.mark.parametrize("table", ["NOTHING", "MAX_BETA", "linear", "NoiseSchedule", ""])
def test_what_is_no_table(table):
    with pytest.raises(LookupError, match=f"no literal dict {table} in ddpmctl.core.schedule"):
        row_names("core.schedule", table)


def test_names_keep_their_order():
    assert row_names("core.prediction", "PREDICTIONS") == ("eps", "x0", "v")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("cosin", "; did you mean 'cosine'?"),
        ("cosine", "; did you mean 'cosine'?"),
        ("liner", "; did you mean 'linear'?"),
        ("xyzzy", ""),
        ("", ""),
    ],
)
def test_nearest(word, hint):
    assert nearest(word, ["linear", "cosine", "sigmoid"]) == hint


def test_nearest_of_nothing():
    assert nearest("word", []) == ""
