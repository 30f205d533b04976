"""Who is timed: each contestant trains, or evaluates its network, as its own documentation shows, through its public interface.

A contestant is a function and a row. A trainer yields once a step: batch from tensors in memory, loss, gradients clipped
to 1, Adam, average of the weights. An evaluator is called once for one evaluation of the network.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ddpmctl import process
from ddpmctl.core import fast, unet

IMAGES = 512
"""Random images that training draws its batches from."""


class Setting(NamedTuple):
    """The network of Ho et al. 2020 for CIFAR-10, by default, and a batch."""

    base: int = 128
    mults: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    dropout: float = 0.1
    channels: int = 3
    size: int = 32
    groups: int = 32
    attention: int = 1
    batch: int = 16
    device: str = "cpu"

    def images(self) -> torch.Tensor:
        """uint8 (N, C, H, W)."""
        return torch.randint(0, 256, (IMAGES, self.channels, self.size, self.size), dtype=torch.uint8)

    def net(self) -> unet.UNet:
        """Our network, on the device, in PyTorch's usual memory format."""
        torch.manual_seed(0)
        return unet.UNet(
            self.channels, base_channels=self.base, channel_mults=self.mults, num_res_blocks=self.blocks,
            attention_levels=(self.attention,), dropout=self.dropout, norm_groups=self.groups, time_width=4 * self.base,
        ).to(self.device)  # fmt: skip


def config_of(setting: Setting, precision: str, compiled: str = "none") -> Any:
    """Our run configuration: endless, and nothing is drawn or saved on the way."""
    from ddpmctl.config import RunConfig

    return RunConfig.model_validate({
        "device": setting.device, "precision": precision, "data": {"size": setting.size},
        "model": {"base_channels": setting.base, "channel_mults": list(setting.mults), "num_res_blocks": setting.blocks,
                  "attention_levels": [setting.attention], "dropout": setting.dropout, "norm_groups": setting.groups},
        "train": {"steps": 10**9, "batch_size": setting.batch, "compile": compiled, "save_every": 10**9, "sample_every": 0, "val_every": 0},
    })  # fmt: skip


@contextmanager
def run_of(setting: Setting, precision: str, compiled: str = "none") -> Iterator[Any]:
    """A run as ``ddpmctl train`` makes it, in a folder of its own."""
    from ddpmctl.data.dataset import ImageDataset
    from ddpmctl.data.report import DataReport
    from ddpmctl.run import Run
    from ddpmctl.runfolder import RunFolder

    process.tune()  # as the command line does
    images = setting.images()
    report = DataReport(len(images))
    with tempfile.TemporaryDirectory() as place:
        run = Run(config_of(setting, precision, compiled), ImageDataset(images, None, [], report, ""), RunFolder(Path(place) / "run"))
        run.begin()
        yield run


def ours(setting: Setting, precision: str = "auto", compiled: str = "none") -> Iterator[object]:
    """``ddpmctl train`` without its screen."""
    with run_of(setting, precision, compiled) as run:
        yield from run.train()


def without_fast_layers(setting: Setting) -> Iterator[object]:
    """Ours, with PyTorch's own layers in place of those in core/fast.py."""
    fast._half_on_cpu = lambda x: False  # its one question
    fast.Dropout.forward = torch.nn.Dropout.forward  # type: ignore[method-assign]
    return ours(setting)


def plain(setting: Setting) -> Iterator[None]:
    """Algorithm 1 of the paper as one would write it down: float32, our network, nothing else of ours."""
    net, device = setting.net(), setting.device
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4)
    images = setting.images().float() / 127.5 - 1
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0).to(device)
    while True:
        x0 = images[torch.randint(len(images), (setting.batch,))].to(device)
        t, eps = torch.randint(1000, (setting.batch,), device=device), torch.randn_like(x0)
        abar = alpha_bar[t].view(-1, 1, 1, 1)
        loss = F.mse_loss(net(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, t), eps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), net.parameters(), strict=True):
                kept.lerp_(new, 1 - 0.9999)
        loss.item()
        yield


def _diffusers_net(setting: Setting) -> Any:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    levels, last = range(len(setting.mults)), len(setting.mults) - 1
    attention = {level: "Attn" if level == setting.attention else "" for level in levels}
    return UNet2DModel(
        sample_size=setting.size, in_channels=setting.channels, out_channels=setting.channels, layers_per_block=setting.blocks,
        block_out_channels=tuple(setting.base * m for m in setting.mults), dropout=setting.dropout,
        norm_num_groups=setting.groups, attention_head_dim=None,
        down_block_types=tuple(f"{attention[level]}DownBlock2D" for level in levels),
        up_block_types=tuple(f"{attention[last - level]}UpBlock2D" for level in levels),
    ).to(setting.device)  # fmt: skip


def diffusers(setting: Setting, autocast: torch.dtype | None = None) -> Iterator[None]:
    """As in Hugging Face's unconditional training example."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    net, device = _diffusers_net(setting), setting.device
    average = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    scheduler, images = DDPMScheduler(1000), setting.images().float() / 127.5 - 1
    while True:
        x0 = images[torch.randint(len(images), (setting.batch,))].to(device)
        noise, t = torch.randn_like(x0), torch.randint(1000, (setting.batch,), device=device)
        noisy = scheduler.add_noise(x0, noise, t)
        with torch.autocast(torch.device(device).type, autocast) if autocast else nullcontext():
            said = net(noisy, t, return_dict=False)[0]
        loss = F.mse_loss(said.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(net.parameters())
        loss.item()
        yield


def lucidrains(setting: Setting) -> Iterator[None]:
    """denoising-diffusion-pytorch as its README has it; the network is its own, of 28.5 million parameters in the usual setting."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    torch.manual_seed(0)
    net = Unet(dim=setting.base, dim_mults=setting.mults, channels=setting.channels, dropout=setting.dropout)
    process_ = GaussianDiffusion(net, image_size=setting.size, timesteps=1000).to(setting.device)
    optimizer = torch.optim.Adam(process_.parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = EMA(process_, beta=0.995, update_every=10)
    images = setting.images().float() / 255
    while True:
        loss = process_(images[torch.randint(len(images), (setting.batch,))].to(setting.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(process_.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        loss.item()
        yield


TRAINERS: dict[str, Callable[[Setting], Iterator[object]]] = {
    "ddpmctl": ours,
    "ddpmctl, fp32": lambda setting: ours(setting, "fp32"),
    "ddpmctl, bf16": lambda setting: ours(setting, "bf16"),
    "ddpmctl, without core/fast.py": without_fast_layers,
    "ddpmctl, torch.compile": lambda setting: ours(setting, compiled="default"),
    "plain PyTorch, fp32": plain,
    "diffusers, fp32": diffusers,
    "diffusers, bf16 autocast": lambda setting: diffusers(setting, torch.bfloat16),
    "denoising-diffusion-pytorch, fp32": lucidrains,
}


def _our_net(setting: Setting, precision: str) -> Callable[[], object]:
    from ddpmctl import build

    process.tune()
    device = torch.device(setting.device)
    autocast = build.resolve_precision(precision, device)
    net = build.round_once(build.place(setting.net(), device).eval(), autocast)
    denoiser = build.build_denoiser(config_of(setting, precision), net, autocast)
    x_t = torch.randn(setting.batch, setting.channels, setting.size, setting.size, device=device)
    return lambda: denoiser.output(x_t, 500)


def _their_net(setting: Setting, dtype: torch.dtype) -> Callable[[], object]:
    net = _diffusers_net(setting).eval().to(dtype)
    x_t = torch.randn(setting.batch, setting.channels, setting.size, setting.size, device=setting.device, dtype=dtype)
    return lambda: net(x_t, 500, return_dict=False)


EVALUATORS: dict[str, Callable[[Setting], Callable[[], object]]] = {
    "ddpmctl, bf16": lambda setting: _our_net(setting, "bf16"),
    "ddpmctl, fp32": lambda setting: _our_net(setting, "fp32"),
    "diffusers, fp32": lambda setting: _their_net(setting, torch.float32),
    "diffusers, bf16": lambda setting: _their_net(setting, torch.bfloat16),
}


def product(setting: Setting, dtype: torch.dtype) -> Callable[[], object]:
    """A matrix product of 2 x 1024^3 operations, the machine's limit."""
    a, b = (torch.randn(1024, 1024, device=setting.device).to(dtype) for _ in "ab")
    return lambda: a @ b


PRODUCTS: dict[str, Callable[[Setting], Callable[[], object]]] = {
    "matrix product, bf16": lambda setting: product(setting, torch.bfloat16),
    "matrix product, fp32": lambda setting: product(setting, torch.float32),
}
PRODUCT_FLOPS = 2 * 1024**3
