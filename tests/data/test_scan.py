"""Finding images: endings, folders, links, zips of every kind."""

from __future__ import annotations

import os
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ddpmctl.data.formats import EXTENSIONS, BadImage
from ddpmctl.data.reading import Reader
from ddpmctl.data.scan import Group, find_images
from ddpmctl.errors import DataError
from ddpmctl.parsing import shown


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def names(path: Path) -> list[str]:
    return find_images(path).names


def make_zip(path: Path, *members: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in members:
            archive.writestr(name, name)
    return path


def test_known_endings() -> None:
    assert {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".tif", ".gif", ".bmp", ".dib", ".ppm"} <= EXTENSIONS
    assert not {".pdf", ".eps", ".ps", ".mpg", ".h5", ".wmf", ".txt", ".grib", ""} & EXTENSIONS


def test_folder(tmp_path: Path) -> None:
    touch(tmp_path, "b.PNG", "a 1.jpg", "rose/x y.JPeG", "rose/deep/z.webp", "notes.txt", "png")
    touch(tmp_path, ".hidden.png", "__MACOSX/rose/x.png", ".git/y.png", "old.pdf", "inner.zip")
    listing = find_images(tmp_path)
    assert listing.names == ["a 1.jpg", "b.PNG", "rose/deep/z.webp", "rose/x y.JPeG"]
    assert list(listing.groups()) == [Group(0, 2, None), Group(2, 4, "rose")]
    assert listing.ignored == 7  # a hidden folder counts once
    assert not listing.is_zip and listing.refused == []


def test_links(tmp_path: Path) -> None:
    touch(tmp_path, "data/rose/a.png", "elsewhere/b.png")
    data = tmp_path / "data"
    (data / "aaa").symlink_to(data / "rose")  # another way to a real folder: its own name wins
    (data / "loop").symlink_to(data)
    (data / "rose" / "up").symlink_to("..")
    (data / "tulip").symlink_to(tmp_path / "elsewhere")
    (data / "linked.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    (data / "self.png").symlink_to("self.png")
    (data / "gone.png").symlink_to("nowhere.png")
    (data / "gone").symlink_to("nowhere")
    listing = find_images(data)
    assert listing.names == ["linked.png", "rose/a.png", "tulip/b.png"]
    assert [name for name, _ in listing.refused] == ["gone.png", "self.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no fifos")
def test_a_pipe_named_like_an_image_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    touch(tmp_path, "a.png")
    listing = find_images(tmp_path)
    assert len(listing.names) == 1 and listing.refused == [("pipe.png", "not a regular file")]


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/ros\xe9/1.png"
    try:
        os.mkdir(os.path.dirname(raw))  # noqa: PTH102, PTH120
    except OSError:
        pytest.skip("the file system wants unicode")
    Path(os.fsdecode(raw)).write_bytes(b"x")
    listing = find_images(tmp_path)
    assert next(listing.groups()).label == r"ros\udce9"
    with Reader(listing) as reader:
        assert reader.read(listing.names[0]) == b"x"
    assert shown("a\x1b[31m\n") == r"a\x1b[31m\n"


def test_nothing_to_find(tmp_path: Path) -> None:
    touch(tmp_path, "sub/notes.txt", "empty.zip", "picture.png")
    make_zip(tmp_path / "texts.zip", "a.txt")
    for path, problem in [
        (tmp_path / "missing", "No such file"),
        (tmp_path / "picture.png", "neither a folder nor a .zip"),
        (tmp_path / "empty.zip", "broken zip"),
        (tmp_path / "sub", r"no image found \(1 other files\)"),
        (tmp_path / "texts.zip", "no image found"),
    ]:
        with pytest.raises(DataError, match=problem) as caught:
            find_images(path)
        assert str(path) in caught.value.problem and caught.value.advice


def test_zip(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.ZIP", "rose/b b.PNG", "rose/", "tulip\\c.png", "top.jpg", "x.txt", ".h.png")
    listing = find_images(path)
    assert listing.names == ["rose/b b.PNG", "top.jpg", "tulip/c.png"]
    assert [group.label for group in listing.groups()] == ["rose", None, "tulip"]
    assert listing.is_zip and listing.ignored == 2
    with Reader(listing) as reader:
        assert reader.read(listing.names[0]) == b"rose/b b.PNG"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (["flowers/rose/1.png", "flowers/lily/2.png"], ["lily/2.png", "rose/1.png"]),
        (["a/b/rose/1.png", "a/b/lily/2.png"], ["lily/2.png", "rose/1.png"]),
        (["flowers/rose/1.png", "flowers/2.png"], ["2.png", "rose/1.png"]),
        (["rose/1.png", "rose/2.png"], ["rose/1.png", "rose/2.png"]),
        (["flowers/rose/1.png", "2.png"], ["2.png", "flowers/rose/1.png"]),
        (["a/rose/1.png", "b/rose/1.png"], ["a/rose/1.png", "b/rose/1.png"]),
    ],
)
def test_shared_top_folder_of_a_zip(tmp_path: Path, members: list[str], expected: list[str]) -> None:
    path = make_zip(tmp_path / "a.zip", *members, "__MACOSX/flowers/._1.png")
    assert names(path) == expected
    listing = find_images(path)
    with Reader(listing) as reader:
        assert {reader.read(file).decode() for file in listing.names} == set(members)


def test_evil_zip(tmp_path: Path) -> None:
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../up.png", "/etc/abs.png", "a/../../b.png", "C:/x.png", "good.png"):
            archive.writestr(name, "x")
        archive.writestr("bomb.png", bytes(10 * 2**20), zipfile.ZIP_DEFLATED)
        archive.writestr("odd.png", "x" * 100, zipfile.ZIP_LZMA)
        archive.writestr("locked.png", "x")
        archive.writestr("huge.png", "x")
        archive.getinfo("locked.png").flag_bits |= 1
        archive.getinfo("huge.png").file_size = 300 * 2**20
    listing = find_images(path)
    assert listing.names == ["good.png"]
    reasons = dict(listing.refused)
    assert len(reasons) == 8
    assert ".." in reasons["../up.png"] and ".." in reasons["a/../../b.png"]
    assert "absolute" in reasons["/etc/abs.png"] and "absolute" in reasons["C:/x.png"]
    assert "absurd" in reasons["bomb.png"] and "method" in reasons["odd.png"]
    assert reasons["locked.png"] == "encrypted" and "MiB" in reasons["huge.png"]


def test_zip_of_only_evil_members_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no image found; \.\./up\.png: path with"):
        find_images(make_zip(tmp_path / "evil.zip", "../up.png"))


def test_members_that_lie_about_their_size_or_content(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("lie.png", bytes(64 * 2**20))
        archive.getinfo("lie.png").file_size = 1000
        archive.writestr("rotten.png", b"0123456789" * 50, zipfile.ZIP_STORED)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"012345678901234", b"012345678901239"))
    listing = find_images(path)
    assert len(listing.names) == 2
    tracemalloc.start()
    with Reader(listing) as reader:
        for file in listing.names:
            with pytest.raises(BadImage):
                reader.read(file)
    assert tracemalloc.get_traced_memory()[1] < 2**20  # never unpacked
    tracemalloc.stop()


def test_files_that_vanish_are_bad_images(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    listing = find_images(tmp_path)
    (tmp_path / "a.png").unlink()
    with Reader(listing) as reader:
        with pytest.raises(BadImage, match="No such file"):
            reader.read(listing.names[0])
        assert reader.read(listing.names[1]) == b"b.png"
    archive = make_zip(tmp_path / "c.zip", "a.png")
    listing = find_images(archive)
    archive.write_bytes(b"")
    with pytest.raises(DataError, match="broken zip"):
        Reader(listing)


def test_reading_a_zip_from_many_threads(tmp_path: Path) -> None:
    listing = find_images(make_zip(tmp_path / "a.zip", *(f"{n:04}.png" for n in range(300))))
    with Reader(listing) as reader, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(reader.read, listing.names)) == [name.encode() for name in listing.names]
