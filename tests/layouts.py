"""Small data sets laid out on disk as torchvision expects them, by their names; random pixels, classes in turn."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

COUNT = 24


def array(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def jpegs(folder: Path, names: list[str]) -> None:
    for name, pixels in zip(names, array(len(names), 24, 32, 3), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name, "JPEG")


def digits(root: Path, name: str) -> None:
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for kind, count in (("train", COUNT), ("t10k", COUNT // 2)):
        (raw / f"{kind}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, count, 28, 28) + array(count, 28, 28).tobytes())
        labels = (np.arange(count) % 3).astype(np.uint8)
        (raw / f"{kind}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())


def cifar(root: Path, patch: pytest.MonkeyPatch, kind: type, folder: str, key: str, meta: dict[str, list[str]]) -> None:
    (root / folder).mkdir(parents=True)
    for names, count in ((kind.train_list, COUNT), (kind.test_list, COUNT // 2)):
        batch = {"data": array(count, 3072), key: [i % 2 for i in range(count)]}
        (root / folder / names[0][0]).write_bytes(pickle.dumps(batch))
    (root / folder / kind.meta["filename"]).write_bytes(pickle.dumps(meta))
    patch.setattr(kind, "train_list", [[kind.train_list[0][0], None]])
    patch.setattr(kind, "test_list", [[kind.test_list[0][0], None]])
    patch.setattr(kind, "meta", {**kind.meta, "md5": None})


def svhn(root: Path, patch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    root.mkdir()
    savemat(root / "train_32x32.mat", {"X": array(32, 32, 3, COUNT), "y": np.arange(COUNT)[:, None] % 10 + 1})
    patch.setattr(datasets.SVHN, "split_list", {"train": ["", "train_32x32.mat", None], "test": ["", "none", None]})


def stl(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for kind in ("train", "test", "unlabeled"):
        array(COUNT, 3 * 96 * 96).tofile(folder / f"{kind}_X.bin")
        (np.arange(COUNT) % 2 + 1).astype(np.uint8).tofile(folder / f"{kind}_y.bin")
    (folder / "class_names.txt").write_text("airplane\nbird\n")
    for name in ("train_list", "test_list"):
        patch.setattr(datasets.STL10, name, [[file, None] for file, _ in getattr(datasets.STL10, name)])


def celeba(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder, names = root / "celeba", [f"{i:06d}.jpg" for i in range(1, COUNT + 1)]
    jpegs(folder / "img_align_celeba", names)
    for file in ("list_attr_celeba", "list_bbox_celeba", "list_landmarks_align_celeba"):
        (folder / f"{file}.txt").write_text("\n".join([str(COUNT), "a b", *(f"{name} 1 -1" for name in names)]))
    (folder / "identity_CelebA.txt").write_text("\n".join(f"{name} 7" for name in names))
    (folder / "list_eval_partition.txt").write_text("\n".join(f"{name} {i % 2}" for i, name in enumerate(names)))
    patch.setattr(datasets.CelebA, "file_list", [(a, None, c) for a, _, c in datasets.CelebA.file_list])


def flowers(root: Path, patch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    folder = root / "flowers-102"
    jpegs(folder / "jpg", [f"image_{i:05d}.jpg" for i in range(1, COUNT + 1)])
    savemat(folder / "imagelabels.mat", {"labels": np.arange(COUNT) % 2 + 1})
    savemat(folder / "setid.mat", {"trnid": np.arange(1, 17), "valid": np.arange(17, 21), "tstid": np.arange(21, 25)})
    files = datasets.Flowers102._file_dict
    patch.setattr(datasets.Flowers102, "_file_dict", {key: (name, None) for key, (name, _) in files.items()})


def food(root: Path, patch: pytest.MonkeyPatch) -> None:
    names = {kind: [f"{kind}/{i}" for i in range(COUNT // 2)] for kind in ("sushi", "waffles")}
    (root / "food-101" / "meta").mkdir(parents=True)
    jpegs(root / "food-101" / "images", [f"{name}.jpg" for all_of_it in names.values() for name in all_of_it])
    (root / "food-101" / "meta" / "train.json").write_text(json.dumps(names))


def pets(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder, names = root / "oxford-iiit-pet", [f"{'Bengal' if i % 2 else 'great_dane'}_{i}" for i in range(COUNT)]
    jpegs(folder / "images", [f"{name}.jpg" for name in names])
    (folder / "annotations").mkdir()
    (folder / "annotations" / "trainval.txt").write_text("\n".join(f"{name} {i % 2 + 1} 1 1" for i, name in enumerate(names)))


def textures(root: Path, patch: pytest.MonkeyPatch) -> None:
    names = [f"{'dotted' if i % 2 else 'woven'}/{i}.jpg" for i in range(COUNT)]
    jpegs(root / "dtd" / "dtd" / "images", names)
    (root / "dtd" / "dtd" / "labels").mkdir()
    (root / "dtd" / "dtd" / "labels" / "train1.txt").write_text("\n".join(names))


def land(root: Path, patch: pytest.MonkeyPatch) -> None:
    jpegs(root / "eurosat" / "2750", [f"{'Forest' if i % 2 else 'River'}/{i}.jpg" for i in range(COUNT)])


Builder = Callable[[Path, pytest.MonkeyPatch], None]

LAYOUTS: dict[str, tuple[Builder, int, list[str]]] = {
    "MNIST": (lambda root, patch: digits(root, "MNIST"), 24, ["0 - zero", "1 - one", "2 - two"]),
    "FashionMNIST": (lambda root, patch: digits(root, "FashionMNIST"), 24, ["Pullover", "T-shirt-top", "Trouser"]),
    "KMNIST": (lambda root, patch: digits(root, "KMNIST"), 24, ["ki", "o", "su"]),
    "CIFAR10": (
        lambda root, patch: cifar(root, patch, datasets.CIFAR10, "cifar-10-batches-py", "labels", {"label_names": ["cat", "dog"]}),
        24, ["cat", "dog"]),
    "CIFAR100": (
        lambda root, patch: cifar(root, patch, datasets.CIFAR100, "cifar-100-python", "fine_labels", {"fine_label_names": ["oak", "ray"]}),
        24, ["oak", "ray"]),
    "SVHN": (svhn, 24, list("0123456789")),
    "STL10": (stl, 24, ["airplane", "bird"]),
    "CelebA": (celeba, 12, []),
    "Flowers102": (flowers, 16, ["hard-leaved pocket orchid", "pink primrose"]),
    "Food101": (food, 24, ["sushi", "waffles"]),
    "OxfordIIITPet": (pets, 24, ["Bengal", "Great Dane"]),
    "DTD": (textures, 24, ["dotted", "woven"]),
    "EuroSAT": (land, 24, ["Forest", "River"]),
}  # fmt: skip
"""How each is laid out, how many images its usual split then has, and the classes that they are of."""
