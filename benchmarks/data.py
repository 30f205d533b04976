"""Is the data side as fast as the machine allows? Each figure beside its yardstick, taken by turns in one run.

    python benchmarks/data.py            # makes 2,000 photographs and a folder of a million files: 15 minutes, 6 GB
    python benchmarks/data.py --small    # a tenth of the photographs, a fiftieth of the files: 2 minutes

Everything is made in a folder of its own (``--work``, else a temporary one) and removed in the end. Prints a Markdown
table; ``rows()`` returns it.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ddpmctl.build import build_denoiser, build_ema, build_net, build_optimizer, place
from ddpmctl.config import RunConfig
from ddpmctl.data.batches import Batches
from ddpmctl.data.dataset import ImageDataset, load_images
from ddpmctl.data.pool import worker_count
from ddpmctl.data.scan import find_images
from ddpmctl.data.survey import survey
from ddpmctl.runfile import flag_layer, read_run_file, resolve
from ddpmctl.training import TrainState, train_steps

HEADER = ["what", "measured", "yardstick", "ratio or limit", "target", "met"]
ROOT = Path(__file__).parents[1]
SMALL_NET = ROOT / "examples" / "conditional.yaml"
SIZE = 64


class Scale(NamedTuple):
    """How much of everything."""

    photographs: int = 2000
    files: int = 1_000_000
    samples: int = 50_000
    steps: int = 60
    trials: int = 5


SMALL = Scale(photographs=200, files=20_000, samples=5_000, steps=20, trials=3)


# ---------------------------------------------------------------- things to measure on


def photograph(seed: int) -> Image.Image:
    """1024 x 768 with the spectrum of nature, 1/f in amplitude, and some shapes with edges."""
    random = np.random.default_rng(seed)
    height, width = 768, 1024
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = random.standard_normal((3, height, width // 2 + 1)) + 1j * random.standard_normal((3, height, width // 2 + 1))
    mixed = np.array([[1, 0.3, 0], [1, 0, 0.3], [1, -0.3, -0.3]]) @ noise.reshape(3, -1)  # grey, and a little colour
    planes = np.fft.irfft2(mixed.reshape(noise.shape) / frequency, s=(height, width))
    pixels = 128 + 45 * planes / planes.std()
    rows, columns = np.mgrid[:height, :width]
    for _ in range(6):
        y, x, radius = random.integers(height), random.integers(width), random.integers(30, 160)
        inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        pixels[:, inside] = 0.4 * pixels[:, inside] + 0.6 * random.integers(0, 256, (3, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))


_VIEWS = 20


def _save_photographs(job: tuple[str, int, int]) -> None:
    folder, scene, views = job
    pixels = np.asarray(photograph(scene))
    for view in range(views):
        moved = np.roll(pixels, (37 * view, 53 * view), axis=(0, 1))
        Image.fromarray(moved).save(f"{folder}/{scene:04d}-{view:02d}.jpg", quality=90)


def make_photographs(folder: Path, count: int) -> None:
    """JPEGs of quality 90: scenes, and each of them moved round by some pixels for the next ones."""
    folder.mkdir()
    with get_context("spawn").Pool(worker_count("auto")) as pool:
        pool.map(_save_photographs, [(str(folder), start, min(_VIEWS, count - start)) for start in range(0, count, _VIEWS)])


def make_files(folder: Path, count: int) -> None:
    """Tiny PNGs and JPEGs of 200 pictures, each file with a content of its own, a thousand to a folder."""
    random, models = np.random.default_rng(0), []
    for number in range(200):
        image, kept = Image.fromarray(random.integers(0, 256, (8 + number % 8, 12, 3), dtype=np.uint8)), io.BytesIO()
        image.save(kept, ("PNG", "JPEG")[number % 2])
        models.append(kept.getvalue())
    for number in range(count):
        if number % 1000 == 0:
            place = folder / f"class-{number // 1000:04d}"
            place.mkdir(parents=True)
        path = f"{place}/{number:07d}.{('png', 'jpg')[number % 2]}"
        with open(path, "xb", buffering=0) as file:  # noqa: PTH123 - a million times
            file.write(models[number % 200] + number.to_bytes(4, "big"))  # readers stop before it


# ---------------------------------------------------------------- measuring


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def by_turns(trials: int, *works: Callable[[], float]) -> list[list[float]]:
    """Each of ``works`` once, then each again: what slows the machine for a while hits all alike. (works, trials)"""
    found = [[work() for work in works] for _ in range(trials)]
    return [list(column) for column in zip(*found, strict=True)]


@contextmanager
def cache_in(folder: Path):
    """The cache of decoded images is ``folder``."""
    before = os.environ.get("DDPMCTL_CACHE")
    os.environ["DDPMCTL_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("DDPMCTL_CACHE") if before is None else os.environ.update(DDPMCTL_CACHE=before)


def command(*words: str, limit: float = 3600) -> tuple[float, int, str]:
    """Seconds, most memory in bytes, and stdout of ``ddpmctl WORDS`` in a process of its own."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([sys.executable, "-m", "ddpmctl", *words], stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        taken = time.perf_counter() - start
        out.seek(0)
        text = out.read().decode()
    if process.returncode:
        raise RuntimeError(f"ddpmctl {' '.join(words)}: code {process.returncode}\n{text}")
    return taken, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), text


def row(what: str, measured: str, yardstick: str, value: float, target: float, *, at_least: bool, unit: str = "") -> list[str]:
    """A line of the table."""
    sign, met = (">=", value >= target) if at_least else ("<=", value <= target)
    return [what, measured, yardstick, f"{value:.3g}{unit}", f"{sign} {target:g}{unit}", "yes" if met else "no"]


# ---------------------------------------------------------------- rows


def _with_draft(path: str) -> int:
    with Image.open(path) as image:
        image.draft(None, (2 * SIZE, 2 * SIZE))
        box = ((image.width - image.height) / 2, 0, (image.width + image.height) / 2, image.height)
        return image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0).width


def _without_draft(path: str) -> int:
    with Image.open(path) as image:
        box = ((image.width - image.height) / 2, 0, (image.width + image.height) / 2, image.height)
        return image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0).width


def first_pass(work: Path, scale: Scale) -> list[list[str]]:
    """Decoding photographs into an empty cache, against loops over Pillow in a process for each core."""
    photographs, kept = work / "photographs", work / "cache-first"
    paths = sorted(map(str, photographs.iterdir()))
    config = RunConfig().data.model_copy(update={"size": (SIZE, SIZE)})

    def ours() -> float:
        shutil.rmtree(kept, ignore_errors=True)
        with cache_in(kept):
            return seconds(lambda: load_images(config, photographs))

    def loop(decode: Callable[[str], int]) -> Callable[[], float]:
        def theirs() -> float:
            with get_context("spawn").Pool(worker_count("auto")) as pool:  # gone when it is our turn
                pool.map(decode, paths[:64])  # started, and Pillow loaded
                return seconds(lambda: pool.map(decode, paths, chunksize=16))

        return theirs

    times = by_turns(scale.trials, ours, loop(_with_draft), loop(_without_draft))
    mine, draft, plain = (len(paths) / statistics.median(column) for column in times)
    text = f"first pass over {len(paths):,} photographs of 1024x768 at {SIZE}x{SIZE}"
    return [
        row(text, f"{mine:.0f} images/s", f"{draft:.0f} images/s: Pillow with draft mode, all cores", mine / draft, 0.9, at_least=True),
        row(text, f"{mine:.0f} images/s", f"{plain:.0f} images/s: Pillow without draft mode, all cores", mine / plain, 0.9, at_least=True),
    ]  # fmt: skip


class Training:
    """The real steps of training with the network of examples/conditional.yaml, on ``dataset``."""

    def __init__(self, dataset: ImageDataset) -> None:
        config = resolve(read_run_file(SMALL_NET), flag_layer({"data.size": SIZE, "data.hflip": True, "data.conditional": False, "train.steps": 10**6}))
        torch.manual_seed(0)
        net = place(build_net(config, dataset.channels, 0), torch.device("cpu"))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        state = TrainState(net, build_ema(config, net), build_optimizer(config, net), scaler)
        self.batches = Batches(dataset, config.train.batch_size, 0, hflip=True)
        self.steps = train_steps(state, build_denoiser(config, net, None), self.batches, config)
        next(self.steps)

    def run(self, count: int) -> float:
        """Steps a second, over ``count`` steps."""
        return count / seconds(lambda: [next(self.steps) for _ in range(count)])


def training(work: Path, scale: Scale) -> list[list[str]]:
    """Steps from the cache against steps on the same tensors in memory; and what a batch alone takes."""
    config = RunConfig().data.model_copy(update={"size": (SIZE, SIZE)})
    with cache_in(work / "cache-first"):
        mapped = load_images(config, work / "photographs")
    from_cache, in_memory = Training(mapped), Training(replace(mapped, images=mapped.images.clone()))
    ours, yardstick = by_turns(scale.trials, lambda: from_cache.run(scale.steps), lambda: in_memory.run(scale.steps))
    mine, theirs = statistics.median(ours), statistics.median(yardstick)
    count = 200
    batch = statistics.median(
        seconds(lambda: [from_cache.batches(step) for step in range(1, count)]) / (count - 1) for _ in range(scale.trials)
    )
    return [
        row("training after the first pass, no loader workers", f"{mine:.2f} steps/s", f"{theirs:.2f} steps/s: tensors in memory",
            statistics.median(a / b for a, b in zip(ours, yardstick, strict=True)), 0.97, at_least=True),
        row("a batch gathered, mirrored and scaled", f"{1e3 * batch:.2f} ms", f"{1e3 / mine:.0f} ms: a step", 100 * batch * mine, 3,
            at_least=False, unit=" %"),
    ]  # fmt: skip


def sampling(work: Path, scale: Scale) -> list[list[str]]:
    """Memory of a sample into one array, of a few images and of many."""
    data, run = work / "few", work / "run"
    make_files(data, 64)
    settings = ["model.base_channels=8", "model.channel_mults=[1]", "model.norm_groups=4", "model.attention_levels=[]", "model.num_res_blocks=1", "train.val_every=0"]
    flags = [word for setting in settings for word in ("--set", setting)]
    command("train", str(data), "--size", "16", "--steps", "2", "--batch-size", "4", "--out", str(run), *flags)

    def memory(n: int) -> int:
        taken = command("sample", str(run), "-n", str(n), "--steps", "1", "-o", str(work / "many.npz"), "--overwrite")[1]
        (work / "many.npz").unlink()
        return taken

    few, many = scale.samples // 50, scale.samples
    small, large = (statistics.median(column) for column in by_turns(3, lambda: memory(few), lambda: memory(many)))
    return [row(f"`sample -n {many} -o out.npz`", f"{large / 2**20:.0f} MiB", f"{small / 2**20:.0f} MiB: -n {few}", large / small, 1.02, at_least=False)]  # fmt: skip


def scanning(work: Path, scale: Scale) -> list[list[str]]:
    """A folder of very many files: known by stamps and headers, and again from the cache."""
    folder = work / "files"
    make_files(folder, scale.files)
    program = Path(__file__)
    share = scale.files / 1_000_000

    def part(name: str) -> tuple[float, int]:
        environment = {**os.environ, "DDPMCTL_CACHE": str(work / "cache-many")}
        done = subprocess.run([sys.executable, str(program), "--part", name, str(folder)], env=environment,
                              capture_output=True, text=True, check=True)  # fmt: skip
        taken, memory = done.stdout.split()
        return float(taken), int(memory)

    first = [part("first") for _ in range(scale.trials)]
    decode = part("again")[0]
    again = [part("again") for _ in range(scale.trials)]
    taken, memory = statistics.median(t for t, _ in first), max(m for _, m in first)
    ready, most = statistics.median(t for t, _ in again), max(m for _, m in again)
    what = f"a folder of {scale.files:,} files"
    return [
        row(f"{what}: names, stamps and headers", f"{taken:.1f} s, {memory / 2**20:.0f} MiB more memory", "", taken, round(60 * share, 1), at_least=False, unit=" s"),
        row(f"{what}: ready to train from the cache (8x8 pixels)", f"{ready:.2f} s, {most / 2**20:.0f} MiB more memory",
            f"{decode:.0f} s: decoding all", ready, max(0.2, round(3 * share, 2)), at_least=False, unit=" s"),
    ]  # fmt: skip


def _part(name: str, folder: Path) -> None:
    """One measurement of :func:`scanning`, in a process of its own: prints seconds, and bytes that memory grew by."""
    import resource

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    before = peak()
    if name == "first":
        taken = seconds(lambda: survey(find_images(folder)))
    else:
        config = RunConfig().data.model_copy(update={"size": (8, 8), "conditional": True})
        taken = seconds(lambda: load_images(config, folder))
    print(taken, peak() - before)


def starting(work: Path, scale: Scale) -> list[list[str]]:
    """Commands that need no network."""
    help_, inspect = by_turns(
        2 * scale.trials + 1, lambda: command("--help")[0], lambda: command("inspect", str(SMALL_NET))[0]
    )
    return [
        row(text, f"{statistics.median(times):.2f} s", "", statistics.median(times), target, at_least=False, unit=" s")
        for text, times, target in (("`ddpmctl --help`", help_, 0.25), ("`ddpmctl inspect run.yaml`", inspect, 0.4))
    ]


PARTS: dict[str, Callable[[Path, Scale], list[list[str]]]] = {
    "first_pass": first_pass,
    "training": training,
    "sampling": sampling,
    "scanning": scanning,
    "starting": starting,
}


def rows(scale: Scale = Scale(), work: Path | None = None, only: list[str] | None = None) -> list[list[str]]:
    """The table, a list of cells for each row below :data:`HEADER`; ``work`` is a folder to make things in."""
    found = []
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder, parts = Path(name), only or list(PARTS)
        if {"first_pass", "training"} & set(parts):
            make_photographs(folder / "photographs", scale.photographs)
        for part in parts:
            print(f"== {part}", file=sys.stderr, flush=True)
            found += PARTS[part](folder, scale)
    return found


def table(lines: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [HEADER, ["---"] * len(HEADER), *lines])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="little of everything: minutes")
    parser.add_argument("--work", type=Path, help="folder to work in, for 6 GB")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="these parts only")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        return _part(given.part[0], Path(given.part[1]))
    print(table(rows(SMALL if given.small else Scale(), given.work, given.only)))
    return None


if __name__ == "__main__":
    main()
