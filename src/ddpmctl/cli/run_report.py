"""What ``ddpmctl train`` tells before and during a run: summary, running numbers, and the rehearsal of a dry run."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from ddpmctl.cli import console

if TYPE_CHECKING:
    from ddpmctl.cli.showing import Show
    from ddpmctl.run import Event, Run
    from ddpmctl.training import TrainStep

_READ_EVERY = 0.1
"""Seconds between two looks at the loss, for each of which the device is waited for."""


def summary(run: Run) -> None:
    """All that a person would check before walking away."""
    from ddpmctl import plot
    from ddpmctl.describe import count_text, data_lines, device_text

    config, train = run.config, run.config.train
    parameters = sum(p.numel() for p in run.state.net.parameters())
    channels, height, width = run.image_shape
    epochs = run.batches.epoch_of(train.steps)
    kind = f"{len(run.class_names)} classes" if run.class_names else "unconditional"
    diffusion = config.diffusion
    rows = [
        ("data", f"{config.data.path}: {data_lines(run.dataset.report)}"),
        ("", f"as {height}x{width}, {'grey' if channels == 1 else 'RGB' if channels == 3 else 'RGBA'}, fit {config.data.fit}"
             + (", mirrored at random" if config.data.hflip else "")),
        ("model", f"UNet, {count_text(parameters)} parameters, {kind}"),
        ("diffusion", f"T = {diffusion.timesteps:,}, {diffusion.schedule} schedule, predicts {diffusion.prediction}, {diffusion.loss} loss"
             + (f" weighted by {diffusion.weighting}" if diffusion.weighting != "uniform" else "")
             + (f", t {diffusion.t_sampling}" if diffusion.t_sampling != "uniform" else "")
             + (f", offset noise {diffusion.offset_noise:g}" if diffusion.offset_noise else "")
             + (f", shift {diffusion.shift:g}" if diffusion.shift != 1 else "")
             + (", zero terminal SNR" if diffusion.zero_terminal_snr else "")
             + (", learns its variance" if diffusion.learn_variance else "")),
        ("device", f"{device_text(run.device)}, {run.precision()}" + (f"; {run.ranks.world} processes" if run.ranks.world > 1 else "")),
        ("training", f"{train.steps:,} steps of {train.batch_size} images = {epochs:,.1f} epochs, {train.optimizer} lr {train.lr:g}"),
        ("saved to", f"{run.folder.path}  (checkpoint every {train.save_every:,} steps, "
                     + (f"grid every {train.sample_every:,})" if train.sample_every else "grid at the end)")),
    ]  # fmt: skip
    if train.compile != "none":
        rows.insert(-2, ("compiled", f"by torch.compile, {train.compile}: the first step takes a minute or more"))
    if run.validation:
        every = f"every {train.val_every:,} steps" if train.val_every else "at the end"
        rows.insert(2, ("held out", f"{run.validation.count:,} images; val_loss is measured on them {every}"))
    if run.scoring:
        rows.append(("measured", f"KID of {run.scoring.n:,} samples every {train.evaluate_every:,} steps: {train.sampler}, {run.grid.steps} steps; "
                                 f"the best is {run.folder.best_file.relative_to(run.folder.path)}"))  # fmt: skip
    if train.log:
        rows.append(("logged to", ", ".join(train.log)))
    if run.state.step:
        times = run.state.halvings
        halved = f", lr halved {'once' if times == 1 else f'{times} times'} after it diverged" if times else ""
        rows.append(("resumed", f"from step {run.state.step:,}{halved}"))
    for name, text in rows:
        console.field(name, text)
    for line in run.dataset.report.warnings(size=run.dataset.size, channels=channels, fit=config.data.fit, batch_size=train.batch_size):
        console.warn(line)
    if not plot.available():
        console.warn(f"no loss.png: {plot.MISSING} ({plot.REMEDY})")


class Shown:
    """What a run's events look like on the screen."""

    def __init__(self, run: Run, show: Show) -> None:
        """``show``: what is done with each grid."""
        self.run, self.show, self.meter = run, show, Meter(run.config.train.batch_size)

    def event(self, bar: console.Bar, event: Event) -> None:
        """Show one event on, above or beside the bar."""
        from ddpmctl.evaluation.scoring import Scored
        from ddpmctl.events import Busy, Notice, Saved
        from ddpmctl.training import TrainStep
        from ddpmctl.validation import Validated

        if isinstance(event, TrainStep):
            bar.describe("training")
            bar.update(event.step, self.meter.text(event))
            return
        self.meter.pause()
        if isinstance(event, Busy):
            bar.describe(f"{event.what} {event.done}/{event.total}")
        elif isinstance(event, Notice):
            console.warn(event.text)
            bar.update(self.run.state.step)  # it may have gone back
        elif isinstance(event, Validated):
            quarters = " ".join(f"{loss:.4f}" for loss in event.quarters)
            bar.note(f"step {self.run.state.step:,}: held-out loss {event.loss:.4f} (by quarter of t: {quarters})")
        elif isinstance(event, Scored):
            bar.note(f"step {self.run.state.step:,}: KID {event.kid:.5f} ± {event.spread:.5f} of {event.n:,} samples")
        elif isinstance(event, Saved) and event.path.suffix == ".png":
            bar.note(f"step {self.run.state.step:,}: {event.path}")
            self.show(event.path)


class Meter:
    """Smoothed loss and images a second."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size, self.loss, self.seconds = batch_size, math.nan, math.nan
        self.last, self.read, self.unread = time.monotonic(), -math.inf, 0

    def pause(self) -> None:
        """Time until the next step is not training time."""
        self.last = time.monotonic()

    def text(self, done: TrainStep) -> str:
        """The numbers after a step. Its loss is read ten times a second at most; one that is not finite is passed over."""
        now = time.monotonic()
        took, self.last, self.unread = now - self.last, now, self.unread + 1
        self.seconds = took if math.isnan(self.seconds) else self.seconds + 0.05 * (took - self.seconds)
        if now - self.read >= _READ_EVERY:
            if math.isfinite(done.loss):
                kept = 0.98**self.unread
                self.loss = done.loss if math.isnan(self.loss) else kept * self.loss + (1 - kept) * done.loss
            self.read, self.unread = now, 0
        return f"loss {self.loss:.4f}  lr {done.lr:.1e}  {self.batch_size / max(self.seconds, 1e-9):.0f} img/s"


def rehearse(run: Run) -> None:
    """A step and a sample of two steps; report memory and expected time."""
    from ddpmctl.core.samplers import evaluations
    from ddpmctl.describe import memory_text, time_text
    from ddpmctl.preflight import preflight

    train, first = run.config.train, run.state.step
    remaining = train.steps - first
    if remaining <= 0:
        console.note(f"nothing to do: the run has {first:,} steps. Nothing was written.")
        return
    for notice in preflight(run):
        console.warn(notice.text)
    marks, loss = [time.monotonic()], math.nan
    for done in run.steps():
        loss = done.loss
        marks.append(time.monotonic())
        if len(marks) > 2 and marks[-1] - marks[1] > 2:
            break
    # The first step also warms up: it counts only when there is no other.
    seconds = (marks[-1] - marks[1]) / (len(marks) - 2) if len(marks) > 2 else marks[1] - marks[0]
    steps, n = min(2, run.config.diffusion.timesteps), min(train.samples, train.batch_size)
    started = time.monotonic()
    for _, state in run.grid.walk(run.average, range(n), steps):
        state.x_t.cpu()  # waits for the device
    call_seconds = (time.monotonic() - started) / evaluations(train.sampler, steps) * -(-train.samples // n)
    grid_seconds = call_seconds * evaluations(train.sampler, run.grid.steps)
    grids = _times(train.sample_every or train.steps, first, train.steps)
    console.note(f"one step: loss {loss:.4f}, {seconds:.3f} s; one grid of {train.samples}: {time_text(grid_seconds)}")
    console.note(f"memory: {memory_text(run.device)}")
    scored = ""
    if run.scoring:
        scores = _times(train.evaluate_every, first, train.steps)
        needed = grid_seconds * run.scoring.n / train.samples * scores
        scored = f" + {time_text(needed)} for the samples of {scores} measurements of KID, and their features"
    console.note(
        f"expected: {time_text(seconds * remaining)} for {remaining:,} steps"
        f" + {time_text(grid_seconds * grids)} for {grids} grids{scored}. Nothing was written."
    )


def _times(every: int, first: int, last: int) -> int:
    """How often something comes after step ``first`` that comes every so many steps, and at the last."""
    return -(-last // every) - first // every
