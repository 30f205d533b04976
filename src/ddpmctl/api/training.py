"""Runs, and how they are trained."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpmctl.api.arguments import Place, as_arguments, logger, path_of
from ddpmctl.api.models import Model, load
from ddpmctl.errors import ConfigError
from ddpmctl.events import Notice
from ddpmctl.launch import Order, Voice, begin, launched, trained
from ddpmctl.parsing import parse_duration
from ddpmctl.run import Event
from ddpmctl.runfile import keyword_layer
from ddpmctl.runfolder import RunFolder
from ddpmctl.stopping import StopFlag

_VOICE = Voice(logger.info, logger.warning)


@dataclass(frozen=True)
class TrainedRun:
    """A run folder after training. ``stopped``: the signal or limit that ended it before its last step, None: nothing did."""

    folder: Path
    stopped: str | None = None

    @property
    def checkpoint(self) -> Path | None:
        """Its newest checkpoint; None where there is none yet."""
        return next(iter(RunFolder(self.folder).checkpoint_files()), None)

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The rows of ``metrics.csv``, as numbers; what was not measured is not a number."""
        rows = RunFolder(self.folder).metrics.read()
        return [{key: _number(value) for key, value in row.items()} for row in rows]

    def load(self, **how: Any) -> Model:
        """The model of its newest checkpoint; ``how`` as in :func:`load`."""
        return load(self.folder, **how)


def train(data: Place | None = None, /, **settings: Any) -> TrainedRun:
    """Train as ``ddpmctl train DATA`` does, to the end, and return the run.

    Arguments are those of :func:`train_events`. Ctrl-C (the square in a notebook) saves and returns what there is;
    ``stopped`` then says so.
    """
    walk = train_events(data, **settings)
    while True:
        try:
            event = next(walk)
        except StopIteration as end:
            found: TrainedRun = end.value
            return found
        if isinstance(event, Notice):
            logger.warning(event.text)


def train_events(
    data: Place | None = None,
    /,
    *,
    out: Place | None = None,
    config: Place | None = None,
    resume: bool = False,
    force: bool = False,
    overwrite: bool = False,
    max_time: str | None = None,
    **settings: Any,
) -> Generator[Event, None, TrainedRun]:
    """Train as ``ddpmctl train DATA`` does, yielding every step, picture, measurement and notice as it happens.

    ``settings``: keys of the run file, by name (``steps="100k"``, ``size=64``, ``base_channels=32``) or section by section
    (``model={"base_channels": 32}``); they count more than the run file ``config``. The rest are the flags of the command.
    A loop that is left early saves the step that it has come to. The value of the generator is a :class:`TrainedRun`.
    Raises the :class:`DdpmctlError` of whatever is wrong, before the first step where it can be known then.
    """
    with as_arguments():
        try:
            deadline = time.monotonic() + parse_duration(max_time) if max_time else None
        except ValueError as error:
            raise ConfigError(f"--max-time: {error}", "such as 3h50m") from error
        order = Order.of(
            path_of(data), path_of(out), path_of(config), keyword_layer(settings), resume=resume, force=force, overwrite=overwrite
        )
        with launched(order, _VOICE) as run:
            for text in run.dataset.report.warnings(
                size=run.dataset.size, channels=run.dataset.channels, fit=run.config.data.fit, batch_size=run.config.train.batch_size
            ):  # fmt: skip
                logger.warning(text)
            if run.finished():
                logger.info(f"nothing to do: the run has {run.state.step:,} steps")
                return TrainedRun(run.folder.path)
            begin(run, order, _VOICE)
            with StopFlag(deadline, "max_time", quiet=True) as stop:
                try:
                    yield from trained(run, stop.reason)
                except GeneratorExit:
                    for event in run.stop():
                        logger.info(event)
                    raise
            return TrainedRun(run.folder.path, None if run.finished() else stop.reason())


def _number(text: str) -> float:
    return float(text) if text else math.nan
