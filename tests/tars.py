"""Tar shards of small images, each of which says its number, and what is read of them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ddpmctl.config import DataConfig
from ddpmctl.data.dataset import ImageDataset, load_images
from ddpmctl.data.stream import Stream
from ddpmctl.data.streamed import StreamedBatches
from ddpmctl.images import to_uint8


def png(number: int, size: tuple[int, int] = (4, 4), mode: str = "RGB") -> bytes:
    """An image of one colour, which is its ``number``, (height, width) ``size``."""
    file = io.BytesIO()
    colour = (number % 256, number // 256 % 256, number // 65536) if mode == "RGB" else number % 256
    Image.new(mode, size[::-1], colour).save(file, "png")
    return file.getvalue()


def numbers(pixels: torch.Tensor) -> list[int]:
    """The numbers of uint8 images (N, C, H, W) of :func:`png`."""
    first = pixels[:, :, 0, 0].long()
    return (first * torch.tensor([1, 256, 65536])[: first.shape[1]]).sum(1).tolist()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar of (name, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(
    folder: Path,
    counts: Sequence[int],
    *,
    label: Callable[[int], str] | None = None,
    bad: Container[int] = (),
    size: tuple[int, int] = (4, 4),
) -> Path:
    """Shards ``train-000.tar``, ... of so many images each, numbered throughout; those that are ``bad`` are none."""
    number = 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            image = png(number, size)
            members.append((f"{number:06d}.png", b"no image" if number in bad else image))
            members += [(f"{number:06d}.cls", label(number).encode())] if label else []
            number += 1
        write_tar(folder / f"train-{shard:03d}.tar", members)
    return folder


COUNTS = (7, 0, 12, 1, 10)
"""Images of shards, in tests of their order."""


def opened(path: Path, most: int = 0, **settings: Any) -> ImageDataset:
    return load_images(DataConfig(**{"size": (4, 4), "workers": 2, "max_bad": 0.5, **settings}), path, most=most)


def streamed(path: Path, **settings: Any) -> Stream:
    found = opened(path, **settings).stream
    assert found is not None
    return found


@contextmanager
def batches(found: Stream, batch_size: int, seed: int = 1, hflip: bool = False) -> Iterator[StreamedBatches]:
    with closing(StreamedBatches(found, batch_size, seed, hflip)) as made:
        yield made


def seen(made: StreamedBatches, steps: range, part: slice = slice(None)) -> list[int]:
    return [number for step in steps for number in numbers(to_uint8(made(step, part).x0))]


BAD = "not an image that can be read"
"""What is said of those that are none."""
