"""ddpmctl from Python: what the commands ``train`` and ``sample`` do, as functions. See ``docs/api.md``.

Everything a user can get wrong is a :class:`DdpmctlError`, which names flags as the command line has them. What the commands
print goes to the logger ``ddpmctl``: warnings are shown, the rest where the program asks for it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from ddpmctl import sampling
from ddpmctl.checks import check_choices, check_counts, check_ema_length
from ddpmctl.config import RunConfig
from ddpmctl.errors import ConfigError
from ddpmctl.events import Notice
from ddpmctl.images import to_pil, to_uint8
from ddpmctl.launch import Order, Voice, begin, launched, trained
from ddpmctl.parsing import parse_count, parse_device, parse_duration
from ddpmctl.plans import Recipe
from ddpmctl.run import Event
from ddpmctl.runfile import keyword_layer
from ddpmctl.runfolder import RunFolder
from ddpmctl.stopping import StopFlag

Place = str | Path
logger = logging.getLogger("ddpmctl")
_VOICE = Voice(logger.info, logger.warning)


def load(
    ckpt: Place, *, device: str = "auto", weights: Literal["ema", "raw"] = "ema", ema_length: float | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
) -> Model:  # fmt: skip
    """The model of a checkpoint, or of the newest one of a run folder, in any format that ``ddpmctl sample`` takes.

    ``weights``, ``ema_length`` and ``precision`` are its flags. Raises :class:`CheckpointError`, :class:`DeviceError` or
    :class:`ConfigError`.
    """
    check_choices({"--weights": (weights, ("ema", "raw")), "--precision": (precision, ("fp32", "bf16", "fp16"))})
    check_ema_length(ema_length, weights)
    try:
        parse_device(device)
    except ValueError as error:
        raise ConfigError(f"--device: {error}", "auto takes the best that is there") from error
    found = sampling.load_model(Path(ckpt), device, weights=weights, ema_length=ema_length, precision=precision)
    for text in found.notes:
        logger.info(text)
    for text in found.warnings():
        logger.warning(text)
    return Model(found)


class Model:
    """A trained model; :func:`load` makes one."""

    def __init__(self, loaded: sampling.Model) -> None:
        self._model = loaded

    def __repr__(self) -> str:
        channels, height, width = self.image_shape
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        return f"<ddpmctl.Model {self.path}: {channels}x{height}x{width}{classes}, step {self.step:,}, {self.device}>"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its images."""
        return self._model.image_shape

    @property
    def class_names(self) -> list[str]:
        """Names of its classes, in the order of their numbers; empty where it has none."""
        return list(self._model.class_names)

    @property
    def step(self) -> int:
        """The training step that it is of; 0 where that is not known."""
        return self._model.step

    @property
    def path(self) -> Path:
        """The file, or folder of diffusers, that it was loaded from."""
        return self._model.path

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._model.device

    @property
    def config(self) -> RunConfig:
        """The settings that it was trained with; ``config.to_dict()`` is plain."""
        return self._model.config

    def sample(
        self,
        n: int = 16,
        seed: int = 0,
        *,
        class_name: str | None = None,
        labels: Sequence[int] | None = None,
        quality: str | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        variance: str | None = None,
        threshold: str = "clip",
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        batch_size: int = 64,
    ) -> Tensor:
        """``n`` new images: float32 (N, C, H, W) in [-1, 1], on the CPU.

        They are those of ``ddpmctl sample`` with the same seed and flags, bit for bit once both are of 8 bits.
        ``class_name``: one class, or all in turn; ``labels``: in its place a number of a class for each image. All else as
        the flags of that name. Raises :class:`ConfigError` for what the model does not have.
        """
        check_counts({"-n": n, "--batch-size": batch_size})
        recipe = Recipe(quality, sampler, steps, spacing, eta, variance, threshold, guidance, guidance_interval)
        way = recipe.plan()
        options = sampling.sampler_options(way.sampler, recipe)
        model = self._model.by(recipe)
        way = model.fitted(way, recipe)
        numbers = model.labels_for(class_name, n) if labels is None else self._checked(labels, n, class_name)
        walk = sampling.generate(
            model.denoiser, model.image_shape, n, seed=_seed(seed), way=way, device=model.device, labels=numbers,
            batch_size=min(batch_size, n), options=options,
            on_smaller=lambda size: logger.warning(f"out of memory: going on with {size} images at once"),
        )  # fmt: skip
        images = torch.empty(n, *model.image_shape)
        for made, state in walk:
            if state.t == 0:
                images[made.start : made.stop] = state.x_t.float().clamp(-1, 1).cpu()
        return images

    def pictures(self, n: int = 16, seed: int = 0, **how: Any) -> list[Image.Image]:
        """What :meth:`sample` returns, as Pillow's images of 8 bits."""
        return [to_pil(image) for image in to_uint8(self.sample(n, seed, **how))]

    def _checked(self, labels: Sequence[int], n: int, class_name: str | None) -> list[int]:
        """``labels`` as plain numbers; raises :class:`ConfigError` where they are not ``n`` classes of the model."""
        numbers, classes = [int(label) for label in labels], len(self.class_names)
        if class_name is not None:
            raise ConfigError("labels: not with class_name", "leave one of the two out")
        if not classes:
            raise ConfigError(f"labels: {self.path} was trained without classes", "leave labels out")
        if len(numbers) != n:
            raise ConfigError(f"labels: {len(numbers)} of them for {n} images", "give one for each")
        if any(not 0 <= label < classes for label in numbers):
            raise ConfigError(f"labels: one is not 0 to {classes - 1}", "numbers of class_names")
        return numbers


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
    try:
        deadline = time.monotonic() + parse_duration(max_time) if max_time else None
    except ValueError as error:
        raise ConfigError(f"--max-time: {error}", "such as 3h50m") from error
    order = Order.of(
        _path(data), _path(out), _path(config), keyword_layer(settings), resume=resume, force=force, overwrite=overwrite
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


def _path(place: Place | None) -> Path | None:
    return None if place is None else Path(place)


def _number(text: str) -> float:
    return float(text) if text else math.nan


def _seed(seed: int) -> int:
    """``seed``, where the command would take it; raises :class:`ConfigError`."""
    try:
        return parse_count(seed)
    except ValueError as error:
        raise ConfigError(f"--seed: {error}", "give a whole number of at least 0") from error
