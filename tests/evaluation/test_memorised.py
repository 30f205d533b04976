"""Nearest training images, and the share of samples that are suspiciously near."""

from __future__ import annotations

import pytest
import torch

from ddpmctl.errors import ConfigError
from ddpmctl.evaluation import memorised
from ddpmctl.evaluation.memorised import Nearest, check_sheet, nearest, nearest_either_way, sheet, suspicious
from ddpmctl.outputs import LONGEST_SIDE


def images(n: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [4, 1024])
def test_nearest_are_those_of_all_distances(monkeypatch, block):
    monkeypatch.setattr(memorised, "_BLOCK", block)
    queries, base = images(9, 0), images(13, 1)
    base[11] = queries[5]
    base[2] = queries[5]
    base[2, 0, 0, 0] += 1
    found = nearest(queries, base)
    apart = (queries[:, None].double() - base[None].double()).square().mean(dim=(2, 3, 4)).sqrt()
    exact, order = apart.sort(dim=1)
    torch.testing.assert_close(found.distances.double(), exact[:, :3], rtol=1e-6, atol=1e-6)
    assert torch.equal(found.indices, order[:, :3])
    assert found.indices[5, :2].tolist() == [11, 2] and found.distances[5, 0] == 0
    assert nearest(queries, base[:2]).indices.shape == (9, 2)


def test_mirror_images_are_found_where_they_are_looked_for():
    training, held = images(300, 0), images(100, 1)
    mirrored = training[:40].flip(-1)
    assert suspicious(nearest(mirrored, training), nearest(held, training, 1)).share < 0.2
    found = nearest_either_way(mirrored, training)
    assert suspicious(found, nearest_either_way(held, training, 1)).share == 1
    assert torch.equal(found.indices[:, 0], torch.arange(40)) and not found.distances[:, 0].any()
    both = torch.cat([training, training.flip(-1)])
    torch.testing.assert_close(nearest_either_way(held, training).distances[:, 0], nearest(held, both).distances[:, 0])
    symmetric = torch.cat([training[:5, ..., :2], training[:5, ..., :2].flip(-1)], dim=-1)
    assert all(len(set(row)) == 3 for row in nearest_either_way(symmetric, symmetric).indices.tolist())
    assert nearest_either_way(mirrored, training[:2]).indices.shape == (40, 2)


def test_share_of_samples_nearer_than_held_out_images():
    training, held = images(300, 0), images(100, 1)
    of_held = nearest(held, training, 1)
    copies = nearest(torch.cat([training[:30], images(70, 2)]), training)
    found = suspicious(copies, of_held)
    assert found.share is not None and 0.3 <= found.share < 0.36
    others = suspicious(of_held, of_held)
    assert others.share == pytest.approx(0.01)
    assert suspicious(copies, None) == (None, None)


def test_sheet_has_a_titled_row_for_each_sample():
    samples, training = images(4, 0), images(9, 1)
    near = nearest(samples, training)
    one, four = (sheet(samples[:count], training, near, near, "title") for count in (1, 4))
    assert four.width == one.width and four.height > one.height + 3 * 75
    few = Nearest(near.distances[:, :1], near.indices[:, :1])
    assert sheet(samples[:, :1], training[:, :1], few, few, "title").width < four.width


def test_a_sheet_that_no_program_shows_is_refused_before_anything_is_drawn():
    check_sheet(8, (3, 512, 512))
    with pytest.raises(ConfigError, match=r"--sheet-of 2,048: a picture of .* too large to be made") as found:
        check_sheet(2048, (3, 6, 5))
    most = int(found.value.advice.split()[2])
    check_sheet(most, (3, 6, 5))
    near = nearest(images(most + 1, 0), images(9, 1))
    heights = [sheet(images(count, 0), images(9, 1), near, near, "").height for count in (most, most + 1)]
    assert heights[0] <= LONGEST_SIDE < heights[1]
