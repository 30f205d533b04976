"""``ddpmctl evaluate``: the real command on a tiny run."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddpmctl.cli import main
from ddpmctl.errors import Exit
from ddpmctl.evaluation import features
from ddpmctl.evaluation.sets import draw
from ddpmctl.images import read_provenance
from helpers import TINY, write_images

pytest.importorskip("torch_fidelity")
pytest.importorskip("efficientnet_lite_pytorch")


def facts_of(capsys: pytest.CaptureFixture[str], *command: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", *map(str, command), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_against_its_images(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = trained.parent / "photos"
    facts = facts_of(capsys, trained, data, "-n", 8, "--sampler", "heun", "--steps", 2, "--seed", 4, "--batch-size", 5)
    assert facts["what"]["kind"] == "model" and (facts["what"]["step"], facts["what"]["weights"]) == (6, "ema")
    assert (facts["data"]["images"], facts["data"]["used"], facts["data"]["trained_on"]) == (12, 8, True)
    made = facts["made_with"]
    assert (made["n"], made["seed"], made["sampler"], made["steps"], made["evaluations"]) == (8, 4, "heun", 2, 3)
    assert facts["features"] == {
        "name": "efficientnet-lite0", "dimension": 1280, "note": "not comparable with published FID",
    }  # fmt: skip
    found = facts["distances"]
    assert found["kid"] > 0 and found["frechet"] > 0 and 0 <= found["precision"] <= 1 and 0 <= found["recall"] <= 1
    assert len(facts["warnings"]) == 2
    assert len(facts["loss"]["quarters"]) == 4 and facts["loss"]["mean"] == pytest.approx(
        sum(facts["loss"]["quarters"]) / 4
    )
    assert facts["loss"]["of"] == "images trained on"
    bits = facts["bits_per_dim"]["variance"]
    assert set(bits) == {"beta", "posterior"} and all(8 < part["mean"] < 30 for part in bits.values())

    other = facts_of(capsys, trained, data, "-n", 8, "--sampler", "heun", "--steps", 2, "--seed", 4, "--batch-size", 3)
    assert other["distances"] == pytest.approx(found, rel=1e-3)

    assert main(["evaluate", str(trained), str(data), "-n", "8", "--quality", "fast"]) == 0
    out, err = capsys.readouterr()
    for words in ("8 samples of", "8 of 12 images", "unipc, 10 steps (10 evaluations)", "seed 0", "not comparable",
                  "KID", "Frechet", "precision", "recall", "loss", "variance posterior"):  # fmt: skip
        assert words in out, words
    assert "KID of 8 images" in err and "Frechet distance of 8 images" in err


def test_classes_are_drawn_and_compared(trained_classes: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (trained_classes, trained_classes.parent / "photos", "-n", 6, "--steps", 2)
    assert facts_of(capsys, *command, "--class", "cats")["data"]["used"] == 6
    assert facts_of(capsys, *command)["made_with"]["class"] == "all"
    (photos / "cats").rename(photos / "birds")
    assert main(["evaluate", str(trained_classes), str(photos), "-n", "6"]) == Exit.DATA
    assert "no class birds" in capsys.readouterr().err


def test_too_few_images_are_told_before_anything_is_drawn(
    trained_classes: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ddpmctl.evaluation.facts.draw", pytest.fail)
    for file in sorted((photos / "cats").iterdir())[:2]:
        file.unlink()
    assert main(["evaluate", str(trained_classes), str(photos), "-n", "9", "--class", "cats"]) == Exit.DATA
    assert f"{photos}: class cats: 4 images are too few" in " ".join(capsys.readouterr().err.split())


def test_two_sets_of_images(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_of(capsys, photos, photos, "-n", 12)
    assert facts["distances"]["frechet"] == pytest.approx(0, abs=1e-3)
    assert (facts["distances"]["precision"], facts["distances"]["recall"]) == (1, 1)
    assert abs(facts["distances"]["kid"]) < 0.05
    assert "loss" not in facts and facts["what"]["kind"] == "images"
    shutil.make_archive(str(tmp_path / "zipped"), "zip", photos)
    zipped = facts_of(capsys, tmp_path / "zipped.zip", photos, "-n", 12, "--no-cache")
    assert zipped["distances"] == pytest.approx(facts["distances"], abs=1e-3)
    write_images(tmp_path / "larger", size=(20, 20))
    assert main(["evaluate", str(tmp_path / "larger"), str(photos)]) == Exit.DATA
    assert "images of 20x20 and 16x16" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "larger"), str(photos), "--size", "8", "-q"]) == 0


def test_features_of_data_are_kept_shown_and_cleared(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "kept"
    monkeypatch.setenv("DDPMCTL_CACHE", str(place))
    extracted: list[int] = []
    plain = features.extract
    monkeypatch.setattr("ddpmctl.evaluation.sets.extract",
                        lambda images, *args, **options: extracted.append(len(images)) or plain(images, *args, **options))  # fmt: skip
    first = facts_of(capsys, photos, photos, "-n", 8, "--no-cache")
    assert not place.exists()
    assert facts_of(capsys, photos, photos, "-n", 8) == first
    assert extracted == [8, 8, 8]  # the second set is the first
    facts_of(capsys, photos, photos, "-n", 8, "--seed", 1)
    facts_of(capsys, photos, photos, "-n", 8, "--size", "8")
    assert extracted == [8] * 5
    kept = sorted(place.glob("features-*/features.npz"))
    assert len(kept) == 3
    assert main(["cache"]) == 0
    assert "crop, efficientnet-lite0" in capsys.readouterr().out

    for file in kept:  # damaged: made again
        file.write_bytes(file.read_bytes()[:-3000])
    assert facts_of(capsys, photos, photos, "-n", 8) == first
    assert extracted == [8] * 6
    assert main(["cache"]) == 0
    assert capsys.readouterr().out.count("(damaged)") == 2
    assert main(["cache", "--clear"]) == 0
    assert list(place.iterdir()) == []
    monkeypatch.setenv("DDPMCTL_CACHE_SIZE", "1K")
    assert facts_of(capsys, photos, photos, "-n", 8) == first
    assert list(place.iterdir()) == []


def test_sheet_of_what_was_learnt_by_heart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_images(tmp_path / "photos", 24)
    (tmp_path / "tiny.yaml").write_text(TINY)
    assert main(["train", str(photos), "-c", "tiny.yaml", "--out", "run", "--set", "data.holdout=0.25", "-q"]) == 0
    command = ("run", photos, "-n", 6, "--steps", 2, "--sheet", "near.png", "--sheet-of", 2)
    facts = facts_of(capsys, *command)
    found = facts["memorised"]
    assert (found["training"], found["held_out"]) == (18, 6) and facts["loss"]["of"] == "images that training held out"
    with Path("run/metrics.csv").open(newline="") as table:
        *_, last = csv.DictReader(table)
    assert facts["loss"]["mean"] == pytest.approx(float(last["val_loss"]), rel=1e-5)
    assert facts["loss"]["quarters"] == pytest.approx([float(last[f"val_q{i}"]) for i in range(1, 5)], rel=1e-5)
    assert len(facts["warnings"]) == 3
    for name in ("pixels", "features"):
        assert 0 <= found[name]["share"] <= 1 and found[name]["threshold"] > 0
    with Image.open("near.png") as image:
        assert image.mode == "RGB" and image.height > 250
    assert (read_provenance(Path("near.png")) or {})["memorised"]["training"] == 18
    assert main(["evaluate", *map(str, command)]) == Exit.OUTPUT
    assert main(["evaluate", *map(str, command), "--overwrite"]) == 0
    assert "held-out images are" in capsys.readouterr().out

    def in_the_way(*args: Any, **named: Any) -> Any:
        Path("near.png").unlink()
        Path("near.png").mkdir()
        return draw(*args, **named)

    monkeypatch.setattr("ddpmctl.evaluation.facts.draw", in_the_way)  # the numbers are told all the same
    assert main(["evaluate", *map(str, command), "--overwrite"]) == Exit.OUTPUT
    told = capsys.readouterr()
    assert "held-out images are" in told.out and "near.png" not in told.out and "error: near.png: cannot be written: " in told.err
    Path("near.png").rmdir()
    monkeypatch.setattr("ddpmctl.evaluation.facts.draw", pytest.fail)
    assert main(["evaluate", "run", str(photos), "-n", "2000", "--sheet", "y.png", "--sheet-of", "2000"]) == Exit.CONFIG
    assert "--sheet-of 2,000: a picture" in capsys.readouterr().err
    other = write_images(tmp_path / "other", 13)
    assert main(["evaluate", "run", str(other), "-n", "6", "--sheet", "x.png"]) == Exit.CONFIG
    assert "not the images that" in capsys.readouterr().err and not Path("x.png").exists()


@pytest.mark.parametrize(("flags", "words"), [
    (["--features", "inceptoin"], "did you mean 'inception'"),
    (["-n", "4"], "must be 5 to"),
    (["--steps", "0"], "at least 1"),
    (["--steps", "21"], "the model has 20"),
    (["--size", "8"], "it has its own size"),
    (["--sheet", "x.gif"], "must end in .png"),
    (["--guidance", "nan"], "must be a number"),
    (["--feature-weights", "none.pth"], "no such file"),
    (["--class", "cats"], "trained without classes"),
    (["--sheet-of", "3"], "there is no sheet"),
    (["--features", "inception"], "the weights of inception are not there"),
])  # fmt: skip
def test_wrong_flags(
    trained: Path, photos: Path, flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    assert main(["evaluate", str(trained), str(photos), *flags]) == Exit.CONFIG
    assert words in capsys.readouterr().err


def test_wrong_places(trained: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "missing", str(photos)]) == Exit.CONFIG
    assert main(["evaluate", str(trained), "missing"]) == Exit.DATA
    assert main(["evaluate", str(photos), str(photos), "--steps", "5"]) == Exit.CONFIG
    assert "there is nothing to sample" in capsys.readouterr().err
    for flags in (["--weights", "raw"], ["--precision", "bf16"]):
        assert main(["evaluate", str(photos), str(photos), *flags]) == Exit.CONFIG
        assert "there is nothing to sample" in capsys.readouterr().err
    write_images(Path("few"), 3)
    assert main(["evaluate", str(photos), "few"]) == Exit.DATA
    assert "few: 3 images are too few to compare" in capsys.readouterr().err
    Path("damaged.pt").write_bytes(b"\x00\x01")
    assert main(["evaluate", "damaged.pt", str(photos)]) == Exit.CHECKPOINT
    assert main(["evaluate", str(trained / "checkpoints"), str(photos), "-n", "4"]) == Exit.CONFIG


def test_without_the_extra_one_line_says_what_to_install(
    trained: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None)
    assert main(["evaluate", str(trained), str(photos)]) == Exit.CONFIG
    assert "pip install 'ddpmctl[metrics]'" in capsys.readouterr().err
