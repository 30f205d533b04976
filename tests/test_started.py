"""What of the processes can be told in one: where they stand, who does what, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpmctl.cli import main
from ddpmctl.config import RunConfig
from ddpmctl.core.samplers import SampleStep
from ddpmctl.errors import ConfigError
from ddpmctl.following import check
from ddpmctl.making import Made, made_by_all
from ddpmctl.meeting import joined
from ddpmctl.parsing import parse_devices
from ddpmctl.ranks import ALONE, Ranks
from ddpmctl.sampling import Generated
from ddpmctl.started import Started, how_started

JOINED = {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}


def set_all(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in (*JOINED, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


class Mock(Ranks):
    """One of several processes that are threads; ``mail``: what each has sent."""

    def __init__(self, rank: int, world: int, mail: list[Queue[Tensor]]) -> None:
        self.started, self.rank, self.world, self.mail = Started(rank, world), rank, world, mail

    def send(self, tensor: Tensor) -> None:
        self.mail[self.rank].put(tensor.clone())

    def receive(self, rank: int, shape: Any, dtype: torch.dtype) -> Tensor:
        tensor = self.mail[rank].get(timeout=30)
        assert tuple(tensor.shape) == tuple(shape) and tensor.dtype == dtype
        return tensor


def test_the_environment_says_where_a_process_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch)
    assert how_started() == Started()
    set_all(monkeypatch, **JOINED)
    assert how_started() == Started(rank=2, world=4, local_rank=0, local_world=2)
    alone = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "1", "RANK": "0"}
    set_all(monkeypatch, **alone)
    assert how_started() == Started(by_torchrun=True, watched=True)


def test_one_process_alone_keeps_notes_with_torchrun_and_waits_for_none_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    for before in (False, True):
        with joined(Started(watched=True)) as ranks:
            assert ranks.noted("begun") == before
            ranks.note("begun")
    monkeypatch.setenv("MASTER_PORT", "1")
    for started in (Started(watched=True), Started()):
        with joined(started) as ranks:
            ranks.note("begun")
            assert ranks.leads and not ranks.noted("begun")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4, but no RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many: not a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be at least 1"),
        ({**JOINED, "MASTER_PORT": "99999"}, "MASTER_PORT=99999: not a port"),
        ({**JOINED, "RANK": "4"}, "RANK=4: must be 0 to 3"),
        ({**JOINED, "LOCAL_RANK": "2"}, "LOCAL_RANK=2 of LOCAL_WORLD_SIZE=2"),
    ],
)
def test_half_an_environment_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], photos: Path, tiny: Path, values: dict[str, str], said: str
) -> None:
    set_all(monkeypatch, **values)
    with pytest.raises(ConfigError):
        how_started()
    assert main(["train", str(photos), "-c", str(tiny), "--out", "run"]) == 2
    told = capsys.readouterr()
    follows = values.get("RANK", "0") != "0"
    assert told.err.count("error:") == (0 if follows else 1), told.err
    assert follows or said in told.err
    assert not Path("run").exists() and not told.out


def test_of_other_commands_the_first_process_alone_does_something(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Path
) -> None:
    set_all(monkeypatch, **JOINED)
    assert main(["inspect", str(trained)]) == 0
    assert capsys.readouterr() == ("", "")
    set_all(monkeypatch, WORLD_SIZE="4")
    assert main(["inspect", str(trained)]) == 0
    assert "step" in capsys.readouterr().out


@pytest.mark.parametrize("n", [1, 4, 7, 128])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_parts_are_even_and_make_up_the_whole(n: int, world: int) -> None:
    parts = [range(n)[Mock(rank, world, []).part(n)] for rank in range(world)]
    assert [number for part in parts for number in part] == list(range(n))
    assert max(map(len, parts)) == Mock(0, world, []).most(n) and max(map(len, parts)) - min(map(len, parts)) <= 1
    assert ALONE.part(n) == slice(0, n)


@pytest.mark.parametrize("every_state", [False, True])
def test_images_come_in_order_whoever_makes_them(every_state: bool) -> None:
    def made(world: int) -> list[Made]:
        mail: list[Queue[Tensor]] = [Queue() for _ in range(world)]
        walked: list[tuple[int, range]] = []

        def work(rank: int) -> list[Made]:
            def walk(images: range, *_: Any) -> Iterator[Generated]:
                walked.append((rank, images))
                for t in (2, 1, 0):
                    yield Generated(images, SampleStep(t, torch.full((len(images), 1, 2, 2), images.start / 10 - t / 100), *unused))

            unused = [torch.empty(0)] * (len(SampleStep._fields) - 2)
            return list(made_by_all(Mock(rank, world, mail), 11, 3, walk, 3, every_state=every_state))

        others = [threading.Thread(target=work, args=(rank,)) for rank in range(1, world)]
        for thread in others:
            thread.start()
        done = work(0)
        for thread in others:
            thread.join(timeout=30)
        assert {rank for rank, _ in walked} == set(range(world))
        return [one for one in done if one.pixels is not None]

    alone = made(1)
    assert [one.images.start for one in alone if one.t == 0] == [0, 3, 6, 9]
    for world in (2, 3):
        several = made(world)
        assert [(one.images, one.t) for one in several] == [(one.images, one.t) for one in alone]
        assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(several, alone, strict=True))  # type: ignore[arg-type]


def test_devices_as_people_write_them() -> None:
    assert parse_devices("0,2") == ("cuda:0", "cuda:2")
    assert parse_devices("cuda:1") == ("cuda:1",)
    assert parse_devices("cpu, cpu") == ("cpu", "cpu")
    assert parse_devices("all") == ("all",)
    for wrong in ("", "0,", "0,0", "0,cpu", "auto", "mps", "cpu,auto", "-1", "256", "01"):
        with pytest.raises(ValueError):
            parse_devices(wrong)


@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--devices", "cpu,cpu", "--device", "cpu"], 2, "--device cpu: not with --devices cpu,cpu"),
        (["--devices", "0,cpu"], 2, "has GPUs and the CPU together"),
        (["--devices", "100,101"], 5, "--devices: cuda:100 is not on this machine"),
    ],
)
def test_devices_that_cannot_be_are_refused(
    trained: Path, capsys: pytest.CaptureFixture[str], command: str, flags: list[str], code: int, said: str
) -> None:
    photos = str(trained.parent / "photos")
    words = {"train": [photos], "sample": [str(trained)], "evaluate": [str(trained), photos]}[command]
    assert main([command, *words, *flags]) == code
    told = capsys.readouterr()
    assert said in told.err and told.err.count("error:") == 1


def test_one_device_needs_no_other_process(trained: Path) -> None:
    assert main(["sample", str(trained), "-n", "1", "--devices", "cpu", "-o", "x.png", "-q"]) == 0
    assert Path("x.png").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"train": {"batch_size": 3}}, "fewer images than the 4 processes"), ({"model": {"norm": "batch"}}, "model.norm batch")],
)
def test_what_several_processes_cannot_train_is_refused(changes: dict[str, Any], said: str) -> None:
    config = RunConfig.model_validate(changes)
    check(config, 1)
    with pytest.raises(ConfigError, match=said):
        check(config, 4)
