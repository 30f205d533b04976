"""The configuration of diffusers' ``UNet2DModel`` as settings of ours, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpmctl.config import RunConfig
from ddpmctl.errors import CheckpointError
from ddpmctl.interop.imported import Settings

_DEFAULTS: dict[str, Any] = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "time_embedding_dim": None, "freq_shift": 0,
    "flip_sin_to_cos": True, "block_out_channels": [224, 448, 672, 896], "layers_per_block": 2, "downsample_padding": 1,
    "dropout": 0.0, "attention_head_dim": 8, "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"], "add_attention": True,
    "num_train_timesteps": None,
}  # fmt: skip
"""What a key is where a file leaves it out."""

_ONLY: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default",),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
"""Keys of which our network has some values only; the first is what a key is where a file leaves it out."""

_WHOLE = ("in_channels", "out_channels", "layers_per_block", "downsample_padding", "norm_num_groups")


def settings_of(file: Path, unet: Mapping[str, Any], settings: Settings) -> bool:
    """Add what ``unet``, read from ``file``, says to ``settings``; returns whether the output has a second half.

    Raises :class:`CheckpointError` that names the key of which our network does not have the value.
    """
    settings.aside.extend(f"{file}: {key}" for key in unet if key not in {*_DEFAULTS, *_ONLY} and not key.startswith("_"))
    unet = _checked(file, unet)
    widths, base = unet["block_out_channels"], unet["block_out_channels"][0]
    if any(width % base for width in widths):
        raise _no(file, unet, "block_out_channels", "are not whole multiples of the first, as in ours")
    for key, value, of in (
        ("data.channels", unet["in_channels"], "in_channels"),
        ("data.conditional", False, "num_class_embeds"),
        ("model.base_channels", base, "block_out_channels"),
        ("model.channel_mults", [width // base for width in widths], "block_out_channels"),
        ("model.num_res_blocks", unet["layers_per_block"], "layers_per_block"),
        ("model.attention_levels", _attention_levels(file, unet), "down_block_types"),
        ("model.middle_attention", unet["add_attention"], "add_attention"),
        ("model.head_channels", _or(unet["attention_head_dim"], "all"), "attention_head_dim"),
        ("model.qk_norm", False, "attention_head_dim"),
        ("model.dropout", unet["dropout"], "dropout"),
        ("model.norm", "group", "norm_num_groups"),
        ("model.norm_groups", unet["norm_num_groups"], "norm_num_groups"),
        ("model.norm_eps", unet["norm_eps"], "norm_eps"),
        ("model.activation", "silu", "act_fn"),
        ("model.time_embedding", _or(unet["time_embedding_dim"], 4 * base), "time_embedding_dim"),
        ("model.time_scale", 1.0, "time_embedding_type"),
        ("model.time_order", "cos_sin" if unet["flip_sin_to_cos"] else "sin_cos", "flip_sin_to_cos"),
        ("model.time_shift", unet["freq_shift"], "freq_shift"),
        ("model.down_padding", ("right_bottom", "symmetric")[unet["downsample_padding"]], "downsample_padding"),
        ("model.padding", 0, "sample_size"),
        ("model.patch", 1, "sample_size"),
        ("model.label_dropout", 0.0, "num_class_embeds"),
    ):
        settings.say(key, value, f"{file}: {of}")
    size = _size(file, unet)
    if size is None:
        settings.assumed["data.size"] = (64, 64)
    else:
        settings.say("data.size", size, f"{file}: sample_size")
    return bool(unet["out_channels"] == 2 * unet["in_channels"])


def _checked(file: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """All keys that make a network, each of its kind and of a value that ours can have."""
    unet = {**_DEFAULTS, **{key: allowed[0] for key, allowed in _ONLY.items()}, **found}
    if found.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise _no(file, unet, "_class_name", "has another network than UNet2DModel")
    for key, allowed in _ONLY.items():
        if unet[key] not in allowed:
            raise _no(file, unet, key, f"is not in our network, which is as of {allowed[0]}")
    for key in _WHOLE:
        if type(unet[key]) is not int:
            raise _no(file, unet, key, "is not a whole number")
    for key in ("flip_sin_to_cos", "add_attention"):
        if type(unet[key]) is not bool:
            raise _no(file, unet, key, "is neither true nor false")
    widths = unet["block_out_channels"]
    if not isinstance(widths, list) or not widths or not all(type(width) is int and width > 0 for width in widths):
        raise _no(file, unet, "block_out_channels", "is not a list of whole numbers")
    for key in ("down_block_types", "up_block_types"):
        if not isinstance(unet[key], list) or len(unet[key]) != len(widths):
            raise _no(file, unet, key, f"is not a list of {len(widths)} blocks, one for each of block_out_channels")
    if unet["downsample_padding"] not in (0, 1):
        raise _no(file, unet, "downsample_padding", "is neither 0 nor 1")
    if unet["attn_norm_num_groups"] not in (None, unet["norm_num_groups"]):
        raise _no(file, unet, "attn_norm_num_groups", "is not norm_num_groups, as in our network")
    if unet["out_channels"] not in (unet["in_channels"], 2 * unet["in_channels"]):
        raise _no(file, unet, "out_channels", "is neither in_channels nor, for a learned variance, twice as many")
    return unet


def _size(file: Path, unet: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width; None where the file leaves them open."""
    size, factor = unet["sample_size"], 2 ** (len(unet["block_out_channels"]) - 1)
    if size is None:
        return None
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= 4096 for side in sides):
        why = "is not one or two whole numbers from 1 to 4096"
    elif any(side % factor for side in sides):
        why = f"pixels do not halve evenly {len(unet['block_out_channels']) - 1} times"
    else:
        return sides[0], sides[1]
    advice = f"set it there to a multiple of {factor}, or to null and give --size to `ddpmctl convert` or `train --init-from`"
    raise CheckpointError(f"{file}: sample_size: {str(size)[:100]} {why}", advice)


def _attention_levels(file: Path, unet: Mapping[str, Any]) -> list[int]:
    """Levels with attention; they must be the same going down and up."""
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D")}
    found: dict[str, list[int]] = {}
    for key, (plain, attended) in kinds.items():
        blocks: Sequence[Any] = [str(block).removeprefix("UNetRes") for block in unet[key]]
        if any(block not in (plain, attended) for block in blocks):
            raise _no(file, unet, key, f"has other blocks than {plain} and {attended}")
        blocks = blocks if key == "down_block_types" else blocks[::-1]
        found[key] = [level for level, block in enumerate(blocks) if block == attended]
    if found["down_block_types"] != found["up_block_types"]:
        raise _no(file, unet, "up_block_types", "has attention at other levels than down_block_types")
    return found["down_block_types"]


def _no(file: Path, unet: Mapping[str, Any], key: str, why: str) -> CheckpointError:
    return CheckpointError(f"{file}: {key}: {str(unet[key])[:100]} {why}", "ddpmctl cannot have this network; use diffusers for it")


def config_of(config: RunConfig, size: tuple[int, int]) -> dict[str, Any]:
    """The configuration of ``UNet2DModel`` for a network of ``config``, which :func:`misfits` has nothing against."""
    model, channels = config.model, config.data.channels
    assert channels != "auto"
    levels = range(len(model.channel_mults))
    with_attention = [level in model.attention_levels for level in levels]
    return {
        "_class_name": "UNet2DModel",
        **{key: allowed[0] for key, allowed in _ONLY.items()},
        **_DEFAULTS,
        "sample_size": size[0] if size[0] == size[1] else list(size),
        "in_channels": channels,
        "out_channels": channels * (2 if config.diffusion.learn_variance else 1),
        "time_embedding_dim": None if model.time_embedding in ("auto", 4 * model.base_channels) else model.time_embedding,
        "freq_shift": int(model.time_shift) if model.time_shift == int(model.time_shift) else model.time_shift,
        "flip_sin_to_cos": model.time_order == "cos_sin",
        "block_out_channels": [model.base_channels * mult for mult in model.channel_mults],
        "layers_per_block": _only(model.num_res_blocks),
        "downsample_padding": 1 if model.down_padding == "symmetric" else 0,
        "dropout": model.dropout,
        "attention_head_dim": None if model.head_channels == "all" else model.head_channels,
        "norm_num_groups": model.norm_groups,
        "norm_eps": model.norm_eps,
        "down_block_types": ["AttnDownBlock2D" if attended else "DownBlock2D" for attended in with_attention],
        "up_block_types": ["AttnUpBlock2D" if attended else "UpBlock2D" for attended in with_attention[::-1]],
        "add_attention": model.middle_attention,
    }


def misfits(config: RunConfig, class_names: Sequence[str]) -> list[str]:
    """Settings, with their values, that ``UNet2DModel`` does not have."""
    model = config.model
    counts = model.num_res_blocks if isinstance(model.num_res_blocks, list) else [model.num_res_blocks]
    ours = {
        "data.conditional": (config.data.conditional, not class_names),
        "model.norm": (model.norm, model.norm == "group"),
        "model.activation": (model.activation, model.activation == "silu"),
        "model.time_embedding": (model.time_embedding, model.time_embedding != "none"),
        "model.time_scale": (model.time_scale, model.time_scale == 1),
        "model.qk_norm": (model.qk_norm, not model.qk_norm),
        "model.padding": (model.padding, model.padding == 0),
        "model.patch": (model.patch, model.patch == 1),
        "model.channel_mults": (model.channel_mults, model.channel_mults[0] == 1),
        "model.num_res_blocks": (model.num_res_blocks, len(set(counts)) == 1 and counts[0] > 0),
    }
    return [f"{key}: {value}" for key, (value, fits) in ours.items() if not fits]


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _only(counts: int | list[int]) -> int:
    return counts[0] if isinstance(counts, list) else counts
