"""One picture that is given by name: from a file to uint8 pixels, with errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpmctl.data.decode import FITS, decode, probe, quiet
from ddpmctl.data.formats import MAX_FILE_BYTES, BadImage
from ddpmctl.errors import DataError

WHITE = 128
"""Grey from which on a mask is white."""


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

    def mask(self, size: tuple[int, int], over: tuple[int, int], *, fit: str = "crop") -> Tensor:
        """bool (1, H, W): true where a grey of :data:`WHITE` or more lies over a picture of size ``over``, once that is fitted.

        It is stretched to ``over`` and then goes the way of the picture, by nearest pixels. See-through is black.
        """
        white = self.pixels(self.probe.size, 1, fit="stretch", background="black")[0] >= WHITE
        # Mode 1, of which Pillow takes the nearest pixel whatever it is asked for.
        image = Image.fromarray(white.numpy()).resize((over[1], over[0]))
        fitted = FITS[fit](image, (size[1], size[0]), 0)
        return torch.from_numpy(np.array(fitted)).unsqueeze(0)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            with quiet():
                yield
        except BadImage as error:
            raise DataError(f"{self.path}: {error.reason}", "give another picture") from error
