"""``model-N.pt`` of denoising-diffusion-pytorch: known, so that the no is a clear one.

Its ``Unet`` normalises after the convolution, scales and shifts by the time, and has linear attention with learned
memory at all levels but the last: there are no settings of our network that make it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ddpmctl.errors import CheckpointError
from ddpmctl.interop.imported import Loaded
from ddpmctl.interop.source import Source, is_state
from ddpmctl.runfile import Layer

_PECULIAR = (
    ("init_conv.weight", (7, 7), "a first convolution of 7x7"),
    (".block1.proj.weight", (3, 3), "norms after the convolution"),
    (".mlp.1.weight", (), "scale and shift by the time"),
    (".mem_kv", None, "attention with memory"),
    (".norm.g", None, "RMS norms"),
)
"""End of a tensor's name, its kernel (None: any), and what our network does not have where there is one."""


def read(source: Source, given: Layer) -> Loaded | None:
    """None for what is no such file; raises :class:`CheckpointError` for one."""
    state = _network(source.torch)
    if not any(name.endswith(".block1.proj.weight") for name in state):
        return None
    has = [what for name, sides, what in _PECULIAR if _has(state, name, sides)]
    raise CheckpointError(
        f"{source.path}: the network of denoising-diffusion-pytorch, which ddpmctl cannot have: {', '.join(has)}",
        "sample it with that package, or train one anew: ddpmctl train PHOTOS/",
    )


def _has(state: Mapping[str, Tensor], name: str, kernel: tuple[int, ...] | None) -> bool:
    return any(key.endswith(name) and kernel in (None, tuple(value.shape[2:])) for key, value in state.items())


def _network(content: Any) -> Mapping[str, Tensor]:
    """The state_dict in what its ``Trainer`` saves, or ``content`` itself; empty for all else."""
    inner = content["model"] if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping) else content
    return inner if is_state(inner) else {}
