"""KID while training: in the metrics, the same after a resume, and the best checkpoint kept."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from ddpmctl import checkpoint
from ddpmctl.cli import main
from ddpmctl.core.noise import derive_seed
from ddpmctl.errors import Exit, OutputError
from ddpmctl.evaluation import scoring
from ddpmctl.evaluation.distances import kid
from ddpmctl.evaluation.features import extract
from ddpmctl.evaluation.sets import chosen, data_of
from ddpmctl.events import Busy
from ddpmctl.images import to_uint8
from ddpmctl.plans import Plan
from ddpmctl.sampling import generate, load_model
from helpers import Means, spoil_gradients, write_images

pytest.importorskip("torch_fidelity")
pytest.importorskip("efficientnet_lite_pytorch")

EVERY_3 = ["--evaluate-every", "3", "--set", "train.evaluate_samples=20", "--set", "train.save_every=3", "-q"]


@pytest.fixture
def cheap(monkeypatch):
    monkeypatch.setattr(scoring, "load_features", lambda name, device: Means())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", 40)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def kids(run: Path) -> dict[int, float]:
    return {int(row["step"]): float(row["kid"]) for row in rows(run) if row["kid"]}


def train(data: Path, tiny: Path, out: str, steps: int, *more: str) -> Path:
    assert main(["train", str(data), "--config", str(tiny), "--steps", str(steps), "--out", out, *EVERY_3, *more]) == 0
    return Path(out)


def test_rows_hold_the_kid_of_the_averaged_weights(cheap, data, tiny):
    run = train(data, tiny, "r", 7)
    found = kids(run)
    assert sorted(found) == [3, 6, 7]
    model = load_model(run, "cpu")
    grid = model.config.train
    seed = derive_seed(model.config.seed, "preview")
    walk = generate(model.denoiser, model.image_shape, 20, seed=seed, way=Plan(grid.sampler, grid.sample_steps, "linear"),
                    device=torch.device("cpu"), batch_size=4)  # fmt: skip
    samples = torch.cat([to_uint8(state.x_t) for _, state in walk if state.t == 0])
    dataset = data_of(model, data)
    real = dataset.images[chosen(dataset, 20, seed)]
    features = [extract(images, Means(), torch.device("cpu")).double() for images in (samples, real)]
    assert found[7] == pytest.approx(kid(*features, 10, seed)[0], rel=1e-4)


def test_best_is_the_checkpoint_of_the_lowest_kid(cheap, data, tiny, monkeypatch):
    scores = iter([0.5, 0.3, 0.4, 0.3])
    monkeypatch.setattr(scoring, "kid", lambda *a: (next(scores), 0.01))
    run = train(data, tiny, "r", 12)
    assert kids(run) == {3: 0.5, 6: 0.3, 9: 0.4, 12: 0.3}
    best = checkpoint.load(run / "checkpoints" / "best.pt")
    assert best["step"] == 6
    same = checkpoint.load(run / "checkpoints" / "step-00000006.pt")  # one of the three that are kept
    assert all(torch.equal(best["ema"]["net"][name], value) for name, value in same["ema"]["net"].items())
    assert main(["sample", str(run / "checkpoints" / "best.pt"), "-n", "1", "--steps", "2", "-o", "a.png"]) == 0
    assert load_model(run, "cpu").step == 12  # the newest is still what the run folder means


def test_resume_measures_the_same(cheap, data, tiny):
    whole, _ = train(data, tiny, "whole", 9), train(data, tiny, "parts", 5)
    assert main(["train", "--resume", "parts", "--steps", "9", "-q"]) == 0
    parts = kids(Path("parts"))
    assert parts.pop(5, None) is not None  # the end of the first stretch
    assert parts == kids(whole)


def test_a_stop_while_measuring_measures_again_on_resume(cheap, data, tiny, monkeypatch):
    whole = train(data, tiny, "whole", 6)

    def stopped(self):
        os.kill(os.getpid(), signal.SIGINT)
        yield Busy("samples", 1, 20)
        pytest.fail("went on after the stop")

    with monkeypatch.context() as patch:
        patch.setattr(scoring.Scoring, "__call__", stopped)
        command = ["train", str(data), "--config", str(tiny), "--steps", "6", "--out", "r", *EVERY_3]
        assert main(command) == Exit.STOPPED
    assert not kids(Path("r"))
    assert main(["train", "--resume", "r", "-q"]) == 0
    assert kids(Path("r")) == kids(whole)


def test_the_best_outlives_a_run_that_goes_back(cheap, data, tiny, monkeypatch, capsys):
    """It is of the lost stretch, and no row tells of it any more: worse ones do not take its place."""
    scores = iter([0.5, 0.1, 0.4, 0.3])
    monkeypatch.setattr(scoring, "kid", lambda *a: (next(scores), 0.01))
    spoil_gradients(monkeypatch, lambda step, rollbacks: step > 6 and not rollbacks)
    run = train(data, tiny, "r", 9, "--set", "train.save_every=4", "--set", "train.bad_steps=2")
    assert kids(run) == {3: 0.5, 6: 0.4, 9: 0.3}
    best = checkpoint.load(run / "checkpoints" / "best.pt")
    assert (best["step"], best["rollbacks"], best["kid"]) == (6, 0, 0.1)
    assert main(["inspect", str(run / "checkpoints" / "best.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"]["KID"] == 0.1


def test_a_best_that_could_not_be_written_is_made_up_for(cheap, data, tiny, monkeypatch):
    """A later one that beats only what is there takes the place."""
    scores, save = iter([0.5, 0.1, 0.3]), checkpoint.save
    monkeypatch.setattr(scoring, "kid", lambda *a: (next(scores), 0.01))

    def full(path, content, *kind):
        if content.get("kid") == 0.1:
            raise OutputError(f"{path}: cannot be written: no space left", "free space")
        return save(path, content, *kind)

    monkeypatch.setattr(checkpoint, "save", full)
    run = train(data, tiny, "r", 9)
    assert kids(run) == {3: 0.5, 6: 0.1, 9: 0.3}
    assert checkpoint.load(run / "checkpoints" / "best.pt")["kid"] == 0.3


def test_too_few_images_to_compare_are_told_before_training(cheap, tmp_path, tiny, capsys):
    few = write_images(tmp_path / "few", 4)
    assert main(["train", str(few), "--config", str(tiny), "--out", "r", *EVERY_3]) != 0
    assert "4 images are too few to compare" in " ".join(capsys.readouterr().err.split())
    assert not Path("r").exists()


def test_the_missing_extra_is_named_before_training(data, tiny, monkeypatch, capsys):
    monkeypatch.setattr("ddpmctl.evaluation.features.importlib.util.find_spec", lambda name: None)
    assert main(["train", str(data), "--config", str(tiny), "--out", "r", *EVERY_3]) != 0
    error = " ".join(capsys.readouterr().err.split())
    assert "torch_fidelity is not installed" in error and "ddpmctl[metrics]" in error
    assert not Path("r").exists()


def test_with_the_real_features(data, tiny, capsys):
    run = train(data, tiny, "r", 2)
    assert set(kids(run)) == {2} and (run / "checkpoints" / "best.pt").is_file()
