"""A command in several processes: who speaks, and how ``--devices`` starts them."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from ddpmctl.cli import console
from ddpmctl.errors import ConfigError, DeviceError, Exit
from ddpmctl.parsing import parse_devices
from ddpmctl.started import how_started
from ddpmctl.stopping import SIGNALS

if TYPE_CHECKING:
    from ddpmctl.ranks import Ranks

COMMANDS = ("train", "sample", "evaluate")
"""Those that several processes share; of any other command the first process alone does something."""


class _Process:
    """This process. ``args``: its command line, as :func:`ddpmctl.cli.main` was given it."""

    args: Sequence[str] = ()
    joined = False


def remember(args: list[str]) -> None:
    """What :func:`spread_over` is to start again."""
    _Process.args = args


def follows() -> bool:
    """Whether another process of the same job leads, as far as can be told before the environment is checked."""
    return os.environ.get("RANK", "0") not in ("", "0") and os.environ.get("WORLD_SIZE", "1") not in ("", "1")


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among all of its job. Within it, and after, the first to fail says why, and no other does."""
    from ddpmctl import meeting

    started = how_started()
    if started.rank:  # what only this one meets before it has joined the others, it says itself
        console.give_voice(lambda: f"process {started.rank}")
    with meeting.joined(started) as mine:
        if mine.world > 1:
            _Process.joined = True
            console.give_voice(lambda: ("" if mine.leads else mine.name()) if mine.speaks() else None)
        yield mine


def several() -> bool:
    """Whether this process has joined others."""
    return _Process.joined


def leave(code: int) -> None:
    """End this process at once, if it was one of several.

    Threads of PyTorch may still let go of what they had; in an interpreter that is taking itself apart they would abort it.
    """
    if _Process.joined:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, AttributeError):  # nobody listens, or it was closed before
                stream.flush()
        os._exit(code)


def devices_of(text: str | None, device: str | None) -> tuple[str, ...]:
    """The devices of ``--devices``; none where it is not given. Raises :class:`ConfigError`, also beside ``--device``."""
    if text is None:
        return ()
    if device is not None:
        raise ConfigError(f"--device {device}: not with --devices {text}", "leave one of the two out")
    try:
        names = parse_devices(text)
    except ValueError as error:
        raise ConfigError(f"--devices: {error}", "such as --devices 0,1 or all or cpu,cpu") from error
    if names == ("all",):
        import torch

        names = tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
        if not names:
            raise DeviceError("--devices all: no GPU on this machine", "leave it out, or give --devices cpu,cpu")
    return names


def spread_over(devices: tuple[str, ...]) -> int | None:
    """The same command in a process for each of ``devices``, and their exit code; None: this is one of those, or alone."""
    if len(devices) < 2 or how_started().several:
        return None
    from ddpmctl.build import resolve_device

    for name in devices:
        try:
            resolve_device(name)
        except DeviceError as error:
            raise DeviceError(f"--devices: {name} is not on this machine", error.advice.partition(";")[0]) from error
    return _run(len(devices))


def _run(count: int) -> int:
    import logging

    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # each process says what there is to say
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, (os.cpu_count() or 1) // count)
    shared = {
        "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or threads,
    }  # fmt: skip
    envs = {i: {key: str(value) for key, value in {**shared, "RANK": i, "LOCAL_RANK": i}.items()} for i in range(count)}
    before = {n: signal.getsignal(n) for n in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name))}
    with tempfile.TemporaryDirectory(prefix="ddpmctl-") as logs:
        context = start_processes(
            "ddpmctl", sys.executable, dict.fromkeys(range(count), ("-m", "ddpmctl", *_Process.args)), envs, DefaultLogsSpecs(logs)
        )

        def pass_on(number: int, frame: FrameType | None) -> None:
            for pid in context.pids().values():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

        # They are in sessions of their own, so Ctrl-C comes here only. What is ignored, as with nohup, stays so.
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if handler == signal.SIG_IGN else pass_on)
        try:
            result = context.wait(period=0.1)
        finally:
            context.close()
            for number, handler in before.items():
                signal.signal(number, handler)
    failed = {rank: failure.exitcode for rank, failure in (result.failures if result else {}).items()}
    for rank, code in failed.items():
        if code < 0 and -code != signal.SIGTERM:  # which ends the others once one has failed
            console.warn(f"process {rank} of {count} was ended by {signal.Signals(-code).name}")
    # Of those that only say that another one has ended, none is the reason.
    reasons = [code for code in failed.values() if code > 0 and code != Exit.RANKS]
    code = reasons[0] if reasons else failed.get(0, next(iter(failed.values()), 0))
    return code if code >= 0 else Exit.RANKS
