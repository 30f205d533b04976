"""Checkpoints of the predecessor: the state_dict of its diffusion module, from whose names and shapes its network follows.

``model.*`` are the raw weights, ``ema_model.*`` the averaged ones, and the rest are tables of the schedule. Not to be read
off: groups of the norms (or that they are instance norms, whose weights look the same), the scale of time, the activation,
padding, and the size of the images.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ddpmctl.errors import CheckpointError
from ddpmctl.interop.imported import Loaded, Settings, imported
from ddpmctl.interop.naming import predecessor_names
from ddpmctl.interop.schedules import named
from ddpmctl.interop.source import Source, is_state
from ddpmctl.runfile import Layer

_RAW, _EMA = "model.", "ema_model."
_TABLES = {"betas", "alphas", "alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "reciprocal_sqrt_alphas",
           "remove_noise_coeff", "sigma"}  # fmt: skip


class _Level(NamedTuple):
    width: int
    blocks: int
    attention: bool


def read(source: Source, given: Layer) -> Loaded | None:
    """The checkpoint in our terms; None for what is none of the predecessor's.

    Raises :class:`CheckpointError` for a network or schedule that we do not have, with a list of what does not fit.
    """
    path, state = source.path, source.torch
    if not is_state(state) or "betas" not in state or f"{_RAW}init_conv.weight" not in state:
        return None
    raw = {name.removeprefix(_RAW): value for name, value in state.items() if name.startswith(_RAW)}
    ema = {name.removeprefix(_EMA): value for name, value in state.items() if name.startswith(_EMA)}
    strange = [name for name in state if not name.startswith((_RAW, _EMA)) and name not in _TABLES]
    if strange:
        raise _no(path, f"{', '.join(strange[:8])[:400]}: not known of the predecessor")
    settings = Settings()
    classes = _network(path, raw, settings)
    _process(path, state["betas"], settings)
    settings.say("data.conditional", classes > 0, f"{path}: {_RAW}downs.0.class_bias.weight")
    settings.assumed["data.size"] = (64, 64)
    return imported(
        "predecessor", path, settings, given, {_RAW: raw, _EMA: ema}, lambda config, ours: predecessor_names(ours),
        class_names=[str(number) for number in range(classes)],
        notes=[f"its {classes} classes have no names there, and are called 0 to {classes - 1}"] if classes else [],
        source={"sampled there": "--sampler ddpm --variance beta --threshold none"},
    )  # fmt: skip


def _network(path: Path, raw: Mapping[str, Tensor], settings: Settings) -> int:
    """What names and shapes say of the network, into ``settings``; returns how many classes it knows."""
    base, channels = _shape(path, raw, "init_conv.weight", 4)[:2]
    levels = _levels(path, raw)
    widths, counts = [level.width for level in levels], [level.blocks for level in levels]
    if any(width % base for width in widths):
        raise _no(path, f"{_RAW}downs: levels of {widths} channels, not all whole multiples of the {base} of init_conv")
    time = _shape(path, raw, "time_mlp.1.weight", 2)[0] if "time_mlp.1.weight" in raw else "none"
    for key, value, of in (
        ("data.channels", channels, "init_conv.weight"),
        ("model.base_channels", base, "init_conv.weight"),
        ("model.channel_mults", [width // base for width in widths], "downs"),
        ("model.num_res_blocks", counts[0] if len(set(counts)) == 1 else counts, "downs"),
        ("model.attention_levels", [number for number, level in enumerate(levels) if level.attention], "downs"),
        ("model.middle_attention", "mid.0.attention.to_qkv.weight" in raw, "mid.0.attention"),
        ("model.time_embedding", time, "time_mlp"),
        ("model.head_channels", "all", "mid.0.attention"),
        ("model.qk_norm", False, "mid.0.attention"),
        ("model.norm_eps", 1e-5, "out_norm"),
        ("model.time_order", "sin_cos", "time_mlp"),
        ("model.time_shift", 0.0, "time_mlp"),
        ("model.down_padding", "symmetric", "downs"),
        ("model.patch", 1, "init_conv.weight"),
        ("model.label_dropout", 0.0, "downs.0.class_bias"),
    ):
        settings.say(key, value, f"{path}: {_RAW}{of}")
    if "out_norm.running_mean" in raw or "out_norm.weight" not in raw:
        settings.say("model.norm", "batch" if "out_norm.running_mean" in raw else "none", f"{path}: {_RAW}out_norm")
    else:
        settings.assumed.update({"model.norm": "group", "model.norm_groups": math.gcd(32, base, *widths)})
    settings.assumed.update({"model.activation": "silu", "model.padding": 0})
    if time != "none":
        settings.assumed["model.time_scale"] = 1.0
    first = next((name for name in raw if name.endswith(".class_bias.weight")), None)
    return _shape(path, raw, first, 2)[0] if first else 0


def _levels(path: Path, raw: Mapping[str, Tensor]) -> list[_Level]:
    """Width, residual blocks and attention of each level, going down."""
    count = 1 + max((int(match[1]) for name in raw if (match := re.match(r"downs\.(\d{1,4})\.", name))), default=-1)
    levels: list[_Level] = []
    width, blocks, attention = 0, 0, False
    for number in range(count):
        if f"downs.{number}.downsample.weight" in raw:
            levels.append(_Level(width, blocks, attention))
            blocks, attention = 0, False
            continue
        width = _shape(path, raw, f"downs.{number}.conv_1.weight", 4)[0]
        blocks += 1
        attention |= f"downs.{number}.attention.to_qkv.weight" in raw
    return [*levels, _Level(width, blocks, attention)]


def _process(path: Path, betas: Tensor, settings: Settings) -> None:
    found = named(betas.double()) if betas.ndim == 1 and 2 <= len(betas) <= 100_000 and betas.is_floating_point() else None
    if found is None:
        raise _no(path, "betas: neither linear nor cosine as ddpmctl has them")
    for key, value in (
        ("diffusion.timesteps", len(betas)), ("diffusion.schedule", found.name), ("diffusion.shift", found.shift),
        ("diffusion.zero_terminal_snr", found.zero_snr),
        ("diffusion.prediction", "eps"), ("diffusion.learn_variance", False),
    ):  # fmt: skip
        settings.say(key, value, f"{path}: betas")


def _shape(path: Path, raw: Mapping[str, Tensor], name: str, dims: int) -> list[int]:
    if name not in raw or raw[name].ndim != dims or 0 in raw[name].shape:
        raise _no(path, f"{_RAW}{name}: {'missing' if name not in raw else 'of another kind'}")
    return list(raw[name].shape)


def _no(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: {problem}", "ddpmctl has no such network; sample it where it was trained")
