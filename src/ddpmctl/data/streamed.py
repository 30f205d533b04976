"""Batches of images that are streamed: blocks of them are decoded ahead, in a thread, each in an order of its own."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain, islice
from threading import Event
from typing import NamedTuple

import torch

from ddpmctl.core.noise import derived_generator
from ddpmctl.data.batches import StepBatches
from ddpmctl.data.decode import hushed
from ddpmctl.data.stream import Decoded, Stream
from ddpmctl.data.tar import Sample
from ddpmctl.errors import DataError
from ddpmctl.stopping import Interrupted

_FEW = 1000
"""Images from which on their share of bad ones counts, or an epoch if that is fewer: of ten, one bad one says little."""

_LOOK_EVERY = 0.2
"""Seconds between two looks whether the run is to stop."""


class Key(NamedTuple):
    """Block ``number`` of an epoch, as far as it is of the numbers ``start`` to ``stop`` of batches."""

    epoch: int
    number: int
    start: int
    stop: int


class Block(NamedTuple):
    """Decoded images: ``pixels[rows[i]]`` is what comes at place i of the block. ``rows`` int64 (M,), -1 for those of other processes.

    ``bad``: name and reason of those that could not be decoded, by their number in the block as the shards have it.
    """

    rows: torch.Tensor
    pixels: torch.Tensor
    labels: torch.Tensor
    bad: dict[int, tuple[str, str]]


@dataclass
class _Job:
    """A block that is being read, until it is told to ``stop``, or has been."""

    future: Future[Block]
    stop: Event


class StreamedBatches(StepBatches):
    """Batches of a :class:`Stream`, of which an epoch is cut into blocks of ``stream.block`` images.

    The order within a block is a permutation that follows from (seed, epoch, block). While one block is used the next is read
    and decoded: never more of them are in memory, and of these only the rows of the ``part`` that is asked for. In place of an
    image that cannot be decoded comes the next good one of its block, in the order of the shards; ``bad`` has its name and the
    reason. Raises :class:`DataError` for a shard that cannot be read, and for too many bad images: of a part of a batch only
    when the news of all processes are taken in.
    """

    def __init__(self, stream: Stream, batch_size: int, seed: int, hflip: bool = False) -> None:
        super().__init__(len(stream), batch_size, seed, hflip)
        self.stream = stream
        self._seen = self._failed = 0
        self._counted = (-1, -1)  # epoch and number of the last block of which these are
        self._jobs: dict[Key, _Job] = {}
        self._closed = Event()
        self._thread: ThreadPoolExecutor | None = None
        self._hushed = ExitStack()
        self._reading: tuple[int, int, Generator[Sample, None, None]] | None = None  # epoch, the place that comes next, what gives it

    def pixels(self, step: int, part: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As every :class:`StepBatches`."""
        own = range(self.batch_size)[part]
        number, end = (step - 1) * self.batch_size, step * self.batch_size
        pixels, labels = [], []
        while number < end:  # through all of the batch, so that every process comes to the same blocks at the same step
            epoch, place = divmod(number, self.count)
            block = self._block(Key(epoch, place // self.stream.block, own.start, own.stop))
            rows = block.rows[place % self.stream.block :][: end - number]
            number += len(rows)
            rows = rows[rows >= 0]
            pixels.append(block.pixels[rows])
            labels.append(block.labels[rows])
        if len(own) == self.batch_size and (news := self.news()):  # this process is alone
            self.take([news])
        return torch.cat(pixels), torch.cat(labels) if self.stream.class_names else None

    def close(self) -> None:
        """End the thread, at the next image that it comes to, or at once where it waits for a server."""
        self._drop(set())
        self._closed.set()
        if self._thread:
            self._thread.shutdown()
            self._thread = None
        self._leave()
        self._hushed.close()

    def _block(self, key: Key) -> Block:
        """The block, waited for where it is not there yet, until a stop is asked for; the one after it begins to be read."""
        last = (key.number + 1) * self.stream.block >= self.count
        following = key._replace(epoch=key.epoch + 1, number=0) if last else key._replace(number=key.number + 1)
        self._drop({key, following})
        job = self._begun(key)
        while not wait([job.future], _LOOK_EVERY).done:
            if self.asked():
                raise Interrupted
        block = job.future.result()
        self._begun(following)
        if key[:2] > self._counted:  # or it is read once more: for the first step after its trial, or after a rollback
            self._counted = key[:2]
            self._seen += len(block.rows)  # each is decoded by one process at least
            self._unsaid.update({(key.epoch, key.number, image): bad for image, bad in block.bad.items()})
        return block

    def _drop(self, needed: set[Key]) -> None:
        for key in self._jobs.keys() - needed:
            job = self._jobs.pop(key)
            job.stop.set()
            job.future.cancel()

    def _begun(self, key: Key) -> _Job:
        if self._thread is None:
            self._hushed.enter_context(hushed())
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="blocks")
        if key not in self._jobs:
            stop = Event()
            self._jobs[key] = _Job(self._thread.submit(self._read, key, stop), stop)
        return self._jobs[key]

    def _judge(self, bad: list[tuple[str, str]]) -> None:
        self._failed += len(bad)
        config = self.stream.config
        if bad and (config.on_bad == "error" or self._failed > config.max_bad * max(self._seen, min(self.count, _FEW))):
            name, reason = bad[0]
            raise DataError(f"{name}: {reason}; {self._failed:,} of {self._seen:,} images that were come to are unreadable",
                            "repair or remove them, or set data.on_bad=skip and raise data.max_bad")  # fmt: skip

    # All below runs in the thread.

    def _read(self, key: Key, stop: Event) -> Block:
        """Read the samples of a block and decode those that are needed; raises ``CancelledError`` when told to ``stop``."""
        first = key.number * self.stream.block
        n = min(self.stream.block, self.count - first)
        # Which image of the block, as the shards have them, comes at each place.
        order = torch.randperm(n, generator=derived_generator(self.seed, "block", key.epoch, key.number))
        within = (key.epoch * self.count + first + torch.arange(n)) % self.batch_size
        own = order[(key.start <= within) & (within < key.stop)]
        rows = torch.full((n,), -1)
        rows[(key.start <= within) & (within < key.stop)] = torch.arange(len(own))
        pixels = torch.empty((len(own), *self.stream.shape), dtype=torch.uint8)
        labels = torch.empty(len(own), dtype=torch.int64)

        row_of = {image: row for row, image in enumerate(own.tolist())}
        found: dict[int, Decoded] = {}
        samples, needed = self._samples(key.epoch, first, n), set(row_of)
        while needed:
            for image, decoded in self._decoded(samples, needed, stop):
                row = row_of.get(image)
                if row is not None and decoded.pixels is not None:
                    pixels[row] = torch.from_numpy(decoded.pixels)
                    decoded = decoded._replace(pixels=pixels[row].numpy())
                found[image] = decoded
            needed = {other for image in row_of if (other := _good(found, image, n)) not in found}
            # Once more, for those that take the place of bad ones.
            samples = islice(self.stream.samples(self.seed, key.epoch, first, self._closed), max(needed, default=-1) + 1)
        for image, row in row_of.items():
            decoded = found[_good(found, image, n)]
            labels[row] = self.stream.number_of(decoded.label)
            if found[image].pixels is None:
                pixels[row] = torch.from_numpy(decoded.pixels)
        bad = {image: (decoded.name, decoded.reason) for image, decoded in found.items() if decoded.pixels is None}
        return Block(rows, pixels, labels, bad)

    def _decoded(self, samples: Iterator[Sample], needed: set[int], stop: Event) -> Iterator[tuple[int, Decoded]]:
        """The ``needed`` of ``samples``, by their number; the others are passed over."""

        def chosen() -> Iterator[Sample]:
            for number, sample in enumerate(samples):
                if stop.is_set():
                    raise CancelledError
                if number in needed:
                    yield sample

        with closing(self.stream.decoded(chosen())) as decoded:
            yield from zip(sorted(needed), decoded, strict=True)

    def _samples(self, epoch: int, start: int, n: int) -> Iterator[Sample]:
        """``n`` images of an epoch from place ``start`` on: where the last block ended, its shard is still open."""
        if self._reading is None or self._reading[:2] != (epoch, start):
            self._leave()
            self._reading = (epoch, start, self.stream.samples(self.seed, epoch, start, self._closed))
        samples = self._reading[2]
        for done in range(n):
            sample = next(samples)
            self._reading = (epoch, start + done + 1, samples)
            yield sample

    def _leave(self) -> None:
        if self._reading:
            self._reading[2].close()
            self._reading = None


def _good(found: dict[int, Decoded], image: int, n: int) -> int:
    """The first of ``image`` and those after it in a block of ``n``, then from its start, that is good or not yet ``found``."""
    for other in chain(range(image, n), range(image)):
        if other not in found or found[other].pixels is not None:
            return other
    raise DataError(f"{found[image].name}: {found[image].reason}; none of the {n:,} images of its block can be read",
                    "repair or remove them, or give a larger data.shuffle")  # fmt: skip
