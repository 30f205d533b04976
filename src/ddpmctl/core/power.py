"""Averages of the weights over a power of time, and any other such average from a few of them after training.

Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", section 3 and appendix C.
Weights that held from step i - 1 to i count by the integral of the profile p(tau) = (g + 1) / t^(g + 1) tau^g over that
time: so the running average below is exactly what the integrals of the profiles say, at every step.

A *length* is the standard deviation of its profile as a share of the training time: 0.1 averages over about the last
tenth each way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpmctl.core.ema import EMA

LENGTHS = (0.05, 0.10)
"""The lengths that are averaged while training, as in the paper."""

LONGEST = 0.28
"""Lengths end at 1/sqrt(12) = 0.289, the plain mean of all steps."""


def exponent(length: float) -> float:
    """The g of the profile whose standard deviation is ``length``: the largest root of the paper's equation 10,
    length^2 = (g + 1) / ((g + 2)^2 (g + 3)). Raises ``ValueError`` outside 0 < length <= LONGEST.
    """
    if not 0 < length <= LONGEST:
        raise ValueError(f"a length of {length:g} is not above 0 and at most {LONGEST}")
    square = length**-2
    # Multiplied out: g^3 + 7 g^2 + (16 - length^-2) g + (12 - length^-2) = 0; its roots as eigenvalues.
    companion = torch.tensor([[-7, square - 16, square - 12], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    return float(torch.linalg.eigvals(companion).real.max())


class PowerEMA(EMA):
    """The average of ``length``. After step n: average <- beta average + (1 - beta) weights, beta = (1 - 1/n)^(g + 1).

    Equation 8. The first step takes the weights as they are, so that the random start is in no average. Steps that
    changed nothing count too: the weights stood for that time.
    """

    def __init__(self, net: nn.Module, length: float) -> None:
        super().__init__(net)
        self.length, self._power = length, exponent(length) + 1

    def state_dict(self) -> dict[str, Any]:
        """Averaged weights, and what they are averaged over."""
        return {"length": self.length, "net": self.net.state_dict()}

    def decay_now(self) -> float:
        """The beta of the last update."""
        return float((1 - 1 / self.steps) ** self._power)


class Profile(NamedTuple):
    """Whose weights count how much: the average of ``length`` after ``step`` steps."""

    length: float
    step: int


class Combination(NamedTuple):
    """What stored averages are multiplied by, (N,) float64, and how far the sum of their profiles is from the one wanted.

    ``error``: the norm of the difference, as a share of the norm of the wanted profile; 0 is exact.
    """

    factors: Tensor
    error: float


def combine(stored: Sequence[Profile], wanted: Profile) -> Combination:
    """The combination of ``stored`` averages nearest to ``wanted``: least squares over the profiles. Appendix C, algorithm 3.

    Other than there the factors add up to 1, so that weights which never changed come out as they are: from a few
    averages the bare least squares would shrink them. Raises ``ValueError`` for none.
    """
    if not stored:
        raise ValueError("no averages to combine")
    products = _products(stored, stored)
    towards = _products(stored, [wanted])[:, 0]
    own = float(_products([wanted], [wanted]))
    # Neighbouring profiles are much alike: directions below rounding are left out, in which nothing is known.
    inverse = torch.linalg.pinv(products, rtol=1e-11, hermitian=True)
    factors, ones = inverse @ towards, inverse.sum(1)
    factors = factors + (1 - factors.sum()) / ones.sum() * ones
    squared = own - 2 * float(factors @ towards) + float(factors @ products @ factors)
    return Combination(factors, (max(squared, 0.0) / own) ** 0.5)


def _products(one: Sequence[Profile], other: Sequence[Profile]) -> Tensor:
    """Inner products of profiles, (N, M) float64: the integral of p p' from 0 to the earlier of their two steps."""
    g, s = (column[:, None] for column in _columns(one))
    h, t = (row[None, :] for row in _columns(other))
    # The larger of the two steps is taken out of both powers, which alone would overflow.
    ratio = torch.where(s < t, (s / t) ** h, (t / s) ** g)
    return (g + 1) * (h + 1) / (g + h + 1) * ratio / torch.maximum(s, t)


def _columns(profiles: Sequence[Profile]) -> tuple[Tensor, Tensor]:
    powers = torch.tensor([exponent(profile.length) for profile in profiles], dtype=torch.float64)
    return powers, torch.tensor([profile.step for profile in profiles], dtype=torch.float64)
