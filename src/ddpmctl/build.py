"""From configuration to core objects: the only place where the two meet."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

from ddpmctl.config import RunConfig
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.ema import EMA
from ddpmctl.core.optim import make_optimizer
from ddpmctl.core.power import LENGTHS, PowerEMA
from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.core.unet import UNet
from ddpmctl.errors import DeviceError


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first of cuda, mps, cpu that is there; raises :class:`DeviceError` for one that is not."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    device = torch.device(name)
    found = ", ".join(["cpu", *(f"cuda:{i}" for i in range(cuda)), *(["mps"] if mps else [])])
    if (device.type == "cuda" and (device.index or 0) >= cuda) or (device.type == "mps" and not mps):
        raise DeviceError(f"device {name}: not on this machine", f"found here: {found}; use --device auto")
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for float32. ``auto``: bfloat16 where the hardware is faster in it."""
    if name == "auto":
        return torch.bfloat16 if _bf16_pays(device) else None
    if name == "fp16" and device.type == "mps":
        raise DeviceError("precision fp16: loss scaling does not work on mps", "use --precision fp32")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


@cache
def _bf16_pays(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    # Older releases cannot tell: they get float32, which is right everywhere.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("amx_bf16"):
        return True
    # Having AVX-512 BF16 is not enough: processors differ from half to twice the speed of float32. The gap is
    # wide and the best of several trials is taken, so that the answer does not hang on what else is running.
    return bool(capabilities.get("avx512_bf16")) and _product_seconds(torch.float32) > 1.3 * _product_seconds(
        torch.bfloat16
    )


def times_slower(autocast: torch.dtype | None, device: torch.device) -> float:
    """How many times as long as in float32 a matrix product takes in ``autocast`` on a CPU; 1 on other devices."""
    if autocast is None or device.type != "cpu":
        return 1.0
    return _product_seconds(autocast, 256, 3) / _product_seconds(torch.float32, 256, 3)


def _product_seconds(dtype: torch.dtype, size: int = 512, trials: int = 20) -> float:
    """Shortest time of a matrix product, in seconds."""
    matrix = torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(trials):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def precision_name(dtype: torch.dtype | None) -> str:
    """``fp32``, ``bf16`` or ``fp16``."""
    return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def build_net(config: RunConfig, channels: int, num_classes: int) -> UNet:
    """The UNet for images of ``channels``; ``num_classes`` 0: unconditional. Weights follow from the global seed.

    It has as many channels again for the variance, where that is learned.
    Where labels are hidden in training, one more class, the last, stands for none.
    """
    model = config.model
    widths = {"auto": 4 * model.base_channels, "none": None}
    width = model.time_embedding if isinstance(model.time_embedding, int) else widths[model.time_embedding]
    return UNet(
        channels,
        base_channels=model.base_channels,
        channel_mults=model.channel_mults,
        num_res_blocks=model.num_res_blocks,
        attention_levels=model.attention_levels,
        dropout=model.dropout,
        norm=model.norm,
        norm_groups=model.norm_groups,
        norm_eps=model.norm_eps,
        activation=model.activation,
        time_width=width,
        time_scale=model.time_scale,
        time_order=model.time_order,
        time_shift=model.time_shift,
        head_channels=None if model.head_channels == "all" else model.head_channels,
        qk_norm=model.qk_norm,
        middle_attention=model.middle_attention,
        down_padding=model.down_padding,
        num_classes=num_classes + bool(model.label_dropout) if num_classes else None,
        padding=model.padding,
        patch=model.patch,
        out_channels=2 * channels if config.diffusion.learn_variance else channels,
    )


def place(net: nn.Module, device: torch.device) -> nn.Module:
    """``net`` on ``device``, in the memory layout in which its convolutions run fastest."""
    if device.type == "mps":  # channels-last convolutions have given wrong gradients there
        return net.to(device)
    # A tenth faster on a CPU with AVX-512 (small networks, float32); NVIDIA's tensor cores want it too.
    return net.to(device).to(memory_format=torch.channels_last)


def round_once(net: nn.Module, autocast: torch.dtype | None) -> nn.Module:
    """``net`` with the weights that ``autocast`` rounds at every call rounded now: for sampling only, and the same numbers.

    A call takes 2 % less time (CIFAR-10 network, 64 images, bf16 on a CPU), and these weights half the memory.
    """
    for module in net.modules() if autocast else ():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(autocast)
    return net


CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""The modes of ``train.compile`` that run the network as CUDA graphs, where it is on a GPU."""


@contextmanager
def compiling(net: nn.Module, mode: str) -> Iterator[None]:
    """Within it ``net`` runs as torch.compile makes it, by a ``mode`` of its own or ``none``: it compiles at the first call.

    Raises :class:`DeviceError` where PyTorch's compiler does not get along, most often for want of a C++ compiler.
    """
    if mode == "none":
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    net.compile(mode=mode)
    try:
        yield
    except TorchDynamoException as error:
        problem = " ".join(str(error).partition("\n\nSet TORCH")[0].split())[:300]
        raise DeviceError(
            f"train.compile {mode}: PyTorch's compiler failed: {problem}",
            "install a C++ compiler such as g++, or leave it out with --set train.compile=none",
        ) from error
    finally:
        net._compiled_call_impl = None


def build_schedule(config: RunConfig) -> NoiseSchedule:
    """The noise schedule of the run."""
    diffusion = config.diffusion
    return NoiseSchedule.named(
        diffusion.schedule, diffusion.timesteps, shift=diffusion.shift, zero_snr=diffusion.zero_terminal_snr
    )


def build_denoiser(
    config: RunConfig,
    net: nn.Module,
    autocast: torch.dtype | None,
    *,
    threshold: str = "clip",
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoiser:
    """The denoiser of the run: its schedule and prediction around ``net``, a network of :func:`build_net`."""
    classes = getattr(net, "num_classes", None)
    null_label = classes - 1 if classes and config.model.label_dropout else None
    return Denoiser(
        net, build_schedule(config), config.diffusion.prediction, threshold=threshold, autocast=autocast,
        null_label=null_label, guidance=guidance, interval=interval, learned_variance=config.diffusion.learn_variance,
    )  # fmt: skip


def build_ema(config: RunConfig, net: nn.Module) -> EMA:
    """The weight average of the run."""
    train = config.train
    return EMA(net, train.ema_decay, warmup=train.ema_warmup, start=train.ema_start, every=train.ema_every)


def build_powers(config: RunConfig, net: nn.Module) -> list[PowerEMA]:
    """The averages of which the run takes snapshots; none where it does not."""
    return [PowerEMA(net, length) for length in LENGTHS] if config.train.ema_snapshot_every else []


def build_optimizer(config: RunConfig, net: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of the run."""
    train = config.train
    betas = (train.beta1, train.beta2)
    return make_optimizer(net, train.optimizer, lr=train.lr, betas=betas, decay=train.weight_decay)
