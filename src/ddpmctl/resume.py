"""What may change between two stretches of a run, and what may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddpmctl.config import RunConfig
from ddpmctl.errors import ConfigError
from ddpmctl.runfile import config_layer

FROZEN: dict[str, str] = {
    "seed": "the draws would not go on where they stopped",
    "data.size": "the network has seen images of another size",
    "data.channels": "the network has other channels",
    "data.fit": "the images would differ",
    "data.background": "the images would differ",
    "data.hflip": "the images would differ",
    "data.shuffle": "the images would come in another order",
    "data.holdout": "other images would be trained on",
    "data.conditional": "the network has other classes",
    "diffusion": "the network has learned another process",
    "model": "the weights belong to another architecture",
    "train.batch_size": "the position in the data would be lost",
    "train.ema_snapshot_every": "the averages were not taken from the start (with --force they take the weights of now for those of before)",
    "train.init_from": "the run began with other weights",
    "train.optimizer": "the optimiser's state belongs to another one",
}
"""Keys and sections that a resumed run keeps, with the reason."""

HARMLESS: dict[str, Callable[[Any, Any], bool]] = {
    # They are taken at every step, and a snapshot is but a look at them: it may be taken more rarely, or no more.
    "train.ema_snapshot_every": lambda before, after: before > 0,
}
"""For keys of :data:`FROZEN`: whether that change, from one value to another, is allowed after all."""


def changes(old: RunConfig, new: RunConfig) -> list[tuple[str, object, object]]:
    """(key, old value, new value) of every setting that differs."""
    before, after = config_layer(old.to_dict(), "").values, config_layer(new.to_dict(), "").values
    return [(key, before[key], after[key]) for key in after if before[key] != after[key]]


def check_changes(old: RunConfig, new: RunConfig, *, force: bool) -> list[tuple[str, object, object]]:
    """The changes, when they are allowed; raises :class:`ConfigError` for one that changes what is learned."""
    found = changes(old, new)
    for key, before, after in found:
        reason = FROZEN.get(key) or FROZEN.get(key.partition(".")[0])
        harmless = key in HARMLESS and HARMLESS[key](before, after)
        if reason and not harmless and not force:
            raise ConfigError(f"{key}: {before} when the run started, now {after}: {reason}",
                              "resume with the old value, start a new run with another --out, or add --force")  # fmt: skip
    return found
