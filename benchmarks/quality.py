"""How good the images are: by sampler and steps, by time trained, by the length of the average, by guidance.

    python benchmarks/quality.py TRAIN HELDOUT --config examples/fashion-5min.yaml

TRAIN and HELDOUT are folders or zips of images in class folders. Every number is KID against all of HELDOUT, with its standard
deviation over subsets: in the features of efficientnet-lite0, and in the scores (logits) that it gives to classes, a scale of
its own. What is measured goes into OUT/results.json at once: after a stop the same command goes on. The tables come out as
OUT/QUALITY.md, with grids beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpmctl.checkpoint import files_in, step_of
from ddpmctl.cli import main as ddpmctl
from ddpmctl.core.samplers import evaluations
from ddpmctl.data.dataset import ImageDataset
from ddpmctl.describe import time_text
from ddpmctl.evaluation.distances import SUBSET_SIZE, kid
from ddpmctl.evaluation.features import extract, load_features
from ddpmctl.evaluation.sets import data_of, draw
from ddpmctl.files import replacing
from ddpmctl.images import grid, save_png
from ddpmctl.plans import USUAL, Plan
from ddpmctl.sampling import Model, load_model

FEW_STEPS = (5, 10, 20, 50)
SAMPLERS = ("ddim", "dpm++", "dpm++sde", "unipc", "heun")
LENGTHS = (0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25)
GUIDANCES = (1.0, 1.25, 1.5, 2.0, 3.0)
CHECKPOINTS = 5
SNAPSHOTS = 32
MEASURED = ["KID", "KID of scores", "samples"]
CPU = torch.device("cpu")


class Case(NamedTuple):
    """What is sampled, and how; ``step`` None: the last checkpoint, ``length`` None: the usual average."""

    way: Plan
    step: int | None = None
    length: float | None = None
    guidance: float = 1.0

    def name(self) -> str:
        """For results.json and for file names."""
        sampler, steps, spacing = self.way
        parts = [sampler, str(steps or "T"), spacing, *([f"step{self.step}"] if self.step else []),
                 *([f"length{self.length:g}"] if self.length else []), f"w{self.guidance:g}"]  # fmt: skip
        return "-".join(parts)


class Classifier(nn.Sequential):
    """A small convolutional network that tells the classes of real images apart."""

    def __init__(self, channels: int, classes: int) -> None:
        def block(c_in: int, c_out: int) -> list[nn.Module]:
            return [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]

        super().__init__(*block(channels, 32), *block(32, 64), *block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Dropout(0.2), nn.Linear(128, classes))  # fmt: skip

    @classmethod
    def trained(cls, data: ImageDataset, epochs: int = 12) -> Classifier:
        """Trained on all images of ``data``."""
        torch.manual_seed(0)
        assert data.labels is not None
        net, n = cls(data.channels, len(data.class_names)), len(data)
        optimizer = torch.optim.Adam(net.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * -(-n // 128))
        for _ in range(epochs):
            for index in torch.randperm(n).split(128):
                loss = F.cross_entropy(net(data.images[index].float() / 127.5 - 1), data.labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return net.eval()

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of ``images`` that it puts in their class."""
        found = torch.cat([self(part.float() / 127.5 - 1).argmax(1) for part in images.split(500)])
        return float((found == labels).float().mean())


class Bench:
    """Measures cases of one run, each once."""

    def __init__(self, run: Path, train: Path, heldout: Path, out: Path, n: int, n_slow: int, precision: str) -> None:
        self.run, self.out, self.n, self.n_slow, self.precision = run, out, n, n_slow, precision
        self.file = out / "results.json"
        self.results: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}
        model = load_model(run, "cpu")
        self.timesteps, self.last = model.denoiser.schedule.timesteps, model.step
        self.conditional, self.guided = bool(model.class_names), model.denoiser.null_label is not None
        self.net = load_features("efficientnet-lite0", CPU)
        held = data_of(model, heldout)
        self.real = self._features(held.images)
        self.classifier, self.real_accuracy = None, float("nan")
        if self.conditional:
            assert held.labels is not None
            self.classifier = Classifier.trained(data_of(model, train))
            self.real_accuracy = self.classifier.accuracy(held.images, held.labels)
            print(f"classifier: {self.real_accuracy:.1%} of held-out images right", flush=True)

    def __call__(self, case: Case) -> dict[str, Any]:
        """KID and its spread in features and in scores, seconds, and the classifier's accuracy."""
        n = self.n_slow if case.way.steps_of(self.timesteps) > max(FEW_STEPS) else self.n
        known = self.results.get(case.name())
        if known and (known.get("n"), known.get("precision")) == (n, self.precision):
            return known
        model = self._model(case)
        labels, start = model.labels_for(None, n), time.perf_counter()
        samples = draw(model, n, case.way, seed=1, labels=labels, batch_size=100,
                       on_smaller=lambda size: None, progress=lambda done, total: None)  # fmt: skip
        seconds = time.perf_counter() - start
        features, size = self._features(samples), min(SUBSET_SIZE, n // 2, len(self.real[0]) // 2)
        (mean, spread), (scores, scores_spread) = (kid(ours, real, size, 0) for ours, real in zip(features, self.real, strict=True))
        accuracy = self.classifier.accuracy(samples, torch.tensor(labels)) if self.classifier and labels else None
        save_png(self.out / f"{case.name()}.png", grid(samples[:60], columns=10, scale=2))
        found = {"kid": mean, "spread": spread, "scores": scores, "scores_spread": scores_spread,
                 "n": n, "precision": self.precision, "seconds": seconds, "accuracy": accuracy}  # fmt: skip
        self.results[case.name()] = found
        with replacing(self.file) as file:
            file.write(json.dumps(self.results, indent=1).encode())
        print(f"{case.name():<32} KID {mean:.5f} +- {spread:.5f}, of scores {scores:.3f} +- {scores_spread:.3f}, "
              f"{n:,} samples, {time_text(seconds)}", flush=True)  # fmt: skip
        return found

    def _model(self, case: Case) -> Model:
        path = self.run / "checkpoints" / f"step-{case.step:08d}.pt" if case.step else self.run
        return load_model(path, "cpu", ema_length=case.length, guidance=case.guidance, precision=self.precision)

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 1280) and scores (N, 1000) of ``images``, float64."""
        features = extract(images, self.net, CPU)
        with torch.no_grad():
            return features.double(), self.net.scores(features).double()

    def row(self, first: object, case: Case) -> list[object]:
        """Cells of a table: those of :data:`MEASURED` after the first."""
        found = self(case)
        return [first, f"{found['kid']:.4f} ± {found['spread']:.4f}", f"{found['scores']:.3f} ± {found['scores_spread']:.3f}",
                f"{found['n']:,}"]  # fmt: skip


def table(heads: list[str], rows: list[list[object]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def by_sampler(bench: Bench) -> str:
    """Quality against steps, and against all T steps of ddpm."""
    rows = []
    for sampler in SAMPLERS:
        for steps in FEW_STEPS:
            taken = -(-steps // 2) if sampler == "heun" else steps  # two evaluations a step, and one at the end
            case = Case(Plan(sampler, taken, USUAL[sampler].spacing))
            rows.append([f"{sampler}, {taken} steps, {case.way.spacing}", evaluations(sampler, taken), *bench.row("", case)[1:], case])
    slow = Case(Plan("ddpm", None, "linear"))  # last: it takes longer than all others together
    rows.append([f"ddpm, {bench.timesteps} steps", bench.timesteps, *bench.row("", slow)[1:], slow])
    most = bench(slow)["kid"]
    cells = [[*cells, f"{bench(case)['kid'] / most - 1:+.0%}"] for *cells, case in rows]
    return table(["sampler", "evaluations", *MEASURED, f"KID, against ddpm of {bench.timesteps} steps"], cells)


def by_time(bench: Bench) -> str:
    """Quality against steps trained."""
    steps = sorted(step_of(file) for file in files_in(bench.run / "checkpoints"))
    return table(["steps trained", *MEASURED], [bench.row(f"{step:,}", Case(USUAL["dpm++"], step=step)) for step in steps])


def by_length(bench: Bench) -> str:
    """Quality against the length of the average."""
    usual = bench.row("usual (train.ema_decay)", Case(USUAL["dpm++"]))
    rows = [usual, *(bench.row(f"{length:g}", Case(USUAL["dpm++"], length=length)) for length in LENGTHS)]
    return table(["ema length", *MEASURED], rows)


def by_guidance(bench: Bench) -> str:
    """Quality, and images in the class asked for, against guidance."""
    rows = []
    for weight in GUIDANCES:
        case = Case(USUAL["dpm++"], guidance=weight)
        rows.append([*bench.row(f"{weight:g}", case), f"{bench(case)['accuracy']:.1%}"])
    rows.append(["held-out images", "", "", f"{len(bench.real[0]):,}", f"{bench.real_accuracy:.1%}"])
    return table(["guidance", *MEASURED, "in their class"], rows)


def keep_config(config: Path, out: Path) -> None:
    """A copy of the run file in ``out``, which goes on with the run that is there: refuses one that is of another run file."""
    out.mkdir(parents=True, exist_ok=True)
    for kept in out.glob("*.yaml"):
        if kept.read_bytes() != config.read_bytes():
            sys.exit(f"{out} holds a run of {kept}, and not of {config}: give another --out")
    shutil.copy(config, out)


def train(data: Path, config: Path, out: Path) -> Path:
    """The run of ``config``, with enough kept for the tables. Goes on where it stopped."""
    from ddpmctl.runfile import read_run_file, resolve

    run, steps = out / "run", resolve(read_run_file(config)).train.steps
    more = [f"train.save_every={-(-steps // CHECKPOINTS)}", f"train.keep={CHECKPOINTS + 1}",
            f"train.ema_snapshot_every={-(-steps // SNAPSHOTS)}"]  # fmt: skip
    command = ["train", str(data), "--config", str(config), "--out", str(run), *(w for text in more for w in ("--set", text))]
    if (run / "run.yaml").exists():
        command = ["train", "--resume", str(run)]
    if ddpmctl(command) != 0:
        sys.exit("training did not end well")
    return run


def main() -> None:
    """Train, measure, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--config", type=Path, default=Path("examples/fashion-5min.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("-n", type=int, default=2000, help="samples of each row")
    parser.add_argument("--n-slow", type=int, default=500, help="samples of rows of more than 50 steps")
    parser.add_argument("--precision", default="fp32", choices=("auto", "fp32", "bf16"), help="of the network  [default: fp32]")
    options = parser.parse_args()
    print("training takes what the run file says; the tables of fashion-5min about two hours on two cores, those of fashion-60min four; "
          "half of it with --precision bf16, where the processor has that", flush=True)
    keep_config(options.config, options.out)
    bench = Bench(train(options.train, options.config, options.out), options.train, options.heldout, options.out,
                  options.n, options.n_slow, options.precision)  # fmt: skip
    parts: dict[str, Callable[[Bench], str]] = {"By time trained": by_time, "By length of the average": by_length}
    if bench.guided:  # by a network that has never been without a label there is none
        parts["By guidance"] = by_guidance
    parts["By sampler"] = by_sampler
    text = f"# Quality of {options.config.name}\n\n{__doc__.strip()}\n"
    for title, part in parts.items():
        text += f"\n## {title}\n\n{part(bench)}"
        (options.out / "QUALITY.md").write_text(text)
    print(f"tables: {options.out / 'QUALITY.md'}")


if __name__ == "__main__":
    main()
