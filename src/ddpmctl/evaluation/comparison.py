"""What ``ddpmctl evaluate`` and :func:`ddpmctl.evaluate` are asked for: checked at once, and then done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpmctl.checks import check_choices, check_counts, check_ema_length
from ddpmctl.errors import ConfigError, OutputError
from ddpmctl.files import check_place
from ddpmctl.plans import Recipe
from ddpmctl.rows import row_names

if TYPE_CHECKING:
    import torch

    from ddpmctl.evaluation.facts import Bars, Facts
    from ddpmctl.ranks import Ranks
    from ddpmctl.sampling import Model

FEWEST, MOST = 5, 200_000
"""Of the images that are compared."""

SHEET_OF = 8
"""Samples on the sheet."""


@dataclass(frozen=True)
class Comparison:
    """A model, or a set of images, against images; fields are the flags of ``ddpmctl evaluate``, and ``cache`` is not ``--no-cache``.

    Raises :class:`ConfigError` for what cannot be meant, before anything takes long, and :class:`OutputError` for a sheet
    whose place is taken.
    """

    what: Path
    data: Path
    recipe: Recipe
    n: int = 2048
    features: str = "efficientnet-lite0"
    feature_weights: Path | None = None
    class_name: str | None = None
    seed: int = 0
    weights: str = "ema"
    ema_length: float | None = None
    size: Any = None
    batch_size: int = 64
    precision: str = "fp32"
    sheet: Path | None = None
    sheet_of: int = SHEET_OF
    overwrite: bool = False
    cache: bool = True

    def __post_init__(self) -> None:
        check_choices({
            "--features": (self.features, row_names("evaluation.features", "FEATURES")),
            "--weights": (self.weights, ("ema", "raw")), "--precision": (self.precision, ("fp32", "bf16", "fp16")),
        })  # fmt: skip
        check_ema_length(self.ema_length, self.weights)
        check_counts({"-n": self.n, "--batch-size": self.batch_size, "--sheet-of": self.sheet_of})
        if not FEWEST <= self.n <= MOST:
            raise ConfigError(f"-n {self.n:,}: must be {FEWEST} to {MOST:,}", "2048 or more tell models apart")
        self._check_sheet()
        recipe = self.recipe
        of_models = {"--quality": recipe.quality, "--sampler": recipe.sampler, "--steps": recipe.steps, "--spacing": recipe.spacing,
                     "--class": self.class_name, "--guidance": recipe.guidance if recipe.guidance != 1 else None,
                     "--sheet": self.sheet, "--ema-length": self.ema_length, "--weights": self.weights if self.weights != "ema" else None,
                     "--precision": self.precision if self.precision != "fp32" else None}  # fmt: skip
        for flag, value in (of_models if self.two_sets else {"--size": self.size}).items():
            if value is not None:
                why = "it is images: there is nothing to sample" if self.two_sets else "a checkpoint: it has its own size"
                raise ConfigError(f"{flag}: {self.what}: {why}", f"leave {flag} out")

    def _check_sheet(self) -> None:
        if self.sheet is None:
            if self.sheet_of != SHEET_OF:
                raise ConfigError(f"--sheet-of {self.sheet_of}: there is no sheet", "add --sheet X.png, or leave --sheet-of out")
            return
        if self.sheet.suffix.lower() != ".png":
            raise ConfigError(f"--sheet {self.sheet}: must end in .png", f"--sheet {self.sheet.with_suffix('.png')}")
        if self.sheet.exists() and not self.overwrite:
            raise OutputError(f"{self.sheet}: exists", "choose another name, or add --overwrite")
        check_place(self.sheet)

    @cached_property
    def two_sets(self) -> bool:
        """Whether images stand where a checkpoint may; a folder of checkpoints alone is none."""
        from ddpmctl.inspection import kind_of

        return kind_of(self.what) == "data" and not (self.what.is_dir() and any(self.what.glob("step-*.pt")))

    def run(
        self, ranks: Ranks, device: torch.device, *,
        told: Callable[[Model], object], warn: Callable[[str], object], bars: Bars,
    ) -> Facts:  # fmt: skip
        """What was found, in the process that leads ``ranks``; to be called in all of them.

        ``told`` sees the model once it is loaded, ``warn`` what comes up on the way, ``bars`` how far each part is.
        """
        from ddpmctl.evaluation.facts import Settings, compare_data, evaluate_model, help_to_evaluate
        from ddpmctl.evaluation.sets import Extractor
        from ddpmctl.ranks import Word
        from ddpmctl.turns import help_out

        extractor = Extractor(self.features, device, self.feature_weights, self.batch_size, ranks)
        settings = Settings(self.data, self.n, self.seed, extractor, bars, cache=self.cache)
        if self.two_sets:
            if ranks.leads:
                return compare_data(self.what, self.size, settings)
            help_out(ranks, {Word.FEATURES: extractor.extract})
            return {}
        model = self._model(ranks, device)
        told(model)
        model.check_steps(self.recipe.steps)
        way = self.recipe.plan()
        if not ranks.leads:
            help_to_evaluate(model, way, self.class_name, settings, batch_size=self.batch_size)
            return {}
        return evaluate_model(
            model, way, self.class_name, settings, weights=self.weights, ema_length=self.ema_length,
            batch_size=self.batch_size, sheet_file=self.sheet, sheet_of=self.sheet_of,
            on_smaller=lambda size: warn(f"out of memory: going on with {size} images at once"),
        )  # fmt: skip

    def _model(self, ranks: Ranks, device: torch.device) -> Model:
        from ddpmctl.checkpoint import naming_a_good_one
        from ddpmctl.runfolder import checkpoint_in
        from ddpmctl.sampling import load_model

        with naming_a_good_one():
            file = ranks.share(checkpoint_in(self.what) if ranks.leads else None)
            return load_model(file, str(device), weights=self.weights, ema_length=self.ema_length, precision=self.precision,
                              guidance=self.recipe.guidance)  # fmt: skip
