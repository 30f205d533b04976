"""While a GPU computes, the CPU prepares what comes next: in a training step nothing waits for the device."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddpmctl import build
from ddpmctl.config import RunConfig
from ddpmctl.core.transfer import send
from ddpmctl.data.batches import Batches
from ddpmctl.events import Busy
from ddpmctl.training import TrainState, TrainStep, train_steps
from ddpmctl.validation import DRAWS, QUARTERS, Validated, Validation
from pretend import GPU, move, pretended

MODEL = {"base_channels": 8, "channel_mults": [1, 2], "num_res_blocks": 1, "norm_groups": 4, "dropout": 0.0}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "usual": {},
    "batch norm": {"model": {"norm": "batch"}},
    "labels": {"data": {"conditional": True}, "model": {"label_dropout": 0.5}},
    "learned variance": {"diffusion": {"learn_variance": True, "t_sampling": "importance"}},
    "weighted, parts": {"diffusion": {"weighting": "min_snr", "offset_noise": 0.1}, "train": {"grad_accum": 2}},
    "snapshots": {"train": {"ema_snapshot_every": 5}},
    "no clipping": {"train": {"grad_clip": 0.0}, "data": {"hflip": True}},
}


class Images:
    """As much of a data set as a batch needs."""

    def __init__(self, classes: int) -> None:
        random = torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8, generator=random)
        self.labels = torch.arange(12) % classes if classes else None

    def __len__(self) -> int:
        return len(self.images)


def training(case: str, *, on_gpu: bool) -> tuple[TrainState, Iterator[TrainStep]]:
    """State and steps of a run, whose numbers do not hang on the device."""
    settings = {part: {**MODEL, **keys} if part == "model" else keys for part, keys in {"model": {}, **CASES[case]}.items()}
    settings["train"] = {"batch_size": 4, "lr": 1e-3, **settings.get("train", {})}
    config = RunConfig.model_validate({"device": "cpu", "precision": "fp32", **settings})
    images = Images(3 if config.data.conditional else 0)
    torch.manual_seed(0)
    net = build.build_net(config, 3, 3 if config.data.conditional else 0)
    optimizer = build.build_optimizer(config, net)
    if on_gpu:
        move(net)
        optimizer.param_groups[0]["params"] = list(net.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(
        net, build.build_ema(config, net), optimizer, scaler, parts=config.train.grad_accum, powers=build.build_powers(config, net)
    )
    batches = Batches(images, 4, 0, config.data.hflip)  # type: ignore[arg-type]
    return state, train_steps(state, build.build_denoiser(config, net, None), batches, config)


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_nothing_and_gives_the_same_numbers(case, monkeypatch):
    state, expected = training(case, on_gpu=False)
    wanted = [next(expected) for _ in range(3)]
    with pretended(monkeypatch) as gpu:
        there, steps = training(case, on_gpu=True)
        done = [next(steps) for _ in range(3)]
        assert gpu.waits == []
        assert torch.equal(torch.stack([step.numbers for step in done]).cpu(), torch.stack([step.numbers for step in wanted]))
        for name, weights in there.ema.net.state_dict().items():
            assert torch.equal(weights.cpu(), state.ema.net.state_dict()[name]), name


def test_the_held_out_loss_waits_for_what_it_came_to_alone(monkeypatch):
    """Once a piece; images, labels and noise go there without."""
    state, _ = training("labels", on_gpu=False)
    config = RunConfig.model_validate({"data": {"conditional": True}, "model": {**MODEL, "label_dropout": 0.5}})
    validation = Validation(Images(3), torch.arange(12), "l2")  # type: ignore[arg-type]
    walk = validation(build.build_denoiser(config, state.net, None), torch.device("cpu"), 32)
    wanted = list(finished(walk))[-1]
    with pretended(monkeypatch) as gpu:
        move(state.net)
        found = list(finished(validation(build.build_denoiser(config, state.net, None), GPU, 32)))
        assert gpu.waits == QUARTERS * DRAWS // 32 * ["_to_copy"]
    assert found[-1] == wanted


def finished(walk: Generator[Busy, None, Validated]) -> Iterator[Busy | Validated]:
    """What it yields, and what it returns."""
    yield (yield from walk)


@pytest.mark.parametrize("waiting", [lambda x: x.to(GPU), lambda x: send(x, GPU).cpu(), lambda x: send(x, GPU).sum().item(),
                                     lambda x: bool(send(x, GPU).any()), lambda x: send(x, GPU).copy_(x)])  # fmt: skip
def test_what_waits_is_noticed(waiting, monkeypatch):
    with pretended(monkeypatch) as gpu:
        waiting(torch.ones(3))
        assert len(gpu.waits) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, which says itself who waits for it")
def test_a_step_on_cuda_waits_for_nothing(monkeypatch):
    state, _ = training("usual", on_gpu=False)
    config, device = RunConfig.model_validate({"model": MODEL, "train": {"batch_size": 4}}), torch.device("cuda")
    net = build.place(state.net, device)
    moved = TrainState(net, build.build_ema(config, net), build.build_optimizer(config, net), torch.amp.GradScaler(enabled=False))
    steps = train_steps(moved, build.build_denoiser(config, net, None), Batches(Images(0), 4, 0), config)  # type: ignore[arg-type]
    next(steps)  # loads libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_looks_when_something_is_due_or_every_few_steps():
    from ddpmctl.keeping import Kept
    from ddpmctl.run import Run

    train = SimpleNamespace(steps=100, log_every=40, save_every=50, sample_every=0, val_every=0, ema_snapshot_every=0, evaluate_every=0)
    looks: list[int] = []
    run = Run.__new__(Run)
    run.config = SimpleNamespace(train=train)  # type: ignore[assignment]
    run.validation = run.scoring = None
    run._unread, run._kept, run._watch = [], Kept(), SimpleNamespace(in_a_row=0)  # type: ignore[assignment]
    for step in range(1, 101):
        run.state = SimpleNamespace(step=step)  # type: ignore[assignment]
        run._unread.append(step)  # type: ignore[arg-type]
        if run._look_is_due():
            looks.append(step)
            run._unread = []
            if step == 50:
                run._kept = Kept(50, 50, 50)
    assert looks == [16, 32, 40, 50, 66, 80, 96, 100]
