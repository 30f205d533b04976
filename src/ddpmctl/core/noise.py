"""Seeded randomness: every draw follows from what it is for, so nothing random needs to be stored.

A training step draws from (seed, step, purpose); image i of a sample from (seed, i). A resumed run repeats the
uninterrupted one bit for bit, and an image does not depend on the batch it is made in.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from ddpmctl.core.transfer import send


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that follows from ``parts``; different parts give unrelated seeds."""
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def derived_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`, so that draws are the same on every device."""
    return torch.Generator().manual_seed(derive_seed(*parts))


class ImageNoise:
    """One stream of Gaussian noise an image: calling it gives the next draw for each image of the batch.

    ``indices`` are the numbers of the images within the whole sample, ``shape`` is (C, H, W).
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.generators = [derived_generator(seed, "image", index) for index in indices]
        self.shape, self.device, self.dtype = shape, torch.device(device), dtype

    def __call__(self) -> Tensor:
        """The next standard normal noise, (B, C, H, W)."""
        draws = [torch.randn(self.shape, generator=g, dtype=self.dtype) for g in self.generators]
        return send(torch.stack(draws), self.device)
