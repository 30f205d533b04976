"""Every command line of the README runs, on the files that it names; training is cut to a few steps of a tiny network."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from ddpmctl.cli import main
from helpers import write_images

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")

SHORTER = {
    "train": "--steps 2 --batch-size 2 --size 16 --set model.base_channels=8 --set model.norm_groups=4 "
    "--set train.sample_steps=2 --set train.samples=4",
    "resume": "--steps 3",
    "sample": "--steps 3",
    "evaluate": "-n 8",
}


def command_lines() -> list[str]:
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_every_command_line_of_the_readme_runs(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    write_images(tmp_path / "photos")
    for name in ("cat.jpg", "dog.jpg", "mask.png"):
        Image.radial_gradient("L").convert("RGB").resize((48, 32)).save(tmp_path / name)
    ran = []
    for line in command_lines():
        words = shlex.split(line)
        if words[0] != "ddpmctl":
            continue
        words, _, target = (
            (words[1:], None, None) if ">" not in words else (words[1 : words.index(">")], ">", words[-1])
        )
        kind = "resume" if "--resume" in words else words[0]
        extra = [] if "--dry-run" in words and kind == "resume" else shlex.split(SHORTER.get(kind, ""))
        assert main([*words, *extra]) == 0, line
        if target:
            Path(target).write_text("")
        ran.append(words[0])
    assert set(ran) == {"train", "sample", "evaluate", "noise-demo", "inspect", "convert"} and len(ran) >= 8


def test_the_two_commands_are_targets_and_ci_calls_the_test_command() -> None:
    makefile = (ROOT / "Makefile").read_text()
    made = [line.split()[1] for line in command_lines() if line.startswith("make ")]
    assert "demo" in made and "test" in made
    for target in made:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


def test_every_file_that_the_readme_names_is_there() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("code", ["2", "3", "4", "5", "6", "7", "75", "130"])
def test_the_exit_codes_are_documented(code: str) -> None:
    assert re.search(rf"^\| {code} \|", README, re.MULTILINE)
