"""Plans: by which sampler, in how many steps and in which spacing a sample goes from noise to image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ddpmctl.checks import check_choices, check_counts, check_guidance
from ddpmctl.errors import ConfigError
from ddpmctl.rows import row_names


class Plan(NamedTuple):
    """How to go from noise to image: the rows of SAMPLERS and SPACINGS, and the steps; None: all T."""

    sampler: str
    steps: int | None
    spacing: str

    def steps_of(self, timesteps: int) -> int:
        """The steps under a schedule of ``timesteps``."""
        return min(self.steps or timesteps, timesteps)


QUALITIES: dict[str, Plan] = {
    "fast": Plan("unipc", 10, "linear"),
    "balanced": Plan("dpm++", 20, "linear"),
    "best": Plan("ddpm", None, "linear"),
}
"""What ``--quality`` stands for."""

USUAL: dict[str, Plan] = {
    "ddpm": Plan("ddpm", None, "linear"),
    "ddim": Plan("ddim", 50, "linear"),
    "dpm++": Plan("dpm++", 20, "linear"),
    "dpm++sde": Plan("dpm++sde", 30, "linear"),
    "unipc": Plan("unipc", 20, "linear"),
    "heun": Plan("heun", 30, "logsnr"),
}
"""What a sampler goes by that is named without a quality; a row for every one of SAMPLERS."""


INPAINTING: dict[str, Plan] = {
    "ddpm": Plan("ddpm", 100, "linear"),
    "ddim": Plan("ddim", 100, "linear"),
}
"""What a picture is inpainted by: samplers that remember no earlier steps, since the image is changed between steps."""

INTERPOLATION: dict[str, Plan] = {"ddim": USUAL["ddim"]}
"""What goes from picture to picture: the sampler that :func:`ddpmctl.core.interpolation.encode` undoes."""


def plan(
    quality: str | None,
    sampler: str | None,
    steps: int | None,
    spacing: str | None,
    rows: dict[str, Plan] | None = None,
) -> Plan:
    """The plan of ``quality``, or else the usual one of ``sampler``, or else balanced; what is given goes first.

    The spacing is the quality's for its own sampler, and the usual one for another. ``rows``: those to go before
    :data:`USUAL`, the first before balanced too.
    """
    usual = USUAL | (rows or {})
    if quality:
        row = QUALITIES[quality]
    elif sampler:
        row = usual[sampler]
    else:
        row = next(iter(rows.values())) if rows else QUALITIES["balanced"]
    suited = usual[sampler] if sampler else row
    return Plan(sampler or row.sampler, steps or row.steps, spacing or suited.spacing)


@dataclass(frozen=True)
class Recipe:
    """How images are to be drawn, as flags of ``ddpmctl sample`` say it; None: as usual for the rest.

    ``interval``: the shares of T between which ``guidance`` is used. Raises :class:`ConfigError` for what is out of range.
    """

    quality: str | None = None
    sampler: str | None = None
    steps: int | None = None
    spacing: str | None = None
    eta: float | None = None
    variance: str | None = None
    threshold: str = "clip"
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_choices({
            "--quality": (self.quality, tuple(QUALITIES)),
            "--sampler": (self.sampler, row_names("core.samplers", "SAMPLERS")),
            "--spacing": (self.spacing, row_names("core.spacing", "SPACINGS")),
            "--variance": (self.variance, row_names("core.samplers", "VARIANCES")),
            "--threshold": (self.threshold, row_names("core.thresholds", "THRESHOLDS")),
        })  # fmt: skip
        check_counts({"--steps": self.steps})
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ConfigError(f"--eta {self.eta}: must be 0 to 1", "0 adds no noise, 1 as much as ddpm")
        check_guidance(self.guidance)
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"--guidance-interval {low}:{high}: not two shares from 0 to 1", "0:1 is always")
        if self.guidance == 1 and self.interval != (0, 1):
            raise ConfigError(f"--guidance-interval {low:g}:{high:g}: there is no guidance", "add --guidance")

    def plan(self, rows: dict[str, Plan] | None = None) -> Plan:
        """Sampler, steps and spacing; ``rows`` as in :func:`plan`."""
        return plan(self.quality, self.sampler, self.steps, self.spacing, rows)
