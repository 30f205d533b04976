"""The samples of a tar, one after the other: what is one is asked of the package ``webdataset``.

The members are read here, for its reader takes in every byte, and damage for the end.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Generator, Iterator
from typing import IO, Any, NamedTuple

from ddpmctl.data.formats import EXTENSIONS, MAX_FILE_BYTES, BadImage
from ddpmctl.parsing import shown

_LONGEST_CLASS = 1000  # bytes
_LONGEST_NOTE, _LARGEST = 2**16, 2**36
"""Bytes of a header in front of another, such as a long name; and of a file in a shard, which may be no image."""
_IN_FRONT = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_NOTES = re.compile(r"__[^/]*__($|/)")


class Sample(NamedTuple):
    """An image of a shard. ``name``: the shard's and its own; ``label``: the text of its ``.cls``, "" where it has none.

    ``size``: bytes of its file; ``read`` gives them, until the next sample is asked for. It raises :class:`BadImage` where they are too
    many, :class:`DataError` where the shard cannot be read.
    """

    name: str
    label: str
    size: int
    read: Callable[[], bytes]


def samples_in(file: IO[bytes], own: str, *, flows: bool) -> Generator[Sample, None, None]:
    """All images of the tar in ``file``, which is called ``own``, in order.

    ``flows``: there is no going back in it, so that what may be of use is read at once. In a file on disk the rest is passed over: an
    index is made of headers alone, and each of several processes reads its own images. Raises ``OSError``, ``EOFError``,
    ``ValueError`` or an error of :mod:`tarfile` or :mod:`zlib` where it cannot be read.
    """
    from webdataset.tariterators import group_by_keys

    with tarfile.open(fileobj=file, mode="r|*" if flows else "r:", tarinfo=_Whole) as tar:
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


def _is_image(name: str) -> bool:
    return f".{name.rpartition('.')[2]}" in EXTENSIONS
