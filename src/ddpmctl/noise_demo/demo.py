"""The forward process of one picture under several schedules, as a still figure or an animation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ddpmctl import plot
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.images import enlarged, to_pil, to_uint8
from ddpmctl.noise_demo.figure import GAP, Cell, Heading, Panel, Row, draw
from ddpmctl.noise_demo.levels import decibels, level, noised, psnr_db

CELL = 160
"""Pictures are shown at about so many pixels along their longer side, unless they are larger."""


@dataclass(frozen=True)
class Estimator:
    """A trained model that estimates the picture from each noised one; ``name`` and ``digest`` say which.

    ``label`` is (1,), or None for a model without classes.
    """

    denoiser: Denoiser
    device: torch.device
    label: Tensor | None
    name: str
    digest: str


@dataclass(frozen=True)
class Demo:
    """What is shown: ``picture`` uint8 (C, H, W), and one ``eps`` (1, C, H, W) for all frames."""

    picture: Tensor
    eps: Tensor
    schedules: dict[str, NoiseSchedule]
    estimator: Estimator | None = None

    @property
    def scale(self) -> int:
        """How many times each pixel is repeated, each way, to make small pictures visible."""
        return max(1, round(CELL / max(self.picture.shape[1:])))

    @property
    def timesteps(self) -> int:
        """T, the same for all schedules."""
        return next(iter(self.schedules.values())).timesteps

    def shown_pixels(self, levels: int) -> int:
        """Pixels of all pictures that so many levels make, enlarged as they are."""
        tracks = len(self.schedules) + bool(self.estimator)
        return levels * tracks * self.picture[0].numel() * self.scale**2

    def shown_width(self, levels: int) -> int:
        """Pixels across of so many levels side by side."""
        return levels * (self.picture.shape[2] * self.scale + GAP)

    def facts(self) -> dict[str, Any]:
        """What made the figure, for its provenance."""
        facts = {
            "timesteps": self.timesteps,
            "schedules": list(self.schedules),
            "shape": list(self.picture.shape),
        }
        return {**facts, "checkpoint": self.estimator.digest} if self.estimator else facts

    def still(self, levels: Sequence[int]) -> Image.Image:
        """One figure: a column for each level, a row for each schedule, the estimates of x_0 below."""
        rows = [
            Row(f"{name}, T = {self.timesteps}", [self._noised(schedule, t) for t in levels], colour)
            for (name, schedule), colour in zip(self.schedules.items(), cycle(plot.COLOURS), strict=False)
        ]
        if self.estimator:
            schedule = next(iter(self.schedules.values()))
            title = f"estimate of x₀ from each of these, by {self.estimator.name}"
            rows.append(Row(title, [self._estimated(self.estimator, schedule, t) for t in levels]))
        return draw([Heading(f"t = {t}") for t in levels], rows, self._panel(levels, 280))

    def animation(self, levels: Sequence[int]) -> Iterator[Image.Image]:
        """A figure for each level: a column for each schedule, and one for the estimate of x_0."""
        headings = [Heading(*pair) for pair in zip(self.schedules, cycle(plot.COLOURS), strict=False)]
        if self.estimator:
            headings.append(Heading("estimate of x₀"))
        for t in levels:
            cells = [self._noised(schedule, t) for schedule in self.schedules.values()]
            if self.estimator:
                cells.append(self._estimated(self.estimator, next(iter(self.schedules.values())), t))
            yield draw(headings, [Row("", cells)], self._panel([t], 240), title=f"t = {t} of {self.timesteps}")

    def _noised(self, schedule: NoiseSchedule, t: int) -> Cell:
        x_t = noised(self.picture, self.eps, schedule, t)
        return Cell(self._shown(to_uint8(x_t[0])), level(schedule, t).lines())

    @torch.no_grad()
    def _estimated(self, estimator: Estimator, schedule: NoiseSchedule, t: int) -> Cell:
        """The model's estimate of x_0 from x_t; nothing at t = 0, where there is nothing to estimate."""
        if t == 0:
            return Cell(None, ("clean already",))
        x_t = noised(self.picture, self.eps, schedule, t).to(estimator.device)
        x0 = to_uint8(estimator.denoiser(x_t, t, estimator.label)[0][0]).cpu()
        return Cell(self._shown(x0), (f"PSNR {decibels(psnr_db(self.picture, x0))}",))

    def _shown(self, image: Tensor) -> Image.Image:
        return enlarged(to_pil(image), self.scale)

    def _panel(self, marks: Sequence[int], height: int) -> Panel | None:
        if not plot.available():
            return None
        curves = {name: schedule.snr_db().tolist() for name, schedule in self.schedules.items()}
        return lambda width: plot.snr_panel(curves, marks, (width, height))
