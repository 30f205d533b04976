"""An evaluation from end to end, as plain dicts: for the screen and for ``--json``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpmctl.config import DataConfig
from ddpmctl.core.samplers import evaluations
from ddpmctl.data.dataset import ImageDataset, load_images
from ddpmctl.data.report import Progress
from ddpmctl.errors import ConfigError, DataError, OutputError
from ddpmctl.evaluation.distances import NEIGHBOURS, check_enough, distances, doubts
from ddpmctl.evaluation.features import FEATURES
from ddpmctl.evaluation.likelihood import (
    BOUND_DRAWS,
    BOUND_IMAGES,
    LOSS_DRAWS,
    Likelihood,
)
from ddpmctl.evaluation.memorised import (
    MANY_HELD_OUT,
    QUANTILE,
    Nearest,
    check_sheet,
    nearest,
    nearest_either_way,
    sheet,
    suspicious,
)
from ddpmctl.evaluation.sets import Extractor, chosen, data_of, draw
from ddpmctl.images import save_png
from ddpmctl.plans import Plan
from ddpmctl.ranks import Ranks, Word
from ddpmctl.sampling import Model
from ddpmctl.turns import help_out
from ddpmctl.validation import hold_out

Facts = dict[str, Any]
Bars = Callable[[str], AbstractContextManager[Progress]]
"""Shows how far the work of that name is."""


@dataclass(frozen=True)
class Settings:
    """What is common to all that is compared. ``n``: of each set; ``cache``: whether the user's cache is used."""

    data: Path
    n: int
    seed: int
    extractor: Extractor
    bars: Bars
    cache: bool = True

    @property
    def ranks(self) -> Ranks:
        """The processes that do it."""
        return self.extractor.ranks


def compare_data(other: Path, size: Any, settings: Settings) -> Facts:
    """Two sets of images: distances alone. ``size``: as ``data.size``. Raises :class:`DataError` where sizes differ."""
    config = DataConfig(size=size or "auto", cache=settings.cache)
    sets, found = [], []
    for path in (other, settings.data):
        with settings.bars("reading images") as progress:
            sets.append(load_images(config, path, most=settings.n, progress=progress))
    if sets[0].size != sets[1].size:
        sizes = " and ".join(f"{height}x{width}" for height, width in (dataset.size for dataset in sets))
        raise DataError(f"{other} and {settings.data}: images of {sizes}", "give one --size for both")
    picked = [chosen(dataset, settings.n, settings.seed) for dataset in sets]
    for path, which in zip((other, settings.data), picked, strict=True):
        check_enough(len(which), str(path))
    for dataset, path, which in zip(sets, (other, settings.data), picked, strict=True):
        found.append(_features_of(settings, dataset, path, config, which))
    settings.ranks.end()
    return {
        "what": {"kind": "images", **_of_images(other, sets[0], picked[0])},
        "data": _of_images(settings.data, sets[1], picked[1]),
        "made_with": {"n": len(picked[0]), "seed": settings.seed},
        **_distances(settings, *found),
    }


def evaluate_model(
    model: Model,
    way: Plan,
    class_name: str | None,
    settings: Settings,
    *,
    weights: str,
    ema_length: float | None,
    batch_size: int,
    sheet_file: Path | None,
    sheet_of: int,
    on_smaller: Callable[[int], object],
) -> Facts:
    """A model against images: distances, loss, bits per dimension and, with ``sheet_file``, what it learnt by heart.

    All processes do all that the network does: those that do not lead call :func:`help_to_evaluate`. Raises :class:`ConfigError` where
    the sheet is asked for with other images than the model was trained on.
    """
    with settings.bars("reading images") as progress:
        dataset = data_of(model, settings.data, most=settings.n, cache=settings.cache, progress=progress)
    trained_on = dataset.fingerprint == model.fingerprint
    if sheet_file is not None:
        if dataset.stream:
            raise ConfigError(f"--sheet: {settings.data}: shards, of which not all images are in memory to be compared with", "leave --sheet out")
        if not trained_on:
            raise ConfigError(f"--sheet: {settings.data}: not the images that {model.path} was trained on",
                              "give those as DATA, or leave --sheet out")  # fmt: skip
        check_sheet(min(sheet_of, settings.n), model.image_shape)
    labels = model.labels_for(class_name, settings.n)
    label = labels[0] if labels and class_name not in (None, "all") else None
    which = chosen(dataset, settings.n, settings.seed, label)
    check_enough(len(which), f"{settings.data}{f': class {class_name}' if label is not None else ''}")
    with settings.bars("sampling") as progress:
        samples = draw(model, settings.n, way, seed=settings.seed, labels=labels, batch_size=batch_size,
                       on_smaller=on_smaller, progress=progress, ranks=settings.ranks)  # fmt: skip
    likelihood = settings.ranks.share(Likelihood(model, dataset))
    with settings.bars("features of samples") as progress:
        of_samples = settings.extractor(samples, progress)
    config = model.config.data
    needed = which if sheet_file is None else torch.arange(len(dataset))
    of_data = _features_of(settings, dataset, settings.data, config, needed)
    measured = _measured(likelihood, model, batch_size, settings)
    settings.ranks.end()
    facts = {
        "what": {"kind": "model", "path": str(model.path), "checkpoint": model.digest, "step": model.step,
                 "weights": weights, "ema_length": ema_length, "precision": model.precision, "device": str(model.device)},
        "data": {**_of_images(settings.data, dataset, which), "trained_on": trained_on},
        "made_with": _made_with(model, way, class_name, settings),
        **_distances(settings, of_samples, of_data if sheet_file is None else of_data[which]),
        **measured,
    }  # fmt: skip
    if sheet_file is not None:
        found = _memorised(model, dataset, samples, of_samples, of_data, sheet_file, sheet_of, facts)
        facts["memorised"] = found
        if found["held_out"] < MANY_HELD_OUT:
            facts["warnings"].append(f"how near is suspicious is poorly known from {found['held_out']} held-out images")
    return facts


def help_to_evaluate(model: Model, way: Plan, class_name: str | None, settings: Settings, *, batch_size: int) -> None:
    """What the processes do that do not lead, while that one is at :func:`evaluate_model`."""
    draw(model, settings.n, way, seed=settings.seed, labels=model.labels_for(class_name, settings.n), batch_size=batch_size,
         on_smaller=lambda size: None, progress=lambda done, total: None, ranks=settings.ranks)  # fmt: skip
    likelihood: Likelihood = settings.ranks.share()
    help_out(settings.ranks, {Word.FEATURES: settings.extractor.extract, **likelihood.works(model)})


def _features_of(settings: Settings, dataset: ImageDataset, path: Path, config: DataConfig, which: Tensor) -> Tensor:
    with settings.bars("features of images") as progress:
        return settings.extractor.of_data(dataset, path, config, which, cache=settings.cache, progress=progress)


def _of_images(path: Path, dataset: ImageDataset, which: Tensor) -> Facts:
    return {"path": str(path), "images": dataset.total, "used": len(which), "size": list(dataset.size),
            "fingerprint": dataset.fingerprint}  # fmt: skip


def _made_with(model: Model, way: Plan, class_name: str | None, settings: Settings) -> Facts:
    steps = way.steps_of(model.denoiser.schedule.timesteps)
    return {"n": settings.n, "seed": settings.seed, "sampler": way.sampler, "steps": steps,
            "evaluations": evaluations(way.sampler, steps), "spacing": way.spacing, "threshold": "clip",
            "guidance": model.denoiser.guidance, "class": class_name or ("all" if model.class_names else None)}  # fmt: skip


def _distances(settings: Settings, generated: Tensor, real: Tensor) -> Facts:
    name = settings.extractor.name
    row = FEATURES[name]
    return {
        "features": {"name": name, "dimension": row.dimension, "note": row.note},
        "distances": {**distances(generated, real, seed=settings.seed)._asdict(), "neighbours": NEIGHBOURS},
        "warnings": doubts(len(generated), len(real), row.dimension),
    }


def _measured(likelihood: Likelihood, model: Model, batch_size: int, settings: Settings) -> Facts:
    with settings.bars("loss") as progress:
        loss = likelihood.loss(model, batch_size, settings.ranks, progress)
    with settings.bars("bits per dimension") as progress:
        bits = likelihood.bits_per_dim(model, batch_size, settings.ranks, progress)
    of, count = likelihood.of, likelihood.count
    return {
        "loss": {"kind": model.config.diffusion.loss, "of": of, "images": min(count, LOSS_DRAWS),
                 "draws": LOSS_DRAWS, "mean": loss.loss, "quarters": list(loss.quarters)},
        "bits_per_dim": {"of": of, "images": min(count, BOUND_IMAGES), "draws": BOUND_DRAWS + 1,
                         "variance": {name: found._asdict() for name, found in bits.items()}},
    }  # fmt: skip


def _memorised(
    model: Model, dataset: ImageDataset, samples: Tensor, of_samples: Tensor, of_data: Tensor,
    file: Path, count: int, facts: Facts,
) -> Facts:  # fmt: skip
    """Write the sheet; the share of samples nearer to training images than held-out images are, by pixels and features.

    Where the sheet cannot be written it is None, and ``sheet_error`` says why.
    """
    train, held = hold_out(len(dataset), model.config.data.holdout)
    found: Facts = {"quantile": QUANTILE, "training": len(train), "held_out": len(held), "sheet": str(file)}
    near: list[Nearest] = []
    # A mirrored copy is one, where training mirrors: by pixels nothing is less like its image.
    by_pixels = nearest_either_way if model.config.data.hflip else nearest
    for name, find, ours, theirs in (("pixels", by_pixels, samples, dataset.images), ("features", nearest, of_samples, of_data)):
        base = theirs[train]
        near.append(find(ours, base))
        of_held = find(theirs[held], base, 1) if len(held) else None
        found[name] = suspicious(near[-1], of_held)._asdict()
    title = f"{model.path.name}: the nearest of {len(train):,} training images"
    picture = sheet(samples[:count], dataset.images[train], near[0], near[1], title)
    try:
        save_png(file, picture, {"kind": "evaluate", **facts["what"], **facts["made_with"], "memorised": found})
    except OutputError as error:  # what took so long to find out is not lost for a picture
        found["sheet"], found["sheet_error"] = None, error.problem
    return found
