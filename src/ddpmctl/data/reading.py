"""Read files in threads, and notice those that change meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Literal, TypeVar

from ddpmctl.data.decode import quiet
from ddpmctl.data.formats import BadImage
from ddpmctl.data.pool import ordered_map
from ddpmctl.data.scan import ImageFile, Listing

Result = TypeVar("Result")


def read_map(
    function: Callable[[bytes], Result], listing: Listing, files: Sequence[ImageFile], workers: int | Literal["auto"]
) -> Generator[Result | BadImage, None, None]:
    """Yield ``function(content)`` of each of ``files`` in order, or the :class:`BadImage` that came of it.

    A file that is not as ``listing.stamps`` has it is bad, for what was read may be half old and half new. Without
    files nothing is opened. Raises :class:`DataError` when a zip has gone. Close it when leaving early.
    """
    if not files:
        return
    stamps = listing.stamps

    def work(file: ImageFile) -> Result | BadImage:
        try:
            raw = reader.read(file)
            if listing.stamp(file) != stamps[file.name]:
                raise BadImage("changed while it was read", lasting=False)
            return function(raw)
        except BadImage as bad:
            return bad

    with quiet(), listing.reader() as reader, closing(ordered_map(work, files, workers)) as results:
        yield from results
