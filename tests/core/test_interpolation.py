"""From images to noise and back, and the arc between two noises."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from test_gaussian import MEAN, STD, perfect
from torch import Tensor

from ddpmctl.core.interpolation import encode, slerp
from ddpmctl.core.samplers import ddim
from ddpmctl.core.schedule import SCHEDULES, NoiseSchedule
from ddpmctl.core.spacing import spaced_timesteps

X0 = torch.tensor([-0.9, 0.1, 0.35, 1.0], dtype=torch.float64).view(4, 1, 1, 1)


def there_and_back(schedule: NoiseSchedule, steps: int) -> tuple[Tensor, Tensor]:
    grid = spaced_timesteps(schedule, steps)
    *_, up = encode(perfect(schedule), X0, grid[::-1])
    *_, down = ddim(perfect(schedule), up.x_t, grid, noise=lambda: X0)
    assert (up.t, down.t) == (schedule.timesteps, 0)
    return up.x_t, down.x_t


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_image_comes_back_and_the_error_falls_as_steps_grow(schedule) -> None:
    errors = [
        (there_and_back(NoiseSchedule.named(schedule, 2000), steps)[1] - X0).abs().max().item()
        for steps in (25, 50, 100)
    ]
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2], errors
    assert errors[2] < 0.01


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_is_where_the_probability_flow_leads(schedule) -> None:
    """(x_t - sqrt(abar_t) m) / sqrt(abar_t s^2 + 1 - abar_t) stays constant in the limit of small steps."""
    noise_schedule = NoiseSchedule.named(schedule, 4000)
    abar = noise_schedule.alpha_bar[-1].item()
    exact = math.sqrt(abar) * MEAN + math.sqrt(abar * STD**2 + 1 - abar) * (X0 - MEAN) / STD
    found, _ = there_and_back(noise_schedule, 4000)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.02)


def test_noise_is_finite_where_nothing_is_left_of_the_image() -> None:
    class Same:
        schedule = NoiseSchedule.named("cosine", 200, zero_snr=True)

        def __call__(self, x: Tensor, t: int, label: object) -> tuple[Tensor, Tensor]:
            return x, x

    *_, last = encode(Same(), X0, spaced_timesteps(Same.schedule, 50)[::-1])  # type: ignore[arg-type]
    assert last.t == 200 and bool(last.x_t.isfinite().all()) and last.x_t.std() > 0.1


def test_two_evaluations_a_step_at_levels_that_the_network_knows() -> None:
    asked = []

    class Counting:
        schedule = NoiseSchedule.named("linear", 20)

        def __call__(self, x: Tensor, t: int, label: object) -> tuple[Tensor, Tensor]:
            asked.append(t)
            return x, x

    assert [state.t for state in encode(Counting(), X0, [0, 5, 20])] == [5, 20]  # type: ignore[arg-type]
    assert asked == [1, 5, 5, 20]


def noises(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 3, 8, 8, generator=generator)
    return a, b


@pytest.mark.parametrize("seed", range(3))
def test_the_arc_has_its_ends_and_keeps_length_and_pace(seed) -> None:
    a, b = noises(seed)
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-6) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-6)
    assert slerp(a, b, 0.3).dtype == a.dtype
    b = b * a.norm() / b.norm()
    way = [slerp(a, b, i / 10) for i in range(11)]
    for x in way:
        assert x.norm().item() == pytest.approx(a.norm().item(), rel=1e-5)
    paces = torch.stack([(x * y).sum() / a.norm() ** 2 for x, y in pairwise(way)])
    assert torch.allclose(paces, paces[0].expand(10), atol=1e-5)
    assert (way[5] - slerp(b, a, 0.5)).abs().max() < 1e-5


def test_shoemakes_equation() -> None:
    a, b, share = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(1), math.sin(1)]), 0.3
    assert torch.allclose(slerp(a, b, share), (math.sin(0.7) * a + math.sin(0.3) * b) / math.sin(1), atol=1e-6)


def test_equal_and_opposite_noises_and_none_are_numbers_all_the_way() -> None:
    a, _ = noises(0)
    for b in (a, -a, 2 * a, a + 1e-9, torch.zeros_like(a)):
        for share in (0.0, 0.25, 0.5, 1.0):
            assert slerp(a, b, share).isfinite().all() and slerp(b, a, share).isfinite().all()
    assert torch.equal(slerp(a, a, 0.4), a)
