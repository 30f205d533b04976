"""Layers computed another way on CPUs give what PyTorch's own give."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from ddpmctl.core import fast
from ddpmctl.core.fast import Dropout, GroupNorm, activated, attend


def image(b: int, c: int, side: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Channels last, of a mean that is not 0 and differs by channel."""
    torch.manual_seed(0)
    x = torch.randn(b, c, side, side) * 2 + torch.randn(1, c, 1, 1) * 2 + 1
    return x.to(dtype).to(memory_format=torch.channels_last)


def norms(channels: int, groups: int) -> tuple[GroupNorm, torch.nn.GroupNorm]:
    """Ours and PyTorch's in float64, with the same weights."""
    ours, exact = GroupNorm(groups, channels), torch.nn.GroupNorm(groups, channels).double()
    with torch.no_grad():
        for norm in (ours, exact):
            norm.weight.copy_(torch.linspace(0.5, 2, channels))
            norm.bias.copy_(torch.linspace(-1, 1, channels))
    return ours, exact


@pytest.mark.parametrize("activation", [None, F.silu, F.mish])
@pytest.mark.parametrize(("channels", "side", "groups"), [(48, 16, 8), (16, 32, 8), (256, 8, 32), (6, 40, 3)])
def test_group_norm_in_bfloat16_is_that_of_float64_rounded(
    channels: int, side: int, groups: int, activation: Callable[[torch.Tensor], torch.Tensor] | None
) -> None:
    batch = -(-fast.SMALL_IMAGES // (channels * side**2))
    x = image(batch, channels, side).requires_grad_()
    ours, exact = norms(channels, groups)
    grad = torch.randn_like(x)
    if activation:
        y, right = activated(ours, activation, x), activation(exact(x.double()))
    else:
        y, right = ours(x), exact(x.double())
    assert (type(y.grad_fn).__name__ == "_GroupNormBackward") == (activation is not F.mish)
    assert y.dtype == torch.bfloat16 and y.stride() == x.stride()
    assert (y - right).abs().max() <= right.abs().max() * 2**-8 * (1 if activation is None else 2)  # rounded twice
    found = torch.autograd.grad(y, (x, ours.weight, ours.bias), grad)
    wanted = torch.autograd.grad(right, (x, exact.weight, exact.bias), grad.double())
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape
        assert (got - want).norm() <= 0.005 * want.norm()


def test_group_norm_is_exact_in_what_it_keeps_of_a_large_mean() -> None:
    """A mean of 20 standard deviations costs no more than the rounding of the input."""
    torch.manual_seed(0)
    x = (torch.randn(16, 64, 16, 16) + 20).bfloat16().to(memory_format=torch.channels_last)
    ours, exact = norms(64, 8)
    assert (ours(x) - exact(x.double())).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_norm_in_full_precision_is_pytorchs(dtype: torch.dtype) -> None:
    x, (ours, _) = image(16, 48, 16, dtype), norms(48, 8)
    ours.to(dtype)
    assert torch.equal(ours(x), F.group_norm(x, 8, ours.weight, ours.bias, ours.eps))


def test_a_second_derivative_is_refused_not_wrong() -> None:
    x, (ours, _) = image(16, 48, 16).requires_grad_(), norms(48, 8)
    (grad,) = torch.autograd.grad(ours(x).float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.float().square().sum().backward()


def test_attention_in_float16_does_not_overflow() -> None:
    q, v = torch.full((1, 16, 64), 100.0).half(), torch.randn(1, 16, 64).half()
    assert torch.allclose(attend(q, q, v).float(), v.float().mean(1, keepdim=True), atol=2e-3)


def test_attention_with_sharp_weights_in_bfloat16() -> None:
    """Products of up to 40 are rounded to eight bits."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 256, 64).bfloat16() * scale for scale in (3, 3, 1))
    weights = (q.double() @ k.double().transpose(1, 2) / 8).softmax(-1)
    right = weights @ v.double()
    assert (attend(q, k, v) - right).norm() < 0.02 * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_mean_and_the_share(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, dropout = torch.ones(8, 33, 31, 31, dtype=dtype), Dropout(0.3)
    y = dropout(x.to(memory_format=torch.channels_last))
    n = x.numel()
    assert abs((y == 0).sum() / n - 0.3) < 5 * (0.21 / n) ** 0.5
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).to(dtype).item()} or dtype == torch.float32
    assert torch.allclose(y[y != 0].float(), torch.tensor(1 / 0.7), rtol=2e-5 if dtype == torch.float32 else 4e-3)
    # Neighbours are independent: the share of pairs of which both are gone is p^2.
    gone = (y == 0).flatten()
    assert abs((gone[1:] & gone[:-1]).double().mean() - 0.09) < 5 * (0.09 * 0.91 * 2 / n) ** 0.5


def test_dropout_sends_gradients_where_it_lets_numbers_through() -> None:
    x = torch.randn(4, 5, 7, requires_grad=True)
    y = Dropout(0.5)(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (y != 0) * 2.0)


def test_dropout_follows_from_the_seed_and_rests_where_it_should() -> None:
    x, dropout = torch.randn(2, 3, 5, 5), Dropout(0.4)
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append(dropout(x))
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], dropout(x))
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros_like(x))


@pytest.mark.parametrize("pixels", [16, fast.FEW_PIXELS, fast.FEW_PIXELS + 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_is_its_formula(pixels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, pixels, 72, dtype=dtype).chunk(3, -1)
    weights = (q.double() @ k.double().transpose(1, 2) / 24**0.5).softmax(-1)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (attend(q, k, v) - weights @ v.double()).abs().max() < tolerance
