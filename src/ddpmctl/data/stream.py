"""Images of tar shards that are never all in memory: which come when, and how a few of them are had at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from threading import Event
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from ddpmctl.config import MOST_HELD_OUT, DataConfig
from ddpmctl.core.noise import derived_generator
from ddpmctl.data.addresses import NEVER
from ddpmctl.data.cache import Cache
from ddpmctl.data.decode import Pixels, decode, parse_colour, probe, quiet
from ddpmctl.data.formats import BadImage
from ddpmctl.data.headers import Probe
from ddpmctl.data.pool import ordered_map, worker_count
from ddpmctl.data.report import DataReport, Progress, Size, no_image, resolve_shape
from ddpmctl.data.shards import Shard, index_of, samples_of
from ddpmctl.data.tar import Sample
from ddpmctl.errors import DataError

BLOCK_BYTES = 2**28
"""Decoded pixels of the images that are mixed with each other, at most; there are two such blocks at a time."""

LOOKED_AT = 32
"""Images by which a size and channels left open are settled, spread over the shards."""

WITHOUT_CLASSES = "with data.conditional=false and model.label_dropout=0"
"""How to train on images of no class, whatever a run file says of classes."""

_TOGETHER, _TOGETHER_BYTES, _AHEAD = 16, 2**18, 2

T = TypeVar("T")


class Decoded(NamedTuple):
    """An image of a shard: its class, "" for none, and what came of it, or why nothing did."""

    name: str
    label: str
    pixels: Pixels | None
    reason: str = ""


@dataclass(frozen=True)
class Stream:
    """The images of ``shards`` but for the first ``held`` of each, as they come in training.

    ``size``: (height, width). ``class_names``: of labels, empty unless conditional. ``config``: what becomes of each image.
    """

    shards: list[Shard]
    held: list[int]
    size: Size
    channels: int
    class_names: list[str]
    config: DataConfig

    def __len__(self) -> int:
        return self.total - sum(self.held)

    @property
    def total(self) -> int:
        """All images, held out or not."""
        return sum(shard.count for shard in self.shards)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.channels, *self.size)

    @property
    def block(self) -> int:
        """How many images that come one after the other are mixed."""
        return max(1, min(self.config.shuffle, _most_in_memory(self.shape)))

    def samples(self, seed: int, epoch: int, start: int = 0, stop: Event = NEVER) -> Generator[Sample, None, None]:
        """The images of an epoch from place ``start`` on: shard by shard, which come in an order that follows from (seed, epoch).

        ``stop`` and what is raised: as of :func:`samples_of`.
        """
        for number in torch.randperm(len(self.shards), generator=derived_generator(seed, "shards", epoch)).tolist():
            shard, held = self.shards[number], self.held[number]
            if start < shard.count - held:
                yield from samples_of(shard, held + start, stop)
            start = max(0, start - (shard.count - held))

    def decoded(self, samples: Iterable[Sample]) -> Generator[Decoded, None, None]:
        """``samples`` as they are trained on, pixels (C, H, W), in order: read one by one, decoded by ``config.workers`` threads."""
        config = self.config

        def work(raw: bytes) -> Pixels:
            found = decode(raw, size=self.size, channels=self.channels, fit=config.fit, background=config.background)
            return np.ascontiguousarray(found.transpose(2, 0, 1))

        for name, label, found in _worked(work, samples, worker_count(config.workers)):
            yield Decoded(name, label, None, found) if isinstance(found, str) else Decoded(name, label, found)

    def number_of(self, label: str) -> int:
        """Number of a class; 0 without classes."""
        return self._numbers[label] if self.class_names else 0

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.class_names)}


class Opened(NamedTuple):
    """What is known of shards before any of their images is trained on, as :class:`ImageDataset` has it.

    ``images``: those held out, which ``held`` numbers, and with ``most`` others.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    class_names: list[str]
    report: DataReport
    fingerprint: str
    stream: Stream
    held: torch.Tensor


def open_stream(
    config: DataConfig, path: Path, pattern: str, *, most: int = 0, progress: Progress | None = None
) -> Opened:
    """Index the shards of ``pattern``, which ``path`` means, settle what is left open, and decode what is held out, or ``most`` images if that is more.

    Raises :class:`DataError` as :func:`load_images` does, and where shards are damaged or missing.
    """
    parse_colour(config.background)
    shards = index_of(pattern, worker_count(config.workers), Cache.of_user() if config.cache else None, progress)
    _judge(config, path, faults_of(shards), len(shards), "shards are damaged")
    report, seen = look(shards)
    if not report.usable:
        raise DataError(f"{path}: no image in {len(shards)} shards", "a sample is an image (0001.jpg), with or without a class (0001.cls)")
    if not report.looked_at:
        raise no_image(report, path)
    class_names = _class_names(path, shards) if config.conditional else []
    size, channels = resolve_shape(config, replace(report, usable=report.looked_at), path)
    report.enlarged = sum(one.size[0] < size[0] or one.size[1] < size[1] for one in seen)
    counts = [shard.count for shard in shards]
    share = min(int(sum(counts) * config.holdout), MOST_HELD_OUT, _most_in_memory((channels, *size)))
    stream = Stream(shards, spread(share, counts), size, channels, class_names, config)
    first = [max(pair) for pair in zip(stream.held, spread(min(most, sum(counts)), counts), strict=True)]
    good, held, bad = _decode_first(stream, first, progress)
    _judge(config, path, bad, sum(first), "images are unreadable")
    report.bad = list(dict([*report.bad, *bad]).items())
    digest = hashlib.sha256("".join(f"{shard.name}\0{shard.digest}\n" for shard in shards).encode("utf-8", "surrogatepass"))
    return Opened(
        torch.stack([torch.from_numpy(image.pixels) for image in good]) if good else torch.empty((0, *stream.shape), dtype=torch.uint8),
        torch.tensor([stream.number_of(image.label) for image in good], dtype=torch.int64) if config.conditional else None,
        class_names, report, digest.hexdigest(), stream, torch.tensor(held, dtype=torch.int64),
    )  # fmt: skip


def _decode_first(
    stream: Stream, first: Sequence[int], progress: Progress | None
) -> tuple[list[Decoded], list[int], list[tuple[str, str]]]:
    """The ``first`` so many images of each shard: the good ones, which of these are held out, and the bad ones and why."""
    good, held, bad = list[Decoded](), list[int](), list[tuple[str, str]]()
    flags = chain.from_iterable([place < part for place in range(count)] for part, count in zip(stream.held, first, strict=True))
    with quiet(), closing(stream.decoded(first_of(stream.shards, first))) as decoded:
        for image, is_held in zip(decoded, flags, strict=True):
            if image.pixels is None:
                bad.append((image.name, image.reason))
                continue
            held += [len(good)] if is_held else []
            good.append(image)
            if progress is not None:
                progress(len(good), sum(first))
    return good, held, bad


def faults_of(shards: Sequence[Shard]) -> list[tuple[str, str]]:
    """The damaged ones and why."""
    return [(shard.name, f"{shard.fault}; {shard.count} images of it are used") for shard in shards if shard.fault]


def look(shards: Sequence[Shard]) -> tuple[DataReport, list[Probe]]:
    """What ``shards`` hold, by their index and by :data:`LOOKED_AT` of their images, and what those are."""
    counts = [shard.count for shard in shards]
    report, seen = DataReport(bad=faults_of(shards), shards=len(shards)), list[Probe]()
    with quiet():
        for name, _, found in _worked(lambda raw: probe(raw, full=True), first_of(shards, spread(min(LOOKED_AT, sum(counts)), counts)), 1):
            if isinstance(found, str):
                report.bad.append((name, found))
                continue
            seen.append(found)
            report.add(found, 1, None)
    report.looked_at, report.usable = len(seen), sum(counts)
    for shard in shards:
        report.classes.update({label: count for label, count in shard.classes.items() if label})
    return report, seen


def spread(n: int, counts: Sequence[int]) -> list[int]:
    """How many of the first images of each shard make ``n``, so that every shard has its share: follows from ``counts``."""
    upto = np.cumsum([0, *counts], dtype=np.int64)
    parts: list[int] = np.diff(upto * n // max(1, int(upto[-1]))).tolist()
    return parts


def first_of(shards: Sequence[Shard], counts: Sequence[int]) -> Iterator[Sample]:
    """The first so many images of each shard."""
    for shard, count in zip(shards, counts, strict=True):
        if count:
            with closing(samples_of(shard)) as samples:
                yield from islice(samples, count)


def _worked(
    function: Callable[[bytes], T], samples: Iterable[Sample], threads: int
) -> Generator[tuple[str, str, T | str], None, None]:
    """Name, label and ``function(bytes)`` of each sample in order, or why that failed; a few are read ahead."""
    def portions() -> Iterator[list[tuple[str, str, bytes | BadImage]]]:
        part, size = [], 0
        for sample in samples:
            try:
                raw: bytes | BadImage = sample.read()
            except BadImage as bad:
                raw = bad
            part.append((sample.name, sample.label, raw))
            size += sample.size
            if len(part) == _TOGETHER or size >= _TOGETHER_BYTES:
                yield part
                part, size = [], 0
        yield part

    def work(part: list[tuple[str, str, bytes | BadImage]]) -> list[tuple[str, str, T | str]]:
        return [(name, label, one(raw)) for name, label, raw in part]

    def one(raw: bytes | BadImage) -> T | str:
        try:
            if isinstance(raw, BadImage):
                raise raw
            return function(raw)
        except BadImage as bad:
            return bad.reason

    with closing(ordered_map(work, portions(), threads, ahead=_AHEAD)) as results:
        yield from chain.from_iterable(results)


def _class_names(path: Path, shards: Sequence[Shard]) -> list[str]:
    """By the alphabet; numbers in order. Raises :class:`DataError` where an image has no class."""
    without = [shard for shard in shards if shard.classes.get("")]
    if without:
        count = sum(shard.classes[""] for shard in without)
        raise DataError(f"{path}: {count:,} of {sum(shard.count for shard in shards):,} images have no class, the first in {without[0].name}",
                        f"put a .cls beside each image (0001.jpg, 0001.cls), or train {WITHOUT_CLASSES}")  # fmt: skip
    names = {name for shard in shards for name in shard.classes}
    return sorted(names, key=lambda name: (int(name), name)) if all(name.isdecimal() for name in names) else sorted(names)


def _judge(config: DataConfig, path: Path, bad: Sequence[tuple[str, str]], total: int, what: str) -> None:
    """Raise :class:`DataError` where more of ``total`` are bad than may be."""
    if bad and (config.on_bad == "error" or len(bad) > config.max_bad * total):
        name, reason = bad[0]
        raise DataError(f"{path}: {len(bad)} of {total} {what}, the first: {name}: {reason}",
                        "repair or remove them, or set data.on_bad=skip and raise data.max_bad")  # fmt: skip


def _most_in_memory(shape: tuple[int, int, int]) -> int:
    return BLOCK_BYTES // (shape[0] * shape[1] * shape[2])
