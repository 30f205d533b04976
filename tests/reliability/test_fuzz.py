"""Thousands of random inputs: whatever is given, an answer in plain words or a result that is true, and nothing else touched.

Each test draws from :mod:`runfile_inputs`, :mod:`file_inputs` or :mod:`flag_inputs`, and each has two ways to fail: the
promise that :func:`fuzzing.check` holds every command to, and an answer of its own to compare with what a success says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from file_inputs import ImageFile, Zip, damaged, flipped, image_files, images, square, zips
from flag_inputs import FLAGS, ODD_NAMES, Line, lines, make_world
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from runfile_inputs import KINDS, Whole, flat, junk, reading, rendered, right_files, some_entries

from ddpmctl import checkpoint
from ddpmctl.config import DataConfig, RunConfig, known_keys
from ddpmctl.data.dataset import load_images
from ddpmctl.data.decode import MAX_PIXELS
from ddpmctl.data.formats import FORMATS
from ddpmctl.errors import CheckpointError, ConfigError, DataError, DdpmctlError, Exit
from ddpmctl.images import read_provenance
from ddpmctl.parsing import shown
from ddpmctl.runfile import read_run_file, resolve, to_yaml
from fuzzing import TRIED, check, inputs, no_hang, process, run, sandbox, snapshot, writes_only
from runs import assert_same, state_of, steps_saved

# ---------------------------------------------------------------- run files


def check_error(error: DdpmctlError, *names: str) -> None:
    """One line that names what is wrong, and one what to do."""
    for text in (error.problem, error.advice):
        assert text and text.isprintable() and len(text) < 700, text
    assert any(name in error.problem for name in names), error.problem


def test_every_key_is_known_here() -> None:
    assert list(KINDS) == known_keys()


@given(right_files())
@inputs(100)
def test_what_a_right_run_file_says_is_what_is_read(file: tuple[str, dict[str, object]]) -> None:
    TRIED["run files"] += 1
    text, said = file
    with sandbox():
        path = Path("run.yaml")
        path.write_bytes(text.encode())
        with no_hang(), writes_only():
            config = resolve(read_run_file(path))
        assert typed(flat(config)) == typed(flat(RunConfig()) | said)
        path.write_bytes(to_yaml(config, comments=bool(said)).encode("utf-8", "surrogateescape"))
        assert resolve(read_run_file(path)) == config


def typed(values: dict[str, object]) -> dict[str, tuple[type, object]]:
    """So that 1 is not 1.0, nor True."""
    return {key: (type(value), value) for key, value in values.items()}


_SOME_FILES = some_entries().flatmap(rendered).map(lambda text: text.encode("utf-8", "surrogatepass"))
_FILES = _SOME_FILES | _SOME_FILES | _SOME_FILES.flatmap(damaged) | right_files().flatmap(lambda f: damaged(f[0].encode())) | junk()


@given(_FILES)
@inputs(400)
def test_any_run_file_is_refused_with_its_line_or_read_as_yaml_has_it(raw: bytes) -> None:
    TRIED["run files"] += 1
    with sandbox():
        path = Path("run.yaml")
        path.write_bytes(raw)
        try:
            with no_hang(), writes_only():
                config = resolve(read_run_file(path))
        except ConfigError as error:
            check_error(error, "run.yaml", *KINDS)
            if found := re.match(r"run\.yaml:(\d+): ((?:[a-z]+\.)?([a-z_0-9]+))", error.problem):
                line = re.split("\r\n|[\n\r\x85\u2028\u2029]", raw.decode("utf-8-sig"))[int(found[1]) - 1]
                assert found[2] not in KINDS or found[3] in line or "\\" in line, error.problem
            return
        assert typed(flat(config)) == typed(flat(RunConfig()) | reading(raw.decode("utf-8-sig")))


# ---------------------------------------------------------------- images

_WHITE = (255, 255, 255)


def plainly(raw: bytes) -> Image.Image | None:
    """The image as Pillow has it, upright, in RGBA, or grey of many bits as 8; None where Pillow cannot read it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(BytesIO(raw), formats=FORMATS)
            getattr(image, "is_animated", None)  # which a file that is cut after its first picture cannot tell
            if image.width * image.height > MAX_PIXELS:
                return None
            image.load()
            with suppress(Exception):  # of EXIF data that cannot be read; the pixels may still be good
                image = ImageOps.exif_transpose(image)
            if image.mode == "F" or image.mode.startswith("I"):
                return image
            return image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    except Exception:  # noqa: BLE001 - its parsers raise whatever comes
        return None


@pytest.mark.parametrize("name", sorted(images()))
def test_a_whole_image_is_the_pixels_that_pillow_reads(name: str) -> None:
    check_image(ImageFile(name, images()[name]), 3)


@given(image_files(), st.sampled_from([1, 3, 4, "auto"]))
@inputs(400)
def test_an_image_is_the_pixels_that_pillow_reads_or_listed_as_bad(file: ImageFile, channels: int | str) -> None:
    check_image(file, channels)


def check_image(file: ImageFile, channels: int | str) -> None:
    """What is read of ``file`` is what Pillow reads, and one that Pillow cannot read is on the list."""
    TRIED["images"] += 1
    plain = plainly(file.raw)
    small = plain is not None and plain.width <= 300 and plain.height <= 300
    size = (plain.height, plain.width) if plain is not None and small else (8, 8)
    config = DataConfig(size=size, channels=channels, fit="stretch", max_bad=1, cache=False, workers=1)
    with sandbox():
        Path("data").mkdir()
        Path("data/~whole.png").write_bytes(square((7, 8, 9)))
        Path("data", file.name).write_bytes(file.raw)
        with no_hang(), writes_only():
            dataset = load_images(config, Path("data"))
    bad = dict(dataset.report.bad)
    assert dataset.report.usable == len(dataset) == 2 - len(bad) and set(bad) <= {file.name}
    assert (dataset.images[-1] == dataset.images[-1][:, :1, :1]).all(), "the good one comes last, all of one colour"
    for reason in bad.values():
        assert 0 < len(reason) <= 200 and reason.isprintable(), reason
    assert bool(bad) == (plain is None), bad
    if plain is not None and small:
        assert_pixels(dataset.images[0].permute(1, 2, 0).numpy(), plain)


def assert_pixels(ours: np.ndarray, plain: Image.Image) -> None:
    """``ours`` (H, W, C) shows ``plain``, on white where there is no alpha."""
    if plain.mode == "F" or plain.mode.startswith("I"):
        return
    if ours.shape[2] == 4:
        expected = np.asarray(plain)
    else:
        canvas = Image.alpha_composite(Image.new("RGBA", plain.size, (*_WHITE, 255)), plain).convert("RGB")
        expected = np.asarray(canvas if ours.shape[2] == 3 else canvas.convert("L")).reshape(ours.shape)
    assert np.abs(ours.astype(int) - expected).max() <= 1


# ---------------------------------------------------------------- zips


@given(zips())
@inputs(250)
def test_a_zip_gives_its_images_and_nothing_else(file: Zip) -> None:
    TRIED["zips"] += 1
    config = DataConfig(size=(4, 4), channels=3, fit="stretch", max_bad=1, cache=False, workers=1)
    outside = (250, 250, 250)
    with sandbox() as here:
        path = here / "images.zip"
        for place in (here, here.parent):
            (place / "OUTSIDE.png").write_bytes(square(outside))
        path.write_bytes(file.raw)
        try:
            with no_hang(), writes_only():
                dataset = load_images(config, path)
        except DataError as error:
            check_error(error, str(path))
            assert not (file.honest and file.certain())
            return
        finally:
            (here.parent / "OUTSIDE.png").unlink()
    colours, report = {tuple(image[:, 0, 0].tolist()) for image in dataset.images}, dataset.report
    assert (dataset.images == dataset.images[:, :, :1, :1]).all()
    assert colours <= {member.colour for member in file.members if member.good or not file.honest}, "from elsewhere"
    assert len(dataset) == report.usable
    assert all(text.isprintable() for row in report.bad for text in row)
    if file.honest:
        assert colours >= file.certain(), "left out"
        assert {name for name, _ in report.bad} >= {shown(name) for name in file.refused()}


# ---------------------------------------------------------------- command lines


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Iterator[Path]:
    """A folder with everything that command lines speak of; commands are run in ``here`` in it."""
    place = tmp_path_factory.mktemp("world")
    make_world(place, trained)
    yield place


@contextmanager
def in_world(world: Path) -> Iterator[Path]:
    """``here``, new; the rest of the world must stay as it is."""
    here, before = world / "here", Path.cwd()
    (here / "taken").mkdir(parents=True)
    (here / "taken" / "x.txt").write_text("mine")
    (here / "old.png").write_bytes(images()["grey.png"])
    os.chdir(here)
    rest = {name: state for name, state in snapshot(world).items() if not name.startswith("here")}
    try:
        yield here
    finally:
        os.chdir(before)
        after = {name: state for name, state in snapshot(world).items() if not name.startswith("here")}
        shutil.rmtree(here)
    assert after == rest


_NAMES = [*KINDS, "DATA", "CKPT", "IMG", "to inspect", "device", "levels", "extra argument(s) ()"]


@pytest.mark.parametrize(("command", "count"), [("train", 25), ("sample", 40), ("noise-demo", 25), ("inspect", 20), ("convert", 30), ("cache", 10)])
def test_any_flags_are_refused_by_name_or_obeyed(world: Path, command: str, count: int) -> None:
    @given(lines(command))
    @inputs(count)
    def check_line(line: Line) -> None:
        TRIED[f"{command} lines"] += 1
        with in_world(world) as here:
            before = snapshot(here)
            done = run(*line.words, places=[here])
            check(done, *_NAMES, *FLAGS[command], *line.names())
            after = snapshot(here)
            changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
            if done.code == 0 and command in ("sample", "noise-demo"):
                assert ("?", None) in line.flags or assert_made(line, command, here, changed)
                return
            if done.code == 0 and command == "convert":
                target = Path(line.words[2]).parts
                assert ("?", None) in line.flags or all(Path(name).parts[: len(target)] in (target, target[:1]) for name in changed)
                return
            assert not changed, (line.words, changed)
            if done.code == 0 and ("--json", None) in line.flags and not {("--defaults", None), ("?", None)} & {*line.flags}:
                assert json.loads(done.out)
            if done.code == 0 and command == "train" and not {("--resume", None), ("--quiet", None), ("?", None)} & {*line.flags}:
                settings = dict(value.split("=", 1) for name, value in line.flags if name == "--set" and value)
                steps, batch = (Whole().meaning(settings.get(f"train.{key}", last(line, f"--{key}".replace("_", "-"), default)))
                                for key, default in (("steps", "6"), ("batch_size", "4")))  # fmt: skip
                assert f"{steps:,} steps of {batch} images" in done.out, (line.words, done.out)

    check_line()


@pytest.mark.parametrize("place", ODD_NAMES, ids=lambda place: ascii(place[-10:]))
def test_an_odd_name_is_refused_in_plain_words(world: Path, place: str) -> None:
    for words in ("train X --dry-run", "train ../photos --config ../tiny.yaml --out X --dry-run", "train ../photos --set X=1 --dry-run",
                  "train ../photos --config X", "sample X", "sample ../run -n 1 --steps 1 --out X/x.png", "sample ../run --class X",
                  "noise-demo X", "noise-demo ../cat.png --ckpt X", "noise-demo ../cat.png --frames 2 --size 8 --out X/x.png",
                  "inspect X", "inspect ../photos/X"):  # fmt: skip
        TRIED["odd names"] += 1
        with in_world(world) as here:
            check(run(*(word.replace("X", place) for word in words.split()), places=[here]), place, str(Path(place)), *KINDS)


def last(line: Line, flag: str, default: str) -> str:
    """The value that counts, of a flag that may come several times."""
    return next((value for name, value in reversed(line.flags) if name == flag and value is not None), default)


def assert_made(line: Line, command: str, here: Path, changed: set[str]) -> bool:
    """Exactly the output that was asked for is there, and is what was asked for."""
    out = last(line, "--out", "samples-0.png" if command == "sample" else "noise-demo.png")
    path = here / out
    parents = {str(folder.relative_to(here)) for folder in path.parents if folder.is_relative_to(here)}
    assert changed and all(Path(name).is_relative_to(Path(out)) or name in parents for name in changed), (line.words, changed)
    number = lambda flag, default: Whole().meaning(last(line, flag, default))
    asked = {name for name, _ in line.flags}
    n = number("--frames", "9") if "--interpolate" in asked else number("-n", "64")
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            assert arrays["images"].shape == (n, 16, 16, 3)
        return True
    pictures = sorted(path.glob("0*.png")) if path.is_dir() else [path]
    assert len(pictures) == (n if path.is_dir() else 1)
    for picture in pictures:
        with Image.open(picture) as image:
            image.load()
        told = read_provenance(picture)
        assert told is not None and told["seed"] == number("--seed", "0")
        if command == "sample":
            assert (told.get("n", told.get("frames")), told["steps"]) == (n, number("--steps", "20"))
            usual = "ddim" if "--interpolate" in asked else "ddpm" if "--inpaint" in asked else "dpm++"
            row = {"fast": "unipc", "balanced": "dpm++", "best": "ddpm"}.get(last(line, "--quality", ""), usual)
            assert (told["sampler"], told["weights"]) == (last(line, "--sampler", row), last(line, "--weights", "ema"))
            assert told["threshold"] == last(line, "--threshold", "clip")
    return True


# ---------------------------------------------------------------- files of all kinds, through the commands

_CHEAP = ["--steps", "2", "--batch-size", "2", "--size", "16", "--set", "model.base_channels=8", "--set", "model.num_res_blocks=1",
          "--set", "model.channel_mults=[1, 2]", "--set", "model.padding=0", "--set", "train.samples=2", "--set", "data.workers=1"]  # fmt: skip


@given(st.data())
@inputs(40)
def test_any_file_given_to_any_command_is_refused_in_plain_words_or_used(world: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["run file", "image", "zip"]))
    TRIED["files given to commands"] += 1
    with in_world(world) as here:
        if kind == "run file":
            path = here / data.draw(st.sampled_from(["run.yaml", "run.yml", "run.txt"]))
            path.write_bytes(data.draw(_FILES))
            commands = [["train", "../photos", "--config", path.name, "--dry-run", *_CHEAP], ["inspect", path.name], ["sample", path.name]]
        elif kind == "image":
            file = data.draw(image_files())
            path = here / "data" / file.name
            path.parent.mkdir()
            path.write_bytes(file.raw)
            commands = [["train", "data", "--config", "../tiny.yaml", "--dry-run"], ["inspect", "data", "--json"], ["inspect", f"data/{file.name}"],
                        ["noise-demo", f"data/{file.name}", "--frames", "2", "--out", "new.png"]]  # fmt: skip
        else:
            path = here / "data.zip"
            path.write_bytes(data.draw(zips()).raw)
            commands = [["train", "data.zip", "--config", "../tiny.yaml", "--dry-run"], ["inspect", "data.zip"], ["sample", "data.zip"]]
        command = data.draw(st.sampled_from(commands))
        before = snapshot(here)
        done = run(*command, places=[here])
        check(done, path.name, "data", *KINDS)
        made = {"new.png"} if command[0] == "noise-demo" and done.code == 0 else set()
        assert snapshot(here).keys() - before.keys() == made
        assert {name: state for name, state in snapshot(here).items() if name not in made} == before


# ---------------------------------------------------------------- run folders


class Good:
    """A run of six steps, and what comes of it."""

    run: Path
    pictures: dict[int, bytes]
    later: dict[str, Any]

    def __repr__(self) -> str:  # short, for it is an input of tests
        return f"the run {self.run}"


@pytest.fixture(scope="module")
def good(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Good:
    """What its checkpoints sample, by step, and its state two steps on."""
    place, found = tmp_path_factory.mktemp("good"), Good()
    found.run, found.pictures = trained, {}
    for step in steps_saved(trained):
        file = trained / "checkpoints" / f"step-{step:08d}.pt"
        assert run("sample", str(file), *_SAMPLE, "--out", str(place / f"{step}.png"), places=[place]).code == 0
        found.pictures[step] = pixels(place / f"{step}.png")
    shutil.copytree(trained, place / "run")
    assert run("train", "--resume", str(place / "run"), "--steps", "8", places=[place]).code == 0
    found.later = state_of(place / "run", 8)
    return found


_SAMPLE = ["-n", "1", "--steps", "2"]


def contents(folder: Path) -> dict[str, bytes]:
    """What lies in ``folder``, but for locks and what was asked for."""
    files = [path for path in folder.rglob("*") if path.name not in (".lock", "new.png") and path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if not path.is_symlink()}


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


@st.composite
def alterations(draw: st.DrawFn, folder: Path) -> list[str]:
    """Change one to three things in a copy of a run; returns what."""
    files = ["run.yaml", "metrics.csv", "checkpoints/step-00000006.pt", "checkpoints/step-00000004.pt", "checkpoints/step-00000006.pt"]
    told = []
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(files))
        path, other = folder / name, folder / draw(st.sampled_from([*files, "samples/step-00000006.png", "loss.png"]))
        content = path.read_bytes() if path.is_file() else b""
        how = draw(st.sampled_from(["damage", "damage", "damage", "text", "text", "delete", "folder", "link", "other", "rename", "empty"]))
        told.append(f"{how} {name}")
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)
        if how == "damage":
            path.write_bytes(draw(damaged(content, other.read_bytes() if other.is_file() else b"")))
        elif how == "text" and name == "run.yaml":
            path.write_bytes(draw(_FILES) if draw(st.booleans()) else content + b"\n" + draw(_SOME_FILES))
        elif how == "text":
            row = st.lists(st.sampled_from(["6", "5", "-1", "nan", "", "x", "9" * 30, "٣", "\0", '"', "1e3", "loss", "step"]), max_size=14).map(",".join)
            text = "\n".join(draw(st.lists(row, max_size=4)))
            path.write_bytes(draw(st.sampled_from([content, content[:120], b""])) + text.encode())
        elif how == "folder":
            path.mkdir()
        elif how == "link":
            path.symlink_to(draw(st.sampled_from(["nowhere", path.name, "/dev/null", ".."])))
        elif how == "other" and other.is_file():
            path.write_bytes(other.read_bytes())
        elif how == "rename":
            path.with_name(draw(st.sampled_from(["step-00000099.pt", "step-7.pt", "step-.pt", "step-x.pt", "step-٣.pt", "run.yml"]))).write_bytes(content)
        elif how == "empty":
            path.write_bytes(b"")
    return told


@given(st.data())
@inputs(25, shrink=False)
def test_an_altered_run_is_refused_or_goes_on_as_the_good_one(good: Good, data: st.DataObject) -> None:
    TRIED["altered runs"] += 1
    with sandbox() as here:
        shutil.copytree(good.run, here / "run")
        told = data.draw(alterations(here / "run"))
        command = data.draw(st.sampled_from([
            ["train", "--resume", "run", "--steps", "8"], ["train", "--resume", "run", "--dry-run"], ["inspect", "run", "--json"], ["inspect", "run"],
            ["sample", "run", *_SAMPLE, "--out", "new.png"], ["sample", "run/checkpoints/step-00000006.pt", *_SAMPLE, "--out", "new.png"],
        ]))  # fmt: skip
        before = contents(here)
        done = run(*command, places=[here])
        check(done, "run", *KINDS)
        began = command[:2] == ["train", "--resume"] and "--dry-run" not in command and done.code in (Exit.OK, Exit.OUTPUT)
        assert began or contents(here) == before, told
        if done.code:
            return
        if command[0] == "sample":
            assert pixels(Path("new.png")) in good.pictures.values(), told
            if not any("checkpoints" in each for each in told):
                assert pixels(Path("new.png")) == good.pictures[6], told
        elif "--json" in command:
            assert json.loads(done.out)
        elif "--dry-run" not in command and command[0] == "train":
            state = state_of(here / "run", 8)
            if state["config"] == good.later["config"]:
                for part in ("net", "ema", "optimizer", "step"):
                    assert_same(state[part], good.later[part], f"{told}: {part}")


@given(st.data())
@inputs(40, shrink=False)
def test_a_damaged_checkpoint_is_refused_or_has_the_very_same_content(good: Good, data: st.DataObject) -> None:
    TRIED["damaged checkpoints"] += 1
    older, newest = (good.run / "checkpoints" / f"step-{step:08d}.pt" for step in (4, 6))
    with sandbox():
        copy = Path("copy.pt")
        copy.write_bytes(data.draw(flipped(newest.read_bytes()) | damaged(newest.read_bytes(), older.read_bytes())))
        try:
            with no_hang(), writes_only():
                content = checkpoint.load(copy)
        except CheckpointError as error:
            check_error(error, "copy.pt")
            return
        assert_same(content, checkpoint.load(newest))


_PARTS = ["config", "image_shape", "class_names", "step", "net", "ema", "optimizer", "scaler", "data", "window", "rollbacks", "format", "magic", "version",
          "ema.net", "ema.steps", "data.images", "data.fingerprint", "optimizer.state", "optimizer.param_groups", "config.model", "config.train",
          "config.model.base_channels", "config.model.norm", "config.diffusion.timesteps", "config.data.path", "config.data.size", "config.seed"]  # fmt: skip
_OTHERS = [None, 0, -1, 1, 7, 1.5, "", "x", [], [1], [3, 16], [3, 16, 16], [-3, 16, 16], [3, 10**6, 10**6], ["a", "a"], ["cats"], {}, {"a": 1}, 2**70, True, float("nan")]  # fmt: skip


@given(st.sampled_from(_PARTS), st.sampled_from(["gone", *_OTHERS]), st.integers(0, 3))
@inputs(25, shrink=False)
def test_a_whole_checkpoint_of_strange_content_is_refused_or_used(good: Good, part: str, value: object, which: int) -> None:
    TRIED["strange checkpoints"] += 1
    with sandbox() as here:
        shutil.copytree(good.run, here / "run")
        file = here / "run" / "checkpoints" / "step-00000006.pt"
        content = checkpoint.load(file)
        *folders, name = part.split(".")
        place = content
        for folder in folders:
            place = place[folder]
        if value == "gone":
            del place[name]
        else:
            place[name] = value
        content.pop("digest")
        torch.save({**content, "digest": checkpoint.digest_of(content)}, file)
        command = [
            ["sample", str(file), *_SAMPLE, "--out", "new.png"], ["inspect", str(file)], ["inspect", "run"], ["train", "--resume", "run", "--dry-run"],
        ][which]  # fmt: skip
        done = run(*command, places=[here])
        check(done, "run", *KINDS)


# ---------------------------------------------------------------- real processes


@given(st.data())
@inputs(3, shrink=False)
def test_a_process_says_the_same(world: Path, data: st.DataObject) -> None:
    TRIED["processes"] += 1
    line = data.draw(st.sampled_from(["train", "sample", "inspect", "noise-demo"]).flatmap(lines))
    with in_world(world) as here:
        done = run(*line.words, places=[here])
    with in_world(world):
        real = process(*line.words)
    assert (real.code, real.err) == (done.code, done.err), line.words
