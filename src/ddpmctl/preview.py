"""The sample grid that a run draws along the way: always from the same noise, so that grids can be compared."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
from PIL import Image

from ddpmctl.config import RunConfig
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.noise import derive_seed
from ddpmctl.events import Busy
from ddpmctl.images import grid, to_uint8
from ddpmctl.plans import USUAL
from ddpmctl.sampling import Generated, generate


class Preview:
    """Draws grids as ``config.train`` says. ``shape`` is (C, H, W); ``classes`` 0: unconditional."""

    def __init__(self, config: RunConfig, shape: tuple[int, int, int], classes: int, device: torch.device) -> None:
        self.train, self.seed = config.train, derive_seed(config.seed, "preview")
        self.steps = min(config.train.sample_steps, config.diffusion.timesteps)
        self.shape, self.classes, self.device = shape, classes, device
        self.batch_size = min(config.train.samples, config.train.batch_size)

    def walk(self, denoiser: Denoiser, images: range, steps: int) -> Iterator[Generated]:
        """Denoise the images of these numbers, which may be more than the grid shows; yields every step."""
        labels = [i % self.classes for i in range(images.stop)] if self.classes else None
        way = USUAL[self.train.sampler]._replace(steps=steps)
        return generate(
            denoiser, self.shape, images, seed=self.seed, way=way, device=self.device,
            labels=labels, batch_size=min(len(images), self.batch_size), on_smaller=self._smaller,
        )  # fmt: skip

    def _smaller(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def draw(self, denoiser: Denoiser) -> Generator[Busy, None, Image.Image]:
        """The grid, a class a column where they fit; yields after every step."""
        n = self.train.samples
        pictures = torch.zeros(n, *self.shape, dtype=torch.uint8)
        for done, (images, state) in enumerate(self.walk(denoiser, range(n), self.steps), start=1):
            if state.t == 0:
                pictures[images.start : images.stop] = to_uint8(state.x_t).cpu()
            yield Busy("sampling", done, -(-n // self.batch_size) * self.steps)
        return grid(pictures, columns=self.classes if 1 < self.classes <= n else None)
