"""Boards: where a run's numbers and grids are shown beside those of other runs. They take the events of the run, as the bar does.

What a board fails of, a full disk or no network, ends no training: it is told once, and that board is left alone until the run
is resumed. A run that goes on, or back, goes on in the same board: see :class:`Board`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ddpmctl.checkpoint import step_of
from ddpmctl.errors import ConfigError
from ddpmctl.events import Back, Logged, Notice, Saved
from ddpmctl.files import replacing
from ddpmctl.run import Event, Run
from ddpmctl.runfile import config_layer, to_yaml

_MEMORY = "boards.json"
EVENTS = "events.out.tfevents.*"


class Board:
    """One board of a run. Made when the run begins or goes on, with ``past``: what it has kept of itself from the last time.

    ``sent`` and ``shown``: the last steps whose numbers and whose grid are there; what comes up to these is not sent again.
    So each step is there once, and a stretch that the run makes anew after it went back stands there as it was first.
    A board that can take back its past begins with -1 each time, and after the run went back: it is told all anew.
    """

    package = ""

    def __init__(self, run: Run, past: Mapping[str, Any]) -> None:
        """Raises whatever its package raises, as all that it does."""
        self.run = run
        self.sent, self.shown = int(past.get("sent", -1)), int(past.get("shown", -1))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a step."""

    def grid(self, step: int, file: Path) -> None:
        """A grid of samples, a PNG."""

    def kept(self) -> dict[str, Any]:
        """What to remember until the next time."""
        return {"sent": self.sent, "shown": self.shown}

    def back(self) -> None:
        """The run has gone back; a board that can forgets all that was sent."""

    def close(self) -> None:
        """No more is to come."""


class TensorBoard(Board):
    """An event file in the run folder itself, which opens in TensorBoard as it is: at any time what the folder holds, no more.

    Written by hand, for TensorBoard's own writer has a thread that prints what it fails of.
    """

    package = "tensorboard"

    def __init__(self, run: Run, past: Mapping[str, Any]) -> None:
        super().__init__(run, {})
        self._open()

    def _open(self) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import text

        folder = self.run.folder.path
        old = list(folder.glob(EVENTS))
        # TensorBoard goes on with the file of the next name, and at a start forgets what it has read so far.
        self._file = (folder / EVENTS.replace("*", f"{time.time():020.9f}.{os.getpid()}")).open("xb")
        self._records = RecordWriter(self._file)
        self._write(0, file_version="brain.Event:2")
        self._write(0, session_log=SessionLog(status=SessionLog.START))
        settings = "\n".join(f"    {line}" for line in to_yaml(self.run.config).splitlines())  # as code
        self._write(0, summary=text("settings", settings))  # type: ignore[no-untyped-call]
        for file in old:
            file.unlink(missing_ok=True)

    def _write(self, step: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record

        self._records.write(Record(wall_time=time.time(), step=step, **what).SerializeToString())
        self._file.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._write(step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]))

    def grid(self, step: int, file: Path) -> None:
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(file) as picture:
            width, height = picture.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.read_bytes())
        self._write(step, summary=Summary(value=[Summary.Value(tag="samples", image=image)]))

    def back(self) -> None:
        self.close()
        self._open()
        self.sent = self.shown = -1

    def kept(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._file.close()


class WandB(Board):
    """A run of Weights & Biases, whose own environment variables say where and how: WANDB_PROJECT, WANDB_MODE, ..."""

    package = "wandb"

    def __init__(self, run: Run, past: Mapping[str, Any]) -> None:
        import wandb

        super().__init__(run, past)
        self._board = wandb.init(
            dir=run.folder.path, config=run.config.to_dict(), allow_val_change=True, name=run.folder.path.resolve().name,
            id=past.get("id"), resume="allow", settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self._board.define_metric("step", hidden=True)
        self._board.define_metric("*", step_metric="step")  # its own counts what it was sent

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._board.log({"step": step, **values})

    def grid(self, step: int, file: Path) -> None:
        import wandb

        self._board.log({"step": step, "samples": wandb.Image(str(file))})

    def kept(self) -> dict[str, Any]:
        return {"id": self._board.id, **super().kept()}

    def close(self) -> None:
        self._board.finish()


class MLflow(Board):
    """A run of MLflow, whose own environment variables say where: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ..."""

    package = "mlflow"

    def __init__(self, run: Run, past: Mapping[str, Any]) -> None:
        import mlflow

        super().__init__(run, past)
        self._client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ddpmctl")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._id = past.get("id") or self._client.create_run(experiment, run_name=run.folder.path.resolve().name).info.run_id
        known = self._client.get_run(self._id).data.params
        for key, value in config_layer(run.config.to_dict(), "").values.items():
            if key not in known:  # what was said of a run cannot be changed there
                self._client.log_param(self._id, key, value)
        self._client.update_run(self._id, "RUNNING")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 10**6
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in values.items()])

    def grid(self, step: int, file: Path) -> None:
        self._client.log_artifact(self._id, str(file), "samples")

    def kept(self) -> dict[str, Any]:
        return {"id": self._id, **super().kept()}

    def close(self) -> None:
        self._client.set_terminated(self._id)


BOARDS: dict[str, type[Board]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}
"""The boards that a run can log to: ``train.log``."""


def check_boards(names: Iterable[str]) -> None:
    """Raise :class:`ConfigError` for a board whose package is not installed."""
    for name in names:
        if find_spec(BOARDS[name].package) is None:
            raise ConfigError(f"train.log: {name} needs the package {BOARDS[name].package}",
                              f"pip install 'ddpmctl[{name}]', or leave it out: --log none")  # fmt: skip


class Boards:
    """All boards of a run that is about to train, or to go on; :meth:`start` and :meth:`take` yield what goes wrong."""

    def __init__(self, run: Run) -> None:
        self.run, self._file = run, run.folder.path / _MEMORY
        self._memory = _read(self._file)
        self._open: dict[str, Board] = {}

    def start(self) -> Iterator[Notice]:
        """Open them, and send what they have missed."""
        for name in self.run.config.train.log:
            yield from self._trying(name, lambda name=name: self._begin(name))

    def take(self, event: Event) -> Iterator[Notice]:
        """An event of the run, for all boards."""
        if not self._open or not isinstance(event, Logged | Saved | Back):
            return
        if self.run.folder.lost():
            yield Notice(f"{', '.join(self._open)}: {self.run.folder.path} was moved away: going on without")
            self.close()
        for name, board in list(self._open.items()):
            yield from self._trying(name, lambda name=name, board=board: self._tell(name, board, event))

    def _tell(self, name: str, board: Board, event: Event) -> None:
        if isinstance(event, Logged):
            self._row(name, board, event.row)
        elif isinstance(event, Saved) and event.path.parent == self.run.folder.samples:
            self._grid(name, board, event.path)
        elif isinstance(event, Back):
            board.back()
            self._catch_up(name, board)

    def _begin(self, name: str) -> None:
        self._open[name] = board = BOARDS[name](self.run, self._memory.get(name, {}))
        self._remember(name, board)
        self._catch_up(name, board)

    def _catch_up(self, name: str, board: Board) -> None:
        """Tell it what the run folder holds."""
        folder = self.run.folder
        for row in (*folder.metrics.read(), *folder.metrics.unwritten):
            self._row(name, board, row)
        for file in sorted(folder.samples.glob("step-*[0-9].png"), key=step_of):
            self._grid(name, board, file)

    def _row(self, name: str, board: Board, row: Mapping[str, Any]) -> None:
        step = int(row["step"])
        if step > board.sent:
            board.scalars(step, {key: float(value) for key, value in row.items() if key != "step" and value not in ("", None)})
            board.sent = step
            self._remember(name, board)

    def _grid(self, name: str, board: Board, file: Path) -> None:
        step = step_of(file)
        if step > board.shown:
            board.grid(step, file)
            board.shown = step
            self._remember(name, board)

    def _remember(self, name: str, board: Board) -> None:
        if (kept := board.kept()) and self._memory.get(name) != kept:
            self._memory[name] = kept
            with replacing(self._file) as stream:
                stream.write(json.dumps(self._memory).encode())

    def _trying(self, name: str, act: Any) -> Iterator[Notice]:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - of whatever another's package fails, training goes on
            self._drop(name)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            yield Notice(f"{name}: {reason}: going on without it; it is tried again when the run is resumed")

    def _drop(self, name: str) -> None:
        board = self._open.pop(name, None)
        if board is not None:
            with suppress(Exception):
                board.close()

    def close(self) -> None:
        """No more is to come."""
        for name in list(self._open):
            self._drop(name)


def _read(file: Path) -> dict[str, Any]:
    """What was remembered; nothing where it cannot be read."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return {name: past for name, past in found.items() if isinstance(past, dict)} if isinstance(found, dict) else {}

