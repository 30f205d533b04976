"""Memory: how to tell that it ran out, how much is left, and the most that a piece of work takes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

_STATUS, _CLEAR, _MEMINFO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_SIGNS = re.compile(
    "can't allocate memory|not enough memory|bad_alloc|out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
    # What oneDNN, which computes convolutions on CPUs, says when it gets no memory.
    "|could not create a (memory|primitive(?! descriptor))"
)


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine ran out of memory; told by name and text, since torch may not be loaded."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_SIGNS.search(str(error)))


def free_cached(device_type: str) -> None:
    """Hand memory that torch keeps for later back to the device."""
    import torch

    if device_type == "cuda":
        torch.cuda.empty_cache()
    elif device_type == "mps":
        torch.mps.empty_cache()


def available_bytes() -> int | None:
    """Main memory that this process can still take; None where the system does not tell (not Linux).

    The least of what the machine has free and what the control groups of a container or batch job allow.
    """
    if not sys.platform.startswith("linux"):
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read(_MEMINFO))
    limits = [int(found[1]) * 1024] if found else []
    for folder in _cgroups():
        for most, now in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit, used = _read(folder / most).strip(), _read(folder / now).strip()
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", _read(folder / "memory.stat"), re.M)
            if limit.isdigit() and used.isdigit():
                limits.append(max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0)))
    return min(limits, default=None)


def peak_bytes(work: Callable[[], object]) -> int | None:
    """How much more main memory ``work()`` had at its height than before; None where that cannot be measured."""
    try:
        _CLEAR.write_text("5")  # sets the high-water mark to what is used now
        before = _status("VmRSS")
        work()
        return max(0, _status("VmHWM") - before)
    except (OSError, LookupError):
        return None


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.M)
    if not found:
        raise LookupError(name)
    return int(found[1]) * 1024


def _cgroups() -> list[Path]:
    """The control groups of this process that count memory, of versions 1 and 2, and those above them."""
    folders = []
    for controllers, path in re.findall(r"^\d+:(.*):/(.*)$", _read(Path("/proc/self/cgroup")), re.M):
        root = _CGROUP if not controllers else _CGROUP / "memory"
        if controllers in ("", "memory"):
            here = root / path
            folders += [folder for folder in (here, *here.parents) if folder.is_relative_to(root)]
    return folders


def _read(path: Path) -> str:
    """The text of a file of the system, empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
