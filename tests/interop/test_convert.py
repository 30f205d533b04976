"""``ddpmctl convert`` and the commands that take other tools' checkpoints, by their real command lines."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from pipelines import saved
from safetensors.torch import load_file, save_file

from ddpmctl import checkpoint
from ddpmctl.cli import main
from ddpmctl.errors import Exit
from ddpmctl.images import read_provenance
from ddpmctl.interop.formats import FORMATS
from helpers import write_images

PTH = Path(__file__).parents[1] / "data" / "reference" / "seed-linear.pth"


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """The same things in each format: a pipeline, and what it converts to; the predecessor's file; a run."""
    folder = tmp_path_factory.mktemp("originals")
    saved(folder / "pipe")
    for name in ("pipe.pt", "pipe.safetensors"):
        assert main(["convert", str(folder / "pipe"), str(folder / name), "-q"]) == 0
    shutil.copy(PTH, folder / "old.pth")
    shutil.copytree(trained, folder / "run")
    return folder


@pytest.fixture
def files(originals: Path, tmp_path: Path) -> None:
    """All of :func:`originals` in the test's own folder."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)


SOURCES = ("pipe", "pipe.pt", "pipe.safetensors", "old.pth", "run")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("source", SOURCES)
def test_every_format_is_sampled_inspected_and_shown(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", source, "-n", "2", "--steps", "2", "-o", "x.png"]) == 0
    out = capsys.readouterr().out
    assert ("not said by the file" in out) == (source == "old.pth")
    assert ("as its own pipeline samples" in out) == (source == "pipe")
    assert "step 0" not in out
    provenance = read_provenance(Path("x.png"))
    assert provenance is not None and provenance["path"].startswith(source)
    assert main(["inspect", source, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    if source != "run":
        assert facts["what"]["kind"] == "checkpoint" and facts["converted"]["optimiser"].startswith("none")
        assert facts["parameters"]["total"] > 1e5 and facts["training"] == {"step": "not known"}
    Image.new("RGB", (16, 16), "red").save("cat.png")
    assert main(["noise-demo", "cat.png", "--ckpt", source, "-o", "demo.png", "--frames", "2"]) == 0


@pytest.mark.usefixtures("files")
def test_all_forms_of_a_pipeline_give_the_same_images() -> None:
    pictures = set()
    for source in ("pipe", "pipe.pt", "pipe.safetensors"):
        for weights in ("ema", "raw"):
            assert main(["sample", source, "-n", "2", "--steps", "2", "--weights", weights, "-o", "x.png", "--overwrite"]) == 0
            pictures.add(Image.open("x.png").tobytes())
    assert len(pictures) == 1


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("target", ["new.pt", "new.safetensors", "new/", "deep/er/new.pt"])
@pytest.mark.parametrize("source", SOURCES)
def test_from_every_format_to_every_format_and_back(source: str, target: str) -> None:
    """To the bit, as far as the format holds it: a folder of diffusers has the averaged weights alone."""
    from runs import assert_same

    assert main(["convert", source, target]) == 0
    assert main(["convert", target, "back.pt"]) == 0
    assert main(["convert", source, "direct.pt"]) == 0
    back, direct = checkpoint.load(Path("back.pt")), checkpoint.load(Path("direct.pt"))
    assert_same(back["ema"]["net"], direct["ema"]["net"])
    if target == "new/":
        assert_same(back["net"], direct["ema"]["net"])
    else:
        assert back["digest"] == direct["digest"]
    assert not list(Path().rglob(".ddpmctl-*"))


@pytest.mark.usefixtures("files")
def test_evaluate_takes_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch_fidelity")
    pytest.importorskip("efficientnet_lite_pytorch")
    write_images(Path("photos"))
    assert main(["evaluate", "pipe", "photos", "-n", "6", "--steps", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["what"]["path"] == "pipe" and not facts["data"]["trained_on"]
    assert facts["loss"]["of"] == "images of DATA" or "held" not in facts["loss"]["of"]


BAD: dict[str, tuple[list[str], Exit, str]] = {
    "no source": (["nowhere", "x.pt"], Exit.CHECKPOINT, "nowhere: no such checkpoint"),
    "a folder of nothing": (["photos", "x.pt"], Exit.CHECKPOINT, "without checkpoints"),
    "a picture": (["cat.png", "x.pt"], Exit.CHECKPOINT, "cat.png: a PNG image, not a checkpoint"),
    "a target that is there": (["pipe", "old.pth", "--to", "ddpmctl"], Exit.OUTPUT, "old.pth: exists"),
    "a folder that is there": (["run", "pipe"], Exit.OUTPUT, "pipe: exists"),
    "a folder of other things": (["pipe.pt", "photos", "--overwrite"], Exit.OUTPUT, "photos: holds"),
    "a run in the way": (["pipe.pt", "run", "--overwrite"], Exit.OUTPUT, "run: holds"),
    "a folder for a file": (["pipe.pt", "photos", "--to", "safetensors", "--overwrite"], Exit.OUTPUT, "photos: exists and is a folder"),
    "a file for a folder": (["pipe", "old.pth", "--to", "diffusers", "--overwrite"], Exit.OUTPUT, "old.pth: exists and is no folder"),
    "a place that cannot be": (["pipe", "old.pth/x.pt"], Exit.OUTPUT, "old.pth is not a folder"),
    "itself": (["pipe.pt", "pipe.pt", "--overwrite"], Exit.CONFIG, "pipe.pt: is SRC itself"),
    "an unknown ending": (["pipe", "x.ckpt"], Exit.CONFIG, "x.ckpt: no format ends in .ckpt"),
    "the predecessor's ending": (["pipe", "x.pth"], Exit.CONFIG, "x.pth: no format ends in .pth"),
    "a format that is read only": (["pipe", "x.pth", "--to", "predecessor"], Exit.CONFIG, "--to predecessor: is only read"),
    "a folder of a format that is a file": (["pipe", "x/", "--to", "safetensors"], Exit.CONFIG, "x/: safetensors is a file, not a folder"),
    "a file in place of a folder": (["pipe", "old.pth/", "--overwrite"], Exit.OUTPUT, "old.pth: exists and is no folder"),
    "no such format": (["pipe", "x.pt", "--to", "difusers"], Exit.CONFIG, "did you mean 'diffusers'"),
    "no such weights": (["pipe", "x.pt", "--weights", "last"], Exit.CONFIG, "--weights: 'last'"),
    "a size that is none": (["old.pth", "x.pt", "--size", "big"], Exit.CONFIG, "'big' is not a size"),
    "a size to be found": (["old.pth", "x.pt", "--size", "auto"], Exit.CONFIG, "--size auto"),
    "a size that does not halve": (["old.pth", "x.pt", "--size", "15"], Exit.CONFIG, "15 pixels do not halve"),
    "a size that is known": (["pipe", "x.pt", "--size", "32"], Exit.CONFIG, "--size: pipe says that itself: 16"),
    "a size of ours": (["run", "x.pt", "--size", "32"], Exit.CONFIG, "says that itself"),
    "a setting that is none": (["old.pth", "x.pt", "--set", "model.groups=3"], Exit.CONFIG, "--set model.groups: no such key"),
    "a setting that does not fit": (["old.pth", "x.pt", "--set", "model.norm_groups=5"], Exit.CONFIG, "--set model.norm_groups: 5 does not divide"),
    "other weights": (["nan.pt", "x.pt"], Exit.CHECKPOINT, "no numbers"),
    "a cut file": (["cut.pth", "x.pt"], Exit.CHECKPOINT, "cut.pth: damaged"),
    "a script": (["script.pt", "x.pt"], Exit.CHECKPOINT, "carries code"),
}  # fmt: skip


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_and_changes_nothing(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, code, words = BAD[case]
    write_images(Path("photos"))
    Image.new("RGB", (16, 16), "red").save("cat.png")
    Path("cut.pth").write_bytes(PTH.read_bytes()[:9000])
    torch.save(os.getcwd, "script.pt")
    content = checkpoint.load(Path("pipe.pt"))
    content["ema"]["net"]["conv_in.bias"][0] = float("nan")
    checkpoint.save(Path("nan.pt"), {key: value for key, value in content.items() if key != "digest"})
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert main(["convert", *command]) == code
    shown = capsys.readouterr().err
    assert words in shown, shown
    assert "Traceback" not in shown and len(shown.strip().splitlines()) <= 2
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("source", ["pipe", "old.pth", "pipe.pt"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_every_command(
    source: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(Path("photos"))
    Image.new("RGB", (16, 16), "red").save("cat.png")
    if source == "pipe":
        file = Path("pipe/unet/diffusion_pytorch_model.safetensors")
        state = load_file(file)
        state["conv_out.bias"][0] = value
        save_file(state, file, {"format": "pt"})
    elif source == "old.pth":
        state = torch.load("old.pth", weights_only=True)
        state["ema_model.out_conv.bias"][0] = value
        torch.save(state, "old.pth")
    else:
        content = checkpoint.load(Path("pipe.pt"))
        content["net"]["conv_out.bias"][0] = value
        checkpoint.save(Path("pipe.pt"), {key: part for key, part in content.items() if key != "digest"})
    commands = [
        ["sample", source, "-n", "1", "--steps", "1", "-o", "x.png"], ["inspect", source], ["convert", source, "x.pt"],
        ["noise-demo", "cat.png", "--ckpt", source, "-o", "demo.png"], ["train", "photos", "--init-from", source, "--size", "16", "--dry-run"],
    ]  # fmt: skip
    if importlib.util.find_spec("torch_fidelity") and importlib.util.find_spec("efficientnet_lite_pytorch"):
        commands.append(["evaluate", source, "photos", "-n", "6"])
    for command in commands:
        assert main(command) == Exit.CHECKPOINT, command
        shown = capsys.readouterr().err
        assert f"{source}: some of its weights are no numbers" in shown and "conv_out.bias" in shown, shown
    assert not Path("x.png").exists() and not Path("x.pt").exists()


@pytest.mark.usefixtures("files")
def test_a_folder_of_ours_is_replaced_whole() -> None:
    assert main(["convert", "run", "new/"]) == 0
    before = (Path("new") / "unet" / "config.json").read_bytes()
    assert main(["convert", "pipe", "new/"]) == Exit.OUTPUT
    assert (Path("new") / "unet" / "config.json").read_bytes() == before
    assert main(["convert", "pipe", "new/", "--overwrite"]) == 0
    assert (Path("new") / "unet" / "config.json").read_bytes() != before
    assert sorted(p.name for p in Path("new").rglob("*") if p.is_file()) == [
        "config.json", "diffusion_pytorch_model.safetensors", "model_index.json", "scheduler_config.json",
    ]  # fmt: skip
    assert not list(Path().glob(".ddpmctl-*"))


def looks(folder: Path) -> dict[str, tuple[int, object]]:
    """Everything in ``folder`` and itself: permissions, and bytes, where a link leads, or that it is a folder."""
    found: dict[str, tuple[int, object]] = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        what = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        found[str(path)] = (path.lstat().st_mode, what)
    return found


@pytest.mark.usefixtures("files")
def test_only_our_own_files_of_a_folder_are_replaced() -> None:
    """Its permissions, theirs, links to it and folders in it stay; a link in place of a file is replaced, not what it leads to."""
    weights = Path("new/unet/diffusion_pytorch_model.safetensors")
    assert main(["convert", "run", "new/"]) == 0
    (Path("new") / "empty" / "er").mkdir(parents=True)
    for path, mode in ((Path("new"), 0o750), (Path("new/empty"), 0o700), (weights, 0o640), (Path("new/unet"), 0o711)):
        path.chmod(mode)
    Path("elsewhere.json").write_text("{}")
    Path("new/model_index.json").unlink()
    Path("new/model_index.json").symlink_to("../elsewhere.json")
    Path("link").symlink_to("new")
    number, before = Path("new").stat().st_ino, looks(Path("new"))
    assert main(["convert", "pipe", "new/", "--overwrite"]) == 0
    after = looks(Path("new"))
    assert after.keys() == before.keys() and Path("new").stat().st_ino == number and Path("link").is_symlink()
    changed = {name for name in after if after[name][1] != before[name][1]}
    assert changed == {"new/model_index.json", "new/unet/config.json", "new/scheduler/scheduler_config.json", str(weights)}
    assert all(after[name][0] == before[name][0] for name in after if name != "new/model_index.json")
    assert Path("elsewhere.json").read_text() == "{}" and not Path("new/model_index.json").is_symlink()
    assert main(["convert", "new", "x.pt"]) == main(["convert", "pipe", "y.pt"]) == 0
    assert checkpoint.load(Path("x.pt"))["net"].keys() == checkpoint.load(Path("y.pt"))["net"].keys()


@pytest.mark.usefixtures("files")
def test_folders_that_are_links_or_named_as_files_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name, kind in (("unet", "a link to a folder"), ("model_index.json", "a folder")):
        assert main(["convert", "run", f"{name}.d/"]) == 0
        place = Path(f"{name}.d") / name
        if kind == "a folder":
            place.unlink()
            place.mkdir()
        else:
            place.rename("moved")
            place.symlink_to("../moved")
        before = looks(Path())
        assert main(["convert", "pipe", f"{name}.d/", "--overwrite"]) == Exit.OUTPUT
        assert f"holds {name}, {kind}, which is not replaced" in capsys.readouterr().err
        assert looks(Path()) == before


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("fails", ["rename", "fsync"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_folder_is_replaced_whole_or_not_at_all(fails: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever change of name or flush fails; a file of ours that was not there is not there afterwards either."""
    (Path("pipe/scheduler/scheduler_config.json")).unlink()
    Path("pipe/scheduler").rmdir()
    before, owner = looks(Path("pipe")), Path if fails == "rename" else os
    plain, left = getattr(owner, fails), [0]

    def failing(*args: object) -> object:
        left[0] -= 1
        if left[0] == 0:
            raise error
        return plain(*args)

    monkeypatch.setattr(owner, fails, failing)
    for nth in range(1, 100):
        left[0] = nth
        if main(["convert", "run", "pipe/", "--overwrite", "-q"]) == 0:
            break
        assert looks(Path("pipe")) == before, nth
    assert 7 < nth < 99 and looks(Path("pipe")) != before


@pytest.mark.usefixtures("files")
def test_a_power_cut_leaves_no_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as names go: whatever the number of changes done, the folder is the old one, the new one, or refused."""
    assert main(["convert", "run", "new/"]) == 0
    whole = {name: formats_load(name) for name in ("pipe", "new")}
    plain, seen = Path.rename, set()

    def watched(path: Path, target: Path) -> Path:
        found = plain(path, target)
        if main(["convert", "pipe", "now.pt", "--overwrite", "-q"]) == 0:
            seen.add(next(name for name, digest in whole.items() if digest == formats_load("now.pt")))
        else:
            seen.add("refused")
        return found

    monkeypatch.setattr(Path, "rename", watched)
    assert main(["convert", "run", "pipe/", "--overwrite", "-q"]) == 0
    assert seen == {"refused", "new"}


def formats_load(name: str) -> str:
    from ddpmctl.interop.formats import load

    content = load(Path(name)).content
    return checkpoint.digest_of({key: content[key] for key in ("net", "config")})


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("target", ["photos.v2/", "x.safetensors/", "x.pt/", "x.ckpt//"])
def test_a_destination_that_ends_in_a_slash_is_a_folder(target: str) -> None:
    assert main(["convert", "run", target]) == 0
    assert Path(target, "model_index.json").is_file()
    assert main(["convert", target, "back.pt"]) == 0


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("target", ["pipe/", "pipe.pt", "pipe.safetensors"])
def test_a_disk_that_fills_leaves_what_was_there(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpmctl import files as writing

    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    full = OSError(28, "No space left on device")

    def fail(*args: object) -> None:
        raise full

    monkeypatch.setattr(writing.os, "fsync", fail)
    assert main(["convert", "run", target, "--overwrite"]) == Exit.OUTPUT
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_the_help_names_the_formats(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["convert", "--help"]) == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert all(name in shown for name, row in FORMATS.items() if row.write)
    assert "predecessor" in shown


def test_neither_the_present_folder_nor_checkpoints_of_a_run_are_replaced(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, "run")
    Path("here").mkdir()
    before = {file: file.read_bytes() for file in Path("run/checkpoints").iterdir()}
    for name in ("step-00000006.pt", "step-00000099.pt"):
        assert main(["convert", "run", f"run/checkpoints/{name}", "--overwrite"]) == 6
    assert {file: file.read_bytes() for file in Path("run/checkpoints").iterdir()} == before
    monkeypatch.chdir("here")
    assert main(["convert", "../run", ".", "--to", "diffusers", "--overwrite"]) == 6
    assert "runs in" in capsys.readouterr().err
    assert Path.cwd().exists()
