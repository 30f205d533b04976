"""A GPU that is none: its tensors lie on the CPU, and it notes for what the CPU would have had to wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("meta")
"""Known to PyTorch without a driver; within :func:`pretended` its tensors have numbers."""


class OnGPU(torch.Tensor):
    """A tensor said to be on the GPU; ``inner`` holds its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGPU:
        offset, strides = inner.storage_offset(), inner.stride()
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=strides, storage_offset=offset, dtype=inner.dtype, device=GPU
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: outside of the pretended GPU")


class PretendedGPU(TorchDispatchMode):
    """Does on the CPU what is asked of the GPU. ``waits``: the operations that hold the CPU up until the GPU is done."""

    READING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2", "masked_select")
    """What they return hangs on the numbers, so that the CPU has to know them."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        has = any(isinstance(leaf, OnGPU) for leaf in tree_leaves((args, kwargs)))
        goes = has if kwargs.get("device") is None else torch.device(kwargs["device"]) == GPU
        if name == "copy_":
            crosses, waits = isinstance(args[0], OnGPU) != isinstance(args[1], OnGPU), not (len(args) > 2 and args[2])
        else:
            crosses, waits = name == "_to_copy" and has != goes, not kwargs.get("non_blocking")
        if (crosses and waits) or (has and name in self.READING):
            self.waits.append(name)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        plain_args, plain_kwargs = tree_map_only(OnGPU, lambda tensor: tensor.inner, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if isinstance(out, torch.Tensor) and plain_args and out is plain_args[0]:
            return args[0]  # an operation in place
        return tree_map_only(torch.Tensor, OnGPU, out) if goes else out


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGPU]:
    """Within it :data:`GPU` can be used; Adam's fused kernel, which knows its devices by name, is let to."""
    checked = torch.optim.Adam._init_group.__globals__
    monkeypatch.setitem(checked, "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    with PretendedGPU() as gpu:
        yield gpu


def move(net: torch.nn.Module) -> None:
    """Take ``net`` there: ``net.to`` cannot."""
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(OnGPU(parameter.detach()))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnGPU(buffer)
