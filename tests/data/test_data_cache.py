"""The cache of decoded images: the same as without it, less work, bounded, and never in the way."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpmctl.config import DataConfig
from ddpmctl.data import cache as cache_module
from ddpmctl.data import decode, draft, entry, headers, reading, records
from ddpmctl.data.cache import Cache, parse_bytes
from ddpmctl.data.dataset import ImageDataset, load_images
from ddpmctl.errors import ConfigError, DataError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and clocks that tick so fast that no file counts as just changed."""
    monkeypatch.setenv("DDPMCTL_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(records, "TICK_NS", 0)
    return tmp_path / "kept"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files in the order in which they are read, from now on."""
    names: list[str] = []
    read, look = reading.Reader.read, headers.headers_of

    def note(self: reading.Reader, name: str) -> bytes:
        names.append(name)
        return read(self, name)

    def glance(root: str, these: list[str], stamps: list[list[int]]) -> list[tuple[object, ...] | None]:
        names.extend(these)
        return look(root, these, stamps)

    monkeypatch.setattr(reading.Reader, "read", note)
    monkeypatch.setattr(headers, "headers_of", glance)
    return names


def save(path: Path, seed: int, mode: str = "RGB", size: tuple[int, int] = (9, 7), **options: Any) -> None:
    """An image of random pixels, (width, height) ``size``."""
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], *channels), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(path, **options)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images of all kinds and two bad ones, in class folders."""
    root = tmp_path / "photos"
    for i in range(12):
        save(root / f"class {i % 3}" / f"{i:02}.png", i, ("RGB", "L", "RGBA")[i % 3], (9 + i % 2, 7))
    save(root / "class 0" / "turned.jpg", 20, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0")
    (root / "class 1" / "text.png").write_text("text")
    whole = (root / "class 0" / "00.png").read_bytes()
    (root / "class 2" / "cut.png").write_bytes(whole[:80])
    return root


def load(path: Path, size: Any = (6, 5), cache: bool = True, **settings: Any) -> ImageDataset:
    return load_images(DataConfig(size=size, cache=cache, workers=2, **{"max_bad": 0.9, **settings}), path)


def assert_same(one: ImageDataset, other: ImageDataset) -> None:
    assert one.images.shape == other.images.shape and torch.equal(one.images, other.images)
    assert one.images.is_contiguous() and one.images.dtype == torch.uint8
    assert (one.labels is None) == (other.labels is None)
    assert one.labels is None or (other.labels is not None and torch.equal(one.labels, other.labels))
    assert one.class_names == other.class_names
    assert one.fingerprint == other.fingerprint
    assert one.report == other.report and one.report.to_dict() == other.report.to_dict()
    assert list(one.report.sizes) == list(other.report.sizes)


def packed(root: Path) -> Path:
    return Path(shutil.make_archive(str(root), "zip", root))


def entries(place: Path) -> list[Path]:
    return sorted(place.iterdir()) if place.exists() else []


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    "settings",
    [
        {"fit": "crop", "channels": 3},
        {"fit": "pad", "channels": 4, "background": "red"},
        {"fit": "stretch", "channels": 1},
        {"channels": "auto", "conditional": True},
        {"size": (12, 12), "fit": "pad", "channels": "auto", "background": "#123456"},
    ],
)
def test_the_same_as_without_and_nothing_opened(
    photos: Path, place: Path, opened: list[str], kind: str, settings: dict[str, Any]
) -> None:
    path = packed(photos) if kind == "zip" else photos
    fresh = load(path, cache=False, **settings)
    assert not place.exists() and len(fresh) == 13 and len(fresh.report.bad) == 2
    assert_same(load(path, **settings), fresh)
    opened.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load(path, **settings)
    assert opened == []
    assert_same(again, fresh)
    assert len(entries(place)) == 1


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_size_and_channels_left_open(tmp_path: Path, place: Path, opened: list[str], mode: str) -> None:
    for i in range(5):
        save(tmp_path / "x" / f"{i}.png", i, mode)
    whole = (tmp_path / "x" / "0.png").read_bytes()
    (tmp_path / "x" / "5.png").write_bytes(whole[:-30])  # the header is good, and counts
    fresh = load(tmp_path / "x", "auto", cache=False)
    assert fresh.images.shape == (5, 1 if mode == "L" else 3, 7, 9)
    assert_same(load(tmp_path / "x", "auto"), fresh)
    opened.clear()
    assert_same(load(tmp_path / "x", "auto"), fresh)
    assert_same(load(tmp_path / "x", (7, 9), channels=fresh.channels), fresh)  # one entry for what it came to
    assert opened == [] and len(entries(place)) == 1
    assert load(tmp_path / "x", 4).channels == fresh.channels  # headers are remembered whatever the settings
    assert sorted(opened) == [f"{i}.png" for i in range(6)]
    save(tmp_path / "x" / "6.png", 6, "RGB")
    assert_same(load(tmp_path / "x", "auto"), load(tmp_path / "x", "auto", cache=False))
    save(tmp_path / "x" / "7.png", 7, "RGB", (8, 8))
    for cache in (True, False):
        with pytest.raises(DataError, match=r"7x9 \(7\), 8x8 \(1\)"):
            load(tmp_path / "x", "auto", cache)


def test_only_what_changed_is_decoded(photos: Path, place: Path, opened: list[str]) -> None:
    load(photos, channels=3)
    opened.clear()
    save(photos / "class 0" / "03.png", 103)
    save(photos / "class 1" / "new.png", 104)
    (photos / "class 2" / "02.png").unlink()
    (photos / "class 2" / "05.png").rename(photos / "class 2" / "55.png")
    data = load(photos, channels=3)
    assert opened == ["class 0/03.png", "class 1/new.png", "class 2/55.png"]
    assert_same(data, load(photos, channels=3, cache=False))
    opened.clear()
    assert_same(load(photos, channels=3), data)
    assert opened == [] and len(entries(place)) == 1


def test_a_file_that_goes_from_either_end(photos: Path, place: Path, opened: list[str]) -> None:
    for name in ("class 2/11.png", "class 0/00.png"):
        load(photos)
        (photos / name).unlink()
        opened.clear()
        data = load(photos)
        assert opened == []
        assert_same(data, load(photos, cache=False))


def test_bad_files_are_remembered_until_they_change(photos: Path, place: Path, opened: list[str]) -> None:
    with pytest.raises(DataError, match="2 of 15 images are unreadable"):
        load(photos, channels=3, max_bad=0.1)  # the work is kept though the run is not
    opened.clear()
    with pytest.raises(DataError, match=r"class 1/text\.png: not an image") as caught:
        load(photos, channels=3, on_bad="error")
    assert opened == [] and "data.on_bad=skip" in caught.value.advice
    save(photos / "class 1" / "text.png", 5)
    (photos / "class 0" / "00.png").write_bytes(b"")
    data = load(photos, channels=3)
    assert opened == ["class 0/00.png", "class 1/text.png"]
    assert [name for name, _ in data.report.bad] == ["class 0/00.png", "class 2/cut.png"]
    assert_same(data, load(photos, channels=3, cache=False))


def test_a_fault_that_may_pass_is_not_remembered(
    photos: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: object) -> None:
        raise MemoryError

    whole = load(photos, cache=False)
    with monkeypatch.context() as patch:
        patch.setattr(decode, "to_mode", too_much)
        with pytest.raises(DataError, match="too large for the memory"):
            load(photos)
        read = reading.Reader.read
        patch.undo()
        patch.setattr(reading.Reader, "read", lambda self, name, most=0: read(self, "gone" if name.endswith("03.png") else name))
        assert load(photos).report.bad[0] == ("class 0/03.png", "No such file or directory")
    assert_same(load(photos), whole)


def test_a_random_history_of_changes(tmp_path: Path, place: Path) -> None:
    random_ = random.Random(0)
    root = tmp_path / "x"
    for i in range(6):
        save(root / f"{i}.png", i)
    for step in range(60):
        files = sorted(root.iterdir())
        for path in random_.sample(files, k=random_.randrange(3)):
            act = random_.choice(["remove", "change", "rename", "break", "touch", "swap"])
            if act == "remove" and len(files) > 4:
                path.unlink()
            elif act == "rename":
                path.rename(root / f"{random_.randrange(100)}.png")
            elif act == "break":
                path.write_bytes(path.read_bytes()[: random_.randrange(60)])
            elif act == "touch":
                path.touch()
            elif act == "swap" and files[0].exists() and path.exists():
                one, other = path.read_bytes(), files[0].read_bytes()
                path.write_bytes(other), files[0].write_bytes(one)
            else:
                save(path, 1000 + step, random_.choice(["L", "RGB"]))
        save(root / f"{random_.randrange(100)}.png", step)
        settings = {"channels": random_.choice(["auto", "auto", 3])}
        assert_same(load(root, **settings), load(root, cache=False, **settings))


def test_a_file_replaced_by_one_of_the_same_size_and_date(tmp_path: Path, place: Path) -> None:
    for i in range(4):
        save(tmp_path / "x" / f"{i}.bmp", i)
        os.utime(tmp_path / "x" / f"{i}.bmp", (10**9, 10**9))
    load(tmp_path / "x")
    (tmp_path / "x" / "0.bmp").rename(tmp_path / "x" / "t")
    (tmp_path / "x" / "1.bmp").rename(tmp_path / "x" / "0.bmp")
    (tmp_path / "x" / "t").rename(tmp_path / "x" / "1.bmp")
    assert_same(load(tmp_path / "x"), load(tmp_path / "x", cache=False))


def test_a_zip_replaced_by_one_of_the_same_size(photos: Path, place: Path, opened: list[str]) -> None:
    path = photos.with_suffix(".zip")
    for seed in (1, 2):
        with zipfile.ZipFile(path, "w") as archive:
            for i in range(4):
                save(photos / "x.bmp", seed * i)
                archive.write(photos / "x.bmp", f"a/{i}.bmp")
        data = load(path)
        assert_same(data, load(path, cache=False))
    opened.clear()
    load(path)
    assert opened == []


def test_files_just_changed_are_read_again(
    photos: Path, place: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "TICK_NS", 2 * 10**9)
    load(photos, channels=3)
    pixels = entries(place)[0] / "pixels"
    before = pixels.stat().st_ino
    opened.clear()
    load(photos, channels=3)
    assert len(opened) == 15
    monkeypatch.setattr(records, "TICK_NS", 0)
    load(photos, channels=3)
    opened.clear()
    assert_same(load(photos, channels=3), load(photos, channels=3, cache=False))
    assert len(opened) == 15  # without the cache
    assert pixels.stat().st_ino == before  # nothing was other than before, so no pixels were written


def test_settled() -> None:
    def settled(now_ns: int, *stamp: int) -> bool:
        return bool(records.settled(np.array([stamp]), now_ns)[0])

    assert settled(3_000_000_001, 5, 10**9, 10**9)
    assert not settled(3_000_000_000, 5, 10**9, 10**9)
    assert not settled(2_000_000_000, 5, 0, 10**9)
    assert not settled(4_000_000_000, 5, 9 * 10**9, 0)  # a date in the future
    assert settled(3_000_000_001, 5, -(10**9), 10**9)  # and one before 1970
    assert not settled(3_000_000_000, -1, 0, 0)
    assert settled(3_000_000_001, 5, 10**9, 10**9, 9 * 10**9, 7)  # a checksum is no time


def test_names_with_line_ends_and_bytes_that_are_no_text(tmp_path: Path, place: Path, opened: list[str]) -> None:
    for name in (b"a\nb.png", b"caf\xe9.png", 'ü"\\.png'.encode(), b"\x01.png"):
        save(tmp_path / "x" / "y.png", len(name))
        (tmp_path / "x" / "y.png").rename(tmp_path / "x" / os.fsdecode(name))
    (tmp_path / "x").rename(tmp_path / os.fsdecode(b"x\xe9"))
    root = tmp_path / os.fsdecode(b"x\xe9")
    data = load(root)
    opened.clear()
    assert_same(load(root), data)
    assert opened == [] and len(data) == 4


@pytest.mark.parametrize("what", ["vanish", "change", "appear"])
def test_files_that_change_while_others_are_read(
    photos: Path, place: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    before = load(photos, channels=3, cache=False)
    victim, read = photos / "class 2" / "08.png", reading.Reader.read

    def then(self: reading.Reader, name: str, most: int = 0) -> bytes:
        if name == "class 0/03.png":
            if what == "vanish":
                victim.unlink()
            else:
                save(victim if what == "change" else victim.with_name("09.png"), 77)
        return read(self, name)

    monkeypatch.setattr(reading.Reader, "read", then)
    data = load(photos, channels=3)
    reasons = dict(data.report.bad)
    if what == "appear":
        assert_same(data, before)
    else:
        expected = "No such file or directory" if what == "vanish" else "changed while it was read"
        assert reasons.pop("class 2/08.png") == expected and len(reasons) == 2
        assert len(data) == 12
        there = [i for i in range(13) if i != 11]  # the rows of all others are right
        assert torch.equal(data.images, before.images[there])
    monkeypatch.setattr(reading.Reader, "read", read)
    assert_same(load(photos, channels=3), load(photos, channels=3, cache=False))


def test_a_file_written_to_while_it_is_read(photos: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = reading.Reader.read

    def torn(self: reading.Reader, name: str, most: int = 0) -> bytes:
        raw = read(self, name)
        if name == "class 0/03.png":
            save(photos / name, 78)
        return raw

    monkeypatch.setattr(reading.Reader, "read", torn)
    assert load(photos).report.bad[0] == ("class 0/03.png", "changed while it was read")
    monkeypatch.setattr(reading.Reader, "read", read)
    assert_same(load(photos), load(photos, cache=False))


def damages() -> list[Callable[[bytes], bytes]]:
    def flip(share: float, bit: int) -> Callable[[bytes], bytes]:
        def change(raw: bytes) -> bytes:
            at = int(share * len(raw))
            return raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]

        return change

    def cut(share: float) -> Callable[[bytes], bytes]:
        return lambda raw: raw[: int(share * len(raw))]

    random_ = random.Random(1)
    flips = [flip(random_.random(), random_.randrange(8)) for _ in range(38)]
    cuts = [cut(random_.random()) for _ in range(8)]
    return [*flips, *cuts, lambda raw: b"", lambda raw: raw + b"\0", lambda raw: raw[::-1], lambda raw: raw * 2]


@pytest.mark.parametrize("name", ["index", "pixels"])
def test_whatever_is_damaged_is_made_again(tmp_path: Path, place: Path, opened: list[str], name: str) -> None:
    for i in range(4):
        save(tmp_path / "x" / f"{i}.png", i)
    fresh = load(tmp_path / "x", channels=3, cache=False)
    load(tmp_path / "x", channels=3)
    assert len(damages()) == 50
    for damage in damages():
        path = entries(place)[0] / name
        good = path.read_bytes()
        path.write_bytes(damage(good))
        if path.read_bytes() == good:
            continue
        opened.clear()
        assert_same(load(tmp_path / "x", channels=3), fresh)
        assert len(opened) == 4  # found out, every time
        opened.clear()
        assert_same(load(tmp_path / "x", channels=3), fresh)
        assert opened == []


@pytest.mark.parametrize("name", ["index", "pixels"])
def test_half_an_entry_is_none(photos: Path, place: Path, name: str) -> None:
    fresh = load(photos)
    (entries(place)[0] / name).unlink()
    assert_same(load(photos), fresh)
    shutil.rmtree(entries(place)[0])
    (place / entry.About.of(DataConfig(size=(6, 5)), photos, (6, 5), 3).name).write_text("a file in its place")
    assert_same(load(photos), fresh)


def test_an_index_that_is_sound_but_of_another_entry(photos: Path, place: Path) -> None:
    load(photos, fit="pad")
    other = entries(place)[0]
    load(photos, fit="stretch")
    (mine,) = [path for path in entries(place) if path != other]
    for name in ("index", "pixels"):
        shutil.copy(other / name, mine / name)
    assert_same(load(photos, fit="stretch"), load(photos, fit="stretch", cache=False))


def test_another_pillow_makes_other_entries(photos: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(photos)
    entry.decoder_version.cache_clear()
    monkeypatch.setattr(entry.PIL, "__version__", "999")
    try:
        load(photos)
    finally:
        entry.decoder_version.cache_clear()
    assert len(entries(place)) == 2


def test_nobody_can_alter_what_is_kept(photos: Path, place: Path) -> None:
    for _ in range(3):  # written, then read
        data = load(photos)
        data.images.zero_()
    assert load(photos).images.any()


def test_an_entry_removed_while_in_use(photos: Path, place: Path) -> None:
    load(photos)
    data = load(photos)
    assert Cache(place).clear() > 0 and entries(place) == []
    assert_same(data, load(photos, cache=False))


def test_off_is_neither_read_nor_written(photos: Path, place: Path, opened: list[str]) -> None:
    load(photos, cache=False)
    assert not place.exists()
    load(photos)
    before = [(path, path.stat().st_mtime_ns) for path in place.rglob("*")]
    opened.clear()
    load(photos, cache=False)
    assert len(opened) >= 15
    assert before == [(path, path.stat().st_mtime_ns) for path in place.rglob("*")]


REFUSALS = ["a file in the way", "read-only", "claim", "write", "rest of a write", "sync", "index", "rename"]


def refuse_at(where: str, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Have the disk refuse at one of ``REFUSALS``."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def write(self: draft.Draft, rows: np.ndarray[Any, Any]) -> None:
        if self.count >= 5:
            if where == "rest of a write":
                self._file.write(rows.tobytes()[:7])
            refuse()
        real_write(self, rows)

    real_write = draft.Draft.write
    if where == "a file in the way":
        place.parent.mkdir(exist_ok=True)
        place.write_text("")
    elif where == "read-only":
        monkeypatch.setattr(draft.tempfile, "mkdtemp", refuse)
    elif where == "claim":
        monkeypatch.setattr(cache_module.os, "posix_fallocate", refuse)
    elif where in ("write", "rest of a write"):
        monkeypatch.setattr(draft.Draft, "write", write)
    elif where == "sync":
        monkeypatch.setattr(cache_module.os, "fsync", refuse)
    elif where == "index":
        monkeypatch.setattr(draft, "write_index", refuse)
    else:
        monkeypatch.setattr(cache_module.Path, "rename", refuse)


@pytest.mark.parametrize("where", REFUSALS)
def test_a_cache_that_cannot_be_written_is_none(
    photos: Path, place: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    fresh = load(photos, channels=3, cache=False)
    opened.clear()
    with monkeypatch.context() as patch:
        refuse_at(where, patch, place)
        assert_same(load(photos, channels=3), fresh)
        assert len(opened) == 15  # once, all the same
        assert place.is_file() or entries(place) == []
    if place.is_file():
        place.unlink()
    load(photos, channels=3)
    save(photos / "class 0" / "new.png", 1)
    opened.clear()
    with monkeypatch.context() as patch:
        if where != "a file in the way":
            refuse_at(where, patch, place)
        data = load(photos, channels=3)
        assert opened == ["class 0/new.png"]  # reading what there is goes on
    assert_same(data, load(photos, channels=3, cache=False))


def test_a_disk_that_loses_what_it_took(
    photos: Path, place: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = load(photos, channels=3, cache=False)

    def sync(handle: int) -> None:
        os.pwrite(handle, bytes(99), 50)  # as a page that a server would not take and the system forgot
        raise OSError(122, "Disk quota exceeded")

    opened.clear()
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "fsync", sync)
        assert_same(load(photos, channels=3), fresh)
    assert len(opened) == 30  # found out, and done again
    assert entries(place) == []


def test_no_home_no_cache(photos: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDPMCTL_CACHE")
    monkeypatch.setattr(cache_module, "user_cache_path", lambda name: Path("~/.cache") / name)
    assert Cache.of_user() is None
    assert_same(load(photos), load(photos, cache=False))
    assert not Path("~").exists()


def test_the_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DDPMCTL_CACHE", "here")
    cache = Cache.of_user()
    assert cache and cache.folder == tmp_path / "here" and cache.limit == 20 * 2**30
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DDPMCTL_CACHE", "~/there")
    monkeypatch.setenv("DDPMCTL_CACHE_SIZE", "1.5G")
    cache = Cache.of_user()
    assert cache and cache.folder == tmp_path / "there" and cache.limit == 3 * 2**29
    monkeypatch.delenv("DDPMCTL_CACHE")
    cache = Cache.of_user()
    assert cache and cache.folder.name == "ddpmctl" and cache.folder.is_absolute()


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("5k", 5120), ("500M", 500 * 2**20), (" 5 GiB ", 5 * 2**30), ("2tb", 2**41)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-5G", "5X", "5GG", "G", "1e5"])
def test_wrong_sizes(text: str, photos: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is not a size such as 500M or 5G"):
        parse_bytes(text)
    monkeypatch.setenv("DDPMCTL_CACHE_SIZE", text or "?")
    with pytest.raises(ConfigError, match=r"DDPMCTL_CACHE_SIZE: .* is not a size") as caught:
        load(photos)
    assert caught.value.advice
    load(photos, cache=False)


def test_the_least_recently_used_make_way(photos: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(photos, 64, fit="crop")
    size = Cache(place).found()[0].bytes
    assert 13 * 64 * 64 * 3 < size < 15 * 64 * 64 * 3
    monkeypatch.setenv("DDPMCTL_CACHE_SIZE", str(3 * size + size // 2))
    load(photos, 64, fit="pad")
    load(photos, 64, fit="stretch")
    for age, fit in ((30, "crop"), (20, "pad"), (10, "stretch")):
        about = entry.About.of(DataConfig(fit=fit), photos, (64, 64), 3)
        for path in (place / about.name, *(place / about.name).iterdir()):
            os.utime(path, (time.time() - age, time.time() - age))
    load(photos, 64, fit="crop")  # used, so it stays
    load(photos, 64, background="red")

    def kept() -> set[str]:
        return {f"{found.head['fit']} {found.head['background'][1]}" for found in Cache(place).found()}

    assert kept() == {"crop 255", "stretch 255", "crop 0"}
    monkeypatch.setenv("DDPMCTL_CACHE_SIZE", str(2 * size + size // 2))
    load(photos, 64, background="red")  # nothing new, but too much of the old
    assert kept() == {"crop 255", "crop 0"}
    data = load(photos, 200)  # would not fit alone: nothing makes way for it
    assert kept() == {"crop 255", "crop 0"}
    assert_same(data, load(photos, 200, cache=False))
    monkeypatch.setenv("DDPMCTL_CACHE_SIZE", "0")
    assert_same(load(photos, 64), load(photos, 64, cache=False))
    assert entries(place) == []


def test_never_more_than_half_of_what_is_free(photos: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(photos, 64)
    size = Cache(place).found()[0].bytes
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=size // 2))
    assert Cache(place).room() == (size + size // 2) // 2
    load(photos, 64)
    assert entries(place) == []  # the disk has filled up: it gives way
    data = load(photos, 64)
    assert entries(place) == []
    assert_same(data, load(photos, 64, cache=False))


def test_a_limit_that_old_and_new_exceed_together(
    photos: Path, place: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(photos, 64)
    monkeypatch.setenv("DDPMCTL_CACHE_SIZE", str(int(Cache(place).found()[0].bytes * 1.5)))
    save(photos / "class 0" / "new.png", 1)
    opened.clear()
    data = load(photos, 64)
    assert set(opened) == {"class 0/new.png"}  # the rest is from the old, though it had to make way
    assert_same(data, load(photos, 64, cache=False))
    opened.clear()
    assert_same(data, load(photos, 64))
    assert opened == [] and len(entries(place)) == 1


LOADER = """
import hashlib, os, signal, sys
from pathlib import Path
from ddpmctl.config import DataConfig
from ddpmctl.data import dataset, records
records.TICK_NS = 0
def progress(done, total):
    if len(sys.argv) > 2 and done == 8: os.kill(os.getpid(), signal.SIGKILL)
for _ in range(3):
    config = DataConfig(size=(6, 5), channels=3, max_bad=0.9)
    data = dataset.load_images(config, Path(sys.argv[1]), progress=progress)
    print(data.fingerprint, hashlib.sha256(data.images.numpy().tobytes()).hexdigest(), data.report)
"""


def test_two_processes_at_once(photos: Path, place: Path) -> None:
    command = [sys.executable, "-c", LOADER, str(photos)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    lines = {line for lines in printed for line in lines}
    assert len(lines) == 1 and sum(map(len, printed)) == 6
    assert load(photos, channels=3).fingerprint in lines.pop()
    assert len(entries(place)) == 1
    assert_same(load(photos, channels=3), load(photos, channels=3, cache=False))


def test_killed_while_writing(photos: Path, place: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOADER, str(photos), "kill"], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = entries(place)
    assert left.suffix == ".tmp" and Cache(place).found()[0].unfinished
    assert_same(load(photos, channels=3), load(photos, channels=3, cache=False))
    assert left.exists() and len(entries(place)) == 2  # it may be somebody's work
    for path in (*left.iterdir(), left):
        os.utime(path, (time.time() - 25 * 3600, time.time() - 25 * 3600))
    load(photos, channels=3)
    assert not left.exists() and len(entries(place)) == 1


def test_interrupted_while_decoding(photos: Path, place: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_images(DataConfig(size=4), photos, progress=stop)
    with pytest.raises(DataError, match=r"class 1/text\.png"):
        load(photos, on_bad="error")
    assert entries(place) == []


def test_strangers_files_stay(photos: Path, place: Path) -> None:
    (place / "images-of-me").mkdir(parents=True)
    (place / "images-of-me" / "index").write_text("mine")
    (place / "notes.txt").write_text("mine")
    (place / "images-0123456789abcdef-0123456789abcdef").symlink_to(place / "images-of-me")
    load(photos)
    cache = Cache(place)
    (found,) = cache.found()
    (found.folder / "theirs").write_text("a guest")
    assert cache.clear() == 0  # for the folder stays
    assert sorted(path.name for path in place.rglob("*")) == sorted(
        ["images-of-me", "index", "notes.txt", "images-0123456789abcdef-0123456789abcdef", found.folder.name, "theirs"]
    )
    assert_same(load(photos), load(photos, cache=False))


def test_the_index_of_many_files_is_read_quickly() -> None:
    kept = records.Records.blank([f"{i:06}.png" for i in range(50_000)], np.arange(150_000).reshape(-1, 3))
    for i in range(50_000):
        seen = decode.Probe("RGB", (7, i % 100), "PNG", False, False, False)
        kept.put(i, seen, i.to_bytes(32, "big"), "bad" if i % 1000 == 7 else "")
    about = entry.About("/x", (2, 2), 3, "crop", (0, 0, 0))
    folder = Path("index of many")
    folder.mkdir()
    (folder / entry.INDEX).write_bytes(entry.write_index(about, (49_950, 3, 2, 2), 7, kept, "f"))
    began = time.process_time()
    head, found = entry.read_index(folder)
    assert time.process_time() - began < 0.5  # a million in a second
    assert found.names == kept.names and found.reasons == kept.reasons and found.probes == kept.probes
    assert (found.stamps == kept.stamps).all() and (found.seen == kept.seen).all()
    assert (found.contents == kept.contents).all() and found.good.sum() == 49_950
    assert head["crc"] == 7 and entry.read_head(folder) == json.loads(json.dumps(head))
