"""All images decoded once, as one uint8 tensor in memory or on disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ddpmctl.config import DataConfig
from ddpmctl.data.decode import Pixels, Probe, examine, parse_colour, quiet
from ddpmctl.data.formats import BadImage, shown
from ddpmctl.data.pool import ordered_map
from ddpmctl.data.report import DataReport, Progress, Size, no_image, resolve_shape, survey
from ddpmctl.data.scan import ImageFile, Listing, find_images
from ddpmctl.errors import DataError

IN_MEMORY_BYTES = 2 * 2**30
"""Larger sets are kept in an unnamed temporary file and paged in by the system as they are used."""


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
    """Find and decode every image below ``path`` (a folder or ``.zip``) once, as ``config`` says.

    ``progress`` is called in this thread with (files done, files in all), headers that have to be read first
    included. Raises :class:`DataError` when there are no images, too many are bad (one, with
    ``on_bad: error``), sizes do not agree for ``size: auto``, or classes are missing;
    :class:`ConfigError` for a bad background.
    """
    parse_colour(config.background)
    listing = find_images(path)
    if config.conditional:
        _check_classes(listing)
    if config.on_bad == "error":
        for name, reason in listing.refused[:1]:
            raise _bad_image(path, name, reason)
    size: Size
    channels: int
    if config.size != "auto" and config.channels != "auto":
        size, channels, rest = config.size, config.channels, progress
    else:
        first = survey(listing, workers=config.workers, progress=_half(progress, 0))
        (size, channels), rest = resolve_shape(config, first, path), _half(progress, len(listing.files))
    report = DataReport.of(listing)
    kept, images, fingerprint = _decode_all(config, listing, size, channels, report, rest)
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


def _decode_all(
    config: DataConfig,
    listing: Listing,
    size: Size,
    channels: int,
    report: DataReport,
    progress: Progress | None,
) -> tuple[list[ImageFile], Pixels, str]:
    """Decode in threads into one array (N, C, H, W): the files kept, their pixels, the fingerprint."""
    images = _allocate((len(listing.files), channels, *size))
    kept: list[ImageFile] = []
    digest = hashlib.sha256()

    def work(file: ImageFile) -> tuple[Probe, Pixels, bytes] | BadImage:
        try:
            raw = reader.read(file)
            seen, pixels = examine(raw, size=size, channels=channels, fit=config.fit, background=config.background)
        except BadImage as bad:
            return bad
        return seen, pixels, hashlib.sha256(raw).digest()

    with (
        quiet(),
        listing.reader() as reader,
        closing(ordered_map(work, listing.files, config.workers)) as results,
    ):
        for done, (file, result) in enumerate(zip(listing.files, results, strict=True), start=1):
            if isinstance(result, BadImage):
                if config.on_bad == "error":
                    raise _bad_image(listing.root, file.name, result.reason)
                report.bad.append((shown(file.name), result.reason))
            else:
                seen, pixels, content = result
                images[len(kept)] = pixels.transpose(2, 0, 1)
                digest.update(hashlib.sha256(file.name.encode("utf-8", "surrogatepass")).digest() + content)
                report.add(file, seen, size)
                kept.append(file)
            if progress is not None:
                progress(done, len(listing.files))
    return kept, images[: len(kept)], digest.hexdigest()


def _allocate(shape: tuple[int, ...]) -> Pixels:
    """An uninitialised array in memory, or above ``IN_MEMORY_BYTES`` on a file that nobody can name."""
    wanted = int(np.prod(shape, dtype=np.int64))
    if wanted <= IN_MEMORY_BYTES:
        return np.empty(shape, dtype=np.uint8)
    folder = tempfile.gettempdir()
    try:
        if shutil.disk_usage(folder).free < wanted:
            raise OSError("too little room")
        with tempfile.TemporaryFile() as file:
            # Claim the room now: a full disk would otherwise kill the process at some later write.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, wanted)
            return np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
    except OSError as error:
        raise DataError(
            f"{folder}: {wanted / 2**30:.1f} GiB for decoded images: {error.strerror or error}",
            "set TMPDIR to a folder on a larger disk, or use fewer or smaller images",
        ) from error


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
