from __future__ import annotations

import pytest
import torch

from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.losses import LOSSES, WEIGHTINGS, denoising_loss
from ddpmctl.core.prediction import PREDICTIONS
from ddpmctl.core.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.named("linear", 1000)
T = torch.tensor([1, 500, 1000])


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    x0, eps = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    return x0.clamp(-1, 1), eps


@pytest.mark.parametrize(
    ("loss", "expected"),
    [("l2", (0.25 + 4 + 0 + 9) / 4), ("l1", (0.5 + 2 + 0 + 3) / 4), ("huber", (0.125 + 1.5 + 0 + 2.5) / 4)],
)
def test_known_values(loss, expected):
    eps = torch.zeros(1, 1, 2, 2)
    output = torch.tensor([0.5, -2.0, 0.0, 3.0]).view(1, 1, 2, 2)
    denoiser = Denoiser(lambda x, t, y: output, SCHEDULE)
    assert denoising_loss(denoiser, eps, torch.tensor([5]), eps, loss=loss).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_right_network_has_no_loss(prediction, loss):
    x0, eps = batch()
    denoiser = Denoiser(lambda x, t, y: denoiser.target(x0, T, eps), SCHEDULE, prediction)
    assert denoising_loss(denoiser, x0, T, eps, loss=loss).item() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_the_mean_over_the_batch(loss):
    x0, eps = batch()
    denoiser = Denoiser(lambda x, t, y: x / 2, SCHEDULE)
    whole = denoising_loss(denoiser, x0, T, eps, loss=loss)
    parts = [denoising_loss(denoiser, x0[i : i + 1], T[i : i + 1], eps[i : i + 1], loss=loss) for i in range(3)]
    assert whole.shape == ()
    assert whole.dtype == torch.float32
    assert whole.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradient_reaches_the_network(prediction, loss):
    x0, eps = batch()
    torch.manual_seed(4)  # a bias whose signs of error balance has no gradient of l1
    net = torch.nn.Conv2d(2, 2, 1)
    denoising_loss(Denoiser(lambda x, t, y: net(x), SCHEDULE, prediction), x0, T, eps, loss=loss).backward()
    assert all(bool((p.grad != 0).all()) for p in net.parameters())


def test_network_sees_the_noised_image_its_step_and_its_label():
    x0, eps = batch()
    label, seen = torch.tensor([2, 0, 1]), []

    def net(*args: torch.Tensor) -> torch.Tensor:
        seen.extend(args)
        return torch.zeros_like(x0)

    denoising_loss(Denoiser(net, SCHEDULE), x0, T, eps, label)
    assert torch.equal(seen[0], SCHEDULE.q_sample(x0, T, eps))
    assert seen[1].tolist() == [0, 499, 999]
    assert seen[2] is label


@pytest.mark.parametrize(("weighting", "snr", "expected"), [
    ("min_snr", 0.01, 1), ("min_snr", 5, 1), ("min_snr", 50, 0.1), ("p2", 1, 0.5), ("p2", 99, 0.01), ("p2", 1e-9, 1),
])  # fmt: skip
def test_weights_by_hand(weighting, snr, expected):
    """Of the squared error of eps, for any SNR."""
    weights = WEIGHTINGS[weighting](torch.tensor([snr], dtype=torch.float64))
    assert weights.item() == pytest.approx(expected)


@pytest.mark.parametrize("weighting", [name for name in WEIGHTINGS if name != "uniform"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_weighting_is_the_same_loss_whatever_the_network_predicts(weighting, prediction, schedule):
    """The oracle: an estimate that is off by a known error of eps, told as eps, x0 or v, costs W(SNR) times its square."""
    schedule = NoiseSchedule.named(schedule, 1000)
    x0, eps = (part.double() for part in batch())
    error = 0.1 * torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    t = torch.tensor([3, 500, 990])
    signal, noise = schedule.at(t, x0)

    def net(x_t, t_index, label):
        estimate = eps + error
        return PREDICTIONS[prediction].target((x_t - noise * estimate) / signal, estimate, signal, noise)

    abar = schedule.alpha_bar[t]
    expected = (WEIGHTINGS[weighting](abar / (1 - abar)) * (error**2).flatten(1).mean(1)).mean()
    found = denoising_loss(Denoiser(net, schedule, prediction), x0, t, eps, weighting=weighting)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weighted_losses_are_means_over_the_batch(loss, weighting):
    x0, eps = batch()
    denoiser = Denoiser(lambda x, t, y: x / 2, SCHEDULE, "v")
    options = {"loss": loss, "weighting": weighting}
    whole = denoising_loss(denoiser, x0, T, eps, **options)
    parts = [denoising_loss(denoiser, x0[i : i + 1], T[i : i + 1], eps[i : i + 1], **options) for i in range(3)]
    assert whole.dtype == torch.float32 and whole.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-5)
