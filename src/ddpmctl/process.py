"""What the program sets for its own process before torch is loaded, since the usual values are slow for training."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of ``mallopt``: from <malloc.h> of glibc."""


def tune() -> None:
    """Set how threads wait and how memory is given back; what the user has set by environment stays."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        # How long a thread that waits for others keeps its core (read when torch is loaded). With the library's own
        # choice one busy neighbour slows training on two cores 29 times; with this one 9 times, and it costs 7 %
        # on an idle machine. Giving the core up at once (PASSIVE): 4 times, but 60 % on an idle machine.
        os.environ["GOMP_SPINCOUNT"] = "10000"
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        _keep_memory()


def _keep_memory() -> None:
    """Large tensors go back to the program's own store, not to the system, which clears every page that it hands out again.

    A training step on a CPU makes and drops thousands of them; without page faults it takes 6 % less time (small
    network; 1 to 2 % of that of the CIFAR-10 file), and the peak of memory is the same.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc; others have their own ways
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
