"""``ddpmctl train``."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddpmctl.cli import console, options
from ddpmctl.cli.options import Debug, Devices, Quiet, choices, complete, reading, switch
from ddpmctl.cli.run_report import Shown, rehearse, summary
from ddpmctl.cli.showing import Show, shower
from ddpmctl.cli.together import devices_of, joined, spread_over
from ddpmctl.errors import Exit
from ddpmctl.parsing import parse_duration

if TYPE_CHECKING:
    from ddpmctl.launch import Order, Voice
    from ddpmctl.ranks import Ranks
    from ddpmctl.run import Run

_BEGUN = "begun"
_DIFFUSION, _RUNNING = "What is learned", "The run"


def train(
    data: Annotated[str | None, typer.Argument(metavar="DATA", help="Folder or .zip of images, tar shards ('x/{000..099}.tar'), torchvision:NAME or hf:NAME; with --resume, a run folder.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help="YAML run file; flags go before it.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Run folder.  [default: runs/NAME of the data]")] = None,
    steps: Annotated[str | None, typer.Option(metavar="COUNT", help="Training steps: 500, 100k, 1.5M, 1e5.  [default: 100k]", rich_help_panel=_RUNNING)] = None,
    batch_size: Annotated[str | None, typer.Option(metavar="COUNT", help="Images a step.  [default: 128]", rich_help_panel=_RUNNING)] = None,
    lr: Annotated[str | None, typer.Option(metavar="NUMBER", help="Learning rate, such as 2e-4.  [default: 2e-4]", rich_help_panel=_RUNNING)] = None,
    size: Annotated[str | None, typer.Option(metavar="SIZE", help="32, 48x64 (height x width), or auto.  [default: 64]", rich_help_panel=_DIFFUSION)] = None,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.  [default: auto]", rich_help_panel=_RUNNING)] = None,
    devices: Devices = None,
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
    log: Annotated[list[str] | None, typer.Option("--log", metavar=f"{choices('boards', 'BOARDS')}|none", help="Show numbers and grids there, too; repeatable. Needs the extra of that name.", autocompletion=complete("boards", "BOARDS"), rich_help_panel=_RUNNING)] = None,
    max_time: Annotated[int | None, typer.Option(metavar="TIME", help="Save and stop after 3h50m, 90m, 1d12h; go on with --resume.", parser=reading(parse_duration), rich_help_panel=_RUNNING)] = None,
    resume: Annotated[bool, switch("--resume", "Go on where the run folder stopped.", _RUNNING)] = False,
    force: Annotated[bool, switch("--force", "Resume though what is learned has changed.", _RUNNING)] = False,
    overwrite: Annotated[bool, switch("--overwrite", "Replace the run folder.", _RUNNING)] = False,
    dry_run: Annotated[bool, switch("--dry-run", "Check all, try a step and a sample, write nothing.", _RUNNING)] = False,
    show: options.Show = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:  # fmt: skip
    """Train a diffusion model on a folder of images.

    Example: `ddpmctl train photos/ --size 64 --steps 100k`

    Every key of a run file, with its meaning: `ddpmctl inspect --defaults`.
    """
    from ddpmctl.data.names import place_of
    from ddpmctl.launch import Order, Voice, launched
    from ddpmctl.runfile import flag_layer

    began, each = time.monotonic(), devices_of(devices, device)
    flags = flag_layer(
        {
            "device": each[0] if len(each) == 1 else device, "precision": precision, "seed": seed, "data.size": size, "diffusion.timesteps": timesteps,
            "diffusion.schedule": schedule, "diffusion.loss": loss, "diffusion.prediction": prediction,
            "train.steps": steps, "train.batch_size": batch_size, "train.lr": lr,
            "train.evaluate_every": evaluate_every, "train.init_from": str(init_from) if init_from else None,
            "data.cache": cache, "train.log": log or None,
        },
        settings or [],
    )  # fmt: skip
    shown, code = shower(show), spread_over(each)
    if code is not None:
        return code
    with joined() as ranks:
        if not ranks.leads:
            _follow(ranks, each)
            return 0
        order = Order.of(None if data is None else place_of(data), out, config, flags, resume=resume, force=force, overwrite=overwrite)
        order = order if dry_run else order.after(ranks.noted(_BEGUN))
        voice = Voice(console.note, console.warn, console.reading)
        with launched(order, voice, dry=dry_run, ranks=ranks, devices=each) as run:
            code = _go(run, order, voice, began + max_time if max_time else None, shown, dry_run=dry_run)
            ranks.end()
        # torchrun knows success and failure only, and would start again what was told to stop.
        return 0 if code == Exit.STOPPED and ranks.started.by_torchrun else code


def _follow(ranks: Ranks, devices: tuple[str, ...]) -> None:
    """What a process does that does not lead."""
    from ddpmctl.following import follow
    from ddpmctl.stopping import StopFlag

    with StopFlag(quiet=True) as stop:
        follow(ranks, devices, stop.number)


def _go(run: Run, order: Order, voice: Voice, deadline: float | None, show: Show, *, dry_run: bool) -> int:
    """Say what is to come, try it, and train."""
    from ddpmctl.launch import begin

    summary(run)
    if dry_run:
        rehearse(run)
        return 0
    if run.finished():
        console.note(f"nothing to do: the run has {run.state.step:,} steps; ask for more with --steps")
        return 0
    begin(run, order, voice)
    run.ranks.note(_BEGUN)  # an older run in that place is none of this job's, and stays what it was
    return _train(run, deadline, show)


def _train(run: Run, deadline: float | None, show: Show) -> int:
    """Consume the run's events: bar, notes, and a clean stop."""
    from ddpmctl.launch import trained
    from ddpmctl.stopping import StopFlag

    train, folder = run.config.train, run.folder
    shown = Shown(run, show)
    stopping = StopFlag(deadline, "--max-time", lambda: run.ranks.asked, quiet=console.is_quiet())
    with stopping as stop, console.bar("training", train.steps, run.state.step) as bar:
        for event in trained(run, stop.reason):
            shown.event(bar, event)
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
