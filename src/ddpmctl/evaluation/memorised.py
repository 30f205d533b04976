"""What was learnt by heart: the nearest training images of each sample, and how near they are for that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ddpmctl.errors import ConfigError
from ddpmctl.evaluation.features import to_rgb
from ddpmctl.images import enlarged, flat, to_pil
from ddpmctl.noise_demo.figure import Cell, Heading, Row
from ddpmctl.noise_demo.figure import draw as draw_figure
from ddpmctl.outputs import LONGEST_SIDE, MOST_PIXELS

QUANTILE = 0.01
"""Of the distances from held-out to training images: nearer than that is suspiciously near."""

MANY_HELD_OUT = 200
"""Below so many, that quantile is a guess."""

SHOWN = 3
_BLOCK = 1024
_SHORTEST = 72  # side of a picture in the figure, in pixels


class Nearest(NamedTuple):
    """Distances (N, k) and indices (N, k) of the nearest of a set, nearest first; of pixels in grey levels."""

    distances: Tensor
    indices: Tensor


def nearest(queries: Tensor, base: Tensor, k: int = SHOWN) -> Nearest:
    """The ``k`` nearest rows of ``base`` (M, ...) to each of ``queries`` (N, ...), by the root of the mean square.

    In blocks. Found by matrix products, whose rounding hides how near the nearest are; those are measured again.
    """
    k = min(k, len(base))
    found = []
    for first in range(0, len(queries), _BLOCK):
        some = queries[first : first + _BLOCK].flatten(1).float()
        best, index = torch.empty(len(some), 0), torch.empty(len(some), 0, dtype=torch.int64)
        for start in range(0, len(base), _BLOCK):
            block = base[start : start + _BLOCK].flatten(1).float()
            apart = torch.cdist(some, block)
            here = torch.arange(start, start + len(block)).expand(len(some), -1)
            best, index = torch.cat([best, apart], dim=1), torch.cat([index, here], dim=1)
            best, order = best.topk(min(k, best.shape[1]), largest=False)
            index = index.gather(1, order)
        apart = torch.stack([(some - base[ranked].flatten(1).float()).square().mean(dim=1).sqrt() for ranked in index.T], dim=1)
        best, order = apart.sort(dim=1)
        found.append((best, index.gather(1, order)))
    return Nearest(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def nearest_either_way(queries: Tensor, base: Tensor, k: int = SHOWN) -> Nearest:
    """:func:`nearest` to images (N, C, H, W) or to their mirror images, whichever is nearer; each of ``base`` once."""
    ways = [nearest(some, base, k) for some in (queries, queries.flip(-1))]
    distances, order = torch.cat([way.distances for way in ways], dim=1).sort(dim=1)
    indices = torch.cat([way.indices for way in ways], dim=1).gather(1, order)
    again = torch.stack([(indices[:, :i] == indices[:, i : i + 1]).any(dim=1) for i in range(indices.shape[1])], dim=1)
    once = again.int().sort(dim=1, stable=True).indices[:, : min(k, len(base))]
    return Nearest(distances.gather(1, once), indices.gather(1, once))


class Share(NamedTuple):
    """``share`` of the samples are nearer to a training image than ``threshold``, as 1 % of held-out images are.

    None where no image was held out.
    """

    share: float | None
    threshold: float | None


def suspicious(samples: Nearest, held: Nearest | None) -> Share:
    """The share of samples that are nearer to training images than the 1st percentile of held-out ones."""
    if held is None or not len(held.distances):
        return Share(None, None)
    threshold = float(held.distances[:, 0].quantile(QUANTILE))
    return Share(float((samples.distances[:, 0] < threshold).float().mean()), threshold)


def sheet(samples: Tensor, training: Tensor, by_pixels: Nearest, by_features: Nearest, title: str) -> Image.Image:
    """A row for each of ``samples`` uint8 (K, C, H, W): itself, then its nearest of ``training`` by pixels and features."""
    count = by_pixels.indices.shape[1]
    headings = [Heading("sample"), *(Heading(f"pixels {i + 1}") for i in range(count))]
    headings += [Heading(f"features {i + 1}") for i in range(count)]
    rows = []
    for i, sample in enumerate(samples):
        cells = [Cell(_picture(sample))]
        for found in (by_pixels, by_features):
            cells += _cells(training, found.indices[i].tolist(), found.distances[i].tolist())
        rows.append(Row(f"sample {i}", cells))
    return draw_figure(headings, rows, title=title)


def check_sheet(count: int, shape: tuple[int, int, int]) -> None:
    """Raise :class:`ConfigError` where a sheet of ``count`` samples of ``shape`` (C, H, W) is a picture too large to be made."""
    blank = torch.zeros(2, *shape, dtype=torch.uint8)
    near = Nearest(torch.zeros(2, SHOWN), torch.zeros(2, SHOWN, dtype=torch.int64))
    one, two = (sheet(blank[:rows], blank, near, near, "") for rows in (1, 2))
    row = two.height - one.height
    most = max(1, 1 + (min(LONGEST_SIDE, MOST_PIXELS // one.width) - one.height) // row)
    if count > most:
        size = f"{one.width:,} x {one.height + (count - 1) * row:,}"
        raise ConfigError(f"--sheet-of {count:,}: a picture of {size} pixels is too large to be made", f"give --sheet-of {most} or less")


def _cells(training: Tensor, indices: Sequence[int], distances: Sequence[float]) -> list[Cell]:
    return [
        Cell(_picture(training[index]), [f"{distance:.3g}"]) for index, distance in zip(indices, distances, strict=True)
    ]


def _picture(image: Tensor) -> Image.Image:
    return enlarged(flat(to_pil(to_rgb(image[None])[0])), max(1, -(-_SHORTEST // min(image.shape[1:]))))
