"""Decoded images kept from run to run, in one folder for all data, within a limit: see :mod:`ddpmctl.data.entry`.

Features of images lie beside them, under the same limit: see :mod:`ddpmctl.data.features`.

An entry is written beside its place and renamed into it, so that there is no half of one; and whatever is damaged or
cannot be read or written is as if it were not there. The cache never stops a run. No locks: who comes second
replaces the entry, and what somebody still has mapped lives on without a name.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from ddpmctl.data.draft import UNFINISHED, Draft
from ddpmctl.data.entry import (
    FEATURES,
    INDEX,
    About,
    Entry,
    Index,
    files_of,
    name_of_data,
    open_entry,
    read_head,
    read_index,
    remove_entry,
    write_index,
)
from ddpmctl.data.features import About as FeaturesAbout
from ddpmctl.data.features import Features, name_of_features, read_features, read_features_head, write_features
from ddpmctl.data.records import Records
from ddpmctl.errors import ConfigError
from ddpmctl.files import replacing

FOLDER = "DDPMCTL_CACHE"
LIMIT = "DDPMCTL_CACHE_SIZE"
"""Environment variables: where the cache is, and how large it may grow."""
DEFAULT_LIMIT = 20 * 2**30

_INDEX_BYTES = 256  # of one file, about
_ABANDONED_SECONDS = 24 * 3600.0
_ENTRY = re.compile(r"(images|features|shards)-[0-9a-f]{16}-[0-9a-f]{16}")
_UNUSABLE = (OSError, ValueError, LookupError, TypeError, StopIteration)


@dataclass(frozen=True)
class Found:
    """An entry, or what was left of one being written, as it lies in the folder.

    ``used``: seconds since 1970. ``head``: of :func:`read_head`, or :func:`read_features_head`; empty where that fails.
    """

    folder: Path
    bytes: int
    used: float
    head: dict[str, Any]

    @property
    def unfinished(self) -> bool:
        """Whether it is being written, or was when its process was killed."""
        return UNFINISHED.fullmatch(self.folder.name) is not None


def parse_bytes(text: str) -> int:
    """``500M``, ``5G``, ``1.5 TiB``, with units of 1024, as bytes; raises ``ValueError`` for anything else."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d*)?) ?([KMGT]?)(?:I?B)?", text.strip().upper())
    if not match:
        raise ValueError(f"{text!r} is not a size such as 500M or 5G")
    return int(float(match[1]) * 2 ** (10 * "_KMGT".index(match[2] or "_")))


class Cache:
    """The cache in ``folder``, of at most ``limit`` bytes. The folder need not exist."""

    def __init__(self, folder: Path, limit: int = DEFAULT_LIMIT) -> None:
        self.folder, self.limit = folder, limit
        self._read: dict[Path, Index] = {}  # the last one: of a million files it takes a while

    @classmethod
    def of_user(cls) -> Cache | None:
        """The one that the environment asks for, or the system's place for caches; None where there is no home.

        Raises :class:`ConfigError` for a limit that is no size.
        """
        try:
            limit = parse_bytes(os.environ.get(LIMIT) or str(DEFAULT_LIMIT))
        except ValueError as error:
            raise ConfigError(f"{LIMIT}: {error}", "give a number of bytes with K, M, G or T, or unset it") from error
        if os.environ.get(FOLDER):
            return cls(Path(os.path.expanduser(os.environ[FOLDER])).absolute(), limit)  # noqa: PTH111 - never fails
        folder = user_cache_path("ddpmctl")
        return cls(folder, limit) if folder.is_absolute() else None

    def open(self, about: About) -> Entry | None:
        """The entry for ``about``, verified and marked as used; None where there is no good one."""
        folder = self.folder / about.name
        try:
            entry = open_entry(folder, about, self._read.pop(folder, None))
        except FileNotFoundError:
            return None
        except _UNUSABLE:
            remove_entry(folder)
            return None
        with suppress(OSError):  # a cache that may only be read
            os.utime(folder / INDEX)
        return entry

    def records_of(self, root: Path) -> Records | None:
        """What is remembered of the files below ``root`` by the last used of its entries, whatever its settings."""
        ours = [found for found in self.found() if found.folder.name.startswith(name_of_data(root))]
        for found in sorted(ours, key=lambda found: found.used, reverse=True):
            with suppress(*_UNUSABLE):  # damaged: the next may be good
                self._read = {found.folder: read_index(found.folder)}
                return self._read[found.folder][1]
        return None

    def draft(self, about: About, shape: tuple[int, ...]) -> Draft | None:
        """Room for a new entry of up to ``shape`` (N, C, H, W); None where it does not fit or cannot be written.

        Old entries make way for it.
        """
        wanted = math.prod(shape) + shape[0] * _INDEX_BYTES
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if wanted > self.room():
                return None
            self.trim(wanted)
            return Draft(self.folder, about, shape)
        except OSError:
            return None

    def features(self, about: FeaturesAbout) -> Features | None:
        """The features for ``about``, marked as used; None where there are no good ones."""
        folder = self.folder / name_of_features(about)
        try:
            found = read_features(folder, about)
        except FileNotFoundError:
            return None
        except _UNUSABLE:
            remove_entry(folder)
            return None
        with suppress(OSError):
            os.utime(folder / FEATURES)
        return found

    def keep_features(self, about: FeaturesAbout, features: Features) -> None:
        """Keep ``features``, where there is room and it can be written; old entries make way for them."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            if features.nbytes + _INDEX_BYTES <= self.room():
                self.trim(features.nbytes + _INDEX_BYTES)
                write_features(self.folder / name_of_features(about), about, features)

    def room(self) -> int:
        """Bytes that the whole cache may take: the limit, or half of what the disk has for it. Raises ``OSError``."""
        taken = sum(found.bytes for found in self.found())
        return min(self.limit, (shutil.disk_usage(self.folder).free + taken) // 2)

    def trim(self, wanted: int = 0) -> None:
        """Remove what was abandoned, then the least recently used entries until ``wanted`` bytes more have room."""
        with suppress(OSError):  # no folder, no entries
            for found in self.found():
                if found.unfinished and time.time() - found.used > _ABANDONED_SECONDS:
                    remove_entry(found.folder)
            room, everything = self.room(), sorted(self.found(), key=lambda found: found.used)
            taken = sum(found.bytes for found in everything) + wanted
            for found in everything:
                if taken > room and not found.unfinished:
                    remove_entry(found.folder)
                    taken -= found.bytes

    def found(self) -> list[Found]:
        """Everything in the folder that the cache has made, in no order."""
        return list(_find(self.folder))

    def clear(self) -> int:
        """Remove everything that the cache has made and return the bytes freed; strangers' files stay."""
        freed = 0
        for found in self.found():
            remove_entry(found.folder)
            freed += 0 if found.folder.exists() else found.bytes
        return freed


def update(entry: Entry, about: About, records: Records, fingerprint: str) -> None:
    """Remember ``records`` instead, for the same pixels; where that cannot be written, the old ones stay."""
    index = write_index(about, entry.pixels.shape, entry.crc, records, fingerprint)
    with suppress(OSError), replacing(entry.folder / INDEX) as file:
        file.write(index)


def _find(folder: Path) -> Iterator[Found]:
    with suppress(OSError):
        for place in folder.iterdir():
            if not (_ENTRY.fullmatch(place.name) or UNFINISHED.fullmatch(place.name)) or place.is_symlink():
                continue
            with suppress(OSError):  # removed by another process
                size = sum(file.stat().st_size for file in files_of(place))
                used = max(file.stat().st_mtime for file in (place, *files_of(place)))
                yield Found(place, size, used, _head(place))


def _head(place: Path) -> dict[str, Any]:
    try:
        return read_features_head(place) if place.name.startswith("features-") else read_head(place)
    except _UNUSABLE:
        return {}
