"""From what another tool's checkpoint says to what ours holds: settings first, then weights, each to the letter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpmctl import checkpoint, contents
from ddpmctl.build import build_net
from ddpmctl.config import RunConfig
from ddpmctl.errors import CheckpointError, ConfigError
from ddpmctl.parsing import size_text
from ddpmctl.runfile import Layer, check_size, resolve

Names = Mapping[str, Sequence[str]]
"""Our name of a tensor -> theirs; several are stacked along the first dimension."""

_LONGEST_LIST = 8

_OTHER = "ddpmctl has no such network; `ddpmctl convert --help` names what it reads"


class Loaded(NamedTuple):
    """A checkpoint in our terms: ``content`` as :func:`ddpmctl.checkpoint.load` gives it, and what is to be said of it."""

    format: str
    content: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """Settings that a file says, each with its place there, and those that it leaves open, with what is taken for them.

    ``aside``: what else it says, by its place, that is not known to us, nor to diffusers as far as we know.
    """

    says: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    aside: list[str] = field(default_factory=list)

    def say(self, key: str, value: Any, place: str) -> None:
        """``place`` says that the setting ``key`` is ``value``."""
        self.says[key], self.places[key] = value, place

    def settle(self, given: Layer, path: Path) -> RunConfig:
        """The configuration. Raises :class:`CheckpointError` for one that we cannot have, :class:`ConfigError` for the user's."""
        for key, value in given.values.items():
            if key in self.says and _shown(self.says[key]) != _shown(value):
                raise ConfigError(
                    f"{given.origins.get(key, key)}: {path} says that itself: {_shown(self.says[key])}", "leave it out"
                )
        try:
            config = resolve(Layer(self.assumed), given, Layer(self.says, self.places))
            if config.data.size != "auto":
                check_size(config, config.data.size)
        except ConfigError as error:
            if any(error.problem.startswith(place) for place in self.places.values()):
                raise CheckpointError(error.problem, _OTHER) from error
            if any(key not in self.says for key in given.values):
                raise
            raise CheckpointError(f"{path}: {error.problem}", f"with `ddpmctl convert`: {error.advice}") from error
        return config

    def notes(self, given: Layer) -> list[str]:
        """What was assumed, and what was left aside, a line each."""
        lines = [f"left aside, as not known: {', '.join(self.aside)[:400]}"] if self.aside else []
        open_ = {key: value for key, value in self.assumed.items() if key not in given.values and key not in self.says}
        if not open_:
            return lines
        told = ", ".join(f"{key} {_shown(value)}" for key, value in open_.items())
        return [*lines, f"not said by the file, and taken so: {told} (`ddpmctl convert` takes others with --set, or --size)"]


def imported(
    format: str,
    path: Path,
    settings: Settings,
    given: Layer,
    weights: Mapping[str, Mapping[str, Tensor]],
    names: Callable[[RunConfig, Iterable[str]], Names],
    *,
    file: Path | None = None,
    class_names: Sequence[str] = (),
    notes: Sequence[str] = (),
    source: Mapping[str, str] | None = None,
) -> Loaded:
    """A checkpoint out of ``weights``: prefix in ``file`` (None: ``path``) -> weights, the raw ones first, then the averaged.

    ``names`` makes :data:`Names` of the configuration and our names. ``notes`` are to be told, ``source`` is kept. Raises
    :class:`CheckpointError` with a list of what does not fit, and as :meth:`Settings.settle`.
    """
    config = settings.settle(given, path)
    assert config.data.channels != "auto" and config.data.size != "auto"
    with torch.device("meta"):
        net = build_net(config, config.data.channels, len(class_names))
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    theirs = names(config, shapes)
    fitted = [fit(shapes, theirs, state, file or path, prefix) for prefix, state in weights.items()]
    content = checkpoint.sealed({
        "config": config.to_dict(), "image_shape": [config.data.channels, *config.data.size], "class_names": list(class_names),
        "step": 0, "net": fitted[0], "ema": {"net": fitted[-1], "steps": 0},
        "source": {"format": format, "name": path.absolute().name, **(source or {})},
    })  # fmt: skip
    fault = contents.fault_of(content)
    if fault:
        raise CheckpointError(f"{path}: {fault}", _OTHER)
    return Loaded(format, content, (*settings.notes(given), *notes))


def weights_only(content: Mapping[str, Any], path: Path, weights: str | None = None) -> dict[str, Any]:
    """What a converted checkpoint keeps of ``content``, read from ``path``: no optimiser, no data, no averages but one.

    ``weights``: ema or raw, for both; None: each as it is.
    """
    net, ema = content["net"], content["ema"]
    if weights is not None:
        net = ema["net"] if weights == "ema" else net
        ema = {**ema, "net": net}
    kept = {key: content[key] for key in ("version", "config", "image_shape", "class_names", "step")}
    source = content.get("source") or {"format": "ddpmctl", "name": path.absolute().name}
    return {**kept, "net": net, "ema": ema, "source": source}


def fit(
    shapes: Mapping[str, torch.Size], names: Names, state: Mapping[str, Tensor], file: Path, prefix: str = ""
) -> dict[str, Tensor]:
    """``state`` under our names, in our shapes and of float32. Raises :class:`CheckpointError` with all that does not fit."""
    used = {their for ours in shapes for their in names[ours]}
    misfits = [f"{prefix}{name} (not known)" for name in sorted(state) if name not in used]
    for ours, shape in shapes.items():
        part = _part(shape, len(names[ours]))
        for name in names[ours]:
            if name not in state:
                misfits.append(f"{prefix}{name} (missing)")
            elif list(state[name].shape) not in (part, _linear(part)):
                misfits.append(f"{prefix}{name} ({_sides(state[name].shape)}, not {_sides(part)})")
    if misfits:
        more = f" and {len(misfits) - _LONGEST_LIST} more" if len(misfits) > _LONGEST_LIST else ""
        listed = ", ".join(misfit[:200] for misfit in misfits[:_LONGEST_LIST]) + more
        raise CheckpointError(f"{file}: {len(misfits)} of its tensors do not fit: {listed}", _OTHER)
    fitted = {}
    for ours, shape in shapes.items():
        parts = [state[name] for name in names[ours]]
        value = (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(shape).contiguous()
        fitted[ours] = value.float() if value.is_floating_point() else value
    return fitted


def _part(shape: Sequence[int], count: int) -> list[int]:
    """The shape of one of ``count`` tensors that are stacked to ``shape``."""
    return [shape[0] // count, *shape[1:]] if count > 1 else list(shape)


def _linear(shape: Sequence[int]) -> list[int]:
    """The shape of a linear layer that is a 1x1 convolution of ``shape``, or ``shape`` itself."""
    return list(shape[:2]) if len(shape) == 4 and list(shape[2:]) == [1, 1] else list(shape)


def _sides(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _shown(value: Any) -> str:
    return str(size_text(value) if isinstance(value, tuple) else value)
