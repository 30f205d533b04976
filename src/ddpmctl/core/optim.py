"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}

FLOOR = 0.01
"""Where ``cosine_flat`` and ``geometric`` end, as a share of the learning rate."""


def _ramp(step: int, warmup: int) -> float:
    return min(1.0, step / warmup) if warmup else 1.0


def constant(step: int, steps: int, warmup: int) -> float:
    """1 throughout, after a linear warm-up."""
    return _ramp(step, warmup)


def linear(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a straight line to 0 at the end."""
    return _ramp(step, warmup) * min(1.0, (steps - step + 1) / max(1, steps - warmup))


def cosine(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine to 0 at the end. Loshchilov & Hutter 2017."""
    share = max(0, step - 1 - warmup) / max(1, steps - warmup)
    return _ramp(step, warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def cosine_flat(step: int, steps: int, warmup: int) -> float:
    """Quadratic warm-up from 0.1 (5 % of the run unless set), half a cosine to 0.01, flat for the last 5 %."""
    rise, flat = warmup or max(1, steps // 20), steps // 20
    if step <= rise:
        return 0.1 + 0.9 * (step / rise) ** 2
    share = min(1.0, (step - rise) / max(1, steps - rise - flat))
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share))


def geometric(step: int, steps: int, warmup: int) -> float:
    """Ten equal stages, each lower by the same factor, the last at 0.01; no warm-up."""
    stage = min(9, (step - 1) * 10 // steps)
    return float(FLOOR ** (stage / 9))


LR_SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "cosine_flat": cosine_flat,
    "geometric": geometric,
}
"""``(step, steps, warmup) -> factor`` of the learning rate for step 1..steps."""


def make_optimizer(
    net: nn.Module, name: str, *, lr: float, betas: tuple[float, float], decay: float
) -> torch.optim.Optimizer:
    """The optimiser of row ``name`` over the parameters of ``net``; fused kernels where the device has them."""
    fused = {p.device.type for p in net.parameters()} <= {"cpu", "cuda"}
    return OPTIMIZERS[name](net.parameters(), lr=lr, betas=betas, weight_decay=decay, fused=fused)  # type: ignore[call-arg]


def update(optimizer: torch.optim.Optimizer, bad: Tensor, divisor: Tensor | None = None) -> None:
    """A step of ``optimizer`` with all gradients divided by ``divisor``; none where ``bad``: moments and counts stay, too.

    Both are scalars on the device, float32 and bool. Fused kernels take them in as they go, the way they do for PyTorch's
    loss scaling; for others the gradients are gone through once more, and the device is waited for.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf, optimizer.grad_scale = bad.float(), divisor  # type: ignore[attr-defined]
        optimizer.step()
    elif not bad:
        if divisor is not None:
            torch._foreach_div_([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None], divisor)
        optimizer.step()


def keep_gradients(parameters: Iterable[Tensor]) -> None:
    """Move the gradients so far into memory of their own, before more is added to them.

    What a CUDA graph returns lies in memory that its next run writes over, and autograd takes the first gradient of a parameter
    as it comes: the second would be added to itself. PyTorch's maintainers copy likewise (issues 96693 and 169545 of
    pytorch/pytorch, pull request 184153).
    """
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()
