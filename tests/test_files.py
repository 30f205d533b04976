"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ddpmctl.errors import OutputError
from ddpmctl.files import check_place, output_errors, replacing


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failed_attempt(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as file:
        file.write(b"half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_very_long_name_is_fine(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250)
    with replacing(path):
        pass
    assert path.exists()


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
def test_rights_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with replacing(tmp_path / "a"):
            pass
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.name != "posix", reason="devices of POSIX")
def test_a_device_is_never_replaced() -> None:
    with pytest.raises(OutputError, match="/dev/null"), output_errors(Path("/dev/null")):  # noqa: SIM117
        with replacing(Path("/dev/null")):
            pass
    assert Path("/dev/null").is_char_device()


def test_a_link_that_leads_nowhere_is_no_place(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("link")
    for path in (link, link / "a.png"):
        with pytest.raises(OutputError, match="is not a folder"):
            check_place(path)
    link.unlink()
    link.symlink_to(tmp_path)
    check_place(link / "a.png")


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(OutputError) as caught, output_errors(path), replacing(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(path) in caught.value.problem
    assert os.strerror(errno.ENOSPC) in caught.value.problem
    assert caught.value.advice
    assert not path.exists()
