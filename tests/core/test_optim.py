from __future__ import annotations

import math

import pytest
import torch

from ddpmctl.core.optim import LR_SCHEDULES, OPTIMIZERS, make_optimizer, update

STEPS = 1000


@pytest.mark.parametrize(
    ("name", "warmup", "points"),
    [
        ("constant", 0, {1: 1, 500: 1, 1000: 1}),
        ("constant", 100, {1: 0.01, 50: 0.5, 100: 1, 101: 1, 1000: 1}),
        ("linear", 0, {1: 1, 501: 0.5, 1000: 0.001}),
        ("linear", 100, {1: 0.01, 50: 0.5, 101: 1, 551: 0.5, 1000: 1 / 900}),
        ("cosine", 0, {1: 1, 251: (1 + math.sqrt(0.5)) / 2, 501: 0.5, 1000: 2.4674e-6}),
        ("cosine", 100, {1: 0.01, 50: 0.5, 101: 1, 551: 0.5, 1000: 3.0462e-6}),
        ("cosine_flat", 0, {25: 0.325, 50: 1, 500: 0.505, 950: 0.01, 1000: 0.01}),
        ("cosine_flat", 100, {50: 0.325, 100: 1, 525: 0.505, 950: 0.01, 1000: 0.01}),
        ("geometric", 0, {1: 1, 100: 1, 101: 0.01 ** (1 / 9), 501: 0.01 ** (5 / 9), 901: 0.01, 1000: 0.01}),
    ],
)  # fmt: skip
def test_factor_at_known_steps(name, warmup, points):
    for step, factor in points.items():
        assert LR_SCHEDULES[name](step, STEPS, warmup) == pytest.approx(factor, rel=1e-3), step


@pytest.mark.parametrize("name", LR_SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 0), (7, 3), (100, 10), (100, 100), (50, 500), (999, 0)])
def test_factor_stays_within_zero_and_one(name, steps, warmup):
    factors = [LR_SCHEDULES[name](step, steps, warmup) for step in range(1, steps + 1)]
    assert min(factors) > 0
    assert max(factors) <= 1


@pytest.mark.parametrize("name", LR_SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 60])
def test_factor_rises_while_warming_up_then_only_falls(name, warmup):
    factors = [LR_SCHEDULES[name](step, STEPS, warmup) for step in range(1, STEPS + 1)]
    top = factors.index(max(factors))
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[top] == pytest.approx(1, abs=0.002)


@pytest.mark.parametrize("name", ["cosine_flat", "geometric"])
@pytest.mark.parametrize("steps", [10, 100, 12345])
def test_schedules_of_the_predecessor_end_at_a_hundredth(name, steps):
    assert LR_SCHEDULES[name](steps, steps, 0) == pytest.approx(0.01)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_gets_every_setting(name):
    net = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(net, name, lr=0.25, betas=(0.8, 0.95), decay=0.5)
    assert type(optimizer) is OPTIMIZERS[name]
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.25, (0.8, 0.95), 0.5)
    assert group["params"] == list(net.parameters())


def test_decay_shrinks_weights_in_adamw_and_joins_the_gradient_in_adam():
    """Without a gradient AdamW's first step is w (1 - lr * decay), Adam's is a full step of size lr."""
    ends = {}
    for name in ("adam", "adamw"):
        net = torch.nn.Linear(1, 1, bias=False)
        net.weight.data.fill_(1.0)
        net.weight.grad = torch.zeros(1, 1)
        make_optimizer(net, name, lr=0.1, betas=(0.9, 0.999), decay=0.5).step()
        ends[name] = net.weight.item()
    assert ends == pytest.approx({"adam": 0.9, "adamw": 0.95})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_finds_a_minimum(name):
    net = torch.nn.Linear(1, 1)
    optimizer = make_optimizer(net, name, lr=0.05, betas=(0.9, 0.999), decay=0.0)
    x = torch.linspace(-1, 1, 9)[:, None]
    for _ in range(300):
        optimizer.zero_grad()
        loss = (net(x) - (2 * x - 1)).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-4


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("divisor", [None, 4.0])
def test_a_step_divides_the_gradients_or_is_none_at_all(fused, divisor):
    ours, plain = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in "ab")
    optimizer = torch.optim.Adam([ours], lr=0.1, fused=fused)
    usual = torch.optim.Adam([plain], lr=0.1, fused=fused)
    for number, bad in enumerate([False, True, False, True, False]):
        grad = torch.linspace(-3, 5, 7) * 2.0**number  # so that dividing by 4 is exact
        ours.grad = torch.full_like(grad, torch.nan) if bad else grad.clone()
        update(optimizer, torch.tensor(bad), None if divisor is None else torch.tensor(divisor))
        if not bad:
            plain.grad = grad / (divisor or 1.0)
            usual.step()
            assert torch.equal(ours.grad, plain.grad)
        assert torch.equal(ours, plain)
    assert optimizer.state[ours]["step"] == usual.state[plain]["step"] == 3
    assert all(torch.equal(optimizer.state[ours][name], usual.state[plain][name]) for name in ("exp_avg", "exp_avg_sq"))
