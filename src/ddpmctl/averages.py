"""Snapshots of power-function averages, taken while training, and what is made of them afterwards.

They lie in ``RUN/averages/step-*.pt``, written and checked as checkpoints are; each checkpoint holds those of its step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    """Lengths that can be had at the step of the checkpoint ``content`` from ``path``, going by the names of the snapshots."""
    if not content.get("powers"):
        return []
    step = content["step"]
    stored = [Profile(length, at) for at in (step, *map(step_of, _snapshots(path, step))) for length in LENGTHS]
    return [length for length in _CHOICES if combine(stored, Profile(length, step)).error <= FAIR]


def weights_of(length: float, path: Path, content: Mapping[str, Any]) -> tuple[dict[str, Tensor], float]:
    """Weights averaged over ``length`` at the step of the checkpoint ``content`` from ``path``; and the error of the profile.

    Raises :class:`ConfigError` for a length that no average has, and for a run that takes no snapshots,
    :class:`CheckpointError` for those of another network.
    """
    if not 0 < length <= LONGEST:
        raise ConfigError(f"--ema-length {length:g}: must be above 0, and at most {LONGEST}", "0.05 is short, 0.2 is long")
    if not content.get("powers"):
        raise ConfigError(
            f"--ema-length {length:g}: {path} was trained without snapshots of its averages",
            "leave --ema-length out, or train with --set train.ema_snapshot_every=500",
        )
    stored = [Profile(power["length"], step) for step, _, power in _powers(path, content)]
    factors, error = combine(stored, Profile(length, content["step"]))
    like = content["ema"]["net"]
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in like.items()}
    for factor, (_, file, power) in zip(factors.tolist(), _powers(path, content), strict=True):
        if {name: value.shape for name, value in power["net"].items()} != {n: v.shape for n, v in like.items()}:
            raise CheckpointError(f"{file}: of another network than {path}", "move it out of the run")
        for name, value in power["net"].items():
            total[name] += factor * value
    return {name: total[name].to(value.dtype) for name, value in like.items()}, error


def _powers(path: Path, content: Mapping[str, Any]) -> Iterator[tuple[int, Path, dict[str, Any]]]:
    """(step, file, average) in the checkpoint and in its run's snapshots before it, one file in memory at a time."""
    for power in content["powers"]:
        yield content["step"], path, power
    for file in _snapshots(path, content["step"]):
        try:
            powers = checkpoint.load(file, _SNAPSHOT)["powers"]
        except CheckpointError as error:
            raise CheckpointError(error.problem, "move it out of the run: the others nearly do without it") from error
        for power in powers:
            yield step_of(file), file, power


def _snapshots(path: Path, before: int) -> list[Path]:
    """Those of the run that the checkpoint ``path`` lies in."""
    folder = path.absolute().parent.parent / "averages"
    return [file for file in checkpoint.files_in(folder) if step_of(file) < before]
