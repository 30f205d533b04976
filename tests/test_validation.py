"""The held-out loss: the right images, the right number, and the same whatever the batches."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from ddpmctl import validation
from ddpmctl.cli import main
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.noise import derived_generator
from ddpmctl.core.schedule import NoiseSchedule
from ddpmctl.data.batches import Batches
from ddpmctl.data.dataset import ImageDataset
from ddpmctl.data.report import DataReport
from ddpmctl.events import Busy
from ddpmctl.validation import DRAWS, QUARTERS, Validated, Validation, hold_out


def dataset(n: int) -> ImageDataset:
    images = torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageDataset(images, None, [], DataReport(), "")


def validate(denoiser: Denoiser, data: ImageDataset, held: torch.Tensor, batch_size: int, kind: str = "l2") -> Validated:
    return result_of(Validation(data, held, kind)(denoiser, torch.device("cpu"), batch_size))


def result_of(walk: Generator[Busy, None, Validated]) -> Validated:
    try:
        while True:
            next(walk)
    except StopIteration as stop:
        return stop.value


@pytest.mark.parametrize(("n", "share", "count"), [
    (10, 0.02, 0), (49, 0.02, 0), (50, 0.02, 1), (100, 0.5, 50), (1, 0.9, 0), (10**6, 0.02, 1000), (5, 0.0, 0),
])  # fmt: skip
def test_how_many_are_held_out(n, share, count):
    train, held = hold_out(n, share)
    assert len(held) == count and len(train) == n - count
    assert torch.equal(torch.cat([train, held]).sort().values, torch.arange(n))
    assert torch.equal(hold_out(n, share)[1], held)


def test_training_never_sees_a_held_out_image():
    train, held = hold_out(200, 0.1)
    batches = Batches(dataset(200), 7, seed=5, members=train)
    seen = torch.cat([batches.indices(step) for step in range(1, 300)])
    assert not torch.isin(seen, held).any()
    assert torch.equal(seen.unique(), train)
    # Once an epoch each, also where an epoch ends within a batch.
    assert torch.equal(seen[:180].sort().values, train)
    assert batches.epoch_of(90) == 90 * 7 / 180


@pytest.mark.parametrize("timesteps", [3, 4, 1000])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_network_that_says_nothing_has_the_loss_of_its_target(timesteps, prediction):
    """The oracle: the mean square of the target itself, drawn by hand in float64."""
    data, held = dataset(30), torch.tensor([3, 17, 29])
    schedule = NoiseSchedule.named("cosine", timesteps)
    denoiser = Denoiser(lambda x, t, label: torch.zeros_like(x), schedule, prediction)
    mixed = held[torch.randperm(3, generator=derived_generator("validation order"))]
    quarters = []
    for quarter in range(QUARTERS):
        total = 0.0
        for number in range(quarter * DRAWS, (quarter + 1) * DRAWS):
            x0 = data.images[mixed[number % 3]].double() / 127.5 - 1
            eps = torch.randn(3, 4, 4, generator=derived_generator("validation", number)).double()
            t = 1 + int((number + 0.5) / (QUARTERS * DRAWS) * timesteps)
            signal, noise = schedule.alpha_bar[t].sqrt(), (1 - schedule.alpha_bar[t]).sqrt()
            target = {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}[prediction]
            total += float(target.square().mean()) / DRAWS
        quarters.append(total)
    found = validate(denoiser, data, held, 16)
    assert found.quarters == pytest.approx(quarters, rel=1e-5)
    assert found.loss == pytest.approx(sum(quarters) / QUARTERS, rel=1e-5)


def test_the_batch_size_changes_nothing_that_matters():
    data, held = dataset(30), torch.tensor([3, 17, 29])
    denoiser = Denoiser(lambda x, t, label: 0.3 * x, NoiseSchedule.named("linear", 100), "eps")
    first, *others = (validate(denoiser, data, held, size, "huber").quarters for size in (1, 7, 64))
    for other in others:
        assert other == pytest.approx(first, rel=1e-5)


def test_all_of_t_is_measured_evenly():
    seen: list[int] = []

    class Spy(Denoiser):
        def output(self, x_t, t, label=None):
            seen.extend(torch.as_tensor(t).tolist())
            return super().output(x_t, t, label)

    spy = Spy(lambda x, t, label: x, NoiseSchedule.named("linear", 1000), "eps")
    validate(spy, dataset(4), torch.tensor([0]), 64)
    assert len(seen) == QUARTERS * DRAWS and sorted(seen) == seen
    for quarter in range(QUARTERS):
        part = seen[quarter * DRAWS : (quarter + 1) * DRAWS]
        assert 250 * quarter < min(part) and max(part) <= 250 * (quarter + 1)
    assert max(b - a for a, b in itertools.pairwise(seen)) <= 4


def test_it_is_in_the_metrics_when_due_and_at_the_end(photos, tiny):
    command = ["train", str(photos), "-c", str(tiny), "--out", "r", "-q", "--steps", "7", "--set", "train.log_every=4"]
    assert main([*command, "--set", "data.holdout=0.25", "--set", "train.val_every=3"]) == 0
    with Path("r/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], bool(row["val_loss"])) for row in rows] == [("3", True), ("4", False), ("6", True), ("7", True)]
    for row in rows:
        if row["val_loss"]:
            quarters = [float(row[f"val_q{i}"]) for i in range(1, 5)]
            assert float(row["val_loss"]) == pytest.approx(sum(quarters) / 4, rel=1e-4)


def test_without_held_out_images_there_is_none(photos, tiny):
    assert main(["train", str(photos), "-c", str(tiny), "--out", "r", "-q"]) == 0
    with Path("r/metrics.csv").open(newline="") as file:
        assert all(row["val_loss"] == "" for row in csv.DictReader(file))


def test_too_little_memory_makes_smaller_batches_and_the_same_loss(monkeypatch):
    data, held = dataset(30), torch.tensor([3, 17, 29])
    denoiser = Denoiser(lambda x, t, label: 0.3 * x, NoiseSchedule.named("cosine", 100), "eps")
    enough = validate(denoiser, data, held, 64)
    plain, tried = validation.loss_of_each, []

    def narrow(denoiser, x0, *args, **options):
        tried.append(len(x0))
        if len(x0) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return plain(denoiser, x0, *args, **options)

    monkeypatch.setattr(validation, "loss_of_each", narrow)
    little = validate(denoiser, data, held, 64)
    assert tried == [32, 16] + 32 * [8]
    assert little.quarters == pytest.approx(enough.quarters, rel=1e-5)
    monkeypatch.setattr(validation, "loss_of_each", lambda *args, **options: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        validate(denoiser, data, held, 8)


def test_more_held_out_images_than_draws_are_taken_from_all_classes():
    """``hold_out`` sorts by number, and so by class: the first 256 would be of the first classes only."""
    numbers = torch.arange(1000)
    data = ImageDataset(torch.zeros(1000, 1, 2, 2, dtype=torch.uint8), numbers, [], DataReport(), "")
    drawn = Validation(data, numbers, "l2").pictures.labels
    assert drawn is not None and len(drawn.unique()) == len(drawn) == QUARTERS * DRAWS
    for tenth in range(10):
        assert 10 < ((drawn // 100) == tenth).sum() < 45
    assert [len((drawn[quarter * DRAWS : (quarter + 1) * DRAWS] // 250).unique()) for quarter in range(QUARTERS)] == [4] * 4
