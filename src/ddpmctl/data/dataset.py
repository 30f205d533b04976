"""All images decoded once, as one uint8 tensor in memory or on disk."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ddpmctl.config import DataConfig
from ddpmctl.data.cache import Cache
from ddpmctl.data.decode import Pixels, examine, parse_colour, probe
from ddpmctl.data.draft import Lost
from ddpmctl.data.entry import About
from ddpmctl.data.formats import BadImage
from ddpmctl.data.headers import Probe
from ddpmctl.data.named import whole
from ddpmctl.data.names import read_shards
from ddpmctl.data.pixels import PixelRows
from ddpmctl.data.reading import read_map
from ddpmctl.data.records import Mask, Records, stretches
from ddpmctl.data.report import DataReport, Progress, Size, no_image, resolve_shape
from ddpmctl.data.scan import Listing, find_images
from ddpmctl.data.stream import WITHOUT_CLASSES, Stream, open_stream
from ddpmctl.data.survey import survey
from ddpmctl.errors import DataError
from ddpmctl.parsing import shown

_TOGETHER_BYTES = 2**18
"""Decoded pixels that a thread hands over at a time: one image, or several small ones."""


@dataclass(frozen=True)
class ImageDataset:
    """Decoded images, in the order of their names.

    ``images``: uint8 (N, C, H, W), contiguous. ``labels``: int64 (N,), indices into ``class_names``; None
    unless conditional. ``fingerprint``: sha256 in hex over names and contents of the files used, whatever
    the settings. Of tar shards ``stream`` has the images to train on, and here are but a few, among them those that are
    ``held`` out, int64 (K,).
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    class_names: list[str]
    report: DataReport
    fingerprint: str
    stream: Stream | None = None
    held: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def total(self) -> int:
        """How many images there are, in memory or not."""
        return self.stream.total if self.stream else len(self)

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        return self.images.shape[2], self.images.shape[3]

    @property
    def channels(self) -> int:
        """1 (grey), 3 (RGB) or 4 (RGBA)."""
        return self.images.shape[1]


def load_images(config: DataConfig, path: Path, *, most: int = 0, progress: Progress | None = None) -> ImageDataset:
    """Find every image of ``path`` (a folder, a ``.zip`` or a data set by name) and decode it as ``config`` says, if it is not in the cache.

    Of tar shards only those are decoded that are held out, or ``most`` of all if that is more. ``progress`` is called in this
    thread with (files done, files in all), headers that have to be read first included. Raises :class:`DataError` when there
    are no images, too many are bad (one, with ``on_bad: error``), sizes do not agree for ``size: auto``, or classes are
    missing; :class:`ConfigError` for a bad background or a bad limit of the cache.
    """
    parse_colour(config.background)
    shards = read_shards(whole(path))
    if shards is not None:
        return ImageDataset(*open_stream(config, path, shards, most=most, progress=progress))
    cache = Cache.of_user() if config.cache else None
    listing = find_images(path)
    if config.conditional:
        _check_classes(listing)
    if config.on_bad == "error":
        for name, reason in listing.refused[:1]:
            raise _bad_image(path, name, reason)
    size, channels, rest = _resolve(config, listing, cache, progress)
    try:
        with PixelRows(About.of(config, path, size, channels), listing, cache) as rows:
            kept = rows.unaltered(listing)
            if kept and not (config.on_bad == "error" and kept.records.reasons):
                records, fingerprint = kept.records, kept.fingerprint
                if rest is not None:
                    rest(len(listing), len(listing))
            else:
                records = _decode_all(config, listing, rows, rest)
                fingerprint = records.fingerprint()
            images = rows.finish(records, fingerprint)
    except Lost:
        return load_images(config.model_copy(update={"cache": False}), path, progress=progress)
    report = DataReport.of(listing, records, size)
    if not report.usable:
        raise no_image(report, path)
    if len(report.bad) > config.max_bad * report.total:
        name, reason = report.bad[0]
        raise DataError(
            f"{path}: {len(report.bad)} of {report.total} images are unreadable, the first: {name}: {reason}",
            "repair or remove them, or raise data.max_bad",
        )
    labels, class_names = _labels(listing, records.good) if config.conditional else (None, [])
    return ImageDataset(torch.from_numpy(images), labels, class_names, report, fingerprint)


def _resolve(
    config: DataConfig, listing: Listing, cache: Cache | None, progress: Progress | None
) -> tuple[Size, int, Progress | None]:
    """Size and channels of the images to come, and what is left of the progress. Reads headers where it must."""
    if config.size != "auto" and config.channels != "auto":
        return config.size, config.channels, progress
    first = survey(
        listing,
        workers=config.workers,
        known=cache.records_of(listing.root) if cache else None,
        # one image of colour settles the channels
        enough=None if config.size == "auto" else lambda seen: not seen.grey,
        progress=_half(progress, 0),
    )
    size, channels = resolve_shape(config, first, listing.root)
    return size, channels, _half(progress, len(listing))


class _Decoded(NamedTuple):
    """What came of reading one file: its header, the sha256 of its content and pixels (C, H, W), or why it is bad."""

    seen: Probe | None
    content: bytes | None = None
    pixels: Pixels | None = None
    reason: str = ""


def _decode_all(config: DataConfig, listing: Listing, rows: PixelRows, progress: Progress | None) -> Records:
    """Put every image into ``rows``: what is now known of all files."""
    records, clock = Records.blank(listing.names, listing.stamps), time.time_ns()
    passing = []  # faults that may be gone the next time
    with closing(_decoded(config, listing, rows)) as results:
        for part in stretches(rows.known, rows.longest):
            if rows.old and rows.known[part.start] >= 0:
                records.take(part.start, rows.old.records, rows.known[part])
                if config.on_bad == "error":
                    _refuse(listing, records)
                rows.keep(rows.known[part])
                if progress is not None and part.stop == len(listing):
                    progress(part.stop, len(listing))
                continue
            for number in range(part.start, part.stop):
                found = next(results)
                if isinstance(found, BadImage):
                    passing.append(number)
                    found = _Decoded(None, reason=found.reason)
                records.put(number, found.seen, found.content, found.reason)
                if found.pixels is not None:
                    rows.add(records.contents[number : number + 1], found.pixels[None])
                elif config.on_bad == "error":
                    _refuse(listing, records)
                if progress is not None:
                    progress(number + 1, len(listing))
    records.settle(clock, passing)
    return records


def _decoded(
    config: DataConfig, listing: Listing, rows: PixelRows
) -> Generator[_Decoded | BadImage, None, None]:
    """Read and decode, in threads, what is not known."""
    about = rows.about

    def work(raw: bytes) -> _Decoded:
        try:
            seen, pixels = examine(
                raw, size=about.size, channels=about.channels, fit=config.fit, background=config.background
            )
        except BadImage as bad:
            if not bad.lasting:
                raise
            return _Decoded(_header(raw), reason=bad.reason)
        content = hashlib.sha256(raw).digest()
        return _Decoded(seen, content, np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    # Whatever the files: sixteen photographs at a time are 2 % faster than one by one, for threads wait less for each other.
    together = max(1, min(16, _TOGETHER_BYTES // (about.channels * about.size[0] * about.size[1])))
    return read_map(work, listing, np.flatnonzero(rows.known < 0), config.workers, together=together)


def _header(raw: bytes) -> Probe | None:
    """What the header of a broken image says, as far as it is whole."""
    try:
        return probe(raw)
    except BadImage:
        return None


def _check_classes(listing: Listing) -> None:
    """Every image must lie in a folder of the first level."""
    loose = [group for group in listing.groups() if group.label is None]
    if loose:
        count = sum(group.stop - group.start for group in loose)
        if listing.source:
            raise DataError(f"{listing.root}: {count} of {len(listing)} images have no class", f"train {WITHOUT_CLASSES}")
        raise DataError(
            f"{listing.root}: {count} of {len(listing)} images lie in no class folder, the first: "
            f"{shown(listing.names[loose[0].start])}",
            f"put each class into a folder of its own (rose/1.png, lily/1.png), or train {WITHOUT_CLASSES}",
        )


def _refuse(listing: Listing, records: Records) -> None:
    """Raise :class:`DataError` for the first bad image, if there is one."""
    for number in sorted(records.reasons)[:1]:
        raise _bad_image(listing.root, listing.names[number], records.reasons[number])


def _bad_image(path: Path, name: str, reason: str) -> DataError:
    place = f"{path}: {shown(name)}: {reason}"
    return DataError(place, "repair or remove it, or set data.on_bad=skip")


def _labels(listing: Listing, good: Mask) -> tuple[torch.Tensor, list[str]]:
    """Index of each good image's class, and the names of the classes in order."""
    groups = [(group.label or "", np.count_nonzero(good[group.start : group.stop])) for group in listing.groups()]
    class_names = sorted({label for label, count in groups if count})
    number = {name: index for index, name in enumerate(class_names)}
    labels = np.repeat([number.get(label, -1) for label, _ in groups], [count for _, count in groups])
    return torch.from_numpy(labels.astype(np.int64)), class_names


def _half(progress: Progress | None, ahead: int) -> Progress | None:
    """Progress of one of two passes over the same files."""
    if progress is None:
        return None
    return lambda done, total: progress(ahead + done, 2 * total)
