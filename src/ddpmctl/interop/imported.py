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
from ddpmctl.rules import check_size, fitting_sizes
from ddpmctl.runfile import Layer, resolve

Names = Mapping[str, Sequence[str]]
"""Our name of a tensor -> theirs; several are stacked along the first dimension."""

_LONGEST_LIST = 8

_OTHER = "ddpmctl has no such network; `ddpmctl convert --help` names what it reads"


class Loaded(NamedTuple):
    """A checkpoint in our terms: ``content`` as :func:`ddpmctl.checkpoint.load` gives it, and what is to be said of it."""

    format: str
    content: dict[str, Any]
    notes: tuple[str, ...] = ()


class Wishes(Layer):
    """Settings that a user has made anyway: taken where the checkpoint leaves them open, and elsewhere not looked at."""


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

    def asked(self, given: Layer) -> Layer:
        """Of ``given`` what counts: all of it, or of :class:`Wishes` those that are open here."""
        if not isinstance(given, Wishes):
            return given
        return Layer({key: given.values[key] for key in self.assumed if given.values.get(key, "auto") != "auto"}, given.origins)

    def settle(self, given: Layer, path: Path) -> RunConfig:
        """The configuration. Raises :class:`CheckpointError` for one that we cannot have, :class:`ConfigError` for the user's."""
        for key, value in given.values.items():
            if key in self.says and _shown(self.says[key]) != _shown(value):
                raise ConfigError(
                    f"{given.origins.get(key, key)}: {path} says that itself: {_shown(self.says[key])}", "leave it out"
                )
        try:
            config = resolve(Layer(self.assumed), given, Layer(self.says, self.places))
        except ConfigError as error:
            if any(error.problem.startswith(place) for place in self.places.values()):
                raise CheckpointError(error.problem, _OTHER) from error
            if any(key not in self.says for key in given.values):
                raise
            raise CheckpointError(f"{path}: {error.problem}", f"with `ddpmctl convert`: {error.advice}") from error
        self._check_size(config, given, path)
        return config

    def _check_size(self, config: RunConfig, given: Layer, path: Path) -> None:
        """Raise for a size that the network cannot have, with one that it can."""
        assert config.data.size != "auto"
        try:
            check_size(config, config.data.size)
        except ConfigError as error:
            problem, sizes = error.problem.removeprefix("data.size: "), fitting_sizes(config, config.data.size)
            advice = f"--size {' or '.join(sizes)}" if sizes else "a larger --size"
            if "data.size" in given.values:
                raise ConfigError(f"{given.origins.get('data.size', 'data.size')}: {problem}", f"give {advice}") from error
            told = f"{self.places.get('data.size', path)}: {problem}"
            raise CheckpointError(told, f"`ddpmctl convert` and `train --init-from` take another: {advice}") from error

    def notes(self, given: Layer) -> list[str]:
        """What was assumed, and what was left aside, a line each."""
        lines = [f"left aside, as not known: {', '.join(self.aside)[:400]}"] if self.aside else []
        open_ = {key: value for key, value in self.assumed.items() if key not in given.values and key not in self.says}
        if not open_:
            return lines
        told = ", ".join(f"{key} {_shown(value)}" for key, value in open_.items())
        others = "`ddpmctl convert` and `train --init-from` take others with --set, or --size"
        return [*lines, f"not said by the file, and taken so: {told} ({others})"]


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
    given = settings.asked(given)
    config = settings.settle(given, path)
    assert config.data.channels != "auto" and config.data.size != "auto"
    with torch.device("meta"):
        net = build_net(config, config.data.channels, len(class_names))
    ours = net.state_dict()
    theirs = names(config, ours)
    fitted = [fit(ours, theirs, state, file or path, prefix) for prefix, state in weights.items()]
    content = checkpoint.sealed({
        "config": config.to_dict(), "image_shape": [config.data.channels, *config.data.size], "class_names": list(class_names),
        "step": 0, "net": fitted[0], "ema": {"net": fitted[-1], "steps": 0},
        "source": {"format": format, "name": path.absolute().name, **(source or {})},
    })  # fmt: skip
    fault = contents.fault_of(content)
    if fault:
        raise CheckpointError(f"{path}: {fault}", _OTHER)
    return Loaded(format, content, (*settings.notes(given), *_rounding(weights.values()), *notes))


def _rounding(states: Iterable[Mapping[str, Tensor]]) -> list[str]:
    """A line for each kind of weights that are not float32, which ours are."""
    kinds = {value.dtype for state in states for value in state.values() if value.is_floating_point()} - {torch.float32}
    of = sorted((str(kind).removeprefix("torch."), kind.itemsize) for kind in kinds)
    return [f"weights of {name} are {'rounded' if size > 4 else 'widened'} to float32" for name, size in of]


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
    ours: Mapping[str, Tensor], names: Names, state: Mapping[str, Tensor], file: Path, prefix: str = ""
) -> dict[str, Tensor]:
    """``state`` under our names, in the shapes of ``ours`` and of float32; counts, such as batches seen, stay whole numbers.

    Raises :class:`CheckpointError` with all that does not fit, by the names of the file.
    """
    used = {their for name in ours for their in names[name]}
    misfits = [f"{prefix}{name} (not known)" for name in sorted(state) if name not in used]
    for name, like in ours.items():
        part = _part(like.shape, len(names[name]))
        for their in names[name]:
            misfit = _misfit(state.get(their), part, like.dtype)
            misfits += [f"{prefix}{their} ({misfit})"] if misfit else []
    if misfits:
        more = f" and {len(misfits) - _LONGEST_LIST} more" if len(misfits) > _LONGEST_LIST else ""
        listed = ", ".join(misfit[:200] for misfit in misfits[:_LONGEST_LIST]) + more
        raise CheckpointError(f"{file}: {len(misfits)} of its tensors do not fit: {listed}", _OTHER)
    fitted = {}
    for name, like in ours.items():
        parts = [state[their] for their in names[name]]
        value = (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(like.shape).contiguous()
        fitted[name] = value.to(like.dtype)
    return fitted


def _misfit(value: Tensor | None, shape: list[int], kind: torch.dtype) -> str | None:
    """Why ``value`` does not fit, in a few words."""
    if value is None:
        return "missing"
    if list(value.shape) not in (shape, _linear(shape)):
        return f"{_sides(value.shape)}, not {_sides(shape)}"
    if value.dtype != kind and not (kind.is_floating_point and value.is_floating_point()):
        return f"{value.dtype}, not {kind}".replace("torch.", "")
    return None


def check_numbers(content: Mapping[str, Any], path: Path) -> None:
    """Raise :class:`CheckpointError` where weights of ``content``, read from ``path``, are no numbers."""
    for name, value in (*content["net"].items(), *content["ema"]["net"].items()):
        if not bool(value.isfinite().all()):
            raise CheckpointError(
                f"{path}: some of its weights are no numbers, or too large for float32: {name}", "use another checkpoint"
            )


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
