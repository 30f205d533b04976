"""Layers of the network that PyTorch has, but that are slow on CPUs there: the same functions, computed another way.

On other devices, and wherever PyTorch's own are as fast, these are PyTorch's own. The gains are in benchmarks/RESULTS.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_PIXELS = 256
"""Up to so many pixels attention is faster as two plain products, and its weights (pixels x pixels) take little memory."""

LARGE_MAP = 1024
"""From so many pixels PyTorch's group norm has a kernel that is fast forwards."""

SMALL_IMAGES = 2**17
"""Below so many numbers the few calls of PyTorch's group norm take less time than the many of ours."""


def _half_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not torch.compiler.is_compiling()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over L pixels: (..., L, C) -> same. Vaswani et al. 2017, equation 1."""
    if _half_on_cpu(q) and q.shape[-2] <= FEW_PIXELS:
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
        ours = _half_on_cpu(x) and x.ndim == 4 and x.numel() > SMALL_IMAGES
        if ours and x.is_contiguous(memory_format=torch.channels_last):
            y: Tensor = _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
            return y
        return super().forward(x)


class _GroupNorm(torch.autograd.Function):
    """Sums over pixels of (B, L, C) first, then over the few channels of a group: both read memory in its order.

    What is kept and multiplied by is float32; only what is as large as the image is rounded to half precision.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        b, c, h, w = x.shape
        if h * w >= LARGE_MAP:
            y, mean, rstd = torch.native_group_norm(x, weight, bias, b, c, h * w, groups, eps)
        else:
            pixels, count = _rows(x), h * w * c // groups
            mean = pixels.sum(1, dtype=torch.float32).view(b, groups, -1).sum(2) / count
            square = pixels.float().square_().sum(1).view(b, groups, -1).sum(2) / count
            rstd = (square - mean.square()).clamp_(min=0).add_(eps).rsqrt_()
            scale = weight.view(1, groups, -1) * rstd[..., None]
            shift = bias.view(1, groups, -1) - mean[..., None] * scale
            y = _image(_affine(shift.view(b, 1, c), pixels, scale.view(b, 1, c)), x)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        (b, c, h, w), groups = x.shape, mean.shape[1]
        pixels, grads = _rows(x), _rows(grad)
        mean, rstd, weight = mean[..., None], rstd[..., None], weight.view(1, groups, -1)
        # With y = weight (x - mean) rstd + bias, by channel: the sums of dy and of dy (x - mean) rstd ...
        of_bias = grads.sum(1, dtype=torch.float32).view(b, groups, -1)
        of_weight = ((grads * pixels).sum(1, dtype=torch.float32).view(b, groups, -1) - mean * of_bias) * rstd
        # ... and by group, as means, what dx = rstd (weight dy - m1 - m2 (x - mean) rstd) takes of them.
        count = h * w * c // groups
        m1 = (weight * of_bias).sum(2, keepdim=True) / count
        m2 = (weight * of_weight).sum(2, keepdim=True) / count
        per_x = -m2 * rstd.square()
        shift = -(m1 * rstd + per_x * mean)
        of_group = torch.cat([per_x, shift], 2).repeat_interleave(c // groups, 1).view(b, 1, c, 2)
        centred = torch.addcmul(of_group[..., 1], pixels, of_group[..., 0])
        dx = _image(_affine(centred, grads, (weight * rstd).view(b, 1, c)), x)
        return dx, of_weight.sum(0).view(c), of_bias.sum(0).view(c), None, None


def _rows(image: Tensor) -> Tensor:
    """(B, C, H, W) as (B, L, C): no copy where channels are last."""
    return image.permute(0, 2, 3, 1).reshape(len(image), -1, image.shape[1])


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """(B, L, C) as (B, C, H, W), channels last."""
    b, c, h, w = like.shape
    return rows.view(b, h, w, c).permute(0, 3, 1, 2)


def _affine(shift: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """shift + x * scale in float32, rounded once to the dtype of x."""
    return torch.addcmul(shift, x, scale, out=torch.empty_like(x))
