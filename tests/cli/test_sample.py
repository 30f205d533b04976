"""``ddpmctl sample`` by its real command line, on a checkpoint that the real ``train`` made."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddpmctl import checkpoint
from ddpmctl.cli import main
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.samplers import SAMPLERS
from ddpmctl.core.spacing import SPACINGS
from ddpmctl.errors import Exit
from ddpmctl.images import read_provenance
from ddpmctl.plans import QUALITIES, USUAL
from helpers import spoilt


def cells(path: Path, n: int, side: int = 16) -> list[np.ndarray]:
    """The images of a grid with the default padding."""
    picture = np.asarray(Image.open(path))
    columns = (picture.shape[1] - 2) // (side + 2)
    return [picture[2 + i // columns * (side + 2) :, 2 + i % columns * (side + 2) :][:side, :side] for i in range(n)]


def test_all_kinds_of_output_hold_the_same_images(trained):
    for out in ("grid.png", "folder", "array.npz"):
        assert main(["sample", str(trained), "-n", "5", "-o", out, "--steps", "4", "-q"]) == 0
    array = np.load("array.npz")["images"]
    assert array.shape == (5, 16, 16, 3) and array.dtype == np.uint8
    files = sorted(Path("folder").iterdir())
    assert [file.name for file in files] == [f"{i:05d}.png" for i in range(5)]
    for i, (file, cell) in enumerate(zip(files, cells(Path("grid.png"), 5), strict=True)):
        assert np.array_equal(np.asarray(Image.open(file)), array[i])
        assert np.array_equal(cell, array[i])


@pytest.mark.parametrize("out", ["x.npz", "x.gif"])
def test_a_batch_too_large_for_the_memory_is_halved_and_the_images_stay(trained, monkeypatch, capsys, out):
    command = ["sample", str(trained), "-n", "7", "--steps", "4", "-o"]
    assert main([*command, f"plain-{out}", "--batch-size", "2", "-q"]) == 0
    call, sizes = Denoiser.__call__, []

    def short_of_memory(self, x, *rest):
        sizes.append(len(x))
        if len(x) > 2 and len(sizes) % 5 == 2:  # in the midst of a batch
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return call(self, x, *rest)

    monkeypatch.setattr(Denoiser, "__call__", short_of_memory)
    assert main([*command, out]) == 0
    shown = capsys.readouterr()
    assert "out of memory: going on with 4 images at once" in shown.err
    assert max(sizes) == 7 and "7/7 images" in shown.out
    if out == "x.npz":
        images = [np.load(name)["images"].astype(int) for name in (out, f"plain-{out}")]
        assert np.abs(images[0] - images[1]).max() <= 1
    else:
        frames = [Image.open(name).n_frames for name in (out, f"plain-{out}")]
        assert frames[0] == frames[1]


def test_a_gif_goes_from_noise_to_the_image(trained):
    assert main(["sample", str(trained), "-n", "1", "-o", "way.gif", "--steps", "10", "--scale", "1", "-q"]) == 0
    assert main(["sample", str(trained), "-n", "1", "-o", "end.png", "--steps", "10", "-q"]) == 0
    gif, end = Image.open("way.gif"), np.asarray(Image.open("end.png").convert("RGB"), dtype=float)
    assert gif.n_frames == 11
    distances = []
    for i in range(gif.n_frames):
        gif.seek(i)
        distances.append(np.abs(np.asarray(gif.convert("RGB"), dtype=float) - end).mean())
    assert distances[-1] < 12 < distances[0]  # 256 colours cannot be exact


@pytest.mark.parametrize("flags", [["--sampler", "ddpm"], ["--sampler", "ddim", "--eta", "0.5", "--steps", "7"]])
def test_same_seed_same_images_whatever_the_batch_size(trained, flags):
    arrays = []
    for i, batch_size in enumerate((1, 2, 5)):
        command = ["sample", str(trained), "-n", "5", "-o", f"{i}.npz", "--batch-size", str(batch_size), "-q"]
        assert main([*command, *flags]) == 0
        arrays.append(np.load(f"{i}.npz")["images"].astype(int))
    # Kernels may add in another order: a value on the edge of rounding can move by one.
    assert all(np.abs(arrays[0] - other).max() <= 1 for other in arrays[1:])
    assert main(["sample", str(trained), "-n", "5", "-o", "other.npz", "--seed", "1", "-q", *flags]) == 0
    assert np.abs(np.load("other.npz")["images"].astype(int) - arrays[0]).mean() > 5


def test_more_images_keep_the_first_ones(trained):
    for n in ("2", "6"):
        assert main(["sample", str(trained), "-n", n, "-o", f"{n}.npz", "--steps", "5", "-q"]) == 0
    first = np.load("2.npz")["images"].astype(int)
    assert np.abs(np.load("6.npz")["images"][:2].astype(int) - first).max() <= 1


def test_options_change_the_images(trained):
    def made(*flags: str) -> np.ndarray:
        assert main(["sample", str(trained), "-n", "2", "-o", "x.npz", "--overwrite", "-q", *flags]) == 0
        return np.load("x.npz")["images"].astype(int)

    plain = made("--steps", "10")
    for flags in (
        *([["--sampler", name] for name in SAMPLERS if name != "dpm++"]), ["--sampler", "ddim", "--eta", "1"],
        ["--spacing", "quadratic"], ["--spacing", "logsnr"], ["--threshold", "dynamic"], ["--threshold", "none"],
        ["--weights", "raw"], ["--steps", "5"], ["--steps", "1"], ["--quality", "best"],
    ):  # fmt: skip
        steps = [] if "--steps" in flags else ["--steps", "10"]
        assert not np.array_equal(made(*steps, *flags), plain), flags
    ddpm = ["--sampler", "ddpm", "--steps", "10"]
    assert not np.array_equal(made(*ddpm), made(*ddpm, "--variance", "posterior"))


def test_a_png_says_how_it_was_made_and_the_command_makes_it_again(trained, capsys):
    flags = ["-n", "3", "--steps", "6", "--seed", "7", "--sampler", "ddim", "--eta", "0.25", "--threshold", "dynamic", "--columns", "2",
             "--scale", "3", "-q"]  # fmt: skip
    assert main(["sample", str(trained), "-o", "a.png", *flags]) == 0
    told = read_provenance(Path("a.png"))
    assert told is not None
    assert (told["sampler"], told["steps"], told["seed"], told["n"], told["step"]) == ("ddim", 6, 7, 3, 6)
    assert main(["inspect", str(trained / "checkpoints" / "step-00000006.pt"), "--json"]) == 0
    assert told["checkpoint"] == json.loads(capsys.readouterr().out)["what"]["digest"]
    assert main(["inspect", "a.png", "--json"]) == 0
    command = json.loads(capsys.readouterr().out)["command"]
    Path("a.png").rename("before.png")
    assert main(shlex.split(command)[1:]) == 0
    assert Path("a.png").read_bytes() == Path("before.png").read_bytes()


WAYS = {
    "": ("dpm++", 20, "linear"),
    "--quality fast": ("unipc", 10, "linear"),
    "--quality balanced": ("dpm++", 20, "linear"),
    "--quality best": ("ddpm", 20, "linear"),
    "--quality fast --steps 3": ("unipc", 3, "linear"),
    "--quality fast --sampler ddpm --spacing karras": ("ddpm", 10, "karras"),
    "--quality fast --sampler heun": ("heun", 10, "logsnr"),
    "--steps 1": ("dpm++", 1, "linear"),
    "--sampler ddpm": ("ddpm", 20, "linear"),
    "--sampler ddim": ("ddim", 20, "linear"),
    "--sampler heun --steps 4": ("heun", 4, "logsnr"),
    "--sampler unipc --spacing linear": ("unipc", 20, "linear"),
}


@pytest.mark.parametrize("flags", WAYS)
def test_quality_is_a_row_and_flags_go_before_it(flags, trained, capsys):
    """What was used is said, and stands in the picture. The model has T = 20."""
    sampler, steps, spacing = WAYS[flags]
    assert main(["sample", str(trained), "-n", "1", "-o", "x.png", *flags.split()]) == 0
    told = read_provenance(Path("x.png"))
    assert (told["sampler"], told["steps"], told["spacing"], told["threshold"]) == (sampler, steps, spacing, "clip")
    evaluations = 2 * steps - 1 if sampler == "heun" else steps
    assert f"{sampler}, {steps} steps ({evaluations} evaluations), {spacing} spacing" in capsys.readouterr().out
    assert main(["inspect", "x.png", "--json"]) == 0
    command = shlex.split(json.loads(capsys.readouterr().out)["command"])
    Path("x.png").rename("before.png")
    assert main(command[1:]) == 0
    assert Path("x.png").read_bytes() == Path("before.png").read_bytes()


def test_every_sampler_has_a_usual_plan():
    assert [plan.sampler for plan in USUAL.values()] == list(USUAL) == list(SAMPLERS)
    for plan in (*USUAL.values(), *QUALITIES.values()):
        assert plan.sampler in SAMPLERS and plan.spacing in SPACINGS


def test_a_png_of_a_folder_names_the_command_that_makes_the_folder(trained, capsys):
    assert main(["sample", str(trained), "-n", "3", "-o", "new", "--steps", "2", "-q"]) == 0
    before = Path("new/00001.png").read_bytes()
    assert main(["inspect", "new/00001.png", "--json"]) == 0
    command = json.loads(capsys.readouterr().out)["command"]
    Path("new").rename("old")
    assert main(shlex.split(command)[1:]) == 0
    assert Path("new/00001.png").read_bytes() == before


def test_classes_in_turn_one_class_and_oblong_images(trained_classes):
    assert main(["sample", str(trained_classes), "-n", "4", "-o", "all.npz", "--steps", "3", "-q"]) == 0
    assert np.load("all.npz")["images"].shape == (4, 16, 24, 1)
    for name in ("cats", "dogs"):
        assert (
            main(
                ["sample", str(trained_classes), "-n", "4", "-o", f"{name}.npz", "--steps", "3", "--class", name, "-q"]
            )
            == 0
        )
    every, cats, dogs = (np.load(f"{name}.npz")["images"].astype(int) for name in ("all", "cats", "dogs"))
    assert np.abs(every[::2] - cats[::2]).max() <= 1 and np.abs(every[1::2] - dogs[1::2]).max() <= 1
    assert not np.array_equal(cats, dogs)
    assert main(["sample", str(trained_classes), "-n", "4", "-o", "all.png", "--steps", "3", "-q"]) == 0
    page = np.asarray(Image.open("all.png"))  # a row a class, with its name on the left
    margin = page.shape[1] - (2 + 2 * 26)
    assert page.shape[0] == 2 + 2 * 18 and margin > 20
    cell = lambda row, column: page[2 + row * 18 :, margin + 2 + column * 26 :][:16, :24].astype(int)
    for i, image in enumerate(every):
        assert np.abs(cell(i % 2, i // 2) - image[..., 0]).max() <= 1
    assert main(["sample", str(trained_classes), "-n", "4", "-o", "plain.png", "--steps", "3", "--columns", "4", "-q"]) == 0
    assert Image.open("plain.png").size == (2 + 4 * 26, 2 + 18)
    assert main(["sample", str(trained_classes), "-n", "3", "-o", "all.gif", "--steps", "3", "--scale", "1", "-q"]) == 0
    assert Image.open("all.gif").size == (margin + 2 + 2 * 26, 2 + 2 * 18)


def test_a_run_folder_means_its_newest_checkpoint(trained):
    checkpoints = trained / "checkpoints"
    for i, path in enumerate((trained, checkpoints, checkpoints / "step-00000006.pt")):
        assert main(["sample", str(path), "-n", "2", "-o", f"{i}.npz", "--steps", "3", "-q"]) == 0
    assert Path("0.npz").read_bytes() == Path("1.npz").read_bytes() == Path("2.npz").read_bytes()


@pytest.mark.parametrize("command", [["sample"], ["noise-demo", "picture.png", "--ckpt"]])
@pytest.mark.parametrize("named", ["run", "run/checkpoints", "run/checkpoints/step-00000006.pt"])
def test_a_damaged_checkpoint_is_not_passed_over_but_names_a_good_one(trained, command, named, capsys):
    Image.new("L", (9, 9)).save("picture.png")
    shutil.copytree(trained / "checkpoints", "run/checkpoints")
    Path("run/checkpoints/step-00000006.pt").write_bytes(b"")
    assert main([*command, named]) == Exit.CHECKPOINT
    shown = capsys.readouterr().err
    assert "run/checkpoints/step-00000006.pt: empty" in shown
    assert "the newest good one is run/checkpoints/step-00000004.pt" in shown
    Path("run/checkpoints/step-00000004.pt").unlink()
    assert main([*command, named]) == Exit.CHECKPOINT
    assert "no good one" in capsys.readouterr().err


def test_a_run_without_checkpoints_says_so(trained, capsys):
    Path("run").mkdir()
    shutil.copy(trained / "run.yaml", "run")
    assert main(["sample", "run"]) == Exit.CHECKPOINT
    assert "has not saved a checkpoint yet" in capsys.readouterr().err
    assert main(["sample", "run/run.yaml"]) == Exit.CHECKPOINT
    assert "a text file, not a checkpoint" in capsys.readouterr().err


def test_without_a_name_nothing_is_overwritten(trained):
    for _ in range(2):
        assert main(["sample", str(trained), "-n", "1", "--steps", "1", "-q"]) == 0
    assert sorted(p.name for p in Path().glob("*.png")) == ["samples-0.png", "samples-1.png"]


def test_a_slash_makes_a_folder_whatever_its_ending(trained):
    command = ["sample", str(trained), "-n", "1", "-o", "new.v2/", "--steps", "1", "-q"]
    assert main(command) == 0
    assert [path.name for path in Path("new.v2").iterdir()] == ["00000.png"]
    assert main([*command[:5], "new.v2", *command[6:], "--overwrite"]) == 0


def test_overwriting_a_folder_replaces_our_images_only(trained):
    command = ["sample", str(trained), "-o", "out", "--steps", "1", "-q"]
    assert main([*command, "-n", "3"]) == 0
    Path("out/mine.png").write_bytes(b"x")
    assert main([*command, "-n", "2"]) == Exit.OUTPUT
    assert main([*command, "-n", "2", "--overwrite"]) == 0
    assert sorted(p.name for p in Path("out").iterdir()) == ["00000.png", "00001.png", "mine.png"]
    Image.new("RGB", (4, 4)).save("out/00007.png")
    assert main([*command, "-n", "2", "--overwrite"]) == Exit.OUTPUT
    assert len(list(Path("out").iterdir())) == 4


def test_a_checkpoint_that_carries_code_is_refused_and_not_run(capsys):
    class Evil:
        def __reduce__(self):
            return (Path("pwned").touch, ())

    torch.save({"magic": "ddpmctl checkpoint", "x": Evil()}, "evil.pt")
    assert main(["sample", "evil.pt"]) == Exit.CHECKPOINT
    assert not Path("pwned").exists()


BAD = {
    "missing checkpoint": (["sample", "none.pt"], Exit.CHECKPOINT, "none.pt"),
    "a text": (["sample", "text.pt"], Exit.CHECKPOINT, "text.pt"),
    "another tool's weights": (["sample", "other.pt"], Exit.CHECKPOINT, "not a ddpmctl checkpoint"),
    "cut off": (["sample", "cut.pt"], Exit.CHECKPOINT, "cut.pt"),
    "changed": (["sample", "flipped.pt"], Exit.CHECKPOINT, "flipped.pt"),
    "a folder without checkpoints": (["sample", "."], Exit.CHECKPOINT, "without checkpoints"),
    "n = 0": (["sample", "RUN", "-n", "0"], Exit.CONFIG, "-n 0"),
    "n that is none": (["sample", "RUN", "-n", "few"], Exit.CONFIG, "-n"),
    "zero steps": (["sample", "RUN", "--steps", "0"], Exit.CONFIG, "--steps"),
    "more steps than T": (["sample", "RUN", "--steps", "21"], Exit.CONFIG, "the model has 20"),
    "unknown sampler": (["sample", "RUN", "--sampler", "ddin"], Exit.CONFIG, "ddim"),
    "eta for ddpm": (["sample", "RUN", "--sampler", "ddpm", "--eta", "0.5"], Exit.CONFIG, "--eta"),
    "eta without ddim": (["sample", "RUN", "--eta", "0.5"], Exit.CONFIG, "use --sampler ddim"),
    "unknown quality": (["sample", "RUN", "--quality", "bests"], Exit.CONFIG, "did you mean 'best'"),
    "unknown spacing": (["sample", "RUN", "--spacing", "cosine"], Exit.CONFIG, "karras"),
    "unknown threshold": (["sample", "RUN", "--threshold", "off"], Exit.CONFIG, "dynamic"),
    "eta out of range": (["sample", "RUN", "--eta", "2"], Exit.CONFIG, "--eta"),
    "class without classes": (["sample", "RUN", "--class", "cats"], Exit.CONFIG, "without classes"),
    "missing device": (["sample", "RUN", "--device", "cuda:7"], Exit.DEVICE, "cuda:7"),
    "unknown ending": (["sample", "RUN", "-o", "x.jpeg2"], Exit.CONFIG, ".jpeg2"),
    "output exists": (["sample", "RUN", "-o", "text.png"], Exit.OUTPUT, "text.png"),
    "unknown weights": (["sample", "RUN", "--weights", "best"], Exit.CONFIG, "ema"),
    "absurd n": (["sample", "RUN", "-n", "1e12", "-o", "new/"], Exit.CONFIG, "-n 1,000,000,000,000"),
    "n too large for a grid": (["sample", "RUN", "-n", "1M"], Exit.CONFIG, "-n 1,000,000: a picture of 18,002 x 18,002"),
    "n too large for a gif": (["sample", "RUN", "-n", "1M", "-o", "x.gif"], Exit.CONFIG, "-o folder/"),
    "n too large for the disk": (["sample", "RUN", "-n", "10M", "-o", "x.npz"], Exit.OUTPUT, "x.npz: -n 10,000,000 makes"),
    "scale too large": (["sample", "RUN", "-n", "4", "--scale", "1e15"], Exit.CONFIG, "give --scale 304 or less"),
    "scale too large for a gif": (["sample", "RUN", "-o", "x.gif", "--scale", "99"], Exit.CONFIG, "--scale 99"),
    "a column too long": (["sample", "RUN", "-n", "4000", "--columns", "1"], Exit.CONFIG, "give --columns 64"),
    "columns of no grid": (["sample", "RUN", "-o", "x.npz", "--columns", "2"], Exit.CONFIG, "--columns 2: x.npz holds"),
    "scale of no grid": (["sample", "RUN", "-o", "new/", "--scale", "2"], Exit.CONFIG, "--scale 2: new holds"),
    "columns of an animation": (["sample", "RUN", "--interpolate", "small.png", "small.png", "-o", "x.gif", "--columns", "2"],
                                Exit.CONFIG, "--columns 2: x.gif holds an animation"),
    "a folder named like a file": (["sample", "RUN", "-o", "text.pt/"], Exit.OUTPUT, "a file, where a folder"),
    "a file named like a folder": (["sample", "RUN", "-o", "five"], Exit.OUTPUT, "a file, where a folder"),
    "overwriting one": (["sample", "RUN", "-o", "five", "--overwrite"], Exit.OUTPUT, "choose another name"),
    "an ending that may be a folder's": (["sample", "RUN", "-o", "out.v2"], Exit.CONFIG, "-o out.v2/"),
    "a file for a folder": (["sample", "RUN", "-o", "text.pt/x.png"], Exit.OUTPUT, "text.pt"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_before_any_work(case, trained, capsys, monkeypatch):
    command, code, words = BAD[case]
    checkpoint = (trained / "checkpoints" / "step-00000006.pt").read_bytes()
    Path("text.pt").write_text("hello")
    Path("text.png").write_text("hello")
    Path("five").write_text("hello")
    Image.new("RGB", (8, 8)).save("small.png")
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1 << 30))
    Path("cut.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    Path("flipped.pt").write_bytes(spoilt(trained / "checkpoints" / "step-00000006.pt"))
    torch.save({"weight": torch.zeros(3)}, "other.pt")
    before = {path: path.read_bytes() for path in Path().rglob("*")}
    assert main([str(trained) if word == "RUN" else word for word in command]) == code
    shown = capsys.readouterr()
    assert words in shown.err
    assert "Traceback" not in shown.err and len(shown.err.strip().splitlines()) <= 2
    assert {path: path.read_bytes() for path in Path().rglob("*")} == before


def test_an_unknown_class_names_the_nearest(trained_classes, capsys):
    assert main(["sample", str(trained_classes), "--class", "cat"]) == Exit.CONFIG
    assert "did you mean 'cats'" in capsys.readouterr().err


def test_class_names_of_any_letters_are_readable_on_the_screen_and_in_the_picture(trained_classes, capsys):
    """Control characters as escapes; a script that the font lacks by the number of the class, with one warning."""
    Image.new("RGB", (16, 24), "red").save("cat.png")
    content = checkpoint.load(trained_classes / "checkpoints" / "step-00000006.pt")
    content.pop("digest")
    strange = ["a\nb\x1b[31m", "猫"]
    for file, names in (("strange.pt", strange), ("plain.pt", [r"a\nb\x1b[31m", "class 1"])):
        checkpoint.save(Path(file), {**content, "class_names": names})
        assert main(["sample", file, "-n", "4", "--steps", "1", "-o", f"{file}.png"]) == 0
        assert main(["sample", file, "-n", "4", "--steps", "1", "-o", f"{file}.gif"]) == 0
        warned = capsys.readouterr().err
        assert warned.count("warning:") == 2 * (file == "strange.pt")
        assert ("class 1 is 猫" in warned) == (file == "strange.pt")
        assert main(["sample", file, "-n", "4", "--steps", "1", "-o", f"{file}.npz"]) == 0  # which has no titles
        assert main(["sample", file, "-n", "2", "--steps", "1", "--class", names[0], "-o", f"{file}-one.png"]) == 0
        assert main(["sample", file, "-n", "2", "--class", "cow"]) == Exit.CONFIG
        assert main(["inspect", file]) == 0
        assert main(["inspect", f"{file}-one.png"]) == 0
        for name in (None, names[1]):
            flags = ["--class", name] if name else []
            assert main(["noise-demo", "cat.png", "--ckpt", file, "--frames", "2", "-o", "demo.png", "--overwrite", *flags]) == 0
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out + printed.err and "a\nb" not in printed.out + printed.err
    assert Image.open("strange.pt.png").tobytes() == Image.open("plain.pt.png").tobytes()
