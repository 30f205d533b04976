"""Data sets by name: the same images as torchvision and datasets give, on the same way as a folder of them."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from ddpmctl import checkpoint
from ddpmctl.cli import main
from ddpmctl.config import DataConfig
from ddpmctl.data import named
from ddpmctl.data.dataset import load_images
from ddpmctl.data.named import SETS, whole
from ddpmctl.data.names import Named, read_name
from ddpmctl.errors import DataError
from ddpmctl.inspection import inspect_data
from helpers import TINY
from layouts import LAYOUTS, array, digits
from runs import assert_same_run, rows


@pytest.mark.parametrize("name", SETS)
def test_images_and_classes_are_those_of_torchvision(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, count, classes = LAYOUTS[name]
    build(tmp_path / "sets", monkeypatch)
    theirs = getattr(torchvision.datasets, name)(tmp_path / "sets", **next(iter(SETS[name].splits.values())))
    first = theirs[0][0]
    config = DataConfig(size=(first.height, first.width), conditional=bool(classes))
    ours = load_images(config, Path(f"torchvision:{name}@sets"))
    assert len(ours) == len(theirs) == count and ours.class_names == classes
    order = np.argsort([int(member.rpartition("/")[2]) for member in named.find_named(Path(f"torchvision:{name}@sets")).names])
    for i, place in enumerate(order):
        picture = theirs[i][0]
        assert np.array_equal(ours.images[place].permute(1, 2, 0).squeeze().numpy(), np.asarray(picture)), i
        if classes:
            label = theirs[i][1]
            expected = theirs.classes[label].replace("/", "-") if hasattr(theirs, "classes") else str(label)
            assert classes[ours.labels[place]] == expected, i


def test_every_data_set_is_laid_out_here_and_documented() -> None:
    assert LAYOUTS.keys() == SETS.keys()
    page = (Path(__file__).parents[2] / "docs" / "data-sets.md").read_text("utf-8")
    for name, row in SETS.items():
        line = next(line for line in page.splitlines() if line.startswith("| ") and re.search(rf"\b{name}\b", line))
        assert f"| {', '.join(row.splits)} |" in line


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("torchvision:MNIST", Named("torchvision", "MNIST", "", "")),
        ("torchvision:MNIST:test@/a b/c:d@e", Named("torchvision", "MNIST", "test", "/a b/c:d@e")),
        ("torchvision:STL10:train+unlabeled", Named("torchvision", "STL10", "train+unlabeled", "")),
        ("hf:user/set", Named("hf", "user/set", "", "")),
        ("hf:user/set:test", Named("hf", "user/set", "test", "")),
        ("hf:/a/b:train[:10%]", Named("hf", "/a/b", "train[:10%]", "")),
        ("photos", None), ("torchvisions:MNIST", None), ("/x/hf:y", None),
    ],
)  # fmt: skip
def test_names_are_read_and_written(text: str, found: Named | None) -> None:
    assert read_name(Path(text)) == found
    assert found is None or str(found) == text


def test_the_whole_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDPMCTL_DATA", raising=False)
    assert str(whole(Path("torchvision:SVHN"))).startswith("torchvision:SVHN:train@/")
    monkeypatch.setenv("DDPMCTL_DATA", "elsewhere")
    assert str(whole(Path("torchvision:OxfordIIITPet"))) == f"torchvision:OxfordIIITPet:trainval@{tmp_path}/elsewhere"
    (tmp_path / "local").mkdir()
    assert str(whole(Path("hf:local"))) == f"hf:{tmp_path}/local:train" and str(whole(Path("hf:a/b:x"))) == "hf:a/b:x"
    assert whole(Path("local")) == tmp_path / "local"
    for text in ("torchvision:SVHN", "hf:local", "hf:a/b"):
        assert whole(whole(Path(text))) == whole(Path(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("torchvision:CIFAR1O", "did you mean 'CIFAR10'"), ("torchvision:", "no such data set"),
        ("torchvision:MNIST:tset", "no split 'tset'"), ("hf:", "no such folder"), ("hf:./nothing", "no such folder"),
    ],
)  # fmt: skip
def test_wrong_names_are_told(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["inspect", text], ["train", text]):
        assert main(command) == 3
        assert words in " ".join(capsys.readouterr().err.split())


def test_what_is_not_there_and_cannot_be_fetched_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "file:///nowhere/cifar.tar.gz")
    assert main(["train", "torchvision:CIFAR10@sets"]) == 3
    told = " ".join(capsys.readouterr().err.split())
    assert "cannot be downloaded" in told and "/sets as torchvision does" in told


def test_what_is_not_there_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits(tmp_path / "server", "MNIST")
    resources = []
    for file in sorted((tmp_path / "server" / "MNIST" / "raw").iterdir()):
        packed = file.with_suffix(".gz")
        packed.write_bytes(gzip.compress(file.read_bytes()))
        resources.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    monkeypatch.setenv("DDPMCTL_DATA", str(tmp_path / "fetched"))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "server" / "MNIST" / "raw"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        assert inspect_data(Path("torchvision:MNIST"))["images"]["usable"] == 24
        server.shutdown()
    assert (tmp_path / "fetched" / "MNIST" / "raw").is_dir()


def test_a_run_on_a_data_set_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned whole, taken up from anywhere, from the cache, the same as in one go, evaluated; refused when the images are others."""
    digits(tmp_path / "sets", "FashionMNIST")
    monkeypatch.setattr("ddpmctl.data.records.TICK_NS", 0)  # what was written just now is as good as old
    (tmp_path / "tiny.yaml").write_text(TINY)
    common = ["-c", "tiny.yaml", "-q", "--set", "data.conditional=true"]
    assert main(["train", "torchvision:FashionMNIST@sets", *common]) == 0
    assert main(["train", "torchvision:FashionMNIST@sets", *common, "--steps", "4", "--out", "parts"]) == 0
    monkeypatch.chdir(tmp_path / "sets")
    with monkeypatch.context() as patch:
        patch.setattr(named, "_encoded", lambda image: pytest.fail("read again"))  # all is in the cache
        assert main(["train", "--resume", "../parts", "--steps", "6", "-q"]) == 0
    monkeypatch.chdir(tmp_path)
    assert_same_run(Path("runs/FashionMNIST"), Path("parts"))
    saved = checkpoint.load(Path("parts/checkpoints/step-00000006.pt"))
    assert saved["config"]["data"]["path"] == f"torchvision:FashionMNIST:train@{tmp_path}/sets"
    assert saved["class_names"] == ["Pullover", "T-shirt-top", "Trouser"]
    capsys.readouterr()
    assert main(["inspect", "torchvision:FashionMNIST:test@sets", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"]["usable"] == 12 and facts["modes"] == {"L": 12} and facts["sizes"] == {"28x28": 12}
    assert main(["cache"]) == 0
    assert "torchvision:FashionMNIST:train@" in "".join(capsys.readouterr().out.split())
    file = tmp_path / "sets" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert main(["train", "--resume", "parts", "--steps", "8", "-q"]) == 2
    assert "not the images that this run was trained on" in " ".join(capsys.readouterr().err.split())
    file.unlink()
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["file:///nowhere/"])
    assert main(["train", "--resume", "parts", "--steps", "8", "-q"]) == 3
    assert rows(Path("parts"))[-1]["step"] == "6"


def test_evaluate_takes_a_data_set(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch_fidelity")
    LAYOUTS["CIFAR10"][0](tmp_path / "sets", monkeypatch)
    assert main(["evaluate", str(trained), "torchvision:CIFAR10:train@sets", "-n", "8", "--steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["images"] == 24
    assert main(["evaluate", "torchvision:CIFAR10:test@sets", "torchvision:CIFAR10@sets", "-n", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["what"]["images"] == 12


def test_images_without_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LAYOUTS["STL10"][0](tmp_path / "sets", monkeypatch)
    LAYOUTS["CelebA"][0](tmp_path / "sets", monkeypatch)
    for text in ("torchvision:STL10:unlabeled@sets", "torchvision:STL10:train+unlabeled@sets", "torchvision:CelebA@sets"):
        with pytest.raises(DataError, match="have no class"):
            load_images(DataConfig(size=(16, 16), conditional=True), Path(text))
        assert load_images(DataConfig(size=(16, 16)), Path(text)).labels is None


def test_a_file_that_is_broken_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LAYOUTS["DTD"][0](tmp_path / "sets", monkeypatch)
    broken = tmp_path / "sets/dtd/dtd/images/dotted/3.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    (tmp_path / "sets/dtd/dtd/images/woven/4.jpg").unlink()
    found = load_images(DataConfig(size=(16, 16)), Path("torchvision:DTD@sets"))
    assert found.report.usable == 22 and [name for name, _ in found.report.bad] == ["dotted/00000003", "woven/00000004"]


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (["rose/red", "lily"], ["rose-red", "lily"]),
        (["a/b", "a-b"], ["a-b (2)", "a-b"]),
        (["a-b", "a/b", "a//b", "a/-b"], ["a-b", "a-b (2)", "a--b", "a--b (2)"]),
        (["a/b", "a-b", "a-b (2)"], ["a-b (3)", "a-b", "a-b (2)"]),
        (["", "-", "/"], ["- (2)", "-", "- (3)"]),
    ],
)  # fmt: skip
def test_classes_stay_apart_whatever_they_are_called(classes: list[str], names: list[str]) -> None:
    assert named._names([0, -1, *range(len(classes))], classes, len(classes) + 2) == [
        f"{names[0]}/00000000", "00000001", *(f"{name}/{i:08d}" for i, name in enumerate(names, start=2)),
    ]  # fmt: skip
    assert named._names([0], classes, 1) == [f"{names[0]}/00000000"]  # in a split that holds no other, too


def hub(folder: Path, *, classes: bool = True) -> list[Image.Image]:
    """A folder with a parquet file, as data sets lie on the hub; its pictures."""
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(pixels) for pixels in array(10, 18, 20, 3)]
    columns: dict[str, object] = {"n": list(range(10)), "image": pictures}
    features = {"n": datasets.Value("int64"), "image": datasets.Image()}
    if classes:
        columns["label"] = [i % 2 for i in range(10)]
        features["label"] = datasets.ClassLabel(names=["rose/red", "lily"])
    folder.mkdir()
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(folder / "train-00000-of-00001.parquet")
    return pictures


@pytest.fixture
def own_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("own_hub_cache")
def test_images_and_classes_are_those_of_the_hub(tmp_path: Path) -> None:
    pictures = hub(tmp_path / "set")
    found = load_images(DataConfig(size=(18, 20), conditional=True), Path("hf:set"))
    assert found.class_names == ["lily", "rose-red"] and found.report.formats == {"PNG": 10}
    assert found.labels.tolist() == [0] * 5 + [1] * 5
    for i, place in zip((*range(1, 10, 2), *range(0, 10, 2)), range(10), strict=True):
        assert np.array_equal(found.images[place].permute(1, 2, 0).numpy(), np.asarray(pictures[i]))
    assert len(load_images(DataConfig(size=(16, 16)), Path("hf:set:train[:4]"))) == 4
    for text, words in (("hf:set:test", "test"), ("hf:no-such/set", "no-such/set")):
        with pytest.raises(DataError, match=words) as error:
            load_images(DataConfig(size=(16, 16)), Path(text))
        assert "\n" not in error.value.problem


@pytest.mark.usefixtures("own_hub_cache")
def test_a_run_on_the_hub(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    hub(tmp_path / "set", classes=False)
    (tmp_path / "tiny.yaml").write_text(TINY)
    assert main(["train", "hf:set", "-c", "tiny.yaml", "-q", "--steps", "4"]) == 0
    assert main(["train", "--resume", "runs/set", "--steps", "6", "-q"]) == 0
    assert checkpoint.load(Path("runs/set/checkpoints/step-00000006.pt"))["config"]["data"]["path"] == f"hf:{tmp_path}/set:train"
    data = datasets.load_dataset(str(tmp_path / "set"), split="train")
    datasets.DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(tmp_path / "kept")
    data.save_to_disk(tmp_path / "one")
    sizes = [len(load_images(DataConfig(size=(16, 16)), Path(text))) for text in ("hf:kept", "hf:kept:test", "hf:one")]
    assert sizes == [10, 3, 10]
    data.remove_columns("image").save_to_disk(tmp_path / "numbers")
    with pytest.raises(DataError, match="no column of images among n"):
        load_images(DataConfig(size=(16, 16)), Path("hf:numbers"))
