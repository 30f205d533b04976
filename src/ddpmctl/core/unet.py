"""The UNet of Ho et al. 2020 (appendix B): residual blocks, attention on chosen levels, time and class biases.

It knows nothing of schedules: ``UNet(x, t_index, label)`` is a function of an image, a step index and a class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmctl.core.fast import Dropout, GroupNorm, activated, attend

NORMS: dict[str, Callable[[int, int, float], nn.Module]] = {
    "group": lambda channels, groups, eps: GroupNorm(groups, channels, eps),
    "batch": lambda channels, groups, eps: nn.BatchNorm2d(channels, eps),
    "instance": lambda channels, groups, eps: nn.InstanceNorm2d(channels, eps, affine=True),
    "none": lambda channels, groups, eps: nn.Identity(),
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "mish": F.mish,
}


class TimeEmbedding(nn.Module):
    """Sinusoids of the step index, then two linear layers. (B,) -> (B, width). Vaswani et al. 2017, section 3.5.

    ``order``: sin_cos or cos_sin, which half comes first. ``shift``: frequency i of h is 10000^(-i / (h - shift)); with 1,
    as in Ho et al.'s code, the last is 1/10000 itself, with 0 the next would be.
    """

    def __init__(
        self, channels: int, width: int, scale: float, activation: Callable[[Tensor], Tensor],
        *, order: str = "sin_cos", shift: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scale, self.activation, self.order, self.shift = scale, activation, order, shift
        self.half_width = channels // 2
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t_index: Tensor) -> Tensor:
        # Angles in float32 even under autocast: index 999 has no exact neighbour in bfloat16.
        index = torch.arange(self.half_width, device=t_index.device, dtype=torch.float32)
        angles = t_index.float()[:, None] * self.scale * torch.exp(-math.log(10_000) / (self.half_width - self.shift) * index)
        halves = [angles.sin(), angles.cos()]
        embedding = torch.cat(halves if self.order == "sin_cos" else halves[::-1], dim=1)
        hidden: Tensor = self.linear_2(self.activation(self.linear_1(embedding.to(self.linear_1.weight.dtype))))
        return self.activation(hidden)


class Attention(nn.Module):
    """Self-attention over all pixels, residual. (B, C, H, W) -> same.

    A head has ``head_channels`` channels (None: all of them), each a run of its own, and scale 1/sqrt(head_channels).
    With ``qk_norm`` queries and keys have a mean square of 1, so that no product of them is above sqrt(head_channels)
    (Dehghani et al. 2023, section 2; without a gain, as in Karras et al. 2024). Without it training can make them ever
    longer, until every pixel looks at one other alone.
    """

    def __init__(
        self, channels: int, norm: Callable[[int], nn.Module], head_channels: int | None = None, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.heads = channels // head_channels if head_channels else 1
        self.qk_norm = qk_norm
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        if self.qk_norm:
            q, k = (F.rms_norm(part, part.shape[-1:], eps=1e-5).to(v.dtype) for part in (q, k))
        mixed = attend(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(b, c, h, w))
        return x + out


class ResidualBlock(nn.Module):
    """norm, act, conv, + time and class biases, norm, act, dropout, conv, + skip, then attention where asked."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: Callable[[int], nn.Module],
        activation: Callable[[Tensor], Tensor],
        dropout: float,
        time_width: int | None,
        num_classes: int | None,
        attention: bool,
        head_channels: int | None = None,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.norm_1 = norm(in_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_bias = nn.Linear(time_width, out_channels) if time_width else None
        self.class_bias = nn.Embedding(num_classes, out_channels) if num_classes else None
        self.norm_2 = norm(out_channels)
        self.dropout = Dropout(dropout)
        self.conv_2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = Attention(out_channels, norm, head_channels, qk_norm) if attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None, label: Tensor | None) -> Tensor:
        h = self.conv_1(activated(self.norm_1, self.activation, x))
        if self.time_bias is not None:
            h = h + self.time_bias(time)[:, :, None, None]
        if self.class_bias is not None:
            h = h + self.class_bias(label)[:, :, None, None]
        h = self.conv_2(self.dropout(activated(self.norm_2, self.activation, h)))
        out: Tensor = self.attention(h + self.skip(x))
        return out


class Downsample(nn.Conv2d):
    """Half the height and width: 3x3 convolution of stride 2, zeros on each side, or ``right_bottom`` only."""

    def __init__(self, channels: int, padding: str = "symmetric") -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1 if padding == "symmetric" else 0)
        self.lopsided = padding == "right_bottom"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, [0, 1, 0, 1]) if self.lopsided else x)


class Upsample(nn.Conv2d):
    """Twice the height and width: nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


def zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    """Start at zero, so that a new residual branch changes nothing (Ho et al.'s code; Goyal et al. 2017)."""
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


class UNet(nn.Module):
    """Image (B, C, H, W), step index (B,) and class (B,) to an output of the image's size, of ``out_channels`` (None: C).

    ``time_width`` None: no time input. ``num_classes`` None: no class input. ``padding`` pixels are added on each
    side (zeros) and cropped from the output. With ``patch`` p the network works on p x p pixels at a time, p^2 C channels
    of a p-th of the size (Luhman & Luhman 2022). ``attention_levels`` counts from 0, the size after that.
    ``num_res_blocks``: going down, one more going up; a list has a number for each level. Published checkpoints differ in
    ``norm_eps``; ``time_order`` and ``time_shift``, see :class:`TimeEmbedding`; ``down_padding``, see :class:`Downsample`;
    ``head_channels`` and ``qk_norm``, see :class:`Attention`; and whether there is attention in the middle.
    """

    def __init__(
        self,
        image_channels: int,
        *,
        base_channels: int = 128,
        channel_mults: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int | Sequence[int] = 2,
        attention_levels: Sequence[int] = (1,),
        dropout: float = 0.1,
        norm: str = "group",
        norm_groups: int = 32,
        norm_eps: float = 1e-5,
        activation: str = "silu",
        time_width: int | None = 512,
        time_scale: float = 1.0,
        time_order: str = "sin_cos",
        time_shift: float = 0.0,
        head_channels: int | None = None,
        qk_norm: bool = False,
        middle_attention: bool = True,
        down_padding: str = "symmetric",
        num_classes: int | None = None,
        padding: int = 0,
        patch: int = 1,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.padding, self.patch, self.num_classes = padding, patch, num_classes
        self.activation = ACTIVATIONS[activation]

        def make_norm(channels: int) -> nn.Module:
            return NORMS[norm](channels, norm_groups, norm_eps)

        def block(in_channels: int, out_channels: int, attention: bool) -> ResidualBlock:
            return ResidualBlock(
                in_channels, out_channels, norm=make_norm, activation=self.activation, dropout=dropout,
                time_width=time_width, num_classes=num_classes, attention=attention, head_channels=head_channels,
                qk_norm=qk_norm,
            )  # fmt: skip

        self.time = None
        if time_width:
            self.time = TimeEmbedding(
                base_channels, time_width, time_scale, self.activation, order=time_order, shift=time_shift
            )
        self.conv_in = nn.Conv2d(image_channels * patch**2, base_channels, 3, padding=1)
        widths = [base_channels * m for m in channel_mults]
        counts = [num_res_blocks] * len(widths) if isinstance(num_res_blocks, int) else list(num_res_blocks)
        channels, skips, last = base_channels, [base_channels], len(widths) - 1

        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(counts[level]):
                self.down.append(block(channels, width, level in attention_levels))
                channels = width
                skips.append(channels)
            if level != last:
                self.down.append(Downsample(channels, down_padding))
                skips.append(channels)

        self.middle = nn.ModuleList([block(channels, channels, middle_attention), block(channels, channels, False)])

        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(counts[level] + 1):
                self.up.append(block(channels + skips.pop(), width, level in attention_levels))
                channels = width
            if level != 0:
                self.up.append(Upsample(channels))

        self.norm_out = make_norm(channels)
        self.conv_out = zeroed(nn.Conv2d(channels, (out_channels or image_channels) * patch**2, 3, padding=1))

    def forward(self, x: Tensor, t_index: Tensor, label: Tensor | None = None) -> Tensor:
        """Raises ``ValueError`` when a class is missing or superfluous, or height or width do not divide evenly."""
        if (label is None) != (self.num_classes is None):
            raise ValueError("label needed" if label is None else "this network was trained without classes")
        if self.padding:
            x = F.pad(x, [self.padding] * 4)
        factor = self.patch * 2 ** sum(isinstance(module, Downsample) for module in self.down)
        if any(side % factor for side in x.shape[-2:]):
            raise ValueError(f"height and width {tuple(x.shape[-2:])} must be multiples of {factor}")

        time = self.time(t_index) if self.time is not None else None
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        skips = [h]
        for module in self.down:
            h = module(h, time, label) if isinstance(module, ResidualBlock) else module(h)
            skips.append(h)
        for module in self.middle:
            h = module(h, time, label)
        for module in self.up:
            h = module(h) if isinstance(module, Upsample) else module(torch.cat([h, skips.pop()], 1), time, label)
        out: Tensor = F.pixel_shuffle(self.conv_out(activated(self.norm_out, self.activation, h)), self.patch)
        return out[..., self.padding : -self.padding, self.padding : -self.padding] if self.padding else out
