"""The streamed .npz."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpmctl.errors import OutputError
from ddpmctl.npz import NpzWriter


def batch(n: int, channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (n, channels, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_numpy_reads_back_every_image(tmp_path: Path, channels: int) -> None:
    path = tmp_path / "new" / "a.npz"
    parts = [batch(3, channels), batch(1, channels), batch(2, channels)]
    with NpzWriter(path, 6, (4, 6, channels)) as writer:
        for part in parts:
            writer.write(part)
        assert not path.exists()
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files == ["images"]
        assert archive["images"].dtype == np.uint8
        np.testing.assert_array_equal(archive["images"], torch.cat(parts).permute(0, 2, 3, 1).numpy())
    assert [file.name for file in path.parent.iterdir()] == ["a.npz"]


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    peaks = []
    for n in (4, 400):
        tracemalloc.start()
        with NpzWriter(tmp_path / f"{n}.npz", n, (64, 64, 3)) as writer:
            for _ in range(n // 4):
                writer.write(torch.zeros(4, 3, 64, 64, dtype=torch.uint8))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "400.npz").stat().st_size > 400 * 64 * 64 * 3
    assert peaks[1] < 400 * 64 * 64 * 3 / 10


def test_bytes_follow_from_the_images_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with NpzWriter(tmp_path / name, 2, (4, 6, 3), key="arr_0") as writer:
            writer.write(batch(2))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with np.load(tmp_path / "a") as archive:
        assert archive["arr_0"].shape == (2, 4, 6, 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [(batch(1, 1), "for an array of"), (batch(1).float(), "for an array of"), (batch(3), "more than the 2")],
)
def test_images_that_do_not_fit_are_refused_and_leave_nothing(tmp_path: Path, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message), NpzWriter(tmp_path / "a.npz", 2, (4, 6, 3)) as writer:
        writer.write(images)
    assert not list(tmp_path.iterdir())


def test_too_few_images_are_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 of 2"), NpzWriter(tmp_path / "a.npz", 2, (4, 6, 3)) as writer:
        writer.write(batch(1))
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), NpzWriter(tmp_path / "a.npz", 2, (4, 6, 3)) as writer:
        writer.write(batch(1))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"a\.npz"), NpzWriter(tmp_path / "file" / "a.npz", 2, (4, 6, 3)):
        pass
