"""Distances between two sets of features, computed by torch-fidelity: ``pip install 'ddpmctl[metrics]'``."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ddpmctl.errors import DataError

NEIGHBOURS = 3
FEWEST = NEIGHBOURS + 2
SUBSETS, SUBSET_SIZE = 100, 1000
"""Of KID, as torch-fidelity has it; sets of fewer than twice as many are halved, so that subsets differ."""

KID_IMAGES = 2048
"""Below so many, KID is spread too widely to tell good models apart."""

FRECHET_IMAGES = 10
"""Times the number of features: below, the covariances of the Frechet distance are poorly known, and it comes out too large."""


class Distances(NamedTuple):
    """How far generated features are from real ones.

    ``kid``, ``kid_spread``: mean and standard deviation of the squared MMD over ``subsets`` pairs of ``subset_size``
    images, 0 on average for sets of one kind, and below it by chance, or where both hold the same images. ``frechet``: between Gaussians of the same means and
    covariances. ``precision``: share of generated images among the real; ``recall``: of real images among the generated.
    """

    kid: float
    kid_spread: float
    subsets: int
    subset_size: int
    frechet: float
    precision: float
    recall: float


def distances(generated: Tensor, real: Tensor, *, seed: int = 0) -> Distances:
    """All distances between features (N, D) and (M, D), in float64; ``seed`` picks the subsets of KID.

    Raises :class:`DataError` for sets of fewer than 5 images.
    """
    fewest = min(len(generated), len(real))
    check_enough(fewest)
    generated, real = generated.double().cpu(), real.double().cpu()
    size = min(SUBSET_SIZE, fewest // 2)
    return Distances(
        *kid(generated, real, size, seed), SUBSETS, size, frechet(generated, real), *precision_recall(generated, real)
    )


def check_enough(n: int, of: str = "") -> None:
    """Raise :class:`DataError` where ``n`` images cannot be compared with others: a third neighbour, and two halves.

    ``of``: whose they are, for the error.
    """
    if n < FEWEST:
        raise DataError(f"{f'{of}: ' if of else ''}{n} images are too few to compare", f"give {FEWEST} or more")


def kid(generated: Tensor, real: Tensor, size: int, seed: int) -> tuple[float, float]:
    """Mean and standard deviation over subsets of ``size``. Binkowski et al. 2018: unbiased, kernel (x y / D + 1)^3."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    found = kid_features_to_metric(
        generated, real, kid_subsets=SUBSETS, kid_subset_size=size, rng_seed=seed % 2**32, verbose=False
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def frechet(generated: Tensor, real: Tensor) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of means and covariances. Heusel et al. 2017."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    moments = [fid_features_to_statistics(features) for features in (generated, real)]
    return float(fid_statistics_to_metric(*moments, verbose=False)[KEY_METRIC_FID])


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Shares within the balls that reach to the third neighbour. Kynkaanniemi et al. 2019, algorithm 1."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    # In parts of a thousand: the table of all distances would grow with the square of the images.
    found = prc_features_to_metric(
        generated, real, prc_neighborhood=NEIGHBOURS, prc_batch_size=1000, save_cpu_ram=True, verbose=False
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def doubts(n: int, m: int, dimension: int) -> list[str]:
    """What to beware of in the distances between ``n`` and ``m`` images of ``dimension`` features."""
    fewest, found = min(n, m), []
    if fewest < KID_IMAGES:
        found.append(f"KID of {fewest:,} images is spread widely: {KID_IMAGES:,} of each tell models apart")
    if fewest < FRECHET_IMAGES * dimension:
        found.append(
            f"the Frechet distance of {fewest:,} images in {dimension:,} dimensions comes out too large (fewer than "
            f"{FRECHET_IMAGES * dimension:,}): compare it only with one of as many images"
        )
    return found
