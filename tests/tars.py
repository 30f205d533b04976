"""Tar shards of small images, each of which says its number."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image


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


BAD = "not an image that can be read"
"""What is said of those that are none."""
