"""A model that has learned its variance, by the real command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ddpmctl.cli import main
from ddpmctl.core.samplers import SAMPLERS
from ddpmctl.errors import Exit
from helpers import TINY, write_images
from runs import rows, state_of

LEARN = ("--set", "diffusion.learn_variance=true")


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on oblong images with transparency, on patches; tests only read it."""
    folder = tmp_path_factory.mktemp("knowing")
    write_images(folder / "photos", size=(16, 24), mode="RGBA")
    (folder / "tiny.yaml").write_text(TINY)
    command = ["train", str(folder / "photos"), "-c", str(folder / "tiny.yaml"), "--out", str(folder / "run"), "-q"]
    more = ["--size", "16x24", "--set", "data.channels=4", "--set", "model.patch=2", "--steps", "40"]
    assert main([*command, *LEARN, *more]) == 0
    return folder / "run"


def drawn(run: Path, *flags: str) -> np.ndarray:
    assert main(["sample", str(run), "-n", "3", *flags, "-o", "x.npz", "--overwrite", "-q"]) == 0
    images: np.ndarray = np.load("x.npz")["images"]
    return images


def test_the_network_has_as_many_channels_again_and_uses_them(knowing):
    weight = state_of(knowing, 40)["net"]["conv_out.weight"]
    assert len(weight) == 2 * 4 * 2**2
    assert bool((weight.flatten(1).abs().sum(1) > 0).all()), "both halves have learned"
    assert all(np.isfinite(float(row["loss"])) for row in rows(knowing))


def test_learned_is_what_ddpm_goes_by_unless_told(knowing):
    plain = drawn(knowing, "--sampler", "ddpm", "--steps", "7")
    assert plain.shape == (3, 16, 24, 4)
    assert np.array_equal(plain, drawn(knowing, "--sampler", "ddpm", "--steps", "7", "--variance", "learned"))
    for fixed in ("beta", "posterior"):
        assert not np.array_equal(plain, drawn(knowing, "--sampler", "ddpm", "--steps", "7", "--variance", fixed))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_from_it(knowing, sampler):
    assert drawn(knowing, "--sampler", sampler, "--steps", "4").std() > 1


def test_a_model_without_cannot_be_asked_for_it(trained, capsys):
    command = ["sample", str(trained), "-n", "1", "--sampler", "ddpm", "--variance", "learned"]
    assert main(command) == Exit.CONFIG
    shown = capsys.readouterr().err
    assert "--variance learned" in shown and "was trained without" in shown and "beta or posterior" in shown


def test_inspect_counts_both_halves(knowing, capsys):
    assert main(["inspect", str(knowing), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["diffusion"]["learn_variance"] is True
    assert facts["parameters"]["conv_out"] == 32 * (8 * 9 + 1)


def test_the_held_out_loss_is_that_of_the_prediction_alone(photos, tiny):
    """So that runs can be compared: a new network says 0, and costs the same with a variance and without."""
    command = ["train", str(photos), "-c", str(tiny), "-q", "--steps", "1", "--set", "train.lr=1e-9"]
    command += ["--set", "data.holdout=0.2", "--set", "train.sample_every=0"]
    assert main([*command, "--out", "without"]) == 0
    assert main([*command, "--out", "with", *LEARN]) == 0
    [without], [learned] = rows(Path("without")), rows(Path("with"))
    assert float(learned["val_loss"]) == pytest.approx(float(without["val_loss"]), rel=1e-3)
    assert float(learned["loss"]) > float(without["loss"])


def test_evaluate_tells_the_bits_of_the_learned_variance(knowing, capsys):
    pytest.importorskip("torch_fidelity")
    pytest.importorskip("efficientnet_lite_pytorch")
    assert main(["evaluate", str(knowing), str(knowing.parent / "photos"), "-n", "8", "--json"]) == 0
    bits = json.loads(capsys.readouterr().out)["bits_per_dim"]["variance"]
    assert set(bits) == {"learned", "beta", "posterior"} and all(0 < part["mean"] < 30 for part in bits.values())
