"""Many images in one ``.npz``, written batch by batch: memory does not grow with their number."""

from __future__ import annotations

import zipfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.lib import format as npy
from torch import Tensor

from ddpmctl.files import output_errors, replacing


class NpzWriter:
    """Context manager that writes one uint8 array (n, H, W, C), which ``numpy.load(path)[key]`` reads.

    ``shape`` is (H, W, C). The file appears under its name when all ``n`` images are in it, and not at all
    when the block is left by an exception. Its bytes follow from the images alone. Raises
    :class:`ddpmctl.errors.OutputError` when it cannot be written.
    """

    def __init__(self, path: Path, n: int, shape: tuple[int, int, int], *, key: str = "images") -> None:
        self.path, self.n, self.shape, self.key = path, n, shape, key
        self.written = 0

    def __enter__(self) -> NpzWriter:
        with output_errors(self.path), ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(replacing(self.path)), "w"))
            # A ZipInfo made by hand carries no time of day.
            member = zipfile.ZipInfo(f"{self.key}.npy")
            self._array = stack.enter_context(archive.open(member, "w", force_zip64=True))
            header = {"descr": "|u1", "fortran_order": False, "shape": (self.n, *self.shape)}
            npy.write_array_header_1_0(self._array, header)
            self._stack = stack.pop_all()
        return self

    def write(self, images: Tensor) -> None:
        """Append a batch: uint8 (B, C, H, W), on any device. Raises ``ValueError`` when it does not fit."""
        batch = np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())
        if batch.dtype != np.uint8 or batch.shape[1:] != self.shape:
            raise ValueError(f"{batch.dtype} images (H, W, C) = {batch.shape[1:]} for an array of uint8 {self.shape}")
        if self.written + len(batch) > self.n:
            raise ValueError(f"more than the {self.n} images that were announced")
        with output_errors(self.path):
            self._array.write(batch.data)
        self.written += len(batch)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self.written != self.n:
            error = ValueError(f"{self.written} of {self.n} images were written")
            self._stack.__exit__(ValueError, error, None)
            raise error
        with output_errors(self.path):
            self._stack.__exit__(kind, error, trace)
