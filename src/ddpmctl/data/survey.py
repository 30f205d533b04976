"""Read what the headers of images say, or decode all of them, for a report."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Literal

import numpy as np

from ddpmctl.data.decode import Probe, probe
from ddpmctl.data.formats import BadImage
from ddpmctl.data.headers import HEADER_BYTES, plain_header
from ddpmctl.data.pool import worker_count
from ddpmctl.data.reading import read_map
from ddpmctl.data.records import Numbers, Records, places_in, stretches
from ddpmctl.data.report import DataReport, Progress, Size
from ddpmctl.data.scan import Listing

_TOGETHER = 256
_THREADS = 2
"""Of headers eight threads read half as many as two: it is all Python, which one at a time can run."""


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
    threads = min(_THREADS, worker_count(workers))
    return read_map(probe, listing, files, threads, together=_TOGETHER, glance=plain_header, glanced=HEADER_BYTES)
