"""From the data set to the device: worker processes, batches as one buffer each, and what is said of workers that die or hang."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mgd_pipeline.caches.remote import counter, is_url
from mgd_pipeline.errors import LoaderError, MGDError
from mgd_pipeline.training.batches import Batch
from mgd_pipeline.training.dataset import TrainingSet
from mgd_pipeline.training.shared_memory import no_room, shared_memory_shortage

_PREFETCHED = 2
"""Batches that each worker is asked for ahead."""
_WORKER_SECONDS = 300.0
"""A worker that has not delivered its batch by then hangs."""
_HEADER = 64
"""Bytes of a packed batch before its first tensor."""
_FREE, _IN_USE = 0, 1
_DOWNLOAD_SECONDS = 3600.0
"""As `_WORKER_SECONDS` where a worker brings whole shards first; it gives up by itself when a server does not answer."""


def load_batches(
    dataset: TrainingSet, start: int, num_workers: int, seed: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Batches of steps start, start + 1, ... on the device; the number of workers does not change them.

    The workers end when the generator is closed. Raises what the data set raises, and LoaderError for workers that die or hang.
    torch may also raise a RuntimeError for a dead worker at any later moment; see `loader_error`.
    """
    with closing(dataset):
        yield from _loaded(dataset, start, num_workers, seed, device)


def _loaded(dataset: TrainingSet, start: int, num_workers: int, seed: int, device: torch.device) -> Generator[Batch, None, None]:
    if not num_workers and device.type == "cpu":  # nothing travels, so nothing is packed
        yield from map(dataset.__getitem__, range(start, len(dataset)))
        return
    packing = _PackedSet(dataset, reuse=device.type == "cuda")
    remote = any(is_url(path) for path in dataset.caches.values())
    if num_workers and start < len(dataset):
        _check_shared_memory(packing[start], num_workers)
    loader = DataLoader(
        packing,
        batch_size=None,
        sampler=range(start, len(dataset)),
        num_workers=num_workers,
        collate_fn=_unchanged,
        # Its own generator: the loader would otherwise draw from the global one and shift every later dropout mask.
        generator=torch.Generator().manual_seed(seed),
        timeout=(_DOWNLOAD_SECONDS if remote else _WORKER_SECONDS) if num_workers else 0,
        prefetch_factor=_PREFETCHED if num_workers else None,
        worker_init_fn=partial(_begin, dict(os.environ) if remote else {}),
        pin_memory=device.type == "cuda",
        multiprocessing_context=_unforked() if remote and num_workers else None,
    )
    items = iter(loader)
    workers = multiprocessing.active_children()
    try:
        while True:
            try:
                item = next(items, None)
            except (ConnectionError, EOFError) as error:
                # A worker died while it handed a batch over, and torch has not noticed yet. `is_alive` may not have noticed either:
                # a sentinel tells of the end a moment before the process can be waited for.
                ended = wait([worker.sentinel for worker in workers], timeout=5)
                dead = [f"{worker.name} (pid {worker.pid})" for worker in workers if worker.sentinel in ended]
                raise _died(f"{', '.join(dead) or 'one of them'} while it handed a batch over ({error}).") from None
            except RuntimeError as error:
                # Translated here: torch would wait for a worker that hangs.
                if (known := loader_error(error, workers)) is None:
                    raise
                raise known from None
            if item is None:
                return
            if isinstance(item, MGDError | OSError):
                raise item
            yield item.on(device)
    finally:
        # Workers live as long as their iterator, and a kept traceback keeps the iterator. Python would wait for them for ever at
        # its end, because they ignore the signal that it sends. torch has no public name for this.
        if num_workers:
            items._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]


def _unforked() -> BaseContext:
    """Starts workers that have nothing of this process: what carries requests over the network does not survive a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def loader_error(error: RuntimeError, workers: Sequence[BaseProcess] = ()) -> LoaderError | None:
    """A RuntimeError of torch about worker processes as a LoaderError, None for any other; hanging workers are ended."""
    text = str(error)
    if not re.search("DataLoader (worker|timed out)", text):
        return None
    names = ", ".join(f"{process.name} (pid {process.pid})" for process in multiprocessing.active_children())
    if "timed out" not in text:
        signalled = "by a bus error: " if any(worker.exitcode == -signal.SIGBUS for worker in workers) else ""
        return _died(signalled + " ".join(text.split()))
    _end_workers()
    waited = re.search(r"after ([\d.]+) seconds", text)
    seconds = float(waited[1]) if waited else _WORKER_SECONDS
    return LoaderError(
        f"no batch within {seconds:g} s: a process that decodes images hangs, one of {names}; is the disk of the "
        "images reachable? The same command goes on from the last checkpoint"
    )


def _died(what: str) -> LoaderError:
    _end_workers()
    if re.search("bus error|shared memory", what, re.IGNORECASE):
        return LoaderError(f"a process that decodes images found no shared memory: {what} {no_room()}")
    return LoaderError(
        f"a process that decodes images died: {what} Out of memory is the usual reason: fewer --num-workers need less. The same "
        "command goes on from the last checkpoint"
    )


def _end_workers() -> None:
    # torch's handler would raise in between, once for each child that ends.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if threading.current_thread() is threading.main_thread() else None
    for process in multiprocessing.active_children():
        process.kill()
        process.join(5)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)


def _unchanged(item: Any) -> Any:
    return item


def _begin(environment: dict[str, str], worker: int) -> None:
    """Ctrl-C and SIGTERM reach a whole group of processes; the training process decides when its workers end.

    Workers of a fork server have the environment that it began with, which may be older than the keys of a bucket.
    """
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Piece(NamedTuple):
    """Where one tensor lies in a packed batch."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def of(self, buffer: Tensor) -> Tensor:
        return buffer[self.offset : self.end].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class _PackedBatch:
    """A batch in one buffer: one piece of shared memory from a worker, one pinned copy, one transfer to the device."""

    skeleton: Any
    """the batch, with a _Piece for each tensor"""
    buffer: Tensor
    """its first byte says to its worker whether somebody still reads it; see `_Buffers`"""

    def pin_memory(self) -> _PackedBatch:
        pinned = _PackedBatch(self.skeleton, self.buffer.pin_memory())
        self.buffer[0] = _FREE
        return pinned

    def on(self, device: torch.device) -> Batch:
        buffer = self.buffer.to(device, non_blocking=True)
        return _mapped(self.skeleton, _Piece, lambda piece: piece.of(buffer))


class _PackedSet(Dataset["_PackedBatch | MGDError | OSError"]):
    """A training set whose items are packed. Errors with a message for the user are items as well: DataLoader would wrap them, and
    disk errors would lose their number and their file."""

    def __init__(self, dataset: TrainingSet, *, reuse: bool) -> None:
        """`reuse` is for batches that are all pinned: each is read from its copy alone."""
        self.dataset = dataset
        self.buffers = _Buffers() if reuse else None

    def __getitem__(self, step: int) -> _PackedBatch | MGDError | OSError:
        try:
            batch = self.dataset[step]
        except (MGDError, OSError) as error:
            return error
        pieces: dict[int, tuple[Tensor, _Piece]] = {}
        end = _HEADER

        def place(tensor: Tensor) -> _Piece:
            nonlocal end
            # A partner's images may be the very tensors of its first image: they travel once.
            if id(tensor) not in pieces:
                pieces[id(tensor)] = tensor, _Piece(-(-end // 64) * 64, tuple(tensor.shape), tensor.dtype)
                end = pieces[id(tensor)][1].end
            return pieces[id(tensor)][1]

        skeleton = _mapped(batch, Tensor, place)
        try:
            # The training process packs one batch as well, to know its size, and its workers inherit what it keeps.
            buffer = self.buffers.take(end) if self.buffers and get_worker_info() else _buffer(end)
        except (OSError, RuntimeError) as error:
            return LoaderError(f"a batch found no shared memory: {' '.join(str(error).split())}: {no_room()}")
        for tensor, piece in pieces.values():
            piece.of(buffer).copy_(tensor)
        return _PackedBatch(skeleton, buffer)


class _Buffers:
    """Buffers of a worker whose batches are all pinned. A new piece of shared memory costs ten times as much as filling it again.

    A buffer is taken again when the copy of its batch is made, and never while somebody may read it: its first byte, which worker
    and training process share, says so. A batch that is lost on its way keeps its buffer.
    """

    def __init__(self) -> None:
        self._all: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """(size,) uint8, without values but for its first byte."""
        free = [buffer for buffer in self._all if buffer[0] == _FREE]
        fits = next((buffer for buffer in free if len(buffer) >= size), None)
        if fits is None:
            self._all = [buffer for buffer in self._all if buffer[0] != _FREE]  # those that are free are too small
            fits = _buffer(size + size // 8)  # canvases differ from batch to batch
            self._all.append(fits)
        fits[0] = _IN_USE
        return fits[:size]


def _buffer(size: int) -> Tensor:
    """(size,) uint8 without values; in a worker in shared memory.

    It is shared here and not on the way: torch would lose an error in a thread, and the training would wait for ever. It is
    shared from the start, as in torch's own `default_collate`: `share_memory_` would copy the empty buffer, page by page.
    """
    if get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))


def _check_shared_memory(first: _PackedBatch | MGDError | OSError, num_workers: int) -> None:
    """Raises the error of the first batch, or LoaderError if shared memory has no room for all batches under way: the ones that
    workers have ready, and the one in hand."""
    if not isinstance(first, _PackedBatch):
        raise first
    counter.add(*first.skeleton.fetched)  # for this process: nobody trains on this batch
    needed = (_PREFETCHED * num_workers + 1) * first.buffer.numel()
    if (shortage := shared_memory_shortage(needed)) is not None:
        raise LoaderError(f"--num-workers {num_workers}: {shortage}")


def _mapped(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """`value` with everything of a kind replaced, in nested dataclasses, named tuples and dictionaries."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(item, kind, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, kind, function) for item in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _mapped(getattr(value, f.name), kind, function) for f in dataclasses.fields(value)})
    return value
