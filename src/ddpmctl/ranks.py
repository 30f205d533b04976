"""The processes of one job, on one machine or several: which one this is, and how they work as one.

One process leads, that of rank 0: it reads the settings, prints, saves, and says what is done next. The others follow.
A process that is alone leads, and nothing here costs it anything.
"""

from __future__ import annotations

import io
import os
import pickle
import platform
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ddpmctl.build import resolve_device
from ddpmctl.errors import ConfigError, DeviceError, RanksError
from ddpmctl.memory import out_of_memory
from ddpmctl.started import Started

PATIENCE = timedelta(days=7)
"""How long the others wait while the one that leads decodes images, draws grids or saves. One that has died is noticed at once."""

TIMEOUT = timedelta(minutes=30)
"""How long all wait for one that does not come to where they meet within a step, though it is alive."""

_BUCKET = 2**25
"""Bytes of gradients that are added up at a time, as much as PyTorch's DDP takes."""

T = TypeVar("T")


class Word(IntEnum):
    """What is done next, all together."""

    END = 0
    STEP = 1
    TRY = 2
    LOAD = 3
    SAMPLES = 4
    FEATURES = 5
    LOSSES = 6
    BITS = 7


class Ranks:
    """This process among ``started.world``. Raises :class:`RanksError` wherever another one has gone.

    What is said between processes goes over gloo, which notices at once when one ends; gradients go over NCCL on GPUs.
    """

    def __init__(self, started: Started = Started(), store: Any = None, job: Any = None) -> None:
        self.started, self._store, self._job = started, store, job
        self.rank, self.world = started.rank, started.world
        self.asked = 0
        """The signal by which this process was asked to stop, or 0."""
        self._patient: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if self.world > 1 else None
        self._gradients: Any = None
        # What has started them: without it nobody could stop them.
        self._parent = os.getppid() if started.watched else None

    def note(self, what: str) -> None:
        """Keep in mind ``what`` this job has done, for when torchrun starts it again."""
        if self._job is not None:
            self._job.set(f"ddpmctl/noted/{what}", "")

    def noted(self, what: str) -> bool:
        """Whether this job has noted ``what``, before it was started again."""
        return self._job is not None and bool(self._job.check([f"ddpmctl/noted/{what}"]))

    @property
    def leads(self) -> bool:
        """Whether this one reads, prints and writes."""
        return self.rank == 0

    def name(self) -> str:
        """This process, in words."""
        return f"process {self.rank} of {self.world} on {platform.node()}"

    def device(self, name: str, devices: Sequence[str] = ()) -> torch.device:
        """The device of this process: of ``devices``, one for each on this machine, or a GPU each for ``auto`` and ``cuda``.

        With several processes call it in all of them, once. Raises :class:`DeviceError` and :class:`ConfigError` where
        they cannot have one each, or not all of a kind.
        """
        if self.world == 1:
            return resolve_device(devices[0] if devices else name)
        device = self._own_device(name, devices)
        kind = self.share(device.type)
        if device.type != kind:
            raise DeviceError(f"device {device}, where process 0 has {kind}", "give --device cpu, or GPUs to all")
        if kind == "cuda":
            torch.cuda.set_device(device)
        with self._others():
            self._gradients = dist.new_group(backend="nccl" if kind == "cuda" else "gloo", timeout=TIMEOUT)
        return device

    def _own_device(self, name: str, devices: Sequence[str]) -> torch.device:
        local, here = self.started.local_rank, self.started.local_world
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if devices:
            if len(devices) != here:
                raise ConfigError(f"--devices names {len(devices)}, and there are {here} processes on this machine",
                                  "name one for each, or leave --devices out")  # fmt: skip
            return resolve_device(devices[local])
        if name == "cpu" or (name == "auto" and not gpus):
            return torch.device("cpu")
        if name not in ("auto", "cuda"):
            raise ConfigError(f"device {name}: one device, and there are {self.world} processes",
                              "give --device auto, cuda or cpu; --devices 0,1 names one for each")  # fmt: skip
        if here > gpus == 1 and os.environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0:
            return torch.device("cuda", 0)  # each process is shown one of its own, as srun --gpus-per-task does
        if here > gpus:
            raise DeviceError(f"{here} processes on this machine, and {gpus} GPUs",
                              f"start {gpus} (torchrun --nproc-per-node {gpus}), or give --device cpu" if gpus
                              else "give --device cpu")  # fmt: skip
        return torch.device("cuda", local)

    def part(self, n: int) -> slice:
        """The share of ``n`` things that is this one's: as even as can be, without overlap."""
        each, more = divmod(n, self.world)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def most(self, n: int) -> int:
        """The largest share of ``n`` things."""
        return -(-n // self.world)

    def own(self) -> tuple[int, ...]:
        """What draws that are not of the whole batch follow from, beside the seed: nothing for the one that leads."""
        return (self.rank,) if self.rank else ()

    def tell(self, word: Word, parts: int = 0) -> None:
        """Say what is done next, and in how many ``parts`` a batch goes; by the one that leads, to :meth:`listen`."""
        if self.world > 1:
            self._broadcast(torch.tensor([word, parts]))

    def end(self) -> None:
        """Say that all is done."""
        self.tell(Word.END)

    def listen(self) -> tuple[Word, int]:
        """What is done next, however long that takes to come."""
        word, parts = self._broadcast(torch.zeros(2, dtype=torch.int64)).tolist()
        return Word(word), parts

    def agree(self, flag: bool, news: T | None = None) -> tuple[bool, list[T]]:
        """Whether ``flag`` is true in any process, and the ``news`` of those that have some, by rank.

        Along the way all learn whether one was :attr:`asked` to stop. News themselves go round only where there are some.
        """
        if self.world == 1:
            return flag, [] if news is None else [news]
        if self._parent not in (None, os.getppid()):
            self.asked = self.asked or signal.Signals["SIGHUP"].value
        flags = torch.tensor([int(flag), int(news is not None), self.asked])
        told: list[T | None] = [None] * self.world
        with self._others():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            found, some, self.asked = flags.tolist()
            if some:
                dist.all_gather_object(told, news)
        return bool(found), [one for one in told if one is not None]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Put into each of ``tensors``, all of one dtype, the sum over the processes."""
        if self.world == 1:
            return
        under_way = []
        with self._others():
            for bucket in _buckets(tensors):
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                under_way.append((bucket, flat, dist.all_reduce(flat, group=self._gradients, async_op=True)))
            for bucket, flat, work in under_way:
                work.wait()
                pieces = torch.split(flat, [tensor.numel() for tensor in bucket])
                torch._foreach_copy_(bucket, [piece.view_as(own) for piece, own in zip(pieces, bucket, strict=True)])

    def share(self, value: T | None = None) -> T:
        """The ``value`` of the one that leads, in all; tensors in it are handed over one by one, and come on the CPU."""
        if self.world == 1:
            return value  # type: ignore[return-value]
        if self.leads:
            pickler = _Pickler(io.BytesIO())
            pickler.dump(value)
            self._objects(pickler.file.getvalue())
            for tensor in pickler.tensors:
                self._broadcast(_bytes_of(tensor))
            return value  # type: ignore[return-value]
        received: T = _Unpickler(io.BytesIO(self._objects(None)), self._broadcast).load()
        return received

    def _objects(self, content: bytes | None) -> bytes:
        box: list[Any] = [content]
        with self._others():
            dist.broadcast_object_list(box, src=0, group=self._patient)
        return bytes(box[0])

    def wait(self) -> None:
        """Until all are here, however long that takes."""
        if self.world > 1:
            with self._others():
                dist.all_reduce(torch.zeros(1), group=self._patient)

    def send(self, tensor: Tensor) -> None:
        """Hand a tensor on the CPU to the one that leads, which has to :meth:`receive` one of that shape and dtype."""
        with self._others():
            dist.send(_bytes_of(tensor), 0, group=self._patient)

    def receive(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What process ``rank`` sends next."""
        tensor = torch.empty(tuple(shape), dtype=dtype)
        with self._others():
            dist.recv(_bytes_of(tensor), rank, group=self._patient)
        return tensor

    def speaks(self) -> bool:
        """Whether this process is the first to say why the job ends: when one has, the others need not."""
        try:
            return self._store is None or self._store.add("spoken", 1) == 1
        except RuntimeError:  # gone with process 0, where that kept it
            return self.rank == 1

    def _broadcast(self, tensor: Tensor) -> Tensor:
        with self._others():
            dist.broadcast(tensor, 0, group=self._patient)
        return tensor

    @contextmanager
    def _others(self) -> Iterator[None]:
        """Within it an error of the network is that another process is gone."""
        try:
            yield
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            reason = " ".join(str(error).split())
            late = "imed out" in reason
            raise RanksError(
                f"another process of this job {f'did not answer for {TIMEOUT.seconds // 60} minutes' if late else 'has ended'}",
                "see what it or its machine says above; go on with --resume, which torchrun --max-restarts does by itself",
            ) from error


ALONE = Ranks()
"""The only process there is."""


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors, in order, some of them at a time."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size >= _BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor on the CPU, which it shares: those any dtype has."""
    return tensor.reshape(-1).view(torch.uint8)


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and remembers them in their order."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.file, self.tensors = file, list[Tensor]()

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value.detach().cpu().contiguous())
        return tuple(value.shape), value.dtype


class _Unpickler(pickle.Unpickler):
    """Asks for each tensor where it belongs."""

    def __init__(self, file: io.BytesIO, ask: Callable[[Tensor], object]) -> None:
        super().__init__(file)
        self._ask = ask

    def persistent_load(self, about: Any) -> Tensor:
        shape, dtype = about
        tensor = torch.empty(shape, dtype=dtype)
        self._ask(_bytes_of(tensor))
        return tensor
