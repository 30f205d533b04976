"""The Dockerfile agrees with the project; no image is built."""

from __future__ import annotations

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from ddpmctl.data.named import ROOT as DATA_ROOT

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
TEXT = (ROOT / "Dockerfile").read_text("utf-8")


def instructions() -> list[tuple[str, str]]:
    """Word and rest of each instruction, lines that go on joined."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


FOUND = instructions()


def of(word: str) -> list[str]:
    return [rest for found, rest in FOUND if found == word]


def ignored(name: str) -> bool:
    """As .dockerignore says it of a file at the top or a folder there: the last line that matches decides."""
    found = False
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        if line and not line.startswith("#") and fnmatch(name, line.removeprefix("!")):
            found = not line.startswith("!")
    return found


def test_every_instruction_is_known() -> None:
    assert {word for word, _ in FOUND} <= {"FROM", "ARG", "RUN", "COPY", "ENV", "USER", "WORKDIR", "VOLUME", "ENTRYPOINT", "CMD"}
    assert FOUND[0][0] == "FROM"


def test_python_is_one_that_the_project_runs_on() -> None:
    [image] = of("FROM")
    version = re.fullmatch(r"python:(\d+\.\d+)-slim", image)
    assert version and version[1] in SpecifierSet(PROJECT["requires-python"])


def test_the_extras_and_the_command_are_those_of_the_project() -> None:
    arguments = dict(rest.partition("=")[::2] for rest in of("ARG"))
    assert arguments.keys() == {"TORCH_INDEX", "EXTRAS"} and "/whl/cpu" in arguments["TORCH_INDEX"]
    assert set(arguments["EXTRAS"].split(",")) <= PROJECT["optional-dependencies"].keys()
    page = (ROOT / "docs" / "docker.md").read_text("utf-8")
    for extras in re.findall(r"EXTRAS=(\S+)", page):
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert of("ENTRYPOINT") == [f'["{next(iter(PROJECT["scripts"]))}"]']
    runs = " ".join(of("RUN"))
    assert 'torch torchvision' in runs and '"/build[$EXTRAS]"' in runs
    assert all(re.match(rf"{name}\b", dependency) for name, dependency in zip(("torch", "torchvision"), PROJECT["dependencies"], strict=False))


def test_what_is_copied_is_there_is_not_ignored_and_is_enough_to_build() -> None:
    sources = [source for rest in of("COPY") for source in shlex.split(rest)[:-1]]
    for source in sources:
        assert (ROOT / source).exists() and not ignored(source), source
    assert {"pyproject.toml", "src", PROJECT["readme"], *PROJECT["license-files"]} <= set(sources)
    assert all(ignored(name) for name in (".git", "tests", "docs", "examples", "runs", ".venv"))


def test_it_runs_as_no_root_and_keeps_what_is_to_stay() -> None:
    assert of("USER") == ["ddpmctl"] and "useradd --create-home ddpmctl" in " ".join(of("RUN"))
    names = [word for word, _ in FOUND]
    assert names.index("USER") > max(i for i, word in enumerate(names) if word in ("RUN", "COPY"))
    volumes = re.findall(r'"([^"]+)"', of("VOLUME")[0])
    assert volumes == ["/data", f"{of('WORKDIR')[0]}/runs", "/cache"]
    environment = dict(part.partition("=")[::2] for part in shlex.split(of("ENV")[0]))
    assert {"DDPMCTL_CACHE", DATA_ROOT, "TORCH_HOME"} <= environment.keys()
    assert all(place.startswith("/cache/") for place in environment.values())
    page = (ROOT / "docs" / "docker.md").read_text("utf-8")
    for mount in re.findall(r"-v \S*?:(/[a-z/]+)", page):
        assert mount in volumes
