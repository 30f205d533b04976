"""Folders and zips to tensors: pixels, labels, bad files, memory, fingerprints."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpmctl.config import DataConfig
from ddpmctl.data import dataset as module
from ddpmctl.data import pixels
from ddpmctl.data.dataset import ImageDataset, load_images
from ddpmctl.data.pool import ordered_map, worker_count
from ddpmctl.errors import ConfigError, DataError


def load(path: Path, size: object = "4x6", **settings: Any) -> ImageDataset:
    return load_images(DataConfig(size=size, workers=2, **settings), path)  # type: ignore[arg-type]


def save(path: Path, value: int | tuple[int, ...], mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    root = tmp_path / "flowers"
    for number in range(40):
        label = ("tulip", "aster", "rose")[number % 3]
        save(root / label / f"{number:02}.png", (number, 2 * number, 255))
    return root


def test_pixels_in_order_of_names(flowers: Path) -> None:
    data = load(flowers, channels=3)
    assert data.images.shape == (40, 3, 4, 6) and data.images.dtype == torch.uint8
    assert data.images.is_contiguous() and len(data) == 40
    assert data.size == (4, 6) and data.channels == 3
    numbers = [n for first in (1, 2, 0) for n in range(first, 40, 3)]  # aster, rose, tulip
    assert data.images[:, 0, 0, 0].tolist() == numbers
    assert data.images[:, 1, 3, 5].tolist() == [2 * n for n in numbers]
    assert data.labels is None and data.class_names == []
    assert data.report.usable == 40 and data.report.classes == {"aster": 13, "rose": 13, "tulip": 14}


def test_channels_are_planes(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    assert (load(tmp_path).images[0].numpy() == array.transpose(2, 0, 1)).all()


def test_labels(flowers: Path) -> None:
    data = load(flowers, conditional=True)
    assert data.class_names == ["aster", "rose", "tulip"]
    assert data.labels is not None and data.labels.dtype == torch.int64
    assert data.labels.tolist() == [0] * 13 + [1] * 13 + [2] * 14


def test_zip_gives_the_same_as_the_folder(flowers: Path, tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "flowers")
    folder, packed = load(flowers, conditional=True), load(tmp_path / "packed.zip", conditional=True)
    assert torch.equal(folder.images, packed.images)
    assert folder.class_names == packed.class_names and folder.fingerprint == packed.fingerprint
    assert folder.labels is not None and packed.labels is not None
    assert torch.equal(folder.labels, packed.labels)


def test_classes_without_a_readable_image_are_dropped(flowers: Path) -> None:
    (flowers / "broken").mkdir()
    (flowers / "broken" / "x.png").write_text("text")
    assert load(flowers, conditional=True).class_names == ["aster", "rose", "tulip"]


def test_conditional_needs_class_folders(flowers: Path) -> None:
    save(flowers / "loose.png", 0, "L")
    problem = r"1 of 41 images lie in no class folder, the first: loose\.png"
    with pytest.raises(DataError, match=problem) as caught:
        load(flowers, conditional=True)
    assert "data.conditional=false" in caught.value.advice


def test_auto_size_and_channels(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 5, "L", (6, 4))
    save(tmp_path / "b.png", 5, "L", (6, 4))
    assert load(tmp_path, "auto").images.shape == (2, 1, 4, 6)
    save(tmp_path / "c.png", (1, 2, 3, 4), "RGBA", (6, 4))
    assert load(tmp_path, "auto").channels == 3
    assert load(tmp_path, "auto", channels=4).images[2, :, 0, 0].tolist() == [1, 2, 3, 4]
    assert load(tmp_path, 2, channels=1).images.shape == (3, 1, 2, 2)
    save(tmp_path / "d.png", 0, "L", (7, 4))
    with pytest.raises(DataError, match=r"4x6 \(3\), 4x7 \(1\)"):
        load(tmp_path, "auto")


def test_bad_images_are_skipped_up_to_a_share(flowers: Path) -> None:
    whole = load(flowers, channels=3)
    for number in range(5):
        (flowers / "rose" / f"bad{number}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"5 of 45 images are unreadable, the first: rose/bad0\.png: empty"):
        load(flowers)
    (flowers / "rose" / "bad0.png").unlink()
    for channels in (3, "auto"):
        data = load(flowers, channels=channels)  # 4 of 44 is below a tenth
        assert torch.equal(data.images, whole.images) and data.fingerprint == whole.fingerprint
        assert data.report.bad == [(f"rose/bad{n}.png", "empty file") for n in range(1, 5)]
        assert data.report.usable == 40 and data.images.is_contiguous()
    with pytest.raises(DataError, match=r"rose/bad1\.png: empty file") as caught:
        load(flowers, on_bad="error")
    assert "data.on_bad=skip" in caught.value.advice


def test_no_readable_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    for channels in (3, "auto"):
        with pytest.raises(DataError, match=r"none of 1 images can be read, the first: a\.png: not an image"):
            load(tmp_path, channels=channels, max_bad=1.0)


def test_files_that_vanish_while_reading_are_skipped(flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = module.find_images

    def then_lose_one(path: Path) -> object:
        listing = found(path)
        (flowers / listing.names[3]).unlink()
        return listing

    monkeypatch.setattr(module, "find_images", then_lose_one)
    data = load(flowers)
    assert len(data) == 39 and data.report.bad[0][1] == "No such file or directory"


def test_large_sets_live_in_a_file(flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load(flowers, conditional=True)
    made: list[object] = []
    memmap = np.memmap
    monkeypatch.setattr(pixels, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(pixels.np, "memmap", lambda *a, **k: made.append(a) or memmap(*a, **k))
    large = load(flowers, conditional=True, cache=False)
    assert made and torch.equal(small.images, large.images) and large.images.is_contiguous()
    assert small.fingerprint == large.fingerprint


def test_no_room_for_a_large_set(flowers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(pixels.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(DataError, match="decoded images: too little room") as caught:
        load(flowers, cache=False)
    assert "TMPDIR" in caught.value.advice


def test_fingerprint_tells_content_and_names_but_not_settings(flowers: Path) -> None:
    before = load(flowers).fingerprint
    assert load(flowers, size=8, fit="pad", channels=1).fingerprint == before
    (flowers / "rose" / "02.png").rename(flowers / "rose" / "03.png")
    renamed = load(flowers).fingerprint
    save(flowers / "rose" / "03.png", 1, "L")
    assert len({before, renamed, load(flowers).fingerprint}) == 3


def test_progress_counts_to_the_end(flowers: Path) -> None:
    calls: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        calls.append((done, total))

    load_images(DataConfig(size=4, channels=3), flowers, progress=note)
    assert calls == [(n, 40) for n in range(1, 41)]
    calls.clear()
    load_images(DataConfig(size="auto"), flowers, progress=note)
    assert calls == [(n, 80) for n in range(1, 81)]
    calls.clear()
    load_images(DataConfig(size=5, channels="auto"), flowers, progress=note)  # the first shows colour: no more headers
    assert calls == [(1, 80), *((n, 80) for n in range(41, 81))]


def test_bad_background_is_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.background"):
        load(tmp_path / "missing", background="wite")


def test_warning_filters_are_given_back(flowers: Path) -> None:
    before = list(warnings.filters)
    load(flowers)
    assert list(warnings.filters) == before


def test_map_keeps_order_and_few_at_a_time() -> None:
    taken = 0

    def items() -> object:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    results = ordered_map(lambda n: n * n, items(), 2)  # type: ignore[arg-type]
    assert [next(results) for _ in range(10)] == [n * n for n in range(10)]
    assert taken <= 10 + 8 * 2
    results.close()
    assert worker_count(3) == 3 and worker_count("auto") >= 1
