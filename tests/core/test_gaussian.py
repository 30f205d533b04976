"""Samplers against data whose best denoiser is known: Gaussian images, where every step is an affine map.

A sampler with an affine denoiser turns (x_T, z_1, z_2, ...) into an affine function of them. Running it
once with all of them 0 gives the exact mean of what it makes, running it with a single one of them 1 gives
that one's weight, and the sum of squared weights is the exact variance: no sampling error, so tolerances
are those of discretisation.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.noise import ImageNoise
from ddpmctl.core.prediction import PREDICTIONS
from ddpmctl.core.samplers import SAMPLERS, SampleStep, ddim, ddpm
from ddpmctl.core.schedule import SCHEDULES, NoiseSchedule
from ddpmctl.core.spacing import spaced_timesteps

MEAN, STD = 0.3, 0.5
WAYS = [
    ("ddpm", {"variance": "beta"}),
    ("ddpm", {"variance": "posterior"}),
    ("ddim", {"eta": 0.0}),
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 1.0}),
    ("dpm++", {}),
    ("dpm++sde", {}),
    ("unipc", {}),
    ("heun", {}),
]
WAY_IDS = ["ddpm-beta", "ddpm-posterior", "ddim-0", "ddim-0.5", "ddim-1", "dpm++", "dpm++sde", "unipc", "heun"]


USUAL_SPACING = {"heun": "logsnr"}
"""Of those for which even steps in t are too few where sigma is large."""


class GaussianNet:
    """The perfect network for pixels of N(mean, std^2), in float64, for each prediction type."""

    def __init__(self, schedule: NoiseSchedule, prediction: str, mean: float, std: float) -> None:
        self.schedule, self.prediction, self.mean, self.std = schedule, prediction, mean, std

    def __call__(self, x_t: Tensor, t_index: Tensor, label: Tensor | None) -> Tensor:
        abar = self.schedule.alpha_bar[t_index + 1].view(-1, 1, 1, 1)
        a, n = abar.sqrt(), (1 - abar).sqrt()
        x0 = self.mean + a * self.std**2 / (a**2 * self.std**2 + n**2) * (x_t - a * self.mean)
        eps = (x_t - a * x0) / n
        return {"x0": x0, "eps": eps, "v": a * eps - n * x0}[self.prediction]


def perfect(schedule: NoiseSchedule, prediction: str = "eps", mean: float = MEAN, std: float = STD) -> Denoiser:
    return Denoiser(GaussianNet(schedule, prediction, mean, std), schedule, prediction, threshold="none")


class Impulses:
    """Draw k is 1 for image k + 2 and 0 elsewhere; image 0 sees no noise at all, image 1 only x_T = 1."""

    def __init__(self, steps: int) -> None:
        self.images, self.draws = steps + 2, 0

    def start(self) -> Tensor:
        return self._one_at(1)

    def __call__(self) -> Tensor:
        self.draws += 1
        return self._one_at(self.draws + 1)

    def _one_at(self, image: int) -> Tensor:
        one = torch.zeros(self.images, 1, 1, 1, dtype=torch.float64)
        one[image] = 1
        return one


def moments(
    sampler: str, denoiser: Denoiser, steps: int, start_std: float = 1.0, spacing: str = "linear", **options: object
) -> list[tuple[int, float, float]]:
    """Exact (t, mean, std) after each step of a sampler, from x_T ~ N(0, start_std^2)."""
    noise = Impulses(steps)
    grid = spaced_timesteps(denoiser.schedule, steps, spacing)
    states = SAMPLERS[sampler](denoiser, start_std * noise.start(), grid, noise=noise, **options)
    found = []
    for state in states:
        mean, *others = state.x_t.flatten().tolist()
        found.append((state.t, mean, math.sqrt(sum((other - mean) ** 2 for other in others))))
    return found


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("sampler", "options"), WAYS, ids=WAY_IDS)
def test_sampler_makes_the_data_it_knows(sampler, options, schedule, prediction):
    denoiser = perfect(NoiseSchedule.named(schedule, 500), prediction)
    t, mean, std = moments(sampler, denoiser, 500, **options)[-1]
    assert t == 0
    assert mean == pytest.approx(MEAN, abs=0.0015)
    assert std == pytest.approx(STD, abs=0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("sampler", "options"), WAYS, ids=WAY_IDS)
def test_error_shrinks_with_the_number_of_steps(sampler, options, schedule):
    denoiser = perfect(NoiseSchedule.named(schedule, 2000))
    spacing = USUAL_SPACING.get(sampler, "linear")
    coarse, fine = (moments(sampler, denoiser, n, spacing=spacing, **options)[-1][2] - STD for n in (50, 500))
    assert abs(coarse) < 0.06
    # The last step gives the mean of the clean images, of std less by (1 - abar) / (2 STD): all that is left of some.
    assert abs(fine) < 0.25 * abs(coarse) + 1e-4


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [7, 50, 1000])
def test_ddpm_posterior_is_exact_for_a_single_image(schedule, steps):
    noise_schedule = NoiseSchedule.named(schedule, 1000)
    denoiser = perfect(noise_schedule, "x0", std=0.0)
    start = math.sqrt(1 - noise_schedule.alpha_bar[-1])
    for t, mean, std in moments("ddpm", denoiser, steps, start, variance="posterior"):
        abar = noise_schedule.alpha_bar[t].item()
        # x_T starts with mean 0 instead of sqrt(abar_T) m: that part of the mean never arrives.
        lacking = math.sqrt(noise_schedule.alpha_bar[-1]) * (1 - abar)
        assert mean == pytest.approx(math.sqrt(abar) * MEAN, abs=MEAN * lacking + 1e-9)
        assert std == pytest.approx(math.sqrt(1 - abar), abs=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [7, 50, 1000])
def test_ddpm_beta_is_exact_for_images_of_pure_noise(schedule, steps):
    denoiser = perfect(NoiseSchedule.named(schedule, 1000), "x0", mean=0.0, std=1.0)
    for t, mean, std in moments("ddpm", denoiser, steps, variance="beta")[:-1]:
        assert t > 0
        assert mean == pytest.approx(0, abs=1e-12)
        assert std == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_known_clean_image_is_reached_on_any_grid(sampler, steps):
    denoiser = perfect(NoiseSchedule.named("cosine", 20), "x0", std=0.0)
    _, mean, std = moments(sampler, denoiser, steps)[-1]
    assert (mean, std) == pytest.approx((MEAN, 0), abs=1e-12)


def test_deterministic_ddim_follows_the_probability_flow():
    """(x_t - sqrt(abar_t) m) / sqrt(abar_t s^2 + 1 - abar_t) stays constant, in the limit of small steps."""
    schedule = NoiseSchedule.named("cosine", 4000)

    def spread(t: int) -> float:
        abar = schedule.alpha_bar[t].item()
        return math.sqrt(abar * STD**2 + 1 - abar)

    x_T = torch.tensor([-1.5, 0.0, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    whole = (x_T - schedule.alpha_bar[-1].sqrt() * MEAN) / spread(4000)
    for state in ddim(perfect(schedule), x_T, spaced_timesteps(schedule, 4000), noise=lambda: x_T):
        expected = schedule.alpha_bar[state.t].sqrt() * MEAN + spread(state.t) * whole
        torch.testing.assert_close(state.x_t, expected, rtol=0, atol=3e-3)


ORDERS = {"ddim": 1, "dpm++": 2, "heun": 2, "unipc": 3}
"""Of convergence: UniPC-2 is a predictor of order 2, and correction adds one (Zhao et al. 2023, section 3)."""


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", ORDERS)
def test_order_of_convergence(sampler, schedule):
    """Slope of the error over halved steps, between two inner levels: the exact flow is affine, as above."""
    noise_schedule = NoiseSchedule.named(schedule, 4096)
    denoiser, (T, end) = perfect(noise_schedule), (3584, 512)

    def spread(t: int) -> float:
        abar = noise_schedule.alpha_bar[t].item()
        return math.sqrt(abar * STD**2 + 1 - abar)

    x_T = torch.tensor([-1.5, 0.4, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    whole = (x_T - noise_schedule.alpha_bar[T].sqrt() * MEAN) / spread(T)
    exact = noise_schedule.alpha_bar[end].sqrt() * MEAN + spread(end) * whole
    errors = []
    for steps in (192, 384, 768, 1536):
        grid = list(range(T, end - 1, -(T - end) // steps))
        assert len(grid) == steps + 1
        *_, last = SAMPLERS[sampler](denoiser, x_T, grid, noise=lambda: x_T)
        errors.append((last.x_t - exact).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[sampler], abs=0.25)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", ["quadratic", "logsnr"])
@pytest.mark.parametrize("sampler", ["dpm++", "dpm++sde", "unipc"])
def test_few_steps_are_enough(sampler, spacing, schedule):
    denoiser = perfect(NoiseSchedule.named(schedule, 1000))
    _, mean, std = moments(sampler, denoiser, 20, spacing=spacing)[-1]
    assert mean == pytest.approx(MEAN, abs=0.0015)
    assert std == pytest.approx(STD, abs=0.035)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [9, 100])
def test_ddim_with_eta_one_is_the_ddpm_posterior(schedule, steps):
    denoiser = perfect(NoiseSchedule.named(schedule, 100))
    x_T = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def stream() -> ImageNoise:
        return ImageNoise(7, [0, 1], (3, 4, 5), dtype=torch.float64)

    grid = spaced_timesteps(denoiser.schedule, steps)
    left = list(ddpm(denoiser, x_T, grid, noise=stream(), variance="posterior"))
    right = list(ddim(denoiser, x_T, grid, noise=stream(), eta=1.0))
    assert len(left) == len(right) == steps
    for a, b in zip(left, right, strict=True):
        assert a.t == b.t
        torch.testing.assert_close(a.x_t, b.x_t, rtol=0, atol=1e-10)
        torch.testing.assert_close(a.x0, b.x0, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("sampler", "options"), WAYS, ids=WAY_IDS)
def test_random_images_in_float32(sampler, options):
    schedule = NoiseSchedule.named("linear", 200)
    net = GaussianNet(schedule, "v", MEAN, STD)
    denoiser = Denoiser(lambda x, t, y: net(x.double(), t, y), schedule, "v", threshold="none")
    noise = ImageNoise(3, range(4), (1, 64, 64))
    *_, last = SAMPLERS[sampler](denoiser, noise(), spaced_timesteps(schedule, 200), noise=noise, **options)
    assert isinstance(last, SampleStep)
    assert last.x_t.dtype == torch.float32
    pixels = last.x_t.double()
    # 16384 pixels: the standard error of the mean is 0.004, that of std 0.003; 200 steps are off by 0.02.
    assert pixels.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert pixels.std().item() == pytest.approx(STD, abs=0.035)
