"""What a run shows and measures of its averaged weights along the way, the same in every process of it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ddpmctl.build import build_denoiser
from ddpmctl.config import RunConfig
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.data.dataset import ImageDataset
from ddpmctl.evaluation.scoring import Scoring
from ddpmctl.learner import Learner
from ddpmctl.preview import Preview
from ddpmctl.ranks import Ranks, Word
from ddpmctl.turns import Work
from ddpmctl.validation import Validation


class Measures(NamedTuple):
    """``average``: the denoiser that all is measured of. ``validation``: None where nothing is held out; ``scoring``: None unless asked for."""

    average: Denoiser
    grid: Preview
    validation: Validation | None
    scoring: Scoring | None

    def works(self) -> dict[Word, Work]:
        """What every process does for the one that leads."""
        losses = {Word.LOSSES: self.validation.work(self.average, self.grid.device)} if self.validation else {}
        return {**losses, **(self.scoring.works() if self.scoring else {})}


def new_measures(config: RunConfig, dataset: ImageDataset, learner: Learner, device: torch.device, ranks: Ranks) -> Measures:
    """Of a run by ``learner`` on ``device``. Raises as :class:`Scoring`."""
    average = build_denoiser(config, learner.state.ema.net, learner.autocast)
    grid = Preview(config, (dataset.channels, *dataset.size), len(dataset.class_names), device)
    validation = Validation(dataset, learner.held, config.diffusion.loss) if len(learner.held) else None
    scoring = Scoring(dataset, config.train.evaluate_samples, average, grid, ranks) if config.train.evaluate_every else None
    return Measures(average, grid, validation, scoring)
