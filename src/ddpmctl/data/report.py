"""What the images are like: counts for ``inspect``, for the log of a run, and for its warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ddpmctl.config import DataConfig
from ddpmctl.data.decode import Probe, probe
from ddpmctl.data.formats import BadImage
from ddpmctl.data.reading import read_map
from ddpmctl.data.scan import ImageFile, Listing
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

    @classmethod
    def of(cls, listing: Listing) -> DataReport:
        """An empty report that knows what the scan has left out."""
        return cls(ignored=listing.ignored, bad=[(shown(name), reason) for name, reason in listing.refused])

    @property
    def total(self) -> int:
        """Image files, usable or bad."""
        return self.usable + len(self.bad)

    def add(self, file: ImageFile, seen: Probe, target: Size | None) -> None:
        """Count one usable image; ``target`` is the (height, width) to come, None when unknown."""
        height, width = seen.size
        self.usable += 1
        self.sizes[seen.size] += 1
        self.modes[seen.mode] += 1
        self.formats[seen.format] += 1
        if file.label is not None:
            self.classes[file.label] += 1
        self.grey += seen.grey
        self.alpha += seen.alpha
        self.animated += seen.animated
        self.odd_aspect += max(height, width) > ODD_ASPECT * min(height, width)
        if target is not None:
            self.enlarged += height < target[0] or width < target[1]

    def to_dict(self) -> dict[str, Any]:
        """Plain scalars, lists and dicts, commonest first."""
        return {
            "usable": self.usable,
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
            return f"{count} of {self.total} images {one if count == 1 else many}"

        lines = []
        if self.bad:
            name, reason = self.bad[0]
            lines.append(f"{share(len(self.bad), 'is', 'are')} unreadable, the first: {name}: {reason}")
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


def survey(
    listing: Listing,
    *,
    target: Size | None = None,
    workers: int | Literal["auto"] = "auto",
    full: bool = False,
    known: Mapping[str, Probe | BadImage] | None = None,
    enough: Callable[[DataReport], bool] | None = None,
    progress: Progress | None = None,
) -> DataReport:
    """Read the header of every image, or with ``full`` decode it; ``target``: the (height, width) to come.

    Files in ``known`` are not opened, for their header is there. Stops early when the report so far is ``enough``.
    Bad images are counted, never raised. Raises :class:`DataError` only when a zip has gone.
    """
    report, known = DataReport.of(listing), known or {}
    unknown = [file for file in listing.files if file.name not in known]
    with closing(read_map(lambda raw: probe(raw, full=full), listing, unknown, workers)) as results:
        for done, file in enumerate(listing.files, start=1):
            seen = known[file.name] if file.name in known else next(results)
            if isinstance(seen, BadImage):
                report.bad.append((shown(file.name), seen.reason))
            else:
                report.add(file, seen, target)
            if progress is not None and (file.name not in known or done == len(listing.files)):
                progress(done, len(listing.files))
            if enough is not None and enough(report):
                break
    return report


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
