"""``ddpmctl sample`` with pictures: a part of one drawn anew, and the way from one to another."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpmctl.cli import main
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.samplers import SAMPLERS
from ddpmctl.data.picture import Picture
from ddpmctl.errors import Exit
from ddpmctl.images import read_provenance
from ddpmctl.plans import INPAINTING, INTERPOLATION


@pytest.fixture
def model(trained: Path, photos: Path) -> str:
    """A model of 16x16 colours; a.png and b.png are two of its images, half.png a mask whose right half is white."""
    first, second = sorted(photos.rglob("*.png"))[:2]
    Path("a.png").write_bytes(first.read_bytes())
    Path("b.png").write_bytes(second.read_bytes())
    mask((16, 16), (8, 0, 16, 16)).save("half.png")
    return str(trained)


def mask(size: tuple[int, int], white: tuple[int, int, int, int], grey: int = 255) -> Image.Image:
    image = Image.new("L", size)
    image.paste(grey, white)
    return image


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def images(path: str) -> np.ndarray:
    return np.load(path)["images"].astype(int)


INPAINT = ["--inpaint", "a.png", "--mask", "half.png"]
INTERPOLATE = ["--interpolate", "a.png", "b.png"]


def made(model: str, *flags: str, out: str = "x.npz") -> np.ndarray:
    assert main(["sample", model, "-o", out, "--overwrite", "-q", *flags]) == 0
    return images(out)


@pytest.mark.parametrize("flags", [[], ["--sampler", "ddim", "--eta", "1"], ["--sampler", "ddpm", "--steps", "7", "--resample", "1"]])  # fmt: skip
def test_the_black_is_kept_to_the_bit_and_the_white_is_drawn_anew_each_time(model, flags) -> None:
    found, picture = made(model, *INPAINT, "-n", "3", *flags), pixels("a.png")
    assert (found[:, :, :8] == picture[:, :8]).all()
    for image in found:
        assert np.abs(image[:, 8:] - picture[:, 8:]).mean() > 5
    assert np.abs(found[0] - found[1])[:, 8:].mean() > 5


def test_an_inpainted_image_does_not_depend_on_its_batch(model) -> None:
    by_size = [made(model, *INPAINT, "--steps", "6", "-n", "5", "--batch-size", size) for size in ("1", "2", "5")]
    assert all(np.abs(by_size[0] - other).max() <= 1 for other in by_size[1:])
    assert np.abs(made(model, *INPAINT, "--steps", "6", "-n", "2") - by_size[0][:2]).max() <= 1


def test_resampling_and_its_steps_are_told(model, capsys) -> None:
    few, many = (made(model, *INPAINT, "--steps", "10", "--resample", count, "-n", "1") for count in ("1", "3"))
    assert not np.array_equal(few, many)
    assert main(["sample", model, *INPAINT, "-n", "2", "--steps", "10", "--resample", "3", "-o", "x.png"]) == 0
    shown = capsys.readouterr().out
    assert "ddpm, 10 steps (28 evaluations)" in shown and "28/28 2/2 images" in shown
    assert "the white of half.png in a.png, each step 3 times" in shown


def test_every_kind_of_output_holds_the_same_inpainted_images(model) -> None:
    command = ["sample", model, *INPAINT, "-n", "2", "--steps", "6", "-q", "-o"]
    for out in ("x.npz", "x.png", "x/", "x.gif"):
        assert main([*command, out]) == 0
    found = images("x.npz")
    assert (pixels("x.png")[2:18, 20:36] == found[1]).all() and (pixels("x/00001.png") == found[1]).all()
    with Image.open("x.gif") as animation:
        assert animation.n_frames == 7, "a frame a level, however often it came"


MASKS = {
    "larger": mask((160, 160), (80, 0, 160, 160)),
    "of other proportions": mask((40, 10), (20, 0, 40, 10)),
    "of two colours": mask((16, 16), (8, 0, 16, 16)).convert("1"),
    "with a palette": mask((16, 16), (8, 0, 16, 16)).convert("P"),
    "coloured": mask((16, 16), (8, 0, 16, 16)).convert("RGB"),
    "grey from 128 on": mask((16, 16), (8, 0, 16, 16), grey=128),
    "see-through where kept": Image.merge("LA", [Image.new("L", (16, 16), 255), mask((16, 16), (8, 0, 16, 16))]),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_that_say_the_same_make_the_same_images(kind, model) -> None:
    MASKS[kind].save("other.png")
    same = [
        made(model, "--inpaint", "a.png", "--mask", name, "--steps", "4", "-n", "2")
        for name in ("half.png", "other.png")
    ]
    assert np.array_equal(*same)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(16, 16), (48, 16), (16, 48), (90, 60), (8, 8), (5, 11)])
def test_a_mask_goes_the_way_of_its_picture(fit, size) -> None:
    """Half white, half black: so is the picture, and what is made of the two must agree but where shades were mixed."""
    half = mask(size, (0, 0, size[0], (size[1] + 1) // 2))
    half.save("picture.png")
    half.resize((size[0] * 3, size[1] * 5), Image.Resampling.NEAREST).save("mask.png")
    picture = Picture(Path("picture.png"))
    fitted = picture.pixels((16, 16), 1, fit=fit, background="black")
    anew = Picture(Path("mask.png")).mask((16, 16), picture.probe.size, fit=fit)
    assert anew.shape == (1, 16, 16) and anew.any() and not anew.all()
    clear = (fitted < 40) | (fitted > 215)
    assert ((fitted >= 128) == anew)[clear].all() and clear.float().mean() > 0.7


def test_a_mask_all_white_keeps_nothing_and_says_so(model, capsys) -> None:
    Image.new("L", (16, 16), 255).save("white.png")
    assert main(["sample", model, "--inpaint", "a.png", "--mask", "white.png", "-n", "1", "--steps", "2"]) == 0
    assert "white.png: all of it is white, so nothing of a.png is kept" in capsys.readouterr().err


def test_frames_go_from_one_picture_to_the_other(model, monkeypatch) -> None:
    def knows_gaussian_images(self, x_t, t, label=None):
        signal, noise = self.schedule.at(t, x_t)
        x0 = 0.25 * signal / (0.25 * signal**2 + noise**2) * x_t
        return x0, (x_t - signal * x0) / noise

    monkeypatch.setattr(Denoiser, "__call__", knows_gaussian_images)
    found = made(model, *INTERPOLATE, "--frames", "5")
    assert found.shape == (5, 16, 16, 3)
    a, b = pixels("a.png"), pixels("b.png")
    assert np.abs(found[0] - a).mean() < 4 and np.abs(found[4] - b).mean() < 4
    to_a = [np.abs(image - found[0]).mean() for image in found]
    assert to_a == sorted(to_a) and to_a[2] > 30
    assert made(model, *INTERPOLATE).shape[0] == 9


def test_the_way_back_is_the_same_way(model) -> None:
    there, back = made(model, *INTERPOLATE), made(model, "--interpolate", "b.png", "a.png")
    assert np.abs(there - back[::-1]).max() <= 1
    by_size = [made(model, *INTERPOLATE, "--batch-size", size) for size in ("1", "4")]
    assert all(np.abs(there - other).max() <= 1 for other in by_size)


def test_a_picture_to_itself_is_that_picture_throughout(model) -> None:
    found = made(model, "--interpolate", "a.png", "a.png", "--frames", "3")
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_frames_are_a_row_an_animation_or_files(model) -> None:
    command = ["sample", model, *INTERPOLATE, "--frames", "4", "--steps", "5", "-q", "-o"]
    for out in ("x.npz", "x.png", "x.gif", "x/"):
        assert main([*command, out]) == 0
    found = images("x.npz")
    assert pixels("x.png").shape == (2 + 18, 2 + 4 * 18, 3)
    assert sorted(path.name for path in Path("x").iterdir()) == [f"{i:05d}.png" for i in range(4)]
    assert (pixels("x/00002.png") == found[2]).all()
    with Image.open("x.gif") as animation:
        assert animation.n_frames == 6, "forth and back: 0 1 2 3 2 1"
        assert animation.size == (320, 320) and animation.info["duration"] > 300
    assert main([*command, "two.png", "--columns", "2"]) == 0
    assert pixels("two.png").shape == (2 + 36, 2 + 36, 3)


def test_one_class_is_drawn_where_there_are_several(trained_classes, capsys) -> None:
    for name in ("a.png", "b.png"):
        Image.effect_noise((24, 16), 90).save(name)
    command = ["sample", str(trained_classes), *INTERPOLATE, "--frames", "3", "-o", "x.npz", "--overwrite", "-q"]
    for flags in ([], ["--class", "all"]):
        assert main([*command, *flags]) == Exit.CONFIG
        assert "name it with --class: cats, dogs" in capsys.readouterr().err
    both = []
    for name in ("cats", "dogs"):
        assert main([*command, "--class", name]) == 0
        both.append(images("x.npz"))
    assert both[0].shape == (3, 16, 24, 1) and not np.array_equal(*both)


@pytest.mark.parametrize("flags", [
    [*INPAINT, "-n", "2", "--resample", "2", "--steps", "5"], [*INTERPOLATE, "--frames", "3", "--steps", "5"],
], ids=["inpaint", "interpolate"])  # fmt: skip
@pytest.mark.parametrize("out", ["x.png", "x.gif", "new/"])
def test_a_picture_names_the_command_that_makes_it_again(model, flags, out, capsys) -> None:
    assert main(["sample", model, *flags, "-o", out, "-q", "--seed", "4"]) == 0
    path = Path("new/00001.png") if out == "new/" else Path(out)
    told, before = read_provenance(path), path.read_bytes()
    assert told is not None
    for key, value in ({"inpaint": "a.png", "mask": "half.png", "resample": 2} if "-n" in flags else
                       {"interpolate": ["a.png", "b.png"], "frames": 3}).items():  # fmt: skip
        assert told[key] == value
    assert main(["inspect", str(path), "--json"]) == 0
    command = json.loads(capsys.readouterr().out)["command"]
    Path(out).rename("before")
    assert main([*shlex.split(command)[1:], "-q"]) == 0
    assert path.read_bytes() == before


def test_the_plans_are_of_samplers_that_there_are() -> None:
    for rows in (INPAINTING, INTERPOLATION):
        assert all(name in SAMPLERS and plan.sampler == name for name, plan in rows.items())


REFUSED = {
    "inpaint without a mask": (["--inpaint", "a.png"], Exit.CONFIG, "add --mask M.png: white is drawn anew, black is kept"),
    "a mask without a picture": (["--mask", "half.png"], Exit.CONFIG, "--mask half.png: goes with --inpaint only"),
    "resample alone": (["--resample", "2"], Exit.CONFIG, "--resample 2: goes with --inpaint only"),
    "frames alone": (["--frames", "3"], Exit.CONFIG, "--frames 3: goes with --interpolate only"),
    "resample of none": ([*INPAINT, "--resample", "0"], Exit.CONFIG, "--resample 0"),
    "resample for ever": ([*INPAINT, "--resample", "1e15"], Exit.CONFIG, "must be 1 to 1000"),
    "no picture": (["--inpaint", "no.png", "--mask", "half.png"], Exit.DATA, "no.png: cannot be read"),
    "no mask": (["--inpaint", "a.png", "--mask", "no.png"], Exit.DATA, "no.png: cannot be read"),
    "a mask that is none": (["--inpaint", "a.png", "--mask", "text.png"], Exit.DATA, "text.png: not an image"),
    "a mask cut off": (["--inpaint", "a.png", "--mask", "cut.png"], Exit.DATA, "cut.png: truncated"),
    "a picture that is none": (["--inpaint", "text.png", "--mask", "half.png"], Exit.DATA, "text.png: not an image"),
    "a folder": (["--inpaint", ".", "--mask", "half.png"], Exit.DATA, ".: not a file"),
    "nothing to draw": (["--inpaint", "a.png", "--mask", "black.png"], Exit.DATA, "black.png: nothing of it is white"),
    "too dark": (["--inpaint", "a.png", "--mask", "dark.png"], Exit.DATA, "dark.png: nothing of it is white"),
    "inpaint by dpm++": ([*INPAINT, "--sampler", "dpm++"], Exit.CONFIG, "--sampler dpm++: not with --inpaint"),
    "inpaint fast": ([*INPAINT, "--quality", "fast"], Exit.CONFIG, "--quality fast, which is unipc: not with --inpaint"),
    "inpaint and init": ([*INPAINT, "--init", "a.png"], Exit.CONFIG, "--inpaint: not with --init"),
    "inpaint and strength": ([*INPAINT, "--strength", "0.5"], Exit.CONFIG, "--strength 0.5: there is no picture"),
    "both": ([*INPAINT, *INTERPOLATE], Exit.CONFIG, "--interpolate: not with --inpaint"),
    "interpolate and init": ([*INTERPOLATE, "--init", "a.png"], Exit.CONFIG, "--interpolate: not with --init"),
    "interpolate -n": ([*INTERPOLATE, "-n", "9"], Exit.CONFIG, "-n 9: not with --interpolate"),
    "one frame": ([*INTERPOLATE, "--frames", "1"], Exit.CONFIG, "--frames 1: must be 2 to 1000"),
    "no frames": ([*INTERPOLATE, "--frames", "0"], Exit.CONFIG, "--frames 0: must be 2 to 1000"),
    "a million frames": ([*INTERPOLATE, "--frames", "1M"], Exit.CONFIG, "--frames 1000000: must be 2 to 1000"),
    "frames that are none": ([*INTERPOLATE, "--frames", "few"], Exit.CONFIG, "--frames"),
    "one picture": (["--interpolate", "a.png"], Exit.CONFIG, "--interpolate: needs A B, but after a.png comes nothing"),
    "a picture missing": (["--interpolate", "a.png", "no.png"], Exit.DATA, "no.png: cannot be read"),
    "a picture unreadable": (["--interpolate", "text.png", "a.png"], Exit.DATA, "text.png: not an image"),
    "interpolate by ddpm": ([*INTERPOLATE, "--sampler", "ddpm"], Exit.CONFIG, "use --sampler ddim"),
    "interpolate fast": ([*INTERPOLATE, "--quality", "fast"], Exit.CONFIG, "--quality fast, which is unipc"),
    "interpolate with noise": ([*INTERPOLATE, "--eta", "0.5"], Exit.CONFIG, "--eta 0.5: not with --interpolate"),
    "too many for a scale": ([*INTERPOLATE, "--scale", "1e6"], Exit.CONFIG, "give --scale"),
    "too large an animation": ([*INTERPOLATE, "--frames", "1000", "--scale", "99", "-o", "x.gif"], Exit.CONFIG, "--scale 99"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_is_one_clear_error_and_makes_nothing(case, model, capsys) -> None:
    flags, code, words = REFUSED[case]
    Path("text.png").write_text("hello")
    Path("cut.png").write_bytes(Path("half.png").read_bytes()[:50])
    Image.new("L", (16, 16)).save("black.png")
    mask((16, 16), (0, 0, 16, 16), grey=127).save("dark.png")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert main(["sample", model, *flags]) == code
    shown = capsys.readouterr()
    assert words in shown.err
    assert "encoding" not in shown.out and "Traceback" not in shown.err and len(shown.err.strip().splitlines()) <= 2
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_the_help_says_what_white_is(capsys) -> None:
    assert main(["sample", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("white is drawn anew, black is kept", "--inpaint", "--interpolate", "--resample", "--frames"):
        assert words in shown
