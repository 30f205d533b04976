"""A run in the processes that do not lead it: they compute their part of each step, and write nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from ddpmctl.build import compiling
from ddpmctl.config import RunConfig
from ddpmctl.data.dataset import ImageDataset, load_images
from ddpmctl.data.names import place_of
from ddpmctl.errors import ConfigError, DataError
from ddpmctl.learner import new_learner
from ddpmctl.measures import new_measures
from ddpmctl.ranks import Ranks, Word
from ddpmctl.stopping import Interrupted
from ddpmctl.training import add_gradients, room_for_moments, train_steps
from ddpmctl.turns import one_each


def check(config: RunConfig, world: int) -> None:
    """Raise :class:`ConfigError` for what ``world`` processes cannot train."""
    if config.train.batch_size < world:
        raise ConfigError(f"train.batch_size {config.train.batch_size}: fewer images than the {world} processes",
                          f"start {config.train.batch_size} processes or fewer, or give a larger --batch-size")  # fmt: skip
    if world > 1 and config.model.norm == "batch":
        raise ConfigError(f"model.norm batch: not with {world} processes, each of which would norm by its own part of the batch",
                          "use one process, or the default, group")  # fmt: skip


def in_turn(ranks: Ranks, load: Callable[[], ImageDataset], loaded: ImageDataset | None = None) -> ImageDataset:
    """The images, for all processes: first one on each machine reads them, so that the others find them in the cache.

    ``loaded``: by the process that leads, which was the first of all. To be called in all of them.
    """
    first = ranks.started.local_rank == 0
    for turn in (True, False):
        if loaded is None and turn == first:
            loaded = load()
        ranks.wait()
    assert loaded is not None
    return loaded


def follow(ranks: Ranks, devices: Sequence[str], asked: Callable[[], int]) -> None:
    """Take part in a run until the process that leads ends it. ``asked``: the number of a signal to stop, 0 for none.

    Raises as :func:`load_images` does, and :class:`DataError` where its images are others than those of process 0.
    """
    device = ranks.device(ranks.share(), devices)
    shared: tuple[RunConfig, str] = ranks.share()
    config, fingerprint = shared
    path = place_of(str(config.data.path))
    dataset = in_turn(ranks, lambda: load_images(config.data, path))
    if dataset.fingerprint != fingerprint:
        raise DataError(f"{path}: not the images that process 0 has", "give all machines the same, such as one shared folder")
    learner = new_learner(config, dataset, device)
    state, denoiser, batches, _, _ = learner
    works = new_measures(config, dataset, learner, device, ranks).works()
    steps, begun = train_steps(state, denoiser, batches, config, ranks), False

    def hear() -> int:
        ranks.asked = asked()
        return ranks.asked

    with ExitStack() as training:
        training.callback(batches.close)
        batches.asked = hear
        while True:
            word, parts = ranks.listen()
            if word == Word.END:
                return
            if word == Word.LOAD:
                state.load_state_dict(ranks.share())
                continue
            if word in works:
                one_each(ranks, works[word])
                continue
            hear()
            state.parts = parts
            # Whoever met it: the process that leads says so, once it has saved, which this one waits for.
            with suppress(DataError, Interrupted):
                if word == Word.STEP:
                    if not begun:  # as in the process that leads, the trial before is not compiled
                        begun = training.enter_context(compiling(state.net, config.train.compile)) is None
                    next(steps)
                else:
                    room = room_for_moments(state)
                    add_gradients(state, denoiser, batches, config, [buffer.clone() for buffer in state.buffers], ranks)
                    state.optimizer.zero_grad(set_to_none=True)
                    del room
