"""Rules between settings: which of them go together, and with what size of images."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ddpmctl.config import RunConfig
from ddpmctl.errors import ConfigError
from ddpmctl.parsing import size_text


def check_together(config: RunConfig, origins: Mapping[str, str]) -> None:
    """Raise :class:`ConfigError` for keys that do not go together; ``origins``: dotted key -> where it was given."""
    _check_model(config, origins)
    _check_diffusion(config, origins)


def _check_model(config: RunConfig, origins: Mapping[str, str]) -> None:
    """Rules between keys of ``model`` and others."""
    model, train = config.model, config.train

    def place(key: str) -> str:
        return origins.get(key, key)

    levels = len(model.channel_mults)
    if any(level >= levels for level in model.attention_levels):
        raise ConfigError(
            f"{place('model.attention_levels')}: {model.attention_levels} names a level that is not there",
            f"channel_mults gives levels 0 to {levels - 1}",
        )
    if isinstance(model.num_res_blocks, list) and len(model.num_res_blocks) != levels:
        raise ConfigError(
            f"{place('model.num_res_blocks')}: {model.num_res_blocks} is for {len(model.num_res_blocks)} levels",
            f"channel_mults gives {levels}: list as many, or give one number for all",
        )
    if model.base_channels % 2:
        raise ConfigError(f"{place('model.base_channels')}: {model.base_channels} is odd", "give an even number")
    if model.label_dropout and not config.data.conditional:
        raise ConfigError(
            f"{place('model.label_dropout')}: there are no labels to hide", "set model.label_dropout=0, or data.conditional=true"
        )
    widths = [model.base_channels * m for m in (1, *model.channel_mults)]
    if model.norm == "group" and any(width % model.norm_groups for width in widths):
        raise ConfigError(
            f"{place('model.norm_groups')}: {model.norm_groups} does not divide the channels {widths}",
            f"set model.norm_groups to a divisor of all of them, such as {math.gcd(model.norm_groups, *widths)}",
        )
    if model.base_channels / 2 <= model.time_shift:
        raise ConfigError(
            f"{place('model.time_shift')}: {model.time_shift:g} leaves no frequency of {model.base_channels} base channels",
            "give less than half of model.base_channels",
        )
    attended = [(level, widths[level + 1]) for level in sorted(set(model.attention_levels))]
    attended += [(levels - 1, widths[-1])] if model.middle_attention else []
    if model.head_channels != "all" and any(width % model.head_channels for _, width in attended):
        level, width = next(pair for pair in attended if pair[1] % int(model.head_channels))
        raise ConfigError(
            f"{place('model.head_channels')}: {model.head_channels} does not divide the {width} channels of level {level}",
            f"give a divisor, such as {math.gcd(int(model.head_channels), *(w for _, w in attended))}, or all",
        )
    if train.grad_accum > train.batch_size:
        raise ConfigError(
            f"{place('train.grad_accum')}: {train.grad_accum} parts of a batch of {train.batch_size}",
            "grad_accum is at most batch_size",
        )


def _check_diffusion(config: RunConfig, origins: Mapping[str, str]) -> None:
    """Rules between keys of ``diffusion``."""
    diffusion = config.diffusion
    place = origins.get("diffusion.zero_terminal_snr", "diffusion.zero_terminal_snr")
    if diffusion.zero_terminal_snr and diffusion.prediction == "eps":
        raise ConfigError(
            f"{place}: with prediction eps nothing could be said of the image at T, where x_t is eps itself",
            "set diffusion.prediction=v, or x0",
        )
    if diffusion.zero_terminal_snr and diffusion.weighting != "uniform":
        raise ConfigError(
            f"{place}: weighting {diffusion.weighting} would give T, where the SNR is 0, no weight: never trained",
            "set diffusion.weighting=uniform",
        )


def check_size(config: RunConfig, size: tuple[int, int]) -> None:
    """Height and width plus padding must divide by the patch, and halve evenly once for each level below the first.

    Raises :class:`ConfigError` that advises the nearest sizes, and padding, that do.
    """
    pad, patch, halvings = config.model.padding, config.model.patch, len(config.model.channel_mults) - 1
    factor = _factor(config)

    def fits(side: int, padding: int = pad) -> bool:
        return (side + 2 * padding) % factor == 0

    if config.model.norm in ("batch", "instance") and all(side + 2 * pad == factor for side in size):
        raise ConfigError(
            f"model.norm: {config.model.norm} has nothing to average over where the lowest level is one pixel",
            "use model.norm=group, a larger --size, or fewer model.channel_mults",
        )
    bad = [side for side in size if not fits(side)]
    if not bad:
        return
    paddings = [p for p in range(65) if all(fits(side, p) for side in size)]
    ways = [f"--size {' or '.join(fitting_sizes(config, size))}", *(f"--set model.padding={p}" for p in paddings[:1])]
    padded = f" with padding {pad}" if pad else ""
    misfit = f"do not halve evenly {halvings} times"
    if patch > 1:
        misfit = f"are not a multiple of {factor}, for model.patch {patch} halved {halvings} times"
        ways.append("a smaller model.patch")
    raise ConfigError(
        f"data.size: {bad[0]} pixels{padded} {misfit}",
        f"use {', or '.join([*ways, 'fewer model.channel_mults'])}",
    )


def _factor(config: RunConfig) -> int:
    """What a side with its padding has to be a multiple of."""
    factor: int = config.model.patch * 2 ** (len(config.model.channel_mults) - 1)
    return factor


def fitting_sizes(config: RunConfig, size: tuple[int, int]) -> list[str]:
    """The nearest sizes that divide by the patch and halve evenly, of those up to 4096, as ``--size`` takes them.

    Without ``size`` itself: none where that one does.
    """
    pad, factor = config.model.padding, _factor(config)
    lower, upper = [], []
    for side in size:
        down, up = range(side, 0, -1), range(side, 4097)
        lower.append(next(s for s in (*down, *up) if (s + 2 * pad) % factor == 0))
        upper.append(next(s for s in (*up, *down) if (s + 2 * pad) % factor == 0))
    found = dict.fromkeys(pair for pair in (tuple(lower), tuple(upper)) if pair != size)
    return [str(size_text((height, width))) for height, width in found]
