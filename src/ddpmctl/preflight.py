"""Before training proper: does a step fit into memory, and a grid of samples?"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ddpmctl.build import precision_name, times_slower
from ddpmctl.core.losses import denoising_loss
from ddpmctl.events import Notice
from ddpmctl.memory import available_bytes, peak_bytes
from ddpmctl.ranks import Word
from ddpmctl.run import Run
from ddpmctl.training import add_gradients, restore, room_for_moments

_SMALL, _LARGE = 2, 4
"""Images of the two trials from which the need of a whole batch is reckoned."""

_SLOW = 3.0
"""Below that a network may still gain what its products lose, for its numbers take half the memory."""

_MARGIN = 0.9
"""Share of the free memory that a step may take."""


def preflight(run: Run) -> Iterator[Notice]:
    """Try the first step and the first sample, and leave the run as it was.

    Where a GPU runs out of memory, the batch is cut into more parts. Main memory is reckoned first: the system would not
    say that there is too little of it, but end the process. Raises the device's own error when one image is too much.
    """
    buffers = [buffer.clone() for buffer in run.state.buffers]
    slower = times_slower(run.autocast, run.device)
    if slower > _SLOW:
        name = precision_name(run.autocast)
        yield Notice(f"precision {name}: this processor takes {slower:.0f} times as long in it as in float32: --precision fp32 is faster")
    if run.device.type == "cpu":
        yield from _fit_main_memory(run)
    parts, at_once = run.state.parts, run.grid.batch_size
    moments = room_for_moments(run.state)
    run.ranks.tell(Word.TRY, parts)
    add_gradients(run.state, run.denoiser, run.batches, run.config, buffers, run.ranks)
    next(iter(run.grid.walk(run.average, run.config.train.samples, run.grid.steps)))
    del moments
    run.state.optimizer.zero_grad(set_to_none=True)
    restore(run.state.buffers, buffers)
    if run.state.parts != parts:
        yield from run.keep_parts("out of memory")
    if run.grid.batch_size != at_once:
        yield Notice(f"out of memory: sample grids are drawn with {run.grid.batch_size} images at once")


def _fit_main_memory(run: Run) -> Iterator[Notice]:
    """More parts where two small trials say that a batch would take more main memory than there is."""
    batch, free = run.ranks.most(run.config.train.batch_size), available_bytes()
    micro = -(-batch // run.state.parts)
    if free is None or micro <= _LARGE:
        return
    free //= run.ranks.started.local_world
    _pass(run, _SMALL)  # gradients and libraries take their room at the first
    small, large = (peak_bytes(lambda n=n: _pass(run, n)) for n in (_SMALL, _LARGE))  # type: ignore[misc]
    if not small or not large or large <= small:
        return  # too little to be seen, or not to be measured here
    each = (large - small) / (_LARGE - _SMALL)
    weights = sum(p.numel() * p.element_size() for p in run.state.net.parameters())
    room = _MARGIN * free - (0 if run.state.optimizer.state else 2 * weights) - small
    fits = max(1, _SMALL + int(room / each))
    if fits < micro:
        run.state.parts = -(-batch // fits)
        need = small + each * (micro - _SMALL)
        yield from run.keep_parts(f"{micro} images at once would take {need / 2**30:.1f} GiB of {free / 2**30:.1f} free")


def _pass(run: Run, n: int) -> None:
    """Forwards and backwards with ``n`` images; gradients stay allocated."""
    x0 = torch.zeros(n, *run.image_shape)
    label = torch.zeros(n, dtype=torch.int64) if run.class_names else None
    t = torch.ones(n, dtype=torch.int64)
    denoising_loss(run.denoiser, x0, t, torch.randn_like(x0), label, loss=run.config.diffusion.loss).backward()  # type: ignore[no-untyped-call]
