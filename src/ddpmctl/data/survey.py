"""Read what the headers of images say, or decode all of them, for a report."""

from __future__ import annotations

import marshal
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import chain
from typing import Any, Literal

import numpy as np

from ddpmctl.data import headers
from ddpmctl.data.decode import probe
from ddpmctl.data.formats import BadImage
from ddpmctl.data.headers import HEADER_BYTES, Probe, plain_header
from ddpmctl.data.pool import elsewhere, ordered_map
from ddpmctl.data.reading import read_map
from ddpmctl.data.records import Numbers, Records, places_in, stretches
from ddpmctl.data.report import DataReport, Progress, Size
from ddpmctl.data.scan import Listing

_FIRST = 256
_PORTION = 10_000
"""Files for which another process is worth its start. Threads are not: it is all Python, which one at a time can run."""


def survey(
    listing: Listing,
    *,
    target: Size | None = None,
    workers: int | Literal["auto"] = "auto",
    full: bool = False,
    most: int | None = None,
    known: Records | None = None,
    enough: Callable[[Probe], bool] | None = None,
    progress: Progress | None = None,
) -> DataReport:
    """Read the header of every image, or with ``full`` decode it; ``target``: the (height, width) to come.

    Files in ``known`` that have not changed are not opened. ``most``: of more files than these only headers are read after
    all, and the report says of how many. Stops early with an image that is ``enough``.
    Bad images are counted, never raised. Raises :class:`DataError` only when a zip has gone.
    """
    records = Records.blank(listing.names, listing.stamps)
    places = places_in(known, listing.names, listing.stamps) if known else np.full(len(listing), -1)
    unknown = np.flatnonzero(places < 0)
    whole = full and (most is None or len(unknown) <= most)
    done, total = 0, len(listing)
    with closing(_probes(listing, unknown, workers, whole)) as results:
        for part in stretches(places, total):
            if known and places[part.start] >= 0:
                records.take(part.start, known, places[part])
                done = part.stop
                if progress is not None and done == total:
                    progress(done, total)
            for number in range(done, part.stop):
                found = next(results)
                seen, reason = (None, found.reason) if isinstance(found, BadImage) else (found, "")
                records.put(number, seen, None, reason)
                done = number + 1
                if progress is not None:
                    progress(done, total)
                if enough is not None and seen is not None and enough(seen):
                    break
            if enough is not None and any(map(enough, records.probes)):
                break
    if not full:  # a good header is enough
        records.reasons = {number: why for number, why in records.reasons.items() if records.seen[number] < 0}
    report = DataReport.of(listing, records.first(done), target)
    report.headers_only = 0 if whole or not full else len(unknown)
    return report


def _probes(
    listing: Listing, files: Numbers, workers: int | Literal["auto"], whole: bool
) -> Generator[Probe | BadImage, None, None]:
    """What each of ``files`` is, by its header or by ``whole`` of it."""
    if whole:
        return read_map(lambda raw: probe(raw, full=True), listing, files, workers)
    if listing.is_zip or listing.source:
        return read_map(_header, listing, files, workers, together=_FIRST)
    return _glances(listing, files, workers)


def _header(raw: bytes) -> Probe:
    return plain_header(raw[:HEADER_BYTES]) or probe(raw)


def _glances(
    listing: Listing, files: Numbers, workers: int | Literal["auto"]
) -> Generator[Probe | BadImage, None, None]:
    """Headers of ``files`` of a folder: of many by processes, and where they are in doubt by Pillow."""

    def look(numbers: Numbers) -> tuple[Numbers, list[tuple[Any, ...] | None]]:
        request = (str(listing.root), [listing.names[number] for number in numbers.tolist()], listing.stamps[numbers].tolist())
        answer = elsewhere(headers.__file__, *request) if len(files) >= 2 * _PORTION else b""
        return numbers, marshal.loads(answer) if answer else headers.headers_of(*request)

    first, rest = files[:_FIRST], files[_FIRST:]  # a few, with which it may be over
    portions = (rest[start : start + _PORTION] for start in range(0, len(rest), _PORTION))
    with closing(ordered_map(look, portions, workers)) as parts:
        for numbers, found in chain(map(look, [first]), parts):
            doubtful = numbers[[header is None for header in found]]
            with closing(read_map(probe, listing, doubtful, workers)) as probes:
                for header in found:
                    yield Probe(*header) if header else next(probes)
