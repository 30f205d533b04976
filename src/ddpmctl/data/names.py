"""Names of data sets, as they stand in place of a path: see :mod:`ddpmctl.data.named`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_FORMS = {
    "torchvision": re.compile(r"torchvision:(?P<name>[^:@]*)(:(?P<split>[^@]*))?(@(?P<root>.+))?", re.DOTALL),
    "hf": re.compile(r"hf:(?P<name>.*?)(:(?P<split>\w+(\[[\d:%]*\])?))?(?P<root>)", re.DOTALL),
}


class Named(NamedTuple):
    """What a name says: ``kind`` is torchvision or hf; ``split`` and ``root`` are "" where it does not say them."""

    kind: str
    name: str
    split: str
    root: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" + (f":{self.split}" if self.split else "") + (f"@{self.root}" if self.root else "")


def read_name(path: Path) -> Named | None:
    """What ``path`` says, where it is no path but the name of a data set; None where it is one."""
    text = str(path)
    for kind, form in _FORMS.items():
        if match := form.fullmatch(text):
            return Named(kind, match["name"], match["split"] or "", match["root"] or "")
    return None
