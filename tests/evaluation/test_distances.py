"""Distances where the answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddpmctl.errors import DataError
from ddpmctl.evaluation.distances import distances, doubts, kid

pytest.importorskip("torch_fidelity")


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(features: Tensor, mean: Tensor, root: Tensor) -> Tensor:
    """``features`` moved so that their sample mean is ``mean`` and their sample covariance root root^T."""
    centred = features - features.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(centred.T)), centred.T, upper=False)
    return mean + (root @ white).T


def test_equal_sets_are_at_no_distance():
    features = normal(400, 8, 0)
    found = distances(features, features)
    # Two halves of one set share images, each as near to itself as can be: a little below 0. Two sets do not.
    assert -0.1 < found.kid < 0
    other = distances(features, normal(400, 8, 1))
    assert other.kid == pytest.approx(0, abs=3 * other.kid_spread) and abs(other.kid) < 0.05
    assert found.frechet == pytest.approx(0, abs=1e-6)
    assert (found.precision, found.recall) == (1, 1)
    assert (found.subsets, found.subset_size) == (100, 200)


def test_disjoint_sets_share_nothing():
    found = distances(normal(50, 8, 0), normal(60, 8, 1) + 100)
    assert (found.precision, found.recall) == (0, 0)
    assert found.kid > 1000


def test_precision_is_of_the_generated_and_recall_of_the_real():
    one_mode = normal(200, 4, 0)
    two_modes = torch.cat([normal(200, 4, 1), normal(200, 4, 2) + 50])
    found = distances(one_mode, two_modes)
    assert found.precision > 0.9 and 0.4 < found.recall <= 0.5
    found = distances(two_modes, one_mode)
    assert 0.4 < found.precision <= 0.5 and found.recall > 0.9


def test_kid_of_two_gaussians_is_the_closed_form():
    """x ~ N(0, 1), y ~ N(b, 1), beside a coordinate of zeros: the kernel is (xy/2 + 1)^3, and E (xy)^k = M_k M_k'."""
    b = 0.5
    zeros = torch.zeros(8000, 1, dtype=torch.float64)
    x = torch.cat([normal(8000, 1, 0), zeros], dim=1)
    y = torch.cat([normal(8000, 1, 1) + b, zeros], dim=1)
    exact = 3 / 2 * b**2 + 3 / 4 * b**4 + 1 / 8 * (b**3 + 3 * b) ** 2
    assert kid(x, y, 500, 0)[0] == pytest.approx(exact, rel=0.1)
    few = [kid(x[:200], y[:200], 50, seed)[0] for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]


def test_frechet_between_gaussians_is_the_closed_form():
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    first = torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 0.5, 3]], dtype=torch.float64)
    second = torch.tensor([[1.0, 0, 0], [-1, 2, 0], [0.3, 0, 0.5]], dtype=torch.float64)
    a, b = exactly(normal(300, 3, 0), 0 * mean, first), exactly(normal(200, 3, 1), mean, second)
    # tr (S1 + S2 - 2 (S1 S2)^(1/2)) is tr S1 + tr S2 less twice the sum of the singular values of R1^T R2.
    overlap = torch.linalg.svdvals(first.T @ second).sum()
    exact = mean.square().sum() + first.square().sum() + second.square().sum() - 2 * overlap
    assert distances(a, b).frechet == pytest.approx(float(exact), rel=1e-8)


@pytest.mark.parametrize(("n", "count"), [(100, 2), (2048, 1), (12_800, 0)])
def test_few_images_are_told(n, count):
    assert len(doubts(n, 20_000, 1280)) == len(doubts(20_000, n, 1280)) == count


def test_too_few_to_compare():
    with pytest.raises(DataError, match="4 images are too few"):
        distances(normal(4, 3, 0), normal(9, 3, 0))
