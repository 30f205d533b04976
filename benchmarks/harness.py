"""Contestants in processes of their own, timed by turns: what slows the machine for a while hits all alike."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from contestants import EVALUATORS, PRODUCTS, TRAINERS, Setting

ROUND = 1.0
"""Seconds of calls, at least one, in a turn."""


class Timed(NamedTuple):
    """Median seconds of one call, and the most memory that the process had, in bytes (of the GPU where there is one)."""

    seconds: float
    memory: int


class Server:
    """A contestant in a process of its own, warm and waiting."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name = name
        words = [sys.executable, str(Path(__file__)), name, json.dumps(setting)]
        # What the command line sets before torch is loaded; the rest is set by the contestant.
        ours = {"GOMP_SPINCOUNT": "10000"} if name.startswith("ddpmctl") else {}
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**ours, **os.environ}
        )
        self._read()

    def __call__(self) -> tuple[float, int]:
        """Seconds of one call, the mean of as many as fill :data:`ROUND`, and the peak of memory so far."""
        assert self._process.stdin
        print(file=self._process.stdin, flush=True)
        seconds, memory = self._read().split()
        return float(seconds), int(memory)

    def _read(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: ended with code {self._process.wait()}")
        return line

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def by_turns(names: Sequence[str], setting: Setting, *, rounds: int = 5) -> dict[str, Timed]:
    """Every contestant in turn, ``rounds`` times; two first calls are not counted."""
    servers = [Server(name, setting) for name in names]
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    for _ in range(rounds):
        for server in servers:
            found[server.name].append(server())
    for server in servers:
        server.close()
    return {
        name: Timed(statistics.median(seconds for seconds, _ in trials), trials[-1][1]) for name, trials in found.items()
    }


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def call_of(name: str, setting: Setting) -> Callable[[], object]:
    """One step of a trainer, one evaluation, or one product."""
    if name in TRAINERS:
        steps = TRAINERS[name](setting)
        return lambda: next(steps)
    return (EVALUATORS | PRODUCTS)[name](setting)


def main() -> None:
    """Serve one contestant: a line comes in, the time of a call and the memory go out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("setting", type=json.loads)
    given = parser.parse_args()
    setting = Setting(*given.setting)
    call, cuda = call_of(given.name, setting), setting.device.startswith("cuda")
    wait = torch.cuda.synchronize if cuda else lambda: None
    with without_gradients(given.name):
        for _ in range(2):
            call()
        wait()
        print("ready", flush=True)
        for _ in sys.stdin:
            call()  # others have had the caches since
            wait()
            start, calls = time.perf_counter(), 0
            while not calls or time.perf_counter() - start < ROUND:
                call()
                wait()
                calls += 1
            taken = (time.perf_counter() - start) / calls
            memory = torch.cuda.max_memory_allocated() if cuda else peak_memory()
            print(taken, memory, flush=True)


def peak_memory() -> int:
    """The most main memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the process had that started this one
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def without_gradients(name: str) -> torch.inference_mode:
    """Without gradients, unless training."""
    return torch.inference_mode(name not in TRAINERS)


if __name__ == "__main__":
    main()
