"""What the environment says of how this process was started: alone, or as one of several (torchrun, srun, ``--devices``)."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from ddpmctl.errors import ConfigError

_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""What PyTorch wants to know beside WORLD_SIZE; torchrun sets it."""


class Started(NamedTuple):
    """Process ``rank`` of ``world``, and ``local_rank`` of the ``local_world`` on this machine, all from 0.

    ``by_torchrun``: whether torchrun started them.
    ``watched``: whether the process that started this one, torchrun or ``--devices``, waits for it, and keeps PyTorch's store.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    by_torchrun: bool = False
    watched: bool = False

    @property
    def several(self) -> bool:
        """Whether there are other processes."""
        return self.world > 1


def how_started() -> Started:
    """How this process was started; raises :class:`ConfigError` where the environment says that by halves."""
    world = _number("WORLD_SIZE", 1)
    if world < 1:
        raise ConfigError(f"WORLD_SIZE={world}: must be at least 1", _advice())
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    watched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    if world == 1:
        return Started(by_torchrun=by_torchrun, watched=watched)
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        raise ConfigError(f"WORLD_SIZE={world}, but no {', '.join(missing)}: no way to the other processes", _advice())
    rank = _number("RANK", 0)
    if not 0 <= rank < world:
        raise ConfigError(f"RANK={rank}: must be 0 to {world - 1}, for WORLD_SIZE is {world}", _advice())
    if not 0 < _number("MASTER_PORT", 0) < 2**16:
        raise ConfigError(f"MASTER_PORT={os.environ['MASTER_PORT']}: not a port", "give one from 1024 to 65535")
    local_rank = _number("LOCAL_RANK", rank)
    # Where nobody says how many there are here, it is known of those up to this one, or of all.
    local_world = _number("LOCAL_WORLD_SIZE", local_rank + 1 if "LOCAL_RANK" in os.environ else world)
    if not 0 <= local_rank < local_world <= world:
        raise ConfigError(f"LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={local_world}: not possible", _advice())
    return Started(rank, world, local_rank, local_world, by_torchrun, watched)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not re.fullmatch(r"-?\d{1,9}", text):
        raise ConfigError(f"{name}={text}: not a number", _advice())
    return int(text)


def _advice() -> str:
    return "start with torchrun, which sets it, or unset WORLD_SIZE to train with one process"
