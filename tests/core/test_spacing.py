"""Levels that samplers visit: known grids, and what all grids have in common."""

from __future__ import annotations

import itertools
import math

import pytest

from ddpmctl.core.schedule import SCHEDULES, NoiseSchedule
from ddpmctl.core.spacing import SPACINGS, spaced_timesteps


def lambdas(schedule: NoiseSchedule) -> list[float]:
    return [math.inf, *(math.log(a / (1 - a)) / 2 for a in schedule.alpha_bar[1:].tolist())]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [1, 2, 3, 10, 57])
def test_grid_falls_from_T_to_0(timesteps, name, spacing):
    schedule = NoiseSchedule.named(name, timesteps)
    for steps in range(1, timesteps + 1):
        grid = spaced_timesteps(schedule, steps, spacing)
        assert len(grid) == steps + 1
        assert (grid[0], grid[-1]) == (timesteps, 0)
        assert min(t - s for t, s in itertools.pairwise(grid)) >= 1
        assert all(type(t) is int for t in grid)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("timesteps", [1, 2, 50, 1000])
def test_full_grid_is_every_step(timesteps, spacing):
    grid = spaced_timesteps(NoiseSchedule.named("cosine", timesteps), timesteps, spacing)
    assert grid == list(range(timesteps, -1, -1))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_one_step_goes_all_the_way(spacing):
    assert spaced_timesteps(NoiseSchedule.named("linear", 1000), 1, spacing) == [1000, 0]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [0, -1, 101])
def test_grid_out_of_range(steps, spacing):
    with pytest.raises(ValueError, match="1 to 100"):
        spaced_timesteps(NoiseSchedule.named("linear", 100), steps, spacing)


@pytest.mark.parametrize(
    ("timesteps", "steps", "spacing", "grid"),
    [
        (20, 5, "linear", [20, 16, 12, 8, 4, 0]),
        (10, 4, "linear", [10, 8, 5, 2, 0]),
        (1000, 10, "linear", list(range(1000, -1, -100))),
        (100, 5, "quadratic", [100, 64, 36, 16, 4, 0]),
        (1000, 10, "quadratic", [1000, 810, 640, 490, 360, 250, 160, 90, 40, 10, 0]),
        (10, 8, "quadratic", [10, 8, 6, 5, 4, 3, 2, 1, 0]),  # 4, 2, 1, 1 and 0 make way
    ],
)
def test_known_grids(timesteps, steps, spacing, grid):
    assert spaced_timesteps(NoiseSchedule.named("linear", timesteps), steps, spacing) == grid


@pytest.mark.parametrize("timesteps", [2, 3, 10, 57, 100])
def test_linear_is_even(timesteps):
    for steps in range(1, timesteps + 1):
        grid = spaced_timesteps(NoiseSchedule.named("linear", timesteps), steps, "linear")
        gaps = [t - s for t, s in itertools.pairwise(grid)]
        assert max(gaps) - min(gaps) <= 1
        assert all(abs(t - (timesteps - i * timesteps / steps)) <= 0.5 for i, t in enumerate(grid))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 3, 8, 20])
def test_karras_is_even_in_the_seventh_root_of_sigma(name, steps):
    schedule = NoiseSchedule.named(name, 4000)
    lam = lambdas(schedule)
    high, low = math.exp(-lam[4000] / 7), math.exp(-lam[1] / 7)
    wanted = [-7 * math.log(high + i / (steps - 1) * (low - high)) for i in range(steps)]
    check_nearest(spaced_timesteps(schedule, steps, "karras"), wanted, lam)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 3, 8, 20])
def test_logsnr_is_even_in_lambda(name, steps):
    schedule = NoiseSchedule.named(name, 4000)
    lam = lambdas(schedule)
    wanted = [lam[4000] + i / (steps - 1) * (lam[1] - lam[4000]) for i in range(steps)]
    check_nearest(spaced_timesteps(schedule, steps, "logsnr"), wanted, lam)


def check_nearest(grid: list[int], wanted: list[float], lam: list[float]) -> None:
    """Each level is the nearest in lambda; where several want the same, the next below, with room for those to come."""
    expected = [len(lam) - 1]
    for i, each in enumerate(wanted[1:], start=1):
        nearest = min(range(1, len(lam)), key=lambda t: abs(lam[t] - each))
        expected.append(max(len(wanted) - i, min(nearest, expected[-1] - 1)))
    assert grid == [*expected, 0]
    assert grid[-2] == 1
