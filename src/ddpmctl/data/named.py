"""Data sets by name in place of a folder: ``torchvision:CIFAR10``, ``hf:nelorth/oxford-flowers``.

:func:`find_named` makes a :class:`Members` of one, which gives each image a name and the bytes of an image file; from there
on all is as with a folder. Classes are the first level of the names, as there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_data_path

from ddpmctl.data.formats import BadImage, read_file
from ddpmctl.data.names import ADDRESS, Named, patterns_of, place_of, read_name
from ddpmctl.data.stamps import Stamp, stamp
from ddpmctl.errors import DataError
from ddpmctl.parsing import shown
from ddpmctl.rows import nearest

if TYPE_CHECKING:
    from PIL import Image

ROOT = "DDPMCTL_DATA"
"""Environment variable: the folder of torchvision's data sets, where the name does not say it."""

_FAULTS = (OSError, ValueError, RuntimeError, LookupError, EOFError)


def whole(path: Path) -> Path:
    """``path`` from the root of the file system; the name of a data set with all that it leaves out."""
    found = read_name(path)
    if found is None:
        return path.absolute()
    if found.kind == "shards":
        parts = (part if ADDRESS.match(part) else str(Path(part).absolute()) for part in patterns_of(found.name))
        return place_of(str(found._replace(name="::".join(parts))))
    if found.kind == "hf":
        name = str(Path(found.name).absolute()) if found.name and Path(found.name).is_dir() else found.name
        return Path(str(found._replace(name=name, split=found.split or "train")))
    row = SETS.get(found.name)
    root = Path(os.path.expanduser(found.root or os.environ.get(ROOT) or user_data_path("ddpmctl") / "datasets")).absolute()  # noqa: PTH111 - never fails
    return Path(str(found._replace(split=found.split or (next(iter(row.splits)) if row else ""), root=str(root))))


def identity(path: Path) -> str:
    """The same for the same data, however it is named."""
    return str(path.resolve() if read_name(path) is None else whole(path))


@dataclass(frozen=True)
class Members:
    """The images of a data set. ``names``: sorted, the class of each before the slash, if it has one.

    ``read``: the bytes of one by its name, as of an image file; raises :class:`BadImage`. ``stamp``: what is another when it is.
    """

    names: list[str]
    read: Callable[[str], bytes]
    stamp: Callable[[str], Stamp]


@dataclass(frozen=True)
class Row:
    """A data set of torchvision. ``splits``: arguments of its class for each, the usual one first.

    ``labels``: where the class of each image is kept, as a number; None: it has none. ``rows``: pattern of the files that hold
    all images in one; where there is a file for each, ``files`` names them. ``classes``: whether classes have names.
    """

    splits: dict[str, dict[str, Any]]
    labels: str | None = "targets"
    rows: str = ""
    files: Callable[[Any], Sequence[str | Path]] | None = None
    classes: bool = True


def _splits(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {"split": name} for name in names}


_TRAIN_OR_TEST: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}

SETS: dict[str, Row] = {
    "MNIST": Row(_TRAIN_OR_TEST, rows="MNIST/raw/*"),
    "FashionMNIST": Row(_TRAIN_OR_TEST, rows="FashionMNIST/raw/*"),
    "KMNIST": Row(_TRAIN_OR_TEST, rows="KMNIST/raw/*"),
    "CIFAR10": Row(_TRAIN_OR_TEST, rows="cifar-10-batches-py/*"),
    "CIFAR100": Row(_TRAIN_OR_TEST, rows="cifar-100-python/*"),
    "SVHN": Row(_splits("train", "test", "extra"), "labels", rows="*_32x32.mat", classes=False),
    "STL10": Row(_splits("train", "test", "unlabeled", "train+unlabeled"), "labels", rows="stl10_binary/*"),
    "CelebA": Row(
        _splits("train", "valid", "test", "all"),
        None,
        files=lambda data: [Path(data.root, "celeba", "img_align_celeba", name) for name in data.filename],
    ),
    "Flowers102": Row(_splits("train", "val", "test"), "_labels", files=lambda data: data._image_files),
    "Food101": Row(_splits("train", "test"), "_labels", files=lambda data: data._image_files),
    "OxfordIIITPet": Row(_splits("trainval", "test"), "_labels", files=lambda data: data._images),
    "DTD": Row(_splits("train", "val", "test"), "_labels", files=lambda data: data._image_files),
    "EuroSAT": Row({"all": {}}, files=lambda data: [path for path, _ in data.samples]),
}
"""The data sets of torchvision that can be trained on."""


def find_named(path: Path) -> Members:
    """The images of the data set that ``path`` names; downloaded where they are not there yet. Raises :class:`DataError`."""
    named = read_name(whole(path))
    assert named
    members = _of_torchvision(named) if named.kind == "torchvision" else _of_hf(named)
    if not members.names:
        raise DataError(f"{named}: holds no image", "give another split")
    return members


def _of_torchvision(named: Named) -> Members:
    row = SETS.get(named.name)
    if row is None:
        raise DataError(f"torchvision:{named.name}: no such data set here{nearest(named.name, SETS)}",
                        f"known: {', '.join(SETS)}; of another give a folder of its images")  # fmt: skip
    if named.split not in row.splits:
        raise DataError(f"{named}: no split {shown(named.split)!r}", f"its splits: {', '.join(row.splits)}")
    data = _made(named, row)
    labels = None if row.labels is None else [int(label) for label in getattr(data, row.labels)]
    classes = [str(name) for name in data.classes] if row.classes and row.labels else None
    if row.files:
        files = dict(zip(_names(labels, classes, len(data)), row.files(data), strict=True))
        return Members(sorted(files), lambda name: read_file(files[name]), lambda name: stamp(str(files[name])))
    return _rows(_names(labels, classes, len(data)), lambda number: _encoded(data[number][0]), Path(named.root).glob(row.rows), named)


def _made(named: Named, row: Row) -> Any:
    """The data set as torchvision makes it."""
    from torchvision import datasets

    def make(download: bool) -> Any:
        return getattr(datasets, named.name)(named.root, **row.splits[named.split], download=download)

    try:
        with redirect_stdout(StringIO()):  # what it prints is no result that was asked for
            try:
                return make(False)
            except RuntimeError:  # not there, or not whole
                return make(True)
    except ImportError as error:
        raise DataError(f"{named}: torchvision reads it with {error.name}", f"pip install {error.name}") from error
    except _FAULTS as error:
        reason = shown(" ".join(str(error).split())[:200]) or type(error).__name__
        raise DataError(f"{named}: not there whole, and cannot be downloaded: {reason}",
                        f"connect to the network, or put its files below {named.root} as torchvision does") from error  # fmt: skip


def _of_hf(named: Named) -> Members:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{named}: needs the package datasets", "pip install 'ddpmctl[hf]'") from error
    folder = Path(named.name)
    if not named.name or (named.name[0] in "./~" and not folder.is_dir()):
        raise DataError(f"{named}: no such folder", "give the name of a data set, or a folder of one")
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            data: Any = datasets.load_from_disk(named.name)
            data = data[named.split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(named.name, split=named.split)
    except (*_FAULTS, ImportError, datasets.exceptions.DatasetsError) as error:
        reason = shown(" ".join(str(error).split())[:300]) or type(error).__name__
        raise DataError(f"{named}: cannot be loaded: {reason}", "see to the name, the split, and the network") from error
    images = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise DataError(f"{named}: no column of images among {', '.join(data.column_names)}", "give another data set")
    labels = [name for name, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)]
    image, label = (next((name for name in found if name in ("image", "label")), found[0] if found else None) for found in (images, labels))
    classes = data.features[label].names if label else None
    numbers = [-1 if value is None else int(value) for value in data[label]] if label else None
    raw = data.select_columns([image]).cast_column(image, datasets.Image(decode=False))

    def read(number: int) -> bytes:
        found = raw[number][image]
        if found is None:
            raise BadImage("no image")
        return found["bytes"] or read_file(found["path"])

    return _rows(_names(numbers, classes, len(data)), read, (Path(file["filename"]) for file in data.cache_files), named)


def _names(labels: Sequence[int] | None, classes: Sequence[str] | None, images: int) -> list[str]:
    """A name for each image: its class, where it has one, and its number."""
    if labels is None:
        return [f"{number:08d}" for number in range(images)]
    folders = _folders(classes) if classes else None
    known = {label: folders[label] if folders else str(label) for label in set(labels) if label >= 0}
    return [f"{known[label]}/{number:08d}" if label >= 0 else f"{number:08d}" for number, label in enumerate(labels)]


def _folders(classes: Sequence[str]) -> list[str]:
    """The classes as names without a slash, which is a dash in them; with a number where another class is called so.

    Of all classes, not of those that a split holds, so that a class is called the same in each.
    """
    taken = {name for name in classes if name and "/" not in name}
    found = []
    for name in classes:
        folder = plain = name.replace("/", "-") or "-"
        if folder != name:
            folder = next(text for text in chain([plain], (f"{plain} ({i})" for i in count(2))) if text not in taken)
            taken.add(folder)
        found.append(folder)
    return found


def _rows(names: list[str], read: Callable[[int], bytes], files: Iterable[Path], named: Named) -> Members:
    """Images that ``read`` gives by their number, all out of ``files``: another of these, and all are read again."""
    found = sorted((file.name, stamp(str(file))) for file in files)
    digest = hashlib.sha256(repr((str(named), found)).encode("utf-8", "surrogatepass")).digest()
    mark = int.from_bytes(digest[:8], "big") >> 1
    times = [max((each[column] for _, each in found), default=0) for column in (1, 2)]

    def number(name: str) -> int:
        return int(name.rpartition("/")[2])

    return Members(sorted(names), lambda name: read(number(name)), lambda name: (mark, *times, number(name)))


def _encoded(image: Image.Image) -> bytes:
    """As a PGM or PPM: no other form is the same bytes for ever, whatever the version of Pillow."""
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    kind = b"P5" if image.mode == "L" else b"P6"
    return b"%b %d %d 255\n" % (kind, *image.size) + image.tobytes()
