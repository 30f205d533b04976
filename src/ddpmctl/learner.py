"""What every process of a run holds: the state that is trained, and the batches that it is trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddpmctl.build import build_denoiser, build_ema, build_net, build_optimizer, build_powers, place, resolve_precision
from ddpmctl.config import RunConfig
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.noise import derive_seed
from ddpmctl.data.batches import Batches, StepBatches
from ddpmctl.data.dataset import ImageDataset
from ddpmctl.data.streamed import StreamedBatches
from ddpmctl.training import TrainState
from ddpmctl.validation import split


class Learner(NamedTuple):
    """``held``: indices of the images that are not trained on, int64 (K,). ``autocast``: dtype, None for float32."""

    state: TrainState
    denoiser: Denoiser
    batches: StepBatches
    held: Tensor
    autocast: torch.dtype | None


def new_net(config: RunConfig, dataset: ImageDataset) -> nn.Module:
    """The network of the run as it starts, which follows from the seed."""
    torch.manual_seed(derive_seed(config.seed, "init"))
    return build_net(config, dataset.channels, len(dataset.class_names))


def new_learner(config: RunConfig, dataset: ImageDataset, device: torch.device) -> Learner:
    """Everything at step 0, on ``device``. Raises :class:`DeviceError` for a precision that it does not have."""
    autocast = resolve_precision(config.precision, device)
    net = place(new_net(config, dataset), device)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)
    state = TrainState(
        net, build_ema(config, net), build_optimizer(config, net), scaler, parts=config.train.grad_accum,
        powers=build_powers(config, net),
    )  # fmt: skip
    members, held = split(dataset, config.data.holdout)
    how = (config.train.batch_size, config.seed, config.data.hflip)
    batches = StreamedBatches(dataset.stream, *how) if dataset.stream else Batches(dataset, *how, members=members)
    return Learner(state, build_denoiser(config, net, autocast), batches, held, autocast)
