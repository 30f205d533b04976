"""``ddpmctl train``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpmctl.cli import console
from ddpmctl.cli.options import Debug, Quiet, choices, complete, switch
from ddpmctl.cli.run_report import Meter, rehearse, summary

if TYPE_CHECKING:
    from ddpmctl.config import RunConfig
    from ddpmctl.data.dataset import ImageDataset
    from ddpmctl.run import Run
    from ddpmctl.runfile import Layer
    from ddpmctl.runfolder import RunFolder

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
    from ddpmctl.runfile import flag_layer

    flags = flag_layer(
        {
            "device": device, "precision": precision, "seed": seed, "data.size": size, "diffusion.timesteps": timesteps,
            "diffusion.schedule": schedule, "diffusion.loss": loss, "diffusion.prediction": prediction,
            "train.steps": steps, "train.batch_size": batch_size, "train.lr": lr,
        },
        settings or [],
    )  # fmt: skip
    folder, run_config, content = _settle(data, config, out, flags, resume=resume, overwrite=overwrite)
    run = _prepare(run_config, folder, content, force=force)
    summary(run)
    if dry_run:
        rehearse(run)
        return 0
    if overwrite and folder.exists() and not resume:
        folder.clear()
    return _train(run)


def _settle(
    data: Path | None, config: Path | None, out: Path | None, flags: Layer, *, resume: bool, overwrite: bool
) -> tuple[RunFolder, RunConfig, tuple[Path, dict[str, Any]] | None]:
    """Which folder, which settings, and which checkpoint to go on from. Reads, but writes nothing."""
    from ddpmctl.errors import CheckpointError, ConfigError, OutputError
    from ddpmctl.files import check_place
    from ddpmctl.runfile import Layer, check_size, config_layer, read_run_file
    from ddpmctl.runfile import resolve as merge
    from ddpmctl.runfolder import RunFolder

    layers = [read_run_file(config)] if config else []
    is_run = data is not None and RunFolder(data).is_run()
    if is_run and not resume:
        raise ConfigError(f"{data}: a run folder, not a folder of images", "add --resume to go on with it")
    if data is not None and not is_run:
        layers.append(Layer({"data.path": str(data)}, {"data.path": "DATA"}))
    layers.append(flags)
    if out is None:
        path = next((layer.values["data.path"] for layer in reversed(layers) if layer.values.get("data.path")), None)
        out = data if is_run else Path("runs") / _name_of(Path(str(path))) if path else None
    if out is None:
        raise ConfigError("no DATA: nothing to train on", "name a folder or .zip of images, or set data.path")

    folder, content = RunFolder(out), None
    if resume:
        if not folder.is_run():
            raise OutputError(
                f"{out}: nothing to resume, no run.yaml there", "leave --resume out, or name the run with --out"
            )
        content = folder.newest_good(console.warn)
        if content is None and folder.checkpoint_files():
            raise CheckpointError(
                f"{out}: none of its checkpoints can be read", "bring one back, or start again with --overwrite"
            )
        layers.insert(
            0, config_layer(content[1]["config"], str(content[0])) if content else read_run_file(folder.run_file)
        )
    check_place(out)
    settled = merge(*layers)
    if resume and content is None:
        rows = folder.read_metrics()
        if rows and int(rows[-1]["step"]) >= settled.train.save_every:
            raise CheckpointError(f"{out}: its checkpoints are gone", "bring one back, or start again with --overwrite")
        console.warn(f"{out}: no checkpoint yet, so it starts from step 0")
    if settled.data.path is None:
        raise ConfigError("no DATA: nothing to train on", "name a folder or .zip of images, or set data.path")
    if not resume and folder.exists() and not (overwrite and folder.is_run()):
        raise OutputError(
            f"{out}: exists", "add --resume to go on, --overwrite to replace a run, or give another --out"
        )
    if settled.data.size != "auto":
        check_size(settled, settled.data.size)
    return folder, settled, content


def _name_of(data: Path) -> str:
    """Name of a run that trains on ``data``: the folder's, or the zip's without its ending."""
    full = data.resolve()
    return (full.name if full.is_dir() else full.stem) or "run"


def _prepare(config: RunConfig, folder: RunFolder, content: tuple[Path, dict[str, Any]] | None, *, force: bool) -> Run:
    """Load the images, build the run, and take over the checkpoint."""
    from ddpmctl.build import precision_name, resolve_device, resolve_precision
    from ddpmctl.errors import ConfigError
    from ddpmctl.resume import check_changes
    from ddpmctl.run import Run
    from ddpmctl.runfile import check_size
    from ddpmctl.sampling import config_of

    # Pinned, so that a resumed run computes as it began.
    precision = precision_name(resolve_precision(config.precision, resolve_device(config.device)))
    dataset = _load(config)
    found = {"size": dataset.size, "channels": dataset.channels}
    config = config.model_copy(update={"precision": precision, "data": config.data.model_copy(update=found)})
    check_size(config, dataset.size)
    if content is None:
        return Run(config, dataset, folder)
    path, saved = content
    for key, before, after in check_changes(config_of(saved, path), config, force=force):
        console.note(f"changed: {key}: {before} -> {after}")
    if saved["data"]["fingerprint"] != dataset.fingerprint and not force:
        raise ConfigError(f"{config.data.path}: not the images that this run was trained on",
                          "bring them back, start a new run with another --out, or add --force")  # fmt: skip
    run = Run(config, dataset, folder)
    run.restore(saved, path)
    return run


def _load(config: RunConfig) -> ImageDataset:
    from ddpmctl.data.dataset import load_images

    assert config.data.path is not None
    with console.reading() as progress:
        return load_images(config.data, Path(config.data.path), progress=progress)


def _train(run: Run) -> int:
    """Consume the run's events: bar, notes, and a clean stop."""
    from ddpmctl.cli.stopping import StopFlag
    from ddpmctl.errors import Exit
    from ddpmctl.run import PreviewStep, Saved
    from ddpmctl.runfile import to_yaml
    from ddpmctl.training import TrainStep

    train, folder = run.config.train, run.folder
    if run.finished():
        console.note(f"nothing to do: the run has {run.state.step:,} steps; ask for more with --steps")
        return 0
    folder.create()
    folder.write_text(folder.run_file, to_yaml(run.config))
    folder.write_bad_images(run.dataset.report.bad)
    folder.rewind(run.state.step)
    meter = Meter(train.batch_size)
    with StopFlag() as stop, console.bar("training", train.steps, run.state.step) as bar:
        for event in run.train():
            if isinstance(event, TrainStep):
                bar.describe("training")
                bar.update(event.step, meter.text(event.loss, event.lr))
            else:
                meter.pause()
            if isinstance(event, PreviewStep):
                bar.describe(f"sampling {event.done}/{event.total}")
            elif isinstance(event, Saved) and event.path.suffix == ".png":
                bar.note(f"step {run.state.step:,}: {event.path}")
            if stop.name and not run.saved():
                run.save()
            if stop.name:
                break
    again = shlex.join(["ddpmctl", "train", "--resume", str(folder.path)])
    if stop.name and not run.finished():
        console.note(f"stopped at step {run.state.step:,} by {stop.name}, saved. Go on with:  {again}")
        return Exit.STOPPED
    console.note(
        f"done: {folder.path}, checkpoint {folder.checkpoint_file(run.state.step).name}. Sample with:", "green"
    )
    console.note(
        "  " + shlex.join(["ddpmctl", "sample", str(folder.path), "-n", "64", "-o", f"{folder.path.name}.png"])
    )
    return 0
