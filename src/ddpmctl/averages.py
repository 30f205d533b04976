"""Snapshots of power-function averages, taken while training, and what is made of them afterwards.

They lie in ``RUN/averages/step-*.pt``, written and checked as checkpoints are; each checkpoint holds those of its step.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from ddpmctl import checkpoint
from ddpmctl.checkpoint import Kind, step_of
from ddpmctl.contents import Powers
from ddpmctl.core.power import LENGTHS, LONGEST, Profile, combine
from ddpmctl.errors import CheckpointError, ConfigError

FAIR = 0.1
"""Up to this error of its profile a length is said to be there."""

_CHOICES = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.18, 0.2, 0.22, 0.25, LONGEST)


def _fault_of(content: Mapping[str, Any]) -> str | None:
    try:
        Powers.model_validate(dict(content))
    except ValidationError:
        return "its content is not what ddpmctl saves"
    return None


_SNAPSHOT = Kind("ddpmctl snapshot of averages", _fault_of)


def save(path: Path, powers: Sequence[Mapping[str, Any]]) -> None:
    """Write the averages of one step, {"length", "net"} each; raises :class:`OutputError`."""
    checkpoint.save(path, {"powers": list(powers)}, _SNAPSHOT)


def lengths(path: Path, content: Mapping[str, Any]) -> list[float]:
    """Lengths that can be had at the step of the checkpoint ``content`` from ``path``.

    Snapshots that are cut short or no snapshots count as missing; weights in them that are damaged, :func:`weights_of` meets.
    """
    if not content.get("powers"):
        return []
    step = content["step"]
    good = [file for file in _snapshots(path, step) if checkpoint.seems_whole(file, _SNAPSHOT)]
    stored = [Profile(length, at) for at in (step, *map(step_of, good)) for length in LENGTHS]
    return [length for length in _CHOICES if combine(stored, Profile(length, step)).error <= FAIR]


class Built(NamedTuple):
    """Weights of an average, how far its profile is from the one wanted, 0 to 1, and a line for each snapshot left out."""

    weights: dict[str, Tensor]
    error: float
    left_out: tuple[str, ...]


def weights_of(length: float, path: Path, content: Mapping[str, Any], buffers: Collection[str]) -> Built:
    """Weights averaged over ``length`` at the step of the checkpoint ``content`` from ``path``.

    Those of the names ``buffers`` are no weights: they are of that step, as in every average (:class:`ddpmctl.core.ema.EMA`). Combined, the
    variances of batch norm could fall below 0.
    Snapshots that cannot be read are left out: the others nearly do without them. Raises :class:`ConfigError` for a
    length that no average has, and for a run that takes no snapshots, :class:`CheckpointError` for those of another network.
    """
    if not 0 < length <= LONGEST:
        raise ConfigError(f"--ema-length {length:g}: must be above 0, and at most {LONGEST}", "0.05 is short, 0.2 is long")
    if not content.get("powers"):
        raise ConfigError(
            f"--ema-length {length:g}: {path} was trained without snapshots of its averages",
            "leave --ema-length out, or train with --set train.ema_snapshot_every=500",
        )
    step, like = content["step"], content["ema"]["net"]
    stored, good, left_out = [Profile(power["length"], step) for power in content["powers"]], list[Path](), list[str]()
    for file in _snapshots(path, step):
        try:
            powers = _powers(file)
        except CheckpointError as fault:
            left_out.append(f"{fault.problem}: going on without it")
            continue
        if any(_shapes(power["net"]) != _shapes(like) for power in powers):
            raise CheckpointError(f"{file}: of another network than {path}", "move it out of the run")
        stored += [Profile(power["length"], step_of(file)) for power in powers]
        good.append(file)
    factors, error = combine(stored, Profile(length, step))
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in like.items()}
    # Read again, so that one file at a time is in memory.
    averages = itertools.chain(content["powers"], itertools.chain.from_iterable(map(_powers, good)))
    for factor, power in zip(factors.tolist(), averages, strict=True):
        for name, value in power["net"].items():
            total[name] += factor * value
    weights = {name: value if name in buffers else total[name].to(value.dtype) for name, value in like.items()}
    return Built(weights, error, tuple(left_out))


def _powers(file: Path) -> list[dict[str, Any]]:
    """The averages in a snapshot. Raises :class:`CheckpointError`."""
    powers: list[dict[str, Any]] = checkpoint.load(file, _SNAPSHOT)["powers"]
    return powers


def _shapes(net: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in net.items()}


def _snapshots(path: Path, before: int) -> list[Path]:
    """Those of the run that the checkpoint ``path`` lies in."""
    folder = path.absolute().parent.parent / "averages"
    return [file for file in checkpoint.files_in(folder) if step_of(file) < before]
