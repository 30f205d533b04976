"""What any process cannot read ends the step in all of them, where they agree on it: here with one that stands for the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddpmctl import build
from ddpmctl.config import RunConfig
from ddpmctl.data.batches import Batch, News, StepBatches
from ddpmctl.errors import DataError
from ddpmctl.ranks import Ranks
from ddpmctl.started import Started
from ddpmctl.training import TrainState, train_steps

BAD = {(0, 0, 3): ("x.tar/3.png", "broken")}


class Two(Ranks):
    """One of two processes, of which the other has these ``others``; ``said`` is what this one has."""

    def __init__(self, rank: int, others: News | None = None, *, short: bool = False) -> None:
        super().__init__(Started())
        self.rank, self.world = rank, 2
        self.others, self.short, self.said = others, short, list[Any]()

    def agree(self, flag: bool, news: Any = None) -> tuple[bool, list[Any]]:
        self.said.append((flag, news))
        told = [news, self.others] if self.leads else [self.others, news]
        self.others, short, self.short = None, self.short, False
        return flag or short, [one for one in told if one is not None]

    def add(self, tensors: Any) -> None:
        """The other one has computed nothing."""


class Greys(StepBatches):
    """Of four images, which cannot be read where there is a ``fault``; ``unsaid`` ones are bad."""

    def __init__(self, fault: DataError | None = None, unsaid: dict[tuple[int, ...], tuple[str, str]] | None = None) -> None:
        super().__init__(4, 4, seed=0, hflip=False)
        self.fault, self._unsaid = fault, dict(unsaid or {})

    def pixels(self, step: int, part: slice) -> Batch:
        if self.fault:
            raise self.fault
        return Batch(torch.full((len(range(4)[part]), 3, 16, 16), 100, dtype=torch.uint8), None)


def one_step(batches: StepBatches, ranks: Ranks) -> TrainState:
    """What a step leaves; what is raised has changed nothing."""
    config = RunConfig.model_validate(
        {"precision": "fp32", "model": {"base_channels": 8, "channel_mults": [1], "num_res_blocks": 1, "norm_groups": 4}, "train": {"batch_size": 4}}
    )
    torch.manual_seed(0)
    net = build.build_net(config, 3, 0)
    state = TrainState(net, build.build_ema(config, net), build.build_optimizer(config, net), torch.amp.GradScaler("cpu", enabled=False))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    try:
        next(train_steps(state, build.build_denoiser(config, net, None), batches, config, ranks))
    except DataError:
        assert state.step == 0 and not state.optimizer.state and state.parts == 1
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        raise
    return state


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_here_is_told_to_the_others(rank: int) -> None:
    ranks = Two(rank)
    with pytest.raises(DataError, match="tar: gone") as caught:
        one_step(Greys(DataError("x.tar: gone", "bring it back"), BAD), ranks)
    [(flag, news)] = ranks.said
    assert not flag and news.fault is caught.value and news.bad == BAD and caught.value.advice == "bring it back"
    assert caught.value.problem.startswith("x.tar" if rank == 0 else "process 1 of 2 on ")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_of_another_process_is_one_here(rank: int) -> None:
    """Though this one is out of memory."""
    batches = Greys(unsaid=BAD)
    with pytest.raises(DataError, match="no answer"):
        one_step(batches, Two(rank, News({(0, 0, 1): ("x.tar/1.png", "cut short")}, DataError("y.tar: no answer")), short=True))
    assert list(batches.bad) == ["x.tar/1.png", "x.tar/3.png"]


def test_of_two_faults_that_of_the_first_process_is_told() -> None:
    for rank in (0, 1):
        with pytest.raises(DataError) as caught:
            one_step(Greys(DataError("x.tar: gone")), Two(rank, News({}, DataError("y.tar: gone"))))
        assert caught.value.problem == ("x.tar: gone" if rank == 0 else "y.tar: gone")


def test_bad_images_are_said_once_though_the_step_is_done_again() -> None:
    batches, ranks = Greys(unsaid=BAD), Two(1, News({(0, 0, 4): ("x.tar/4.png", "broken"), **BAD}), short=True)
    assert one_step(batches, ranks).parts == 2
    assert [news and news.bad for _, news in ranks.said] == [BAD, None]
    assert batches.bad == {"x.tar/3.png": "broken", "x.tar/4.png": "broken"}
