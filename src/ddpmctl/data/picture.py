"""One picture that is given by name: from a file to uint8 pixels, with errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ddpmctl.data.decode import decode, probe, quiet
from ddpmctl.data.formats import MAX_FILE_BYTES, BadImage
from ddpmctl.errors import DataError


class Picture:
    """An image file that has been read, and found to be one.

    ``size`` is (height, width) once upright. Raises :class:`DataError` when the file is missing or no image.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: not a file", "give the file of one picture")
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise DataError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB", "give a smaller picture")
            self.raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}", "give the file of one picture") from error
        with self._faults():
            self.probe = probe(self.raw)

    def fitting(self, longest: int) -> tuple[int, int]:
        """Height and width, shrunk in proportion where the longer side has more than ``longest`` pixels."""
        height, width = self.probe.size
        factor = min(1.0, longest / max(height, width))
        return max(1, round(height * factor)), max(1, round(width * factor))

    def pixels(
        self,
        size: tuple[int, int],
        channels: int | None = None,
        *,
        fit: str = "crop",
        background: str = "white",
    ) -> Tensor:
        """uint8 (C, H, W); ``channels`` None: 1 for a grey picture, else 3."""
        channels = channels or (1 if self.probe.grey else 3)
        with self._faults():
            array = decode(self.raw, size=size, channels=channels, fit=fit, background=background)
        return torch.from_numpy(array).permute(2, 0, 1).contiguous()

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            with quiet():
                yield
        except BadImage as error:
            raise DataError(f"{self.path}: {error.reason}", "give another picture") from error
