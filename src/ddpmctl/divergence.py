"""When training stops being numbers: how long to wait, and what to tell the user."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from ddpmctl.training import TrainStep

LOSS_SCALING = 5
"""With fp16 so many times the patience: its loss scaling skips steps until it has found its scale."""

_REMEMBERED = 5


class Watch:
    """Counts steps in a row that could not be applied, and remembers the last good ones.

    ``patience``: how many may come in a row. ``scaling``: the loss is scaled, so that some are to be expected.
    """

    def __init__(self, patience: int, *, scaling: bool) -> None:
        self.patience = patience * (LOSS_SCALING if scaling else 1)
        self.in_a_row = 0
        self.good: deque[TrainStep] = deque(maxlen=_REMEMBERED)
        self.last: TrainStep | None = None
        self.overflowed = False

    def add(self, done: TrainStep) -> None:
        """Take in a step."""
        self.last = done
        self.in_a_row = 0 if done.applied else self.in_a_row + 1
        if done.applied:
            self.good.append(done)

    def add_overflow(self) -> None:
        """The weights are no numbers any more, which the last step has done, or one shortly before."""
        self.overflowed = True
        if self.good and self.good[-1] is self.last:
            self.good.pop()

    def diverged(self) -> bool:
        """Whether the run cannot go on from here."""
        return self.in_a_row >= self.patience or self.overflowed

    def reset(self) -> None:
        """Forget the steps that were taken back."""
        self.in_a_row, self.last, self.overflowed = 0, None, False
        self.good.clear()

    def problem(self) -> str:
        """What happened, in a line: step, loss before, and the layer with the largest gradient."""
        assert self.last is not None
        what = f"gradients or loss were not finite {self.in_a_row} steps in a row"
        if self.overflowed:
            what = "the weights overflowed"
        text = f"step {self.last.step:,}: {what}"
        if not self.good:
            first = self.last.step - max(self.in_a_row, 1) + 1
            return f"{text}, from step {first:,} on; the first bad gradient is that of {self.last.largest}"
        losses = ", ".join(f"{done.loss:.4g}" for done in self.good)
        worst = max(self.good, key=lambda done: done.grad_norm)
        return (
            f"{text}; the losses before: {losses}; largest gradient norm {worst.grad_norm:.3g}, "
            f"most of it in {worst.largest} at step {worst.step:,}"
        )


JUMP = 2.0
"""So many times the held-out loss before is a jump: the noise in it is always the same, and it rises slowly if at all."""


def jump(step: int, loss: float, rows: Sequence[Mapping[str, str]]) -> str | None:
    """What to tell of the held-out ``loss`` after ``rows`` of metrics; None where it has not jumped since the last of them.

    It happens with numbers that are finite all the time: attention that hardens at a high learning rate, one step too far.
    """
    last = next((row for row in reversed(rows) if row["val_loss"]), None)
    if last is None or loss <= JUMP * float(last["val_loss"]):
        return None
    return (
        f"step {step:,}: the held-out loss has jumped to {loss:.4f}, from {float(last['val_loss']):.4f} at step "
        f"{int(last['step']):,}: training came apart in between. It may recover; if not, start again with a lower "
        "--lr or with --set model.qk_norm=true"
    )


WARMUP = 1000


def advice(step: int, precision: str, grad_clip: float, resume: str) -> str:
    """What to try after it went wrong at ``step``, with the settings as they are."""
    tries = ["a lower --lr"]
    if not grad_clip:
        tries.append("--set train.grad_clip=1")
    if precision != "fp32":
        tries.append("--precision fp32")
    if step <= WARMUP:
        tries.append(f"--set train.lr_warmup={WARMUP}")
    return f"try {', '.join(tries)}, with: {resume}"
