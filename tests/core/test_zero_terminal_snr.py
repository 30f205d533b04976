"""Schedules that leave nothing of the image at T: the rescaling, and everything that walks over a log-SNR of -infinity."""

from __future__ import annotations

import math

import pytest
import torch
from test_bound import closed_form, gaussian_images
from test_gaussian import MEAN, STD, USUAL_SPACING, WAY_IDS, WAYS, GaussianNet, moments, perfect

from ddpmctl.core.bound import variational_bound
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.draws import T_SAMPLINGS
from ddpmctl.core.losses import LOSSES, denoising_loss
from ddpmctl.core.noise import ImageNoise, derived_generator
from ddpmctl.core.samplers import SAMPLERS
from ddpmctl.core.schedule import SCHEDULES, NoiseSchedule, zero_terminal_snr
from ddpmctl.core.spacing import SPACINGS, spaced_timesteps


def rescaled(name: str, timesteps: int = 1000) -> NoiseSchedule:
    return NoiseSchedule.named(name, timesteps, zero_snr=True)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [2, 3, 20, 1000, 4000])
def test_nothing_is_left_at_T_and_the_first_level_is_what_it_was(name, timesteps):
    before, after = NoiseSchedule.named(name, timesteps), rescaled(name, timesteps)
    assert after.alpha_bar[-1] == 0 and after.betas[-1] == 1
    assert after.alpha_bar[1].item() == pytest.approx(before.alpha_bar[1].item(), rel=1e-14)
    assert bool((after.alpha_bar.diff() < 0).all()) and bool((after.betas[1:] > 0).all())
    # Between the ends sqrt(abar) is one affine map of what it was.
    root, old = after.alpha_bar[1:].sqrt(), before.alpha_bar[1:].sqrt()
    assert torch.allclose(root, (old - old[-1]) * root[0] / (old[0] - old[-1]), rtol=0, atol=1e-14)
    assert after.half_log_snr()[-1] == after.snr_db()[-1] == -math.inf
    assert bool(after.half_log_snr()[1:-1].isfinite().all())


def test_one_step_cannot_be_rescaled():
    with pytest.raises(ValueError, match="two steps"):
        zero_terminal_snr(torch.tensor([0.5]))


def test_eps_says_nothing_at_T():
    with pytest.raises(ValueError, match="eps says nothing"):
        Denoiser(lambda x, t, y: x, rescaled("linear"), "eps")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("timesteps", [2, 3, 57, 1000])
def test_grids_fall_from_T_to_0_and_lie_as_if_they_began_at_the_last_finite_level(timesteps, spacing, name):
    schedule = rescaled(name, timesteps)
    for steps in {1, 2, 3, 8, 20, timesteps} & set(range(1, timesteps + 1)):
        grid = spaced_timesteps(schedule, steps, spacing)
        assert (grid[0], grid[-1], len(grid)) == (timesteps, 0, steps + 1)
        assert grid == sorted(set(grid), reverse=True)
        if spacing in ("karras", "logsnr") and timesteps == 1000 and steps == 8:
            lam = schedule.half_log_snr()
            way = (lambda x: math.exp(-x / 7)) if spacing == "karras" else (lambda x: x)
            ends = way(lam[-2].item()), way(lam[1].item())
            for i, t in enumerate(grid[1:-1], start=1):
                wanted = ends[0] + i / 7 * (ends[1] - ends[0])
                nearest = min(range(1, timesteps), key=lambda u: abs(lam[u].item() - _back(spacing, wanted)))
                assert t == nearest


def _back(spacing: str, value: float) -> float:
    return -7 * math.log(value) if spacing == "karras" else value


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("sampler", "options"), WAYS, ids=WAY_IDS)
def test_sampler_makes_the_data_it_knows(sampler, options, schedule, prediction):
    t, mean, std = moments(sampler, perfect(rescaled(schedule, 500), prediction), 500, **options)[-1]
    assert t == 0
    # Nothing of the mean is lost at T, where other schedules begin without the little that is left of it there.
    assert mean == pytest.approx(MEAN, abs=1e-9 if sampler == "ddpm" else 1e-3)
    assert std == pytest.approx(STD, abs=0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("sampler", "options"), WAYS, ids=WAY_IDS)
def test_error_shrinks_with_the_number_of_steps(sampler, options, schedule):
    denoiser, spacing = perfect(rescaled(schedule, 2000), "v"), USUAL_SPACING.get(sampler, "linear")
    coarse, fine = (moments(sampler, denoiser, n, spacing=spacing, **options)[-1][2] - STD for n in (50, 500))
    assert abs(coarse) < 0.06
    assert abs(fine) < 0.25 * abs(coarse) + 1e-4


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_every_sampler_over_every_grid_stays_finite_and_ends_at_a_known_image(sampler, steps, spacing, schedule):
    denoiser = perfect(rescaled(schedule, 200), "v", std=0.0)
    found = moments(sampler, denoiser, steps, spacing=spacing)
    assert all(math.isfinite(value) for state in found for value in state)
    assert found[-1][1:] == pytest.approx((MEAN, 0), abs=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 2), ("dpm++", 2), ("unipc", 3), ("heun", 3)])
def test_the_step_from_T_is_of_the_order_of_the_sampler(sampler, order, schedule):
    """Error of that step against the exact flow, by 1 / sigma, which is 0 at T; UniPC corrects when the next begins."""
    noise_schedule = rescaled(schedule, 4000)
    denoiser = perfect(noise_schedule, "v")
    ratio = torch.exp(noise_schedule.half_log_snr())
    x_T = torch.tensor([-1.5, 0.4, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    errors, widths = [], []
    for wanted in (0.2, 0.1, 0.05):
        s = int((ratio[1:-1] - wanted).abs().argmin()) + 1
        abar = noise_schedule.alpha_bar[s].item()
        exact = math.sqrt(abar) * MEAN + math.sqrt(abar * STD**2 + 1 - abar) * x_T
        walker = _Corrected(denoiser)
        states = SAMPLERS[sampler](walker, x_T, [4000, s, s - 1], noise=lambda: x_T)
        first, second = next(states), next(states)
        found = walker.corrected(noise_schedule, s, second.x_t) if sampler == "unipc" else first.x_t
        errors.append((found - exact).abs().max().item())
        widths.append(ratio[s].item())
    for i in (0, 1):
        slope = math.log(errors[i] / errors[i + 1]) / math.log(widths[i] / widths[i + 1])
        assert slope > order - 0.25  # locally; of Gaussian pixels the third power vanishes, for x0 is even about T


class _Corrected:
    """A denoiser that remembers its estimates, to take a step back from what came after it."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.schedule, self.x0 = denoiser, denoiser.schedule, list[torch.Tensor]()

    def __call__(self, x_t, t, label=None):
        x0, eps = self.denoiser(x_t, t, label)
        self.x0.append(x0)
        return x0, eps

    def corrected(self, schedule: NoiseSchedule, s: int, x_next: torch.Tensor) -> torch.Tensor:
        """x_s out of x_(s-1), which a step from T leaves without a second order."""
        abar, lam = schedule.alpha_bar, schedule.half_log_snr()
        drift = -abar[s - 1].sqrt() * torch.expm1(lam[s] - lam[s - 1]) * self.x0[1]
        return (x_next - drift) * ((1 - abar[s]) / (1 - abar[s - 1])).sqrt()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bound_is_the_closed_form_and_nothing_is_left_for_the_prior(schedule):
    noise_schedule = rescaled(schedule, 40)
    found = variational_bound(perfect(noise_schedule, "v"), gaussian_images(8), range(8), draws=40)
    for variance, bound in found.items():
        prior, steps = closed_form(noise_schedule, variance)
        assert prior == 0 and bool((bound.prior == 0).all())
        assert bound.steps.mean().item() / gaussian_images(1).numel() == pytest.approx(steps, rel=0.01)


@pytest.mark.parametrize("sampling", T_SAMPLINGS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_training_loss_and_its_gradient_are_finite_at_T(prediction, loss, sampling):
    schedule = rescaled("linear", 3)
    net = torch.nn.Conv2d(2, 2, 1)
    of = Denoiser(lambda x, t, y: net(x), schedule, prediction)
    t, weights = T_SAMPLINGS[sampling](of, 16, "uniform", derived_generator("any"))
    assert 3 in t
    x0, eps = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    found = denoising_loss(of, x0.clamp(-1, 1), t, eps, loss=loss, weights=weights)
    found.backward()
    assert found.isfinite() and all(bool(p.grad.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize("threshold", ["clip", "dynamic"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_random_images_in_float32_with_a_threshold(sampler, threshold):
    schedule = rescaled("cosine", 200)
    net = GaussianNet(schedule, "v", 0.1, 0.2)
    denoiser = Denoiser(lambda x, t, y: net(x.double(), t, y), schedule, "v", threshold=threshold)
    noise = ImageNoise(3, range(4), (1, 32, 32))
    grid = spaced_timesteps(schedule, 40, USUAL_SPACING.get(sampler, "linear"))
    *_, last = SAMPLERS[sampler](denoiser, noise(), grid, noise=noise)
    assert last.x_t.dtype == torch.float32
    assert last.x_t.mean().item() == pytest.approx(0.1, abs=0.03)
    assert last.x_t.std().item() == pytest.approx(0.2, abs=0.05)
