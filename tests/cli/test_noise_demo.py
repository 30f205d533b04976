"""``ddpmctl noise-demo`` from the outside."""

from __future__ import annotations

import io
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpmctl import checkpoint, plot
from ddpmctl.build import build_net
from ddpmctl.cli import main
from ddpmctl.errors import Exit
from ddpmctl.images import read_provenance
from ddpmctl.runfile import flag_layer, resolve

QUICK = "--timesteps 20 --schedule linear --frames 2"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: holds ``cat.png``, 32 x 24 pixels in colour, and ``not.png``, which is no image."""
    monkeypatch.chdir(tmp_path)
    ramp = np.linspace(0, 255, 24 * 32 * 3).astype(np.uint8).reshape(24, 32, 3)
    Image.fromarray(ramp).save("cat.png")
    Path("not.png").write_text("no image")
    Path("sub").mkdir()
    return tmp_path


def demo(line: str) -> int:
    return main(["noise-demo", *shlex.split(line)])


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_figure_of_all_schedules_by_default(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("cat.png") == Exit.OK
    out, err = capsys.readouterr()
    assert words(out) == "saved: noise-demo.png"
    assert err == ""
    assert read_provenance(Path("noise-demo.png")) == {
        "kind": "noise-demo", "image": "cat.png", "seed": 0, "timesteps": 1000, "shape": [3, 24, 32],
        "schedules": ["linear", "cosine", "sigmoid"], "levels": [0, 125, 250, 375, 500, 625, 750, 875, 1000],
        "flags": {"schedule": None, "timesteps": None, "size": None, "ckpt": None, "class": None},
    }  # fmt: skip
    with Image.open("noise-demo.png") as page:
        assert page.width > 9 * 160


def test_quiet_says_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo(f"cat.png -q {QUICK}") == Exit.OK
    assert capsys.readouterr() == ("", "")


def test_an_animation(folder: Path) -> None:
    schedules = "--schedule cosine --schedule linear"
    assert demo(f"cat.png -o new/cat.GIF --timesteps 20 {schedules} --frames 3 --size 16x24") == Exit.OK
    with Image.open("new/cat.GIF") as gif:
        assert (gif.format, gif.n_frames, gif.info["loop"]) == ("GIF", 3, 0)
        assert b'"schedules": ["cosine", "linear"]' in gif.info["comment"]
        assert b'"shape": [3, 16, 24]' in gif.info["comment"]


def test_levels_by_name_and_a_grey_picture(folder: Path) -> None:
    Image.new("L", (5, 900), 7).save("tall.png")
    assert demo("tall.png --at 7,0,20 --timesteps 20") == Exit.OK
    told = read_provenance(Path("noise-demo.png"))
    assert told is not None
    assert (told["levels"], told["shape"]) == ([7, 0, 20], [1, 160, 1])


def test_same_seed_same_bytes(folder: Path) -> None:
    for ending in ("png", "gif"):
        for name, seed in (("a", 5), ("b", 5), ("c", 6)):
            assert demo(f"cat.png -o {name}.{ending} {QUICK} --seed {seed}") == Exit.OK
        files = [Path(f"{name}.{ending}").read_bytes() for name in "abc"]
        assert files[0] == files[1]
        with Image.open(f"a.{ending}") as one, Image.open(f"c.{ending}") as other:
            one.seek(ending == "gif")
            other.seek(ending == "gif")
            assert one.convert("RGB").tobytes() != other.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("missing.jpg", Exit.DATA, "missing.jpg: cannot be read: No such file"),
        ("not.png", Exit.DATA, "not.png: not an image"),
        ("sub", Exit.DATA, "sub: not a file"),
        ("", Exit.CONFIG, "IMG"),
        ("cat.png --at 0,21 --timesteps 20", Exit.CONFIG, "--at: 21 is not in 0..20"),
        ("cat.png --at 0,x", Exit.CONFIG, "--at: 'x' is not a whole number"),
        ("cat.png --at=-3", Exit.CONFIG, "--at: '-3' is not a whole number"),
        ("cat.png --at ''", Exit.CONFIG, "--at: '' is not a whole number"),
        ("cat.png --at 3 --frames 2", Exit.CONFIG, "--at and --frames"),
        ("cat.png --frames 0", Exit.CONFIG, "--frames: 0 is not in 1..1001"),
        ("cat.png --frames many", Exit.CONFIG, "--frames: 'many' is not a whole number"),
        ("cat.png --frames 22 --timesteps 20", Exit.CONFIG, "--frames: 22 is not in 1..21"),
        ("cat.png --frames 101", Exit.CONFIG, "--frames: 101 levels are too many"),
        ("cat.png --frames 1e5 --timesteps 1e5", Exit.CONFIG, "--frames: 100,000 levels are too many"),
        ("cat.png --frames 301 -o a.gif", Exit.CONFIG, "--frames: 301 levels are too many"),
        (f"cat.png --at {'1,' * 100}2", Exit.CONFIG, "--at: 101 levels are too many"),
        ("cat.png --frames 90 --size 100x4096 --schedule linear", Exit.CONFIG, "32,000 pixels side by side"),
        ("cat.png --class cats", Exit.CONFIG, "--class cats: there is no model"),
        ("cat.png --schedule linaer", Exit.CONFIG, "did you mean 'linear'?"),
        ("cat.png --timesteps 1", Exit.CONFIG, "--timesteps"),
        ("cat.png --timesteps lots", Exit.CONFIG, "--timesteps"),
        ("cat.png --seed -1", Exit.CONFIG, "--seed"),
        ("cat.png --size 0", Exit.CONFIG, "--size"),
        ("cat.png --size 99999", Exit.CONFIG, "--size"),
        ("cat.png --size big", Exit.CONFIG, "--size"),
        ("cat.png --size 4096", Exit.CONFIG, "million pixels"),
        ("cat.png -o a.jpg", Exit.CONFIG, "a.jpg: neither .png nor .gif"),
        ("cat.png -o sub", Exit.CONFIG, "sub: neither .png nor .gif"),
        ("cat.png -o not.png", Exit.OUTPUT, "not.png: exists"),
        ("cat.png -o cat.png --overwrite", Exit.OUTPUT, "is the picture itself"),
        ("cat.png -o not.png/a.png", Exit.OUTPUT, "not.png/a.png: cannot be made"),
        ("cat.png --ckpt missing.pt", Exit.CHECKPOINT, "missing.pt"),
        ("cat.png --ckpt not.png", Exit.CHECKPOINT, "not.png"),
    ],
)  # fmt: skip
def test_mistakes_are_one_clear_line(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str, code: Exit, said: str
) -> None:
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert demo(line) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in words(err)
    assert "Traceback" not in err
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_overwrite(folder: Path) -> None:
    assert demo(f"cat.png -o not.png --overwrite {QUICK}") == Exit.OK
    assert read_provenance(Path("not.png")) is not None


def test_without_matplotlib_the_figure_is_made_without_curves(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if plot.available():
        assert demo(f"cat.png -o with.png {QUICK}") == Exit.OK
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert demo(f"cat.png -o without.png {QUICK}") == Exit.OK
    assert "ddpmctl[plot]" in capsys.readouterr().err
    heights = {path.stem: Image.open(path).height for path in folder.glob("with*.png")}
    assert heights["without"] < heights.get("with", 10_000)


@pytest.fixture
def ckpt(folder: Path, request: pytest.FixtureRequest) -> Path:
    """A checkpoint of a tiny untrained model of 16 x 24 pixels; the parameter says of which classes, or which shift."""
    flags = {
        "diffusion.timesteps": 20, "diffusion.schedule": "cosine", "data.size": "16x24", "data.channels": 3,
        "data.fit": "stretch", "model.base_channels": 8, "model.channel_mults": [1, 1],
        "model.norm_groups": 4, "model.num_res_blocks": 1,
    }  # fmt: skip
    given = getattr(request, "param", [])
    classes, shift = (given, 1) if isinstance(given, list) else ([], given)
    config = resolve(flag_layer({**flags, "diffusion.shift": shift}))
    torch.manual_seed(0)
    net = build_net(config, 3, len(classes)).state_dict()
    checkpoint.save(Path("tiny.pt"), {
        "config": config.to_dict(), "image_shape": [3, 16, 24], "class_names": classes, "step": 1,
        "net": net, "ema": {"net": net, "steps": 1}, "optimizer": {"state": {}, "param_groups": []}, "scaler": {},
        "data": {"images": 1, "fingerprint": ""},
    })  # fmt: skip
    return Path("tiny.pt")


@pytest.mark.parametrize("ckpt", [[], ["cats", "dogs"]], indirect=True, ids=["plain", "classes"])
@pytest.mark.parametrize("output", ["a.png", "a.gif"])
def test_a_checkpoint_brings_its_schedule_and_size(ckpt: Path, output: str) -> None:
    assert demo(f"cat.png -o {output} --ckpt {ckpt} --frames 3") == Exit.OK
    with Image.open(output) as page:
        told = str(page.info.get("comment") or page.info["ddpmctl"])
    for fact in (
        '"timesteps": 20',
        '"schedules": ["cosine"]',
        '"shape": [3, 16, 24]',
        '"levels": [0, 10, 20]',
    ):
        assert fact in told
    assert checkpoint.load(ckpt)["digest"] in told


@pytest.mark.parametrize("ckpt", [2.5], indirect=True)
def test_a_shifted_schedule_is_called_so(ckpt: Path) -> None:
    assert demo(f"cat.png -o a.png --ckpt {ckpt} --schedule cosine --frames 3") == Exit.OK
    assert (read_provenance(Path("a.png")) or {})["schedules"] == ["cosine, shift 2.5"]


@pytest.mark.parametrize("ckpt", [["cats", "dogs"]], indirect=True)
def test_the_class_is_the_one_asked_for(ckpt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, flags in (("first", ""), ("cats", "--class cats"), ("dogs", "--class dogs")):
        assert demo(f"cat.png -o {name}.png --ckpt {ckpt} --frames 3 {flags}") == Exit.OK
        assert ("as class cats, the first of 2" in capsys.readouterr().out) == (name == "first")
    first, cats, dogs = (np.asarray(Image.open(f"{name}.png")) for name in ("first", "cats", "dogs"))
    assert np.array_equal(first, cats) and not np.array_equal(first, dogs)
    told = read_provenance(Path("dogs.png"))
    assert told is not None and told["flags"]["class"] == "dogs"


@pytest.mark.parametrize(
    ("ckpt", "said"),
    [(["cats", "dogs"], "no such class; did you mean 'dogs'?"), ([], "trained without classes")],
    indirect=["ckpt"],
)
def test_a_class_that_is_not_there(ckpt: Path, capsys: pytest.CaptureFixture[str], said: str) -> None:
    assert demo(f"cat.png --ckpt {ckpt} --class dog") == Exit.CONFIG
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        ("--schedule cosine --timesteps 20 --size 16x24 --frames 2", Exit.OK),
        ("--size auto --at 5", Exit.OK),
        ("--schedule linear", Exit.CONFIG),
        ("--schedule cosine --schedule linear", Exit.CONFIG),
        ("--timesteps 1000", Exit.CONFIG),
        ("--size 24x16", Exit.CONFIG),
        ("--at 21", Exit.CONFIG),
        ("--frames 22", Exit.CONFIG),
    ],
)
def test_flags_may_not_contradict_the_checkpoint(
    ckpt: Path, capsys: pytest.CaptureFixture[str], flags: str, code: Exit
) -> None:
    assert demo(f"cat.png --ckpt {ckpt} {flags}") == code
    assert Path("noise-demo.png").exists() == (code == Exit.OK)
    if code != Exit.OK:
        assert flags.split()[0] in capsys.readouterr().err


def test_help_documents_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--help") == Exit.OK
    text = words(capsys.readouterr().out)
    assert "ddpmctl noise-demo cat.jpg" in text
    for option in (
        "--out",
        "--schedule",
        "--timesteps",
        "--at",
        "--frames",
        "--size",
        "--seed",
        "--ckpt",
        "--class",
        "--overwrite",
    ):
        assert option in text


@pytest.mark.parametrize(
    "flags", [["--schedule", "cosine", "--size", "16x24", "--timesteps", "50", "--seed", "3"], ["CKPT"]]
)
def test_inspect_gives_the_command_that_makes_it_again(flags, trained, capsys):
    Image.radial_gradient("L").save("a picture.png")
    flags = ["--ckpt", str(trained)] if flags == ["CKPT"] else flags
    assert main(["noise-demo", "a picture.png", "-o", "demo.png", "--frames", "3", "-q", *flags]) == 0
    before = Path("demo.png").read_bytes()
    capsys.readouterr()
    assert main(["inspect", "demo.png", "--json"]) == 0
    command = json.loads(capsys.readouterr().out)["command"]
    Path("demo.png").unlink()
    assert main(shlex.split(command)[1:]) == 0
    assert Image.open("demo.png").tobytes() == Image.open(io.BytesIO(before)).tobytes()
