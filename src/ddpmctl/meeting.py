"""How the processes of a job find each other, whoever started them."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from ddpmctl.errors import RanksError
from ddpmctl.ranks import TIMEOUT, Ranks
from ddpmctl.started import Started


@contextmanager
def joined(started: Started) -> Iterator[Ranks]:
    """This process among those that it was started with, until the block ends well.

    Raises :class:`RanksError` where they cannot be reached.
    """
    if not started.several:
        yield Ranks(started, job=_job(started))
        return
    if not dist.is_available():
        raise RanksError("this PyTorch was built without torch.distributed", "install one that has it, or use one process")
    try:
        rank, world = started.rank, started.world
        job = _store(started)
        corner = _corner(job, rank, world)
        dist.init_process_group("gloo", store=corner, rank=rank, world_size=world, timeout=TIMEOUT)
        ranks = Ranks(started, corner, job)
    except (RuntimeError, ValueError) as error:
        raise _unreachable(error) from error
    yield ranks
    with suppress(RanksError):  # all is done: who leaves first does not matter
        ranks.wait()
    dist.destroy_process_group()


def _job(started: Started) -> Any:
    """What torchrun keeps for a process that is alone; None where it cannot be had, and without torchrun."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not started.watched or not dist.is_available() or not port.isdecimal() or not _listens(host, int(port)):
        return None
    return _store(started)


def _store(started: Started) -> Any:
    """Where all processes find each other: kept by process 0, unless torchrun does. Raises ``RuntimeError``."""
    keeps = started.rank == 0 and not started.watched
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    for _ in _until_late():  # PyTorch's own waiting hears no signal, and writes its inside to stderr
        if keeps or _listens(host, port):
            break
    return dist.TCPStore(host, port, is_master=keeps, timeout=TIMEOUT, wait_for_workers=False)  # type: ignore[attr-defined]


def _listens(host: str, port: int) -> bool:
    """Whether somebody does there."""
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError:
        return False
    return True


def _corner(store: Any, rank: int, world: int) -> Any:
    """A part of ``store`` for the processes of this start alone: torchrun keeps one over restarts, with what the dead wrote.

    Raises ``RuntimeError`` where not all come.
    """
    name = f"ddpmctl/{uuid.uuid4().hex}"
    corner = _call(store, rank, name) if rank else _answer(store, world, name)
    return dist.PrefixStore(corner, store)  # type: ignore[attr-defined]


def _call(store: Any, rank: int, name: str) -> str:
    """Call process 0 by a ``name`` that was never used before, so that what it answers is no old answer."""
    store.set(f"ddpmctl/here/{rank}", name)
    for _ in _until_late():
        if store.check([f"{name}/answer"]):
            break
    corner: str = store.get(f"{name}/answer").decode()
    store.set(f"{corner}/in/{rank}", "")
    return corner


def _answer(store: Any, world: int, corner: str) -> str:
    """Answer who calls with the name of the ``corner``, until all are there; calls of the dead are answered in vain."""
    answered, missing = set[str](), set(range(1, world))
    for _ in _until_late():
        missing = {rank for rank in missing if not store.check([f"{corner}/in/{rank}"])}
        if not missing:
            break
        here = [f"ddpmctl/here/{rank}" for rank in missing]
        callers = {store.get(key).decode() for key in here if store.check([key])}
        for caller in callers - answered:
            store.set(f"{caller}/answer", corner)
        answered |= callers
    return corner


def _until_late() -> Iterator[None]:
    """A hundred times a second; raises ``RuntimeError`` when it is too late. Signals are heard in between."""
    end = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < end:
        yield
        time.sleep(0.01)
    raise RuntimeError(f"not all came within {TIMEOUT.total_seconds() // 60:.0f} minutes")


def _unreachable(error: Exception) -> RanksError:
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if "EADDRINUSE" in str(error) or "in use" in str(error):
        return RanksError(f"{place}: the port is in use", "give another MASTER_PORT; torchrun --standalone finds one by itself")
    return RanksError(f"{place}: the other processes cannot be reached: {' '.join(str(error).split())[:160]}",
                      "check MASTER_ADDR, and that as many processes were started as WORLD_SIZE says")  # fmt: skip
