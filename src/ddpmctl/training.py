"""The training loop: a generator of steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from ddpmctl.build import CUDA_GRAPHS
from ddpmctl.config import RunConfig
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.draws import T_SAMPLINGS
from ddpmctl.core.ema import EMA
from ddpmctl.core.losses import VLB_WEIGHT, denoising_loss
from ddpmctl.core.noise import derive_seed, derived_generator
from ddpmctl.core.optim import LR_SCHEDULES, keep_gradients, update
from ddpmctl.core.power import PowerEMA
from ddpmctl.core.transfer import send
from ddpmctl.data.batches import StepBatches
from ddpmctl.errors import DataError
from ddpmctl.memory import free_cached, out_of_memory
from ddpmctl.ranks import ALONE, Ranks
from ddpmctl.stopping import Interrupted


@dataclass(frozen=True, eq=False)
class TrainStep:
    """One optimiser step. What it came to lies on the device, as ``numbers``: the first who asks waits for it.

    ``numbers``: loss, norm of the gradients, and which of the parameters ``names`` has the largest gradient, (3,) float32.
    """

    step: int
    lr: float
    numbers: Tensor
    names: Sequence[str]

    @cached_property
    def _read(self) -> list[float]:
        return cast("list[float]", self.numbers.tolist())

    @property
    def loss(self) -> float:
        """Of the batch."""
        return self._read[0]

    @property
    def grad_norm(self) -> float:
        """Euclidean norm of all gradients, before they are clipped."""
        return self._read[1]

    @property
    def applied(self) -> bool:
        """Whether loss and gradients are finite; where they are not, network and optimiser are as before."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def largest(self) -> str:
        """The parameter with the largest gradient, or with the first that is no number."""
        return self.names[int(self._read[2])]


@dataclass
class TrainState:
    """All that changes while training; with the configuration and the data it determines the rest of the run.

    ``rollbacks``: how often the run went back to a checkpoint after it diverged; each gives other draws, and halves the
    learning rate. ``pardoned``: of these, those before the user chose another learning rate, which halve it no more.
    ``parts``: how many pieces a batch is cut into, so that it fits into memory. ``powers``: averages to take snapshots of.
    """

    net: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    rollbacks: int = 0
    pardoned: int = 0
    parts: int = 1
    powers: Sequence[PowerEMA] = ()

    def __post_init__(self) -> None:
        # Once, since to go through the modules takes as long as to average their weights.
        self.named, self.buffers = list(self.net.named_parameters()), list(self.net.buffers())

    @property
    def halvings(self) -> int:
        """How many times the learning rate is halved."""
        return self.rollbacks - self.pardoned

    def state_dict(self) -> dict[str, Any]:
        """Plain dict for a checkpoint."""
        return {
            "step": self.step,
            "rollbacks": self.rollbacks,
            "pardoned": self.pardoned,
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            **({"powers": [power.state_dict() for power in self.powers]} if self.powers else {}),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`; raises ``RuntimeError`` or ``ValueError`` when it does not fit."""
        self.net.load_state_dict(state["net"], strict=True)
        self.ema.load_state_dict(state["ema"])
        kept = {power["length"]: power["net"] for power in state.get("powers", [])}
        for power in self.powers:  # one that was not taken before stands as if the weights had always been these
            power.load_state_dict({"net": kept.get(power.length, state["net"]), "steps": state["step"]})
        # Moments are taken over, settings are not: those of this run hold.
        groups = [
            {**old, **{key: value for key, value in new.items() if key != "params"}}
            for old, new in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        for p, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if value.shape == p.shape and value.stride() != p.stride():
                    # Fused kernels go through memory side by side, whatever the layout of each.
                    moments[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.rollbacks = int(state["step"]), int(state.get("rollbacks", 0))
        self.pardoned = int(state.get("pardoned", 0))

    def begin_with(self, net: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> None:
        """Step 0 with weights of another run, raw and averaged; raises ``RuntimeError`` when they do not fit."""
        self.net.load_state_dict(net, strict=True)
        self.ema.load_state_dict({"net": ema, "steps": 0})
        for power in self.powers:
            power.load_state_dict({"net": net, "steps": 0})

    def restart(self, net: nn.Module) -> None:
        """Back to step 0 with the weights of ``net``; rollbacks and parts stay."""
        self.net.load_state_dict(net.state_dict())
        for average in (self.ema, *self.powers):
            average.load_state_dict({"net": net.state_dict(), "steps": 0})
        self.optimizer.state.clear()
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(torch.amp.GradScaler(next(net.parameters()).device.type).state_dict())
        self.step = 0

    def sound(self) -> bool:
        """Whether all weights and statistics of the network are finite; waits for the device."""
        return all_finite([*(parameter for _, parameter in self.named), *self.buffers])

    def first_not_finite(self) -> str | None:
        """Where network, average or optimiser hold something that is no number; None: nowhere."""
        moments = {
            f"{kind} of parameter {i}": value
            for i, kinds in self.optimizer.state_dict()["state"].items()
            for kind, value in kinds.items()
        }
        for where, tensors in (
            ("network", self.net.state_dict()),
            ("average", self.ema.net.state_dict()),
            *(("average", power.net.state_dict()) for power in self.powers),
            ("optimiser", moments),
        ):
            if not all_finite(tensors.values()):
                bad = next(name for name, value in tensors.items() if not all_finite([value]))
                return f"{where}: {bad}"
        return None


def train_steps(
    state: TrainState, denoiser: Denoiser, batches: StepBatches, config: RunConfig, ranks: Ranks = ALONE
) -> Iterator[TrainStep]:
    """Train from ``state.step`` to the end. Ho et al. 2020, algorithm 1.

    Every draw follows from (seed, step, rollbacks, purpose): stopping and going on changes nothing. The device is not
    waited for: while it computes a step, the next one is prepared. With several processes all of them take the same step,
    from the gradients of the whole batch.
    """
    train = config.train
    while state.step < train.steps:
        step = state.step + 1
        lr = train.lr * LR_SCHEDULES[train.lr_schedule](step, train.steps, train.lr_warmup) * 0.5**state.halvings
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        buffers = [buffer.clone() for buffer in state.buffers]
        loss = add_gradients(state, denoiser, batches, config, buffers, ranks)
        state.scaler.unscale_(state.optimizer)

        names, grads = zip(*((name, p.grad) for name, p in state.named if p.grad is not None), strict=True)
        norms = torch.stack(torch._foreach_norm(grads))
        norm = torch.linalg.vector_norm(norms)
        numbers = torch.stack([loss, norm, norms.argmax().float()])
        bad = ~numbers[:2].isfinite().all()
        update(state.optimizer, bad, ((norm + 1e-6) / train.grad_clip).clamp(min=1.0) if train.grad_clip else None)
        restore(state.buffers, buffers, where=bad)
        for average in (state.ema, *state.powers):
            average.update(state.net)
        update_scale(state.scaler, torch.ones_like(loss))
        state.step = step
        yield TrainStep(step, lr, numbers, names)


def add_gradients(
    state: TrainState, denoiser: Denoiser, batches: StepBatches, config: RunConfig, buffers: Iterable[Tensor], ranks: Ranks = ALONE
) -> Tensor:
    """Gradients of the step that comes next, in the parameters; returns the loss, a scalar on the device.

    Each process draws for the whole batch, and computes its part of it: only sums go between them, once a step.
    When memory runs out in one, ``state.parts`` is doubled in all and the step done again from ``buffers``, a copy of the
    network's: the batch stays what it was. Raises the device's own error when one image is too much, and the :class:`DataError`
    or :class:`Interrupted` that any process has met, in all of them.
    """
    step, diffusion, device, n = state.step + 1, config.diffusion, next(state.net.parameters()).device, batches.batch_size
    draw, mine = (config.seed, step, state.rollbacks), ranks.part(n)
    drawn = T_SAMPLINGS[diffusion.t_sampling](denoiser, n, diffusion.weighting, derived_generator(*draw, "t"))
    try:
        x0, label = batches(step, mine)
    except (DataError, Interrupted) as error:
        fault = DataError(f"{ranks.name()}: {error.problem}", error.advice) if isinstance(error, DataError) and not ranks.leads else error
        batches.take(ranks.agree(False, batches.news(fault))[1])  # where the others say how the step went
        raise
    if label is not None and denoiser.null_label is not None:
        hidden = torch.rand(n, generator=derived_generator(*draw, "label")) < config.model.label_dropout
        label = label.masked_fill(hidden[mine], denoiser.null_label)
    eps = torch.randn((n, *x0.shape[1:]), generator=derived_generator(*draw, "eps"))[mine]
    if diffusion.offset_noise:  # Guttenberg 2023, "Diffusion with offset noise"
        offset = torch.randn(n, x0.shape[1], 1, 1, generator=derived_generator(*draw, "offset"))[mine]
        eps = eps + diffusion.offset_noise * offset
    weights = drawn.weights[mine] if drawn.weights is not None else None
    graphs = config.train.compile in CUDA_GRAPHS

    def accumulate(parts: int) -> Tensor:
        torch.manual_seed(derive_seed(*draw, "dropout", *ranks.own()))
        total = torch.zeros((), device=device)
        of_batch = (x0, drawn.t[mine], eps, label, weights)
        cut = (part.tensor_split(parts) if part is not None else [None] * parts for part in of_batch)
        for number, (x0_part, t_part, eps_part, label_part, weights_part) in enumerate(zip(*cut, strict=True)):
            if graphs:  # seen on CPUs only, where there are none
                if number == 1:
                    keep_gradients(state.net.parameters())
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # the part before is done with
            on_device = send(label_part, device) if label_part is not None else None
            loss = denoising_loss(
                denoiser, send(x0_part, device), t_part, send(eps_part, device), on_device,
                loss=diffusion.loss, weighting=diffusion.weighting, weights=weights_part,
                vlb_weight=VLB_WEIGHT if diffusion.learn_variance else 0.0,
            )  # fmt: skip
            loss = loss * (len(x0_part) / n)
            state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    while True:
        state.optimizer.zero_grad(set_to_none=True)
        loss = None
        try:
            loss = accumulate(min(state.parts, len(x0)))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or state.parts >= ranks.most(n):
                raise
        # Out of the handler, whose error still holds what the failed attempt had in memory.
        short, news = ranks.agree(loss is None, batches.news())
        batches.take(news)
        if not short and loss is not None:
            ranks.add([loss, *(p.grad for _, p in state.named if p.grad is not None)])
            return loss
        state.parts = min(2 * state.parts, ranks.most(n))
        state.optimizer.zero_grad(set_to_none=True)
        restore(state.buffers, buffers)
        free_cached(device.type)


def room_for_moments(state: TrainState) -> list[Tensor]:
    """What Adam's moments will take, where they are not there yet: to be held while a step is tried."""
    return [] if state.optimizer.state else [torch.empty_like(p) for p in state.net.parameters() for _ in "mv"]


@torch.no_grad()
def restore(buffers: Iterable[Tensor], kept: Iterable[Tensor], *, where: Tensor | None = None) -> None:
    """Put batch-norm statistics back to what they were, if the bool scalar ``where`` is true."""
    for buffer, before in zip(buffers, kept, strict=True):
        buffer.copy_(before if where is None else torch.where(where, before, buffer))


def update_scale(scaler: torch.amp.GradScaler, one: Tensor) -> None:
    """PyTorch's update of the loss scale, but never below ``one``: gradients would vanish, and the loss stand still without a word."""
    if scaler.is_enabled():
        scaler.update()
        scaler.update(scaler.scale(one).clamp(min=1.0))


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is finite; one wait for each device. Tensors of integers are."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    by_device: dict[torch.device, list[Tensor]] = {}  # the step counts of optimisers stay on the CPU
    for tensor in floats:
        by_device.setdefault(tensor.device, []).append(tensor)
    # The sum of squares is seven times as fast as the maximum, and as good, unless it overflows itself.
    return all(
        any(bool(torch.stack(torch._foreach_norm(group, ord=order)).isfinite().all()) for order in (2, math.inf))
        for group in by_device.values()
    )
