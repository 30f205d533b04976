"""Work that comes in pieces, of which each process of a job does its share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from ddpmctl.ranks import Ranks

Work = Callable[[Tensor], Tensor]
"""Of a piece (B, ...) on the CPU makes something for each of its rows, (B, ...) on the CPU too. It may raise a :class:`DdpmctlError`."""


def one_each(ranks: Ranks, work: Work, pieces: Sequence[Tensor] | None = None) -> list[Tensor] | None:
    """What ``work`` makes of ``pieces``, at most one for each process, in order; to be called in all of them.

    ``pieces``: in the process that leads, which alone gets what comes of them. None: there were no pieces.
    """
    given: Sequence[Tensor] = ranks.share(pieces) or ()
    own = work(given[ranks.rank]).contiguous() if ranks.rank < len(given) else None
    if own is not None and ranks.leads:
        others = enumerate(given[1:], start=1)
        return [own, *(ranks.receive(rank, (len(piece), *own.shape[1:]), own.dtype) for rank, piece in others)]
    if own is not None:
        ranks.send(own)
    return [] if given else None


def all_of(ranks: Ranks, work: Work, pieces: Sequence[Tensor]) -> Iterator[Tensor]:
    """What ``work`` makes of each of ``pieces``, in order, by the process that leads; the others :func:`help_out`."""
    for start in range(0, len(pieces), ranks.world):
        yield from one_each(ranks, work, pieces[start : start + ranks.world]) or ()


def help_out(ranks: Ranks, work: Work) -> None:
    """Do this one's share of all that comes, until the process that leads has :func:`let_go`."""
    while one_each(ranks, work) is not None:
        pass


def let_go(ranks: Ranks) -> None:
    """Say that nothing more comes, by the process that leads."""
    ranks.share(())
