"""What is known of every file of a data set, a column for each thing: there may be millions of files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ddpmctl.data.headers import Probe
from ddpmctl.data.scan import Stamps

# A change within the same tick of the file system's clock leaves no trace; the coarsest clocks tick every 2 s.
TICK_NS = 2 * 10**9

_HASH_BYTES = 32

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Contents = npt.NDArray[np.uint8]
"""(K, 32), a sha256 for each file."""


@dataclass
class Records:
    """What is known of N files, in the order of their ``names``.

    ``stamps``: int64 (N, 3 or 5), of :class:`Listing`; negative where the file has to be read again. ``seen``: int32
    (N,), which of ``probes`` its header says, -1 where it is unreadable. ``contents``: zeros where the file is bad.
    ``reasons``: why it is bad, by its number; all others are good, and have pixels.
    """

    names: list[str]
    stamps: Stamps
    seen: npt.NDArray[np.int32]
    contents: Contents
    probes: list[Probe] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)

    @classmethod
    def blank(cls, names: list[str], stamps: Stamps) -> Records:
        """Of files of which nothing is known yet."""
        count = len(names)
        return cls(names, stamps, np.full(count, -1, np.int32), np.zeros((count, _HASH_BYTES), np.uint8))

    def __post_init__(self) -> None:
        self._numbers = {probe: number for number, probe in enumerate(self.probes)}

    @property
    def good(self) -> Mask:
        """Which files have pixels: bool (N,)."""
        good = np.ones(len(self.names), dtype=np.bool_)
        good[list(self.reasons)] = False
        return good

    def put(self, number: int, seen: Probe | None, content: bytes | None, reason: str = "") -> None:
        """Note what came of reading file ``number``."""
        if seen is not None:
            self.seen[number] = self._number_of(seen)
        if content is not None:
            self.contents[number] = np.frombuffer(content, dtype=np.uint8)
        if reason:
            self.reasons[number] = reason

    def take(self, start: int, old: Records, places: Numbers) -> None:
        """Files from ``start`` on are those at ``places`` of ``old``."""
        part = slice(start, start + len(places))
        seen = old.seen[places]
        used = np.unique(seen[seen >= 0])
        table = np.full(len(old.probes) + 1, -1, np.int32)  # the last is that of -1
        table[used] = [self._number_of(old.probes[number]) for number in used]
        self.seen[part] = table[seen]
        self.contents[part] = old.contents[places]
        if old.reasons:
            for number, place in enumerate(places.tolist(), start):
                if place in old.reasons:
                    self.reasons[number] = old.reasons[place]

    def first(self, count: int) -> Records:
        """The first ``count`` files."""
        reasons = {number: reason for number, reason in self.reasons.items() if number < count}
        part = slice(count)
        return Records(self.names[part], self.stamps[part], self.seen[part], self.contents[part], self.probes, reasons)

    def settle(self, now_ns: int, passing: list[int]) -> None:
        """Forget the stamps of ``passing`` files, and of those at rest too short a time before ``now_ns``: read them again."""
        self.stamps = np.where(settled(self.stamps, now_ns)[:, None], self.stamps, -1)
        self.stamps[passing] = -1

    def fingerprint(self) -> str:
        """sha256 in hex over names and contents of the good files."""
        digest = hashlib.sha256()
        for number in np.flatnonzero(self.good).tolist():
            name = hashlib.sha256(self.names[number].encode("utf-8", "surrogatepass"))
            digest.update(name.digest() + self.contents[number].tobytes())
        return digest.hexdigest()

    def _number_of(self, probe: Probe) -> int:
        number = self._numbers.setdefault(probe, len(self.probes))
        if number == len(self.probes):
            self.probes.append(probe)
        return number


def settled(stamps: Stamps, now_ns: int) -> Mask:
    """Of which files any later change is going to show in the stamp: bool (N,)."""
    known: Mask = (stamps[:, 0] >= 0) & (stamps[:, 1:3].max(axis=1, initial=0) < now_ns - TICK_NS)
    return known


def places_in(old: Records, names: list[str], stamps: Stamps) -> Numbers:
    """Where each file stands in ``old``, int64 (N,); -1 where it is not there, or now other than it was then."""
    if names == old.names:
        places = np.arange(len(names), dtype=np.int64)
    else:
        number = {name: place for place, name in enumerate(old.names)}
        places = np.array([number.get(name, -1) for name in names], dtype=np.int64)
    if stamps.shape[1] != old.stamps.shape[1] or not len(old.names):
        return np.full(len(names), -1, dtype=np.int64)
    same = (places >= 0) & (stamps[:, 0] >= 0) & (stamps == old.stamps[places]).all(axis=1)
    return np.where(same, places, -1)


def stretches(places: Numbers, longest: int) -> Iterator[slice]:
    """The files in order, cut where known ones (0 and above) begin or end, and into no more than ``longest`` at a time."""
    edges = [0, *(np.flatnonzero(np.diff(places >= 0)) + 1).tolist(), len(places)]
    for start, stop in pairwise(edges):
        for at in range(start, stop, longest):
            yield slice(at, min(at + longest, stop))


def pack(records: Records) -> bytes:
    """All of it as bytes: a line of JSON, then the columns."""
    names = "\0".join(records.names).encode("utf-8", "surrogatepass")
    head = {
        "count": len(records.names),
        "columns": records.stamps.shape[1],
        "probes": records.probes,
        "reasons": list(records.reasons.items()),
    }
    columns = (records.stamps.astype("<i8"), records.seen.astype("<i4"), records.contents)
    return b"".join([json.dumps(head).encode("ascii"), b"\n", *(column.tobytes() for column in columns), names])


def unpack(body: bytes) -> Records:
    """What :func:`pack` made into bytes; raises ``ValueError`` and the like for anything else."""
    line = body.index(b"\n")
    head = json.loads(body[:line])
    at, count, parts = line + 1, head["count"], []
    for width, kind in ((head["columns"], "<i8"), (1, "<i4"), (_HASH_BYTES, "u1")):
        parts.append(np.frombuffer(body, dtype=kind, count=count * width, offset=at).reshape(count, width))
        at += parts[-1].nbytes
    names = body[at:].decode("utf-8", "surrogatepass").split("\0") if count else []
    if len(names) != count:
        raise ValueError("damaged names")
    probes = [Probe(*probe)._replace(size=tuple(probe[1])) for probe in head["probes"]]
    return Records(names, parts[0], parts[1][:, 0], parts[2], probes, dict(head["reasons"]))
