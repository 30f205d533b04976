from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.prediction import PREDICTIONS
from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.core.thresholds import THRESHOLDS

SCHEDULE = NoiseSchedule.named("linear", 1000)


class Recorder:
    def __init__(self) -> None:
        self.x, self.t_index, self.label = None, None, None

    def __call__(self, x: Tensor, t_index: Tensor, label: Tensor | None) -> Tensor:
        self.x, self.t_index, self.label = x, t_index, label
        return torch.full_like(x, 0.25)


def images(count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(5), dtype=dtype)


@pytest.mark.parametrize(
    ("t", "index"),
    [
        (1, [0, 0, 0]),
        (1000, [999] * 3),
        (torch.tensor(7), [6] * 3),
        (torch.tensor([1, 500, 1000]), [0, 499, 999]),
    ],
)
def test_network_is_fed_t_minus_one(t, index):
    net = Recorder()
    Denoiser(net, SCHEDULE)(images(), t)
    assert net.t_index.tolist() == index
    assert not net.t_index.is_floating_point()


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_number_and_tensor_of_t_agree(prediction, threshold):
    denoiser = Denoiser(Recorder(), SCHEDULE, prediction, threshold=threshold)
    for one, many in zip(denoiser(images(), 321), denoiser(images(), torch.full((3,), 321)), strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_each_image_has_its_own_t(prediction):
    denoiser, x, t = Denoiser(Recorder(), SCHEDULE, prediction), images(), torch.tensor([1, 400, 1000])
    together = denoiser(x, t)
    for i in range(3):
        for whole, alone in zip(together, denoiser(x[i : i + 1], int(t[i])), strict=True):
            assert torch.equal(whole[i : i + 1], alone)


class ClassNet:
    """An output that differs by class, in one batch or in many; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], list[int]]] = []

    def __call__(self, x: Tensor, t_index: Tensor, label: Tensor | None) -> Tensor:
        self.asked.append((t_index.tolist(), label.tolist()))
        return torch.sin(x) * (1 + label).view(-1, 1, 1, 1) / (1 + t_index).view(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("w", [0.0, 0.5, 3.0])
def test_guidance_goes_from_no_label_through_the_label(prediction, w):
    """eps = eps_none + w (eps_label - eps_none), whatever the network predicts; Ho & Salimans 2022, equation 6."""
    x, label, t = images(dtype=torch.float64), torch.tensor([0, 1, 1]), torch.tensor([5, 300, 1000])
    alone = Denoiser(ClassNet(), SCHEDULE, prediction, threshold="none")
    (x0, eps), (x0_none, eps_none) = alone(x, t, label), alone(x, t, torch.full_like(label, 2))
    net = ClassNet()
    found = Denoiser(net, SCHEDULE, prediction, threshold="none", null_label=2, guidance=w)(x, t, label)
    torch.testing.assert_close(found[0], x0_none + w * (x0 - x0_none), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], eps_none + w * (eps - eps_none), rtol=1e-9, atol=1e-9)
    assert net.asked == [([4, 299, 999] * 2, [0, 1, 1, 2, 2, 2])]


def test_guidance_of_one_and_no_label_ask_once():
    for guidance, label in ((1.0, torch.tensor([0, 1, 0])), (4.0, None)):
        net = Recorder()
        Denoiser(net, SCHEDULE, null_label=2, guidance=guidance)(images(), 7, label)
        assert net.label is label and len(net.x) == 3


@pytest.mark.parametrize(
    ("t", "guided"),
    [(1, False), (199, False), (200, True), (500, True), (800, True), (801, False), (1000, False)],
)
def test_guidance_holds_within_its_interval(t, guided):
    x, label, net = images(), torch.tensor([0, 1, 1]), ClassNet()
    x0, _ = Denoiser(net, SCHEDULE, threshold="none", null_label=2, guidance=3, interval=(0.2, 0.8))(x, t, label)
    plain, _ = Denoiser(ClassNet(), SCHEDULE, threshold="none")(x, t, label)
    assert torch.equal(x0, plain) == (not guided)
    assert len(net.asked[0][1]) == (6 if guided else 3)


def test_interval_is_that_of_each_image():
    x, label, t = images(), torch.tensor([0, 1, 1]), torch.tensor([1, 500, 1000])
    mixed = Denoiser(ClassNet(), SCHEDULE, threshold="none", null_label=2, guidance=3, interval=(0.2, 0.8))
    always = Denoiser(ClassNet(), SCHEDULE, threshold="none", null_label=2, guidance=3)
    never = Denoiser(ClassNet(), SCHEDULE, threshold="none")
    (found, _), (strong, _), (plain, _) = (denoiser(x, t, label) for denoiser in (mixed, always, never))
    torch.testing.assert_close(found, torch.stack([plain[0], strong[1], plain[2]]), rtol=1e-6, atol=1e-6)


def test_guidance_needs_a_null_label():
    with pytest.raises(ValueError, match="null label"):
        Denoiser(Recorder(), SCHEDULE, guidance=2)


def test_label_is_passed_on():
    net, label = Recorder(), torch.tensor([4, 2, 0])
    denoiser = Denoiser(net, SCHEDULE)
    denoiser(images(), 5, label)
    assert net.label is label
    denoiser(images(), 5)
    assert net.label is None


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [1, 300, 1000])
def test_clip_limits_x0_and_eps_agrees(prediction, t):
    x_t = 3 * images(dtype=torch.float64)
    raw, _ = Denoiser(Recorder(), SCHEDULE, prediction, threshold="none")(x_t, t)
    x0, eps = Denoiser(Recorder(), SCHEDULE, prediction)(x_t, t)
    assert torch.equal(x0, raw.clamp(-1, 1))
    signal, noise = SCHEDULE.at(t, x_t)
    torch.testing.assert_close(signal * x0 + noise * eps, x_t, rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [1, 300, 1000])
def test_dynamic_threshold_is_at_the_percentile_of_each_image_and_eps_agrees(t):
    x_t = 3 * images(dtype=torch.float64)
    x_t[1] /= 100
    raw, _ = Denoiser(lambda x, i, y: x, SCHEDULE, "x0", threshold="none")(x_t, t)
    x0, eps = Denoiser(lambda x, i, y: x, SCHEDULE, "x0", threshold="dynamic")(x_t, t)
    for before, after in zip(raw, x0, strict=True):
        s = max(before.abs().quantile(0.995).item(), 1)
        torch.testing.assert_close(after, (before / s).clamp(-1, 1), rtol=0, atol=1e-12)
    assert torch.equal(raw[1], x0[1])
    signal, noise = SCHEDULE.at(t, x_t)
    torch.testing.assert_close(signal * x0 + noise * eps, x_t, rtol=0, atol=1e-12)


def test_without_a_threshold_x0_may_leave_the_range():
    x0, eps = Denoiser(Recorder(), SCHEDULE, threshold="none")(3 * images(), 900)
    assert x0.abs().max() > 1
    assert torch.equal(eps, torch.full_like(eps, 0.25))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_network_that_gives_the_target_is_understood(prediction):
    x0, eps = images(dtype=torch.float64).clamp(-1, 1), images(dtype=torch.float64).flip(0)
    t = torch.tensor([1, 333, 990])
    denoiser = Denoiser(lambda x, i, y: target, SCHEDULE, prediction)
    target = denoiser.target(x0, t, eps)
    found = denoiser(SCHEDULE.q_sample(x0, t, eps), t)
    torch.testing.assert_close(found, (x0, eps), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_x_t_comes_out(dtype):
    x0, eps = Denoiser(Recorder(), SCHEDULE)(images(dtype=dtype), 10)
    assert (x0.dtype, eps.dtype) == (dtype, dtype)


def test_autocast_computes_in_bfloat16_and_returns_float32():
    inside = []

    class Conv(nn.Conv2d):
        def forward(self, x: Tensor, t_index: Tensor, label: Tensor | None) -> Tensor:
            out = super().forward(x)
            inside.append(out.dtype)
            return out

    torch.manual_seed(0)
    net = Conv(2, 2, 1)
    rough = Denoiser(net, SCHEDULE, autocast=torch.bfloat16).output(images(), 10)
    fine = Denoiser(net, SCHEDULE).output(images(), 10)
    assert inside == [torch.bfloat16, torch.float32]
    assert rough.dtype == fine.dtype == torch.float32
    torch.testing.assert_close(rough, fine, rtol=0.05, atol=0.05)
    assert not torch.equal(rough, fine)
