"""Names of data sets, as they stand in place of a path: see :mod:`ddpmctl.data.named`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

_FORMS = {
    "torchvision": re.compile(r"torchvision:(?P<name>[^:@]*)(:(?P<split>[^@]*))?(@(?P<root>.+))?", re.DOTALL),
    "hf": re.compile(r"hf:(?P<name>.*?)(:(?P<split>\w+(\[[\d:%]*\])?))?(?P<root>)", re.DOTALL),
    "shards": re.compile(r"shards:(?P<name>.*)(?P<split>)(?P<root>)", re.DOTALL),
}
ADDRESS = re.compile(r"\w{2,}:")
"""How what is no file begins."""

_SHARDS = (".tar", ".tar.gz", ".tgz")


class Address(type(Path())):  # type: ignore[misc]
    """A path that shows what was given, ``text``: of ``a//b`` a path makes ``a/b``, which is another place on a server."""

    text = ""

    def __str__(self) -> str:
        return self.text or super().__str__()

    def __reduce__(self) -> tuple[Any, ...]:
        return place_of, (str(self),)


def place_of(text: str | Path) -> Path:
    """``text`` as a path, whole where it holds an address."""
    if not re.search(r"(^|:)https?:/", str(text)):
        return Path(text)
    place = Address(text)
    place.text = str(text)
    return place


class Named(NamedTuple):
    """What a name says: ``kind`` is torchvision, hf or shards; ``split`` and ``root`` are "" where it does not say them."""

    kind: str
    name: str
    split: str
    root: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" + (f":{self.split}" if self.split else "") + (f"@{self.root}" if self.root else "")


def read_name(path: Path) -> Named | None:
    """What ``path`` says, where it is no path but the name of a data set, or means tar shards; None where it is one."""
    text = str(path)
    for kind, form in _FORMS.items():
        if match := form.fullmatch(text):
            return Named(kind, match["name"], match["split"] or "", match["root"] or "")
    return Named("shards", text, "", "") if _means_shards(path) else None


def read_shards(path: Path) -> str | None:
    """The pattern of tar shards that ``path`` means; None where it means something else."""
    found = read_name(path)
    return found.name if found and found.kind == "shards" else None


def patterns_of(text: str) -> list[str]:
    """What stands between ``::``, but for those in the host of an address, such as ``http://[::1]/a.tar``."""
    return re.split(r"::(?![^\[\]/]*\])", text)


def name_of_shards(pattern: str) -> str:
    """A name for what ``pattern`` means: ``x/train-{000..099}.tar`` is train, ``x/*.tar`` is x."""
    place = Path(pattern.partition("?")[0] if ADDRESS.match(pattern) else pattern)
    stem = re.split(r"[{*?\[]", place.name)[0]
    for ending in _SHARDS:
        stem = stem.removesuffix(ending)
    return stem.strip("-_. ") or re.split(r"[{*?\[]", place.parent.name)[0] or "shards"


def _means_shards(path: Path) -> bool:
    """Whether it is a tar, a pattern of them, an address, or a folder that holds tars, and neither images nor folders."""
    text = str(path)
    if re.match(r"(https?|pipe):", text):
        return True
    try:
        if path.is_dir():
            return _holds_shards(path)
        if not text.endswith(_SHARDS):
            return False
        if not path.is_file():
            return True
        with path.open("rb") as file:
            head = file.read(262)
        return head[257:] == b"ustar" or head[:2] == b"\x1f\x8b"  # old checkpoints of PyTorch are called .tar, too
    except OSError:
        return False


def _holds_shards(folder: Path) -> bool:
    from ddpmctl.data.formats import EXTENSIONS  # all of Pillow, which other names do without

    images, found = EXTENSIONS | {".zip"}, False
    with os.scandir(folder) as entries:
        for entry in entries:  # a folder of a million images is known by the first
            if Path(entry.name.lower()).suffix in images or (entry.is_dir() and not entry.name.startswith(".")):
                return False
            found = found or entry.name.endswith(".tar")
    return found
