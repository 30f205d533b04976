"""Training and sampling where nothing of the image is left at T, by the real command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpmctl.cli import main
from ddpmctl.core.samplers import SAMPLERS
from ddpmctl.core.spacing import SPACINGS
from ddpmctl.errors import Exit
from helpers import TINY, write_images
from runs import rows

ZERO = ("--set", "diffusion.zero_terminal_snr=true")


@pytest.fixture(scope="module")
def rescaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that predicts v, of six steps; tests only read it."""
    folder = tmp_path_factory.mktemp("rescaled")
    write_images(folder / "photos")
    (folder / "tiny.yaml").write_text(TINY)
    command = ["train", str(folder / "photos"), "-c", str(folder / "tiny.yaml"), "--out", str(folder / "run"), "-q"]
    assert main([*command, *ZERO, "--prediction", "v", "--set", "data.holdout=0.2"]) == 0
    return folder / "run"


@pytest.mark.parametrize(("flags", "words"), [
    ((), ("zero_terminal_snr: with prediction eps", "diffusion.prediction=v, or x0")),
    (("--prediction", "x0", "--set", "diffusion.weighting=min_snr"), ("weighting min_snr", "weighting=uniform")),
])  # fmt: skip
def test_what_would_leave_T_untrained_is_refused(photos, tiny, capsys, flags, words):
    assert main(["train", str(photos), "-c", str(tiny), *ZERO, *flags]) == Exit.CONFIG
    shown = capsys.readouterr().err
    assert all(word in shown for word in words) and "--set diffusion.zero_terminal_snr" in shown
    assert not Path("runs").exists()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_from_it(rescaled, sampler):
    for spacing in SPACINGS:
        for steps in ("1", "5", "20"):
            command = ["sample", str(rescaled), "-n", "2", "--sampler", sampler, "--spacing", spacing, "--steps", steps]
            assert main([*command, "-o", "x.npz", "--overwrite", "-q"]) == 0
            assert np.load("x.npz")["images"].std() > 1


def test_the_loss_is_measured_and_finite(rescaled):
    assert all(0 < float(row["loss"]) < 10 for row in rows(rescaled))
    assert 0 < float(rows(rescaled)[-1]["val_loss"]) < 10


def test_inspect_tells_what_is_left_at_T(rescaled, capsys):
    assert main(["inspect", str(rescaled)]) == 0
    assert "-inf dB" in capsys.readouterr().out
    assert main(["inspect", str(rescaled), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert facts["schedule"]["abar_T"] == 0 and facts["schedule"]["terminal SNR"] == "-inf dB"
    assert facts["config"]["diffusion"]["zero_terminal_snr"] is True


def test_noise_demo_shows_the_schedule_of_the_model_down_to_T(rescaled):
    Image.radial_gradient("L").convert("RGB").save("picture.png")
    for out in ("demo.png", "demo.gif"):
        assert main(["noise-demo", "picture.png", "-o", out, "--ckpt", str(rescaled), "--at", "0,10,20", "-q"]) == 0


def test_evaluate_measures_bits_per_dimension(rescaled, capsys):
    pytest.importorskip("torch_fidelity")
    pytest.importorskip("efficientnet_lite_pytorch")
    assert main(["evaluate", str(rescaled), str(rescaled.parent / "photos"), "-n", "8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert all(0 < part["mean"] < 30 for part in facts["bits_per_dim"]["variance"].values())
    assert all(0 < part < 10 for part in facts["loss"]["quarters"])
