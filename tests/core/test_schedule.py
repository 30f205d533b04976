from __future__ import annotations

import math

import pytest
import torch

from ddpmctl.core.schedule import MAX_BETA, SCHEDULES, NoiseSchedule

LENGTHS = [2, 5, 10, 50, 1000, 4000]


@pytest.mark.parametrize("timesteps", LENGTHS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_of_every_schedule(name, timesteps):
    schedule = NoiseSchedule.named(name, timesteps)
    assert schedule.timesteps == timesteps
    for table in (schedule.betas, schedule.alphas, schedule.alpha_bar):
        assert table.shape == (timesteps + 1,)
        assert table.dtype == torch.float64
    assert (schedule.betas[0], schedule.alphas[0], schedule.alpha_bar[0]) == (0, 1, 1)
    assert bool(((schedule.betas[1:] > 0) & (schedule.betas[1:] <= MAX_BETA)).all())
    assert bool((schedule.alpha_bar.diff() < 0).all())
    assert schedule.alpha_bar[-1] > 0


@pytest.mark.parametrize("timesteps", [1000, 4000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_almost_nothing_of_the_image_is_left_at_the_end(name, timesteps):
    assert NoiseSchedule.named(name, timesteps).snr_db()[-1] < -43


@pytest.mark.parametrize(("timesteps", "low", "high"), [(1000, 1e-4, 0.02), (500, 2e-4, 0.04), (4000, 2.5e-5, 0.005)])
def test_linear_ends_scale_with_T(timesteps, low, high):
    betas = NoiseSchedule.named("linear", timesteps).betas[1:]
    assert (betas[0].item(), betas[-1].item()) == pytest.approx((low, high), rel=1e-12)
    torch.testing.assert_close(betas.diff(), torch.full_like(betas[1:], (high - low) / (timesteps - 1)))


def test_linear_keeps_its_end_for_any_length():
    ends = [NoiseSchedule.named("linear", timesteps).snr_db()[-1].item() for timesteps in (200, 1000, 4000)]
    assert ends == pytest.approx([-44] * 3, abs=1.5)


@pytest.mark.parametrize("timesteps", [50, 1000, 4000])
def test_cosine_follows_its_formula_until_the_cap(timesteps):
    schedule = NoiseSchedule.named("cosine", timesteps)
    free = int((schedule.betas < MAX_BETA).sum())
    assert free >= timesteps - 1
    for t in range(free):
        angles = [(k / timesteps + 0.008) / 1.008 * math.pi / 2 for k in (t, 0)]
        expected = math.cos(angles[0]) ** 2 / math.cos(angles[1]) ** 2
        assert schedule.alpha_bar[t].item() == pytest.approx(expected, rel=1e-9)


def test_sigmoid_follows_its_formula_until_the_cap():
    schedule = NoiseSchedule.named("sigmoid", 1000)

    def falling(share: float) -> float:
        return 1 / (1 + math.exp(-(3 - 6 * share)))

    for t in range(1000):
        expected = (falling(t / 1000) - falling(1)) / (falling(0) - falling(1))
        assert schedule.alpha_bar[t].item() == pytest.approx(expected, rel=1e-9)
    assert schedule.alpha_bar[500].item() == pytest.approx(0.5, rel=1e-12)
    assert schedule.betas[1000].item() == MAX_BETA


@pytest.mark.parametrize(
    "betas",
    [[0.0, 0.1], [-0.1], [1.1], [math.nan], [[0.1], [0.2]]],
    ids=["zero", "negative", "above-one", "nan", "table"],
)
def test_betas_out_of_range(betas):
    with pytest.raises(ValueError, match="betas"):
        NoiseSchedule(torch.tensor(betas))


@pytest.mark.parametrize("shift", [0.1, 0.5, 2, 4, 100])
@pytest.mark.parametrize("timesteps", LENGTHS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_shift_multiplies_the_noise_beside_the_image(name, timesteps, shift):
    """sqrt((1 - abar) / abar) at every t, down to the last level."""
    plain, schedule = NoiseSchedule.named(name, timesteps), NoiseSchedule.named(name, timesteps, shift=shift)
    gap = schedule.half_log_snr()[1:] - plain.half_log_snr()[1:]
    assert torch.allclose(gap, torch.full_like(gap, -math.log(shift)), rtol=0, atol=1e-9)
    assert bool((schedule.betas[1:] > 0).all()) and bool((schedule.betas < 1).all())


def test_beta_of_one_is_capped():
    assert NoiseSchedule(torch.tensor([0.5, 1.0])).betas.tolist() == [0, 0.5, MAX_BETA]


@pytest.mark.parametrize(
    ("t", "like", "shape"),
    [
        (3, (4, 3, 8, 8), (1, 1, 1, 1)),
        (torch.tensor(3), (4, 3, 8, 8), (1, 1, 1, 1)),
        (torch.tensor([1, 2, 3, 0]), (4, 3, 8, 8), (4, 1, 1, 1)),
        (torch.tensor([1, 2]), (2,), (2,)),
    ],
)
def test_coefficients_broadcast(t, like, shape):
    signal, noise = NoiseSchedule.named("linear", 10).at(t, torch.zeros(like))
    assert signal.shape == noise.shape == shape
    assert signal.dtype == noise.dtype == torch.float32


@pytest.mark.parametrize("name", SCHEDULES)
def test_first_noise_level_keeps_its_digits_in_float32(name):
    schedule = NoiseSchedule.named(name, 4000)
    _, noise = schedule.at(1, torch.zeros(1))
    exact = math.sqrt(SCHEDULES[name](4000)[0].item())
    assert noise.item() == pytest.approx(exact, rel=1e-7)


def test_level_zero_is_the_clean_image():
    x0, eps = torch.rand(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    assert torch.equal(NoiseSchedule.named("cosine", 10).q_sample(x0, 0, eps), x0)


def test_level_past_the_end():
    with pytest.raises(IndexError):
        NoiseSchedule.named("linear", 10).at(11, torch.zeros(1))


@pytest.mark.parametrize("name", SCHEDULES)
def test_closed_form_is_all_single_steps_in_one(name):
    """x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) z, mean and variance carried along in plain numbers."""
    schedule = NoiseSchedule.named(name, 300)
    mean, variance = 1.0, 0.0
    for t in range(1, 301):
        alpha = schedule.alphas[t].item()
        mean, variance = math.sqrt(alpha) * mean, alpha * variance + schedule.betas[t].item()
        signal, noise = schedule.at(t, torch.zeros(1, dtype=torch.float64))
        assert (signal.item(), noise.item() ** 2) == pytest.approx((mean, variance), rel=1e-9)


def test_noised_image_has_the_moments_it_should():
    schedule = NoiseSchedule.named("linear", 1000)
    x0 = torch.full((1, 1, 256, 256), 0.8)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    for t in (1, 200, 1000):
        x_t = schedule.q_sample(x0, t, eps)
        abar = schedule.alpha_bar[t].item()
        spread = math.sqrt(1 - abar)
        assert x_t.mean().item() == pytest.approx(0.8 * math.sqrt(abar), abs=4 * spread / 256)
        assert x_t.std().item() == pytest.approx(spread, rel=0.012)


def test_each_image_is_noised_at_its_own_level():
    schedule = NoiseSchedule.named("linear", 10)
    x0, eps, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 4, 10])
    together = schedule.q_sample(x0, t, eps)
    for i in range(3):
        assert torch.equal(together[i], schedule.q_sample(x0[i : i + 1], int(t[i]), eps[i : i + 1])[0])


def test_signal_to_noise_ratio_in_decibels():
    snr = NoiseSchedule(torch.tensor([0.5, 0.8])).snr_db()
    assert snr[0] == math.inf
    assert snr[1:].tolist() == pytest.approx([0, 10 * math.log10(0.1 / 0.9)], abs=1e-6)
