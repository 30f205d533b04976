"""How a scheduler of diffusers samples, as flags of ``ddpmctl sample``, and what of it has no counterpart here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ddpmctl.parsing import written

SAMPLERS = {
    "DDPMScheduler": "ddpm", "DDPMParallelScheduler": "ddpm", "DDIMScheduler": "ddim", "DDIMParallelScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm++", "UniPCMultistepScheduler": "unipc",
    "DPMSolverSinglestepScheduler": "", "PNDMScheduler": "", "DEISMultistepScheduler": "",
}  # fmt: skip
"""Schedulers whose betas are those of the forward process, and whose network is told t - 1 of 0..T-1; our sampler, if any."""

_CLIPPING = ("ddpm", "ddim")
"""Those of which ``clip_sample`` is a key."""

VARIANCES = {"fixed_small": "posterior", "fixed_small_log": "posterior", "fixed_large": "beta", "fixed_large_log": "beta",
             "learned_range": "learned"}  # fmt: skip

_SOLVERS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "solver_order": (2, (2,)),
    "final_sigmas_type": ("zero", ("zero",)),
    "use_karras_sigmas": (False, (False, None)),
    "use_exponential_sigmas": (False, (False, None)),
    "use_beta_sigmas": (False, (False, None)),
    "use_flow_sigmas": (False, (False, None)),
    "rescale_betas_zero_snr": (False, (False,)),  # theirs ends at an abar of 2^-24 then
    "timestep_spacing": ("linspace", ("trailing",)),
}
_SAME: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "ddpm": {"variance_type": ("fixed_small", ("fixed_small", "fixed_small_log", "fixed_large", "learned_range", None))},
    "ddim": {"timestep_spacing": ("leading", ("trailing",)), "set_alpha_to_one": (True, (True,))},
    "dpm++": {
        **_SOLVERS, "solver_order": (2, (1, 2)), "algorithm_type": ("dpmsolver++", ("dpmsolver++", "sde-dpmsolver++")),
        "solver_type": ("midpoint", ("midpoint",)), "use_lu_lambdas": (False, (False, None)),
        "lambda_min_clipped": (-math.inf, (-math.inf,)),
    },
    "unipc": {
        **_SOLVERS, "solver_type": ("bh2", ("bh2", "midpoint", "heun", "logrho")), "predict_x0": (True, (True,)),
        "lower_order_final": (True, (True,)), "disable_corrector": ([], ([], None)), "solver_p": (None, (None,)),
    },
}  # fmt: skip
"""Key of a scheduler -> what it is where a file leaves it out, and the values with which ours does the same.

DDPM goes through all T levels, whatever its spacing.
"""

_SPACINGS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "logsnr", "use_lu_lambdas": "logsnr"}
"""Theirs lie between levels, so ours are near them at best."""


class Flags(NamedTuple):
    """``flags`` of ``sample``, "" where none come near; ``lacks``: keys and values of theirs that ours does not have."""

    flags: str
    lacks: tuple[str, ...] = ()

    def note(self) -> str:
        """All of it in a line."""
        if not self.lacks:
            return f"as its own pipeline samples: {self.flags}"
        what = ", ".join(self.lacks)
        nearest = f"nearest to how its own pipeline samples: {self.flags}; " if self.flags else "its own pipeline samples with what is "
        return f"{nearest}without counterpart here: {what}"

    def source(self) -> dict[str, str]:
        """The same for what a converted checkpoint keeps."""
        if not self.lacks:
            return {"sampled there": self.flags}
        near = {"sampled there, nearest": self.flags} if self.flags else {}
        return {**near, "without counterpart": ", ".join(self.lacks)}


def flags_of(theirs: Mapping[str, Any]) -> Flags:
    """The flags for a scheduler of the configuration ``theirs``, of a class in :data:`SAMPLERS`."""
    kind = SAMPLERS[theirs["_class_name"]]
    if not kind:
        return Flags("", (theirs["_class_name"],))
    values = {key: (theirs.get(key, default), same) for key, (default, same) in _SAME[kind].items()}
    lacks = [_told(key, value) for key, (value, same) in values.items() if value not in same]
    threshold, thresholds_lack = _threshold(theirs, kind)
    spacing = next((name for key, name in _SPACINGS.items() if theirs.get(key)), None)
    flags = [f"--sampler {_sampler(theirs, kind)}", *([f"--spacing {spacing}"] if spacing else []), f"--threshold {threshold}"]
    return Flags(" ".join(flags), (*lacks, *thresholds_lack))


def _sampler(theirs: Mapping[str, Any], kind: str) -> str:
    """Our sampler with the flags of its own."""
    if kind == "ddpm":
        return f"ddpm --variance {VARIANCES[str(theirs.get('variance_type') or 'fixed_small')]}"
    if kind == "dpm++":
        with_noise = str(theirs.get("algorithm_type")).startswith("sde-")
        if theirs.get("solver_order") == 1:  # of first order these are ddim
            return "ddim --eta 1" if with_noise else "ddim"
        return "dpm++sde" if with_noise else "dpm++"
    return kind


def _threshold(theirs: Mapping[str, Any], kind: str) -> tuple[str, list[str]]:
    """Our threshold, and what theirs has beside."""
    lacks: list[str] = []
    if theirs.get("thresholding"):
        # Theirs cuts at a percentile, but never above sample_max_value.
        ratio, most = theirs.get("dynamic_thresholding_ratio", 0.995), theirs.get("sample_max_value", 1.0)
        name = "clip" if _is(most, 1) else "dynamic"
        if name == "dynamic":
            lacks += [] if _is(most, math.inf) else [_told("sample_max_value", most)]
            lacks += [] if _is(ratio, 0.995) else [_told("dynamic_thresholding_ratio", ratio)]
    else:
        clips = theirs.get("clip_sample", True) if kind in _CLIPPING else False
        name = "clip" if clips else "none"
        lacks += list(_clipping(theirs, clips))
    if kind == "ddim" and name != "none":
        lacks.append("an eps that is left as it was before x0 is cut")
    return name, lacks


def _clipping(theirs: Mapping[str, Any], clips: Any) -> Iterator[str]:
    if type(clips) is not bool:
        yield _told("clip_sample", clips)
    reach = theirs.get("clip_sample_range", 1.0)
    if clips and not _is(reach, 1):
        yield _told("clip_sample_range", reach)


def _is(value: Any, number: float) -> bool:
    return type(value) in (int, float) and value == number


def _told(key: str, value: Any) -> str:
    return f"{key} {value if isinstance(value, str) and value.isidentifier() else written(value)}"[:200]
