from __future__ import annotations

import pytest
import torch

from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.losses import LOSSES, denoising_loss
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
