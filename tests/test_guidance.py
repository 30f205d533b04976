"""Classifier-free guidance from end to end: labels that training hides, and samples that are drawn towards theirs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpmctl import checkpoint, training
from ddpmctl.cli import main
from ddpmctl.errors import Exit
from ddpmctl.images import read_provenance
from helpers import TINY, write_images
from runs import assert_same, state_of


def train(out: str, *settings: str, steps: int = 6) -> int:
    write_images(Path("photos"))
    Path("tiny.yaml").write_text(TINY)
    flags = [word for setting in settings for word in ("--set", setting)]
    return main(["train", "photos", "-c", "tiny.yaml", "--out", out, "-q", "--steps", str(steps), *flags])


@pytest.fixture(scope="module")
def guidable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two classes whose labels were hidden now and then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("guidable"))
        assert train("run", "data.conditional=true", "model.label_dropout=0.25", steps=40) == 0
        return Path("run").absolute()


def hidden(monkeypatch: pytest.MonkeyPatch, out: str, *settings: str) -> list[list[int]]:
    """The labels that each step was trained with."""
    plain, seen = training.denoising_loss, []

    def spy(denoiser, x0, t, eps, label, **options):
        seen.append(label.tolist())
        return plain(denoiser, x0, t, eps, label, **options)

    with monkeypatch.context() as patch:
        patch.setattr("ddpmctl.preflight.preflight", lambda run: iter(()))
        patch.setattr(training, "denoising_loss", spy)
        assert train(out, "data.conditional=true", "train.batch_size=10", *settings, steps=60) == 0
    return seen


def test_training_hides_the_share_of_labels_and_nothing_else(monkeypatch):
    share = "model.label_dropout=0.2"
    whole, some, again = hidden(monkeypatch, "a"), hidden(monkeypatch, "b", share), hidden(monkeypatch, "c", share)
    assert {label for step in whole for label in step} == {0, 1}
    assert some == again
    flat, known = np.array(some).flatten(), np.array(whole).flatten()
    # 600 draws: the standard error of the share is 0.016.
    assert np.mean(flat == 2) == pytest.approx(0.2, abs=0.05)
    assert np.array_equal(flat[flat != 2], known[flat != 2])
    assert len({tuple(label == 2 for label in step) for step in some}) > 10


def test_without_hidden_labels_there_is_no_null_class(guidable, trained_classes):
    shapes = {}
    for run, step in ((guidable, 40), (trained_classes, 6)):
        net = state_of(run, step)["net"]
        shapes[run] = {len(value) for name, value in net.items() if "class" in name or "label" in name}
    assert shapes == {guidable: {3}, trained_classes: {2}}


def test_a_resumed_run_hides_the_same_labels():
    settings = ("data.conditional=true", "model.label_dropout=0.5")
    assert train("whole", *settings, steps=6) == train("parts", *settings, steps=4) == 0
    assert main(["train", "--resume", "parts", "--steps", "6", "-q"]) == 0
    assert_same(state_of(Path("whole"), 6)["net"], state_of(Path("parts"), 6)["net"])
    assert main(["train", "--resume", "parts", "--steps", "8", "-q", "--set", "model.label_dropout=0"]) == Exit.CONFIG


def test_guidance_changes_the_images_and_is_told(guidable, capsys):
    def made(*flags: str) -> np.ndarray:
        assert main(["sample", str(guidable), "-n", "2", "--steps", "4", "-o", "x.npz", "--overwrite", "-q", *flags]) == 0
        return np.load("x.npz")["images"].astype(int)

    plain = made()
    assert np.array_equal(plain, made("--guidance", "1"))
    strong, part = made("--guidance", "4"), made("--guidance", "4", "--guidance-interval", "0.5:0.8")
    assert not np.array_equal(plain, strong) and not np.array_equal(plain, part) and not np.array_equal(strong, part)
    assert np.array_equal(strong, made("--guidance", "4", "--guidance-interval", "0:1"))
    assert np.abs(strong - made("--guidance", "4", "--batch-size", "1")).max() <= 1

    flags = ["--guidance", "2.5", "--guidance-interval", "0.1:0.9", "--class", "dogs"]
    assert main(["sample", str(guidable), "-n", "2", "--steps", "3", "-o", "x.png", *flags]) == 0
    assert "guidance 2.5 in 0.1:0.9" in capsys.readouterr().out
    told = read_provenance(Path("x.png"))
    assert (told["guidance"], told["guidance-interval"], told["class"]) == (2.5, "0.1:0.9", "dogs")
    assert main(["inspect", "x.png", "--json"]) == 0
    command = shlex.split(json.loads(capsys.readouterr().out)["command"])
    Path("x.png").rename("before.png")
    assert main(command[1:]) == 0
    assert Path("x.png").read_bytes() == Path("before.png").read_bytes()


def test_a_checkpoint_from_before_is_read_as_one_without(trained_classes):
    content = checkpoint.load(trained_classes / "checkpoints" / "step-00000006.pt")
    del content["config"]["model"]["label_dropout"], content["digest"]
    torch.save({**content, "digest": checkpoint.digest_of(content)}, "old.pt")
    for source, out in ((trained_classes, "new.npz"), ("old.pt", "old.npz")):
        assert main(["sample", str(source), "-n", "2", "--steps", "3", "-o", out, "-q"]) == 0
    assert Path("new.npz").read_bytes() == Path("old.npz").read_bytes()


BAD = {
    "--guidance 3": ("trained", "trained without classes"),
    "--guidance 2": ("trained_classes", "train with --set model.label_dropout=0.1"),
    "--guidance -1": ("guidable", "--guidance -1.0: must be a number of at least 0"),
    "--guidance nan": ("guidable", "--guidance nan: must be a number"),
    "--guidance-interval 0:1": ("guidable", "add --guidance"),
    "--guidance 2 --guidance-interval 0.8:0.2": ("guidable", "'0.8:0.2' is not two shares such as 0.2:0.8"),
    "--guidance 2 --guidance-interval 5": ("guidable", "'5' is not two shares"),
    "--guidance 2 --guidance-interval 0:nan": ("guidable", "'0:nan' is not two shares"),
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_guidance_is_one_clear_error(flags, request, capsys):
    run, words = BAD[flags]
    assert main(["sample", str(request.getfixturevalue(run)), "-n", "1", *flags.split()]) == Exit.CONFIG
    shown = capsys.readouterr().err
    assert words in shown and len(shown.strip().splitlines()) <= 2
    assert not list(Path().glob("*.png"))


def test_labels_cannot_be_hidden_where_there_are_none(capsys):
    assert train("run", "model.label_dropout=0.1") == Exit.CONFIG
    shown = capsys.readouterr().err
    assert "model.label_dropout: there are no labels to hide" in shown and "data.conditional=true" in shown
