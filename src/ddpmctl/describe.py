"""Numbers as people read them: counts, times, memory, devices and data in a few words."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ddpmctl.data.report import DataReport


def count_text(n: float) -> str:
    """``1,234``, ``12.3 k``, ``35.7 M``, ``12.1 G``."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= max(limit, 1e4):
            return f"{n / limit:.3g} {suffix}"
    return f"{n:,.0f}"


def time_text(seconds: float) -> str:
    """``48 s``, ``6 min 10 s``, ``3 h 50 min``, ``2 d 4 h``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {total % 60} s" if minutes else f"{total} s"


def data_lines(report: DataReport) -> str:
    """What the images are, in a line: count, sizes, classes."""
    sizes = report.sizes.most_common(2)
    text = f"{report.usable:,} images"
    if report.shards:
        text += f" in {report.shards:,} shards, {report.looked_at} that were looked at"
    if sizes:
        (height, width), _ = sizes[0]
        text += f" of {height}x{width}" if len(sizes) == 1 else f" of many sizes (most often {height}x{width})"
    if report.classes:
        one, many = ("class", "classes") if report.shards else ("class folder", "class folders")
        text += f" in {len(report.classes)} {many if len(report.classes) > 1 else one}"
    if report.bad:
        text += f", {len(report.bad):,} unreadable"
    return text


def device_text(device: torch.device) -> str:
    """The device and what is behind it."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def memory_text(device: torch.device) -> str:
    """Most memory used so far: of the GPU where there is one, and of the process."""
    import torch

    parts = []
    if device.type == "cuda":
        parts.append(f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}")
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        parts.append(f"{peak / 2**30:.2f} GiB of main memory")
    return ", ".join(parts) or "not known on this system"
