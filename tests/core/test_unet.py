from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ddpmctl.core.unet import ACTIVATIONS, NORMS, Attention, TimeEmbedding, UNet

SMALL = {"base_channels": 8, "channel_mults": (1, 2), "num_res_blocks": 1, "norm_groups": 4, "time_width": 16}


def unet(channels: int = 3, *, zero_init: bool = False, seed: int = 0, **options: object) -> UNet:
    """A small network in eval mode; unless asked, its zero-initialised convolutions are made random."""
    torch.manual_seed(seed)
    net = UNet(channels, **{**SMALL, **options})
    if not zero_init:
        for p in net.parameters():
            if p.ndim > 1 and not p.any():
                nn.init.normal_(p, std=0.2)
    return net.eval()


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def steps(*indices: int) -> Tensor:
    return torch.tensor(indices)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_every_norm_and_activation(norm, activation):
    out = unet(norm=norm, activation=activation)(image(2, 3, 8, 8), steps(0, 999))
    assert out.shape == (2, 3, 8, 8)
    assert bool(out.isfinite().all())
    assert out.std() > 0


@torch.no_grad()
def test_activations_and_norms_give_different_networks():
    outs = [unet(activation=name)(image(1, 3, 8, 8), steps(3)) for name in ACTIVATIONS]
    outs += [unet(norm=name)(image(1, 3, 8, 8), steps(3)) for name in ("batch", "instance", "none")]
    for i, one in enumerate(outs):
        assert all(not torch.allclose(one, other) for other in outs[:i])


@pytest.mark.parametrize(
    ("height", "width", "levels", "padding"),
    [(8, 8, 2, 0), (8, 24, 2, 0), (48, 16, 4, 0), (7, 5, 1, 0), (28, 28, 4, 2), (8, 10, 2, 1),
     (6, 6, 2, 5), (30, 14, 3, 1)],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 4])
@torch.no_grad()
def test_output_has_the_shape_of_the_input(height, width, levels, padding, channels):
    net = unet(channels, channel_mults=(1,) * levels, padding=padding)
    x = image(2, channels, height, width)
    assert net(x, steps(1, 2)).shape == x.shape


@torch.no_grad()
def test_padding_is_zeros_around_the_input_and_cut_off_again():
    plain, padded = unet(padding=0), unet(padding=3)
    x = image(1, 3, 10, 14)
    framed = torch.zeros(1, 3, 16, 20)
    framed[..., 3:13, 3:17] = x
    torch.testing.assert_close(padded(x, steps(5)), plain(framed, steps(5))[..., 3:13, 3:17])


@pytest.mark.parametrize(
    ("size", "levels", "padding"),
    [((9, 8), 2, 0), ((8, 9), 2, 0), ((28, 28), 4, 0), ((28, 28), 4, 1), ((4, 4), 4, 0)],
)
def test_size_that_does_not_halve_evenly(size, levels, padding):
    with pytest.raises(ValueError, match=f"multiples of {2 ** (levels - 1)}"):
        unet(channel_mults=(1,) * levels, padding=padding)(image(1, 3, *size), steps(0))


@torch.no_grad()
def test_each_level_has_its_number_of_blocks():
    """A list of equal numbers is that number; a level with none only changes size going down."""
    one, same = unet(channel_mults=(1, 2, 2), num_res_blocks=2), unet(channel_mults=(1, 2, 2), num_res_blocks=[2, 2, 2])
    x = image(2, 3, 8, 8)
    assert torch.equal(one(x, steps(1, 2)), same(x, steps(1, 2)))
    bare = unet(channel_mults=(1, 2, 2), num_res_blocks=[0, 1, 3])
    kinds = [type(module).__name__ for module in bare.down]
    assert kinds == ["Downsample", "ResidualBlock", "Downsample", *["ResidualBlock"] * 3]
    assert [type(module).__name__ for module in bare.up].count("ResidualBlock") == 1 + 2 + 4
    assert bare(x, steps(1, 2)).shape == x.shape


@torch.no_grad()
def test_patches_are_channels_of_a_smaller_image():
    """As a network without patches sees them when each becomes a pixel of p x p times the channels, by hand."""
    net, inner = unet(3, patch=2), unet(12)
    inner.load_state_dict(net.state_dict())
    x = image(2, 3, 8, 12)
    cells = torch.stack([x[:, c, i::2, j::2] for c in range(3) for i in range(2) for j in range(2)], dim=1)
    out, small = net(x, steps(1, 2)), inner(cells, steps(1, 2))
    assert out.shape == x.shape
    for c in range(3):
        for i in range(2):
            for j in range(2):
                torch.testing.assert_close(out[:, c, i::2, j::2], small[:, 4 * c + 2 * i + j])


def test_size_that_does_not_go_into_patches():
    with pytest.raises(ValueError, match="multiples of 6"):
        unet(channel_mults=(1, 1), patch=3)(image(1, 3, 8, 12), steps(0))


@torch.no_grad()
def test_class_changes_the_output():
    net, x = unet(num_classes=3), image(3, 3, 8, 8)[:1].expand(3, -1, -1, -1)
    out = net(x, steps(4, 4, 4), torch.tensor([0, 1, 0]))
    torch.testing.assert_close(out[0], out[2])
    assert not torch.allclose(out[0], out[1])


def test_missing_class():
    with pytest.raises(ValueError, match="label needed"):
        unet(num_classes=3)(image(1, 3, 8, 8), steps(0))


def test_superfluous_class():
    with pytest.raises(ValueError, match="without classes"):
        unet()(image(1, 3, 8, 8), steps(0), torch.tensor([0]))


@pytest.mark.parametrize(("width", "matters"), [(16, True), (None, False)])
@torch.no_grad()
def test_step_matters_only_with_a_time_input(width, matters):
    net, x = unet(time_width=width), image(1, 3, 8, 8)
    assert torch.equal(net(x, steps(0)), net(x, steps(900))) != matters
    assert any("time" in name for name in net.state_dict()) == matters


@torch.no_grad()
def test_time_scale_multiplies_the_step():
    x = image(1, 3, 8, 8)
    slow, fast = unet(time_scale=1.0), unet(time_scale=4.0)
    torch.testing.assert_close(fast(x, steps(5)), slow(x, steps(20)))
    assert not torch.allclose(fast(x, steps(5)), slow(x, steps(5)))


@pytest.mark.parametrize("t", [0, 1, 999])
def test_time_embedding_is_sines_then_cosines(t):
    embedding = TimeEmbedding(8, 8, 2.0, lambda x: x)
    for linear in (embedding.linear_1, embedding.linear_2):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    angles = [2.0 * t * math.exp(-i * math.log(10_000) / 4) for i in range(4)]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    assert embedding(steps(t))[0].tolist() == pytest.approx(expected, abs=2e-4)


@torch.no_grad()
def test_time_embedding_tells_neighbours_apart_under_autocast():
    embedding = TimeEmbedding(32, 64, 1.0, ACTIVATIONS["silu"])
    with torch.autocast("cpu", torch.bfloat16):
        first, second = embedding(steps(998, 999))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("mults", [(1,), (2, 1), (3, 1, 2), (2, 2, 2, 4)])
def test_network_starts_by_saying_zero(mults):
    net = unet(zero_init=True, channel_mults=mults, attention_levels=(0,), num_classes=2).train()
    out = net(image(2, 3, 16, 16), steps(0, 10), torch.tensor([0, 1]))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("mults", [(2, 1), (3, 1, 2), (1, 2, 4, 8)])
@torch.no_grad()
def test_multipliers_need_not_start_with_one(mults):
    net = unet(channel_mults=mults, attention_levels=())
    assert net(image(1, 3, 16, 8), steps(7)).shape == (1, 3, 16, 8)
    assert net.norm_out.num_channels == net.conv_out.in_channels == 8 * mults[0]


@pytest.mark.parametrize(
    ("levels", "blocks"),
    [
        ((), set()),
        ((0,), {"down.0", "up.3", "up.4"}),
        ((1,), {"down.2", "up.0", "up.1"}),
        ((0, 1), {"down.0", "down.2", "up.0", "up.1", "up.3", "up.4"}),
    ],
)
def test_attention_stands_on_the_chosen_levels_and_in_the_middle(levels, blocks):
    names = unet(attention_levels=levels).state_dict()
    assert {name.partition(".attention.")[0] for name in names if ".attention." in name} == blocks | {"middle.0"}


@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_images_of_a_batch_do_not_mix_in_eval_mode(norm):
    net = unet(norm=norm).double()
    x = image(3, 3, 8, 8).double()
    together = net(x, steps(1, 50, 999))
    for i, t in enumerate((1, 50, 999)):
        torch.testing.assert_close(together[i : i + 1], net(x[i : i + 1], steps(t)), rtol=0, atol=1e-12)


@torch.no_grad()
def test_dropout_acts_in_train_mode_only():
    net, x = unet(dropout=0.5), image(1, 3, 8, 8)
    assert torch.equal(net(x, steps(3)), net(x, steps(3)))
    net.train()
    assert not torch.equal(net(x, steps(3)), net(x, steps(3)))
    still = unet(dropout=0.0).train()
    assert torch.equal(still(x, steps(3)), still(x, steps(3)))


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_reaches_every_parameter(norm):
    net = unet(channel_mults=(2, 1), norm=norm, attention_levels=(0, 1), num_classes=2).train()
    # Instance norm takes away the mean of a channel, and with it every bias that stands before it.
    net(image(2, 3, 8, 8), steps(3, 700), torch.tensor([0, 1])).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    lacking = [name for name, p in net.named_parameters() if not bool((p.grad.abs() > 1e-12).any())]
    assert lacking == []


def test_names_of_weights_are_stable():
    """Checkpoints are read by these names: changing one means a new checkpoint format."""
    net = unet(num_res_blocks=1, channel_mults=(1, 2), attention_levels=(1,), num_classes=5)
    modules = {name.rpartition(".")[0] for name in net.state_dict()}
    block = {"norm_1", "conv_1", "time_bias", "class_bias", "norm_2", "conv_2"}
    attention = {"attention.norm", "attention.qkv", "attention.out"}
    expected = {"time.linear_1", "time.linear_2", "conv_in", "norm_out", "conv_out", "down.1", "up.2"}
    for place, extra in {
        "down.0": set(),
        "down.2": {"skip"} | attention,
        "middle.0": attention,
        "middle.1": set(),
        "up.0": {"skip"} | attention,
        "up.1": {"skip"} | attention,
        "up.3": {"skip"},
        "up.4": {"skip"},
    }.items():
        expected |= {f"{place}.{part}" for part in block | extra}
    assert modules == expected


def test_weights_load_strictly_into_a_network_of_the_same_shape():
    x = image(1, 3, 8, 8)
    first, second = unet(seed=0), unet(seed=1)
    assert not torch.equal(first(x, steps(1)), second(x, steps(1)))
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first(x, steps(1)), second(x, steps(1)))
    with pytest.raises(RuntimeError):
        unet(attention_levels=(0,)).load_state_dict(first.state_dict(), strict=True)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 3])
def test_normed_queries_and_keys_have_no_length(heads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attention = Attention(12, lambda channels: nn.GroupNorm(2, channels), 12 // heads, qk_norm=True).double()
    nn.init.normal_(attention.out.weight)
    x = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        once = attention(x)
    q, k, v = attention.qkv(attention.norm(x)).reshape(2, 3, heads, 12 // heads, 15).unbind(1)
    q, k = (part / part.square().mean(2, keepdim=True).sqrt() for part in (q, k))
    scores = torch.einsum("bhci,bhcj->bhij", q, k) / (12 / heads) ** 0.5
    assert scores.abs().max() <= (12 / heads) ** 0.5 + 1e-9
    mixed = torch.einsum("bhij,bhcj->bhci", scores.softmax(-1), v).reshape(2, 12, 3, 5)
    precise = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(once.double(), x + attention.out(mixed), **precise)
    attention.qkv.weight[:24] *= 1000
    attention.qkv.bias[:24] *= 1000
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        torch.testing.assert_close(attention(x).double(), once.double(), **precise)


@torch.no_grad()
def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    attention = Attention(6, lambda channels: nn.GroupNorm(2, channels)).double()
    nn.init.normal_(attention.out.weight)
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    weights = attention.qkv.weight[:, :, 0, 0]
    pixels = attention.norm(x).reshape(2, 6, 15)
    q, k, v = (torch.einsum("oc,bcn->bon", weights, pixels) + attention.qkv.bias[:, None]).split(6, dim=1)
    scores = torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(6)
    mixed = torch.einsum("bnm,bcm->bcn", scores.exp() / scores.exp().sum(-1, keepdim=True), v)
    expected = torch.einsum("oc,bcn->bon", attention.out.weight[:, :, 0, 0], mixed) + attention.out.bias[:, None]
    torch.testing.assert_close(attention(x), x + expected.reshape(x.shape), rtol=0, atol=1e-12)


@torch.no_grad()
def test_every_pixel_sees_every_other_through_the_middle():
    net, x = unet().double(), image(1, 3, 16, 16).double()
    poked = x.clone()
    poked[0, 0, 0, 0] += 1.0
    assert bool((net(x, steps(1)) != net(poked, steps(1))).all())
