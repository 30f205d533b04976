"""Every block of code of README and docs/ runs, on the files that it names; training is cut to a few steps of a tiny network."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ddpmctl.cli import main
from ddpmctl.runfile import read_run_file, resolve
from helpers import write_images
from layouts import LAYOUTS
from tars import write_shards

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KNOWN_ELSEWHERE = {"make", "pip", "docker", "torchrun"}
"""First words of lines that the test of the command's lines leaves out; those of torchrun have one of their own."""

_TINY = "--batch-size 2 --size 16 --set model.base_channels=8 --set model.norm_groups=4 --set train.sample_steps=2 --set train.samples=4"
SHORTER = {
    "train": f"--steps 2 {_TINY}",
    "init": "--steps 2 --batch-size 2 --size 16 --set train.sample_steps=2 --set train.samples=4",
    "resume": "--steps 3",
    "sample": "--steps 3",
    "evaluate": "-n 8",
}


def blocks(page: Path, *languages: str) -> list[str]:
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def command_lines(page: Path) -> list[str]:
    lines = "\n".join(blocks(page, "bash", "sh", "console")).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


PAGES_WITH_LINES = [page for page in PAGES if command_lines(page)]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: images, runs, and checkpoints of other tools."""
    place = tmp_path_factory.mktemp("workshop")
    write_images(place / "photos")
    write_shards(place / "shards", (4, 4, 4, 4), label=lambda number: str(number % 2), size=(16, 16))
    for name in ("cat.jpg", "dog.jpg", "mask.png"):
        Image.radial_gradient("L").convert("RGB").resize((48, 32)).save(place / name)
    shutil.copy(ROOT / "tests" / "data" / "reference" / "seed-linear.pth", place / "old.pth")
    photos, classes, runs = str(place / "photos"), "data.conditional=true", place / "runs"
    train = lambda name, *flags: main(["train", photos, "--out", str(runs / name), *shlex.split(SHORTER["train"]), *flags, "-q"])
    assert train("photos") == 0
    assert train("classes", "--set", classes, "--set", "model.label_dropout=0.1") == 0
    assert main(["convert", str(runs / "photos"), str(place / "ddpm-church-256"), "-q"]) == 0
    assert main(["sample", str(runs / "photos"), "-n", "4", "--steps", "2", "-o", str(place / "new.png"), "-q"]) == 0
    return place


def shortened(words: list[str]) -> list[str]:
    """The arguments of a command, so that they take no time."""
    kind = "resume" if "--resume" in words else "init" if "--init-from" in words else words[0]
    if "--dry-run" in words and kind == "resume":
        return words
    words = [{"50k": "8", "0,1": "cpu,cpu"}.get(word, word) for word in words]
    fresh = ["--overwrite"] if kind in ("train", "init", "sample", "noise-demo", "convert") else []
    return [*words, *shlex.split(SHORTER.get(kind, "")), *fresh]


@pytest.mark.parametrize("page", PAGES_WITH_LINES, ids=lambda page: page.name)
def test_every_command_line_runs(page: Path, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("DDPMCTL_DATA", str(tmp_path / "sets"))
    LAYOUTS["CIFAR10"][0](tmp_path / "sets", monkeypatch)
    shutil.copytree(workshop, tmp_path, dirs_exist_ok=True)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for line in command_lines(page):
        words = shlex.split(line)
        if words[0] == "python":
            subprocess.run([sys.executable, *words[1:]], check=True)
        elif words[0] not in KNOWN_ELSEWHERE and not any(word.startswith("hf:") for word in words):  # that takes a network
            assert words[0] == "ddpmctl", line
            words, target = (words[1:], None) if ">" not in words else (words[1 : words.index(">")], words[-1])
            if "--class" in words and "examples/fashion.zip" not in page.read_text("utf-8"):
                words[words.index("--class") + 1] = "cats"
            assert main(shortened(words)) == 0, line
            if target:
                Path(target).write_text("")


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in command_lines(page) if line.startswith("torchrun ")}, key=len))
def test_every_line_of_torchrun_runs_with_two_processes_of_this_machine(line: str, photos: Path) -> None:
    for there, here in {"--nproc-per-node 8": "--nproc-per-node 2", "--nnodes 2": "--nnodes 1", "first-machine:29500": "localhost:0"}.items():
        line = line.replace(there, here)
    words = shlex.split(re.sub(r"\S*photos\S*", shlex.quote(str(photos)), line))
    assert words[words.index("-m") + 1 :][:2] == ["ddpmctl", "train"]
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:], *shlex.split(SHORTER["train"]), "--out", "run", "--device", "cpu"]
    subprocess.run(command, check=True)
    assert read_run_file(Path("run/run.yaml")) and list(Path("run/checkpoints").glob("step-00000002.pt"))


def test_each_command_stands_on_the_pages() -> None:
    shown = {shlex.split(line)[1] for page in PAGES for line in command_lines(page) if line.startswith("ddpmctl ")}
    assert shown == {"train", "sample", "evaluate", "noise-demo", "inspect", "convert", "cache"}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.name)
def test_every_run_file_is_one(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(blocks(page, "yaml")):
        assert yaml.safe_load(text)
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        resolve(read_run_file(file))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_every_block_of_python_runs(page: Path, workshop: Path, tmp_path: Path) -> None:
    shutil.copytree(workshop, tmp_path, dirs_exist_ok=True)
    names: dict[str, object] = {}
    shutil.rmtree("runs/photos") if page.name == "README.md" else None  # it makes that itself
    for block in blocks(page, "python"):
        shorter = block.replace('size=64, steps="100k"', "size=16, steps=2, batch_size=2, base_channels=8, norm_groups=4, samples=4")
        exec(compile(shorter, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    made = {"tutorial.md": r"\.png$"}.get(page.name)  # by the build of the site, which looks for itself
    for link in re.findall(r"\]\(([^)#:\s]+)\)", page.read_text("utf-8")):
        assert (page.parent / link).exists() or (made and re.search(made, link)), link


def test_the_two_commands_are_targets_and_ci_calls_the_test_command() -> None:
    makefile = (ROOT / "Makefile").read_text()
    made = [line.split()[1] for line in command_lines(ROOT / "README.md") if line.startswith("make ")]
    assert "demo" in made and "test" in made
    for target in made:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


@pytest.mark.parametrize("code", ["2", "3", "4", "5", "6", "7", "8", "75", "130"])
def test_the_exit_codes_are_documented(code: str) -> None:
    assert re.search(rf"^\| {code} \|", README, re.MULTILINE)
