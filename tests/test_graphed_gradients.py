"""Parts of a batch under CUDA graphs: a stand-in for what they do with memory, for no GPU is needed then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpmctl import training
from ddpmctl.build import build_denoiser, build_ema, build_optimizer
from ddpmctl.runfile import Layer, resolve
from ddpmctl.training import TrainState, add_gradients


class Graphed(torch.autograd.Function):
    """x * w, whose gradient for w always comes in the same memory, as a graph that is run again returns it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, memory: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.memory = memory
        return x * w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w = ctx.saved_tensors
        ctx.memory.copy_((grads[0] * x).sum())
        again = torch.empty(0).set_(ctx.memory.untyped_storage(), 0, w.shape)  # type: ignore[call-overload]
        return grads[0] * w, again, None


class Net(nn.Module):
    def __init__(self, graphed: bool) -> None:
        super().__init__()
        self.w, self.unused, self.memory = nn.Parameter(torch.tensor([0.5])), nn.Parameter(torch.ones(1)), torch.zeros(1)
        self.graphed = graphed

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return Graphed.apply(x, self.w, self.memory) if self.graphed else x * self.w  # type: ignore[no-any-return]


def gradient(compile_: str, parts: int, *, graphed: bool) -> tuple[Tensor, float]:
    """Of the first step of a batch of 6 in ``parts``: that of the weight, and the loss."""
    config = resolve(Layer({"diffusion.timesteps": 20, "train.batch_size": 6, "train.compile": compile_}, {}))
    net = Net(graphed)
    state = TrainState(net, build_ema(config, net), build_optimizer(config, net), torch.amp.GradScaler("cpu", enabled=False), parts=parts)  # type: ignore[attr-defined]
    x0 = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    told = {"news": lambda self: None, "take": lambda self, news: None}
    batches: Any = type("Fixed", (SimpleNamespace,), {"__call__": lambda self, step, mine: (x0[mine], None), **told})(batch_size=6)
    loss = add_gradients(state, build_denoiser(config, net, None), batches, config, [])
    assert net.w.grad is not None and net.unused.grad is None
    return net.w.grad, loss.item()




@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_gradients_of_parts_add_up_in_memory_of_their_own(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(None))
    for parts in (1, 2, 3):
        plain = gradient("none", parts, graphed=False)
        assert not begun
        assert gradient(mode, parts, graphed=False) == plain and gradient(mode, parts, graphed=True) == plain
        assert len(begun) == 2 * parts
        begun.clear()


def test_without_that_the_stand_in_shows_the_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "keep_gradients", lambda parameters: None)
    assert gradient("reduce-overhead", 1, graphed=True) == gradient("none", 1, graphed=False)
    assert gradient("reduce-overhead", 3, graphed=True)[0] != gradient("none", 3, graphed=False)[0]


def test_pytorch_takes_the_call_without_a_gpu() -> None:
    assert gradient("reduce-overhead", 2, graphed=False) == gradient("none", 2, graphed=False)
