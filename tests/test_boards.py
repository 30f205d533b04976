"""Boards show what the run folder holds, each step once, through stops, kills and rollbacks, and never end a run."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

import ddpmctl
from ddpmctl import boards
from ddpmctl.boards import Board
from ddpmctl.cli import main
from ddpmctl.run import Run
from helpers import spoil_gradients
from runs import assert_same_run, rows, state_of, train_process, wait_for

LONG = ["--set", "train.log_every=1", "--set", "train.sample_every=2", "--set", "train.save_every=2"]


class Told(Board):
    """Notes what it is told, for all boards of a test."""

    package = "json"
    scalars_of: ClassVar[list[tuple[int, dict[str, float]]]] = []
    grids_of: ClassVar[list[int]] = []

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.scalars_of.append((step, dict(values)))

    def grid(self, step: int, file: Path) -> None:
        assert file.read_bytes()
        self.grids_of.append(step)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> type[Told]:
    """The board mlflow is one that notes all."""
    monkeypatch.setattr(Told, "scalars_of", [])
    monkeypatch.setattr(Told, "grids_of", [])
    monkeypatch.setitem(boards.BOARDS, "mlflow", Told)
    return Told


def numbers(row: Mapping[str, str]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if value and key != "step"}


def assert_shown(run: Path) -> None:
    """TensorBoard's own reader finds in the folder the rows of metrics.csv and the grids, no more."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    found = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    shown: dict[int, dict[str, float]] = {}
    for tag in found.Tags()["scalars"]:
        steps = [item.step for item in found.Scalars(tag)]
        assert len(steps) == len(set(steps))
        for item in found.Scalars(tag):
            shown.setdefault(item.step, {})[tag] = item.value
    assert shown == {int(row["step"]): pytest.approx(numbers(row), rel=1e-6) for row in rows(run)}
    grids = {item.step: item.encoded_image_string for item in found.Images("samples")}
    assert grids == {int(file.stem[5:]): file.read_bytes() for file in (run / "samples").iterdir()}
    [settings] = found.Tensors("settings/text_summary")
    assert yaml.safe_load(settings.tensor_proto.string_val[0])["data"]["size"] == 16


def test_a_run_folder_opens_in_tensorboard(photos: Path, tiny: Path) -> None:
    assert main(["train", str(photos), "-c", str(tiny), "--out", "run", "--log", "tensorboard", "-q"]) == 0
    assert_shown(Path("run"))
    assert main(["train", str(photos), "-c", str(tiny), "--out", "plain", "-q"]) == 0
    assert_same_run(Path("run"), Path("plain"))
    assert main(["train", "--resume", "run", "--steps", "8", "-q"]) == 0
    assert rows(Path("run"))[-1]["step"] == "8"
    assert_shown(Path("run"))
    assert main(["train", "--resume", "plain", "--steps", "8", "--log", "tensorboard", "-q"]) == 0  # all that was before, too
    assert_shown(Path("plain"))
    assert main(["train", str(photos), "-c", str(tiny), "--out", "plain", "--overwrite", "-q"]) == 0
    assert not list(Path("plain").glob("events*"))


def test_tensorboard_after_a_kill(photos: Path, tiny: Path) -> None:
    run = Path("run")
    arguments = [photos, "-c", tiny, "--out", run, "--log", "tensorboard", *LONG, "--steps", 100_000]
    with train_process(*arguments) as process:
        wait_for(lambda: (run / "metrics.csv").is_file() and len((run / "metrics.csv").read_text().splitlines()) > 12, process)
    last = state_of(run, max(int(file.stem[5:]) for file in (run / "checkpoints").glob("step-*.pt")))["step"]
    assert main(["train", "--resume", str(run), "--steps", str(last + 3), "-q"]) == 0
    assert [int(row["step"]) for row in rows(run)] == list(range(1, last + 4))
    assert_shown(run)


def test_after_a_rollback_each_step_is_there_once(photos: Path, tiny: Path, told: type[Told], monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_gradients(monkeypatch, lambda step, rollbacks: rollbacks == 0 and step in (6, 7, 8))
    arguments = ["train", str(photos), "-c", str(tiny), "--out", "run", "--log", "tensorboard", "--log", "mlflow", "-q", *LONG]
    assert main([*arguments, "--steps", "10", "--set", "train.bad_steps=3", "--set", "train.save_every=4"]) == 0
    assert state_of(Path("run"), 10)["rollbacks"] == 1
    assert_shown(Path("run"))
    assert [step for step, _ in told.scalars_of] == list(range(1, 11)) and told.grids_of == [2, 4, 6, 8, 10]
    final = {int(row["step"]): numbers(row) for row in rows(Path("run"))}
    for step, values in told.scalars_of:
        assert (values == final[step]) == (step not in (5, 6, 7)), step  # those of the stretch that was left stand there
    assert main(["train", "--resume", "run", "--steps", "12", "-q"]) == 0
    assert [step for step, _ in told.scalars_of] == list(range(1, 13)) and told.grids_of == [2, 4, 6, 8, 10, 12]
    assert json.loads(Path("run/boards.json").read_bytes()) == {"mlflow": {"sent": 12, "shown": 12}}


def test_what_a_board_has_missed_is_sent(photos: Path, tiny: Path, told: type[Told]) -> None:
    run = ddpmctl.train(photos, config=tiny, out="run", log_every=1, sample_every=2)
    assert told.scalars_of == []
    ddpmctl.train(run.folder, resume=True, steps=8, log="mlflow")
    assert [step for step, _ in told.scalars_of] == list(range(1, 9)) and told.grids_of == [2, 4, 6, 8]


@pytest.mark.parametrize("where", ["__init__", "scalars", "grid"])
def test_a_board_that_fails_is_told_once_and_ends_nothing(
    where: str, photos: Path, tiny: Path, told: type[Told], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(told, where, fail)
    closed: Counter[str] = Counter()
    monkeypatch.setattr(told, "close", lambda self: closed.update(["close"]) or fail())
    assert main(["train", str(photos), "-c", str(tiny), "--out", "run", "--log", "mlflow", *LONG]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("mlflow: [Errno 28] No space left on device: going on without it") == 1
    assert closed["close"] == (where != "__init__")
    assert [row["step"] for row in rows(Path("run"))] == list("123456")


def test_a_full_disk_under_tensorboard(photos: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    write = boards.TensorBoard._write

    def full(self: boards.TensorBoard, step: int, **what: Any) -> None:
        if step == 3:
            self._file.close()
            self._file = Path("/dev/full").open("wb")  # noqa: SIM115 - closed by the board
            self._records._writer = self._file
        write(self, step, **what)

    with monkeypatch.context() as patch:
        patch.setattr(boards.TensorBoard, "_write", full)
        assert main(["train", str(photos), "-c", str(tiny), "--out", "run", "--log", "tensorboard", *LONG]) == 0
    err = capsys.readouterr().err
    assert " ".join(err.split()).count("tensorboard: [Errno 28]") == 1 and "Traceback" not in err
    assert main(["train", "--resume", "run", "--steps", "8", "-q"]) == 0
    assert_shown(Path("run"))


def test_a_folder_that_was_moved_away_gets_no_board(photos: Path, tiny: Path, told: type[Told], monkeypatch: pytest.MonkeyPatch) -> None:
    account = Run._account

    def moving(self: Run) -> Any:
        if self.state.step == 3:
            Path("run").rename("moved")
        yield from account(self)

    monkeypatch.setattr(Run, "_account", moving)
    assert main(["train", str(photos), "-c", str(tiny), "--out", "run", "--log", "mlflow", *LONG, "-q"]) == 0
    assert [step for step, _ in told.scalars_of] == [1, 2] and not Path("run/boards.json").exists()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--log", "tensorbord"], 2, "did you mean 'tensorboard'"),
        (["--set", "train.log=3"], 2, "train.log"),
        (["--log", "wandb", "--log", "none"], 2, "'none' is not one of"),
        (["--log", "none", "--dry-run"], 0, ""),
    ],
)  # fmt: skip
def test_names_of_boards(flags: list[str], code: int, words: str, photos: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(photos), "-c", str(tiny), *flags]) == code
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_package_that_is_missing_is_told_before_training(
    photos: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(boards, "find_spec", lambda name: None)
    for name in boards.BOARDS:
        assert main(["train", str(photos), "-c", str(tiny), "--log", name, "--out", "run"]) == 2
        assert f"pip install 'ddpmctl[{name}]'" in " ".join(capsys.readouterr().err.split())
    assert not Path("run").exists()


def log_records(raw: bytes) -> Iterator[bytes]:
    """The records of a log as LevelDB writes one (doc/log_format.md there), of which wandb's begins with 7 bytes of its own."""
    at, parts = 7, b""
    while at + 7 <= len(raw):
        left = 2**15 - at % 2**15
        if left < 7:  # the end of a block
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        parts = (b"" if kind in (1, 2) else parts) + raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts


def wandb_history(run: Path) -> tuple[set[str], list[dict[str, Any]]]:
    """Ids of the runs that wandb has kept below ``run``, and their rows, oldest first."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, history = set(), []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in log_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                history.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
    return ids, history


def test_wandb_goes_on_with_the_same_run(photos: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(["train", str(photos), "-c", str(tiny), "--out", "run", "--log", "wandb", "-q"]) == 0
    assert main(["train", "--resume", "run", "--steps", "8", "-q"]) == 0
    wandb.teardown()  # its other process writes the end of the file after run.finish() has returned: wait for that
    ids, history = wandb_history(Path("run"))
    assert ids == {json.loads(Path("run/boards.json").read_bytes())["wandb"]["id"]}
    shown = {row["step"]: {key: row[key] for key in numbers(of)} for row in history if "loss" in row for of in rows(Path("run")) if of["step"] == str(row["step"])}
    assert shown == {int(row["step"]): pytest.approx(numbers(row)) for row in rows(Path("run"))}
    assert Counter(row["step"] for row in history if "loss" in row).most_common(1)[0][1] == 1
    assert [row["step"] for row in history if "samples" in row] == [4, 6, 8]


def test_mlflow_goes_on_with_the_same_run(photos: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd()}/mlflow.db")
    assert main(["train", str(photos), "-c", str(tiny), "--out", "run", "--log", "mlflow", "-q"]) == 0
    assert main(["train", "--resume", "run", "--steps", "8", "-q"]) == 0
    client, run = mlflow.MlflowClient(), json.loads(Path("run/boards.json").read_bytes())["mlflow"]["id"]
    found = [(item.step, item.value) for item in client.get_metric_history(run, "loss")]
    assert found == [(int(row["step"]), float(row["loss"])) for row in rows(Path("run"))]
    assert client.get_run(run).data.params["train.batch_size"] == "4"
    assert len(client.list_artifacts(run, "samples")) == 3
