"""A loss that can be compared: held-out images, and always the same noise."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor

from ddpmctl.config import MOST_HELD_OUT
from ddpmctl.core.denoiser import Denoiser
from ddpmctl.core.losses import denoising_loss
from ddpmctl.core.noise import derived_generator
from ddpmctl.data.dataset import ImageDataset
from ddpmctl.events import Busy
from ddpmctl.images import from_uint8
from ddpmctl.memory import free_cached, out_of_memory

QUARTERS = 4
DRAWS = 64
"""Noised images a quarter of 1..T."""


class Validated(NamedTuple):
    """The loss on held-out images: its mean over all t, and over each quarter of 1..T, least noise first."""

    loss: float
    quarters: tuple[float, ...]


def hold_out(n: int, share: float) -> tuple[Tensor, Tensor]:
    """Indices (to train on, held out) of ``n`` images, int64 and sorted.

    The choice follows from ``n`` and ``share`` alone, so that runs with different seeds can be compared.
    """
    held = min(int(n * share), MOST_HELD_OUT)
    order = torch.randperm(n, generator=derived_generator("held out"))
    return order[held:].sort().values, order[:held].sort().values


def split(dataset: ImageDataset, share: float) -> tuple[Tensor, Tensor]:
    """:func:`hold_out` of the images in ``dataset``, or as shards have it, of which some may be there that are trained on."""
    if dataset.held is None:
        return hold_out(len(dataset), share)
    trained = torch.ones(len(dataset), dtype=torch.bool)
    trained[dataset.held] = False
    return trained.nonzero().flatten(), dataset.held


class Validation:
    """The loss of a denoiser on the held-out images ``held`` of ``dataset``; ``kind`` is a row of LOSSES.

    Draw k takes image k modulo their number, in an order that mixes classes, a t spread evenly over its quarter, and
    noise that depends on k alone: two networks, or two steps of a run, differ by their weights only.
    """

    def __init__(self, dataset: ImageDataset, held: Tensor, kind: str) -> None:
        self.dataset, self.kind = dataset, kind
        self.held = held[torch.randperm(len(held), generator=derived_generator("validation order"))]

    def __call__(
        self, denoiser: Denoiser, device: torch.device, batch_size: int
    ) -> Generator[Busy, None, Validated]:
        """Yields after every batch; ``batch_size``, halved where memory runs out, changes the last digits only."""
        means = []
        for quarter in range(QUARTERS):
            total, done = 0.0, 0
            while done < DRAWS:
                draws = range(done, min(done + batch_size, DRAWS))
                try:
                    total += self._loss(denoiser, device, quarter, draws) * len(draws)
                    done = draws.stop
                    yield Busy("validating", quarter * DRAWS + done, QUARTERS * DRAWS)
                    continue
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error) or len(draws) == 1:
                        raise
                # Out of the handler, whose error still holds what the failed attempt had in memory.
                batch_size = len(draws) // 2
                free_cached(device.type)
            means.append(total / DRAWS)
        return Validated(sum(means) / QUARTERS, tuple(means))

    @torch.no_grad()
    def _loss(self, denoiser: Denoiser, device: torch.device, quarter: int, draws: range) -> float:
        timesteps = denoiser.schedule.timesteps
        numbers = [quarter * DRAWS + draw for draw in draws]
        chosen = self.held[torch.tensor(numbers) % len(self.held)]
        x0 = from_uint8(self.dataset.images[chosen])
        label = None if self.dataset.labels is None else self.dataset.labels[chosen].to(device)
        # Stratified: draw d of a quarter stands in the middle of its share of 1..T.
        t = torch.tensor([1 + int((number + 0.5) / (QUARTERS * DRAWS) * timesteps) for number in numbers])
        eps = torch.stack(
            [torch.randn(x0.shape[1:], generator=derived_generator("validation", number)) for number in numbers]
        )
        return float(denoising_loss(denoiser, x0.to(device), t, eps.to(device), label, loss=self.kind))
