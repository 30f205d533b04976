"""A run folder: where a run keeps its settings, numbers, pictures and checkpoints.

::

    runs/NAME/run.yaml              the resolved configuration
    runs/NAME/metrics.csv           one row every log_every steps
    runs/NAME/loss.png              the loss curve (with the plot extra)
    runs/NAME/bad-images.csv        images that could not be read, if any
    runs/NAME/boards.json           what train.log has to remember of the boards that it logs to
    runs/NAME/events.out.tfevents.* with train.log: tensorboard
    runs/NAME/.saved                there once there was a checkpoint
    runs/NAME/.lock                 held by the process that trains; one that a dead process left means nothing
    runs/NAME/samples/step-*.png    grids from the same noise
    runs/NAME/averages/step-*.pt    snapshots for `sample --ema-length`, where the run takes them
    runs/NAME/checkpoints/best.pt   the one of the lowest KID, with train.evaluate_every
    runs/NAME/checkpoints/step-*.pt the newest ones; *.pt.aside: one that could not be read, or that a run went back from
"""

from __future__ import annotations

import csv
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddpmctl import checkpoint
from ddpmctl.checkpoint import step_of
from ddpmctl.errors import CheckpointError, OutputError
from ddpmctl.files import output_errors, replacing, there
from ddpmctl.lock import FolderLock
from ddpmctl.magic import is_pipeline
from ddpmctl.table import Table

_OURS = (
    "metrics.csv", "loss.png", "bad-images.csv", ".saved",
    "samples/step-*[0-9].png", "checkpoints/step-*[0-9].pt", "checkpoints/step-*.pt.aside", "checkpoints/best.pt",
    "averages/step-*[0-9].pt", "*/.ddpmctl-*.tmp", "boards.json", "events.out.tfevents.*",
)  # fmt: skip
"""What a run keeps, beside run.yaml: that stays, so that a folder half cleared is still known as a run."""


class RunFolder:
    """Paths of one run, and what is done to them.

    Nothing is written into a folder that was moved away, or replaced, while it was locked: see :meth:`ready`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_file = path / "run.yaml"
        self.loss_file = path / "loss.png"
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"
        self.averages = path / "averages"
        self.metrics = Table(path / "metrics.csv")
        self.best_file = self.checkpoints / "best.pt"
        self._lock = FolderLock(path)
        self._mark = path / ".saved"
        self._owed: int | None = None

    def exists(self) -> bool:
        """Whether there is anything under this name; a lock alone is nothing."""
        if not self.path.is_dir():
            return self.path.exists()
        return any(item != self._lock.file for item in self.path.iterdir())

    def lock(self) -> None:
        """Keep other processes from this folder until :meth:`unlock`; raises :class:`OutputError` where one has it."""
        self._lock.take()

    def unlock(self) -> None:
        """Let others have the folder."""
        self._lock.release()

    def lost(self) -> bool:
        """Whether the folder that was locked is no longer there: moved, deleted or replaced."""
        return self._lock.lost()

    def retake(self, step: int) -> None:
        """Lock a new folder in the place of a lost one, or this one anew where only its lock was deleted.

        Raises :class:`OutputError` where that is not possible, something else stands there now, or another process has
        come further in it than ``step``.
        """
        if self._lock.replaced() and self.exists():
            raise OutputError(f"{self.path}: something else stands in its place now", "move one of them away")
        further = [step_of(file) for file in self.checkpoint_files()] + [int(row["step"]) for row in self.metrics.read()]
        if max(further, default=0) > step:
            raise OutputError(f"{self.path}: another process has gone on with it", "stop one of them")
        self._lock.retake()
        self.metrics.wait(self.metrics.unwritten)

    def ready(self) -> None:
        """Raise :class:`OutputError` where nothing may be written: the folder is lost, or :meth:`rewind` failed again."""
        if self.lost():
            raise OutputError(f"{self.path}: moved away or deleted", "bring it back")
        if self._owed is not None:
            self._rewind(self._owed)
            self._owed = None

    def is_run(self) -> bool:
        """Whether ddpmctl made it."""
        return there(self.run_file)

    def create(self, settings: str) -> None:
        """Make the folder, with ``settings`` as its run.yaml; raises :class:`OutputError`.

        The settings come first: whatever fails after them, it is a run that can be taken up again or replaced.
        """
        self.write_text(self.run_file, settings)
        try:
            for folder in (self.path, self.samples, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.samples, self.checkpoints, self.averages):
                for left_by_a_crash in folder.glob(".ddpmctl-*.tmp"):
                    left_by_a_crash.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be made: {error.strerror}", "give another --out") from error

    def clear(self) -> None:
        """Remove what a run has made here, and nothing else. Raises :class:`OutputError` when it is no run folder."""
        if not self.is_run():
            raise OutputError(f"{self.path}: exists and is no run folder of ddpmctl", "give another --out")
        with output_errors(self.path):
            for item in [item for pattern in _OURS for item in self.path.glob(pattern)]:
                item.unlink(missing_ok=True)

    def write_text(self, file: Path, text: str) -> None:
        """Replace a text file in one step that a power cut does not undo. Raises :class:`OutputError`."""
        with output_errors(file), replacing(file, check=lambda _: None) as stream:
            stream.write(text.encode())

    def checkpoint_file(self, step: int) -> Path:
        """Where the checkpoint of ``step`` goes."""
        return self.checkpoints / f"step-{step:08d}.pt"

    def sample_file(self, step: int) -> Path:
        """Where the sample grid of ``step`` goes."""
        return self.samples / f"step-{step:08d}.png"

    def snapshot_file(self, step: int) -> Path:
        """Where the snapshot of averages of ``step`` goes."""
        return self.averages / f"step-{step:08d}.pt"

    def has_sample(self, step: int) -> bool:
        """Whether the sample grid of ``step`` is there."""
        return there(self.sample_file(step))

    def checkpoint_files(self) -> list[Path]:
        """Checkpoints, newest first."""
        with output_errors(self.checkpoints):
            return checkpoint.files_in(self.checkpoints)

    def newest_good(self, warn: Callable[[str], None], *, planned: bool = False) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that reads back whole; damaged ones are passed over with a word. None: there is none.

        ``planned``: rather one that was due than one that a stop of the run has added.
        """
        added = None
        for file in self.checkpoint_files():
            try:
                content = checkpoint.load(file)
            except CheckpointError as error:
                warn(f"{error.problem}: trying the one before")
                continue
            if not planned or content.get("planned", content["step"]) == content["step"]:
                return file, content
            added = added or (file, content)
        return added

    def best_kid(self) -> float:
        """The KID of the best checkpoint so far, one that the run went back from included; infinite where there is none."""
        if not there(self.best_file):
            return math.inf
        try:
            return float(checkpoint.load(self.best_file).get("kid", math.inf))
        except CheckpointError:
            return math.inf

    def has_saved(self) -> bool:
        """Whether there ever was a checkpoint."""
        return there(self._mark)

    def note_saved(self) -> None:
        """Remember that there was a checkpoint, so that a run without any is known to have lost them."""
        with suppress(OSError):
            self._mark.touch()

    def prune(self, keep: int, planned: int) -> None:
        """Delete all but the newest ``keep`` checkpoints and that of step ``planned``; raises :class:`OutputError`."""
        self.ready()
        with output_errors(self.checkpoints):
            for file in self.checkpoint_files()[keep:]:
                if file != self.checkpoint_file(planned):
                    file.unlink(missing_ok=True)

    def append_metrics(self, row: Mapping[str, object]) -> None:
        """Add a row to ``metrics.csv``; raises :class:`OutputError` when that fails, and it goes in with the next."""
        self.metrics.unwritten.append(row)
        self.flush_metrics()

    def flush_metrics(self, *, to_disk: bool = False) -> None:
        """Write rows that could not be written before; ``to_disk``: through a power cut. Raises as above."""
        self.ready()
        self.metrics.flush(to_disk=to_disk)

    def rewind(self, step: int, *, last_row: int) -> None:
        """Forget rows past ``last_row`` and pictures past ``step``: a run that goes on from there makes them again.

        Checkpoints past ``step`` are set aside under another name, never deleted: if they could not be read, the fault
        may lie with the reader (rights, memory, an older ddpmctl). Raises :class:`OutputError`; what could
        not be done is done before anything else is written.
        """
        self.metrics.forget(last_row)
        self._owed = step
        self.ready()
        self.metrics.cut()

    def _rewind(self, step: int) -> None:
        # Checkpoints first: whatever comes in between, a run goes on from the same one, and the rest follows from it.
        with output_errors(self.path):
            for file in self.checkpoint_files():
                if step_of(file) > step:
                    file.replace(file.with_name(f"{file.name}.aside"))
            for made in (*self.samples.glob("step-*.png"), *checkpoint.files_in(self.averages)):
                if step_of(made) > step:
                    made.unlink()

    def write_bad_images(self, bad: Sequence[tuple[str, str]]) -> None:
        """List images that were left out, with the reason; no list where there are none."""
        path = self.path / "bad-images.csv"
        with output_errors(path):
            path.unlink(missing_ok=True)
            if bad:
                with path.open("w", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerows([("file", "reason"), *bad])

    def bad_images(self) -> list[tuple[str, str]]:
        """What :meth:`write_bad_images` has listed, as far as it is there."""
        try:
            with (self.path / "bad-images.csv").open(newline="", encoding="utf-8") as file:
                return [(row[0], row[1]) for row in csv.reader(file) if len(row) == 2][1:]
        except (OSError, ValueError, csv.Error):
            return []


def run_of(path: Path) -> Path | None:
    """The run folder that ``path`` means: itself, or the one whose folder of checkpoints it is. None: neither."""
    folders = [path] if path.name != "checkpoints" else [path, path.parent]
    return next((folder for folder in folders if RunFolder(folder).is_run()), None)


def checkpoint_in(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest of a run folder or of a folder of checkpoints.

    A folder of diffusers is one itself.

    Raises :class:`CheckpointError` for a folder without any.
    """
    if not path.is_dir() or is_pipeline(path):
        return path
    files = RunFolder(path).checkpoint_files() or sorted(path.glob("step-*.pt"), key=step_of, reverse=True)
    if not files:
        run = run_of(path)
        what = "a run that has not saved a checkpoint yet" if run else "a folder without checkpoints"
        advice = "give a run folder that has trained, or a .pt file"
        if run:
            advice = f"go on with it: {shlex.join(['ddpmctl', 'train', '--resume', str(run)])}"
        raise CheckpointError(f"{path}: {what}", advice)
    return files[0]
