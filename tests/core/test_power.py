"""Power-function averages against their definition, and any length from a few of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ddpmctl.core.power import LENGTHS, LONGEST, PowerEMA, Profile, combine, exponent


class Scalar(nn.Module):
    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=torch.float64))


def shares(length: float, step: int, steps: int) -> torch.Tensor:
    """How much the weights after each of 1..steps count: the integral of the profile over the step before."""
    g, i = exponent(length), torch.arange(1, steps + 1, dtype=torch.float64)
    found = (i / step) ** (g + 1) - ((i - 1) / step) ** (g + 1)
    return found.where(i <= step, torch.zeros(()))


def walk(steps: int) -> torch.Tensor:
    """Weights as training moves them: a random walk that settles."""
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (noise / torch.arange(1, steps + 1).sqrt()).cumsum(0)


@pytest.mark.parametrize(("length", "published"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_of_the_paper(length, published):
    assert exponent(length) == pytest.approx(published, abs=5e-3)


@pytest.mark.parametrize("length", [0.001, 0.01, 0.05, 0.1, 0.2, 0.25, LONGEST])
def test_length_is_the_standard_deviation_of_the_profile(length):
    g = exponent(length)
    moment = lambda k: (g + 1) / (g + 1 + k)  # of tau/t
    assert math.sqrt(moment(2) - moment(1) ** 2) == pytest.approx(length, rel=1e-8)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.281, 0.5, math.nan, math.inf])
def test_lengths_that_no_profile_has(length):
    with pytest.raises(ValueError, match="length"):
        exponent(length)


@pytest.mark.parametrize("length", [0.02, 0.1, LONGEST])
def test_running_average_is_the_integral_of_the_profile(length):
    values, net = walk(50), Scalar()
    average = PowerEMA(Scalar(99.0), length)  # where it starts is forgotten
    for step, value in enumerate(values, start=1):
        net.weight.data.fill_(value)
        average.update(net)
        expected = (shares(length, step, 50) * values).sum()
        assert average.net.weight.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-12)


def test_average_goes_on_from_its_state():
    values, net = walk(20), Scalar()
    whole, first = PowerEMA(net, 0.1), PowerEMA(net, 0.1)
    second = PowerEMA(Scalar(5.0), 0.1)
    for step, value in enumerate(values, start=1):
        net.weight.data.fill_(value)
        whole.update(net)
        (first if step <= 8 else second).update(net)
        if step == 8:
            second.load_state_dict({**first.state_dict(), "steps": 8})
    assert second.net.weight.item() == whole.net.weight.item()


def stored(steps: int, count: int) -> list[Profile]:
    return [Profile(length, steps * k // count) for k in range(1, count + 1) for length in LENGTHS]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_stored_average_is_itself(length):
    found = combine(stored(1000, 8), Profile(length, 1000))
    assert found.error < 1e-5
    wanted = [float(profile == (length, 1000)) for profile in stored(1000, 8)]
    assert found.factors.tolist() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("count", "length", "at_most"),
    [(16, 0.03, 0.05), (16, 0.07, 0.005), (16, 0.15, 0.01), (16, 0.25, 0.08), (64, 0.02, 0.012), (64, 0.25, 0.02)],
)
def test_any_length_from_a_few_averages(count, length, at_most):
    """Against the average that was taken all along; its profile is as far off as is said."""
    steps, snapshots = 2000, stored(2000, count)
    found = combine(snapshots, Profile(length, steps))
    counted = sum(factor * shares(*profile, steps) for factor, profile in zip(found.factors, snapshots, strict=True))
    exact = shares(length, steps, steps)
    assert ((counted - exact).norm() / exact.norm()).item() == pytest.approx(found.error, rel=0.02)
    assert found.error < at_most
    values = walk(steps)
    spread = values.std().item()
    assert abs((counted * values).sum() - (exact * values).sum()).item() < at_most * spread


@pytest.mark.parametrize("count", [1, 2, 4, 16, 200])
@pytest.mark.parametrize("length", [0.005, 0.03, 0.1, LONGEST])
def test_weights_that_never_changed_come_out_as_they_are(count, length):
    factors = combine(stored(10_000, count), Profile(length, 10_000)).factors
    assert factors.sum().item() == pytest.approx(1, abs=1e-6)
    assert factors.abs().max() < 1000  # else rounding of the weights would show


def test_an_earlier_time_is_found_too():
    found = combine(stored(1000, 20), Profile(0.1, 500))
    assert found.error < 1e-4


def test_long_runs_do_not_overflow():
    found = combine(stored(10_000_000, 30), Profile(0.01, 10_000_000))
    assert bool(found.factors.isfinite().all())


def test_nothing_to_combine():
    with pytest.raises(ValueError, match="no averages"):
        combine([], Profile(0.1, 10))
