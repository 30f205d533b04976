"""All images decoded once, as one uint8 tensor in memory or on disk."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from ddpmctl.config import DataConfig
from ddpmctl.data.cache import Cache
from ddpmctl.data.decode import Pixels, Probe, examine, parse_colour, probe
from ddpmctl.data.draft import Lost
from ddpmctl.data.entry import About, Record, Records, settled, unchanged
from ddpmctl.data.formats import BadImage
from ddpmctl.data.pixels import PixelRows
from ddpmctl.data.reading import read_map
from ddpmctl.data.report import DataReport, Progress, Size, no_image, resolve_shape, survey
from ddpmctl.data.scan import ImageFile, Listing, find_images
from ddpmctl.errors import DataError
from ddpmctl.parsing import shown


@dataclass(frozen=True)
class ImageDataset:
    """Decoded images, in the order of their names.

    ``images``: uint8 (N, C, H, W), contiguous. ``labels``: int64 (N,), indices into ``class_names``; None
    unless conditional. ``fingerprint``: sha256 in hex over names and contents of the files used, whatever
    the settings.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    class_names: list[str]
    report: DataReport
    fingerprint: str

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        return self.images.shape[2], self.images.shape[3]

    @property
    def channels(self) -> int:
        """1 (grey), 3 (RGB) or 4 (RGBA)."""
        return self.images.shape[1]


def load_images(config: DataConfig, path: Path, *, progress: Progress | None = None) -> ImageDataset:
    """Find every image below ``path`` (a folder or ``.zip``) and decode it as ``config`` says, if it is not in the cache.

    ``progress`` is called in this thread with (files done, files in all), headers that have to be read first
    included. Raises :class:`DataError` when there are no images, too many are bad (one, with
    ``on_bad: error``), sizes do not agree for ``size: auto``, or classes are missing;
    :class:`ConfigError` for a bad background or a bad limit of the cache.
    """
    parse_colour(config.background)
    cache = Cache.of_user() if config.cache else None
    listing = find_images(path)
    if config.conditional:
        _check_classes(listing)
    if config.on_bad == "error":
        for name, reason in listing.refused[:1]:
            raise _bad_image(path, name, reason)
    stamps = listing.stamps  # before anything is read
    size, channels, rest = _resolve(config, listing, cache, progress)
    report = DataReport.of(listing)
    try:
        with PixelRows(About.of(config, path, size, channels), stamps, cache) as rows:
            kept, records, fingerprint = _decode_all(config, listing, rows, report, rest)
            images = rows.finish(records)
    except Lost:
        return load_images(config.model_copy(update={"cache": False}), path, progress=progress)
    if not kept:
        raise no_image(report, path)
    if len(report.bad) > config.max_bad * report.total:
        name, reason = report.bad[0]
        raise DataError(
            f"{path}: {len(report.bad)} of {report.total} images are unreadable, the first: {name}: {reason}",
            "repair or remove them, or raise data.max_bad",
        )
    labels, class_names = _labels(kept) if config.conditional else (None, [])
    return ImageDataset(torch.from_numpy(images), labels, class_names, report, fingerprint)


def _resolve(
    config: DataConfig, listing: Listing, cache: Cache | None, progress: Progress | None
) -> tuple[Size, int, Progress | None]:
    """Size and channels of the images to come, and what is left of the progress. Reads headers where it must."""
    if config.size != "auto" and config.channels != "auto":
        return config.size, config.channels, progress
    records = unchanged(cache.records_of(listing.root), listing.stamps) if cache else {}

    def colour(so_far: DataReport) -> bool:
        return so_far.grey < so_far.usable

    first = survey(
        listing,
        workers=config.workers,
        known={name: record.seen or BadImage(record.reason) for name, record in records.items()},
        enough=None if config.size == "auto" else colour,  # one image of colour settles the channels
        progress=_half(progress, 0),
    )
    size, channels = resolve_shape(config, first, listing.root)
    return size, channels, _half(progress, len(listing.files))


def _decode_all(
    config: DataConfig, listing: Listing, rows: PixelRows, report: DataReport, progress: Progress | None
) -> tuple[list[ImageFile], Records, str]:
    """Put every image into ``rows`` and ``report``: the files kept, what is now known of all, the fingerprint."""
    kept: list[ImageFile] = []
    records: Records = {}
    digest = hashlib.sha256()
    with closing(_each(config, listing, rows)) as results:
        for done, (file, record, pixels) in enumerate(results, start=1):
            if record.seen is None or pixels is None:
                if config.on_bad == "error":
                    raise _bad_image(listing.root, file.name, record.reason)
                report.bad.append((shown(file.name), record.reason))
            else:
                report.add(file, record.seen, rows.about.size)
                record = record._replace(row=rows.add(record.content, pixels))
                name = hashlib.sha256(file.name.encode("utf-8", "surrogatepass"))
                digest.update(name.digest() + bytes.fromhex(record.content))
                kept.append(file)
            records[file.name] = record
            if progress is not None and (file.name not in rows.known or done == len(listing.files)):
                progress(done, len(listing.files))
    return kept, records, digest.hexdigest()


def _each(
    config: DataConfig, listing: Listing, rows: PixelRows
) -> Generator[tuple[ImageFile, Record, Pixels | None], None, None]:
    """What is known of each file and, of a usable image, its pixels (C, H, W): remembered, or decoded in threads."""
    about, clock = rows.about, time.time_ns()

    def work(raw: bytes) -> tuple[Record, Pixels | None]:
        try:
            seen, pixels = examine(
                raw, size=about.size, channels=about.channels, fit=config.fit, background=config.background
            )
        except BadImage as bad:
            if not bad.lasting:
                raise
            return Record("", _header(raw), "", bad.reason, -1), None
        return Record("", seen, hashlib.sha256(raw).hexdigest(), "", -1), pixels.transpose(2, 0, 1)

    unknown = [file for file in listing.files if file.name not in rows.known]
    with closing(read_map(work, listing, unknown, config.workers)) as results:
        for file in listing.files:
            if file.name in rows.known:
                record = rows.known[file.name]
                yield file, record, rows.remembered(record)
                continue
            found = next(results)
            if isinstance(found, BadImage):
                yield file, Record("", None, "", found.reason, -1), None
            else:
                stamp = listing.stamps[file.name]
                yield file, found[0]._replace(stamp=stamp if settled(stamp, clock) else ""), found[1]


def _header(raw: bytes) -> Probe | None:
    """What the header of a broken image says, as far as it is whole."""
    try:
        return probe(raw)
    except BadImage:
        return None


def _check_classes(listing: Listing) -> None:
    """Every image must lie in a folder of the first level."""
    loose = [file.name for file in listing.files if file.label is None]
    if loose:
        raise DataError(
            f"{listing.root}: {len(loose)} of {len(listing.files)} images lie in no class folder, the first: "
            f"{shown(loose[0])}",
            "put each class into a folder of its own (rose/1.png, lily/1.png), or set data.conditional=false",
        )


def _bad_image(path: Path, name: str, reason: str) -> DataError:
    place = f"{path}: {shown(name)}: {reason}"
    return DataError(place, "repair or remove it, or set data.on_bad=skip")


def _labels(kept: list[ImageFile]) -> tuple[torch.Tensor, list[str]]:
    """Index of each image's class, and the names of the classes in order."""
    names = [file.label or "" for file in kept]
    class_names = sorted(set(names))
    number = {name: index for index, name in enumerate(class_names)}
    return torch.tensor([number[name] for name in names], dtype=torch.int64), class_names


def _half(progress: Progress | None, ahead: int) -> Progress | None:
    """Progress of one of two passes over the same files."""
    if progress is None:
        return None
    return lambda done, total: progress(ahead + done, 2 * total)
