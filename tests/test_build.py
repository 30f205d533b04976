"""Networks as they are placed and rounded."""

from __future__ import annotations

import pytest
import torch

from ddpmctl import build
from ddpmctl.build import build_denoiser, build_net, place, round_once
from ddpmctl.config import RunConfig

CONFIG = RunConfig.model_validate({"model": {"base_channels": 8, "channel_mults": [1, 2], "norm_groups": 4}})


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_weights_rounded_once_give_the_numbers_of_weights_rounded_at_every_call(autocast):
    torch.manual_seed(0)
    net = place(build_net(CONFIG, 3, 2), torch.device("cpu")).eval().requires_grad_(False)
    denoiser = build_denoiser(CONFIG, net, autocast)
    x_t, t, label = torch.randn(3, 3, 16, 16), torch.tensor([1, 500, 1000]), torch.tensor([0, 1, 1])
    before, size = denoiser.output(x_t, t, label), sum(p.numel() * p.element_size() for p in net.parameters())
    round_once(net, autocast)
    assert torch.equal(denoiser.output(x_t, t, label), before)
    assert sum(p.numel() * p.element_size() for p in net.parameters()) < 0.55 * size
    assert {p.dtype for name, p in net.named_parameters() if "norm" in name} == {torch.float32}


def test_in_float32_nothing_is_rounded():
    net = build_net(CONFIG, 3, 0)
    before = {name: p.clone() for name, p in net.named_parameters()}
    assert round_once(net, None) is net
    assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in net.named_parameters())


def test_how_much_slower_a_precision_is(monkeypatch):
    cpu = torch.device("cpu")
    assert build.times_slower(None, cpu) == build.times_slower(torch.bfloat16, torch.device("meta")) == 1
    assert build.times_slower(torch.bfloat16, cpu) > 0
    monkeypatch.setattr(build, "_product_seconds", lambda dtype, *size: {torch.float32: 2.0, torch.float16: 5.0}[dtype])
    assert build.times_slower(torch.float16, cpu) == 2.5
