"""Draws of t: all levels come as often as they should, the weighted loss keeps its mean, and it varies less."""

from __future__ import annotations

import pytest
import torch
from test_gaussian import GaussianNet

from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.draws import PIXEL_STD, T_SAMPLINGS, expected_loss, probabilities
from ddpmctl.core.losses import WEIGHTINGS, denoising_loss, level_weights
from ddpmctl.core.noise import derived_generator
from ddpmctl.core.prediction import PREDICTIONS
from ddpmctl.core.schedule import SCHEDULES, NoiseSchedule

T = 50
MANY = 400_000


def denoiser(schedule: str = "linear", prediction: str = "eps", timesteps: int = T) -> Denoiser:
    return Denoiser(lambda x, t, y: torch.zeros_like(x), NoiseSchedule.named(schedule, timesteps), prediction)


def chances(sampling: str, of: Denoiser, weighting: str) -> torch.Tensor:
    """p(t), (T,) float64."""
    return probabilities(of, weighting) if sampling == "importance" else torch.full((T,), 1 / T, dtype=torch.float64)


def test_uniform_draws_are_what_they_always_were():
    """Runs go on as they began, and their checkpoints do not say how t was drawn."""
    t, weights = T_SAMPLINGS["uniform"](denoiser(), 16, "uniform", derived_generator(3, 7, 0, "t"))
    assert torch.equal(t, torch.randint(1, T + 1, (16,), generator=derived_generator(3, 7, 0, "t")))
    assert weights is None


@pytest.mark.parametrize("sampling", T_SAMPLINGS)
@pytest.mark.parametrize("n", [1, 7, 128])
def test_every_draw_is_a_level_and_follows_from_its_generator(sampling, n):
    of = denoiser("cosine", "v")
    first, again, other = (T_SAMPLINGS[sampling](of, n, "p2", derived_generator("x", i)) for i in (1, 1, 2))
    assert first.t.shape == (n,) and first.t.dtype == torch.int64 and 1 <= first.t.min() <= first.t.max() <= T
    assert torch.equal(first.t, again.t)
    assert n == 1 or not torch.equal(first.t, other.t)
    if first.weights is not None:
        assert first.weights.shape == (n,) and first.weights.dtype == torch.float64
        assert torch.equal(first.weights, again.weights)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_importance_enumerated_is_the_mean_over_all_levels(schedule, prediction, weighting):
    """sum_t p(t) / (T p(t)) L_t, with weights as they are drawn, of any L_t whatever."""
    of = denoiser(schedule, prediction)
    p = probabilities(of, weighting)
    assert p.sum().item() == pytest.approx(1, abs=1e-12) and bool((p > 0).all())
    t, weights = T_SAMPLINGS["importance"](of, 5000, weighting, derived_generator("enumerated"))
    assert weights.max() <= 2
    of_level = torch.zeros(T, dtype=torch.float64).scatter(0, t - 1, weights)
    assert bool((of_level > 0).all()), "5,000 spread evenly meet all of 50 levels"
    losses = torch.rand(T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (p * of_level * losses).sum().item() == pytest.approx(losses.mean().item(), rel=1e-12)


@pytest.mark.parametrize("sampling", ["stratified", "importance"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_levels_come_as_often_as_their_chance(sampling, prediction):
    """A batch spread evenly over [0, 1) meets each level as often as that says, but for one at each end."""
    of = denoiser("cosine", prediction)
    t, _ = T_SAMPLINGS[sampling](of, MANY, "uniform", derived_generator("counted"))
    counts = torch.bincount(t, minlength=T + 1)[1:]
    assert (counts - MANY * chances(sampling, of, "uniform")).abs().max() < 2


@pytest.mark.parametrize("sampling", T_SAMPLINGS)
@pytest.mark.parametrize("place", [0, 5])
def test_each_place_in_a_batch_has_the_same_chances(sampling, place):
    of = denoiser()
    t = torch.stack([T_SAMPLINGS[sampling](of, 6, "uniform", derived_generator("place", i)).t for i in range(4000)])
    early = chances(sampling, of, "uniform")[: T // 5].sum().item()
    found = (t[:, place] <= T // 5).double().mean().item()
    assert found == pytest.approx(early, abs=4 * (early * (1 - early) / 4000) ** 0.5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_expected_loss_is_that_of_the_best_denoiser_of_gaussian_pixels(prediction, weighting):
    """Measured: the perfect network on so many pixels, a level at a time, with the weights of the training loss."""
    schedule = NoiseSchedule.named("cosine", T)
    of = Denoiser(GaussianNet(schedule, prediction, 0.0, PIXEL_STD), schedule, prediction)
    x0, eps = torch.randn(2, 1, 1, 500, 500, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = expected_loss(of, weighting)
    for t in (1, 10, 25, 40, T):
        found = denoising_loss(of, PIXEL_STD * x0, torch.tensor([t]), eps, weighting=weighting)
        assert found.item() == pytest.approx(expected[t - 1].item(), rel=0.02)


def spread_of_losses(sampling: str, schedule: str, prediction: str, std: float) -> tuple[float, float, float]:
    """Mean of batch losses over 1,000 batches of 16, their variance, and the true mean, where L_t is that of such pixels."""
    of = denoiser(schedule, prediction)
    abar = of.schedule.alpha_bar[1:]
    off = std**2 * (1 - abar) / (std**2 * abar + 1 - abar)
    losses = off * {"eps": abar / (1 - abar), "x0": torch.ones_like(abar), "v": 1 / (1 - abar)}[prediction]
    batches = []
    for i in range(1000):
        t, weights = T_SAMPLINGS[sampling](of, 16, "uniform", derived_generator("batch", i))
        batches.append((losses[t - 1] * (1 if weights is None else weights)).mean())
    found = torch.stack(batches)
    return found.mean().item(), found.var().item(), losses.mean().item()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("std", [0.2, 0.5, 0.8], ids="std-{}".format)
def test_losses_of_batches_have_the_same_mean_and_vary_less(schedule, prediction, std):
    found = {sampling: spread_of_losses(sampling, schedule, prediction, std) for sampling in T_SAMPLINGS}
    for mean, variance, true in found.values():
        assert mean == pytest.approx(true, abs=4 * (variance / 1000) ** 0.5)
    assert found["stratified"][1] < found["uniform"][1] / 4
    assert found["importance"][1] < found["uniform"][1] / 4


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_importance_by_itself_makes_the_loss_vary_less(schedule, prediction):
    """Of one draw alone, without the spreading over a batch: sum_t L_t^2 / (T^2 p(t)) against mean_t L_t^2."""
    of = denoiser(schedule, prediction)
    losses = expected_loss(of, "uniform")
    weighted = (losses**2 / (T**2 * probabilities(of, "uniform"))).sum() - losses.mean() ** 2
    assert weighted < losses.var(correction=0)


def test_weights_multiply_the_loss_of_each_image():
    schedule = NoiseSchedule.named("linear", T)
    x0, eps = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    of = Denoiser(lambda x, t, y: x / 2, schedule, "v")
    t, weights = torch.tensor([1, 20, 50]), torch.tensor([0.5, 1.9, 1.0], dtype=torch.float64)
    alone = [denoising_loss(of, x0[i : i + 1], t[i : i + 1], eps[i : i + 1]).item() for i in range(3)]
    assert denoising_loss(of, x0, t, eps, weights=weights).item() == pytest.approx(
        sum(w * loss for w, loss in zip(weights.tolist(), alone, strict=True)) / 3, rel=1e-12
    )
    both = denoising_loss(of, x0, t, eps, weighting="p2", weights=weights).item()
    of_level = level_weights(of, t, "p2").tolist()
    assert both == pytest.approx(
        sum(w * p * loss for w, p, loss in zip(weights.tolist(), of_level, alone, strict=True)) / 3, rel=1e-12
    )
