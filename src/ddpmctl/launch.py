"""From what was asked for to a run that is ready to train: settings, folder, images, and the checkpoint to go on from.

``ddpmctl train`` and :func:`ddpmctl.train` both begin here.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddpmctl.boards import Boards, check_boards
from ddpmctl.build import precision_name, resolve_precision
from ddpmctl.config import RunConfig
from ddpmctl.data.dataset import ImageDataset, load_images
from ddpmctl.data.named import whole
from ddpmctl.data.names import name_of_shards, place_of, read_name
from ddpmctl.data.report import Progress
from ddpmctl.errors import CheckpointError, ConfigError, DataError, OutputError
from ddpmctl.files import check_place
from ddpmctl.following import check, in_turn
from ddpmctl.initial import check_classes, check_resumable, digest_of, named_in, refuse_checkpoint, settings
from ddpmctl.interop.imported import Loaded
from ddpmctl.preflight import preflight
from ddpmctl.ranks import ALONE, Ranks
from ddpmctl.resume import check_changes
from ddpmctl.rules import check_size
from ddpmctl.run import Event, Run
from ddpmctl.runfile import Layer, read_run_file, resolve
from ddpmctl.runfolder import RunFolder, checkpoint_in
from ddpmctl.sampling import config_of
from ddpmctl.stopping import Interrupted

_SECTIONS = {"data", "diffusion", "model", "train"}


@dataclass(frozen=True)
class Order:
    """What was asked for. ``layers``: the settings that were given, those that count least first.

    ``data``: images, or with ``resume`` a run folder. ``out``: the run folder; None: that one, or runs/ and the name of
    the images. ``force``: resume though what is learned has changed. ``overwrite``: replace a run that is there.
    """

    data: Path | None
    out: Path | None
    layers: list[Layer]
    resume: bool = False
    force: bool = False
    overwrite: bool = False

    @classmethod
    def of(cls, data: Path | None, out: Path | None, config: Path | None, given: Layer, **switches: bool) -> Order:
        """With the settings of the run file ``config``, of ``data`` and of ``given``, which count most."""
        layers = [read_run_file(config)] if config else []
        if data is not None and not RunFolder(data).is_run():
            layers.append(Layer({"data.path": str(data)}, {"data.path": "DATA"}))
        return cls(data, out, [*layers, given], **switches)

    def after(self, begun: bool) -> Order:
        """What it means once torchrun has started the job again: to go on with the run that it has ``begun``, if it has."""
        return replace(self, resume=True, overwrite=False) if begun and _folder(self).is_run() else self


@dataclass(frozen=True)
class Voice:
    """Who is told what comes up on the way: lines to know, warnings, and how far the reading of images is."""

    note: Callable[[str], object] = lambda text: None
    warn: Callable[[str], None] = lambda text: None
    reading: Callable[[], AbstractContextManager[Progress | None]] = nullcontext


@contextmanager
def launched(
    order: Order, voice: Voice, *, dry: bool = False, ranks: Ranks = ALONE, devices: Sequence[str] = ()
) -> Iterator[Run]:
    """The run, built and checked, nothing written yet; its folder is let go at the end.

    ``dry``: it is not going to train, so that another process may have the folder. ``ranks``: all that train, while this one
    leads and the others :func:`ddpmctl.following.follow`; ``devices``: theirs on this machine, where they are named. Raises the :class:`DdpmctlError` of
    whatever is wrong.
    """
    folder = _folder(order)
    try:
        if folder.is_run() and not dry:
            folder.lock()  # before anything is read that another process may be changing
        config, content, first = _settle(folder, order, voice)
        check_boards(config.train.log)
        run = _prepare(config, folder, content, first, order, voice, ranks, devices)
        with closing(run.batches):
            run.hand_over()
            yield run
    finally:
        folder.unlock()


def begin(run: Run, order: Order, voice: Voice) -> None:
    """The last thing before training: does it fit into memory, is the place free; then the run folder is made."""
    run.folder.lock()
    try:
        for notice in preflight(run):
            voice.warn(notice.text)
    except Interrupted as error:  # another process of the job was told to stop
        raise KeyboardInterrupt from error
    if not order.resume:  # once more, for another process may have begun a run here meanwhile
        _check_free(run.folder, overwrite=order.overwrite)
        if run.folder.exists():
            run.folder.clear()
    run.begin()


def trained(run: Run, reason: Callable[[], str | None]) -> Iterator[Event]:
    """Train to the end, or until there is a ``reason`` to stop, asked after each event; then the step is saved.

    It is asked, too, while images are waited for that are slow to come. The boards of ``train.log`` hear of each event first. Where images
    cannot be read any more, the step is saved before :class:`DataError` says so.
    """
    boards = Boards(run)
    run.batches.asked = reason
    try:
        yield from boards.start()
        for event in run.train():
            yield from boards.take(event)
            yield event
            if reason():
                yield from run.stop()
                return
    except Interrupted:
        yield from run.stop()
    except DataError:
        yield from run.stop()
        raise
    finally:
        boards.close()


def _folder(order: Order) -> RunFolder:
    """Where the run is or will be: what was named, a run folder given as DATA, or runs/ and the name of the images."""
    data, out = order.data, order.out
    is_run = data is not None and RunFolder(data).is_run()
    if is_run and not order.resume:
        raise ConfigError(f"{data}: a run folder, not a folder of images", "add --resume to go on with it")
    if out is None:
        path = next((layer.values["data.path"] for layer in reversed(order.layers) if layer.values.get("data.path")), None)
        out = data if is_run else Path("runs") / _name_of(place_of(str(path))) if path else None
    if out is None:
        raise ConfigError("no DATA: nothing to train on", "name a folder or .zip of images, or set data.path")
    folder = RunFolder(out)
    if order.resume and data is not None and not folder.is_run():
        refuse_checkpoint(data)
    if order.resume and not folder.is_run():
        raise CheckpointError(
            f"{out}: nothing to resume, no run.yaml there", "leave --resume out, or name the run with --out"
        )
    check_place(out)
    return folder


def _settle(
    folder: RunFolder, order: Order, voice: Voice
) -> tuple[RunConfig, tuple[Path, dict[str, Any]] | None, tuple[Path, Loaded] | None]:
    """Which settings, which checkpoint to go on from, and which to start with. Reads, but writes nothing."""
    content, layers = None, order.layers
    if order.resume:
        content = folder.newest_good(voice.warn)
        if content is None and folder.checkpoint_files():
            raise CheckpointError(
                f"{folder.path}: none of its checkpoints can be read", "bring one back, or start again with --overwrite"
            )
        if content is not None:
            check_resumable(content[1], content[0])
        layers = [read_run_file(folder.run_file), *layers]
    first = None if content else named_in(layers)
    if first and Path(os.path.realpath(first[0])).is_relative_to(os.path.realpath(folder.path)):
        raise ConfigError(f"--init-from {first[0]}: lies in {folder.path}, where the new run is to be", "give another --out")
    config = settings(first[1], first[0], layers) if first else resolve(*layers)
    if order.resume and content is None:
        if folder.has_saved():
            raise CheckpointError(
                f"{folder.path}: its checkpoints are gone", "bring one back, or start again with --overwrite"
            )
        voice.warn(f"{folder.path}: no checkpoint yet, so it starts from step 0")
    if config.data.path is None:
        raise ConfigError("no DATA: nothing to train on", "name a folder or .zip of images, or set data.path")
    config = _pinned(config, first)
    if not order.resume:
        _check_free(folder, overwrite=order.overwrite)
    if config.data.size != "auto":
        check_size(config, config.data.size)
    return config, content, first


def _pinned(config: RunConfig, first: tuple[Path, Loaded] | None) -> RunConfig:
    """With whole paths, so that a run can be taken up from anywhere."""
    assert config.data.path is not None
    data = config.data.model_copy(update={"path": str(whole(place_of(config.data.path)))})
    train = config.train
    if train.init_from:
        # The very file, so that a run folder which trains on is not taken for what it was.
        start = checkpoint_in(Path(train.init_from)) if first else Path(train.init_from)
        digest = {"init_digest": digest_of(first[1])} if first else {}
        train = train.model_copy(update={"init_from": str(start.absolute()), **digest})
    return config.model_copy(update={"data": data, "train": train})


def _check_free(folder: RunFolder, *, overwrite: bool) -> None:
    """Raise OutputError where a new run would replace something that it was not told to replace."""
    if not folder.exists():
        return
    # Another program's run.yaml says that the rest is not ours either.
    if overwrite and folder.is_run() and {key.partition(".")[0] for key in read_run_file(folder.run_file).values} >= _SECTIONS:
        return
    if overwrite:
        raise OutputError(f"{folder.path}: exists and is no run folder of ddpmctl", "give another --out")
    raise OutputError(
        f"{folder.path}: exists", "add --resume to go on, --overwrite to replace a run, or give another --out"
    )


def _name_of(data: Path) -> str:
    """Name of a run that trains on ``data``: the folder's, the data set's, or the zip's without its ending."""
    if found := read_name(whole(data)):
        return name_of_shards(found.name) if found.kind == "shards" else Path(found.name).name
    full = Path(os.path.realpath(data))  # not resolve(), which fails on a link to itself
    return (full.name if full.is_dir() else full.stem) or "run"


def _prepare(
    config: RunConfig, folder: RunFolder, content: tuple[Path, dict[str, Any]] | None, first: tuple[Path, Loaded] | None,
    order: Order, voice: Voice, ranks: Ranks, devices: Sequence[str],
) -> Run:  # fmt: skip
    """Load the images, build the run, and take over the checkpoint to go on from or to start with."""
    check(config, ranks.world)
    device = ranks.device(ranks.share(config.device), devices)
    # Pinned, so that a resumed run computes as it began.
    precision = precision_name(resolve_precision(config.precision, device))
    dataset = _load(config, folder if order.resume else None, voice)
    found = {"size": dataset.size, "channels": dataset.channels}
    config = config.model_copy(update={"precision": precision, "data": config.data.model_copy(update=found)})
    check_size(config, dataset.size)
    ranks.share((config, dataset.fingerprint))
    in_turn(ranks, lambda: dataset, dataset)
    if content is None:
        run = Run(config, dataset, folder, ranks=ranks, device=device)
        if first:
            _start_with(run, *first, voice)
        return run
    path, saved = content
    changed = check_changes(config_of(saved, path), config, force=order.force)
    for key, before, after in changed:
        voice.note(f"changed: {key}: {before} -> {after}")
    if saved["data"]["fingerprint"] != dataset.fingerprint and not order.force:
        raise ConfigError(f"{config.data.path}: not the images that this run was trained on",
                          "bring them back, start a new run with another --out, or add --force")  # fmt: skip
    run = Run(config, dataset, folder, ranks=ranks, device=device)
    run.restore(saved, path)
    if any(key == "train.lr" for key, *_ in changed):
        run.state.pardoned = run.state.rollbacks  # the user has seen to it: it is this learning rate that is meant
    return run


def _start_with(run: Run, path: Path, loaded: Loaded, voice: Voice) -> None:
    warning = check_classes(loaded, path, run.class_names)
    run.start_with(loaded.content, path)
    for text in (*loaded.notes, f"starts with the weights of {path} ({loaded.format})"):
        voice.note(text)
    if warning:
        voice.warn(warning)


def _load(config: RunConfig, resumed: RunFolder | None, voice: Voice) -> ImageDataset:
    assert config.data.path is not None
    path = place_of(config.data.path)
    try:
        with voice.reading() as progress:
            return load_images(config.data, path, progress=progress)
    except DataError as error:
        if resumed is None or path.exists() or read_name(path):
            raise
        again = shlex.join(["ddpmctl", "train", "NEW-PLACE", "--resume", "--out", str(resumed.path)])
        raise DataError(error.problem, f"if the images have moved: {again}") from error
