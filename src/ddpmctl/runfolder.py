"""A run folder: where a run keeps its settings, numbers, pictures and checkpoints.

::

    runs/NAME/run.yaml              the resolved configuration
    runs/NAME/metrics.csv           one row every log_every steps
    runs/NAME/loss.png              the loss curve (with the plot extra)
    runs/NAME/bad-images.csv        images that could not be read, if any
    runs/NAME/.lock                 held by the process that trains; one that a dead process left means nothing
    runs/NAME/samples/step-*.png    grids from the same noise
    runs/NAME/checkpoints/step-*.pt the newest ones
"""

from __future__ import annotations

import csv
import io
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ddpmctl import checkpoint
from ddpmctl.errors import CheckpointError, OutputError
from ddpmctl.files import output_errors, replacing, there

COLUMNS = (
    "step", "epoch", "loss", "grad_norm", "lr", "skipped",
    "val_loss", "val_q1", "val_q2", "val_q3", "val_q4", "images_per_s",
)  # fmt: skip
_OURS = ("metrics.csv", "loss.png", "bad-images.csv", "samples", "checkpoints", "run.yaml")
"""What a run keeps; run.yaml goes last, so that a folder half cleared is still known as a run."""


class RunFolder:
    """Paths of one run, and what is done to them.

    ``unwritten``: rows that could not be written to ``metrics.csv`` yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_file = path / "run.yaml"
        self.metrics_file = path / "metrics.csv"
        self.loss_file = path / "loss.png"
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"
        self._lock_file = path / ".lock"
        self._lock: FileLock | None = None
        self.unwritten: list[Mapping[str, object]] = []

    def exists(self) -> bool:
        """Whether there is anything under this name; a lock alone is nothing."""
        if not self.path.is_dir():
            return self.path.exists()
        return any(item != self._lock_file for item in self.path.iterdir())

    def lock(self) -> None:
        """Keep other processes from this folder until :meth:`unlock` or the end of this one, however it ends.

        Raises :class:`OutputError` when another process has it, or the folder cannot be made.
        """
        if self._lock is not None:
            return
        lock = FileLock(self._lock_file)
        with output_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
            except Timeout as error:
                raise OutputError(
                    f"{self.path}: another process is training in it", "wait until it ends, or give another --out"
                ) from error
        self._lock = lock

    def unlock(self) -> None:
        """Let others have the folder. The file stays: whoever deletes it could take a lock away from another."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def is_run(self) -> bool:
        """Whether ddpmctl made it."""
        return there(self.run_file)

    def create(self) -> None:
        """Make the folder; raises :class:`OutputError` when that is not possible."""
        try:
            for folder in (self.path, self.samples, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
                for left_by_a_crash in folder.glob(".ddpmctl-*.tmp"):
                    left_by_a_crash.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be made: {error.strerror}", "give another --out") from error

    def clear(self) -> None:
        """Remove what a run keeps here, and nothing else. Raises :class:`OutputError` when it is no run folder."""
        if not self.is_run():
            raise OutputError(f"{self.path}: exists and is no run folder of ddpmctl", "give another --out")
        with output_errors(self.path):
            for item in (self.path / name for name in _OURS):
                if item.is_dir() and not item.is_symlink():
                    shutil.rmtree(item)
                else:
                    item.unlink(missing_ok=True)

    def write_text(self, file: Path, text: str) -> None:
        """Replace a text file in one step that a power cut does not undo."""
        with output_errors(file), replacing(file, check=lambda _: None) as stream:
            stream.write(text.encode())

    def checkpoint_file(self, step: int) -> Path:
        """Where the checkpoint of ``step`` goes."""
        return self.checkpoints / f"step-{step:08d}.pt"

    def sample_file(self, step: int) -> Path:
        """Where the sample grid of ``step`` goes."""
        return self.samples / f"step-{step:08d}.png"

    def has_sample(self, step: int) -> bool:
        """Whether the sample grid of ``step`` is there."""
        return there(self.sample_file(step))

    def checkpoint_files(self) -> list[Path]:
        """Checkpoints, newest first."""
        ours = [file for file in self.checkpoints.glob("step-*.pt") if _step_of(file) >= 0]  # not step-5-best.pt
        return sorted(ours, key=_step_of, reverse=True)

    def newest_good(self, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that reads back whole; damaged ones are passed over with a word. None: there is none."""
        for file in self.checkpoint_files():
            try:
                return file, checkpoint.load(file)
            except CheckpointError as error:
                warn(f"{error.problem}: trying the one before")
        return None

    def prune(self, keep: int) -> None:
        """Delete all but the newest ``keep`` checkpoints; raises :class:`OutputError`."""
        with output_errors(self.checkpoints):
            for file in self.checkpoint_files()[keep:]:
                file.unlink(missing_ok=True)

    def append_metrics(self, row: Mapping[str, object]) -> None:
        """Add a row to ``metrics.csv``, with the header when it is new.

        Raises :class:`OutputError` when that fails; then the file is as before, and the row goes in with the next.
        """
        self.unwritten.append(row)
        self.flush_metrics()

    def flush_metrics(self, *, to_disk: bool = False) -> None:
        """Write rows that could not be written before; ``to_disk``: through a power cut. Raises as above."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore")  # of another version, too
        with output_errors(self.metrics_file), self.metrics_file.open("ab", buffering=0) as file:
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
            except OSError:
                file.truncate(before)
                raise
            self.unwritten.clear()

    def read_metrics(self) -> list[dict[str, str]]:
        """All whole rows of ``metrics.csv``."""
        if not self.metrics_file.exists():
            return []
        with output_errors(self.metrics_file):
            text = self.metrics_file.read_text("utf-8", errors="replace")
        try:
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        except csv.Error:  # whatever it is now, it was no table
            return []
        return [row for row in rows if tuple(row) == COLUMNS and None not in row.values() and row["step"].isdecimal()]

    def rewind(self, step: int, *, last_row: int) -> None:
        """Forget rows past ``last_row`` and pictures past ``step``: a resumed run makes them again.

        Checkpoints past ``step`` could not be read. They are set aside under another name, never deleted: the fault may
        lie with the reader (rights, memory, an older ddpmctl).
        """
        rows = [row for row in self.read_metrics() if int(row["step"]) <= last_row]
        written = {int(row["step"]) for row in rows}
        self.unwritten = [row for row in self.unwritten if int(str(row["step"])) <= last_row and row["step"] not in written]
        if self.metrics_file.exists():
            lines = [",".join(COLUMNS), *(",".join(row[c] for c in COLUMNS) for row in rows)]
            self.write_text(self.metrics_file, "\r\n".join(lines) + "\r\n")
        with output_errors(self.path):
            for picture in self.samples.glob("step-*.png"):
                if _step_of(picture) > step:
                    picture.unlink()
            for file in self.checkpoint_files():
                if _step_of(file) > step:
                    file.replace(file.with_name(f"{file.name}.unreadable"))

    def write_bad_images(self, bad: Sequence[tuple[str, str]]) -> None:
        """List images that were left out, with the reason; no list where there are none."""
        path = self.path / "bad-images.csv"
        with output_errors(path):
            path.unlink(missing_ok=True)
            if bad:
                with path.open("w", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerows([("file", "reason"), *bad])


def _step_of(file: Path) -> int:
    match = re.fullmatch(r"step-(\d+)", file.stem)
    return int(match[1]) if match else -1


def run_of(path: Path) -> Path | None:
    """The run folder that ``path`` means: itself, or the one whose folder of checkpoints it is. None: neither."""
    folders = [path] if path.name != "checkpoints" else [path, path.parent]
    return next((folder for folder in folders if RunFolder(folder).is_run()), None)


def checkpoint_in(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest of a run folder or of a folder of checkpoints.

    Raises :class:`CheckpointError` for a folder without any.
    """
    if not path.is_dir():
        return path
    files = RunFolder(path).checkpoint_files() or sorted(path.glob("step-*.pt"), key=_step_of, reverse=True)
    if not files:
        run = run_of(path)
        what = "a run that has not saved a checkpoint yet" if run else "a folder without checkpoints"
        advice = "give a run folder that has trained, or a .pt file"
        if run:
            advice = f"go on with it: {shlex.join(['ddpmctl', 'train', '--resume', str(run)])}"
        raise CheckpointError(f"{path}: {what}", advice)
    return files[0]
