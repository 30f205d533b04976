"""From a checkpoint to images: load a model, then walk its sampler batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddpmctl import checkpoint, runfolder
from ddpmctl.build import build_denoiser, build_net, place, precision_name, resolve_device, resolve_precision
from ddpmctl.config import RunConfig
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.noise import ImageNoise
from ddpmctl.core.samplers import SAMPLERS, SampleStep, spaced_timesteps
from ddpmctl.errors import CheckpointError, ConfigError
from ddpmctl.memory import free_cached, out_of_memory
from ddpmctl.parsing import size_text
from ddpmctl.rows import nearest
from ddpmctl.runfile import check_size, config_layer, resolve


@dataclass(frozen=True)
class Model:
    """A trained model, ready to sample. ``image_shape`` is (C, H, W); ``class_names`` is empty when unconditional."""

    denoiser: Denoiser
    config: RunConfig
    image_shape: tuple[int, int, int]
    class_names: list[str]
    step: int
    digest: str
    path: Path
    device: torch.device

    @property
    def precision(self) -> str:
        """What the network computes in: fp32, bf16 or fp16."""
        return precision_name(self.denoiser.autocast)

    def label_of(self, name: str) -> int:
        """Number of the class ``name``; raises :class:`ConfigError` when there is none."""
        if not self.class_names:
            raise ConfigError(f"--class {name}: {self.path} was trained without classes", "leave --class out")
        if name not in self.class_names:
            raise ConfigError(f"--class {name}: no such class{nearest(name, self.class_names)}",
                              f"classes: {', '.join(self.class_names)}, or all")  # fmt: skip
        return self.class_names.index(name)


def load_model(
    path: Path, device: str = "auto", *, weights: str = "ema", clip: bool = True, precision: str = "fp32"
) -> Model:
    """Load the network of a checkpoint, or of the newest one of a run folder.

    ``precision`` below fp32 is faster on some devices, but then the rounding of an image depends on its batch.
    Raises :class:`CheckpointError` or :class:`DeviceError`.
    """
    file = runfolder.checkpoint_in(path)
    content = checkpoint.load(file)
    target = resolve_device(device)
    config = config_of(content, file)
    channels, height, width = content["image_shape"]
    net: torch.nn.Module = empty_net(content, config, file).to_empty(device="cpu")
    net.load_state_dict(content["ema"]["net"] if weights == "ema" else content["net"], strict=True)
    net = place(net, target).eval().requires_grad_(False)
    denoiser = build_denoiser(config, net, resolve_precision(precision, target), clip=clip)
    return Model(denoiser, config, (channels, height, width), list(content["class_names"]), int(content["step"]),
                 str(content["digest"]), file, target)  # fmt: skip


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


def sampler_options(sampler: str, given: dict[str, Any]) -> dict[str, Any]:
    """Those of ``given`` that are set; raises :class:`ConfigError` for one that the sampler does not take."""
    taken = inspect.signature(SAMPLERS[sampler]).parameters
    wanted = {name: value for name, value in given.items() if value is not None}
    for name in wanted:
        if name not in taken:
            raise ConfigError(
                f"--{name}: the {sampler} sampler has no such option", f"leave --{name} out, or change --sampler"
            )
    return wanted


def default_steps(sampler: str, timesteps: int) -> int:
    """ddpm takes every step that it was trained with; the others need few."""
    return timesteps if sampler == "ddpm" else min(50, timesteps)


def generate(
    denoiser: Denoiser,
    shape: tuple[int, int, int],
    n: int,
    *,
    seed: int,
    sampler: str,
    steps: int,
    device: torch.device,
    labels: Sequence[int] | None = None,
    batch_size: int = 64,
    options: dict[str, Any] | None = None,
    on_smaller: Callable[[int], object] = lambda batch_size: None,
) -> Iterator[Generated]:
    """Make ``n`` images of ``shape`` (C, H, W), yielding after every step of every batch.

    Image i depends on (seed, i) alone. ``labels``: a class for each image. A batch is finished where ``state.t`` is 0.
    When memory runs out, the batch is begun again with half its images, and ``on_smaller`` is told how many they are;
    raises the device's own error when one image is too much.
    """
    grid = spaced_timesteps(denoiser.schedule.timesteps, steps)

    def walk(images: range) -> Iterator[Generated]:
        noise = ImageNoise(seed, images, shape, device)
        label = torch.tensor([labels[i] for i in images], device=device) if labels is not None else None
        for state in SAMPLERS[sampler](denoiser, noise(), grid, noise=noise, label=label, **(options or {})):
            yield Generated(images, state)

    start = 0
    while start < n:
        images = range(start, min(start + batch_size, n))
        try:
            yield from walk(images)
            start = images.stop
            continue
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or len(images) == 1:
                raise
        batch_size = -(-len(images) // 2)
        free_cached(device.type)
        on_smaller(batch_size)
