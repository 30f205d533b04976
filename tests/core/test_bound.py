"""The variational bound where it is known: Gaussian pixels and their exact denoiser."""

from __future__ import annotations

import math

import pytest
import torch
from test_gaussian import MEAN, STD, perfect

from ddpmctl.core.bound import Bound, decoder_nats, strata, variational_bound
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.schedule import SCHEDULES, NoiseSchedule

SIZE = (1, 96, 96)


def gaussian_images(n: int) -> torch.Tensor:
    return MEAN + STD * torch.randn(n, *SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def closed_form(schedule: NoiseSchedule, variance: str) -> tuple[float, float]:
    """Expected nats a pixel of (prior, steps): x0 given x_t has variance s^2 (1 - abar) / (abar s^2 + 1 - abar)."""
    abar, beta = schedule.alpha_bar.tolist(), schedule.betas.tolist()
    prior = (abar[-1] * (MEAN**2 + STD**2) - abar[-1] - math.log(1 - abar[-1])) / 2
    steps = 0.0
    for t in range(2, schedule.timesteps + 1):
        true = beta[t] * (1 - abar[t - 1]) / (1 - abar[t])
        ours = true if variance == "posterior" else beta[t]
        left = STD**2 * (1 - abar[t]) / (abar[t] * STD**2 + 1 - abar[t])
        apart = abar[t - 1] * beta[t] ** 2 / (1 - abar[t]) ** 2 * left
        steps += (math.log(ours / true) + (true + apart) / ours - 1) / 2
    return prior, steps


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("draws", [40, 12])
def test_bound_of_gaussian_images_is_the_closed_form(schedule, draws):
    noise_schedule, n = NoiseSchedule.named(schedule, 40), 8 if draws == 40 else 32
    found = variational_bound(perfect(noise_schedule), gaussian_images(n), range(n), draws=draws)
    for variance, bound in found.items():
        prior, steps = closed_form(noise_schedule, variance)
        assert bound.prior.mean().item() / math.prod(SIZE) == pytest.approx(prior, rel=0.02)
        # All t: the noise of the pixels alone. A dozen strata: the draw of t within them too, of 32 images.
        assert bound.steps.mean().item() / math.prod(SIZE) == pytest.approx(steps, rel=0.01 if draws == 40 else 0.1)


def test_image_costs_the_same_in_any_batch():
    denoiser, x0 = perfect(NoiseSchedule.named("cosine", 30)), gaussian_images(3)
    whole = variational_bound(denoiser, x0, range(3), draws=5)
    alone = variational_bound(denoiser, x0[2:], [2], draws=5)
    for name in whole:
        dims = math.prod(SIZE)
        torch.testing.assert_close(whole[name].bits_per_dim(dims)[2:], alone[name].bits_per_dim(dims))


@pytest.mark.parametrize(("timesteps", "draws"), [(1000, 32), (1000, 999), (20, 32), (2, 1), (1, 4), (50, 48), (7, 3)])
def test_strata_are_every_t_once(timesteps, draws):
    cut = strata(timesteps, draws)
    assert [t for stratum in cut for t in stratum] == list(range(2, timesteps + 1))
    assert all(cut) and len(cut) <= max(draws, 0)


def test_strata_are_drawn_without_bias():
    """A denoiser that says 0 costs (weights of t) x0^2 exactly: the mean over many draws is the sum over all t."""
    schedule = NoiseSchedule.named("linear", 60)
    denoiser = Denoiser(lambda x, t, y: torch.zeros_like(x), schedule, "x0", threshold="none")
    x0 = torch.full((2000, 1, 1, 1), 0.7, dtype=torch.float64)
    every = variational_bound(denoiser, x0[:1], [0], draws=59)["beta"].steps
    some = variational_bound(denoiser, x0, range(2000), draws=6)["beta"].steps
    assert some.mean().item() == pytest.approx(every.item(), abs=4 * some.std().item() / math.sqrt(2000))


@pytest.mark.parametrize(("mean", "variance"), [(0.1, 1e-4), (-0.99, 0.3), (1.4, 0.01)])
def test_decoder_shares_out_one_over_the_grey_levels(mean, variance):
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(-1, 1, 1, 1)
    found = (-decoder_nats(levels, torch.full_like(levels, mean), torch.tensor(variance))).exp()
    assert found.sum().item() == pytest.approx(1, abs=1e-9)
    if variance == 0.3:
        density = (-((levels[128] - mean) ** 2) / 2 / variance).exp() / math.sqrt(2 * math.pi * variance)
        assert found[128].item() == pytest.approx(density.item() * 2 / 255, rel=1e-3)


def test_no_model_of_random_pixels_beats_eight_bits():
    schedule = NoiseSchedule.named("cosine", 50)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    denoiser = perfect(schedule, mean=0.0, std=0.577)
    for bound in variational_bound(denoiser, pixels.double() / 127.5 - 1, range(4), draws=49).values():
        assert isinstance(bound, Bound)
        assert 8 < bound.bits_per_dim(3 * 32 * 32).mean().item() < 11
