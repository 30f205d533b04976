"""``metrics.csv``: rows that are written once, or wait until they can be."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ddpmctl.errors import OutputError
from ddpmctl.files import output_errors, replacing, sync_folder

COLUMNS = (
    "step", "epoch", "loss", "grad_norm", "lr", "skipped",
    "val_loss", "val_q1", "val_q2", "val_q3", "val_q4", "images_per_s", "kid", "kid_spread",
)  # fmt: skip


class Table:
    """The file ``path``, and in ``unwritten`` the rows that could not be written to it yet.

    ``void_after``: rows in the file past that step count no more, and are taken out before the next is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unwritten: list[Mapping[str, object]] = []
        self.void_after: int | None = None
        self._unsure = False

    def flush(self, *, to_disk: bool = False) -> None:
        """Write what waits, with the header when the file is new; ``to_disk``: so that it outlives a power cut.

        Raises :class:`OutputError` when that fails; then the file is as before, and the rows wait on.
        """
        self.cut()
        if self._unsure:
            self.wait(self.unwritten)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore")  # of another version, too
        self._unsure = True  # what an error at the end, of a quota on a network, leaves in the file is not known
        with output_errors(self.path), self.path.open("ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            if not before:
                writer.writeheader()
            writer.writerows(self.unwritten)
            data = text.getvalue().encode()
            try:
                if file.write(data) < len(data):
                    raise OSError(0, "no space left")
                if to_disk:
                    os.fsync(file.fileno())
                    sync_folder(self.path.parent)
            except OSError:
                file.truncate(before)
                raise
        self.unwritten, self._unsure = [], False

    def read(self) -> list[dict[str, str]]:
        """All whole rows that count; columns of another version of ddpmctl are left out or empty."""
        if not self.path.exists():
            return []
        with output_errors(self.path):
            text = self.path.read_text("utf-8", errors="replace")
        names, *lines = [line.split(",") for line in re.split(r"[\r\n]+", text)]
        rows = [dict(zip(names, cells, strict=True)) for cells in lines if len(cells) == len(names)]
        return [
            {column: row.get(column, "") for column in COLUMNS}
            for row in rows
            if re.fullmatch(r"[0-9]{1,18}", row.get("step", "")) and row.get("loss") and self._counts(int(row["step"]))
        ]

    def _counts(self, step: int) -> bool:
        return self.void_after is None or step <= self.void_after

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the rows that wait, and which in the file are void."""
        return {"unwritten": [dict(row) for row in self.unwritten], "void_after": self.void_after}

    def restore(self, content: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`, of which parts may be missing."""
        self.void_after = content.get("void_after")
        self.wait(content.get("unwritten", []))

    def wait(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Of ``rows`` those wait that are not in the file."""
        try:
            written = {int(row["step"]) for row in self.read()}
        except OutputError:  # seen to before anything is written
            written, self._unsure = set(), True
        self.unwritten = [row for row in rows if int(str(row["step"])) not in written]

    def forget(self, last: int) -> None:
        """Rows past step ``last`` count no more, whether they wait or are written."""
        self.unwritten = [row for row in self.unwritten if int(str(row["step"])) <= last]
        self.void_after = last if self.void_after is None else min(last, self.void_after)

    def cut(self) -> None:
        """Take rows that count no more out of the file. Raises as :meth:`flush`."""
        if self.void_after is None:
            return
        if self.path.exists():
            lines = [",".join(COLUMNS), *(",".join(row.values()) for row in self.read())]
            with output_errors(self.path), replacing(self.path, check=lambda _: None) as stream:
                stream.write(("\r\n".join(lines) + "\r\n").encode())
        self.void_after = None
