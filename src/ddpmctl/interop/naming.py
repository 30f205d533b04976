"""Names of weights: ours, those of diffusers' ``UNet2DModel``, and those of the predecessor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from ddpmctl.config import ModelConfig

_AROUND = {
    "time.linear_1": "time_embedding.linear_1",
    "time.linear_2": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
"""Our module -> theirs, outside of the blocks."""

_INSIDE = {
    "norm_1": ("resnets", ("norm1",)),
    "conv_1": ("resnets", ("conv1",)),
    "time_bias": ("resnets", ("time_emb_proj",)),
    "norm_2": ("resnets", ("norm2",)),
    "conv_2": ("resnets", ("conv2",)),
    "skip": ("resnets", ("conv_shortcut",)),
    "attention.norm": ("attentions", ("group_norm",)),
    "attention.qkv": ("attentions", ("to_q", "to_k", "to_v")),
    "attention.out": ("attentions", ("to_out.0",)),
}
"""Module in one of our blocks -> theirs: of which list, and its names in there."""

_OLDER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names in an attention of diffusers before 0.13, as in the uploads of 2022."""


def diffusers_names(model: ModelConfig, ours: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each of our names in a network of ``model`` theirs; q, k and v are three there."""
    blocks = dict(_blocks(model))
    found: dict[str, tuple[str, ...]] = {}
    for name in ours:
        block, inside, leaf = _split(name)
        if not block:
            found[name] = (f"{_AROUND[inside]}.{leaf}",)
        elif not inside:  # down or up by convolution
            found[name] = (f"{blocks[block]}.{leaf}",)
        else:
            kind, theirs = _INSIDE[inside]
            found[name] = tuple(f"{blocks[block].format(kind)}.{part}.{leaf}" for part in theirs)
    return found


def _split(name: str) -> tuple[str, str, str]:
    """Block, module within it, and the last part of one of our names: ``down.3``, ``attention.qkv``, ``weight``."""
    module, _, leaf = name.rpartition(".")
    if module.partition(".")[0] not in ("down", "middle", "up"):
        return "", module, leaf
    place, number, *inside = module.split(".", 2)
    return f"{place}.{number}", "".join(inside), leaf


def _blocks(model: ModelConfig) -> Iterator[tuple[str, str]]:
    """Each of our blocks and theirs, with a gap for the list in which theirs stands."""
    levels, number = len(model.channel_mults), 0
    counts = model.num_res_blocks if isinstance(model.num_res_blocks, list) else [model.num_res_blocks] * levels
    for level, count in enumerate(counts):
        for block in range(count):
            yield f"down.{number}", f"down_blocks.{level}.{{}}.{block}"
            number += 1
        if level < levels - 1:
            yield f"down.{number}", f"down_blocks.{level}.downsamplers.0.conv"
            number += 1
    yield "middle.0", "mid_block.{}.0"
    yield "middle.1", "mid_block.{}.1"
    number = 0
    for level, count in enumerate(reversed(counts)):
        for block in range(count + 1):
            yield f"up.{number}", f"up_blocks.{level}.{{}}.{block}"
            number += 1
        if level < levels - 1:
            yield f"up.{number}", f"up_blocks.{level}.upsamplers.0.conv"
            number += 1


def renewed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with the names that diffusers gives now to what it named otherwise in 2022."""
    found = {}
    for name, value in state.items():
        now = name
        if ".attentions." in name:
            for old, new in _OLDER.items():
                now = now.replace(old, new)
        # Both names at once are one tensor too many: it keeps its own, and is told.
        found[name if now != name and now in state else now] = value
    return found


_PREDECESSOR_AROUND = {
    "time.linear_1": "time_mlp.1",
    "time.linear_2": "time_mlp.3",
    "conv_in": "init_conv",
    "norm_out": "out_norm",
    "conv_out": "out_conv",
}
_PREDECESSOR_INSIDE = {
    "conv_2": "conv_2.1",
    "skip": "residual_connection",
    "attention.qkv": "attention.to_qkv",
    "attention.out": "attention.to_out",
}
_PREDECESSOR_PLACES = {"down": ("downs", "downsample"), "middle": ("mid", ""), "up": ("ups", "upsample.1")}
"""Our list of blocks -> theirs, and the name of a convolution that changes the size."""


def predecessor_names(ours: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each of our names the predecessor's."""
    found: dict[str, tuple[str, ...]] = {}
    for name in ours:
        block, inside, leaf = _split(name)
        if not block:
            found[name] = (f"{_PREDECESSOR_AROUND[inside]}.{leaf}",)
            continue
        place, number = block.split(".")
        theirs, resize = _PREDECESSOR_PLACES[place]
        found[name] = (f"{theirs}.{number}.{_PREDECESSOR_INSIDE.get(inside, inside) or resize}.{leaf}",)
    return found
