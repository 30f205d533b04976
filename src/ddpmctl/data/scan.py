"""Find the image files of a folder or ``.zip``, and read their bytes."""

from __future__ import annotations

import os
import re
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType

from ddpmctl.data.formats import EXTENSIONS, MAX_FILE_BYTES, BadImage
from ddpmctl.errors import DataError
from ddpmctl.parsing import shown

# A member that unpacks to more than this many times its packed size is refused, unless it is small anyway.
_MAX_RATIO = 250
_SMALL = 4 * 2**20
_CLUTTER = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN"})
_FAULTS = (
    OSError, EOFError, RuntimeError, ValueError, LookupError, ArithmeticError, MemoryError,
    zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip
_GIVE_IMAGES = "give a folder or a .zip of images (png, jpg, webp, tif, bmp, gif, ...)"


@dataclass(frozen=True)
class ImageFile:
    """``name``: posix path below the root. ``label``: its first folder level, None at the top."""

    name: str
    label: str | None


@dataclass(frozen=True)
class Listing:
    """The image files below ``root`` (a folder or a ``.zip``), sorted by name.

    ``ignored`` counts files that are no images by their ending, hidden files and hidden folders; ``refused``
    are (name, reason) of images that cannot safely be read.
    """

    root: Path
    is_zip: bool
    files: list[ImageFile]
    ignored: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    members: dict[str, zipfile.ZipInfo] = field(default_factory=dict, repr=False)

    def reader(self) -> Reader:
        """Open for reading; raises :class:`DataError` when the zip is gone."""
        return Reader(self)

    @cached_property
    def stamps(self) -> dict[str, str]:
        """The :meth:`stamp` of every file by name, taken once: ask for it before reading anything."""
        return {file.name: self.stamp(file) for file in self.files}

    def stamp(self, file: ImageFile) -> str:
        """What is another when the file is: size and times of change in ns, "" when it has gone. Opens nothing.

        The second time is that of the last change of anything, which no program can set back: a file may be
        replaced by one of the same size and date. A member of a zip has the stamp of the zip, its checksum and size.
        """
        try:
            # twice as fast as pathlib, and there may be a million of them
            found = os.stat(self.root if self.is_zip else f"{self.root}/{file.name}")  # noqa: PTH116
        except OSError:
            return ""
        stamp = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
        if not self.is_zip:
            return stamp
        member = self.members[file.name]
        return f"{stamp} {member.CRC} {member.file_size}"


def find_images(path: Path) -> Listing:
    """List the images below ``path``.

    Raises :class:`DataError` when it is missing, neither a folder nor a readable zip, or holds no image.
    """
    try:
        kind = path.stat().st_mode
    except OSError as error:
        raise DataError(f"{path}: {_because(error)}", _GIVE_IMAGES) from error
    if stat.S_ISDIR(kind):
        listing = _scan_folder(path)
    elif stat.S_ISREG(kind) and (path.suffix.lower() == ".zip" or zipfile.is_zipfile(path)):
        listing = _scan_zip(path)
    else:
        raise DataError(f"{path}: neither a folder nor a .zip", _GIVE_IMAGES)
    if not listing.files:
        first = [f"; {shown(name)}: {reason}" for name, reason in listing.refused[:1]]
        others = f" ({listing.ignored} other files)" if listing.ignored else ""
        raise DataError(f"{path}: no image found{others}{''.join(first)}", _GIVE_IMAGES)
    return listing


def _scan_folder(root: Path) -> Listing:
    files: list[ImageFile] = []
    refused: list[tuple[str, str]] = []
    ignored = 0
    for name, fault in _walk(root):
        if fault:
            refused.append((name, fault))
        elif _is_image_name(name):
            files.append(_image_file(name))
        else:
            ignored += 1
    return Listing(root, False, sorted(files, key=lambda file: file.name), ignored, sorted(refused))


def _walk(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (posix name, fault or "") of files and of folders that are not entered: hidden, unreadable, or a run's.

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
            with os.scandir(root / here) as found:
                entries = sorted(found, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            if not here:
                raise DataError(f"{root}: {_because(error)}", _GIVE_IMAGES) from error
            yield here, _because(error)
            continue
        if here and {"run.yaml", "checkpoints"} <= {entry.name for entry in entries}:
            yield here, ""  # a run that trains on the folder it lies in must not feed on its own samples
            continue
        for entry in entries:
            name = f"{here}/{entry.name}" if here else entry.name
            fault = _entry_fault(entry)
            if fault is None:
                (links if entry.is_symlink() else folders).append(name)
            else:
                yield name, fault if _is_image_name(name) else ""


def _entry_fault(entry: os.DirEntry[str]) -> str | None:
    """None for a folder to enter, "" for a file, else why a thing with the name of an image is none."""
    try:
        if entry.is_dir() and not _is_clutter(entry.name):
            return None
        return "" if entry.is_file() else "not a regular file"
    except OSError as error:  # a link to itself
        return _because(error)


def _scan_zip(path: Path) -> Listing:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except _FAULTS as error:
        raise DataError(f"{path}: broken zip: {_because(error)}", "make or download it again") from error
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
    files = [_image_file(name) for name in sorted(members)]
    return Listing(path, True, files, ignored, sorted(refused.items()), members)


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


def _image_file(name: str) -> ImageFile:
    top, slash, _ = name.partition("/")
    return ImageFile(name, shown(top) if slash else None)


def _is_clutter(part: str) -> bool:
    return part in _CLUTTER or (part.startswith(".") and part not in (".", ".."))


def _is_image_name(name: str) -> bool:
    parts = name.split("/")
    stem, _, ending = parts[-1].rpartition(".")
    return bool(stem) and f".{ending.lower()}" in EXTENSIONS and not any(map(_is_clutter, parts))


def _because(error: BaseException) -> str:
    """A short reason: what the system says, without the path that it may repeat."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return shown(text.splitlines()[0][:120])


class Reader:
    """Reads the files of a :class:`Listing`, from several threads at a time. A context manager."""

    def __init__(self, listing: Listing) -> None:
        self._listing = listing
        self._lock = threading.Lock()
        self._archive: zipfile.ZipFile | None = None
        if listing.is_zip:
            try:
                self._archive = zipfile.ZipFile(listing.root)
            except _FAULTS as error:
                raise DataError(f"{listing.root}: broken zip: {_because(error)}", "make it again") from error

    def read(self, file: ImageFile) -> bytes:
        """The bytes of one file; raises :class:`BadImage` when it has vanished or cannot be unpacked."""
        try:
            if self._archive is not None:
                return self._read_member(self._archive, self._listing.members[file.name])
            with (self._listing.root / file.name).open("rb") as stream:
                data = stream.read(MAX_FILE_BYTES + 1)
        except _FAULTS as error:
            raise BadImage(_because(error), lasting=not isinstance(error, OSError | MemoryError)) from error
        if len(data) > MAX_FILE_BYTES:
            raise BadImage(f"more than {MAX_FILE_BYTES // 2**20} MiB")
        return data

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
