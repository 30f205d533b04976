"""What the build of the documentation makes itself: the tutorial's pictures, by its own commands, and the reference pages.

Used by mkdocs (``hooks`` in mkdocs.yml). A command of the tutorial that fails, or a picture that it does not make, ends the build.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = {"benchmarks/RESULTS.md": "benchmarks.md", "benchmarks/RESULTS-avx2.md": "benchmarks-avx2.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that are made, not written."""
    made: dict[str, str | bytes] = {
        "index.md": moved((ROOT / "README.md").read_text("utf-8"), "docs/"),
        **{page: moved((ROOT / file).read_text("utf-8"), "../docs/") for file, page in BENCHMARKS.items()},
        "commands.md": commands(),
        "run-file.md": run_file(),
        **tutorial((ROOT / "docs" / "tutorial.md").read_text("utf-8")),
    }
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to files of the repository that are no pages become their names, and formulas what browsers draw by themselves."""
    if page.file.src_uri not in ("index.md", *BENCHMARKS.values()):
        markdown = re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"`\1`", markdown)
    markdown = re.sub(r"\\\[(.+?)\\\]", lambda found: f"<p>{convert(found[1], display='block')}</p>", markdown, flags=re.DOTALL)
    return re.sub(r"\\\((.+?)\\\)", lambda found: f"<span>{convert(found[1])}</span>", markdown, flags=re.DOTALL)


def moved(text: str, docs: str) -> str:
    """A page from elsewhere in the repository, with links as they are in ``docs``; those to other files are names only."""

    def link(found: re.Match[str]) -> str:
        image, title, target = found.groups()
        if "://" in target or target.startswith("#"):
            return found[0]
        if target.startswith(docs):
            return f"{image}[{title}]({target.removeprefix(docs)})"
        if f"benchmarks/{Path(target).name}" in BENCHMARKS:
            return f"[{title}]({BENCHMARKS[f'benchmarks/{Path(target).name}']})"
        return f"`{target}`" if title == target else title

    return re.sub(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", link, text)


def commands() -> str:
    """Every command and flag, as Typer writes them down."""
    done = run([sys.executable, "-m", "typer", "ddpmctl.cli", "utils", "docs", "--name", "ddpmctl", "--title", "Commands"], ROOT)
    # What stands in angle brackets is a word to the reader, and outside of code a tag to the browser.
    parts = done.split("`")
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


def run_file() -> str:
    """A table for each section of the run file, from the model that checks it."""
    from ddpmctl.config import RunConfig, Section

    tables = {"": RunConfig(), **{name: value for name, value in RunConfig() if isinstance(value, Section)}}
    text = "# Run file\n\nEvery key, its default and its meaning. `ddpmctl inspect --defaults` prints the same as a run file; a key is given\n"
    text += "on the command line by `--set section.key=value`.\n"
    for name, section in tables.items():
        about = RunConfig.model_fields[name].description if name else "at the top"
        text += f"\n## {name or 'Run'}: {about}\n\n| key | default | meaning |\n| --- | --- | --- |\n"
        for key, field in type(section).model_fields.items():
            value = getattr(section, key)
            if not isinstance(value, Section):
                shown = yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("\n...").strip()
                meaning = (field.description or "").replace("|", "\\|")
                text += f"| `{name + '.' if name else ''}{key}` | `{shown}` | {meaning} |\n"
    return text


def lines_of(text: str) -> list[str]:
    """The command lines of a page, in order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def tutorial(text: str) -> dict[str, bytes]:
    """The pictures of the tutorial, by its own commands, in the order of the page."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "examples").symlink_to(ROOT / "examples")
        for line in lines_of(text):
            print(f"docs: {line}", file=sys.stderr, flush=True)
            run(["bash", "-euo", "pipefail", "-c", line], folder)
        wanted = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing:
            raise PluginError(f"tutorial.md: its commands do not make {', '.join(missing)}")
        return {name: (folder / name).read_bytes() for name in wanted}


def run(command: list[str], folder: Path) -> str:
    """What ``command`` prints; the build ends where it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PluginError(f"{command[-1]}: ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout
