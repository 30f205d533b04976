"""A sample that all processes of a job make, batch by batch in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddpmctl.images import to_uint8
from ddpmctl.ranks import Ranks
from ddpmctl.sampling import Generated


class Made(NamedTuple):
    """Images of a sample at level ``t``, finished at 0: uint8 (B, C, H, W), None on the way unless all states are asked for.

    ``steps``: how many of the sampler's this stands for.
    """

    images: range
    t: int
    pixels: Tensor | None
    steps: int = 1


def made_by_all(
    ranks: Ranks,
    n: int,
    batch_size: int,
    walk: Callable[[range, int, Callable[[int], object]], Iterator[Generated]],
    steps: int,
    *,
    every_state: bool = False,
    on_smaller: Callable[[int], object] = lambda batch_size: None,
) -> Iterator[Made]:
    """``n`` images in order, ``batch_size`` at a time, by all processes in turn; only the one that leads yields any.

    ``walk(images, batch_size, on_smaller)``: makes images of these numbers, in ``steps`` steps, as :func:`generate` does;
    where it takes fewer at once, the next ones begin with as few. ``every_state``: what is on the way has pixels too. To be
    called in all processes; in memory is one batch, wherever it is made.
    """
    size, at_once = min(batch_size, ranks.most(n)), batch_size

    def smaller(fewer: int) -> None:
        nonlocal at_once
        at_once = fewer
        on_smaller(fewer)

    for number, start in enumerate(range(0, n, size)):
        batch, whose = range(start, min(start + size, n)), number % ranks.world
        if whose == ranks.rank:
            own = (_made(done, every_state) for done in walk(batch, at_once, smaller))
            if ranks.leads:
                yield from own
            else:
                _send(ranks, [one for one in own if one.pixels is not None])
        elif ranks.leads:
            yield from _received(ranks, whose, steps, every_state)


def _made(done: Generated, every_state: bool) -> Made:
    wanted = every_state or done.state.t == 0
    return Made(done.images, done.state.t, to_uint8(done.state.x_t).cpu() if wanted else None)


def _send(ranks: Ranks, batch: Sequence[Made]) -> None:
    for one in batch:
        assert one.pixels is not None
        ranks.send(torch.tensor([one.images.start, one.t, *one.pixels.shape]))
        ranks.send(one.pixels.contiguous())
    ranks.send(torch.full((6,), -1))


def _received(ranks: Ranks, whose: int, steps: int, every_state: bool) -> Iterator[Made]:
    while True:
        start, t, *shape = ranks.receive(whose, (6,), torch.int64).tolist()
        if start < 0:
            return
        pixels = ranks.receive(whose, shape, torch.uint8)
        yield Made(range(start, start + shape[0]), t, pixels, 1 if every_state else steps)
