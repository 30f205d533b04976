"""Tar shards as the package ``webdataset`` lays them out: which there are, what is in each, its samples one after the other.

Files of one name but for their endings, one after the other in a shard, are a sample: ``0001.jpg`` with ``0001.cls``, its class.
What is one, and what a pattern of shards means, is asked of the package. The members are read here: its reader takes in every
byte, while in a file on disk what is not wanted is passed over, so that an index is made of headers alone and each of several
processes reads its own images; and its opener would run other programs, for ``pipe:`` any.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ddpmctl.data.cache import Cache
from ddpmctl.data.entry import INDEX, short_digest
from ddpmctl.data.formats import EXTENSIONS, MAX_FILE_BYTES, BadImage
from ddpmctl.data.names import ADDRESS
from ddpmctl.data.pool import ordered_map
from ddpmctl.data.records import TICK_NS
from ddpmctl.data.report import Progress
from ddpmctl.data.scan import because
from ddpmctl.data.stamps import GONE, stamp
from ddpmctl.errors import ConfigError, DataError
from ddpmctl.files import replacing
from ddpmctl.parsing import shown

_FAULTS = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, http.client.HTTPException)
_PAUSES = (1, 3, 10)
"""Seconds before an address is tried again that fell silent."""
_PATIENCE = 60.0
_LONGEST_CLASS = 1000  # bytes
_LONGEST_NOTE, _LARGEST = 2**16, 2**36
"""Bytes of a header in front of another, such as a long name; and of a file in a shard, which may be no image."""
_IN_FRONT = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_NOTES = re.compile(r"__[^/]*__($|/)")
_UNFIT = (OSError, ValueError, LookupError, TypeError)


class Sample(NamedTuple):
    """An image of a shard. ``name``: the shard's and its own; ``label``: the text of its ``.cls``, "" where it has none.

    ``size``: bytes of its file; ``read`` gives them, until the next sample is asked for. It raises :class:`BadImage` where they are too
    many, :class:`DataError` where the shard cannot be read.
    """

    name: str
    label: str
    size: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Shard:
    """What is in the shard at ``place``, a file or an address.

    ``stamp``: another when it is another. ``count``: its images; ``classes``: how many are of each, "" none. ``digest``: of the names and sizes
    of their files, and their classes. ``fault``: why there are no more, "" where all was read.
    """

    place: str
    stamp: list[int | str]
    count: int
    classes: dict[str, int]
    digest: str
    fault: str = ""

    @property
    def name(self) -> str:
        """Without folder or server, and what stands behind a ``?``: signed addresses are renewed, and secret."""
        return _name(self.place)


def places_of(pattern: str) -> list[str]:
    """The shards that ``pattern`` means: ``train-{000..099}.tar``, ``train-*.tar``, a folder or an address, or several of these with ``::`` between.

    Raises :class:`DataError` where there is none, or ``webdataset`` is not installed; :class:`ConfigError` for what is not read.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise DataError(f"{pattern}: needs the package webdataset", "pip install 'ddpmctl[shards]'") from error
    try:
        parts = expand_urls(pattern)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"{pattern}: {because(error)}", "such as train-{000000..000099}.tar") from error
    found: list[str] = []
    for part in parts:
        part = re.sub(r"^(https?):/+", r"\1://", part)  # a path has lost one
        scheme = ADDRESS.match(part)
        if scheme and scheme[0] not in ("http:", "https:"):
            why = "; a run file must not be able to start a program" if scheme[0] == "pipe:" else ""
            raise ConfigError(f"{part}: {scheme[0]} is not read{why}", "give files, or addresses that begin with http: or https:")
        if scheme or Path(part).is_file():
            found.append(part)
        elif Path(part).is_dir():
            found += sorted(map(str, Path(part).glob("*.tar")))
        else:
            found += sorted(glob(part)) if has_magic(part) else [part]  # noqa: PTH207 - a whole path
    if not found:
        raise DataError(f"{pattern}: no shards there", "give files that end in .tar, or a folder of them")
    return found


def index_of(pattern: str, workers: int, cache: Cache | None, progress: Progress | None = None) -> list[Shard]:
    """What is in every shard of ``pattern``: from the ``cache``, or by its headers; shards at an address are read through.

    ``progress`` is told (shards done, in all). Raises :class:`DataError` for shards that are not there.
    """
    places, began = places_of(pattern), time.time_ns()
    gone = [place for place in places if not _is_address(place) and stamp(place) == GONE]
    if gone:
        raise DataError(f"{gone[0]}: no such shard" + (f", nor {len(gone) - 1} more of {len(places)}" if len(gone) > 1 else ""),
                        "give those that are there; a run whose shards have moved goes on by ddpmctl train 'NEW-PLACE/*.tar' --resume --out RUN")  # fmt: skip
    file = cache.folder / f"shards-{short_digest(pattern)}-{short_digest(Path(__file__).read_text('utf-8'))}" / INDEX if cache else None
    known = {shard.place: shard for shard in _kept(file)} if file else {}

    def look(place: str) -> Shard:
        found: list[int | str] = _address_stamp(place) if _is_address(place) else [*stamp(place)]
        return known[place] if place in known and known[place].stamp == found else _read_through(place, found)

    shards = []
    with closing(ordered_map(look, places, workers)) as looked:
        for shard in looked:
            shards.append(shard)
            if progress is not None:
                progress(len(shards), len(places))
    lasting = [shard for shard in shards if not shard.fault and _tells(shard.stamp, began)]
    if file and lasting != list(known.values()):
        _keep(file, pattern, lasting)
    return shards


def samples_of(shard: Shard, start: int = 0) -> Generator[Sample, None, None]:
    """The images of ``shard`` from number ``start`` on, of which the index knows.

    An address that falls silent is tried again. Raises :class:`DataError` where the shard cannot be read, or is another now.
    """
    pauses = iter(_PAUSES if _is_address(shard.place) else ())
    while True:
        try:
            if not _is_address(shard.place) and list(stamp(shard.place))[:2] != shard.stamp[:2]:
                raise ValueError("changed, or gone, since the run looked at it")
            with closing(_samples(shard.place)) as samples:
                for sample in islice(samples, start, shard.count):
                    start += 1
                    yield sample._replace(read=partial(_told, shard.place, sample.read))
            if start < shard.count:
                raise ValueError(f"{start} images, of {shard.count} that were there")
            return
        except _FAULTS as error:
            _wait(pauses, _not_read(shard.place, error), error)


def _wait(pauses: Iterator[float], problem: DataError, error: Exception) -> None:
    """Sleep until what met ``error`` is tried again; raises ``problem`` where that is over, or would not help."""
    pause = next(pauses, None)
    if pause is None or (isinstance(error, urllib.error.HTTPError) and error.code < 500):
        raise problem from error
    time.sleep(pause)


def _told(place: str, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except _FAULTS as error:
        raise _not_read(place, error) from error


def _not_read(place: str, error: Exception, advice: str = "bring it back as it was, and go on with --resume") -> DataError:
    return DataError(f"{place.partition('?')[0] if _is_address(place) else place}: {because(error)}", advice)


def _read_through(place: str, its_stamp: list[int | str]) -> Shard:
    """Count what is in a shard, as far as it can be read."""
    count, classes, digest, fault = 0, Counter[str](), hashlib.sha256(), ""
    try:
        for sample in _samples(place):
            count += 1
            classes[sample.label] += 1
            digest.update(repr((sample.name, sample.size, sample.label)).encode("utf-8", "surrogatepass"))
    except _FAULTS as error:
        fault = because(error)
    return Shard(place, its_stamp, count, dict(classes), digest.hexdigest(), fault)


def _samples(place: str) -> Generator[Sample, None, None]:
    """All images of a shard, in order; raises one of _FAULTS where it cannot be read."""
    from webdataset.tariterators import group_by_keys

    own, flows = _name(place), _is_address(place) or not place.endswith(".tar")  # there is no going back in it
    with (
        urllib.request.urlopen(place, timeout=_PATIENCE) if _is_address(place) else Path(place).open("rb") as file,
        tarfile.open(fileobj=file, mode="r|*" if flows else "r:", tarinfo=_Whole) as tar,
    ):
        members = ({"fname": member.info.name, "data": member, "__url__": own} for member in _members(tar, flows))
        for group in _plainly(group_by_keys(members)):
            endings = [ending for ending in group if _is_image(ending)]
            if endings:
                ending = min(endings, key=lambda ending: ending.count("."))  # 1.jpg rather than 1.mask.png
                label = group["cls"]().decode("utf-8", "replace").strip() if "cls" in group else ""
                name = f"{own}/{group['__key__']}.{ending}"
                yield Sample(shown(name), shown(label), group[ending].info.size, group[ending])


def _plainly(groups: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same; what ``webdataset`` raises holds all that it was given, beside its words."""
    try:
        yield from groups
    except ValueError as error:
        raise ValueError(str(error.args[0]).partition(" dict_keys")[0] if error.args else "not a shard") from error


def _members(tar: tarfile.TarFile, flows: bool) -> Iterator[_Member]:
    """The files of a tar, but for those that ``webdataset`` leaves out, too."""
    while (info := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # or it would remember all
        if info.isreg() and not _NOTES.match(info.name):
            yield _Member(tar, info, now=flows)


class _Member:
    """A file of a tar: called, it gives its bytes. ``now``: they are read at once, where they may be of use."""

    def __init__(self, tar: tarfile.TarFile, info: tarfile.TarInfo, now: bool) -> None:
        self.tar, self.info = tar, info
        name = info.name.rpartition("/")[2].lower()
        self.most = _LONGEST_CLASS if name.endswith(".cls") else MAX_FILE_BYTES
        fits = info.size <= self.most and (name.endswith(".cls") or _is_image(name))
        self.raw = _content(tar, info) if now and fits else None

    def __call__(self) -> bytes:
        if self.info.size > self.most:
            if self.most == MAX_FILE_BYTES:
                raise BadImage(f"more than {self.most // 2**20} MiB")
            return b""  # no class is that long
        return _content(self.tar, self.info) if self.raw is None else self.raw


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    assert file is not None  # it is a regular one
    return file.read()


class _Whole(tarfile.TarInfo):
    """Takes a header that is damaged, or missing at the end, for what it is: tarfile would take it for the end.

    So it does with sizes that no file of a shard has: below 0 tarfile reads the same header for ever, and of headers in front of a header
    it takes in as many bytes as they say.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Whole:
        found = super().frombuf(buf, encoding, errors)
        if found.size > (_LONGEST_NOTE if found.type in _IN_FRONT else _LARGEST):
            raise tarfile.ReadError(f"damaged: a header says {found.size:,} bytes")
        return found

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Whole:
        try:
            found = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except (tarfile.HeaderError, RecursionError, OverflowError) as error:
            raise tarfile.ReadError(f"cut short or damaged: {error}") from error
        if not 0 <= found.size <= _LARGEST:  # headers in front can say another size
            raise tarfile.ReadError(f"damaged: a header says {found.size:,} bytes")
        return found


def _name(place: str) -> str:
    """Of a shard, without what is around it."""
    return Path(urlsplit(place).path if _is_address(place) else place).name


def _is_image(name: str) -> bool:
    return f".{name.rpartition('.')[2]}" in EXTENSIONS


def _is_address(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _address_stamp(place: str) -> list[int | str]:
    """Raises :class:`DataError` where there is no answer, after a few times: a shard less would be other data."""
    pauses = iter(_PAUSES)
    while True:
        try:
            with urllib.request.urlopen(place, timeout=_PATIENCE) as answer:  # HEAD is not allowed everywhere
                return [answer.headers.get(key, "") for key in ("Content-Length", "Last-Modified", "ETag")]
        except _FAULTS as error:
            _wait(pauses, _not_read(place, error, "see to the address and the network"), error)


def _tells(its_stamp: list[int | str], began: int) -> bool:
    """Whether a shard that changes from now on is going to have another stamp."""
    if isinstance(its_stamp[0], str):
        return any(its_stamp[1:])
    return max(int(part) for part in its_stamp[1:]) < began - TICK_NS


def _kept(file: Path) -> list[Shard]:
    """What :func:`_keep` wrote; nothing where it is damaged."""
    with suppress(*_UNFIT):
        checksum, _, body = file.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode("ascii") == checksum:
            return [Shard(**shard) for shard in json.loads(body.partition(b"\n")[2])]
    return []


def _keep(file: Path, pattern: str, shards: list[Shard]) -> None:
    head = {"root": f"shards:{pattern}", "shape": [sum(shard.count for shard in shards), 0, 0, 0], "fit": "index"}
    body = f"{json.dumps(head)}\n{json.dumps([asdict(shard) for shard in shards])}".encode("ascii")
    with suppress(OSError), replacing(file) as out:
        out.write(hashlib.sha256(body).hexdigest().encode("ascii") + b"\n" + body)
