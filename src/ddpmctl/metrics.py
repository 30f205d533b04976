"""The numbers of the steps between two rows of ``metrics.csv``."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from ddpmctl.evaluation.scoring import Scored
from ddpmctl.training import TrainStep
from ddpmctl.validation import Validated


class Window:
    """Collects steps, and makes a row of them; what it holds goes into checkpoints, so that no step is lost."""

    def __init__(self) -> None:
        self._steps: list[tuple[float, float, float, bool]] = []
        self._timed, self._seconds, self._last = 0, 0.0, time.monotonic()

    def restart_clock(self) -> None:
        """What came since the last step was no training: it does not count for images a second."""
        self._last = time.monotonic()

    def add(self, done: TrainStep) -> None:
        """Take in a step."""
        self._steps.append((done.loss, done.grad_norm, done.lr, done.applied))
        before, self._last = self._last, time.monotonic()
        self._timed, self._seconds = self._timed + 1, self._seconds + self._last - before

    def empty(self) -> bool:
        """Whether there is nothing to write."""
        return not self._steps

    def to_list(self) -> list[list[float]]:
        """Plain numbers for a checkpoint."""
        return [list(step) for step in self._steps]

    def restore(self, content: Sequence[Sequence[Any]]) -> None:
        """Take over a :meth:`to_list`; raises ``ValueError`` when it is none."""
        self._steps = [(float(loss), float(norm), float(lr), bool(applied)) for loss, norm, lr, applied in content]
        self._timed, self._seconds, self._last = 0, 0.0, time.monotonic()

    def row(
        self, step: int, epoch: float, batch_size: int, result: Validated | None, scored: Scored | None
    ) -> dict[str, object]:
        """Means over the steps since the last row, and a fresh start. Steps that were not applied count as skipped."""
        good = [(loss, norm) for loss, norm, _, applied in self._steps if applied] or [(math.nan, math.nan)]
        row: dict[str, object] = {
            "step": step,
            "epoch": f"{epoch:.4f}",
            "loss": f"{sum(loss for loss, _ in good) / len(good):.6g}",
            "grad_norm": f"{sum(norm for _, norm in good) / len(good):.6g}",
            "lr": f"{self._steps[-1][2]:.6g}",
            "skipped": sum(not applied for *_, applied in self._steps),
        }
        if self._timed:  # not where all steps were taken over from a checkpoint
            row["images_per_s"] = f"{self._timed * batch_size / max(self._seconds, 1e-9):.1f}"
        if result:
            quarters = {f"val_q{i}": f"{loss:.6g}" for i, loss in enumerate(result.quarters, start=1)}
            row |= {"val_loss": f"{result.loss:.6g}", **quarters}
        if scored:
            row |= {"kid": f"{scored.kid:.6g}", "kid_spread": f"{scored.spread:.6g}"}
        self._steps, self._timed, self._seconds = [], 0, 0.0
        return row
