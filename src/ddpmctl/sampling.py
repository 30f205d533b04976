"""From a checkpoint to images: load a model, then walk its sampler batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddpmctl import averages, runfolder
from ddpmctl.build import (
    build_denoiser,
    build_net,
    place,
    precision_name,
    resolve_device,
    resolve_precision,
    round_once,
)
from ddpmctl.config import RunConfig
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.noise import ImageNoise
from ddpmctl.core.samplers import SAMPLERS, SampleStep
from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.core.spacing import spaced_timesteps
from ddpmctl.editing import FROM_NOISE, Course
from ddpmctl.errors import CheckpointError, ConfigError
from ddpmctl.interop import formats
from ddpmctl.memory import free_cached, out_of_memory
from ddpmctl.parsing import size_text
from ddpmctl.plans import Plan, Recipe
from ddpmctl.rows import nearest
from ddpmctl.rules import check_size
from ddpmctl.runfile import config_layer, resolve


@dataclass(frozen=True)
class Model:
    """A trained model, ready to sample. ``image_shape`` is (C, H, W); ``class_names`` is empty when unconditional.

    ``fingerprint``: that of the data set it was trained on, empty where that is not known. ``ema_error``: how far the profile
    of its average is from the one asked for, 0 to 1; ``left_out``: a line for each of its snapshots that could not be read.
    ``notes``: what is to be said of a checkpoint of another tool.
    """

    denoiser: Denoiser
    config: RunConfig
    image_shape: tuple[int, int, int]
    class_names: list[str]
    step: int
    digest: str
    path: Path
    device: torch.device
    fingerprint: str
    ema_error: float
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """What the network computes in: fp32, bf16 or fp16."""
        return precision_name(self.denoiser.autocast)

    def check_steps(self, steps: int | None) -> None:
        """Raise :class:`ConfigError` for more steps than the model has."""
        timesteps = self.denoiser.schedule.timesteps
        if steps is not None and steps > timesteps:
            raise ConfigError(f"--steps {steps}: the model has {timesteps}", f"give 1 to {timesteps}")

    def fitted(self, way: Plan, recipe: Recipe) -> Plan:
        """``way`` with its steps counted; raises :class:`ConfigError` where ``recipe`` asks for what the model does not have."""
        self.check_steps(recipe.steps)
        if recipe.variance == "learned" and not self.denoiser.learned_variance:
            raise ConfigError(
                f"--variance learned: {self.path} was trained without",
                "use beta or posterior, or train with --set diffusion.learn_variance=true",
            )
        return way._replace(steps=way.steps_of(self.denoiser.schedule.timesteps))

    def warnings(self) -> list[str]:
        """Where its average does without a snapshot, or is not quite of the length asked for."""
        rough = [f"the run's snapshots give such an average only roughly ({self.ema_error:.0%} off): `ddpmctl inspect` names those that it can have"]
        return [*self.left_out, *(rough if self.ema_error > averages.FAIR else [])]

    def by(self, recipe: Recipe) -> Model:
        """The same model with the threshold and the guidance of ``recipe``; raises :class:`ConfigError` as :func:`load_model`."""
        if recipe.guidance != 1:
            _check_guidance(recipe.guidance, self.config, self.class_names, self.path)
        assert isinstance(self.denoiser.net, torch.nn.Module)
        denoiser = build_denoiser(
            self.config, self.denoiser.net, self.denoiser.autocast,
            threshold=recipe.threshold, guidance=recipe.guidance, interval=recipe.interval,
        )  # fmt: skip
        return replace(self, denoiser=denoiser)

    def label_of(self, name: str) -> int:
        """Number of the class ``name``; raises :class:`ConfigError` when there is none."""
        if not self.class_names:
            raise ConfigError(f"--class {name}: {self.path} was trained without classes", "leave --class out")
        if name not in self.class_names:
            raise ConfigError(f"--class {name}: no such class{nearest(name, self.class_names)}",
                              f"classes: {', '.join(self.class_names)}, or all")  # fmt: skip
        return self.class_names.index(name)

    def labels_for(self, name: str | None, n: int) -> list[int] | None:
        """A class number for each of ``n`` images: that of ``name``, or with None or "all" each in turn.

        None where there are no classes. Raises as :meth:`label_of`.
        """
        if name is not None and (name != "all" or not self.class_names):
            return [self.label_of(name)] * n
        return [i % len(self.class_names) for i in range(n)] if self.class_names else None


def load_model(
    path: Path,
    device: str = "auto",
    *,
    weights: str = "ema",
    ema_length: float | None = None,
    threshold: str = "clip",
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    precision: str = "fp32",
) -> Model:
    """Load the network of a checkpoint in any of :data:`FORMATS`, or of the newest one of a run folder.

    ``weights``: ema or raw; ``ema_length``: in their place an average over that share of the training time.
    ``precision`` below fp32 is faster on some devices, but then the rounding of an image depends on its batch.
    Raises :class:`CheckpointError` or :class:`DeviceError`, or :class:`ConfigError` where ``guidance``, unless 1, is for
    a network that knows no classes, or has never been without.
    """
    file = runfolder.checkpoint_in(path)
    loaded = formats.load(file)
    content = loaded.content
    target = resolve_device(device)
    config = config_of(content, file)
    if guidance != 1:
        _check_guidance(guidance, config, content["class_names"], file)
    channels, height, width = content["image_shape"]
    net: torch.nn.Module = empty_net(content, config, file).to_empty(device="cpu")
    if ema_length is not None:
        built = averages.weights_of(ema_length, file, content, [name for name, _ in net.named_buffers()])
    else:
        built = averages.Built(content["ema"]["net"] if weights == "ema" else content["net"], 0.0, ())
    net.load_state_dict(built.weights, strict=True)
    autocast = resolve_precision(precision, target)
    net = round_once(place(net, target).eval().requires_grad_(False), autocast)
    denoiser = build_denoiser(config, net, autocast, threshold=threshold, guidance=guidance, interval=interval)
    return Model(denoiser, config, (channels, height, width), list(content["class_names"]), int(content["step"]),
                 str(content["digest"]), file, target, (content.get("data") or {}).get("fingerprint", ""), built.error, loaded.notes, built.left_out)  # fmt: skip


def _check_guidance(guidance: float, config: RunConfig, class_names: Sequence[str], file: Path) -> None:
    if not class_names:
        raise ConfigError(f"--guidance {guidance:g}: {file} was trained without classes", "leave --guidance out")
    if not config.model.label_dropout:
        raise ConfigError(
            f"--guidance {guidance:g}: {file} was trained with a label on every image",
            "leave --guidance out, or train with --set model.label_dropout=0.1",
        )


def config_of(content: dict[str, Any], path: Path) -> RunConfig:
    """The configuration that a checkpoint carries; raises :class:`CheckpointError` when it is none of ours."""
    try:
        return resolve(config_layer(content["config"], str(path)))
    except ConfigError as error:
        raise CheckpointError(error.problem, "made by another version of ddpmctl?") from error


def empty_net(content: dict[str, Any], config: RunConfig, path: Path) -> torch.nn.Module:
    """The network of a checkpoint, which takes no memory yet (device ``meta``).

    Raises :class:`CheckpointError` where weights or images do not fit it.
    """
    channels, height, width = content["image_shape"]
    with torch.device("meta"):
        net = build_net(config, channels, len(content["class_names"]))
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    for weights in (content["net"], content["ema"]["net"]):
        if {name: tensor.shape for name, tensor in weights.items()} != shapes:
            raise CheckpointError(f"{path}: its weights do not fit its configuration", "use another checkpoint")
    try:
        check_size(config, (height, width))
        if config.data.size not in ("auto", (height, width)):
            raise ConfigError(f"data.size: {size_text(config.data.size)}")
    except ConfigError as error:
        problem = f"{path}: images of {size_text((height, width))} do not fit its configuration: {error.problem}"
        raise CheckpointError(problem, "use another checkpoint") from error
    return net


class Generated(NamedTuple):
    """A step of one batch: the images' numbers within the whole sample and their :class:`SampleStep`."""

    images: range
    state: SampleStep


def sampler_options(sampler: str, recipe: Recipe) -> dict[str, Any]:
    """The options of ``recipe`` that are set; raises :class:`ConfigError` for one that the sampler does not take."""
    taken = inspect.signature(SAMPLERS[sampler]).parameters
    wanted = {name: value for name in ("eta", "variance") if (value := getattr(recipe, name)) is not None}
    for name in wanted:
        if name not in taken:
            others = [other for other, walk in SAMPLERS.items() if name in inspect.signature(walk).parameters]
            raise ConfigError(
                f"--{name}: the {sampler} sampler has no such option",
                f"leave --{name} out, or use --sampler {' or '.join(others)}",
            )
    return wanted


def levels(schedule: NoiseSchedule, way: Plan, course: Course = FROM_NOISE) -> list[int]:
    """The noise levels that a sample goes through: from T, or from where ``course`` begins, to 0."""
    return course.levels(spaced_timesteps(schedule, way.steps_of(schedule.timesteps), way.spacing))


def generate(
    denoiser: Denoiser,
    shape: tuple[int, int, int],
    n: int | range,
    *,
    seed: int,
    way: Plan,
    device: torch.device,
    course: Course = FROM_NOISE,
    labels: Sequence[int] | None = None,
    batch_size: int = 64,
    options: dict[str, Any] | None = None,
    on_smaller: Callable[[int], object] = lambda batch_size: None,
) -> Iterator[Generated]:
    """Make ``n`` images of ``shape`` (C, H, W), yielding after every step of every batch.

    ``n``: how many, or which of a larger sample: image i depends on (seed, i) alone. ``labels``: a class for each image of
    the whole. A batch is finished where ``state.t`` is 0.
    When memory runs out, the batch is begun again with half its images, and ``on_smaller`` is told how many they are;
    raises the device's own error when one image is too much.
    """
    grid = levels(denoiser.schedule, way, course)

    def walk(images: range) -> Iterator[Generated]:
        noise = ImageNoise(seed, images, shape, device)
        label = torch.tensor([labels[i] for i in images], device=device) if labels is not None else None
        x_t = course.first(denoiser.schedule, grid[0], images, noise)
        for state in course.walk(way.sampler, denoiser, x_t, grid, noise=noise, label=label, **(options or {})):
            yield Generated(images, state)

    asked = range(n) if isinstance(n, int) else n
    done = asked.start
    while done < asked.stop:
        images = range(done, min(done + batch_size, asked.stop))
        try:
            yield from walk(images)
            done = images.stop
            continue
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or len(images) == 1:
                raise
        batch_size = -(-len(images) // 2)
        free_cached(device.type)
        on_smaller(batch_size)
