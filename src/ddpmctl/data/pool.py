"""Work on many files in threads, in order and with bounded memory; or by programs of our own."""

from __future__ import annotations

import marshal
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def worker_count(workers: int | Literal["auto"]) -> int:
    """Threads to use; auto: one for each core that this process may use."""
    if workers != "auto":
        return workers
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int | Literal["auto"],
    *,
    ahead: int = 8,
    at_end: Callable[[], object] = lambda: None,
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` in the order of ``items``; only a few, ``ahead`` a thread, are under way or waiting at any time.

    ``at_end`` is called before those that are then under way are waited for, also where it ends early. Raises what ``function``
    raises. Close it (``contextlib.closing``) when leaving early.
    """
    count = worker_count(workers)
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="decode") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= ahead * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            at_end()
            for future in waiting:
                future.cancel()


def elsewhere(program: str, *request: Any) -> bytes:
    """What the Python file ``program`` answers when ``request`` is given to it on stdin, in a process of its own.

    Empty where none can be started, or it fails.
    """
    if not sys.executable:  # Python within another program
        return b""
    command = [sys.executable, "-I", "-S", program]
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as helper:
            assert helper.stdin and helper.stdout
            # It reads to the end before it writes. (communicate() hands over 512 bytes at a time.)
            helper.stdin.write(marshal.dumps(request))
            helper.stdin.close()
            answer = helper.stdout.read()
    except OSError:
        return b""
    return b"" if helper.returncode else answer
