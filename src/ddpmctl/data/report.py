"""What the images are like: counts for ``inspect``, for the log of a run, and for its warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ddpmctl.config import DataConfig
from ddpmctl.data.headers import Probe
from ddpmctl.data.records import Records
from ddpmctl.data.scan import Listing
from ddpmctl.errors import DataError
from ddpmctl.parsing import shown

FEW_IMAGES = 100
ODD_ASPECT = 3.0

Size = tuple[int, int]
Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""


@dataclass
class DataReport:
    """Counts over the images of one folder or zip. Sizes are (height, width) of the upright image.

    ``enlarged``: smaller than the target in a side, so scaled up (with ``fit: pad``: padded). ``animated``:
    files of several pictures, of which the first is used. ``odd_aspect``: more than 3 times as long as wide.
    ``bad``: (name, reason) of unreadable images. ``ignored``: files that are no images by their name.
    ``headers_only``: images that nobody has decoded, so that more may be bad. Of ``shards`` only the first ``looked_at`` images
    are known by more than their number and class.
    """

    usable: int = 0
    sizes: Counter[Size] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    grey: int = 0
    alpha: int = 0
    animated: int = 0
    odd_aspect: int = 0
    enlarged: int = 0
    ignored: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    headers_only: int = 0
    shards: int = 0
    looked_at: int = 0

    @classmethod
    def of(cls, listing: Listing, records: Records, target: Size | None = None) -> DataReport:
        """Of the files of ``records``, the first of ``listing``, and of what the scan has left out.

        ``target`` is the (height, width) to come, None when unknown.
        """
        report = cls(ignored=listing.ignored, bad=[(shown(name), reason) for name, reason in listing.refused])
        report.bad += [(shown(records.names[number]), reason) for number, reason in sorted(records.reasons.items())]
        good = records.good
        kinds, first, counts = np.unique(records.seen[good], return_index=True, return_counts=True)
        for at in np.argsort(first):  # in the order of the files, which decides between equal counts
            report.add(records.probes[kinds[at]], int(counts[at]), target)
        for group in listing.groups():
            count = int(np.count_nonzero(good[group.start : group.stop]))
            if group.label is not None and count:
                report.classes[group.label] += count
        return report

    @property
    def total(self) -> int:
        """Image files, usable or bad."""
        return self.usable + len(self.bad)

    def add(self, seen: Probe, count: int, target: Size | None) -> None:
        """Count ``count`` usable images of one kind."""
        height, width = seen.size
        self.usable += count
        self.sizes[seen.size] += count
        self.modes[seen.mode] += count
        self.formats[seen.format] += count
        self.grey += count * seen.grey
        self.alpha += count * seen.alpha
        self.animated += count * seen.animated
        self.odd_aspect += count * (max(height, width) > ODD_ASPECT * min(height, width))
        if target is not None:
            self.enlarged += count * (height < target[0] or width < target[1])

    def to_dict(self) -> dict[str, Any]:
        """Plain scalars, lists and dicts, commonest first."""
        return {
            "usable": self.usable,
            **({"shards": self.shards, "looked_at": self.looked_at} if self.shards else {}),
            "sizes": {size_name(size): count for size, count in self.sizes.most_common()},
            "modes": dict(self.modes.most_common()),
            "formats": dict(self.formats.most_common()),
            "classes": dict(sorted(self.classes.items())),
            "grey": self.grey,
            "alpha": self.alpha,
            "animated": self.animated,
            "odd_aspect": self.odd_aspect,
            "enlarged": self.enlarged,
            "ignored": self.ignored,
            "bad": [{"name": name, "reason": reason} for name, reason in self.bad],
        }

    def warnings(
        self,
        *,
        size: Size | None = None,
        channels: int | None = None,
        fit: str = "crop",
        batch_size: int | None = None,
    ) -> list[str]:
        """What a person should know before training, a line each. Arguments: what the images become."""

        def share(count: int, one: str, many: str) -> str:
            of = f"{self.looked_at} images that were looked at" if self.looked_at else f"{self.total} images"
            return f"{count} of {of} {one if count == 1 else many}"

        lines = []
        if self.bad:
            name, reason = self.bad[0]
            what = f"{len(self.bad)} shards or images are damaged" if self.shards else f"{share(len(self.bad), 'is', 'are')} unreadable"
            lines.append(f"{what}, the first: {name}: {reason}")
        if self.headers_only:
            lines.append(f"{share(self.headers_only, 'was', 'were')} known by the header only: training decodes all")
        if self.usable < FEW_IMAGES:
            lines.append(f"{self.usable} images, fewer than {FEW_IMAGES}: the model may memorise them")
        if batch_size is not None and self.usable < batch_size:
            lines.append(f"{self.usable} images, fewer than a batch of {batch_size}: each batch repeats images")
        if self.enlarged and size is not None:
            smaller = f"smaller than {size_name(size)} and"
            fate = "padded" if fit == "pad" else "enlarged"
            lines.append(share(self.enlarged, f"is {smaller} is {fate}", f"are {smaller} are {fate}"))
        if self.odd_aspect and fit != "pad":
            fate = "only the middle is kept" if fit == "crop" else "the proportions are lost"
            shape = f"more than {ODD_ASPECT:g} times as long as wide"
            lines.append(f"{share(self.odd_aspect, 'is', 'are')} {shape}: {fate}")
        if self.animated:
            lines.append(f"{share(self.animated, 'holds', 'hold')} several pictures; the first is used")
        if self.alpha and channels in (1, 3):
            lines.append(f"{share(self.alpha, 'has', 'have')} an alpha channel, filled with data.background")
        return lines


def size_name(size: Size) -> str:
    """``48x64`` for height 48, width 64."""
    return f"{size[0]}x{size[1]}"


def resolve_shape(config: DataConfig, report: DataReport, path: Path) -> tuple[Size, int]:
    """((height, width), channels) that the images become, ``auto`` resolved by ``report``.

    Raises :class:`DataError` when no image is usable, or for ``size: auto`` with images of several sizes.
    """
    if not report.usable:
        raise no_image(report, path)
    channels = config.channels
    if channels == "auto":
        channels = 1 if report.grey == report.usable else 3
    if config.size != "auto":
        return config.size, channels
    if len(report.sizes) > 1:
        common = ", ".join(f"{size_name(size)} ({count})" for size, count in report.sizes.most_common(3))
        raise DataError(
            f"{path}: data.size is auto, but the images have {len(report.sizes)} sizes: {common}"
            + (", ..." if len(report.sizes) > 3 else ""),
            "give --size, such as 64 or 48x64 (height x width)",
        )
    size = next(iter(report.sizes))
    if max(size) > 4096:
        problem = f"{path}: data.size is auto, but the images are {size_name(size)}"
        raise DataError(problem, "give --size, such as 64")
    return size, channels


def no_image(report: DataReport, path: Path) -> DataError:
    """The error for data of which nothing can be read."""
    name, reason = report.bad[0]
    return DataError(
        f"{path}: none of {report.total} images can be read, the first: {name}: {reason}",
        "give images that other programs can open",
    )
