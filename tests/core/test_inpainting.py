"""Inpainting against data of which the answer is known: correlated Gaussian pixels, and what some of them say of the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.inpainting import repaint, rounds
from ddpmctl.core.noise import ImageNoise
from ddpmctl.core.samplers import SampleStep, ddim, ddpm
from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.core.spacing import spaced_timesteps

SCHEDULE = NoiseSchedule.named("linear", 1000)
MEAN = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)
PLACE = torch.arange(4, dtype=torch.float64)
COV = 0.25 * 0.8 ** (PLACE[:, None] - PLACE).abs()
ANEW = torch.tensor([False, True, True, False]).view(1, 1, 4)
KNOWN = torch.tensor([0.9, 0.0, 0.0, -0.6], dtype=torch.float64).view(1, 1, 4)


def perfect() -> Denoiser:
    """Of images of 1 x 4 pixels, N(MEAN, COV), in float64."""

    def net(x_t: Tensor, t_index: Tensor, label: Tensor | None) -> Tensor:
        abar = SCHEDULE.alpha_bar[int(t_index[0]) + 1]
        gain = abar.sqrt() * COV @ torch.linalg.inv(abar * COV + (1 - abar) * torch.eye(4, dtype=torch.float64))
        return (MEAN + (x_t.flatten(1) - abar.sqrt() * MEAN) @ gain.T).view(x_t.shape)

    return Denoiser(net, SCHEDULE, "x0", threshold="none")


def painted(n: int, steps: int, resample: int, jump: int, **options: object) -> Tensor:
    generator = torch.Generator().manual_seed(5)

    def noise() -> Tensor:
        return torch.randn(n, 1, 1, 4, generator=generator, dtype=torch.float64)

    *_, last = repaint(
        ddpm, perfect(), noise(), spaced_timesteps(SCHEDULE, steps, "logsnr"), known=KNOWN, anew=ANEW,
        resample=resample, jump=jump, noise=noise, **options,
    )  # fmt: skip
    return last.x_t


def off(x: Tensor) -> tuple[float, float]:
    """Largest error of the mean, and of the covariance, of the pixels drawn anew given those that are known."""
    new, old = [1, 2], [0, 3]
    gain = COV[new][:, old] @ torch.linalg.inv(COV[old][:, old])
    mean = MEAN[new] + gain @ (KNOWN.flatten()[old] - MEAN[old])
    cov = COV[new][:, new] - gain @ COV[old][:, new]
    drawn = x.flatten(1)[:, new]
    return (drawn.mean(0) - mean).abs().max().item(), (torch.cov(drawn.T) - cov).abs().max().item()


def test_what_is_drawn_follows_from_what_is_known_where_the_way_is_gone_often_enough() -> None:
    """Conditional Gaussian, var 0.072 where without the known pixels it is 0.25.

    By propagating the moments the error of the mean is 0.007 at ten times, and 0.067 at once, that of the covariance
    0.0034 and 0.03; 5000 images add standard errors of 0.004 and 0.0015.
    """
    once, often = (off(painted(5000, 100, resample, 4, variance="posterior")) for resample in (1, 10))
    assert often[0] < 0.02 and often[1] < 0.01
    assert once[0] > 0.05 and once[1] > 0.02


def test_known_pixels_are_those_of_the_picture_to_the_bit() -> None:
    x = painted(3, 7, 2, 2)
    assert torch.equal(torch.where(ANEW, KNOWN, x), KNOWN.expand_as(x))
    assert len(x[..., 1].unique()) == 3


def test_with_nothing_known_and_each_step_gone_once_it_is_the_sampler_itself() -> None:
    grid = spaced_timesteps(SCHEDULE, 12)
    x_T = torch.randn(2, 1, 1, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = list(ddim(perfect(), x_T, grid, noise=lambda: x_T))
    all_new = repaint(ddim, perfect(), x_T, grid, known=KNOWN, anew=torch.ones_like(ANEW), resample=1, jump=3, noise=lambda: x_T)  # fmt: skip
    for a, b in zip(plain, all_new, strict=True):
        assert isinstance(b, SampleStep)
        assert a.t == b.t and torch.equal(a.x_t, b.x_t) and torch.equal(a.x0, b.x0)


def test_known_pixels_have_the_noise_of_their_level_on_the_way() -> None:
    def noise() -> Tensor:
        return torch.ones(1, 1, 1, 4, dtype=torch.float64)

    grid = spaced_timesteps(SCHEDULE, 10)
    for state in repaint(ddpm, perfect(), noise(), grid, known=KNOWN, anew=ANEW, resample=3, jump=2, noise=noise):
        expected = SCHEDULE.q_sample(KNOWN[None], state.t, noise())
        assert torch.allclose(state.x_t[..., [0, 3]], expected[..., [0, 3]], atol=1e-12)


@pytest.mark.parametrize("sampler", [ddpm, ddim])
def test_an_image_does_not_depend_on_its_batch(sampler) -> None:
    def made(images: range) -> Tensor:
        noise = ImageNoise(4, images, (1, 1, 4), dtype=torch.float64)
        *_, last = repaint(
            sampler, perfect(), noise(), spaced_timesteps(SCHEDULE, 9), known=KNOWN, anew=ANEW, resample=2, jump=3, noise=noise,
        )  # fmt: skip
        return last.x_t

    whole = made(range(4))
    assert torch.allclose(whole, torch.cat([made(range(1)), made(range(1, 4))]), atol=1e-12)


@pytest.mark.parametrize(("resample", "jump", "path"), [
    (1, 1, [50, 40, 30, 20, 10, 0]),
    (2, 1, [50, 40, 50, 40, 30, 40, 30, 20, 30, 20, 10, 20, 10, 0]),
    (2, 2, [50, 40, 30, 50, 40, 30, 20, 10, 30, 20, 10, 0]),
    (3, 3, [50, 40, 50, 40, 50, 40, 30, 20, 10, 40, 30, 20, 10, 40, 30, 20, 10, 0]),
    (2, 99, [50, 40, 30, 20, 10, 50, 40, 30, 20, 10, 0]),
])  # fmt: skip
def test_rounds(resample, jump, path) -> None:
    assert rounds([50, 40, 30, 20, 10, 0], resample, jump) == path


def test_one_step_is_gone_once() -> None:
    assert rounds([50, 0], 7, 3) == [50, 0]
