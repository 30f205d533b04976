"""Very many files: known in little memory, in order, and by every stamp."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpmctl.data import stamper
from ddpmctl.data.records import Records, pack, places_in, stretches, unpack
from ddpmctl.data.scan import find_images
from ddpmctl.data.stamper import Stamper
from ddpmctl.data.stamps import GONE, stamp


def touch(root: Path, *names: str) -> list[str]:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * number)
        os.utime(root / name, ns=(number, 10**18 + number))
    return list(names)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_stamps_are_in_the_order_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    monkeypatch.setattr(stamper, "_PORTION", 10)
    names = [*touch(tmp_path, *(f"{n % 3}/{n:02}.png" for n in range(45))), "gone.png"]
    work = Stamper(str(tmp_path), processes)
    for start in range(0, len(names), 7):
        work.add(names[start : start + 7])
    found = np.frombuffer(work.finish(), dtype=np.int64).reshape(-1, 3)
    assert found.tolist() == [list(stamp(f"{tmp_path}/{name}")) for name in names]
    assert found[:45, 0].tolist() == list(range(45)) and found[:45, 1].tolist() == [10**18 + n for n in range(45)]
    assert tuple(found[45]) == GONE


def test_where_no_process_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamper, "_PORTION", 2)
    names = touch(tmp_path, *(f"{n}.png" for n in range(9)))
    for executable in ("/nowhere", "/bin/false"):
        monkeypatch.setattr(sys, "executable", executable)
        work = Stamper(str(tmp_path), 2)
        for name in names:
            work.add([name])
        assert np.frombuffer(work.finish(), dtype=np.int64).reshape(-1, 3)[:, 0].tolist() == list(range(9))


def test_stamps_go_with_their_names_however_these_are_found(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "a b/2.png", "a.png", "a0/3.png", "zz.png", "a/deep/0.png")
    listing = find_images(tmp_path)
    assert listing.names == sorted(listing.names) and len(listing) == 6
    assert [listing.stamp(name) for name in listing.names] == [tuple(row) for row in listing.stamps.tolist()]
    whole = [(group.label, listing.names[group.start : group.stop]) for group in listing.groups()]
    assert whole == [
        ("a b", ["a b/2.png"]), (None, ["a.png"]), ("a", ["a/1.png", "a/deep/0.png"]), ("a0", ["a0/3.png"]), (None, ["zz.png"])
    ]  # fmt: skip


def test_places_of_files_that_are_as_they_were() -> None:
    stamps = np.arange(15).reshape(5, 3)
    old = Records.blank(list("abcde"), stamps)
    assert places_in(old, list("abcde"), stamps).tolist() == [0, 1, 2, 3, 4]
    assert places_in(old, list("xbde"), stamps[[0, 1, 3, 2]]).tolist() == [-1, 1, 3, -1]
    assert places_in(old, list("ab"), np.zeros((2, 5), np.int64)).tolist() == [-1, -1]  # a zip in the folder's place
    for column in range(3):
        changed = stamps.copy()
        changed[2, column] += 1
        assert places_in(old, list("abcde"), changed).tolist() == [0, 1, -1, 3, 4]
    old.settle(10**18, [4])
    assert places_in(old, list("abcde"), stamps).tolist() == [0, 1, 2, 3, -1]
    assert places_in(old, list("abcde"), np.full((5, 3), -1)).tolist() == [-1] * 5  # gone then, gone now


def test_stretches_are_all_files_once() -> None:
    chance = random.Random(0)
    for _ in range(200):
        places = np.array([chance.choice([-1, 3]) for _ in range(chance.randrange(1, 30))])
        parts = list(stretches(places, chance.randrange(1, 6)))
        assert [n for part in parts for n in range(part.start, part.stop)] == list(range(len(places)))
        assert all(len(set(places[part])) == 1 for part in parts)


@pytest.mark.parametrize("names", [[], ["a"], ["a\nb", "\udce9.png", "ü"]])
def test_records_are_packed_and_unpacked(names: list[str]) -> None:
    kept = Records.blank(names, np.arange(5 * len(names)).reshape(len(names), 5))
    found = unpack(pack(kept))
    assert found.names == names and found.stamps.tolist() == kept.stamps.tolist() and found.good.all()


PROGRAM = """
import resource, sys
from pathlib import Path
from ddpmctl.data.scan import find_images
from ddpmctl.data.survey import survey
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
listing = find_images(Path(sys.argv[1]))
scanned = peak()
print(len(listing), survey(listing).usable, scanned - before, peak() - scanned)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts kibibytes")
def test_memory_of_many_files(tmp_path: Path) -> None:
    """Names and stamps take some 150 bytes a file, headers less: a million files need 0.2 GB, whatever is in them."""
    count = 20_000
    Image.effect_noise((300, 200), 90).save(tmp_path / "model.jpg", quality=95)
    for number in range(count):
        if number % 1000 == 0:
            (tmp_path / "many" / f"{number:06}").mkdir(parents=True)
        (tmp_path / "many" / f"{number - number % 1000:06}" / f"{number:06}.jpg").hardlink_to(tmp_path / "model.jpg")
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path / "many"], capture_output=True, text=True, check=True)
    found, usable, scanned, surveyed = map(int, done.stdout.split())
    assert found == usable == count
    assert scanned < 10 * 1024 and surveyed < 30 * 1024  # KiB; the content of all would be 600 MB
