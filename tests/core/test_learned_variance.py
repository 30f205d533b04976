"""The variance that a network learns, against Gaussian pixels, of which the right one is known."""

from __future__ import annotations

import math

import pytest
import torch
from test_bound import closed_form, gaussian_images
from test_gaussian import MEAN, STD, GaussianNet, Impulses, moments
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ddpmctl.core.bound import variational_bound
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.losses import VLB_WEIGHT, denoising_loss, variance_loss
from ddpmctl.core.prediction import PREDICTIONS
from ddpmctl.core.samplers import SAMPLERS, ddpm, variances_of
from ddpmctl.core.schedule import SCHEDULES, NoiseSchedule
from ddpmctl.core.spacing import spaced_timesteps

T = 50


def left_of_x0(schedule: NoiseSchedule, std: float = STD) -> Tensor:
    """Var(x0 | x_t) for t = 0..T, (T+1,) float64."""
    abar = schedule.alpha_bar
    return std**2 * (1 - abar) / (abar * std**2 + 1 - abar)


def limits(schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """beta~_t, that of t = 2 standing in for t = 1, and beta_t, for t = 1..T."""
    abar, beta = schedule.alpha_bar, schedule.betas[1:]
    least = beta * (1 - abar[:-1]) / (1 - abar[1:])
    return torch.cat([least[1:2], least[1:]]), beta


def true_variance(schedule: NoiseSchedule, std: float = STD) -> Tensor:
    """Var(x_(t-1) | x_t) for t = 2..T, (T-1,): that of q(x_(t-1) | x_t, x0), and what is unknown of its mean."""
    abar, beta = schedule.alpha_bar, schedule.betas[2:]
    least, _ = limits(schedule)
    pull = abar[1:-1].sqrt() * beta / (1 - abar[2:])
    return least[1:] + pull**2 * left_of_x0(schedule, std)[2:]


def right_fraction(schedule: NoiseSchedule, std: float = STD) -> Tensor:
    """For t = 1..T, (T,); at t = 1 that of the lower limit."""
    least, beta = limits(schedule)
    fraction = (true_variance(schedule, std) / least[1:]).log() / (beta[1:] / least[1:]).log()
    return torch.cat([torch.zeros(1, dtype=torch.float64), fraction])


class KnowingNet(GaussianNet):
    """The perfect network, which knows its variance too."""

    def __call__(self, x_t: Tensor, t_index: Tensor, label: Tensor | None) -> Tensor:
        spread = 2 * right_fraction(self.schedule, self.std)[t_index] - 1
        return torch.cat([super().__call__(x_t, t_index, label), spread.view(-1, 1, 1, 1).expand_as(x_t)], dim=1)


def knowing(schedule: NoiseSchedule, prediction: str = "v", std: float = STD) -> Denoiser:
    net = KnowingNet(schedule, prediction, MEAN, std)
    return Denoiser(net, schedule, prediction, threshold="none", learned_variance=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_loss_is_least_at_the_true_variance(schedule, zero_snr):
    """Errors of x0 of just the size that they have: the loss is its own expectation, and minimal without any noise."""
    noise_schedule = NoiseSchedule.named(schedule, T, zero_snr=zero_snr)
    denoiser = Denoiser(lambda x, t, y: x, noise_schedule, "x0", learned_variance=True)
    t = torch.arange(2, T + 1)
    prediction = torch.zeros(T - 1, 1, 1, 2, dtype=torch.float64)
    x0 = left_of_x0(noise_schedule)[2:].sqrt().view(-1, 1, 1, 1) * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    right = right_fraction(noise_schedule)[1:].view(-1, 1, 1, 1).expand(-1, 1, 1, 2)
    fraction = right.clone().requires_grad_()

    def loss(fraction: Tensor) -> Tensor:
        return variance_loss(denoiser, x0, prediction, t, prediction, fraction)

    least = loss(fraction)
    least.sum().backward()
    assert fraction.grad.abs().max() < 1e-10
    lower, upper = (limit[1:] for limit in limits(noise_schedule))
    apart = (upper / lower).log() > 1e-3  # elsewhere, near T, the difference of two losses is lost in rounding
    for off in (-0.2, -0.01, 0.01, 0.2):
        assert bool((loss(right + off) > least)[apart].all()) and apart.sum() > T / 2
    # There the divergence is half the log of how much larger it is than that of one known image, in bits.
    expected = (true_variance(noise_schedule) / lower).log() / 2 / math.log(2)
    torch.testing.assert_close(least.detach(), expected, rtol=1e-10, atol=1e-12)
    assert bool(((right > 0) & (right < 1)).all())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_divergence_of_two_normal_distributions(prediction):
    """By torch's own distributions, pixel by pixel, at t = 1 by the share of a grey level; Nichol & Dhariwal 2021, section 3.1."""
    schedule = NoiseSchedule.named("cosine", T)
    generator = torch.Generator().manual_seed(1)
    x0, eps, output, spread = torch.randn(4, 5, 2, 3, 4, generator=generator, dtype=torch.float64)
    x0 = ((x0.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    t = torch.tensor([1, 2, 20, 49, 1])
    denoiser = Denoiser(lambda x, i, y: x, schedule, prediction, learned_variance=True)
    x_t = schedule.q_sample(x0, t, eps)
    both, fraction = denoiser.split(torch.cat([output, spread], dim=1))
    assert torch.equal(both, output)
    found = variance_loss(denoiser, x0, x_t, t, output, fraction)
    abar = schedule.alpha_bar.view(-1, 1, 1, 1)
    least, beta = (limit.view(-1, 1, 1, 1) for limit in limits(schedule))
    estimate, _ = PREDICTIONS[prediction].split(output, x_t, abar[t].sqrt(), (1 - abar[t]).sqrt())
    variance = torch.exp((spread + 1) / 2 * beta[t - 1].log() + (1 - spread) / 2 * least[t - 1].log())
    for i, level in enumerate(t.tolist()):
        clean, known, at = abar[level - 1].sqrt() * beta[level - 1], (1 - beta[level - 1]).sqrt(), 1 - abar[level]
        mean_q, mean_p = ((clean * x + known * (1 - abar[level - 1]) * x_t[i]) / at for x in (x0[i], estimate[i]))
        ours = Normal(mean_p, variance[i].sqrt())
        if level > 1:
            nats = kl_divergence(Normal(mean_q, least[level - 1].sqrt()), ours)
        else:
            low = torch.where(x0[i] < -0.999, 0.0, ours.cdf(x0[i] - 1 / 255))
            high = torch.where(x0[i] > 0.999, 1.0, ours.cdf(x0[i] + 1 / 255))
            nats = -(high - low).clamp(min=1e-12).log()
        assert found[i].item() == pytest.approx(nats.mean().item() / math.log(2), rel=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_the_bound_teaches_the_variance_and_not_the_mean(prediction, loss):
    schedule = NoiseSchedule.named("linear", T)
    x0, eps = torch.randn(2, 6, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x0, t = x0.clamp(-1, 1), torch.tensor([1, 2, 10, 30, 49, 50])
    gradients, losses = [], []
    for vlb_weight in (0.0, VLB_WEIGHT):
        halves = [torch.full_like(x0, value).requires_grad_() for value in (0.1, 0.3)]
        denoiser = Denoiser(lambda x, i, y, h=halves: torch.cat(h, dim=1), schedule, prediction, learned_variance=True)
        found = denoising_loss(denoiser, x0, t, eps, loss=loss, vlb_weight=vlb_weight)
        found.backward()
        gradients.append([half.grad for half in halves])
        losses.append(found.item())
        bits = variance_loss(denoiser, x0, schedule.q_sample(x0, t, eps), t, halves[0], (1 + halves[1]) / 2)
    assert losses[1] == pytest.approx(losses[0] + VLB_WEIGHT * T * bits.mean().item(), rel=1e-12)
    (mean, unused), (mean_too, variance) = gradients
    assert bool((unused == 0).all())
    torch.testing.assert_close(mean_too, mean, rtol=1e-12, atol=0)
    assert bool((variance != 0).any(dim=(1, 2, 3)).all()) and bool(variance.isfinite().all())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_ddpm_with_the_true_variance_is_exact_at_every_level(schedule, prediction):
    """From nothing at T on, mean and std are those of the noised data: the limits alone are off by what is unknown of x0."""
    noise_schedule = NoiseSchedule.named(schedule, 200, zero_snr=True)
    for t, mean, std in moments("ddpm", knowing(noise_schedule, prediction), 200)[:-1]:
        abar = noise_schedule.alpha_bar[t].item()
        assert mean == pytest.approx(math.sqrt(abar) * MEAN, abs=1e-10)
        assert std == pytest.approx(math.sqrt(abar * STD**2 + 1 - abar), abs=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [10, 25])
def test_in_few_steps_it_is_nearer_than_both_limits(schedule, steps):
    """Their fractions, over longer steps, are no longer exact, but better than either end."""
    noise_schedule = NoiseSchedule.named(schedule, 1000)
    denoiser = knowing(noise_schedule)
    level = spaced_timesteps(noise_schedule, steps)[-2]
    abar = noise_schedule.alpha_bar[level].item()
    expected = math.sqrt(abar * STD**2 + 1 - abar)
    off = {
        name: abs(moments("ddpm", denoiser, steps, variance=name)[-2][2] - expected) for name in variances_of(denoiser)
    }
    assert off["learned"] < min(off["beta"], off["posterior"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bound_is_least_with_the_learned_variance(schedule):
    noise_schedule = NoiseSchedule.named(schedule, 40)
    found = variational_bound(knowing(noise_schedule), gaussian_images(8), range(8), draws=40)
    assert list(found) == ["learned", "beta", "posterior"]
    pixels = gaussian_images(1).numel()
    least = (true_variance(noise_schedule) / limits(noise_schedule)[0][1:]).log().sum().item() / 2
    assert found["learned"].steps.mean().item() / pixels == pytest.approx(least, rel=0.01)
    for name in ("beta", "posterior"):
        assert found[name].steps.mean().item() / pixels == pytest.approx(closed_form(noise_schedule, name)[1], rel=0.01)
        assert bool((found["learned"].steps < found[name].steps).all())
    # The network says 0 at t = 1: the lower of the two limits there.
    torch.testing.assert_close(found["learned"].decoder, found["posterior"].decoder)


@pytest.mark.parametrize(("said", "variance"), [(1.0, "beta"), (-1.0, "posterior")])
def test_the_ends_of_the_range_are_the_fixed_variances(said, variance):
    schedule = NoiseSchedule.named("cosine", T)
    denoiser = Denoiser(
        lambda x, t, y: torch.cat([0.3 * x, torch.full_like(x, said)], 1), schedule, learned_variance=True
    )
    x_T = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for grid in (list(range(T, -1, -1)), [T, 30, 7, 0]):
        walks = [list(ddpm(denoiser, x_T, grid, noise=lambda: x_T / 3, variance=name)) for name in (None, variance)]
        for one, other in zip(*walks, strict=True):
            torch.testing.assert_close(one.x_t, other.x_t, rtol=0, atol=1e-12)


def test_what_is_not_learned_cannot_be_used():
    plain = Denoiser(lambda x, t, y: x, NoiseSchedule.named("linear", T))
    assert variances_of(plain) == ["beta", "posterior"]
    with pytest.raises(ValueError, match="not learned"):
        next(ddpm(plain, torch.zeros(1, 1, 2, 2), [T, 0], noise=Impulses(1), variance="learned"))


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddpm"])
def test_other_samplers_do_not_look_at_it(sampler):
    schedule = NoiseSchedule.named("cosine", T)
    x_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    plain = Denoiser(lambda x, t, y: torch.sin(x), schedule)
    learned = Denoiser(lambda x, t, y: torch.cat([torch.sin(x), x], dim=1), schedule, learned_variance=True)
    ends = []
    for denoiser in (plain, learned):
        *_, last = SAMPLERS[sampler](denoiser, x_T, spaced_timesteps(schedule, 7), noise=lambda: torch.ones_like(x_T))
        ends.append(last.x_t)
    assert torch.equal(*ends)


def test_guidance_leaves_the_variance_as_the_label_has_it():
    schedule, seen = NoiseSchedule.named("linear", T), []

    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append(label.tolist())
        by_class = (1 + label).view(-1, 1, 1, 1) / 10
        return torch.cat([torch.sin(x) * by_class, by_class.expand_as(x)], dim=1)

    x, label = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1])
    options = {"threshold": "none", "null_label": 2, "learned_variance": True}
    guided = Denoiser(net, schedule, "v", guidance=3.0, **options).estimate(x, 20, label)
    plain, without = (Denoiser(net, schedule, "v", **options).estimate(x, 20, y) for y in (label, torch.tensor([2, 2])))
    torch.testing.assert_close(guided.x0, without.x0 + 3 * (plain.x0 - without.x0))
    assert torch.equal(guided.fraction, plain.fraction)
    assert seen[0] == [0, 1, 2, 2]
