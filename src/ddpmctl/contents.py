"""What a checkpoint holds, part by part: a right digest tells only that it is what somebody wrote.

Which settings are right is left to :mod:`ddpmctl.runfile`, and whether weights fit their network to :mod:`ddpmctl.sampling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, InstanceOf, ValidationError, model_validator
from torch import Tensor

from ddpmctl.core.power import LONGEST
from ddpmctl.parsing import written

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def _numbers(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or not (tensor.is_floating_point() or tensor.dtype == torch.int64):
        raise ValueError(f"{tensor.layout} {tensor.dtype}")
    return tensor


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("a name comes twice")
    return names


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Scalars and flat lists of them, in sections."""
    for section in config.values():
        if isinstance(section, Mapping) and not all(isinstance(key, str) for key in section):
            raise ValueError("a key is not a word")
        for leaf in section.values() if isinstance(section, Mapping) else [section]:
            if not all(_is_scalar(item) for item in (leaf if isinstance(leaf, list | tuple) else [leaf])):
                raise ValueError("a value is neither a scalar nor a flat list")
    return config


def _row(row: dict[str, Any]) -> dict[str, Any]:
    step = row.get("step")
    if type(step) is not int or step < 0 or not all(_is_scalar(value) for value in row.values()):
        raise ValueError("not a row of metrics")
    return row


def _shape(shape: list[int]) -> list[int]:
    channels, *sides = shape
    if channels not in (1, 3, 4) or not all(1 <= side <= 4096 for side in sides):  # as parsing.parse_size has it
        raise ValueError("not channels, height and width")
    return shape


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


Count = Annotated[int, Field(ge=0, lt=2**63)]
Numbers = Annotated[InstanceOf[Tensor], AfterValidator(_numbers)]
Weights = dict[str, Numbers]


class _Part(BaseModel):
    """A part of a checkpoint. What is not named here is left alone: a later version may have put it there."""

    model_config = ConfigDict(strict=True)


class _Average(_Part):
    """A running average."""

    net: Weights
    steps: Count


class _Power(_Part):
    length: Annotated[float, Field(gt=0, le=LONGEST)]
    net: Weights


class Powers(_Part):
    """What a snapshot of averages holds."""

    powers: Annotated[list[_Power], Field(min_length=1)]


class _Data(_Part):
    images: Annotated[Count, Field(ge=1)]
    fingerprint: str


class _Moments(_Part):
    """What Adam and AdamW remember of one parameter."""

    step: Numbers
    exp_avg: Numbers
    exp_avg_sq: Numbers


class _Group(_Part):
    params: list[Count]


class _Optimizer(_Part):
    """As ``torch.optim.Optimizer.state_dict`` makes it: the parameters of all groups are numbered from 0."""

    state: dict[Count, _Moments]
    param_groups: list[_Group]

    @model_validator(mode="after")
    def _numbered(self) -> _Optimizer:
        numbers = [number for group in self.param_groups for number in group.params]
        if numbers != list(range(len(numbers))) or not self.state.keys() <= set(numbers):
            raise ValueError("its parameters are misnumbered")
        return self


class _Content(_Part):
    """The parts of a checkpoint; those with a default are missing in checkpoints of older versions.

    One that was converted has no ``optimizer`` and no ``data``, but tells its ``source``: it can be sampled, or begin a run.
    """

    version: str
    config: Annotated[dict[str, Any], AfterValidator(_settings)]
    image_shape: Annotated[list[int], Field(min_length=3, max_length=3), AfterValidator(_shape)]
    class_names: Annotated[list[str], AfterValidator(_distinct)]
    step: Count
    net: Weights
    ema: _Average
    optimizer: _Optimizer | None = None
    data: _Data | None = None
    source: dict[str, Annotated[str, Field(max_length=4096)]] | None = None
    powers: list[_Power] = []
    kid: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    scaler: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    rollbacks: Count = 0
    pardoned: Count = 0
    planned: Count = 0
    void_after: Count | None = None
    window: list[Annotated[list[float | bool], Field(min_length=4, max_length=4)]] = []
    bad_in_a_row: Count = 0
    unwritten: list[Annotated[dict[str, Any], AfterValidator(_row)]] = []

    @model_validator(mode="after")
    def _counts_fit(self) -> _Content:
        if self.planned > self.step or self.pardoned > self.rollbacks:
            raise ValueError("planned, step, pardoned and rollbacks do not fit each other")
        return self

    @model_validator(mode="after")
    def _moments_fit(self) -> _Content:
        """PyTorch takes moments of any shape, and fails at the first step."""
        if self.optimizer is None:
            return self
        shapes = [tensor.shape for name, tensor in self.net.items() if not name.endswith(_BUFFERS)]
        for number, moments in self.optimizer.state.items():
            shape = shapes[number] if number < len(shapes) else None
            if moments.exp_avg.shape != shape or moments.exp_avg_sq.shape != shape or moments.step.numel() != 1:
                raise ValueError("optimizer.state does not fit net")
        return self


def fault_of(content: Mapping[str, Any]) -> str | None:
    """What is strange about ``content``, in a few words, or None."""
    for part in ("optimizer", "data"):
        if (content.get(part) is None) != (content.get("source") is not None):
            return f"has no {part}" if content.get("source") is None else f"has {part}, though it was converted"
    try:
        _Content.model_validate(dict(content))
    except ValidationError as error:
        return _in_words(content, error)
    return None


def _in_words(content: Mapping[str, Any], error: ValidationError) -> str:
    """The first fault: the part that is missing, or its value and what that should not be."""
    first = error.errors(include_url=False, include_context=False)[0]
    path: list[str] = []
    value: Any = content
    for key in first["loc"]:
        there = key in value if isinstance(value, Mapping) else isinstance(value, list) and isinstance(key, int)
        if not there:  # the rest names no part, but the kind that pydantic tried
            break
        path.append(str(key))
        value = value[key]
    if first["type"] == "missing":
        return f"has no {'.'.join(map(str, first['loc']))}"
    reason = first["msg"].removeprefix("Value error, ") if first["type"] == "value_error" else _brief(value)
    return f"{'.'.join(path) or 'content'} is not what ddpmctl saves: {reason}"


def _brief(value: object) -> str:
    """A value, or what kind of thing it is."""
    items = value if isinstance(value, list) else [value]
    if len(items) < 10 and all(_is_scalar(item) for item in items):
        return written(value)
    return f"a {type(value).__name__.lower()}"
