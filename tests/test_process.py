"""What the program sets for its own process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """\
import os, resource, sys
from ddpmctl import process
if "tuned" in sys.argv:
    process.tune()
import torch
def step():
    return [torch.ones(12_000_000) for _ in range(2)]
for _ in range(20):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, os.environ.get("GOMP_SPINCOUNT"))
"""


def run(*words: str, **environment: str) -> list[str]:
    """What the program above prints."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GOMP_", "OMP_WAIT"))}
    command = [sys.executable, "-c", FAULTS, *words]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is of glibc")
def test_memory_of_large_tensors_is_kept_for_the_next_ones():
    usual, tuned = run(), run("tuned")
    assert int(usual[0]) > 1000  # pages that the system clears, 96 MB in each of twenty rounds
    assert int(tuned[0]) < int(usual[0]) // 4  # now and then a small object sits where a tensor was, and the store grows by one
    assert tuned[1] == "10000"


def test_what_the_user_has_set_stays():
    faults, spin = run("tuned", MALLOC_MMAP_THRESHOLD_="1000000", GOMP_SPINCOUNT="5")
    assert spin == "5"
    assert sys.platform != "linux" or int(faults) > 1000
