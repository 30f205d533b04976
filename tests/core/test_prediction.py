from __future__ import annotations

import math

import pytest
import torch

from ddpmctl.core.prediction import PREDICTIONS
from ddpmctl.core.schedule import SCHEDULES, NoiseSchedule


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, 5, 7, generator=generator, dtype=torch.float64)
    return x0.clamp(-1, 1), eps


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [1, 2, 10, 250, 500, 900])
def test_split_undoes_target(prediction, schedule, t):
    noise_schedule = NoiseSchedule.named(schedule, 1000)
    target, split, _ = PREDICTIONS[prediction]
    x0, eps = pair()
    signal, noise = noise_schedule.at(t, x0)
    found = split(target(x0, eps, signal, noise), signal * x0 + noise * eps, signal, noise)
    # A division by a small factor costs as many digits as that factor has zeros.
    lost = 1 / min(signal.item(), noise.item())
    for ours, true in zip(found, (x0, eps), strict=True):
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-15 * (10 + 5 * lost))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_round_trip_to_twelve_digits(prediction):
    target, split, _ = PREDICTIONS[prediction]
    x0, eps = pair()
    for angle in torch.linspace(0.01, math.pi / 2 - 0.01, 50, dtype=torch.float64):
        signal, noise = angle.cos(), angle.sin()
        found = split(target(x0, eps, signal, noise), signal * x0 + noise * eps, signal, noise)
        for ours, true in zip(found, (x0, eps), strict=True):
            torch.testing.assert_close(ours, true, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_output_agrees_with_x_t(prediction):
    """Right or wrong, the two estimates make the x_t that they come from."""
    output, x_t = pair()
    signal, noise = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    x0, eps = PREDICTIONS[prediction].split(output, x_t, signal, noise)
    torch.testing.assert_close(signal * x0 + noise * eps, x_t, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("prediction", "expected"), [("eps", 5.0), ("x0", -0.5), ("v", 3.4)])
def test_target_of_a_known_pixel(prediction, expected):
    signal, noise, x0, eps = (torch.tensor(value, dtype=torch.float64) for value in (0.6, 0.8, -0.5, 5.0))
    assert PREDICTIONS[prediction].target(x0, eps, signal, noise).item() == pytest.approx(expected)
