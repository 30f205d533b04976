from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.samplers import SAMPLERS, VARIANCES, ddim, ddpm, dpm_solver_sde, evaluations
from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.core.spacing import spaced_timesteps

SHAPE = (2, 1, 3, 4)
SCHEDULE = NoiseSchedule.named("linear", 20)


class CountingNet:
    """Says 0 and remembers how it was asked."""

    def __init__(self) -> None:
        self.indices: list[list[int]] = []
        self.labels: list[Tensor | None] = []
        self.grad_modes: list[bool] = []

    def __call__(self, x: Tensor, t_index: Tensor, label: Tensor | None) -> Tensor:
        self.indices.append(t_index.tolist())
        self.labels.append(label)
        self.grad_modes.append(torch.is_grad_enabled())
        return torch.zeros_like(x)


@pytest.fixture
def net() -> CountingNet:
    return CountingNet()


@pytest.fixture
def denoiser(net) -> Denoiser:
    return Denoiser(net, SCHEDULE, "x0")


def ones() -> Tensor:
    return torch.ones(SHAPE)


def run(sampler: str, denoiser: Denoiser, grid: list[int], **options: object) -> Iterator:
    return SAMPLERS[sampler](denoiser, ones(), grid, noise=ones, **options)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_is_lazy(sampler, net, denoiser):
    states = run(sampler, denoiser, spaced_timesteps(SCHEDULE, 5))
    assert net.indices == []
    assert next(states).t == 16
    assert net.indices == ([[19, 19], [15, 15]] if sampler == "heun" else [[19, 19]])
    assert [state.t for state in states] == [12, 8, 4, 0]
    visited = (20, 16, 16, 12, 12, 8, 8, 4, 4) if sampler == "heun" else (20, 16, 12, 8, 4)
    assert net.indices == [[t - 1] * 2 for t in visited]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_evaluations_are_counted(sampler, steps, net, denoiser):
    states = list(run(sampler, denoiser, spaced_timesteps(SCHEDULE, steps)))
    assert len(states) == steps
    assert len(net.indices) == evaluations(sampler, steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_of_the_consumer_stays(sampler, enabled, net, denoiser):
    with torch.set_grad_enabled(enabled):
        states = run(sampler, denoiser, spaced_timesteps(SCHEDULE, 4))
        for state in states:
            assert torch.is_grad_enabled() == enabled
            assert not state.x_t.requires_grad
        stopped = run(sampler, denoiser, spaced_timesteps(SCHEDULE, 4))
        next(stopped)
        stopped.close()
        assert torch.is_grad_enabled() == enabled
    assert not any(net.grad_modes)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_label_reaches_the_network(sampler, net, denoiser):
    label = torch.tensor([3, 1])
    list(run(sampler, denoiser, [20, 10, 0], label=label))
    assert all(given is label for given in net.labels)
    assert len(net.labels) == evaluations(sampler, 2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_input_is_not_changed(sampler, denoiser):
    x_T = ones()
    list(SAMPLERS[sampler](denoiser, x_T, [20, 10, 0], noise=ones))
    assert torch.equal(x_T, ones())


@pytest.mark.parametrize(
    ("sampler", "options", "draws"),
    [
        (ddpm, {}, 4),
        (ddpm, {"variance": "posterior"}, 4),
        (ddim, {}, 0),
        (ddim, {"eta": 0.3}, 4),
        (dpm_solver_sde, {}, 4),
    ],
)
def test_noise_is_drawn_on_every_step_but_the_last(sampler, options, draws, denoiser):
    drawn = []

    def noise() -> Tensor:
        drawn.append(1)
        return torch.zeros(SHAPE)

    list(sampler(denoiser, ones(), spaced_timesteps(SCHEDULE, 5), noise=noise, **options))
    assert len(drawn) == draws


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "unipc", "heun"])
def test_samplers_of_the_flow_ignore_the_noise(sampler, denoiser):
    grid, walk = spaced_timesteps(SCHEDULE, 5), SAMPLERS[sampler]
    first, second = ([s.x_t for s in walk(denoiser, ones(), grid, noise=lambda n=n: n * ones())] for n in (1.0, 9.0))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("variance", "shrink"), [("beta", False), ("posterior", True)])
def test_ddpm_variance(variance, shrink, denoiser):
    """1 - alpha with alpha = abar_t / abar_s, times (1 - abar_s) / (1 - abar_t) for the posterior."""
    schedule = denoiser.schedule
    x = torch.zeros(SHAPE, dtype=torch.float64)
    for t, s in [(20, 19), (20, 3), (2, 1)]:
        state = next(ddpm(denoiser, x, [t, s], noise=lambda: torch.ones_like(x), variance=variance))
        abar_t, abar_s = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
        expected = (1 - abar_t / abar_s) * ((1 - abar_s) / (1 - abar_t) if shrink else 1)
        assert state.x_t.flatten()[0].item() ** 2 == pytest.approx(expected, rel=1e-12)


def test_every_variance_is_a_choice_of_ddpm():
    learned = Denoiser(lambda x, t, y: torch.zeros_like(x).repeat(1, 2, 1, 1), SCHEDULE, learned_variance=True)
    ends = [next(run("ddpm", learned, [20, 10], variance=name)).x_t.mean().item() for name in VARIANCES]
    assert len(set(ends)) == len(VARIANCES) == 3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clipped_estimates_stay_in_range(sampler):
    loud = Denoiser(lambda x, t, y: 50 * torch.ones_like(x), NoiseSchedule.named("cosine", 20), "eps")
    states = list(run(sampler, loud, spaced_timesteps(SCHEDULE, 20)))
    assert all(state.x0.abs().max() <= 1 for state in states)
    torch.testing.assert_close(states[-1].x_t, states[-1].x0, rtol=0, atol=1e-5)
