"""Headers read by hand say what Pillow says, or nothing."""

from __future__ import annotations

import io
import marshal
import random
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from ddpmctl.data import headers
from ddpmctl.data import survey as module
from ddpmctl.data.decode import probe
from ddpmctl.data.formats import BadImage
from ddpmctl.data.headers import HEADER_BYTES, headers_of, plain_header
from ddpmctl.data.pool import elsewhere
from ddpmctl.data.scan import find_images
from ddpmctl.data.stamps import stamp
from ddpmctl.data.survey import survey


def encode(mode: str, form: str, size: tuple[int, int] = (9, 7), **options: object) -> bytes:
    kept = io.BytesIO()
    Image.effect_noise(size, 90).convert(mode).save(kept, form, **options)
    return kept.getvalue()


PLAIN = {
    **{f"PNG {mode}": encode(mode, "PNG") for mode in ("L", "LA", "RGB", "RGBA")},
    **{f"JPEG {mode}": encode(mode, "JPEG", (40, 30)) for mode in ("L", "RGB")},
    "progressive": encode("RGB", "JPEG", progressive=True, optimize=True, comment="a comment"),
    "dpi": encode("RGB", "PNG", dpi=(72, 72)),
    "restarts": encode("RGB", "JPEG", (64, 64), restart_marker_rows=1),
}


def text(key: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text(key, "x")
    return info


def exif() -> Image.Exif:
    turned = Image.Exif()
    turned[0x0112] = 6
    return turned


ODD = {
    "palette": encode("P", "PNG"),
    "one bit": encode("1", "PNG"),
    "16 bits": encode("I;16", "PNG"),
    "text": encode("RGB", "PNG", pnginfo=text("a")),
    "see-through": encode("RGB", "PNG", transparency=(1, 2, 3)),
    "turned PNG": encode("RGB", "PNG", exif=exif()),
    "turned JPEG": encode("RGB", "JPEG", exif=exif()),
    "CMYK": encode("CMYK", "JPEG"),
    "profile": encode("RGB", "JPEG", icc_profile=b"abc"),
    "GIF": encode("P", "GIF"),
    "nothing": b"",
    "PNG too long to see all of": encode("RGB", "PNG", (200, 200), compress_level=0),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_are_read(name: str) -> None:
    assert plain_header(PLAIN[name]) == probe(PLAIN[name])


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_left_to_pillow(name: str) -> None:
    assert plain_header(ODD[name][:HEADER_BYTES]) is None


def test_turned_by_what_stands_behind_the_pixels() -> None:
    raw = PLAIN["PNG RGB"]
    turned = encode("RGB", "PNG", exif=exif())
    chunk = turned[turned.index(b"eXIf") - 4 : turned.index(b"IDAT") - 4]
    assert plain_header(raw[:-12] + chunk + raw[-12:]) is None


@pytest.mark.parametrize("name", [*PLAIN, *ODD])
def test_of_damaged_files_it_says_what_pillow_says_or_nothing(name: str) -> None:
    whole, chance, answered = (PLAIN | ODD)[name], random.Random(name), 0
    for _ in range(400):
        raw = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            if raw:
                raw[chance.randrange(min(len(raw), 700))] = chance.choice([0, 1, 8, 255, chance.randrange(256)])
        cut = bytes(raw[: chance.randrange(len(raw) + 1)] if chance.random() < 0.3 else raw)
        found = plain_header(cut[:HEADER_BYTES])
        if found is not None:
            answered += 1
            assert found == probe(cut)
    assert answered or name in ODD


def test_bombs_and_images_of_no_pixels_are_left_to_pillow() -> None:
    raw = bytearray(PLAIN["JPEG RGB"])
    at = raw.index(b"\xff\xc0") + 5
    raw[at : at + 4] = b"\xff\xff\xff\xff"
    assert plain_header(bytes(raw)) is None
    raw[at : at + 2] = b"\0\0"
    assert plain_header(bytes(raw)) is None
    with pytest.raises(BadImage):
        probe(bytes(raw))


def test_headers_of_files_in_a_process_of_their_own(tmp_path: Path) -> None:
    """As here: of plain files what Pillow says, and nothing of files that are odd, gone, changed, cut or no files."""
    for number, raw in enumerate([*PLAIN.values(), *ODD.values()]):
        (tmp_path / f"{number:02}\udce9.png").write_bytes(raw)
    names = sorted(path.name for path in tmp_path.iterdir())
    marks = [list(stamp(str(tmp_path / name))) for name in names]
    names += ["gone.png", names[0], "folder"]
    (tmp_path / "folder").mkdir()
    marks += [[5, 1, 1], [marks[0][0], marks[0][1] + 1, marks[0][2]], list(stamp(str(tmp_path / "folder")))]
    found = headers_of(str(tmp_path), names, marks)
    assert found == [*map(probe, PLAIN.values()), *[None] * (len(ODD) + 3)]
    assert marshal.loads(elsewhere(headers.__file__, str(tmp_path), names, marks)) == found
    assert headers_of(str(tmp_path / "gone"), names, marks) == [None] * len(names)


def test_a_program_that_fails_answers_nothing(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("import sys\nsys.stdout.write('half an answer')\nsys.exit(1)")
    assert elsewhere(str(tmp_path / "fails.py"), 1) == b""
    assert elsewhere(headers.__file__, "one thing too few") == b""


def test_headers_of_many_files_are_the_same_by_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, raw in enumerate([*PLAIN.values(), *ODD.values()] * 3):
        (tmp_path / f"{number:03}.png").write_bytes(raw)
    listing = find_images(tmp_path)
    here = survey(listing)
    asked = []
    monkeypatch.setattr(module, "_FIRST", 5)
    monkeypatch.setattr(module, "_PORTION", 7)
    monkeypatch.setattr(module, "elsewhere", lambda *request: asked.append(request) or elsewhere(*request))
    assert survey(listing) == here and len(asked) > 3
    monkeypatch.setattr(module, "elsewhere", lambda *request: b"")
    assert survey(listing) == here
    first = survey(listing, enough=lambda seen: not seen.grey)
    assert (first.usable, first.total) == (1, 1) or first.usable < here.usable
