"""Several processes with one thread each against one process with as many threads: images a second of `ddpmctl train`.

    python benchmarks/ranks.py [PROCESSES] [--rounds 3] [--steps 40] [--config examples/conditional.yaml]

Rounds take turns, so that both see the same machine; the ratio is that of the medians. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
WARM = 2
"""Rows of metrics that are left out: the first steps find libraries and memory cold."""


def images_per_second(processes: int, threads: int, steps: int, config: Path) -> float:
    """The median over the rows of one short run."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        never = [f"--set=train.{key}=0" for key in ("sample_every", "val_every")]
        words = ["train", ROOT / "examples" / "fashion.zip", "-c", config, "--out", run, "--steps", steps, "--set=train.log_every=4",
                 "--set=train.samples=1", "--set=train.sample_steps=1", *never, "-q", "--devices", ",".join(["cpu"] * processes)]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run([sys.executable, "-m", "ddpmctl", *map(str, words)], check=True, env=env)
        with (run / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    return statistics.median(float(row["images_per_s"]) for row in rows[WARM:])


def main() -> None:
    """Measure, and print a line a round and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("processes", nargs="?", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "conditional.yaml")
    given = parser.parse_args()
    several, one = [], []
    for number in range(given.rounds):
        several.append(images_per_second(given.processes, 1, given.steps, given.config))
        one.append(images_per_second(1, given.processes, given.steps, given.config))
        print(f"round {number + 1}: {given.processes} processes {several[-1]:.1f}, one with as many threads {one[-1]:.1f} images/s", flush=True)
    print(f"ratio {statistics.median(several) / statistics.median(one):.2f}")


if __name__ == "__main__":
    main()
