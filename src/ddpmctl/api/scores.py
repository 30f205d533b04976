"""How good a model is."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from ddpmctl.api.arguments import Place, as_arguments, logger, path_of, seed_of
from ddpmctl.api.models import device_of, tell
from ddpmctl.build import resolve_device
from ddpmctl.data.names import place_of
from ddpmctl.errors import ConfigError
from ddpmctl.evaluation.comparison import SHEET_OF, Comparison
from ddpmctl.parsing import parse_size
from ddpmctl.plans import Recipe
from ddpmctl.ranks import ALONE


@dataclass(frozen=True)
class Evaluation:
    """How far images are from others: the numbers of ``docs/evaluate.md``.

    ``spread``: the standard deviation of KID over its subsets. ``loss``, ``bits_per_dim`` by the variance that ddpm has: of a
    model, not of two sets of images. ``memorised``: with a sheet, shares by pixels and features, where something was held out.
    ``warnings``: what to beware of. ``facts``: all of it, and how it was made, as ``ddpmctl evaluate --json`` prints it.
    """

    kid: float
    spread: float
    frechet: float
    precision: float
    recall: float
    loss: float | None
    bits_per_dim: dict[str, float]
    memorised: dict[str, float]
    warnings: list[str]
    facts: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Evaluation:
        """From what ``--json`` prints."""
        found, near = facts["distances"], facts.get("memorised", {})
        bits = facts["bits_per_dim"]["variance"] if "bits_per_dim" in facts else {}
        return cls(
            found["kid"], found["kid_spread"], found["frechet"], found["precision"], found["recall"],
            facts["loss"]["mean"] if "loss" in facts else None, {name: part["mean"] for name, part in bits.items()},
            {name: near[name]["share"] for name in ("pixels", "features") if near and near[name]["share"] is not None},
            list(facts["warnings"]), facts,
        )  # fmt: skip


@as_arguments()
def evaluate(
    ckpt: Place,
    data: Place,
    /,
    *,
    n: int = 2048,
    seed: int = 0,
    features: str = "efficientnet-lite0",
    feature_weights: Place | None = None,
    quality: str | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    spacing: str | None = None,
    class_name: str | None = None,
    guidance: float = 1.0,
    weights: Literal["ema", "raw"] = "ema",
    ema_length: float | None = None,
    size: int | str | tuple[int, int] | None = None,
    batch_size: int = 64,
    device: str = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    sheet: Place | None = None,
    sheet_of: int = SHEET_OF,
    overwrite: bool = False,
    cache: bool = True,
) -> Evaluation:
    """Compare ``n`` images of a model with those of ``data``, as ``ddpmctl evaluate CKPT DATA`` does; needs the extra ``metrics``.

    A folder or .zip of images in place of the checkpoint: the two sets are compared. Arguments are the flags of that
    name; ``cache`` false is ``--no-cache``. Raises the :class:`DdpmctlError` of whatever is wrong, but for a sheet that cannot be
    written once all is known: that is a warning, and ``facts["memorised"]["sheet"]`` is None.
    """
    asked = Comparison(
        place_of(ckpt), place_of(data), Recipe(quality, sampler, steps, spacing, guidance=guidance), n=n, seed=seed_of(seed), features=features,
        feature_weights=path_of(feature_weights), class_name=class_name, weights=weights, ema_length=ema_length, size=_size(size),
        batch_size=batch_size, precision=precision, sheet=path_of(sheet), sheet_of=sheet_of, overwrite=overwrite, cache=cache,
    )  # fmt: skip
    target = resolve_device(device_of(device))
    facts = asked.run(ALONE, target, told=tell, warn=logger.warning, bars=lambda what: nullcontext(lambda done, total: None))
    if unwritten := facts.get("memorised", {}).get("sheet_error"):
        logger.warning(unwritten)
    return Evaluation.of(facts)


def _size(size: int | str | tuple[int, int] | None) -> Any:
    try:
        return None if size is None else parse_size(size)
    except ValueError as error:
        raise ConfigError(f"--size: {error}", "32, or (height, width)") from error
