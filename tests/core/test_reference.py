"""Numbers of the system that ddpmctl replaces: its checkpoint, read here, must give what it gave there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.samplers import ddpm
from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.core.unet import UNet

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
RENAMED = (
    ("time_mlp.1.", "time.linear_1."),
    ("time_mlp.3.", "time.linear_2."),
    ("init_conv.", "conv_in."),
    ("out_norm.", "norm_out."),
    ("out_conv.", "conv_out."),
    ("downs.", "down."),
    ("ups.", "up."),
    ("mid.", "middle."),
    (".downsample.", "."),
    (".upsample.1.", "."),
    (".conv_2.1.", ".conv_2."),
    (".residual_connection.", ".skip."),
    (".to_qkv.", ".qkv."),
    (".to_out.", ".out."),
)


def predecessor_network(state: dict[str, Tensor], prefix: str) -> UNet:
    """The 16x16 reference UNet with the weights under ``prefix`` of a predecessor's state_dict."""
    net = UNet(
        3, base_channels=32, channel_mults=(1, 1), num_res_blocks=1, attention_levels=(1,), time_width=64
    )  # fmt: skip
    weights = {}
    for name, value in state.items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            for theirs, ours in RENAMED:
                at_start = not theirs.startswith(".")
                name = ours + name.removeprefix(theirs) if at_start and name.startswith(theirs) else name
                name = name if at_start else name.replace(theirs, ours)
            weights[name] = value
    net.load_state_dict(weights, strict=True)
    return net.eval()


@pytest.fixture(scope="module")
def numbers() -> dict[str, np.ndarray]:
    with np.load(REFERENCE / "seed-linear.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return torch.load(REFERENCE / "seed-linear.pth", weights_only=True)


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule.named("linear", 1000)


def tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values)


def assert_equal(ours: Tensor, theirs: np.ndarray, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, tensor(theirs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("prefix", "key"), [("model.", "eps_model"), ("ema_model.", "eps_ema")])
def test_network_output(numbers, state, prefix, key):
    net = predecessor_network(state, prefix)
    with torch.no_grad():
        assert_equal(net(tensor(numbers["x"]), tensor(numbers["t"])), numbers[key])


def test_raw_and_ema_weights_differ(numbers):
    assert np.abs(numbers["eps_model"] - numbers["eps_ema"]).max() > 1e-2


def test_denoiser_counts_steps_from_one(numbers, state, schedule):
    denoiser = Denoiser(predecessor_network(state, "ema_model."), schedule)
    with torch.no_grad():
        assert_equal(denoiser.output(tensor(numbers["x"]), tensor(numbers["t"]) + 1), numbers["eps_ema"])


@pytest.mark.parametrize(
    ("ours", "theirs"), [("betas", "betas"), ("alphas", "alphas"), ("alpha_bar", "alphas_cumprod")]
)
def test_schedule_tables(numbers, schedule, ours, theirs):
    assert_equal(getattr(schedule, ours)[1:], numbers[theirs], 1e-14)


def test_buffers_of_the_checkpoint_follow_from_our_tables(state, schedule):
    tables = {
        "betas": schedule.betas,
        "alphas": schedule.alphas,
        "alphas_cumprod": schedule.alpha_bar,
        "sqrt_alphas_cumprod": schedule.alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - schedule.alpha_bar).sqrt(),
        "reciprocal_sqrt_alphas": 1 / schedule.alphas.sqrt(),
        "sigma": schedule.betas.sqrt(),
    }
    for name, ours in tables.items():
        torch.testing.assert_close(ours[1:].float(), state[name], rtol=1e-5, atol=1e-6, msg=name)


def test_forward_process(numbers, schedule):
    x0, t, eps = (tensor(numbers[key]) for key in ("x0", "t", "noise"))
    assert_equal(schedule.q_sample(x0, t + 1, eps), numbers["x_t"])


@pytest.mark.parametrize("step", [0, 1, 50, 999])
@pytest.mark.parametrize("noisy", [False, True], ids=["mean", "next"])
def test_reverse_step(numbers, state, schedule, step, noisy):
    denoiser = Denoiser(predecessor_network(state, "ema_model."), schedule, threshold="none")
    z = tensor(numbers["noise"])
    steps = ddpm(
        denoiser, tensor(numbers["x"]), [step + 1, step], noise=lambda: z if noisy else 0 * z, variance="beta"
    )  # fmt: skip
    assert_equal(next(steps).x_t, numbers[f"{'next' if noisy else 'mean'}_{step}"])


def test_parameter_count_of_the_default_network():
    assert sum(p.numel() for p in UNet(3).parameters()) == 35_746_307
