"""Work that comes in pieces, of which each process of a job does its share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps

import torch
from torch import Tensor

from ddpmctl.memory import free_cached, out_of_memory
from ddpmctl.ranks import Ranks, Word

Work = Callable[[Tensor], Tensor]
"""Of a piece (B, ...) on the CPU makes something for each of its rows, (B, ...) on the CPU too. It may raise a :class:`DdpmctlError`."""


def rounds(ranks: Ranks, word: Word, work: Work, pieces: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """What ``work`` makes of ``pieces``, in order, by the process that leads: in each round a piece for each process.

    The others learn by ``word`` what they are to make of theirs, and listen between rounds: something else may come then.
    Pieces do not depend on how many processes there are, and so neither does what comes of them.
    """
    for start in range(0, len(pieces), ranks.world):
        ranks.tell(word)
        yield one_each(ranks, work, pieces[start : start + ranks.world])


def one_each(ranks: Ranks, work: Work, pieces: Sequence[Tensor] = ()) -> list[Tensor]:
    """What ``work`` makes of ``pieces``, at most one for each process, in order; to be called in all of them.

    ``pieces``: in the process that leads, which alone gets what comes of them.
    """
    given = ranks.share(pieces)
    own = work(given[ranks.rank]).contiguous() if ranks.rank < len(given) else None
    if own is not None and ranks.leads:
        others = enumerate(given[1:], start=1)
        return [own, *(ranks.receive(rank, (len(piece), *own.shape[1:]), own.dtype) for rank, piece in others)]
    if own is not None:
        ranks.send(own)
    return []


def help_out(ranks: Ranks, works: Mapping[Word, Work]) -> None:
    """Do this one's share of all that comes, until the process that leads says that it is the end."""
    while (word := ranks.listen()[0]) != Word.END:
        one_each(ranks, works[word])


def as_fits(work: Work, device: torch.device) -> Work:
    """``work``, but with fewer rows at once from where memory runs out on ``device``.

    Raises the device's own error when one row is too much.
    """
    most: int | None = None

    @wraps(work)
    def careful(piece: Tensor) -> Tensor:
        nonlocal most
        parts, done = [], 0
        while done < len(piece):
            part = piece[done : done + (most or len(piece))]
            try:
                parts.append(work(part))
                done += len(part)
                continue
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or len(part) == 1:
                    raise
            # Out of the handler, whose error still holds what the failed attempt had in memory.
            most = len(part) // 2
            free_cached(device.type)
        return torch.cat(parts)

    return careful
