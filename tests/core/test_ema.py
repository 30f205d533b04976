from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ddpmctl.core.ema import EMA, WARMUPS


class Scalar(nn.Module):
    """One weight and one buffer."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=torch.float64))
        self.register_buffer("count", torch.tensor(value))

    def set(self, value: float) -> Scalar:
        self.weight.data.fill_(value)
        self.count.fill_(value)
        return self


def follow(ema: EMA, values: list[float]) -> list[float]:
    net, found = Scalar(), []
    for value in values:
        ema.update(net.set(value))
        found.append(ema.net.weight.item())
    return found


VALUES = [float((7 * i) % 11) for i in range(1, 41)]


@pytest.mark.parametrize("warmup", WARMUPS)
def test_constant_weights_stay(warmup):
    assert follow(EMA(Scalar(3.0), 0.99, warmup=warmup, start=2), [3.0] * 20) == pytest.approx([3.0] * 20, rel=1e-14)


def test_average_without_warmup():
    expected, average = [], 5.0
    for value in VALUES:
        average = 0.9 * average + 0.1 * value
        expected.append(average)
    assert follow(EMA(Scalar(5.0), 0.9, warmup="none"), VALUES) == pytest.approx(expected, rel=1e-12)


def test_copy_until_start_then_average():
    expected, average = [], 5.0
    for step, value in enumerate(VALUES, start=1):
        average = value if step <= 10 else 0.9 * average + 0.1 * value
        expected.append(average)
    found = follow(EMA(Scalar(5.0), 0.9, warmup="copy", start=10), VALUES)
    assert found[:10] == VALUES[:10]
    assert found == pytest.approx(expected, rel=1e-12)


def test_gradual_warmup():
    expected, average = [], 5.0
    for step, value in enumerate(VALUES, start=1):
        decay = min(0.7, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
        expected.append(average)
    assert follow(EMA(Scalar(5.0), 0.7, warmup="gradual"), VALUES) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps", [100, 1000, 10_000])
def test_gradual_average_forgets_the_start_of_a_run_of_any_length(steps):
    ema = EMA(Scalar(1.0), 0.9999)
    assert follow(ema, [0.0] * steps)[-1] < 1e-4


@pytest.mark.parametrize(
    ("warmup", "step", "decay"),
    [
        ("gradual", 1, 2 / 11),
        ("gradual", 90, 0.91),
        ("gradual", 10**6, 0.999),
        ("copy", 50, 0.0),
        ("copy", 51, 0.999),
        ("none", 1, 0.999),
    ],
)
def test_decay_of_a_step(warmup, step, decay):
    ema = EMA(Scalar(), 0.999, warmup=warmup, start=50)
    ema.steps = step
    assert ema.decay_now() == pytest.approx(decay)


def test_update_on_every_third_step_only():
    found = follow(EMA(Scalar(5.0), 0.5, warmup="none", every=3), [1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 8.0])
    assert found == [5.0, 5.0, 4.0, 4.0, 4.0, 5.5, 5.5]


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("every", [1, 3])
def test_stored_and_loaded_average_goes_on_alike(warmup, every):
    options = {"warmup": warmup, "start": 15, "every": every}
    whole = follow(EMA(Scalar(5.0), 0.9, **options), VALUES)
    first, second = EMA(Scalar(5.0), 0.9, **options), EMA(Scalar(-1.0), 0.9, **options)
    start = follow(first, VALUES[:13])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert start + follow(second, VALUES[13:]) == whole


def test_weights_of_another_shape_are_refused():
    with pytest.raises(RuntimeError, match="weight"):
        EMA(nn.Linear(2, 2)).load_state_dict(EMA(nn.Linear(3, 2)).state_dict())


def test_batch_norm_statistics_are_copied():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    ema = EMA(net, 0.999, warmup="none")
    net(torch.randn(8, 1, 4, 4))
    assert not torch.equal(ema.net[1].running_mean, net[1].running_mean)
    ema.update(net)
    for kept, new in zip(ema.net.buffers(), net.buffers(), strict=True):
        assert torch.equal(kept, new)
        assert kept.data_ptr() != new.data_ptr()


def test_average_is_independent_of_the_network():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    ema = EMA(net)
    before = [p.clone() for p in ema.net.parameters()]
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(9.0)
    assert all(torch.equal(a, b) for a, b in zip(before, ema.net.parameters(), strict=True))
    ema.update(net)
    assert all(bool((p == 9).all()) for p in net.parameters())


def test_average_is_in_eval_mode_and_takes_no_gradient():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    ema = EMA(net)
    ema.update(net)
    assert not any(module.training for module in ema.net.modules())
    assert not any(p.requires_grad for p in ema.net.parameters())
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
