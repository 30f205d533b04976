"""Reading checkpoints: what is none is called what it is, what is damaged is refused, and nothing in a file is run."""

from __future__ import annotations

import copy
import io
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpmctl import checkpoint
from ddpmctl.checkpoint import DamagedError, naming_a_good_one
from ddpmctl.errors import CheckpointError

CONTENT: dict[str, Any] = {
    "config": {"seed": 0}, "image_shape": [3, 4, 4], "class_names": [], "step": 1,
    "net": {"weight": torch.arange(6.0)}, "ema": {"net": {"weight": torch.arange(6.0)}, "steps": 1},
    "optimizer": {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(6), "exp_avg_sq": torch.ones(6)}},
                  "param_groups": [{"params": [0], "lr": 0.1}]},
    "data": {"images": 2, "fingerprint": "abc"}, "scaler": {"scale": 65536.0, "_growth_tracker": 3}, "rollbacks": 1,
    "window": [[0.5, float("nan"), 1e-4, True]], "bad_in_a_row": 0, "unwritten": [{"step": 1, "loss": "0.5"}],
}  # fmt: skip


class Evil:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path("pwned").touch, ()


@pytest.fixture
def saved() -> bytes:
    """The bytes of a good checkpoint."""
    checkpoint.save(Path("good.pt"), CONTENT)
    return Path("good.pt").read_bytes()


def said(content: bytes, name: str = "file.pt") -> CheckpointError:
    """The error of loading ``content``, which is one line in our words."""
    Path(name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(Path(name))
    for text in (caught.value.problem, caught.value.advice):
        assert text and "\n" not in text and len(text) < 200
        assert not any(word in text for word in ("torch.load", "weights_only", "Pytorch", "miniz", "\x1b"))
    assert caught.value.problem.startswith(f"{name}: ")
    return caught.value


def image(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, kind)
    return file.getvalue()


def archive(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        for name in names:
            zipped.writestr(name, b"x" * 50)
    return file.getvalue()


def array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


FOREIGN = {
    "a PNG image": image("png"), "a JPEG image": image("jpeg"), "a GIF image": image("gif"),
    "a WebP image": image("webp"), "a TIFF image": image("tiff"), "a BMP image": image("bmp"),
    "a text file": "seed: 0  # für später\n".encode() * 100, "a zip archive": archive("photo.jpg"),
    "a NumPy .npz file": archive("images.npy"), "a NumPy array": array(), "a gzip file": b"\x1f\x8b\x08\0rest",
    "a TorchScript program": archive("net/data.pkl", "net/constants.pkl"), "a PDF file": b"%PDF-1.7\n\xff\xff",
    "a safetensors file": b"\x20" + bytes(7) + b'{"weight": {"dtype": "F32"}}' + bytes(20),
    "a Python pickle": pickle.dumps({"a": 1}, 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_file_is_called_what_it_is(kind):
    error = said(FOREIGN[kind])
    assert error.problem.startswith(f"file.pt: {kind}, not a")
    assert not isinstance(error, DamagedError) and "damaged" not in error.problem and "code" not in error.problem


def test_text_that_breaks_within_a_character_is_still_text():
    assert "a text file" in said(b"x" + "ü".encode() * 400).problem


def test_advice_fits_the_file():
    Path("runs/x/checkpoints").mkdir(parents=True)
    assert str(Path("runs/x")) in said(b"step,loss\n", "runs/x/metrics.csv").advice
    assert "--config other.yaml" in said(b"seed: 1\n", "other.yaml").advice
    assert "runs/NAME" in said(b"step,loss\n", "other.csv").advice


def test_what_is_no_file_is_refused():
    Path("folder").mkdir()
    for name, words in (("folder", "not a file"), ("missing", "no such checkpoint")):
        with pytest.raises(CheckpointError, match=words):
            checkpoint.load(Path(name))


@pytest.mark.parametrize("protocol", [None, 1, 2, 4, 5])
def test_code_is_refused_named_and_never_run(protocol):
    file = io.BytesIO()
    if protocol is None:
        torch.save({**CONTENT, "magic": checkpoint.CHECKPOINT.magic, "x": Evil()}, file)
    else:
        pickle.dump({"x": Evil()}, file, protocol)
    error = said(file.getvalue())
    if protocol != 1:  # begins with no mark of a pickle
        assert "refused: it carries code" in error.problem
    assert not Path("pwned").exists()


def test_another_tools_weights_and_model():
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, file)
    assert "not a ddpmctl checkpoint" in said(file.getvalue()).problem
    torch.save({"weight": torch.zeros(3)}, Path("old.pt"), _use_new_zipfile_serialization=False)
    assert "not a ddpmctl checkpoint" in said(Path("old.pt").read_bytes()).problem
    torch.save(torch.nn.Linear(1, 1), Path("model.pt"))
    assert "it carries code (torch.nn.modules.linear.Linear)" in said(Path("model.pt").read_bytes()).problem


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_called_that(saved, share):
    error = said(saved[: int(len(saved) * share)])
    assert isinstance(error, DamagedError) and "damaged or cut short" in error.problem


def test_an_empty_file_and_one_of_zeros(saved):
    for content, word in ((b"", "empty"), (bytes(len(saved)), "damaged")):
        error = said(content)
        assert isinstance(error, DamagedError) and word in error.problem and "code" not in error.problem


def test_a_damaged_name_is_damage_and_no_code(saved):
    error = said(saved.replace(b"_rebuild_tensor_v2", b"_rebuilt_tensor_v2", 1))
    assert isinstance(error, DamagedError) and "code" not in error.problem


def test_damage_anywhere_is_an_error_of_ours_or_harmless(saved):
    chance = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(saved)
        damaged[chance.randrange(len(saved))] ^= 1 << chance.randrange(8)
        Path("file.pt").write_bytes(damaged)
        try:
            net = checkpoint.load(Path("file.pt"))["net"]
        except CheckpointError:
            refused += 1
        else:  # the bit stood between the parts of the archive
            assert torch.equal(net["weight"], CONTENT["net"]["weight"])
    assert refused > 30


STRANGE: list[tuple[str, Any]] = [
    ("config", []), ("config", {1: 2}), ("config", {"model": {"norm": [[1]]}}), ("config", {"seed": torch.zeros(3)}),
    ("image_shape", 3), ("image_shape", [3, 4]), ("image_shape", [3, -4, 4]), ("image_shape", [2, 4, 4]),
    ("image_shape", [3, 10**6, 4]), ("image_shape", [3, 4, "4"]), ("class_names", [1]), ("class_names", ["a", "a"]),
    ("step", "1"), ("step", -1), ("step", True), ("step", 2**63), ("step", 1.0), ("version", None),
    ("net", [torch.zeros(3)]), ("net", {"weight": 3}), ("net", {"weight": torch.zeros(6, dtype=torch.complex64)}),
    ("ema", None), ("ema", {"net": 3, "steps": 1}), ("ema", {"net": {}}), ("ema.steps", -1), ("ema.steps", [1]),
    ("optimizer", None), ("optimizer", {"state": {}}), ("optimizer.state", {"a": 1}), ("optimizer.state", {0: {}}),
    ("optimizer.state", {1: CONTENT["optimizer"]["state"][0]}), ("optimizer.param_groups", [{"params": [1]}]),
    ("optimizer.param_groups", [{"params": [0, 0]}]), ("optimizer.state.0.exp_avg", torch.ones(5)),
    ("optimizer.state.0.step", torch.ones(2)), ("data", None), ("data", []), ("data.images", 0), ("data.fingerprint", 7),
    ("scaler", None), ("scaler", {"scale": float("nan")}), ("scaler", {"scale": "1"}), ("rollbacks", None), ("rollbacks", -1),
    ("window", None), ("window", [1]), ("window", [[1.0, 2.0, 3.0]]), ("window", [["a", "b", "c", "d"]]),
    ("bad_in_a_row", "many"), ("unwritten", 7), ("unwritten", [{"loss": 1}]), ("unwritten", [{"step": 1, "loss": []}]),
]  # fmt: skip


def changed(part: str, value: object) -> dict[str, Any]:
    """The content with another value for ``part``; "gone" takes it away."""
    content = copy.deepcopy(CONTENT)
    *folders, name = [int(key) if key.isdigit() else key for key in part.split(".")]
    place: Any = content
    for key in folders:
        place = place[key]
    if value == "gone":
        del place[name]
    else:
        place[name] = value
    return content


@pytest.mark.parametrize(("part", "value"), STRANGE, ids=lambda value: str(value)[:30].replace("\n", " "))
def test_whole_checkpoints_of_strange_content_are_refused_by_name(part, value):
    error = said(_saved_unchecked(changed(part, value)).read_bytes())
    assert isinstance(error, DamagedError) and part.partition(".")[0] in error.problem and "digest" not in error.problem


@pytest.mark.parametrize("part", ["config", "net", "ema.steps", "optimizer", "optimizer.state.0.exp_avg", "data.images", "version"])
def test_a_part_that_is_gone_is_named(part):
    content = changed(part, "gone") if part in CONTENT or "." in part else {**CONTENT, "version": None}
    assert part in said(_saved_unchecked(content).read_bytes()).problem


def test_parts_that_older_versions_did_not_save_may_be_missing():
    later = ("scaler", "rollbacks", "window", "bad_in_a_row", "unwritten")
    old = {key: value for key, value in CONTENT.items() if key not in later}
    assert checkpoint.load(_saved_unchecked(old))["step"] == 1


def test_parts_that_later_versions_save_are_left_alone():
    assert checkpoint.load(_saved_unchecked(CONTENT | {"colour": [1]}))["colour"] == [1]


@pytest.mark.parametrize("number", [True, 1.0, "1", None, torch.ones(2)], ids=str)
def test_a_format_that_is_no_number_is_refused(number):
    assert "checkpoint format" in said(_saved_unchecked(CONTENT | {"format": number}).read_bytes()).problem


def _saved_unchecked(content: dict[str, Any]) -> Path:
    body = {"magic": checkpoint.CHECKPOINT.magic, "format": checkpoint.FORMAT, "version": "0", **content}
    torch.save({**body, "digest": checkpoint.digest_of(body)}, Path("made.pt"))
    return Path("made.pt")


def test_the_newest_good_one_is_named():
    for step in (2, 4, 10, 12):
        checkpoint.save(Path(f"step-{step:08d}.pt"), {**CONTENT, "step": step})
    for step in (10, 12):
        Path(f"step-{step:08d}.pt").write_bytes(b"")
    Path("step-00000099.pt.unreadable").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught, naming_a_good_one():
        checkpoint.load(Path("step-00000010.pt"))
    assert caught.value.problem.startswith("step-00000010.pt: empty")
    assert caught.value.advice == "the newest good one is step-00000004.pt"
    for step in (2, 4):
        Path(f"step-{step:08d}.pt").unlink()
    with pytest.raises(CheckpointError) as caught, naming_a_good_one():
        checkpoint.load(Path("step-00000010.pt"))
    assert "no good one" in caught.value.advice


def test_only_damage_sends_to_another_checkpoint():
    checkpoint.save(Path("step-00000002.pt"), CONTENT)
    Path("notes.txt").write_text("hello")
    with pytest.raises(CheckpointError) as caught, naming_a_good_one():
        checkpoint.load(Path("notes.txt"))
    assert "step-00000002" not in caught.value.advice
