"""``ddpmctl train``."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpmctl.cli import console
from ddpmctl.cli.options import Debug, Quiet, choices, complete, reading, switch, tell_notes
from ddpmctl.cli.run_report import Shown, rehearse, summary
from ddpmctl.errors import Exit
from ddpmctl.parsing import parse_duration

if TYPE_CHECKING:
    from ddpmctl.config import RunConfig
    from ddpmctl.data.dataset import ImageDataset
    from ddpmctl.interop.imported import Loaded
    from ddpmctl.run import Run
    from ddpmctl.runfile import Layer
    from ddpmctl.runfolder import RunFolder

_SECTIONS = {"data", "diffusion", "model", "train"}
_DIFFUSION, _RUNNING = "What is learned", "The run"


def train(
    data: Annotated[Path | None, typer.Argument(metavar="DATA", help="Folder or .zip of images; with --resume, a run folder.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help="YAML run file; flags go before it.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Run folder.  [default: runs/NAME of the data]")] = None,
    steps: Annotated[str | None, typer.Option(metavar="COUNT", help="Training steps: 500, 100k, 1.5M, 1e5.  [default: 100k]", rich_help_panel=_RUNNING)] = None,
    batch_size: Annotated[str | None, typer.Option(metavar="COUNT", help="Images a step.  [default: 128]", rich_help_panel=_RUNNING)] = None,
    lr: Annotated[str | None, typer.Option(metavar="NUMBER", help="Learning rate, such as 2e-4.  [default: 2e-4]", rich_help_panel=_RUNNING)] = None,
    size: Annotated[str | None, typer.Option(metavar="SIZE", help="32, 48x64 (height x width), or auto.  [default: 64]", rich_help_panel=_DIFFUSION)] = None,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.  [default: auto]", rich_help_panel=_RUNNING)] = None,
    precision: Annotated[str | None, typer.Option(metavar="auto|fp32|bf16|fp16", help="What the network computes in.  [default: auto]", rich_help_panel=_RUNNING)] = None,
    timesteps: Annotated[str | None, typer.Option(metavar="COUNT", help="T, the number of noising steps.  [default: 1000]", rich_help_panel=_DIFFUSION)] = None,
    schedule: Annotated[str | None, typer.Option(metavar=choices("core.schedule", "SCHEDULES"), help="Noise schedule.  [default: linear]", autocompletion=complete("core.schedule", "SCHEDULES"), rich_help_panel=_DIFFUSION)] = None,
    loss: Annotated[str | None, typer.Option(metavar=choices("core.losses", "LOSSES"), help="Training loss.  [default: l2]", autocompletion=complete("core.losses", "LOSSES"), rich_help_panel=_DIFFUSION)] = None,
    prediction: Annotated[str | None, typer.Option(metavar=choices("core.prediction", "PREDICTIONS"), help="What the network predicts.  [default: eps]", autocompletion=complete("core.prediction", "PREDICTIONS"), rich_help_panel=_DIFFUSION)] = None,
    seed: Annotated[str | None, typer.Option(metavar="COUNT", help="Everything random follows from it.  [default: 0]", rich_help_panel=_RUNNING)] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any key of the run file; repeatable.")] = None,
    init_from: Annotated[Path | None, typer.Option("--init-from", metavar="PATH", help="Start a new run with the weights of a checkpoint or run folder, of other tools too (see `convert`). Network and process are taken from it.", rich_help_panel=_RUNNING)] = None,
    evaluate_every: Annotated[str | None, typer.Option(metavar="COUNT", help="Steps between measurements of KID; the best is kept as best.pt. Needs the extra metrics.  [default: 0]", rich_help_panel=_RUNNING)] = None,
    cache: Annotated[str | None, typer.Option(metavar="on|off", help="Keep decoded images for the next run.  [default: on]", rich_help_panel=_RUNNING)] = None,
    max_time: Annotated[int | None, typer.Option(metavar="TIME", help="Save and stop after 3h50m, 90m, 1d12h; go on with --resume.", parser=reading(parse_duration), rich_help_panel=_RUNNING)] = None,
    resume: Annotated[bool, switch("--resume", "Go on where the run folder stopped.", _RUNNING)] = False,
    force: Annotated[bool, switch("--force", "Resume though what is learned has changed.", _RUNNING)] = False,
    overwrite: Annotated[bool, switch("--overwrite", "Replace the run folder.", _RUNNING)] = False,
    dry_run: Annotated[bool, switch("--dry-run", "Check all, try a step and a sample, write nothing.", _RUNNING)] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:  # fmt: skip
    """Train a diffusion model on a folder of images.

    Example: `ddpmctl train photos/ --size 64 --steps 100k`

    Every key of a run file, with its meaning: `ddpmctl inspect --defaults`.
    """
    from ddpmctl.preflight import preflight
    from ddpmctl.runfile import flag_layer

    flags = flag_layer(
        {
            "device": device, "precision": precision, "seed": seed, "data.size": size, "diffusion.timesteps": timesteps,
            "diffusion.schedule": schedule, "diffusion.loss": loss, "diffusion.prediction": prediction,
            "train.steps": steps, "train.batch_size": batch_size, "train.lr": lr,
            "train.evaluate_every": evaluate_every, "train.init_from": str(init_from) if init_from else None,
            "data.cache": cache,
        },
        settings or [],
    )  # fmt: skip
    started = time.monotonic()
    layers = _layers(data, config, flags)
    folder = _folder(data, out, layers, resume=resume)
    try:
        if folder.is_run() and not dry_run:
            folder.lock()  # before anything is read that another process may be changing
        run_config, content, first = _settle(folder, layers, resume=resume, overwrite=overwrite)
        run = _prepare(run_config, folder, content, first, resume=resume, force=force)
        summary(run)
        if dry_run:
            rehearse(run)
            return 0
        if run.finished():
            console.note(f"nothing to do: the run has {run.state.step:,} steps; ask for more with --steps")
            return 0
        folder.lock()
        for notice in preflight(run):
            console.warn(notice.text)
        if not resume:
            _clear(folder, overwrite=overwrite)
        return _train(run, started + max_time if max_time else None)
    finally:
        folder.unlock()


def _layers(data: Path | None, config: Path | None, flags: Layer) -> list[Layer]:
    """The settings that were typed, those that count least first: run file, DATA, flags."""
    from ddpmctl.runfile import Layer, read_run_file
    from ddpmctl.runfolder import RunFolder

    layers = [read_run_file(config)] if config else []
    if data is not None and not RunFolder(data).is_run():
        layers.append(Layer({"data.path": str(data)}, {"data.path": "DATA"}))
    return [*layers, flags]


def _folder(data: Path | None, out: Path | None, layers: list[Layer], *, resume: bool) -> RunFolder:
    """Where the run is or will be: --out, a run folder given as DATA, or runs/ and the name of the images."""
    from ddpmctl.errors import CheckpointError, ConfigError
    from ddpmctl.files import check_place
    from ddpmctl.initial import refuse_checkpoint
    from ddpmctl.runfolder import RunFolder

    is_run = data is not None and RunFolder(data).is_run()
    if is_run and not resume:
        raise ConfigError(f"{data}: a run folder, not a folder of images", "add --resume to go on with it")
    if out is None:
        path = next((layer.values["data.path"] for layer in reversed(layers) if layer.values.get("data.path")), None)
        out = data if is_run else Path("runs") / _name_of(Path(str(path))) if path else None
    if out is None:
        raise ConfigError("no DATA: nothing to train on", "name a folder or .zip of images, or set data.path")
    folder = RunFolder(out)
    if resume and data is not None and not folder.is_run():
        refuse_checkpoint(data)
    if resume and not folder.is_run():
        raise CheckpointError(
            f"{out}: nothing to resume, no run.yaml there", "leave --resume out, or name the run with --out"
        )
    check_place(out)
    return folder


def _settle(
    folder: RunFolder, layers: list[Layer], *, resume: bool, overwrite: bool
) -> tuple[RunConfig, tuple[Path, dict[str, Any]] | None, tuple[Path, Loaded] | None]:
    """Which settings, which checkpoint to go on from, and which to start with. Reads, but writes nothing."""
    from ddpmctl.errors import CheckpointError, ConfigError
    from ddpmctl.initial import check_resumable, digest_of, named_in, settings
    from ddpmctl.runfile import check_size, read_run_file
    from ddpmctl.runfile import resolve as merge
    from ddpmctl.runfolder import checkpoint_in

    content = None
    if resume:
        content = folder.newest_good(console.warn)
        if content is None and folder.checkpoint_files():
            raise CheckpointError(
                f"{folder.path}: none of its checkpoints can be read", "bring one back, or start again with --overwrite"
            )
        if content is not None:
            check_resumable(content[1], content[0])
        layers = [read_run_file(folder.run_file), *layers]
    first = None if content else named_in(layers)
    if first and Path(os.path.realpath(first[0])).is_relative_to(os.path.realpath(folder.path)):
        raise ConfigError(f"--init-from {first[0]}: lies in {folder.path}, where the new run is to be", "give another --out")
    config = settings(first[1], first[0], layers) if first else merge(*layers)
    if resume and content is None:
        if folder.has_saved():
            raise CheckpointError(
                f"{folder.path}: its checkpoints are gone", "bring one back, or start again with --overwrite"
            )
        console.warn(f"{folder.path}: no checkpoint yet, so it starts from step 0")
    if config.data.path is None:
        raise ConfigError("no DATA: nothing to train on", "name a folder or .zip of images, or set data.path")
    # Whole, so that a run can be taken up from anywhere.
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"path": str(Path(config.data.path).absolute())})}
    )
    if config.train.init_from:
        # The very file, so that a run folder which trains on is not taken for what it was.
        start = str((checkpoint_in(Path(config.train.init_from)) if first else Path(config.train.init_from)).absolute())
        update = {"init_from": start, **({"init_digest": digest_of(first[1])} if first else {})}
        config = config.model_copy(update={"train": config.train.model_copy(update=update)})
    if not resume:
        _check_free(folder, overwrite=overwrite)
    if config.data.size != "auto":
        check_size(config, config.data.size)
    return config, content, first


def _check_free(folder: RunFolder, *, overwrite: bool) -> None:
    """Raise OutputError where a new run would replace something that it was not told to replace."""
    from ddpmctl.errors import OutputError
    from ddpmctl.runfile import read_run_file

    if not folder.exists():
        return
    # Another program's run.yaml says that the rest is not ours either.
    if overwrite and folder.is_run() and {key.partition(".")[0] for key in read_run_file(folder.run_file).values} >= _SECTIONS:
        return
    if overwrite:
        raise OutputError(f"{folder.path}: exists and is no run folder of ddpmctl", "give another --out")
    raise OutputError(
        f"{folder.path}: exists", "add --resume to go on, --overwrite to replace a run, or give another --out"
    )


def _clear(folder: RunFolder, *, overwrite: bool) -> None:
    """Make room for a new run; looks again, for another process may have begun one here meanwhile."""
    _check_free(folder, overwrite=overwrite)
    if folder.exists():
        folder.clear()


def _name_of(data: Path) -> str:
    """Name of a run that trains on ``data``: the folder's, or the zip's without its ending."""
    full = Path(os.path.realpath(data))  # not resolve(), which fails on a link to itself
    return (full.name if full.is_dir() else full.stem) or "run"


def _prepare(
    config: RunConfig, folder: RunFolder, content: tuple[Path, dict[str, Any]] | None, first: tuple[Path, Loaded] | None, *,
    resume: bool, force: bool,
) -> Run:  # fmt: skip
    """Load the images, build the run, and take over the checkpoint to go on from or to start with."""
    from ddpmctl.build import precision_name, resolve_device, resolve_precision
    from ddpmctl.errors import ConfigError
    from ddpmctl.resume import check_changes
    from ddpmctl.run import Run
    from ddpmctl.runfile import check_size
    from ddpmctl.sampling import config_of

    # Pinned, so that a resumed run computes as it began.
    precision = precision_name(resolve_precision(config.precision, resolve_device(config.device)))
    dataset = _load(config, folder if resume else None)
    found = {"size": dataset.size, "channels": dataset.channels}
    config = config.model_copy(update={"precision": precision, "data": config.data.model_copy(update=found)})
    check_size(config, dataset.size)
    if content is None:
        run = Run(config, dataset, folder)
        if first:
            _start_with(run, *first)
        return run
    path, saved = content
    changed = check_changes(config_of(saved, path), config, force=force)
    for key, before, after in changed:
        console.note(f"changed: {key}: {before} -> {after}")
    if saved["data"]["fingerprint"] != dataset.fingerprint and not force:
        raise ConfigError(f"{config.data.path}: not the images that this run was trained on",
                          "bring them back, start a new run with another --out, or add --force")  # fmt: skip
    run = Run(config, dataset, folder)
    run.restore(saved, path)
    if any(key == "train.lr" for key, *_ in changed):
        run.state.pardoned = run.state.rollbacks  # the user has seen to it: it is this learning rate that is meant
    return run


def _start_with(run: Run, path: Path, loaded: Loaded) -> None:
    from ddpmctl.initial import check_classes

    warning = check_classes(loaded, path, run.class_names)
    run.start_with(loaded.content, path)
    tell_notes(loaded.notes)
    console.note(f"starts with the weights of {path} ({loaded.format})")
    if warning:
        console.warn(warning)


def _load(config: RunConfig, resumed: RunFolder | None) -> ImageDataset:
    from ddpmctl.data.dataset import load_images
    from ddpmctl.errors import DataError

    assert config.data.path is not None
    path = Path(config.data.path)
    try:
        with console.reading() as progress:
            return load_images(config.data, path, progress=progress)
    except DataError as error:
        if resumed is None or path.exists():
            raise
        again = shlex.join(["ddpmctl", "train", "NEW-PLACE", "--resume", "--out", str(resumed.path)])
        raise DataError(error.problem, f"if the images have moved: {again}") from error


def _train(run: Run, deadline: float | None) -> int:
    """Consume the run's events: bar, notes, and a clean stop."""
    from ddpmctl.cli.stopping import StopFlag

    train, folder = run.config.train, run.folder
    run.begin()
    shown = Shown(run)
    with StopFlag(deadline, "--max-time") as stop, console.bar("training", train.steps, run.state.step) as bar:
        for event in run.train():
            shown.event(bar, event)
            if stop.reason():
                for last in run.stop():
                    shown.event(bar, last)
                break
        bar.describe("training")
    if stop.reason() and not run.finished():
        again = shlex.join(["ddpmctl", "train", "--resume", str(folder.path)])
        saved = "saved" if run.state.step else "nothing to save yet"
        console.note(f"stopped at step {run.state.step:,} by {stop.reason()}, {saved}. Go on with:  {again}")
        return Exit.STOPPED
    console.note(
        f"done: {folder.path}, checkpoint {folder.checkpoint_file(run.state.step).name}. Sample with:", "green"
    )
    name = folder.path.resolve().name or "samples"
    console.note("  " + shlex.join(["ddpmctl", "sample", str(folder.path), "-n", "64", "-o", f"{name}.png"]))
    return 0
