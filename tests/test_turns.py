"""Work that several processes share: here threads play them, and no more is said between these than between processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddpmctl.core.bound import variational_bound
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.data.dataset import ImageDataset
from ddpmctl.data.report import DataReport
from ddpmctl.evaluation.likelihood import BOUND_DRAWS, Bits, Likelihood
from ddpmctl.images import from_uint8
from ddpmctl.ranks import Ranks, Word
from ddpmctl.turns import as_fits, help_out, rounds
from ddpmctl.validation import Validated

CPU = torch.device("cpu")


@dataclass
class Played:
    """As much of :class:`Ranks` as it takes, over queues."""

    rank: int
    world: int
    down: list[Queue[Any]]
    up: list[Queue[Any]]
    worked: list[list[list[float]]] = field(default_factory=list)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def tell(self, word: Word) -> None:
        self.share((word, 0))

    def end(self) -> None:
        self.tell(Word.END)

    def listen(self) -> tuple[Word, int]:
        return self.share()

    def share(self, value: Any = None) -> Any:
        if not self.leads:
            return self.down[self.rank].get(timeout=60)
        for queue in self.down[1:]:
            queue.put(value)
        return value

    def send(self, tensor: torch.Tensor) -> None:
        self.up[self.rank].put(tensor)

    def receive(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        found = self.up[rank].get(timeout=60)
        assert tuple(found.shape) == tuple(shape) and found.dtype == dtype
        return found


def play(world: int, part: Callable[[Any], Any]) -> list[Any]:
    """What ``part`` returns in each of ``world`` processes."""
    down, up = ([Queue() for _ in range(world)] for _ in range(2))  # type: ignore[var-annotated]
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: part(Played(rank, world, down, up)), range(world)))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_pieces_go_round_and_come_back_in_order(world):
    def part(ranks: Played) -> Any:
        mine: list[list[float]] = []

        def squares(piece: torch.Tensor) -> torch.Tensor:
            mine.append(piece.tolist())
            return torch.stack([piece, piece.square()], dim=1)

        works = {Word.LOSSES: squares, Word.BITS: lambda piece: -squares(piece)}
        if not ranks.leads:
            help_out(ranks, works)  # type: ignore[arg-type]
            return mine
        pieces = torch.split(torch.arange(11.0), 2)
        made = [list(rounds(ranks, word, work, pieces)) for word, work in works.items()]  # type: ignore[arg-type]
        ranks.end()
        return mine, made

    (mine, made), *others = play(world, part)
    numbers = torch.arange(11.0)
    expected = torch.stack([numbers, numbers.square()], dim=1)
    assert [len(each) for each in made[0]] == [min(world, 6 - start) for start in range(0, 6, world)]
    for found, sign in zip(made, (1, -1), strict=True):
        assert torch.equal(torch.cat([piece for each in found for piece in each]), sign * expected)
    assert [mine, *others] == [2 * [piece.tolist() for piece in torch.split(numbers, 2)][rank::world] for rank in range(world)]


def test_fewer_rows_go_at_once_from_where_memory_runs_out():
    tried = []

    def narrow(piece: torch.Tensor) -> torch.Tensor:
        tried.append(len(piece))
        if len(piece) > 3:
            raise MemoryError
        return 2 * piece

    careful = as_fits(narrow, CPU)
    assert torch.equal(careful(torch.arange(7)), 2 * torch.arange(7))
    assert torch.equal(careful(torch.arange(4)), 2 * torch.arange(4))
    assert tried == [7, 3, 3, 1, 3, 1]
    with pytest.raises(RuntimeError, match="something else"):
        as_fits(lambda piece: (_ for _ in ()).throw(RuntimeError("something else")), CPU)(torch.arange(2))


@pytest.fixture
def model() -> Any:
    """A network that mixes images, labels and levels, and data of which 100 images are looked at."""
    schedule = NoiseSchedule.named("cosine", 40)
    denoiser = Denoiser(lambda x, t, label: torch.sin(x) * (1 + label + t / 40).view(-1, 1, 1, 1) / 3, schedule, "v", null_label=3)
    denoiser.guidance = 4.0
    config = SimpleNamespace(diffusion=SimpleNamespace(loss="l2"))
    return SimpleNamespace(denoiser=denoiser, device=CPU, fingerprint="another", config=config, image_shape=(3, 5, 4))


@pytest.fixture
def data() -> ImageDataset:
    images = torch.randint(256, (100, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageDataset(images, torch.arange(100) % 3, ["a", "b", "c"], DataReport(), "")


def measured(model: Any, data: ImageDataset, world: int) -> tuple[Validated, dict[str, Bits]]:
    def part(ranks: Any) -> Any:
        likelihood = ranks.share(Likelihood(model, data) if ranks.leads else None)
        if not ranks.leads:
            return help_out(ranks, likelihood.works(model))
        found = likelihood.loss(model, 64, ranks, seen), likelihood.bits_per_dim(model, 64, ranks, seen)
        ranks.end()
        return found

    progress: list[tuple[int, int]] = []

    def seen(done: int, total: int) -> None:
        progress.append((done, total))

    found: tuple[Validated, dict[str, Bits]] = play(world, part)[0]
    assert [total for done, total in progress if done == total] == [256, 64]
    assert len(progress) == 2 * -(-8 // world)
    return found


def test_loss_and_bits_are_the_same_to_the_last_bit_with_any_number_of_processes(model, data):
    one = measured(model, data, 1)
    for world in (2, 3, 8):
        assert measured(model, data, world) == one
    assert one[0].loss == pytest.approx(sum(one[0].quarters) / 4, rel=1e-12)


def test_bits_are_those_of_all_images_at_once_without_guidance(model, data):
    pictures = Likelihood(model, data).pictures
    model.denoiser.guidance = 1.0
    bounds = variational_bound(model.denoiser, from_uint8(pictures.images), range(64), draws=BOUND_DRAWS, label=pictures.labels)
    model.denoiser.guidance = 4.0
    for name, found in measured(model, data, 3)[1].items():
        exact = bounds[name].bits_per_dim(60)
        assert found.mean == pytest.approx(float(exact.mean()), rel=1e-9)
        assert found.error == pytest.approx(float(exact.std()) / 8, rel=1e-9)


def test_an_ordinary_process_alone_needs_no_others():
    assert [float(made) for [made] in rounds(Ranks(), Word.LOSSES, torch.sum, [torch.ones(2), torch.ones(3)])] == [2, 3]
