"""Speed and memory beside the peers, in one run: the tables of benchmarks/RESULTS.md.

    make bench                            (sets up, then runs this: about half an hour on two cores)
    python benchmarks/speed.py --small    (a minute or two, on small networks: to see that it runs)

Everybody is timed by turns, trainers in processes of their own; numbers are medians. Peers come with the extra ``bench``.
Ratios are what counts: the seconds of another machine are others. ``small`` is the network of examples/conditional.yaml,
without its classes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contestants import PRODUCT_FLOPS, Setting, config_of
from harness import by_turns, seconds
from torch.utils.flop_counter import FlopCounterMode

from ddpmctl.build import precision_name, resolve_precision

HERE = Path(__file__).parent
PEERS = ("diffusers", "denoising_diffusion_pytorch")
SMALL_NET = Setting(base=24, mults=(1, 2, 4), blocks=1, dropout=0.0, channels=1, size=28, groups=8, attention=2, device="cpu")
"""The network of examples/conditional.yaml, without its classes."""


class Scale(NamedTuple):
    """How much is measured."""

    paper: Setting = Setting()
    rounds: int = 5
    batches: tuple[int, ...] = (1, 4, 16, 64, 256)
    sizes: tuple[int, ...] = (16, 32, 64, 128)
    widths: tuple[int, ...] = (16, 32, 64, 128)
    steps: tuple[int, ...] = (5, 10, 20, 40)
    images: tuple[int, ...] = (16, 32, 64, 128)
    small: bool = False


SMALL = Scale(Setting(base=32, batch=4), 2, (1, 4), (16, 32), (16, 32), (5, 10), (4, 8), small=True)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows]) + "\n"


def flops(setting: Setting) -> float:
    """Of one image through the network, forwards; a step takes three times as many."""
    with FlopCounterMode(display=False) as counter:
        setting._replace(device="cpu").net().eval()(torch.zeros(1, setting.channels, setting.size, setting.size), torch.zeros(1))
    return counter.get_total_flops()


def quick(device: str) -> str:
    """The precision that is fast on ``device``: bf16 or fp32. Where bf16 is slow, it is so by up to a hundred times."""
    return precision_name(resolve_precision("auto", torch.device(device)))


def training(scale: Scale) -> str:
    """A training step."""
    setting, kind = scale.paper, quick(scale.paper.device)
    peers = ["plain PyTorch, fp32", "diffusers, fp32", "denoising-diffusion-pytorch, fp32"]
    product, others = f"matrix product, {kind}", ["ddpmctl, fp32", "diffusers, bf16 autocast"] if kind == "bf16" else []
    found = by_turns(["ddpmctl", *peers, *others, product], setting, rounds=scale.rounds)
    limit, best = PRODUCT_FLOPS / found.pop(product).seconds, min(found[name].seconds for name in peers)
    work = 3 * flops(setting) * setting.batch
    rows = []
    for name, timed in found.items():
        share = "" if name == "denoising-diffusion-pytorch, fp32" else f"{work / timed.seconds / limit:.2f}"  # another network
        rows.append([name, f"{setting.batch / timed.seconds:.2f}", f"{best / timed.seconds:.2f}", share,
                     f"{timed.memory / 2**30:.2f}", f"{timed.memory / found['diffusers, fp32'].memory:.2f}"])  # fmt: skip
    text = f"The machine's {kind} matrix product: {limit / 1e9:.0f} GFLOP/s. A batch of {setting.batch} takes {work / 1e9:.0f} GFLOP.\n\n"
    return text + table(
        ["trainer", "images/s", "ratio to the best fp32 peer", f"share of {kind} product", "peak memory, GiB", "ratio to diffusers"], rows
    )


def evaluation(scale: Scale) -> str:
    """One evaluation of the network, as in sampling.

    All in one process: some systems take away the memory of one that waits for its turn, gigabytes for each of these.
    """
    from contestants import EVALUATORS, PRODUCTS

    setting, kind = scale.paper._replace(batch=4 * scale.paper.batch), quick(scale.paper.device)
    peers = ["diffusers, fp32", *(["diffusers, bf16"] if kind == "bf16" else [])]
    names = [peer.replace("diffusers", "ddpmctl") for peer in reversed(peers)] + peers
    works = {**{name: EVALUATORS[name](setting) for name in names}, "product": PRODUCTS[f"matrix product, {kind}"](setting)}
    wait = torch.cuda.synchronize if setting.device.startswith("cuda") else lambda: None
    trials: dict[str, list[float]] = {name: [] for name in works}
    with torch.inference_mode():
        for turn in range(scale.rounds + 1):
            for name, work in works.items():
                count = 20 if name == "product" else 1
                taken = seconds(lambda work=work, count=count: ([work() for _ in range(count)], wait())) / count
                trials[name] += [taken] if turn else []  # the first turn finds everything cold
    found = {name: statistics.median(taken) for name, taken in trials.items()}
    limit = found.pop("product") / PRODUCT_FLOPS * flops(setting) * setting.batch
    rows = [[name, f"{taken:.2f}", *(f"{found[peer] / taken:.2f}" for peer in peers)] for name, taken in found.items()]
    head = ["network", f"seconds for {setting.batch} images", *(f"times {peer.replace(',', '')}" for peer in peers)]
    return table(head, [*rows, [f"limit: {kind} matrix product", f"{limit:.2f}", *(f"{found[p] / limit:.2f}" for p in peers)]])


def parts(scale: Scale) -> str:
    """What our own layers, and the choices that were left, are worth."""
    rows = []
    for label, setting in (("small", SMALL_NET), ("CIFAR-10", scale.paper)):
        half = ["ddpmctl, bf16"] if quick(setting.device) == "bf16" else []
        names = [*half, "ddpmctl, without core/fast.py", "ddpmctl, fp32", "ddpmctl, torch.compile"]
        for name, timed in by_turns(names, setting, rounds=scale.rounds).items():
            rows.append([label, name, f"{setting.batch / timed.seconds:.2f}"])
    return table(["network", "trainer", "images/s"], rows)


def overhead(scale: Scale) -> str:
    """Share of a step outside of network, loss and optimiser."""
    from contestants import run_of

    from ddpmctl.core.losses import denoising_loss

    rows = []
    for label, setting in (("small", SMALL_NET), ("CIFAR-10", scale.paper)):
        with run_of(setting, "auto") as run:
            steps, x0 = run.train(), run.batches(1).x0.to(run.device)
            t, eps = torch.randint(1, 1001, (len(x0),)), torch.randn_like(x0)

            def bare(run: Any = run, batch: tuple[torch.Tensor, ...] = (x0, t, eps)) -> None:
                run.state.optimizer.zero_grad()
                denoising_loss(run.denoiser, *batch).backward()
                run.state.optimizer.step()

            works: list[Callable[[], object]] = [lambda steps=steps: next(steps), bare]
            for work in works:
                work()
            trials: list[list[float]] = [[], []]
            for _ in range(scale.rounds * (40 if setting is SMALL_NET else 2)):
                for work, taken in zip(works, trials, strict=True):
                    taken.append(seconds(work))
            whole, within = (statistics.median(taken) for taken in trials)
            rest = statistics.median(a - b for a, b in zip(*trials, strict=True))
            rows.append([label, f"{1e3 * whole:.1f}", f"{1e3 * within:.1f}", f"{rest / whole:.1%}"])
    return table(["network", "step, ms", "network, loss, optimiser, ms", "rest"], rows)


def scaling(scale: Scale) -> str:
    """Small network by batch, size and width: images a second of training, and peak memory."""
    ways: dict[str, tuple[Callable[[int], Setting], tuple[int, ...]]] = {
        "batch": (lambda n: SMALL_NET._replace(batch=n), scale.batches),
        "size": (lambda n: SMALL_NET._replace(size=n), scale.sizes),
        "base channels": (lambda n: SMALL_NET._replace(base=n), scale.widths),
    }
    rows = []
    for what, (setting_of, values) in ways.items():
        for value in values:
            setting = setting_of(value)
            timed = by_turns(["ddpmctl"], setting, rounds=3)["ddpmctl"]
            rate = 3 * flops(setting) * setting.batch / timed.seconds / 1e9
            rows.append([what, f"{value}", f"{setting.batch / timed.seconds:.1f}", f"{rate:.0f}", f"{timed.memory / 2**30:.2f}"])
    return table(["what", "value", "images/s", "GFLOP/s", "peak memory, GiB"], rows)


def linearity(scale: Scale) -> str:
    """Sampling time against steps and images, small network, ddim."""
    from ddpmctl import build
    from ddpmctl.plans import Plan
    from ddpmctl.sampling import generate

    net = build.place(SMALL_NET.net(), torch.device("cpu")).eval()
    denoiser = build.build_denoiser(config_of(SMALL_NET, "fp32"), net, None)

    def sample(steps: int, n: int) -> float:
        way = Plan("ddim", steps, "linear")
        walk = generate(denoiser, (1, 28, 28), n, seed=0, way=way, device=torch.device("cpu"), batch_size=scale.images[0])
        return seconds(lambda: [None for _ in walk])

    cases = [(steps, scale.images[1]) for steps in scale.steps] + [(scale.steps[0], n) for n in scale.images]
    with torch.inference_mode():
        sample(1, 1)
        trials = [[sample(*case) for case in cases] for _ in range(3)]
    taken = [statistics.median(column) for column in zip(*trials, strict=True)]
    rows = [[f"{s}", f"{n}", f"{sec:.2f}", f"{1e3 * sec / s / n:.2f}"] for (s, n), sec in zip(cases, taken, strict=True)]
    return table(["steps", "images", "seconds", "ms a step and image"], rows)


def profiles(scale: Scale) -> str:
    """Top ten operators of a training step, with PyTorch's layers and with ours."""
    from contestants import TRAINERS
    from torch.profiler import ProfilerActivity, profile

    text = ""
    for title, name in (("After", "ddpmctl"), ("Before: PyTorch's own layers", "ddpmctl, without core/fast.py")):
        steps = TRAINERS[name](scale.paper)
        for _ in range(2):
            next(steps)
        with profile(activities=[ProfilerActivity.CPU]) as run:
            next(steps)
        events = sorted(run.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        rows = [[e.key, f"{e.count}", f"{e.self_cpu_time_total / 1e3:.0f}", f"{e.self_cpu_time_total / total:.1%}"] for e in events[:10]]
        text += f"### {title}\n\n" + table(["operator", "calls", "ms", "share"], rows) + "\n"
    return text


def of_data(scale: Scale) -> str:
    """Data, arrays and starting up."""
    import data

    return data.table(data.rows(data.SMALL if scale.small else data.Scale())) + "\n"


TABLES: dict[str, tuple[str, Callable[[Scale], str]]] = {
    "training": ("Training: CIFAR-10 network of Ho et al. 2020, 32x32", training),
    "evaluation": ("Sampling: one evaluation of the same network", evaluation),
    "overhead": ("A step outside of network, loss and optimiser", overhead),
    "data": ("Data, and the command line", of_data),
    "parts": ("Our layers, bf16 and torch.compile", parts),
    "scaling": ("Training by batch, size and width", scaling),
    "linearity": ("Sampling by steps and images", linearity),
    "profiles": ("Profile of a training step, CIFAR-10 network", profiles),
}


def machine() -> str:
    """What it was measured on."""
    cores, versions = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), [f"PyTorch {torch.__version__}"]
    for peer in PEERS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{peer.replace('_', '-')} {importlib.metadata.version(peer.replace('_', '-'))}")
    flags = sorted(name for name, there in getattr(torch.cpu, "get_capabilities", dict)().items() if there is True and "bf16" in name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none here, so nothing is said of any"
    return (f"{cores} cores of {platform.machine()} ({', '.join(flags) or 'no bf16'}), Python {platform.python_version()}, "
            f"{', '.join(versions)}. GPU: {gpu}.\n")  # fmt: skip


def measured(scale: Scale, only: list[str]) -> Iterator[tuple[str, str]]:
    """(title, text) of each table, as it is measured."""
    for name in only:
        title, part = TABLES[name]
        print(f"== {title}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        yield title, part(scale)
        print(f"   {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def page(sections: dict[str, str]) -> str:
    """The whole page, sections in the order of :data:`TABLES`."""
    text = f"# Speed and memory\n\n{__doc__.strip()}\n\n{machine()}"
    for title, _ in TABLES.values():
        text += f"\n## {title}\n\n{sections[title].strip()}\n" if title in sections else ""
    return text + "\n" + (HERE / "TRIED.md").read_text()


def sections_of(file: Path | None) -> dict[str, str]:
    """Those of an earlier page, which stay unless they are measured again."""
    parts = file.read_text().split("\n## ")[1:] if file and file.exists() else []
    return {title: text for title, _, text in (part.partition("\n") for part in parts)}


def main() -> None:
    """Measure, print, and write the page where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="little of everything")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES), help="these tables; others in --out stay as they are")
    parser.add_argument("--rounds", type=int, help="turns of everybody  [default: 5]")
    parser.add_argument("--device", help="cpu, cuda, cuda:N  [default: cuda where there is one]")
    parser.add_argument("--out", type=Path, help="file to write, such as benchmarks/RESULTS.md")
    given = parser.parse_args()
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"{', '.join(missing)}: not installed\npip install '.[bench]'")
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    scale = SMALL if given.small else Scale()
    scale = scale._replace(rounds=given.rounds or scale.rounds, paper=scale.paper._replace(device=device))
    sections = sections_of(given.out)
    for title, text in measured(scale, given.only):
        print(f"## {title}\n\n{text}", flush=True)
        sections[title] = text
        if given.out:
            given.out.write_text(page(sections))


if __name__ == "__main__":
    main()
