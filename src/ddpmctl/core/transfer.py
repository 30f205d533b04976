"""From the CPU, where everything random is drawn, to the device that computes."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, which lies on the CPU, on ``device``.

    A GPU is not waited for: the copy is made from pinned memory when the GPU comes to it, and meanwhile the CPU prepares
    what comes next. An ordinary copy would wait until the GPU has done all that was asked of it before.
    """
    if device.type in ("cpu", "mps"):  # the latter shares its memory with the CPU
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
