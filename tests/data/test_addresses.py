"""Tar shards behind addresses of real servers: the same as on disk, whatever the servers do."""

from __future__ import annotations

import copy
import os
import pickle
import socket
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch

from ddpmctl.cli import main
from ddpmctl.data import addresses
from ddpmctl.data.addresses import Answer
from ddpmctl.data.named import whole
from ddpmctl.data.names import patterns_of, place_of, read_shards
from ddpmctl.data.shards import Shard, index_of, places_of, samples_of
from ddpmctl.errors import ConfigError, DataError
from ddpmctl.stopping import Interrupted
from servers import Halved, Mute, Recording, Server6, served
from tars import COUNTS, batches, opened, seen, streamed, write_shards


def test_shards_behind_an_address_are_the_same_as_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path / "s", COUNTS, label=str, bad=(3,))
    (folder / "train-001.tar").unlink()
    (folder / "train-003.tar").unlink()
    settings = {"conditional": True, "shuffle": 8}
    local = opened(folder, **settings)
    monkeypatch.setattr(addresses, "_PAUSES", (0, 0, 0))
    with served(folder) as (address, _):
        far = opened(Path(f"{address}/train-{{000,002,004}}.tar"), **settings)
        assert far.fingerprint == local.fingerprint and torch.equal(far.images, local.images)
        with batches(local.stream, 4) as one, batches(far.stream, 4) as two:  # type: ignore[arg-type]
            assert seen(one, range(1, 20)) == seen(two, range(1, 20))
        with pytest.raises(DataError, match="HTTP Error 404"):
            opened(Path(f"{address}/train-{{000,001}}.tar"), max_bad=0.1)
    with served(folder, Halved) as (address, _), batches(local.stream, 4) as one:  # type: ignore[arg-type]
        for shard in far.stream.shards:  # type: ignore[union-attr]
            object.__setattr__(shard, "place", f"{address}/{shard.name}")
        with batches(far.stream, 4) as two:  # type: ignore[arg-type]
            assert seen(one, range(1, 20)) == seen(two, range(1, 20)) and Halved.asked > 4


@pytest.mark.parametrize("how", ["head", "body", "busy"])
def test_batches_that_a_silent_server_keeps_waiting_are_left_when_asked(tmp_path: Path, how: str) -> None:
    write_shards(tmp_path, (40, 40))
    with served(tmp_path, Mute) as (address, server):
        found = streamed(place_of(f"{address}/train-{{000,001}}.tar"), shuffle=10, holdout=0)
        before = {thread.name for thread in threading.enumerate()}
        with batches(found, 4) as made:
            made(1)
            server.silent = how
            made.asked = server.met.is_set
            with pytest.raises(Interrupted):
                seen(made, range(2, 1000))
        left = {thread.name for thread in threading.enumerate()} - before
        assert not {name for name in left if name.startswith(("blocks", "decode"))}
        assert all(thread.daemon for thread in threading.enumerate() if thread.name == "address")


@pytest.mark.parametrize("how", ["head", "body", "busy"])
def test_an_answer_is_not_waited_for_when_it_is_told_to_stop(tmp_path: Path, how: str) -> None:
    write_shards(tmp_path, (40,))
    stop = threading.Event()
    with served(tmp_path, Mute) as (address, server):
        [shard] = index_of(f"{address}/train-000.tar", 1, None)
        server.silent = how
        threading.Thread(target=lambda: (server.met.wait(), stop.set())).start()
        with pytest.raises(CancelledError):
            list(samples_of(shard, 0, stop))


def test_what_goes_wrong_with_an_answer_is_raised_where_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"x" * 3_000_000)
    with served(tmp_path) as (address, _):
        with Answer(f"{address}/x.tar") as answer:
            assert len(answer.read()) == 3_000_000 and answer.marks[0] == "3000000"
        with pytest.raises(OSError, match="404"):
            Answer(f"{address}/y.tar")
    with pytest.raises(OSError, match="refused"):
        Answer(f"{address}/x.tar")


LATER = 2_000_000_000


def replace_by(folder: Path, counts: tuple[int, ...], *, size: tuple[int, int] = (4, 4), mtime: int = LATER) -> None:
    write_shards(folder, counts, size=size)
    for path in folder.iterdir():
        os.utime(path, (mtime, mtime))


@pytest.mark.parametrize(
    ("given", "counts", "etag", "key"),
    [
        (("Content-Length", "Last-Modified"), (40,), "1", "Last-Modified"),
        (("Content-Length", "Last-Modified", "ETag"), (60,), "2", "Content-Length"),
        (("ETag",), (40,), "2", "ETag"),
        (("Content-Length",), (20,), "1", "Content-Length"),
    ],
)
def test_a_shard_that_changes_behind_its_address_is_named_by_what_the_server_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], counts: tuple[int, ...], etag: str, key: str
) -> None:
    replace_by(tmp_path, (40,), mtime=1_000_000_000)
    monkeypatch.setattr(Recording, "given", given)
    with served(tmp_path, Recording) as (address, server):
        place = f"{address}/train-000.tar"
        found = streamed(place_of(f"{place}?sig=SECRET"), shuffle=10, holdout=0)
        with batches(found, 4) as made:
            seen(made, range(1, 30))  # nothing has changed
        replace_by(tmp_path, counts)
        monkeypatch.setattr(Recording, "etag", etag)
        server.paths.clear()
        with batches(found, 4) as made, pytest.raises(DataError) as told:
            made(1)
    assert told.value.problem == f"{place}: changed since the run looked at it: another {key}"
    assert "--resume" in told.value.advice
    assert len(server.paths) == 1  # it is not tried again


def test_of_a_server_that_says_nothing_the_images_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_PAUSES", (0, 0, 0))
    monkeypatch.setattr(Recording, "given", ())
    write_shards(tmp_path, (40,))
    with served(tmp_path, Recording) as (address, _):
        found = streamed(place_of(f"{address}/train-000.tar"), shuffle=10, holdout=0)
        replace_by(tmp_path, (39,))
        with batches(found, 4) as made, pytest.raises(DataError, match="39 images, of 40 that were there"):
            seen(made, range(1, 11))


def test_a_shard_that_has_changed_is_read_through_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPMCTL_CACHE", str(tmp_path / "cache"))
    replace_by(tmp_path / "s", (40, 40), mtime=1_000_000_000)
    with served(tmp_path / "s", Recording) as (address, server):
        place = place_of(f"{address}/train-{{000,001}}.tar")
        first = opened(place)
        server.paths.clear()
        assert opened(place).fingerprint == first.fingerprint
        known = len(server.paths)
        replace_by(tmp_path / "s", (40, 41))
        server.paths.clear()
        assert opened(place).fingerprint != first.fingerprint and len(server.paths) == known + 2  # both read through


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="needs the IPv6 address ::1")
def test_an_ipv6_host_and_two_slashes_are_read_as_they_are_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "a", (3, 4))
    with served(tmp_path, Recording, Server6) as (address, server):
        pattern = f"{address}/a//train-000.tar?key=x//y::{address}//a/train-{{001..001}}.tar"
        assert main(["inspect", pattern, "--json"]) == 0
    assert '"usable": 7' in capsys.readouterr().out
    assert set(server.paths) == {"/a//train-000.tar?key=x//y", "/a/train-001.tar"}  # two at the beginning the server itself makes one


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("http://h/a//b.tar", ["http://h/a//b.tar"]),
        ("http://[::1]:80/{0..1}.tar", ["http://[::1]:80/0.tar", "http://[::1]:80/1.tar"]),
        ("https://[2001:db8::1]/a.tar::http://[fe80::1%25eth0]/b.tar", ["https://[2001:db8::1]/a.tar", "http://[fe80::1%25eth0]/b.tar"]),
        ("shards:http://h/a.tar?x=//==::http://h//b.tar", ["http://h/a.tar?x=//==", "http://h//b.tar"]),
    ],
)
def test_addresses_stay_what_they_are_in_run_files_too(text: str, places: list[str]) -> None:
    pinned = str(whole(place_of(text)))
    assert pinned == f"shards:{text.removeprefix('shards:')}" and str(whole(place_of(pinned))) == pinned
    pattern = read_shards(place_of(pinned))
    assert pattern is not None and places_of(pattern) == places


def test_runs_of_before_whose_addresses_have_lost_a_slash_are_read() -> None:
    assert places_of("http:/h/a.tar::https:/h/b.tar") == ["http://h/a.tar", "https://h/b.tar"]
    assert str(place_of("a//b.tar")) == "a/b.tar"  # a file
    assert patterns_of("x[ab].tar::y[c].tar") == ["x[ab].tar", "y[c].tar"]


@pytest.mark.parametrize("how", [pickle.dumps, None])
def test_copies_of_an_address_are_the_same_place(how: Callable[[Path], bytes] | None) -> None:
    place = place_of("http://h/a//b.tar?x=//")
    assert str(pickle.loads(how(place)) if how else copy.deepcopy(place)) == str(place)


def test_spaces_and_letters_of_all_languages_are_asked_for_as_servers_know_them(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "Für alle", (3,))
    with served(tmp_path, Recording) as (address, server):
        [shard] = index_of(f"{address}/{folder.name}/train-000.tar?sig=a%20b+c 1", 1, None)
        assert shard.count == 3 and server.paths == ["/F%C3%BCr%20alle/train-000.tar?sig=a%20b+c%201"] * 2
        with pytest.raises(DataError, match="404") as told:
            index_of(f"{address}/no such.tar?sig=SECRET 1", 1, None)
    assert told.value.problem.startswith(f"{address}/no such.tar: ") and "SECRET" not in told.value.problem + told.value.advice


def test_passwords_in_addresses_are_refused_and_not_told() -> None:
    with pytest.raises(ConfigError, match="before @ is not read") as told:
        places_of("http://h/a@b.tar::http://me:SECRET@h/x.tar?sig=SECRET")
    assert told.value.problem.startswith("http://h/x.tar: ") and "SECRET" not in told.value.problem + told.value.advice


def test_what_stands_behind_an_address_is_no_part_of_a_name() -> None:
    assert Shard("https://h/a/b.tar?sig=SECRET", [], 0, {}, "").name == "b.tar"
