"""Counts and warnings over images of known properties."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ddpmctl.config import DataConfig
from ddpmctl.data.report import DataReport, resolve_shape
from ddpmctl.data.scan import find_images
from ddpmctl.data.survey import survey
from ddpmctl.errors import DataError


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    (tmp_path / "rose").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "rose" / "a.png")
    Image.new("RGB", (64, 48)).save(tmp_path / "rose" / "b.jpg")
    Image.new("L", (200, 50)).save(tmp_path / "long.png")
    Image.new("RGBA", (8, 64)).save(tmp_path / "thin.png")
    frames = [Image.new("RGB", (64, 64), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "notes.txt").write_text("text")
    whole = (tmp_path / "rose" / "a.png").read_bytes()
    (tmp_path / "z cut.png").write_bytes(whole[: len(whole) // 2 + 10])
    return tmp_path


def test_survey(mixed: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = survey(find_images(mixed), target=(48, 64), full=True, progress=lambda *n: calls.append(n))
    assert report.to_dict() == {
        "usable": 5,
        "sizes": {"48x64": 2, "64x64": 1, "50x200": 1, "64x8": 1},
        "modes": {"RGB": 2, "P": 1, "L": 1, "RGBA": 1},
        "formats": {"PNG": 3, "GIF": 1, "JPEG": 1},
        "classes": {"rose": 2},
        "grey": 1,
        "alpha": 1,
        "animated": 1,
        "odd_aspect": 2,
        "enlarged": 1,
        "ignored": 1,
        "bad": [
            {"name": "text.png", "reason": "not an image that can be read"},
            {"name": "z cut.png", "reason": "truncated"},
        ],
    }
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert calls == [(n, 7) for n in range(1, 8)]


def test_survey_reads_headers_only_unless_asked(mixed: Path) -> None:
    assert survey(find_images(mixed)).usable == 6
    assert survey(find_images(mixed)).enlarged == 0  # no target, nothing to compare with


def test_warnings(mixed: Path) -> None:
    report = survey(find_images(mixed), target=(48, 64), full=True)
    assert report.warnings(size=(48, 64), channels=3) == [
        "2 of 7 images are unreadable, the first: text.png: not an image that can be read",
        "5 images, fewer than 100: the model may memorise them",
        "1 of 7 images is smaller than 48x64 and is enlarged",
        "2 of 7 images are more than 3 times as long as wide: only the middle is kept",
        "1 of 7 images holds several pictures; the first is used",
        "1 of 7 images has an alpha channel, filled with data.background",
    ]
    padded = report.warnings(size=(48, 64), channels=4, fit="pad")
    assert "1 of 7 images is smaller than 48x64 and is padded" in padded
    assert not any("alpha" in line or "as long as wide" in line for line in padded)
    assert DataReport(usable=100).warnings(size=(8, 8), channels=3) == []
    assert len(DataReport(usable=99).warnings()) == 1
    assert DataReport(usable=120).warnings(batch_size=120) == []
    assert DataReport(usable=120).warnings(batch_size=121) == [
        "120 images, fewer than a batch of 121: each batch repeats images"
    ]


def test_auto_shape() -> None:
    auto, path = DataConfig(size="auto"), Path("x")
    same = DataReport(usable=3, grey=3, sizes=DataReport().sizes.__class__({(5, 7): 3}))
    assert resolve_shape(auto, same, path) == ((5, 7), 1)
    same.grey = 2
    assert resolve_shape(auto, same, path) == ((5, 7), 3)
    assert resolve_shape(DataConfig(size="8x9", channels=4), same, path) == ((8, 9), 4)
    same.sizes[(6, 6)] = 9
    with pytest.raises(DataError, match=r"2 sizes: 6x6 \(9\), 5x7 \(3\)") as caught:
        resolve_shape(auto, same, path)
    assert "--size" in caught.value.advice
    with pytest.raises(DataError, match="none of 1 images can be read, the first: a: b"):
        resolve_shape(auto, DataReport(bad=[("a", "b")]), path)
