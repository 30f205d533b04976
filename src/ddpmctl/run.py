"""A run: what it trains, and the metrics, grids and checkpoints that it leaves along the way."""

from __future__ import annotations

import shlex
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ddpmctl import averages, checkpoint, initial, plot
from ddpmctl.build import compiling, precision_name, resolve_device
from ddpmctl.config import RunConfig
from ddpmctl.data.dataset import ImageDataset
from ddpmctl.divergence import Watch, advice, jump
from ddpmctl.errors import CheckpointError, DivergenceError, OutputError
from ddpmctl.evaluation.scoring import Scored
from ddpmctl.events import Back, Busy, Logged, Notice, Saved
from ddpmctl.files import there
from ddpmctl.images import save_png
from ddpmctl.keeping import Attempts, Kept
from ddpmctl.learner import new_learner, new_net
from ddpmctl.measures import new_measures
from ddpmctl.metrics import Window
from ddpmctl.ranks import ALONE, Ranks, Word
from ddpmctl.runfile import to_yaml
from ddpmctl.runfolder import RunFolder
from ddpmctl.training import TrainStep, train_steps
from ddpmctl.validation import Validated

LOOK_EVERY = 16
"""Steps after which the device is waited for at the latest, and all weights are gone through, to see how the run goes."""

Event = TrainStep | Busy | Saved | Logged | Back | Notice | Validated | Scored
"""What :meth:`Run.train` yields."""


class Run:
    """A run about to start or to go on: everything built and checked, nothing written yet.

    With several ``ranks`` it is that of the process which leads them; the others :func:`ddpmctl.following.follow`.
    ``device``: its own; None: that of ``config``. Raises :class:`DeviceError` for a device that is not there.
    """

    def __init__(
        self, config: RunConfig, dataset: ImageDataset, folder: RunFolder, *, ranks: Ranks = ALONE, device: torch.device | None = None
    ) -> None:
        self.config, self.dataset, self.folder, self.ranks = config, dataset, folder, ranks
        self.device = device or resolve_device(config.device)
        self.class_names = list(dataset.class_names)
        self.image_shape = (dataset.channels, *dataset.size)
        learner = new_learner(config, dataset, self.device)
        self.state, self.denoiser, self.batches, _, self.autocast = learner
        self.average, self.grid, self.validation, self.scoring = new_measures(config, dataset, learner, self.device, ranks)
        self._watch = Watch(config.train.bad_steps, scaling=self.state.scaler.is_enabled())
        self._window, self._begun, self._bad = Window(), False, 0
        self._unread: list[TrainStep] = []
        self._kept, self._trying = Kept(), Attempts()

    def start_with(self, content: dict[str, Any], path: Path) -> None:
        """Start with the weights of a checkpoint, whatever step they are of; raises :class:`CheckpointError`."""
        try:
            self.state.begin_with(content["net"], content["ema"]["net"])
        except RuntimeError as error:
            raise CheckpointError(f"{path}: its weights do not fit this run", "use another checkpoint") from error

    def restore(self, content: dict[str, Any], path: Path) -> None:
        """Go on from a checkpoint; raises :class:`CheckpointError` when it does not fit."""
        try:
            self.state.load_state_dict(content)
            self._window.restore(content.get("window", []))
            self._watch.in_a_row = int(content.get("bad_in_a_row", 0))
            self.folder.metrics.restore(content)
            planned = int(content.get("planned", self.state.step))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: does not fit this run", "resume with the settings it was made with"
            ) from error
        self._kept = Kept(self.state.step, planned, tried=planned, pending=not self._window.empty())

    def begin(self) -> None:
        """Make the run folder, and forget what lies past the step to go on from. Raises :class:`OutputError`."""
        self.folder.create(to_yaml(self.config))
        self.folder.write_bad_images(self._bad_images())
        self._rewind()
        self._begun = True

    def _rewind(self) -> None:
        # A stop before the row of its step was written leaves that row to the next stretch, which may be killed too.
        step = self.state.step
        self.folder.rewind(step, last_row=step if self._window.empty() else step - 1)

    def train(self) -> Iterator[Event]:
        """Train, write metrics, draw grids and save; yields each thing as it happens.

        Raises :class:`DivergenceError` when going back did not help, :class:`OutputError` when the last checkpoint cannot
        be written; whatever else cannot be written is a :class:`Notice`, and is tried again when it is due next.
        """
        self._window.restart_clock()
        if self.folder.metrics.unwritten:
            yield from self._trying(self.folder.metrics.path, self.folder.flush_metrics)
        yield from self._account()  # a stop came in between
        for done in self.steps():
            self._unread.append(done)
            if self._look_is_due() and not self._look():
                yield from self._go_back(self._watch.problem())
                continue
            if self.state.parts != self.config.train.grad_accum:
                yield from self.keep_parts("out of memory")
            yield done
            yield from self._account()

    def steps(self) -> Iterator[TrainStep]:
        """The steps alone, together with all other processes; nothing is kept of them."""
        with compiling(self.state.net, self.config.train.compile):
            steps = train_steps(self.state, self.denoiser, self.batches, self.config, self.ranks)
            while not self._at_end():
                self.ranks.tell(Word.STEP, self.state.parts)
                yield next(steps)

    def hand_over(self) -> None:
        """Give all other processes the present state."""
        if self.ranks.world > 1:
            self.ranks.tell(Word.LOAD)
            self.ranks.share(self.state.state_dict())

    def _look_is_due(self) -> bool:
        """Every few steps, and whenever something of this one is to be kept or shown."""
        if len(self._unread) >= LOOK_EVERY:
            return True
        kept = self._kept.due(self.state.step, self.config.train.save_every)
        return self._at_end() or kept or self._row_is_due() or self._grid_is_due() or self._snapshot_is_due()

    def _look(self) -> bool:
        """Take in what the steps since the last look came to; False where the run cannot go on from here."""
        looked, self._unread = self._unread, []
        if not looked:
            return True
        for done in looked:
            self._watch.add(done)
            self._window.add(done)
            if self._watch.diverged():
                return False
        if not self.state.sound():
            self._watch.add_overflow()
        return not self._watch.diverged()

    def _account(self) -> Iterator[Event]:
        """What is due at the present step and not yet done: its row of metrics, checkpoint and sample grid."""
        if len(self.batches.bad) > self._bad:
            yield from self._list_bad()
        if not self._window.empty() and self._row_is_due():
            result = scored = None
            if self._validation_is_due():
                result = yield from self.validate()
                yield from self._tell_jump(result)
            if self._evaluation_is_due():
                scored = yield from self.evaluate()
            if scored and scored.kid < self.folder.best_kid():
                yield from self._trying(self.folder.best_file, lambda: self._keep_as_best(scored.kid))
            row = self._row(result, scored)
            yield from self._trying(self.folder.metrics.path, lambda: self.folder.append_metrics(row))
            yield Logged(row)
        snapshot = self.folder.snapshot_file(self.state.step)
        if self._snapshot_is_due() and not there(snapshot):
            yield from self._trying(self.folder.averages, lambda: self._take(snapshot))
        if self._at_end() or self._checkpoint_is_due():
            yield from self._save_when_sound()
        if self._grid_is_due() and not self.folder.has_sample(self.state.step):
            yield from self.preview()

    def _list_bad(self) -> Iterator[Notice]:
        """Write down images that have turned out to be unreadable while they were streamed; the first of all is told."""
        if not self._bad:
            name, reason = next(iter(self.batches.bad.items()))
            yield Notice(f"{name}: {reason}: the next one takes its place, here and wherever that happens; see bad-images.csv")
        self._bad = len(self.batches.bad)
        yield from self._trying(self.folder.path / "bad-images.csv", lambda: self.folder.write_bad_images(self._bad_images()))

    def _bad_images(self) -> list[tuple[str, str]]:
        """Unreadable images, once each: those known at the start, and of a stream those that this stretch and others came to."""
        before = self.folder.bad_images() if self.dataset.stream else []
        return list(dict([*self.dataset.report.bad, *before, *self.batches.bad.items()]).items())

    def _at_end(self) -> bool:
        return self.state.step >= self.config.train.steps

    def _due(self, every: int) -> bool:
        return self.state.step > 0 and (self._at_end() or bool(every and self.state.step % every == 0))

    def _row_is_due(self) -> bool:
        return self._due(self.config.train.log_every) or self._validation_is_due() or self._evaluation_is_due()

    def _evaluation_is_due(self) -> bool:
        return self.scoring is not None and self._due(self.config.train.evaluate_every)

    def _validation_is_due(self) -> bool:
        return self.validation is not None and self._due(self.config.train.val_every)

    def _grid_is_due(self) -> bool:
        return self._due(self.config.train.sample_every)

    def _checkpoint_is_due(self) -> bool:
        """Every save_every steps; within a row of steps that could not be applied, when it is over."""
        return self._kept.due(self.state.step, self.config.train.save_every) and not self._watch.in_a_row

    def _snapshot_is_due(self) -> bool:
        every, step = self.config.train.ema_snapshot_every, self.state.step
        return bool(every and step and step % every == 0) and not self._watch.in_a_row

    def finished(self) -> bool:
        """Whether all steps are done, saved and shown."""
        written = self._window.empty() and not self.folder.metrics.unwritten
        return self._at_end() and written and self.folder.has_sample(self.state.step)

    def stop(self) -> Iterator[Event]:
        """Save the present step, unless it is; raises :class:`OutputError` when that fails."""
        if not self._look():
            yield from self._go_back(self._watch.problem())
        yield from self._save_when_sound(last=True)

    def _save_when_sound(self, *, last: bool = False) -> Iterator[Event]:
        if self.saved():
            return
        lost = self.folder.lost()
        try:
            path = self.save()
            if lost:
                yield Notice(f"{self.folder.path}: was moved, deleted or unlocked, and is taken up again under that name")
            yield Saved(path)
        except DivergenceError as error:
            yield from self._go_back(error.problem)
        except OutputError as error:
            if last or self._at_end():
                raise
            yield Notice(f"{error.problem}: going on, the next try is in {self.config.train.save_every:,} steps")
        else:
            prune = lambda: self.folder.prune(self.config.train.keep, self._kept.planned)
            yield from self._trying(self.folder.checkpoints, prune)

    def _go_back(self, problem: str) -> Iterator[Event]:
        """Back to the newest good checkpoint, or to the start, with other draws and half the learning rate."""
        train, state = self.config.train, self.state
        rollbacks, pardoned, lr = state.rollbacks, state.pardoned, state.optimizer.param_groups[0]["lr"]
        if state.halvings >= train.max_rollbacks:
            after = f" (after {state.halvings} rollbacks)" if state.halvings else ""
            again = shlex.join(["ddpmctl", "train", "--resume", str(self.folder.path)])
            raise DivergenceError(
                f"training diverged{after}: {problem}; lr {lr:.2g}",
                advice(state.step, precision_name(self.autocast), train.grad_clip, again),
            )
        if self.folder.lost():
            raise DivergenceError(f"training diverged: {problem}; and its folder was moved away, deleted or replaced",
                                  f"bring back {self.folder.path}")  # fmt: skip
        unreadable: list[str] = []
        # Not what a stop has added, so that stopping and going on changes nothing here either.
        found = self.folder.newest_good(unreadable.append, planned=True)
        if found:
            self.restore(found[1], found[0])
        elif self.folder.checkpoint_files() or self._kept.step:
            raise DivergenceError(
                f"training diverged: {problem}; and no checkpoint can be read", f"see to {self.folder.checkpoints}"
            )
        else:
            try:
                first = initial.load_again(self.config) if train.init_from else None
            except CheckpointError as error:
                raise DivergenceError(f"training diverged: {problem}; and {error.problem}", error.advice) from error
            state.restart(new_net(self.config, self.dataset))
            if first:
                self.start_with(first.content, Path(str(train.init_from)))
            self._window.restore([])
            self._kept = Kept()
        state.rollbacks, state.pardoned = rollbacks + 1, pardoned
        self.hand_over()
        self._watch.reset()
        with suppress(OutputError):  # the folder does it before it writes anything else
            self._rewind()
        yield Back(state.step)
        yield Notice(
            "; ".join([problem, *unreadable])
            + f": back to step {state.step:,} with half the lr, {state.halvings} of {train.max_rollbacks} times"
        )
        yield from self._account()  # a stop may have come before the row of that step

    def _write_settings(self) -> None:
        self.folder.ready()
        self.folder.write_text(self.folder.run_file, to_yaml(self.config))

    def keep_parts(self, reason: str) -> Iterator[Notice]:
        """The batch has been cut into more parts, for ``reason``: say so, and keep that for a resumed run."""
        train = self.config.train.model_copy(update={"grad_accum": self.state.parts})
        self.config = self.config.model_copy(update={"train": train})
        if self._begun:
            yield from self._trying(self.folder.run_file, self._write_settings)
        whose = f"the share of each of {self.ranks.world} processes in " if self.ranks.world > 1 else ""
        yield Notice(f"{reason}: {whose}a batch of {train.batch_size} goes in {train.grad_accum} parts, and stays one batch")

    def _take(self, snapshot: Path) -> None:
        self.folder.ready()
        averages.save(snapshot, [power.state_dict() for power in self.state.powers])

    def _row(self, result: Validated | None, scored: Scored | None) -> dict[str, object]:
        step, epoch = self.state.step, self.batches.epoch_of(self.state.step)
        return self._window.row(step, epoch, self.config.train.batch_size, result, scored)

    def _keep_as_best(self, kid: float) -> None:
        self.folder.ready()
        checkpoint.save(self.folder.best_file, {**self._content(self._kept.planned), "kid": kid})

    def save(self) -> Path:
        """Write the checkpoint of this step.

        Raises :class:`OutputError` when it cannot be written, :class:`DivergenceError` when something in it is no number.
        """
        bad = self.state.first_not_finite()
        if bad:
            raise DivergenceError(f"step {self.state.step:,}: not finite: {bad}", "resume with a lower --lr")
        step, planned = self.state.step, self._kept.planned
        if self._checkpoint_is_due():
            planned = step
            self._kept = self._kept._replace(tried=step)
        if self.folder.lost():
            self.folder.retake(step)
            self._begun = False
        if not self._begun:
            self.begin()
        self.folder.ready()
        with suppress(OutputError):  # rows that cannot be written go into the checkpoint instead
            self.folder.flush_metrics(to_disk=True)
        path = self.folder.checkpoint_file(step)
        checkpoint.save(path, self._content(planned))
        self._kept = Kept(step, planned, self._kept.tried, pending=not self._window.empty())
        self.folder.note_saved()
        return path

    def _content(self, planned: int) -> dict[str, Any]:
        """What a checkpoint of the present step holds."""
        return {
            **self.state.state_dict(),
            "config": self.config.to_dict(),
            "image_shape": list(self.image_shape),
            "class_names": self.class_names,
            "data": {"images": self.dataset.total, "fingerprint": self.dataset.fingerprint},
            "window": self._window.to_list(),
            "bad_in_a_row": self._watch.in_a_row,
            **self.folder.metrics.state_dict(),
            "planned": planned,
        }

    def saved(self) -> bool:
        """Whether the last checkpoint is of the present step, and the very last one not of a row that is written since."""
        return self._kept.step == self.state.step and not (self._at_end() and self._kept.pending and self._window.empty())

    def validate(self) -> Generator[Event, None, Validated]:
        """The loss of the averaged weights on held-out images; needs some."""
        assert self.validation is not None
        at_once = max(1, self.config.train.batch_size // self.state.parts)
        result = yield from self.validation(self.average, self.device, at_once, self.ranks)
        self._window.restart_clock()
        yield result
        return result

    def _tell_jump(self, result: Validated) -> Iterator[Notice]:
        with suppress(OutputError):  # metrics that cannot be read are told where they are written
            text = jump(self.state.step, result.loss, self.folder.metrics.read())
            if text:
                yield Notice(text)

    def evaluate(self) -> Generator[Event, None, Scored]:
        """KID of the averaged weights; needs ``train.evaluate_every``."""
        assert self.scoring is not None
        scored = yield from self.scoring()
        self._window.restart_clock()
        yield scored
        return scored

    def preview(self) -> Iterator[Event]:
        """Draw the sample grid of this step, and the loss curve."""
        picture = yield from self.grid.draw(self.average)
        path = self.folder.sample_file(self.state.step)
        made_with = {"kind": "preview", "step": self.state.step, "run": self.folder.path.name}
        try:
            self.folder.ready()
            save_png(path, picture, made_with)
            yield Saved(path)
        except OutputError as error:
            yield Notice(f"{error.problem}: going on without this grid")
        if plot.available():
            yield from self._trying(self.folder.loss_file, self._plot)
        self._window.restart_clock()

    def _plot(self) -> None:
        self.folder.ready()
        plot.metrics_curve(self.folder.loss_file, self.folder.metrics.read())

    def precision(self) -> str:
        """What the network computes in: fp32, bf16 or fp16."""
        return precision_name(self.autocast)
