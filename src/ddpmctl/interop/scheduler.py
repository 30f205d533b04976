"""The configuration of a diffusers scheduler as settings of ours, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpmctl.build import build_schedule
from ddpmctl.config import RunConfig
from ddpmctl.core.schedule import MAX_BETA, NoiseSchedule, cosine
from ddpmctl.errors import CheckpointError
from ddpmctl.interop.flags import SAMPLERS, VARIANCES, Flags, flags_of
from ddpmctl.interop.imported import Settings
from ddpmctl.interop.schedules import Named, named, same

_DEFAULTS: dict[str, Any] = {
    "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "rescale_betas_zero_snr": False, "variance_type": "fixed_small", "clip_sample": True,
    "clip_sample_range": 1.0, "thresholding": False,
}  # fmt: skip
"""What a key is where a file leaves it out."""

_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def settings_of(file: Path, found: Mapping[str, Any], settings: Settings, *, two_halves: bool) -> Flags:
    """Add what ``found``, read from ``file``, says to ``settings``; returns the flags with which ``sample`` does as it does.

    ``two_halves``: whether the network's output has a second half. Raises :class:`CheckpointError` that names the key
    of which we do not have the value.
    """
    theirs = {**_DEFAULTS, **found}
    if theirs["_class_name"] not in tuple(SAMPLERS):
        raise _no(file, theirs, "_class_name", "is not DDPMScheduler, or another of the same process")
    kind = theirs.get("prediction_type") or ("epsilon" if theirs.get("predict_epsilon", True) else "sample")
    if not isinstance(kind, str) or kind not in _PREDICTIONS:
        raise CheckpointError(f"{file}: prediction_type: {str(kind)[:100]} is none of {', '.join(_PREDICTIONS)}", "use diffusers for it")
    variance = VARIANCES.get(str(theirs["variance_type"] or "fixed_small"))
    if variance is None or two_halves != (variance == "learned"):
        raise _no(file, theirs, "variance_type", f"does not go with a network of {'two halves' if two_halves else 'one half'}")
    schedule = _schedule(file, theirs)
    for key, value, of in (
        ("diffusion.timesteps", theirs["num_train_timesteps"], "num_train_timesteps"),
        ("diffusion.schedule", schedule.name, "beta_schedule"),
        ("diffusion.shift", schedule.shift, "beta_schedule"),
        ("diffusion.zero_terminal_snr", schedule.zero_snr, "rescale_betas_zero_snr"),
        ("diffusion.prediction", _PREDICTIONS[kind], "prediction_type"),
        ("diffusion.learn_variance", two_halves, "variance_type"),
    ):
        settings.say(key, value, f"{file}: {of}")
    return flags_of(theirs)


def _schedule(file: Path, theirs: Mapping[str, Any]) -> Named:
    """Our schedule of the same alpha_bar."""
    timesteps = theirs["num_train_timesteps"]
    if type(timesteps) is not int or not 2 <= timesteps <= 100_000:
        raise _no(file, theirs, "num_train_timesteps", "is not a whole number from 2 to 100,000")
    betas = _trained(file, theirs) if theirs["trained_betas"] is not None else _betas(file, theirs)
    found = named(betas)
    if found is None:
        key = "trained_betas" if theirs["trained_betas"] is not None else "beta_schedule"
        kind, start, end = (theirs[name] for name in ("beta_schedule", "beta_start", "beta_end"))
        of = f"{len(betas)} numbers" if key == "trained_betas" else f"{kind}"
        ends = f" from beta_start {start} to beta_end {end}" if of != "squaredcos_cap_v2" and key != "trained_betas" else ""
        raise CheckpointError(
            f"{file}: {key}: {of}{ends} in {timesteps} steps is no schedule of ddpmctl",
            "linear is 1e-4 to 0.02, both times 1000 / T, and cosine squaredcos_cap_v2; use diffusers for others",
        )
    return found._replace(zero_snr=found.zero_snr or bool(theirs["rescale_betas_zero_snr"]))


def _betas(file: Path, theirs: Mapping[str, Any]) -> Tensor:
    """betas (T,) float64 as diffusers makes them in float32."""
    kind, steps = theirs["beta_schedule"], theirs["num_train_timesteps"]
    if kind == "squaredcos_cap_v2":
        return cosine(steps).clamp(max=MAX_BETA)
    for key in ("beta_start", "beta_end"):
        if type(theirs[key]) not in (int, float) or not 0 < theirs[key] <= 1:
            raise _no(file, theirs, key, "is not a number above 0 and up to 1")
    start, end = float(theirs["beta_start"]), float(theirs["beta_end"])
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if kind == "sigmoid":
        return torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (end - start) + start
    raise _no(file, theirs, "beta_schedule", "is not known")


def _trained(file: Path, theirs: Mapping[str, Any]) -> Tensor:
    betas = theirs["trained_betas"]
    numbers = isinstance(betas, list) and all(type(beta) in (int, float) and 0 < beta <= 1 for beta in betas)
    if not numbers or len(betas) != theirs["num_train_timesteps"]:
        raise CheckpointError(f"{file}: trained_betas: not num_train_timesteps numbers above 0 and up to 1", "mend the file")
    return torch.tensor(betas, dtype=torch.float64)


def _no(file: Path, theirs: Mapping[str, Any], key: str, why: str) -> CheckpointError:
    return CheckpointError(f"{file}: {key}: {str(theirs[key])[:100]} {why}", "use diffusers for it")


def config_of(config: RunConfig) -> dict[str, Any]:
    """The configuration of a ``DDPMScheduler`` with the process of ``config``; it samples as ``--sampler ddpm`` does here."""
    diffusion = config.diffusion
    back = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    return {
        **_DEFAULTS,
        "num_train_timesteps": diffusion.timesteps,
        **_betas_as_there(config),
        "rescale_betas_zero_snr": diffusion.zero_terminal_snr,
        "prediction_type": back[diffusion.prediction],
        "variance_type": "learned_range" if diffusion.learn_variance else "fixed_large",
    }


def _betas_as_there(config: RunConfig) -> dict[str, Any]:
    """By name where theirs has the schedule, else as a list; before the rescaling to zero SNR."""
    diffusion = config.diffusion
    plain = config.model_copy(update={"diffusion": diffusion.model_copy(update={"zero_terminal_snr": False})})
    ours, scale = build_schedule(plain), 1000 / diffusion.timesteps
    if diffusion.shift != 1:
        return {"trained_betas": ours.betas[1:].tolist()}
    if diffusion.schedule == "cosine":
        return {"beta_schedule": "squaredcos_cap_v2"}
    if diffusion.schedule == "linear" and 0.02 * scale < MAX_BETA:
        start, end = 1e-4 * scale, 0.02 * scale
        assert same(ours, NoiseSchedule(torch.linspace(start, end, diffusion.timesteps, dtype=torch.float64)))
        return {"beta_schedule": "linear", "beta_start": start, "beta_end": end}
    return {"trained_betas": ours.betas[1:].tolist()}
