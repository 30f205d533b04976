"""``model-N.pt`` of denoising-diffusion-pytorch: known, so that the no is a clear one.

Its ``Unet`` normalises after the convolution, scales and shifts by the time, and has linear attention with learned
memory at all levels but the last: there are no settings of our network that make it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddpmctl.errors import CheckpointError
from ddpmctl.interop.imported import Loaded
from ddpmctl.interop.source import Source, is_state
from ddpmctl.runfile import Layer

_PECULIAR = (
    ("init_conv.weight", "a first convolution of 7x7"),
    (".block1.proj.weight", "norms after the convolution"),
    (".mlp.1.weight", "scale and shift by the time"),
    (".mem_kv", "attention with memory"),
    (".norm.g", "RMS norms"),
)
"""What its tensors' names tell, and what our network does not have."""


def read(source: Source, given: Layer) -> Loaded | None:
    """None for what is no such file; raises :class:`CheckpointError` for one."""
    state = _network(source.torch)
    if not any(name.endswith(".block1.proj.weight") for name in state):
        return None
    has = [what for name, what in _PECULIAR if any(key.endswith(name) for key in state)]
    raise CheckpointError(
        f"{source.path}: the network of denoising-diffusion-pytorch, which ddpmctl cannot have: {', '.join(has)}",
        "sample it with that package, or train one anew: ddpmctl train PHOTOS/",
    )


def _network(content: Any) -> Mapping[str, Any]:
    """The state_dict in what its ``Trainer`` saves, or ``content`` itself; empty for all else."""
    inner = content["model"] if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping) else content
    return inner if is_state(inner) else {}
