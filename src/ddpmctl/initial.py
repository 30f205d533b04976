"""A new run that starts with the weights of a checkpoint, of any tool: ``train.init_from``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpmctl import checkpoint
from ddpmctl.checkpoint import naming_a_good_one
from ddpmctl.config import ModelConfig, RunConfig
from ddpmctl.errors import CheckpointError, ConfigError
from ddpmctl.inspection import kind_of
from ddpmctl.interop import formats
from ddpmctl.interop.formats import NOTHING_GIVEN
from ddpmctl.interop.imported import Loaded, Wishes
from ddpmctl.runfile import Layer, config_layer, resolve
from ddpmctl.runfolder import RunFolder, checkpoint_in, run_of
from ddpmctl.sampling import config_of, empty_net

KEPT = (
    "data.channels", "data.conditional",
    "diffusion.timesteps", "diffusion.schedule", "diffusion.shift", "diffusion.zero_terminal_snr", "diffusion.prediction", "diffusion.learn_variance",
    *(f"model.{key}" for key in ModelConfig.model_fields if key != "dropout"),
)  # fmt: skip
"""Settings that a run takes from the checkpoint: its network, and what that has learned to tell."""


def load(path: Path, wishes: Layer = NOTHING_GIVEN) -> Loaded:
    """The checkpoint ``path``, or the newest of a run folder, checked to be whole. Raises :class:`CheckpointError`.

    What it leaves open is as in ``wishes``, where these say it; :class:`ConfigError` where that cannot be.
    """
    file = checkpoint_in(path)
    loaded = formats.load(file, Wishes(wishes.values, wishes.origins))
    empty_net(loaded.content, config_of(loaded.content, file), file)
    return loaded


def named_in(layers: Sequence[Layer]) -> tuple[Path, Loaded] | None:
    """The checkpoint that the last of ``layers`` to speak of it names, loaded; None where there is to be none.

    Raises as :func:`load`, and where that or a later layer has the digest of other weights.
    """
    values = {key: value for layer in layers for key, value in layer.values.items()}
    origins = {key: layer.origins.get(key, key) for layer in layers for key in layer.values}
    named = values.get("train.init_from")
    if not isinstance(named, str):
        return None
    naming = max(number for number, layer in enumerate(layers) if "train.init_from" in layer.values)
    digests = [layer.values["train.init_digest"] for layer in layers[naming:] if "train.init_digest" in layer.values]
    with naming_a_good_one():
        loaded = load(Path(named), Layer(values, origins))
    _check_digest(loaded, Path(named), digests[-1] if digests else None)
    return Path(named), loaded


def load_again(config: RunConfig) -> Loaded:
    """The weights that the run of ``config`` began with. Raises as :func:`load`, and where they are others now."""
    path = Path(str(config.train.init_from))
    loaded = load(path, config_layer(config.to_dict(), str(path)))
    _check_digest(loaded, path, config.train.init_digest)
    return loaded


def digest_of(loaded: Loaded) -> str:
    """The digest of the weights alone, whatever is said of them, and by which version."""
    return checkpoint.digest_of({"net": loaded.content["net"], "ema": loaded.content["ema"]["net"]})


def _check_digest(loaded: Loaded, path: Path, digest: str | None) -> None:
    if digest is not None and digest != digest_of(loaded):
        raise CheckpointError(
            f"{path}: other weights than those that the run began with (train.init_digest)",
            "bring them back, or start another run with --init-from",
        )


def settings(loaded: Loaded, path: Path, layers: Sequence[Layer]) -> RunConfig:
    """The configuration of ``layers`` over what the checkpoint ``loaded`` from ``path`` has; its size may be another.

    Raises :class:`ConfigError` that names every key in which the layers contradict it.
    """
    theirs = config_of(loaded.content, path)
    known = config_layer(theirs.to_dict(), str(path))
    below = {key: known.values[key] for key in (*KEPT, "model.dropout", "data.size")}
    channels, height, width = loaded.content["image_shape"]
    below |= {"data.channels": channels, "data.size": f"{height}x{width}"}
    ours = resolve(Layer(below, known.origins), *layers)
    before, after = _comparable(theirs, channels), _comparable(ours, channels)
    origins = {key: origin for layer in layers for key, origin in layer.origins.items()}
    found = [key for key in KEPT if before[key] != after[key]]
    if found:
        told = "; ".join(f"{origins.get(key, key)}: {after[key]}, {before[key]} there" for key in found)
        raise ConfigError(f"--init-from {path}: another network: {told}", "leave these keys out: they come from the checkpoint")
    return ours


def _comparable(config: RunConfig, channels: int) -> dict[str, Any]:
    """Settings in one spelling each."""
    values = dict(config_layer(config.to_dict(), "").values)
    model = config.model
    counts = model.num_res_blocks
    values["model.num_res_blocks"] = counts if isinstance(counts, list) else [counts] * len(model.channel_mults)
    values["model.attention_levels"] = sorted(set(model.attention_levels))
    values["model.label_dropout"] = "some" if model.label_dropout else "none"
    if model.time_embedding == "auto":
        values["model.time_embedding"] = 4 * model.base_channels
    if values["data.channels"] == "auto":
        values["data.channels"] = channels
    return values


def check_classes(loaded: Loaded, path: Path, class_names: Sequence[str]) -> str | None:
    """A word where the classes have other names; raises :class:`ConfigError` where there are more or fewer."""
    theirs = loaded.content["class_names"]
    if len(theirs) != len(class_names):
        raise ConfigError(
            f"--init-from {path}: knows {len(theirs)} classes, the images have {len(class_names)}",
            "train on as many class folders" if theirs else "leave data.conditional out",
        )
    if theirs == list(class_names):
        return None
    return f"class {theirs[0]} of {path} is {class_names[0]} here, and so on: classes are taken in order"


def refuse_checkpoint(data: Path) -> None:
    """Raise :class:`CheckpointError` where a checkpoint stands for a run folder to resume."""
    if not data.exists() or kind_of(data) != "checkpoint":
        return
    run = run_of(data.absolute().parent)
    if run is None:
        raise CheckpointError(f"{data}: a checkpoint, not a run folder to resume", advice(data))
    best = data.name == RunFolder(run).best_file.name
    what = "the checkpoint of the lowest KID so far, kept aside" if best else "a checkpoint"
    again = shlex.join(["ddpmctl", "train", "--resume", str(run)])
    raise CheckpointError(
        f"{data}: {what}, not a run folder to resume", f"go on with its run, from its newest checkpoint: {again}; or {advice(data)}"
    )


def check_resumable(content: dict[str, Any], path: Path) -> None:
    """Raise :class:`CheckpointError` for a checkpoint that holds weights only."""
    if content.get("optimizer") is None:
        raise CheckpointError(f"{path}: weights only, without the optimiser that --resume needs", advice(path))


def advice(path: Path) -> str:
    """How to start a run with the weights of ``path``."""
    return f"start a new run with its weights: {shlex.join(['ddpmctl', 'train', 'PHOTOS/', '--init-from', str(path)])}"
