"""``metrics.csv``: rows that are written once, or wait until they can be."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ddpmctl.files import output_errors, replacing, sync_folder

COLUMNS = (
    "step", "epoch", "loss", "grad_norm", "lr", "skipped",
    "val_loss", "val_q1", "val_q2", "val_q3", "val_q4", "images_per_s",
)  # fmt: skip


class Table:
    """The file ``path``, and in ``unwritten`` the rows that could not be written to it yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unwritten: list[Mapping[str, object]] = []

    def flush(self, *, to_disk: bool = False) -> None:
        """Write what waits, with the header when the file is new; ``to_disk``: so that it outlives a power cut.

        Raises :class:`OutputError` when that fails; then the file is as before, and the rows wait on.
        """
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore")  # of another version, too
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
            self.unwritten.clear()

    def read(self) -> list[dict[str, str]]:
        """All whole rows; columns of another version of ddpmctl are left out or empty."""
        if not self.path.exists():
            return []
        with output_errors(self.path):
            text = self.path.read_text("utf-8", errors="replace")
        try:
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        except csv.Error:  # whatever it is now, it was no table
            return []
        return [
            {column: row.get(column) or "" for column in COLUMNS}
            for row in rows
            if None not in row and None not in row.values() and row.get("step", "").isdecimal() and row.get("loss")
        ]

    def wait(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Of ``rows``, which a checkpoint kept, those wait that have not been written since."""
        written = {int(row["step"]) for row in self.read()}
        self.unwritten = [row for row in rows if int(str(row["step"])) not in written]

    def forget(self, last: int) -> None:
        """Drop waiting rows past step ``last``."""
        self.unwritten = [row for row in self.unwritten if int(str(row["step"])) <= last]

    def cut(self, last: int) -> None:
        """Drop written rows past step ``last``. Raises as :meth:`flush`."""
        rows = [row for row in self.read() if int(row["step"]) <= last]
        if self.path.exists():
            lines = [",".join(COLUMNS), *(",".join(row.values()) for row in rows)]
            with output_errors(self.path), replacing(self.path, check=lambda _: None) as stream:
                stream.write(("\r\n".join(lines) + "\r\n").encode())
