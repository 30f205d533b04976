"""Sets of images to compare: drawn from a model, or chosen from a data set, and their features."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from ddpmctl.config import DataConfig
from ddpmctl.core.noise import derived_generator
from ddpmctl.data.cache import Cache
from ddpmctl.data.dataset import ImageDataset, load_images
from ddpmctl.data.features import About
from ddpmctl.data.named import identity
from ddpmctl.data.report import Progress
from ddpmctl.errors import DataError
from ddpmctl.evaluation import features
from ddpmctl.evaluation.features import FEATURES, extract, load_features
from ddpmctl.making import made_by_all
from ddpmctl.plans import Plan
from ddpmctl.ranks import ALONE, Ranks, Word
from ddpmctl.sampling import Generated, Model, generate
from ddpmctl.turns import rounds


def data_of(model: Model, path: Path, *, most: int = 0, cache: bool = True, progress: Progress | None = None) -> ImageDataset:
    """The images below ``path``, made as those were that ``model`` was trained on, with its numbers of classes.

    ``most``: as of :func:`load_images`. Raises as :func:`load_images`, and :class:`DataError` for a class that the model does not know.
    """
    channels, height, width = model.image_shape
    config = model.config.data.model_copy(
        update={"size": (height, width), "channels": channels, "cache": cache and model.config.data.cache}
    )
    dataset = load_images(config, path, most=most, progress=progress)
    if dataset.labels is None:
        return dataset
    unknown = [name for name in dataset.class_names if name not in model.class_names]
    if unknown:
        known = ", ".join(model.class_names)
        raise DataError(f"{path}: {model.path} has no class {unknown[0]}", f"its classes: {known}")
    numbers = torch.tensor([model.class_names.index(name) for name in dataset.class_names])
    return replace(dataset, labels=numbers[dataset.labels], class_names=model.class_names)


def chosen(dataset: ImageDataset, n: int | None, seed: int, label: int | None = None) -> Tensor:
    """Indices of ``n`` images, of class ``label`` where that is given, sorted; all where there are no more, or n is None."""
    all_of_them = torch.arange(len(dataset))
    if label is not None and dataset.labels is not None:
        all_of_them = all_of_them[dataset.labels == label]
    if n is None or n >= len(all_of_them):
        return all_of_them
    order = torch.randperm(len(all_of_them), generator=derived_generator(seed, "real images"))
    return all_of_them[order[:n]].sort().values


def draw(
    model: Model,
    n: int,
    way: Plan,
    *,
    seed: int,
    labels: list[int] | None,
    batch_size: int,
    on_smaller: Callable[[int], object],
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Tensor:
    """``n`` images of ``model`` as uint8 (N, C, H, W): those that ``ddpmctl sample`` makes with the same settings.

    Made by all ``ranks``, and complete in the one that leads.
    """
    images = torch.empty((n if ranks.leads else 0, *model.image_shape), dtype=torch.uint8)

    def walk(numbers: range, at_once: int, smaller: Callable[[int], object]) -> Iterator[Generated]:
        return generate(
            model.denoiser, model.image_shape, numbers, seed=seed, way=way, labels=labels,
            device=model.device, batch_size=at_once, on_smaller=smaller,
        )  # fmt: skip

    for made in made_by_all(ranks, n, batch_size, walk, steps=1, on_smaller=on_smaller):
        if made.pixels is not None:
            images[made.images.start : made.images.stop] = made.pixels
            progress(made.images.stop, n)
    return images


class Extractor:
    """Row ``name`` of FEATURES on ``device``; ``weights``: a file of others than its own.

    Of several ``ranks`` each takes its share, batch by batch, so that features do not depend on how many there are: the one that
    leads calls, the others :func:`help_out` with :meth:`extract`. ``version`` changes with the network: our source, its packages,
    and that file.
    """

    def __init__(
        self, name: str, device: torch.device, weights: Path | None = None, batch_size: int = 64, ranks: Ranks = ALONE
    ) -> None:
        """Raises :class:`ConfigError` where a part is missing: now, and not after an hour of sampling."""
        self.name, self.device, self.batch_size, self.ranks = name, device, batch_size, ranks
        self.net = load_features(name, device, weights)
        own = hashlib.sha256(inspect.getsource(features).encode()).hexdigest()[:16]
        file = hashlib.sha256(weights.read_bytes()).hexdigest()[:16] if weights else "own"
        packages = [version(package) for package in ("torch_fidelity", *FEATURES[name].packages)]
        self.version = " ".join([own, file, *packages])

    def __call__(self, images: Tensor, progress: Progress) -> Tensor:
        """Features (N, D) of uint8 (N, C, H, W)."""
        found: list[Tensor] = []
        for parts in rounds(self.ranks, Word.FEATURES, self.extract, torch.split(images, self.batch_size)):
            found += parts
            progress(sum(map(len, found)), len(images))
        return torch.cat(found)

    def extract(self, images: Tensor) -> Tensor:
        """Features of these images, by this process."""
        return extract(images, self.net, self.device, batch_size=self.batch_size)

    def of_data(
        self, dataset: ImageDataset, path: Path, config: DataConfig, which: Tensor, *, cache: bool, progress: Progress
    ) -> Tensor:
        """Features of the images ``which`` of ``dataset``, that ``config`` read from ``path``: from the cache, if there."""
        kept = Cache.of_user() if cache and config.cache and dataset.stream is None else None  # of shards others may be there next time
        about: About = {
            "root": identity(path), "fingerprint": dataset.fingerprint, "features": self.name,
            "network": self.version, "device": self.device.type, "shape": [len(which), dataset.channels, *dataset.size],
            "fit": config.fit, "background": config.background,
            "which": hashlib.sha256(which.numpy().tobytes()).hexdigest()[:16],
        }  # fmt: skip
        found = kept.features(about) if kept else None
        if found is not None:
            return torch.from_numpy(found)
        made = self(dataset.images[which], progress)
        if kept:
            kept.keep_features(about, made.numpy())
        return made
