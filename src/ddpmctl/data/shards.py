"""Tar shards as the package ``webdataset`` lays them out: which there are, what is in each, and its samples from anywhere on.

Files of one name but for their endings, one after the other in a shard, are a sample: ``0001.jpg`` with ``0001.cls``, its class.
What is one, and what a pattern of shards means, is asked of the package. They are opened here: its opener would run other
programs, for ``pipe:`` any.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from threading import Event
from urllib.parse import urlsplit

from ddpmctl.data import tar
from ddpmctl.data.addresses import NEVER, Answer, ChangedError, is_address, opened, pause, pauses
from ddpmctl.data.cache import Cache
from ddpmctl.data.entry import INDEX, short_digest
from ddpmctl.data.names import ADDRESS, patterns_of
from ddpmctl.data.pool import ordered_map
from ddpmctl.data.records import TICK_NS
from ddpmctl.data.report import Progress
from ddpmctl.data.scan import because
from ddpmctl.data.stamps import GONE, stamp
from ddpmctl.data.tar import Sample, samples_in
from ddpmctl.errors import ConfigError, DataError
from ddpmctl.files import replacing

_FAULTS = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, http.client.HTTPException)
_UNFIT = (OSError, ValueError, LookupError, TypeError)


@dataclass(frozen=True)
class Shard:
    """What is in the shard at ``place``, a file or an address.

    ``stamp``: another when it is another, as far as a server tells. ``count``: its images; ``classes``: how many are of each, "" none. ``digest``: of the names and sizes
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
        return Path(urlsplit(self.place).path if is_address(self.place) else self.place).name


def places_of(pattern: str) -> list[str]:
    """The shards that ``pattern`` means: ``train-{000..099}.tar``, ``train-*.tar``, a folder or an address, or several of these with ``::`` between.

    Raises :class:`DataError` where there is none, or ``webdataset`` is not installed; :class:`ConfigError` for what is not read.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise DataError(f"{pattern}: needs the package webdataset", "pip install 'ddpmctl[shards]'") from error
    try:
        # What it takes for the border of two patterns is part of an IPv6 host here.
        expanded = [part for each in patterns_of(pattern) for part in expand_urls(each.replace("::", ":\0:"))]
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"{pattern}: {because(error)}", "such as train-{000000..000099}.tar") from error
    found: list[str] = []
    for part in expanded:
        part = re.sub(r"^(https?):/+", r"\1://", part.replace("\0", ""))  # a Path has lost one
        scheme = ADDRESS.match(part)
        if scheme and scheme[0] not in ("http:", "https:"):
            why = "; a run file must not be able to start a program" if scheme[0] == "pipe:" else ""
            raise ConfigError(f"{part}: {scheme[0]} is not read{why}", "give files, or addresses that begin with http: or https:")
        if re.match(r"https?://[^/?#]*@", part):
            shown = re.sub(r"//[^/?#]*@", "//", part).partition("?")[0]
            raise ConfigError(f"{shown}: an address with a name or password before @ is not read", "give one without, such as a signed one")
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
    gone = [place for place in places if not is_address(place) and stamp(place) == GONE]
    if gone:
        raise DataError(f"{gone[0]}: no such shard" + (f", nor {len(gone) - 1} more of {len(places)}" if len(gone) > 1 else ""),
                        "give those that are there; a run whose shards have moved goes on by ddpmctl train 'NEW-PLACE/*.tar' --resume --out RUN")  # fmt: skip
    code = short_digest("".join(Path(str(module)).read_text("utf-8") for module in (__file__, tar.__file__)))
    file = cache.folder / f"shards-{short_digest(pattern)}-{code}" / INDEX if cache else None
    known = {shard.place: shard for shard in _kept(file)} if file else {}
    stop = Event()

    def look(place: str) -> Shard:
        found = _stamp(place, stop)
        return known[place] if place in known and known[place].stamp == found else _read_through(place, found, stop)

    shards = []
    with closing(ordered_map(look, places, workers, at_end=stop.set)) as looked:
        for shard in looked:
            shards.append(shard)
            if progress is not None:
                progress(len(shards), len(places))
    lasting = [shard for shard in shards if not shard.fault and _tells(shard.stamp, began)]
    if file and lasting != list(known.values()):
        _keep(file, pattern, lasting)
    return shards


def samples_of(shard: Shard, start: int = 0, stop: Event = NEVER) -> Generator[Sample, None, None]:
    """The images of ``shard`` from number ``start`` on, of which the index knows.

    An address that falls silent is tried again. Raises :class:`DataError` where the shard cannot be read, or is another now;
    ``CancelledError`` when it is told to ``stop`` while it waits for a server.
    """
    waits = pauses(shard.place)
    while True:
        try:
            if not is_address(shard.place) and list(stamp(shard.place))[:2] != shard.stamp[:2]:
                raise ChangedError("changed, or gone, since the run looked at it")
            with closing(_samples(shard, stop)) as samples:
                for sample in islice(samples, start, shard.count):
                    start += 1
                    yield sample._replace(read=partial(_told, shard.place, sample.read))
            if start < shard.count:
                raise ValueError(f"{start} images, of {shard.count} that were there")
            return
        except _FAULTS as error:
            pause(waits, _not_read(shard.place, error), error, stop)


def _told(place: str, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except _FAULTS as error:
        raise _not_read(place, error) from error


def _not_read(place: str, error: Exception, advice: str = "bring it back as it was, and go on with --resume") -> DataError:
    return DataError(f"{place.partition('?')[0] if is_address(place) else place}: {because(error)}", advice)


def _stamp(place: str, stop: Event) -> list[int | str]:
    """The stamp of a file, or what a server says of one.

    Raises :class:`DataError` where there is no answer, after a few times: a shard less would be other data.
    """
    waits = pauses(place)
    while is_address(place):
        try:
            with Answer(place, stop) as answer:  # HEAD is not allowed everywhere
                return [*answer.marks]
        except _FAULTS as error:
            pause(waits, _not_read(place, error, "see to the address and the network"), error, stop)
    return [*stamp(place)]


def _read_through(place: str, its_stamp: list[int | str], stop: Event) -> Shard:
    """Count what is in a shard, as far as it can be read."""
    count, classes, digest, fault = 0, Counter[str](), hashlib.sha256(), ""
    try:
        for sample in _samples(Shard(place, its_stamp, 0, {}, ""), stop):
            count += 1
            classes[sample.label] += 1
            digest.update(repr((sample.name, sample.size, sample.label)).encode("utf-8", "surrogatepass"))
    except _FAULTS as error:
        fault = because(error)
    return Shard(place, its_stamp, count, dict(classes), digest.hexdigest(), fault)


def _samples(shard: Shard, stop: Event) -> Generator[Sample, None, None]:
    """All images of a shard, in order; raises one of _FAULTS where it cannot be read."""
    far = is_address(shard.place)
    with opened(shard.place, shard.stamp, stop) if far else Path(shard.place).open("rb") as file:
        yield from samples_in(file, shard.name, flows=far or not shard.place.endswith(".tar"))


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
