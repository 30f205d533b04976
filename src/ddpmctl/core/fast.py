"""Layers of the network that PyTorch has, but that are slow on CPUs there: the same functions, computed another way.

On other devices, and wherever PyTorch's own are as fast, these are PyTorch's own. The gains are in benchmarks/RESULTS.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEW_PIXELS = 256
"""Up to so many pixels attention is faster as two plain products, and its weights (pixels x pixels) take little memory."""

LARGE_MAP = 1024
"""From so many pixels PyTorch's group norm has a kernel that is fast forwards."""

SMALL_IMAGES = 2**17
"""Below so many numbers the few calls of PyTorch's group norm take less time than the many of ours."""


def _half_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not torch.compiler.is_compiling()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over L pixels: (..., L, C) -> same. Vaswani et al. 2017, equation 1.

    In bfloat16 and over few pixels the products q k^T are rounded to it: 0.4 % of the result where they are about 1,
    2 % where they are about 36, which PyTorch's kernel keeps below 0.3 %. In float16 they could overflow.
    """
    if q.dtype == torch.bfloat16 and _half_on_cpu(q) and q.shape[-2] <= FEW_PIXELS:
        weights: Tensor = (q * float(q.shape[-1]) ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return weights @ v
    return F.scaled_dot_product_attention(q, k, v)


class Dropout(nn.Dropout):
    """Zeros a share ``p`` of the numbers while training, and scales the others by 1 / (1 - p). Any shape.

    Bernoulli draws take as long as the convolution that follows on a CPU. Here each takes 16 random bits, four from
    each number of the generator, so ``p`` is that of the nearest 65,536th.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        dropped = round(self.p * 2**16)
        if dropped == 2**16:
            return x * 0
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        lanes = bits.view(torch.int16)[: x.numel()].as_strided(x.shape, torch.empty_like(x, device="meta").stride())
        return torch.where(lanes >= dropped - 2**15, x * (2**16 / (2**16 - dropped)), 0)


class GroupNorm(nn.GroupNorm):
    """Group norm (Wu & He 2018). In half precision on a CPU with channels last, PyTorch's takes up to five times as long."""

    def forward(self, x: Tensor) -> Tensor:
        return _normalised(self, x, silu=False) if self.by_rows(x) else super().forward(x)

    def by_rows(self, x: Tensor) -> bool:
        """Whether our way is the faster one."""
        large = _half_on_cpu(x) and self.affine and x.ndim == 4 and x.numel() >= SMALL_IMAGES
        return large and x.is_contiguous(memory_format=torch.channels_last)


def activated(norm: nn.Module, activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """activation(norm(x)). Group norm and SiLU are one, where that is faster; it keeps only ``x`` for the way back."""
    if activation is F.silu and isinstance(norm, GroupNorm) and norm.by_rows(x):
        return _normalised(norm, x, silu=True)
    return activation(norm(x))


def _normalised(norm: nn.GroupNorm, x: Tensor, *, silu: bool) -> Tensor:
    y: Tensor = _GroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
    return y


class _GroupNorm(torch.autograd.Function):
    """Sums over pixels of (B, L, C) first, then over the few channels of a group: both read memory in its order.

    All in float32, between one conversion at either end: PyTorch's own conversions within an operation are slow.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        b, c, h, w = x.shape
        count = h * w * c // groups
        if h * w >= LARGE_MAP:
            y, mean, rstd = torch.native_group_norm(x, weight, bias, b, c, h * w, groups, eps)
            y = F.silu(y, inplace=True) if silu else y
        else:
            rows = _rows(x)
            mean = rows.sum(1).view(b, groups, -1).sum(2) / count
            square = rows.square().sum(1).view(b, groups, -1).sum(2) / count
            rstd = (square - mean.square()).clamp_(min=0).add_(eps).rsqrt_()
            rows = _affine(rows, weight, bias, mean, rstd)
            y = _image(F.silu(rows, inplace=True) if silu else rows, x)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        (b, c, h, w), groups = x.shape, mean.shape[1]
        rows, grads = _rows(x), _rows(grad)
        if ctx.silu:
            grads = torch.ops.aten.silu_backward(grads, _affine(rows, weight, bias, mean, rstd))
        mean, rstd, weight = mean[..., None], rstd[..., None], weight.view(1, groups, -1)
        # With y = weight (x - mean) rstd + bias, by channel: the sums of dy and of dy (x - mean) rstd ...
        of_bias = grads.sum(1).view(b, groups, -1)
        of_weight = ((grads * rows).sum(1).view(b, groups, -1) - mean * of_bias) * rstd
        # ... and by group, as means, what dx = rstd (weight dy - m1 - m2 (x - mean) rstd) takes of them.
        count = h * w * c // groups
        m1 = (weight * of_bias).sum(2, keepdim=True) / count
        m2 = (weight * of_weight).sum(2, keepdim=True) / count
        per_x = -m2 * rstd.square()
        shift = -(m1 * rstd + per_x * mean)
        of_group = torch.cat([per_x, shift], 2).repeat_interleave(c // groups, 1).view(b, 1, c, 2)
        dx = torch.addcmul(of_group[..., 1], rows, of_group[..., 0]).addcmul_(grads, (weight * rstd).view(b, 1, c))
        return _image(dx, x), of_weight.sum(0).view(c), of_bias.sum(0).view(c), None, None, None


def _rows(image: Tensor) -> Tensor:
    """(B, C, H, W) as (B, L, C) in float32."""
    return image.permute(0, 2, 3, 1).reshape(len(image), -1, image.shape[1]).float()


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """(B, L, C) as (B, C, H, W) of the dtype of ``like``, channels last."""
    b, c, h, w = like.shape
    return rows.to(like.dtype).view(b, h, w, c).permute(0, 3, 1, 2)


def _affine(rows: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """weight (x - mean) rstd + bias of (B, L, C), with the mean and rstd of its groups (B, G)."""
    b, groups = mean.shape
    scale = weight.view(1, groups, -1) * rstd[..., None]
    shift = bias.view(1, groups, -1) - mean[..., None] * scale
    return torch.addcmul(shift.view(b, 1, -1), rows, scale.view(b, 1, -1))
