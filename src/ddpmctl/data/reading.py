"""Read files in threads, and notice those that change meanwhile."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import chain
from types import TracebackType
from typing import Literal, TypeVar

from ddpmctl.data.decode import quiet
from ddpmctl.data.formats import BadImage, read_file
from ddpmctl.data.pool import ordered_map
from ddpmctl.data.records import Numbers
from ddpmctl.data.scan import ZIP_FAULTS, Listing, because
from ddpmctl.errors import DataError

Result = TypeVar("Result")


def read_map(
    function: Callable[[bytes], Result],
    listing: Listing,
    files: Numbers,
    workers: int | Literal["auto"],
    *,
    together: int = 1,
) -> Generator[Result | BadImage, None, None]:
    """Yield ``function(content)`` of each of ``files``, numbers in ``listing``, in order, or the :class:`BadImage` of it.

    A file that is not as ``listing.stamps`` has it is bad, for what was read may be half old and half new. Without
    files nothing is opened. ``together``: files that a thread takes at a time, for small ones are read faster than
    they are handed over. Raises :class:`DataError` when a zip has gone. Close it when leaving early.
    """
    if not len(files):
        return
    names, stamps = listing.names, listing.stamps

    def one(number: int) -> Result | BadImage:
        try:
            raw = reader.read(names[number])
            if listing.stamp(names[number]) != tuple(stamps[number].tolist()):
                raise BadImage("changed while it was read", lasting=False)
            return function(raw)
        except BadImage as bad:
            return bad

    def work(numbers: Numbers) -> list[Result | BadImage]:
        return [one(number) for number in numbers.tolist()]

    portions = (files[start : start + together] for start in range(0, len(files), together))
    with quiet(), Reader(listing) as reader, closing(ordered_map(work, portions, workers)) as results:
        yield from chain.from_iterable(results)


class Reader:
    """Reads the files of a :class:`Listing`, from several threads at a time. A context manager."""

    def __init__(self, listing: Listing) -> None:
        self._listing = listing
        self._lock = threading.Lock()
        self._archive: zipfile.ZipFile | None = None
        if listing.is_zip:
            try:
                self._archive = zipfile.ZipFile(listing.root)
            except ZIP_FAULTS as error:
                raise DataError(f"{listing.root}: broken zip: {because(error)}", "make it again") from error

    def read(self, name: str) -> bytes:
        """The bytes of one file; raises :class:`BadImage` where that fails."""
        try:
            if self._listing.source is not None:
                return self._listing.source.read(name)
            if self._archive is not None:
                return self._read_member(self._archive, self._listing.members[name])
            return read_file(f"{self._listing.root}/{name}")
        except ZIP_FAULTS as error:
            raise BadImage(because(error), lasting=not isinstance(error, OSError | MemoryError)) from error

    def _read_member(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
        # Opening and closing count references to the shared file handle; reading takes zipfile's own lock.
        with self._lock:
            stream = archive.open(info)
        try:
            # With a size, zipfile unpacks no more than that, even where the declared size is a lie.
            return stream.read(info.file_size)
        finally:
            with self._lock:
                stream.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._archive is not None:
            self._archive.close()
