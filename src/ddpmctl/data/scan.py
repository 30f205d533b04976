"""Find the images of a folder, a ``.zip``, or a data set by name."""

from __future__ import annotations

import os
import re
import stat
import struct
import zipfile
import zlib
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from operator import le
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ddpmctl.data.formats import EXTENSIONS, MAX_FILE_BYTES
from ddpmctl.data.named import Members, find_named
from ddpmctl.data.names import read_name
from ddpmctl.data.pool import worker_count
from ddpmctl.data.stamper import Stamper
from ddpmctl.data.stamps import COLUMNS, Stamp, stamp
from ddpmctl.errors import DataError
from ddpmctl.parsing import shown

Stamps = npt.NDArray[np.int64]
"""A row for each file, of its :data:`Stamp`."""

# A member that unpacks to more than this many times its packed size is refused, unless it is small anyway.
_MAX_RATIO = 250
_SMALL = 4 * 2**20
_CLUTTER = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN"})
ZIP_FAULTS = (
    OSError, EOFError, RuntimeError, ValueError, LookupError, ArithmeticError, MemoryError,
    zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip
_GIVE_IMAGES = "give a folder or a .zip of images (png, jpg, webp, tif, bmp, gif, ...)"


class Group(NamedTuple):
    """Files ``start`` to ``stop`` of a listing lie in one folder of the first level, ``label``, or all at the top: None."""

    start: int
    stop: int
    label: str | None


@dataclass(frozen=True)
class Listing:
    """The image files below ``root`` (a folder or a ``.zip``): posix paths below it, sorted. There may be millions.

    Or the images of ``source``, a data set that ``root`` names. ``stamps``: the :meth:`stamp` of every file, int64 (N, 3),
    of a zip (N, 5), of a source 3 or 4, taken once, before anything is read.
    ``ignored`` counts files that are no images by their ending, hidden files and hidden folders; ``refused``
    are (name, reason) of images that cannot safely be read.
    """

    root: Path
    is_zip: bool
    names: list[str]
    stamps: Stamps
    ignored: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    members: dict[str, zipfile.ZipInfo] = field(default_factory=dict, repr=False)
    source: Members | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def stamp(self, name: str) -> Stamp:
        """What is another when the file is; opens nothing. A member of a zip has the stamp of the zip, its checksum and size."""
        if self.source:
            return self.source.stamp(name)
        if self.is_zip:
            return _member_stamp(stamp(str(self.root)), self.members[name])
        return stamp(f"{self.root}/{name}")

    def groups(self) -> Iterator[Group]:
        """The files by their first folder level, in order; those of one folder stand together, since names are sorted."""
        start = 0
        while start < len(self.names):
            top, slash, _ = self.names[start].partition("/")
            if slash:  # "0" comes after "/"
                stop = bisect_left(self.names, f"{top}0", start)
            else:
                stop = next((i for i, name in enumerate(islice(self.names, start, None), start) if "/" in name), len(self))
            yield Group(start, stop, shown(top) if slash else None)
            start = stop


def find_images(path: Path) -> Listing:
    """List the images below ``path``, or of the data set that it names.

    Raises :class:`DataError` when it is missing, neither a folder nor a readable zip, or holds no image.
    """
    if read_name(path):
        source = find_named(path)
        return Listing(path, False, source.names, np.array([source.stamp(name) for name in source.names], dtype=np.int64), source=source)
    try:
        kind = path.stat().st_mode
    except OSError as error:
        raise DataError(f"{path}: {because(error)}", _GIVE_IMAGES) from error
    if stat.S_ISDIR(kind):
        listing = _scan_folder(path)
    elif stat.S_ISREG(kind) and (path.suffix.lower() == ".zip" or zipfile.is_zipfile(path)):
        listing = _scan_zip(path)
    else:
        raise DataError(f"{path}: neither a folder nor a .zip", _GIVE_IMAGES)
    if not listing.names:
        first = [f"; {shown(name)}: {reason}" for name, reason in listing.refused[:1]]
        others = f" ({listing.ignored} other files)" if listing.ignored else ""
        tars = next(path.glob("*.tar"), None) if path.is_dir() else None
        raise DataError(f"{path}: no image found{others}{''.join(first)}", f"for tar shards name them: '{path}/*.tar'" if tars else _GIVE_IMAGES)
    return listing


def _scan_folder(root: Path) -> Listing:
    names: list[str] = []
    refused: list[tuple[str, str]] = []
    ignored, stamper = 0, Stamper(str(root), worker_count("auto"))
    for here, found in _walk(root):
        if isinstance(found, str):
            refused += [(here, found)] if found else []
            ignored += not found
            continue
        names += found.images
        stamper.add(found.images)
        refused += found.refused
        ignored += found.ignored
    stamps = np.frombuffer(stamper.finish(), dtype=np.int64).reshape(-1, COLUMNS)
    if not all(map(le, names, islice(names, 1, None))):
        order = sorted(range(len(names)), key=names.__getitem__)
        names, stamps = [names[number] for number in order], stamps[order]
    return Listing(root, False, names, stamps, ignored, sorted(refused))


class _Folder:
    """What lies in one folder, ``here`` below ``root``; names are whole. Raises ``OSError``.

    ``folders`` and ``links``: what to enter, real or through a link. ``ignored``: how many are no images by their name.
    """

    def __init__(self, root: Path, here: str) -> None:
        self.here, self.prefix = here, f"{here}/" if here else ""
        self.images: list[str] = []
        self.folders: list[str] = []
        self.links: list[str] = []
        self.refused: list[tuple[str, str]] = []
        self.ignored = 0
        self._is_image: dict[str, bool] = {}  # by the ending, of which there are few
        files = []
        with os.scandir(root / here) as entries:
            for entry in entries:  # in few lines, for there may be a million
                if entry.is_file(follow_symlinks=False):
                    files.append(entry.name)
                else:
                    self._odd(entry)
        images = [self.prefix + name for name in files if self._named_as_image(name)]
        self.images += images
        self.ignored += len(files) - len(images)
        for names in (self.images, self.folders, self.links):
            names.sort()

    def _odd(self, entry: os.DirEntry[str]) -> None:
        """A folder, a link, or what is neither that nor a file."""
        name, named_as_image = self.prefix + entry.name, self._named_as_image(entry.name)
        try:
            if entry.is_dir() and not _is_clutter(entry.name):
                (self.links if entry.is_symlink() else self.folders).append(name)
                return
            fault = "" if entry.is_file() else "not a regular file"
        except OSError as error:  # a link to itself
            fault = because(error)
        if not named_as_image:
            self.ignored += 1
        elif fault:
            self.refused.append((name, fault))
        else:
            self.images.append(name)

    def _named_as_image(self, name: str) -> bool:
        dot = name.rfind(".")
        ending = name[dot:]
        known = self._is_image.get(ending)
        if known is None:
            known = self._is_image[ending] = _is_image_name(f"x{ending}")
        return known and dot > 0 and name[0] != "."


def _walk(root: Path) -> Iterator[tuple[str, _Folder | str]]:
    """``root`` and the folders below it, and what lies in each, or why it is not entered: "" for that of a run.

    Linked folders come last and each real folder is entered once, so that a loop of links ends and a name
    goes through a link only where there is no other way to the file.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        here = folders.pop() if folders else links.pop()
        try:
            place = (root / here).stat()
            if (place.st_dev, place.st_ino) in seen:
                continue
            seen.add((place.st_dev, place.st_ino))
            if here and _is_run(root / here):
                yield here, ""
                continue
            found = _Folder(root, here)
        except OSError as error:
            if not here:
                raise DataError(f"{root}: {because(error)}", _GIVE_IMAGES) from error
            yield here, because(error)
            continue
        yield here, found
        folders += reversed(found.folders)
        links += reversed(found.links)


def _is_run(folder: Path) -> bool:
    """A run that trains on the folder it lies in must not feed on its own samples."""
    return (folder / "run.yaml").exists() and (folder / "checkpoints").exists()


def _scan_zip(path: Path) -> Listing:
    whole = stamp(str(path))
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except ZIP_FAULTS as error:
        raise DataError(f"{path}: broken zip: {because(error)}", "make or download it again") from error
    members: dict[str, zipfile.ZipInfo] = {}
    refused: dict[str, str] = {}
    ignored = 0
    for info in infos:
        name = info.filename.replace("\\", "/")
        if name.endswith("/"):
            continue
        if not _is_image_name(name):
            ignored += 1
        elif fault := _member_fault(name, info):
            refused[name] = fault
        else:
            members["/".join(part for part in name.split("/") if part not in ("", "."))] = info
    members = _without_shared_folder(members)
    names = sorted(members)
    stamps = np.array([_member_stamp(whole, members[name]) for name in names], dtype=np.int64)
    return Listing(path, True, names, stamps, ignored, sorted(refused.items()), members)


def _member_stamp(whole: Stamp, member: zipfile.ZipInfo) -> Stamp:
    return (*whole, member.CRC, member.file_size)


def _member_fault(name: str, info: zipfile.ZipInfo) -> str:
    """Why a zip member is refused, or "". Sizes are the declared ones; reading stops there too."""
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "absolute path in the zip"
    if ".." in name.split("/"):
        return "path with .. in the zip"
    if info.flag_bits & 0x1:
        return "encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"packed with zip method {info.compress_type}; only deflate is read"
    if info.file_size > MAX_FILE_BYTES:
        return f"{info.file_size / 2**20:.0f} MiB, more than {MAX_FILE_BYTES // 2**20} MiB"
    if info.file_size > _SMALL and info.file_size > _MAX_RATIO * max(info.compress_size, 1):
        return "unpacks to an absurd size"
    return ""


def _without_shared_folder(members: dict[str, zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Drop top folders that all files share, as in ``flowers/rose/1.png``, not the level above the files."""
    while members:
        tops = {name.partition("/")[0] for name in members if "/" in name}
        inside = all("/" in name for name in members)
        if len(tops) != 1 or not inside or all(name.count("/") == 1 for name in members):
            break
        members = {name.partition("/")[2]: info for name, info in members.items()}
    return members


def _is_clutter(part: str) -> bool:
    return part in _CLUTTER or (part.startswith(".") and part not in (".", ".."))


def _is_image_name(name: str) -> bool:
    parts = name.split("/")
    stem, _, ending = parts[-1].rpartition(".")
    return bool(stem) and f".{ending.lower()}" in EXTENSIONS and not any(map(_is_clutter, parts))


def because(error: BaseException) -> str:
    """A short reason: what the system says, without the path that it may repeat."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return shown(text.splitlines()[0][:120])
