"""Imports only go down, and what prints ``--help`` imports nothing heavy: read from every module's source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import ddpmctl

SOURCE = Path(ddpmctl.__file__).parent
TOWER = [
    ("__init__", "errors", "started", "rows", "checks", "files", "magic", "parsing", "memory", "process", "stopping"),
    ("config", "rules", "runfile", "resume", "plans"),
    ("core",),
    ("images", "plot", "npz", "data", "contents", "checkpoint", "averages", "lock", "table", "runfolder"),
    ("build", "ranks", "turns", "meeting", "sheet", "outputs", "describe", "outline", "noise_demo", "interop"),
    ("events", "keeping", "editing", "starting", "sampling", "making", "training", "learner", "measures", "following", "validation", "divergence", "metrics", "preview", "preflight", "run", "initial", "inspection", "evaluation", "boards", "launch"),
    ("api",),
    ("cli", "__main__"),
]
LAYERS = {name: layer for layer, names in enumerate(TOWER) for name in names}
"""Layer of each module or package of ddpmctl; a new one takes a line here."""
HEAVY = {"torch", "torchvision", "numpy", "matplotlib", "PIL"}
LIGHT = (*TOWER[0], *TOWER[1], *TOWER[-1])


def test_layers_name_modules_that_exist():
    assert [name for name in LAYERS if not (SOURCE / name).is_dir() and not (SOURCE / f"{name}.py").is_file()] == []


class Import(NamedTuple):
    line: int
    name: str
    at_top: bool


def modules() -> dict[str, Path]:
    """Dotted name -> file, for every module and package of ddpmctl."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = ["ddpmctl", *path.relative_to(SOURCE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def statements(body: list[ast.stmt], at_top: bool = True) -> Iterator[tuple[ast.stmt, bool]]:
    """Every statement, and whether it runs on import."""
    for node in body:
        yield node, at_top
        inside = at_top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            inside = False
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, field, []), inside if field == "body" else at_top and inside)
        for handler in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]:
            yield from statements(handler.body, inside)


def imports(module: str) -> list[Import]:
    """What a module imports, anywhere in it; ``from package import module`` counts as that module."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node, at_top in statements(ast.parse(path.read_text("utf-8")).body):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name, at_top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                found.append(Import(node.lineno, deeper if deeper in MODULES else base, at_top))
    return found


def layer(module: str) -> int:
    name = module.split(".")[1] if "." in module else "__init__"
    assert name in LAYERS, f"give ddpmctl.{name} a layer in LAYERS"
    return LAYERS[name]


def ours(name: str) -> bool:
    return name.split(".")[0] == "ddpmctl"


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module):
    upward = [
        f"line {found.line}: {found.name}"
        for found in imports(module)
        if ours(found.name) and layer(found.name) > layer(module)
        and not (module == "ddpmctl" and not found.at_top)  # what the package offers is above it, and comes when asked for
    ]
    assert upward == []


def test_core_is_torch_and_nothing_of_the_house():
    for module in MODULES:
        if module.startswith("ddpmctl.core"):
            names = {found.name for found in imports(module)}
            assert all(not ours(name) or name.startswith("ddpmctl.core") for name in names), module
            assert not {name.split(".")[0] for name in names} & {
                "yaml",
                "pydantic",
                "typer",
                "rich",
                "PIL",
                "pathlib",
            }


def reached_on_import(module: str) -> dict[str, list[str]]:
    """Every module that importing ``module`` imports, each with the way to it."""
    ways, queue = {module: [module]}, [module]
    while queue:
        here = queue.pop(0)
        parents = [".".join(here.split(".")[:n]) for n in range(1, here.count(".") + 1)]
        names = [found.name for found in imports(here) if found.at_top] if here in MODULES else []
        for name in [*parents, *names] if ours(here) else names:
            if name not in ways:
                ways[name] = [*ways[here], name]
                queue.append(name)
    return ways


@pytest.mark.parametrize("module", [m for m in MODULES if m == "ddpmctl" or m.split(".")[1] in LIGHT])
def test_help_needs_nothing_heavy(module):
    heavy = [" -> ".join(way) for name, way in reached_on_import(module).items() if name.split(".")[0] in HEAVY]
    assert heavy == []


def test_no_two_modules_import_each_other():
    """Whether at the top or within a function; a package's ``__init__`` may gather what is in it."""
    below = {
        module: {found.name for found in imports(module) if ours(found.name) and found.name != module}
        for module, path in MODULES.items()
        if path.name != "__init__.py"
    }
    rings = []

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            rings.append(" -> ".join([*trail[trail.index(module) :], module]))
            return
        for name in sorted(below.get(module, ())):
            walk(name, [*trail, module])

    for module in below:
        walk(module, [])
    assert rings == []


def test_reader_of_imports_sees_into_functions_and_conditions(tmp_path, monkeypatch):
    path = tmp_path / "sample.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import a\n"
        "try:\n    import b\nexcept ImportError:\n    import c\n"
        "def f():\n    if f:\n        import d\n"
        "class K:\n    import e\n    def g(self):\n        from ddpmctl.core import unet\n"
        "with f() as x:\n    from ddpmctl.core.unet import UNet\n"
    )
    monkeypatch.setitem(MODULES, "ddpmctl.sample_of_imports", path)
    found = {(name, at_top) for _, name, at_top in imports("ddpmctl.sample_of_imports")}
    assert found >= {("a", False), ("b", True), ("c", True), ("d", False), ("e", True)}
    assert found >= {("ddpmctl.core.unet", False), ("ddpmctl.core.unet", True)}
