"""Batches: every image once an epoch, a pure function of (seed, step), exact values."""

from __future__ import annotations

import pytest
import torch

from ddpmctl.data.batches import Batches
from ddpmctl.data.dataset import ImageDataset
from ddpmctl.data.report import DataReport


def numbered(count: int, labels: bool = False, width: int = 3) -> ImageDataset:
    """Image n holds n in its first pixel and 0, 1, 2, ... along the last row."""
    images = torch.zeros(count, 1, 2, width, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(count, dtype=torch.uint8)
    images[:, 0, 1] = torch.arange(width, dtype=torch.uint8)
    return ImageDataset(images, torch.arange(count) * 10 if labels else None, [], DataReport(), "")


def seen(batches: Batches, steps: range) -> list[int]:
    return torch.cat([(batches(step).x0[:, 0, 0, 0] + 1) * 127.5 for step in steps]).round().int().tolist()


def test_values_are_exact() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x0 = Batches(ImageDataset(images, None, [], DataReport(), ""), 1, seed=0)(1).x0
    assert x0.dtype == torch.float32 and x0.min() == -1 and x0.max() == 1
    assert torch.equal(x0.flatten(), torch.arange(256, dtype=torch.float32) / 127.5 - 1)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 25])
def test_each_image_once_an_epoch(batch_size: int) -> None:
    order = seen(Batches(numbered(10), batch_size, seed=1), range(1, 121))
    epochs = [order[start : start + 10] for start in range(0, len(order) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_batch_size_does_not_change_the_order() -> None:
    fours, sixes = Batches(numbered(10), 4, seed=1), Batches(numbered(10), 6, seed=1)
    assert seen(fours, range(1, 16)) == seen(sixes, range(1, 11))


def test_seeds_differ() -> None:
    one, two = Batches(numbered(50), 50, seed=1), Batches(numbered(50), 50, seed=2)
    assert seen(one, range(1, 2)) != seen(two, range(1, 2))


def test_a_step_is_the_same_whatever_came_before() -> None:
    data = numbered(10, labels=True)
    straight = Batches(data, 4, seed=3, hflip=True)
    batches = [straight(step) for step in range(1, 30)]
    jumping = Batches(data, 4, seed=3, hflip=True)
    for step in (29, 3, 3, 17, 8, 1):
        again = jumping(step)
        assert torch.equal(again.x0, batches[step - 1].x0)
        assert again.label is not None and torch.equal(again.label, batches[step - 1].label)


def test_labels_go_with_their_images() -> None:
    batch = Batches(numbered(10, labels=True), 7, seed=0)(5)
    assert batch.label is not None and batch.label.dtype == torch.int64
    assert (((batch.x0[:, 0, 0, 0] + 1) * 127.5).round() * 10).int().tolist() == batch.label.tolist()
    assert Batches(numbered(10), 7, seed=0)(5).label is None


def test_flips_mirror_about_half_of_the_samples_exactly() -> None:
    data = numbered(100)
    before = data.images.clone()
    flipped, plain = Batches(data, 500, seed=5, hflip=True), Batches(data, 500, seed=5)
    masks = []
    for step in (1, 2):
        mirrored, straight, mask = flipped(step).x0, plain(step).x0, flipped.flips(step)
        assert torch.equal(mirrored[mask], straight[mask].flip(-1))
        assert torch.equal(mirrored[~mask], straight[~mask])
        assert not torch.equal(mirrored[mask], straight[mask])
        assert 200 < mask.sum() < 300
        masks.append(mask)
    assert not torch.equal(*masks)
    assert torch.equal(data.images, before)  # the data itself stays as it is


def test_epoch_of() -> None:
    batches = Batches(numbered(10), 4, seed=0)
    assert batches.epoch_of(0) == 0 and batches.epoch_of(5) == 2
    assert batches.epoch_of(1) == pytest.approx(0.4)


def test_wrong_steps_and_sizes() -> None:
    with pytest.raises(ValueError, match="from 1"):
        Batches(numbered(3), 2, seed=0)(0)
    with pytest.raises(ValueError, match="positive"):
        Batches(numbered(3), 0, seed=0)
