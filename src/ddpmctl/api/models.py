"""Models, and what they draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from ddpmctl import sampling
from ddpmctl.api.arguments import Place, as_arguments, logger, path_of, seed_of
from ddpmctl.checks import check_choices, check_counts, check_ema_length
from ddpmctl.config import RunConfig
from ddpmctl.errors import ConfigError
from ddpmctl.images import to_pil, to_uint8
from ddpmctl.parsing import parse_device
from ddpmctl.plans import Recipe
from ddpmctl.starting import beginning

IMAGES = 16
"""How many :meth:`Model.sample` makes where it is not told."""


@as_arguments()
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
    found = sampling.load_model(Path(ckpt), device_of(device), weights=weights, ema_length=ema_length, precision=precision)
    tell(found)
    return Model(found)


def device_of(name: str) -> str:
    """``name``, where it is one of a device; raises :class:`ConfigError`."""
    try:
        return parse_device(name)
    except ValueError as error:
        raise ConfigError(f"--device: {error}", "auto takes the best that is there") from error


def tell(model: sampling.Model) -> None:
    """Log what is to be said of a model before it is used."""
    for text in model.notes:
        logger.info(text)
    for text in model.warnings():
        logger.warning(text)


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

    @as_arguments()
    def sample(
        self,
        n: int | None = None,
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
        init: Place | None = None,
        strength: float | None = None,
        inpaint: Place | None = None,
        mask: Place | None = None,
        resample: int | None = None,
        interpolate: tuple[Place, Place] | None = None,
        frames: int | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """``n`` new images, 16 unless said: float32 (N, C, H, W) in [-1, 1], on the CPU.

        They are those of ``ddpmctl sample`` with the same seed and flags, bit for bit once both are of 8 bits.
        ``class_name``: one class, or all in turn; ``labels``: in its place a number of a class for each image. ``init``,
        ``inpaint`` with ``mask``, and ``interpolate``, of which there are ``frames`` images: files of pictures to begin with.
        All else as the flags of that name. Raises :class:`ConfigError` for what does not go together, or what the model does
        not have, and :class:`DataError` for a picture that cannot be read.
        """
        check_counts({"--batch-size": batch_size})
        recipe = Recipe(quality, sampler, steps, spacing, eta, variance, threshold, guidance, guidance_interval)
        begun = beginning(
            IMAGES if n is None and interpolate is None else n, init=path_of(init), strength=strength, inpaint=path_of(inpaint),
            mask=path_of(mask), resample=resample, interpolate=_pair(interpolate), frames=frames,
        )  # fmt: skip
        way, n = recipe.plan(begun.rows), begun.n
        begun.check(way, quality, eta)
        options = sampling.sampler_options(way.sampler, recipe)
        model = self._model.by(recipe)
        way = model.fitted(way, recipe)
        numbers = model.labels_for(class_name, n) if labels is None else self._checked(labels, n, class_name)
        course = begun.course(model, numbers, logger.warning)
        levels = sampling.levels(model.denoiser.schedule, way, course)
        course = begun.ready(course, model, levels, numbers, lambda done, total: None)
        walk = sampling.generate(
            model.denoiser, model.image_shape, n, seed=seed_of(seed), way=way, device=model.device, course=course, labels=numbers,
            batch_size=min(batch_size, n), options=options,
            on_smaller=lambda size: logger.warning(f"out of memory: going on with {size} images at once"),
        )  # fmt: skip
        images = torch.empty(n, *model.image_shape)
        for made, state in walk:
            if state.t == 0:
                images[made.start : made.stop] = state.x_t.float().clamp(-1, 1).cpu()
        return images

    def pictures(self, n: int | None = None, seed: int = 0, **how: Any) -> list[Image.Image]:
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


def _pair(places: tuple[Place, Place] | None) -> tuple[Path, Path] | None:
    """The two pictures of ``places``; raises :class:`ConfigError` where they are not two."""
    if places is None:
        return None
    if isinstance(places, str | Path) or len(places) != 2:
        raise ConfigError(f"--interpolate: {places!r} is not two pictures", 'such as interpolate=("a.png", "b.png")')
    return Path(places[0]), Path(places[1])
