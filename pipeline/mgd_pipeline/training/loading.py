"""Drawing, reading and loading batches for training; what a batch is stands in `batches`.

A step's batch is a pure function of (seed, step): the loader keeps no state, so workers, ranks, resuming and skipping change
nothing.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import re
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mgd_pipeline.caches.format import ImageKey, mirrored_key
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.data.decoded import decoded
from mgd_pipeline.data.images import check_unchanged, read_image, read_mask
from mgd_pipeline.data.manifest import ImageRow, Manifest
from mgd_pipeline.errors import DataError, LoaderError, MGDError
from mgd_pipeline.params import CutMixParams, OptimisationParams, ViewsParams
from mgd_pipeline.training.batches import Batch, ReadTargets, Source, make_source, placed_targets, with_views
from mgd_pipeline.training.optimisation import draw_jitter
from mgd_pipeline.training.shared_memory import free_shared_memory, shared_memory_shortage
from mgd_pipeline.views import ViewParams, draw_cutmix, draw_view

_MEMO_BYTES = 512 * 2**20
_PREFETCHED = 2
"""Batches that each worker is asked for ahead."""
_WORKER_SECONDS = 300.0
"""A worker that has not delivered its batch by then hangs."""
_STREAMS = {"labelled": 1, "unlabelled": 2, "partner": 3, "cutmix": 4, "jitter": 5}


@dataclass
class TrainingSet(Dataset[Batch]):
    """Item t is the batch of step t. `caches` maps teachers to stores; without any, batches carry no targets.

    Of several ranks, each gets every `ranks`-th image of the same batch, from its own number on.
    """

    manifest: Manifest
    base: Path
    views: ViewsParams
    cutmix: CutMixParams
    optimisation: OptimisationParams
    seed: int
    caches: Mapping[str, Path] = field(default_factory=dict)
    with_unlabelled: bool = True
    expected: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    rank: int = 0
    ranks: int = 1
    image_cache: Path | None = None
    """A folder on this machine for decoded images, see `image_cache.decoded`."""

    def __post_init__(self) -> None:
        if not self.manifest.labelled:
            raise DataError("the partition has no labelled image; run `mgd-pipeline prepare-data` with a larger fraction")
        self._open: dict[str, TargetCache] = {}
        self._memo: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        self._memo_bytes = 0
        self._unchanged: set[str] = set()
        self._permutations: dict[str, tuple[int, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Workers open their own files and keep their own memo.
        return {**self.__dict__, "_open": {}, "_memo": {}, "_memo_bytes": 0, "_unchanged": set()}

    def __len__(self) -> int:
        return self.optimisation.steps

    def open_caches(self) -> dict[str, TargetCache]:
        """Opens and checks every store, and that each holds each training image as it is now."""
        for name, path in self.caches.items():
            if name not in self._open:
                self._open[name] = open_cache(path, self.expected.get(name))
        return self._open

    def check_rows(self) -> None:
        """Raises CacheIncomplete or StaleTarget for the first training image that a store lacks or has otherwise."""
        for cache in self.open_caches().values():
            for row in self.manifest.training:
                key = ImageKey(row.image_id, row.image_sha256)
                cache.row(key)
                if _mirrored(cache):
                    cache.row(mirrored_key(key))

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(step)
        labelled_batch, unlabelled_batch = self.optimisation.labelled_batch, self.optimisation.unlabelled_batch
        if not self.with_unlabelled:
            # The same number of images a step as with unlabelled ones, so that both students cost the same.
            return Batch(step, self._source("labelled", step, labelled_batch + unlabelled_batch))
        labelled = self._source("labelled", step, labelled_batch)
        unlabelled = self._source("unlabelled", step, unlabelled_batch)
        if self.cutmix.boxes == 0:
            return Batch(step, labelled, unlabelled)
        partner = self._source("partner", step, unlabelled_batch, same=unlabelled)
        rng = self._rng("cutmix", step)
        low, high = self.cutmix.area
        masks = [draw_cutmix(rng, *self.views.crop, boxes=self.cutmix.boxes, area=(low, high)) for _ in range(unlabelled_batch)]
        return Batch(step, labelled, unlabelled, partner, torch.from_numpy(np.stack(self._mine(masks))))

    def _mine(self, batch: list[Any]) -> list[Any]:
        return batch[self.rank :: self.ranks]

    def _rng(self, stream: str, *position: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, _STREAMS[stream], *position])

    def _order(self, stream: str, start: int, count: int, rows: list[ImageRow]) -> list[ImageRow]:
        """Rows start .. start + count of the endless sequence of shuffled epochs."""
        chosen = []
        for position in range(start, start + count):
            epoch, place = divmod(position, len(rows))
            if self._permutations.get(stream, (None,))[0] != epoch:
                self._permutations[stream] = epoch, self._rng(stream, epoch).permutation(len(rows))
            chosen.append(rows[self._permutations[stream][1][place]])
        return chosen

    def _source(self, stream: str, step: int, batch: int, same: Source | None = None) -> Source:
        rng = self._rng(stream, step, 1)
        crop = (self.views.crop[0], self.views.crop[1])
        jitter = draw_jitter(int(self._rng("jitter", _STREAMS[stream], step).integers(2**62)), batch)[self.rank :: self.ranks]
        reuse = same is not None and self.cutmix.partner != "other"
        listed = self.manifest.labelled if stream == "labelled" else self.manifest.for_consistency
        ordered = self._order("unlabelled" if reuse else stream, step * batch, batch, listed)
        # Every rank draws for the whole batch, so that an image's view does not depend on the number of ranks.
        views = self._mine([draw_view(rng, self.manifest.size(row), crop, self.views.scales, self.views.flip) for row in ordered])
        rows = self._mine(ordered)
        if reuse:
            assert same is not None
            # Whether a view is mirrored decides which row of such a store is its.
            others = {name: cache for name, cache in self.open_caches().items() if _mirrored(cache)}
            read = placed_targets(rows, views, self._targets(rows, views, others))
            return with_views(dataclasses.replace(same, targets={**same.targets, **read}), views, jitter)
        # By its subset, not by the stream: an image that is in both streams is kept with its mask.
        whole = [self._decoded(row, self.manifest.subsets[row.image_id] == "labelled") for row in rows]
        height, width = (max(image.shape[axis] for image, _ in whole) for axis in (1, 2))
        images = np.zeros((len(rows), 3, height, width), np.uint8)
        labels = np.full((len(rows), height, width), 255, np.uint8) if stream == "labelled" else None
        for i, (image, mask) in enumerate(whole):
            images[i, :, : image.shape[1], : image.shape[2]] = image
            if labels is not None and mask is not None:
                labels[i, : mask.shape[0], : mask.shape[1]] = mask
        targets = self._targets(rows, views, self.open_caches())
        return make_source(
            rows, views, torch.from_numpy(images), None if labels is None else torch.from_numpy(labels), targets, jitter
        )

    def _targets(self, rows: list[ImageRow], views: list[ViewParams], caches: Mapping[str, TargetCache]) -> dict[str, ReadTargets]:
        keys = [ImageKey(row.image_id, row.image_sha256) for row in rows]
        seen = [mirrored_key(key) if view.flip else key for key, view in zip(keys, views, strict=True)]
        found = {}
        for name, cache in caches.items():
            mirrored = _mirrored(cache)
            read = cache.read([cache.row(key) for key in (seen if mirrored else keys)])
            found[name] = ReadTargets(read, cache.layout, mirrored)
        return found

    def _decoded(self, row: ImageRow, labelled: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Image (3, H, W) and mask (H, W) at the working size, kept in memory up to a bound: small sets are decoded only once."""
        if row.image_id in self._memo:
            return self._memo[row.image_id]
        image = self._kept(("planes", row.image_sha256, self.manifest.long_side), lambda: self._read_image(row))
        mask = None
        if labelled:
            size = (image.shape[1], image.shape[2])
            lookup = np.asarray(self.manifest.lookup)
            mask = self._kept((row.mask_sha256, lookup.tolist(), size), lambda: self._read_mask(row, lookup, size))
        bytes_ = image.nbytes + (0 if mask is None else mask.nbytes)
        worker = get_worker_info()
        if self._memo_bytes + bytes_ <= _MEMO_BYTES // (worker.num_workers if worker else 1):
            self._memo[row.image_id] = image, mask
            self._memo_bytes += bytes_
        return image, mask

    def _kept(self, parts: tuple[object, ...], decode: Callable[[], np.ndarray]) -> np.ndarray:
        return decode() if self.image_cache is None else decoded(self.image_cache, parts, decode)

    def _read_image(self, row: ImageRow) -> np.ndarray:
        # Stored targets belong to the image's bytes, so these are checked when a process reads them for the first time.
        image = read_image(self._checked(row.image_path, row.image_sha256), self.manifest.long_side)
        # Turned into planes here, once: a strided copy into each batch would take 25 times as long as a plain one.
        return np.ascontiguousarray(image.transpose(2, 0, 1))

    def _read_mask(self, row: ImageRow, lookup: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        if row.mask_path is None or row.mask_sha256 is None:
            raise DataError(f"{row.image_path}: labelled, but the manifest names no mask")
        return read_mask(self._checked(row.mask_path, row.mask_sha256), lookup, size)

    def _checked(self, name: str, sha256: str) -> Path:
        path = self.base / self.manifest.root / name
        if name not in self._unchanged:
            check_unchanged(path, sha256)
            self._unchanged.add(name)
        return path


def _mirrored(cache: TargetCache) -> bool:
    """Whether a store has rows of mirror images, too."""
    return bool(cache.provenance.get("preprocessing", {}).get("mirrored"))


# --- from the loader to the device ------------------------------------------------------------------------------------


def load_batches(
    dataset: TrainingSet, start: int, num_workers: int, seed: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Batches of steps start, start + 1, ... on the device; the same for any number of workers, which end when it is closed.

    Raises what the data set raises. Of a worker that died torch tells at any moment by a RuntimeError; see `loader_error`.
    """
    if not num_workers and device.type == "cpu":  # nothing travels, so nothing is packed
        yield from map(dataset.__getitem__, range(start, len(dataset)))
        return
    packing = _Packing(dataset)
    if num_workers and start < len(dataset):
        check_shared_memory(packing[start], num_workers)
    loader = DataLoader(
        packing,
        batch_size=None,
        sampler=range(start, len(dataset)),
        num_workers=num_workers,
        collate_fn=_unchanged,
        # Its own generator: the loader would otherwise draw from the global one and shift every later dropout mask.
        generator=torch.Generator().manual_seed(seed),
        timeout=_WORKER_SECONDS if num_workers else 0,
        prefetch_factor=_PREFETCHED if num_workers else None,
        worker_init_fn=_ignore_signals,
        pin_memory=device.type == "cuda",
    )
    items = iter(loader)
    workers = multiprocessing.active_children()
    try:
        while True:
            try:
                item = next(items, None)
            except (ConnectionError, EOFError) as error:
                # One died while it handed a batch over; torch has not noticed yet. Nor need `is_alive`: a sentinel tells of the
                # end a moment before the process can be waited for.
                ended = wait([worker.sentinel for worker in workers], timeout=5)
                dead = [f"{worker.name} (pid {worker.pid})" for worker in workers if worker.sentinel in ended]
                raise _died(f"{', '.join(dead) or 'one of them'} while it handed a batch over ({error}).") from None
            except RuntimeError as error:
                # Here, for torch would wait for one that hangs.
                if (known := loader_error(error, workers)) is None:
                    raise
                raise known from None
            if item is None:
                return
            if isinstance(item, MGDError | OSError):
                raise item
            yield item.on(device)
    finally:
        # Workers live as long as their iterator, and a traceback that somebody keeps, keeps that: Python would wait for them at
        # its end for ever, for they ignore the signal that it sends. torch has no public name for this.
        if num_workers:
            items._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]


def check_shared_memory(first: _Packed | MGDError | OSError, num_workers: int) -> None:
    """Raises what the first batch could not be made for, or LoaderError where shared memory has no room for all batches under way:
    those that workers have ready, and the one in hand."""
    if not isinstance(first, _Packed):
        raise first
    needed = (_PREFETCHED * num_workers + 1) * first.buffer.numel()
    if (shortage := shared_memory_shortage(needed)) is not None:
        raise LoaderError(f"--num-workers {num_workers}: {shortage}")


def loader_error(error: RuntimeError, workers: Sequence[BaseProcess] = ()) -> LoaderError | None:
    """What a RuntimeError says of worker processes, where it is about them; the hanging ones are ended."""
    text = str(error)
    if not re.search("DataLoader (worker|timed out)", text):
        return None
    names = ", ".join(f"{process.name} (pid {process.pid})" for process in multiprocessing.active_children())
    if "timed out" not in text:
        signalled = "by a bus error: " if any(worker.exitcode == -signal.SIGBUS for worker in workers) else ""
        return _died(signalled + " ".join(text.split()))
    _end_workers()
    return LoaderError(
        f"no batch within {_WORKER_SECONDS:g} s: a process that decodes images hangs, one of {names}; is the disk of the "
        "images reachable? The same command goes on from the last checkpoint"
    )


def _died(what: str) -> LoaderError:
    _end_workers()
    if re.search("bus error|shared memory", what, re.IGNORECASE):
        return LoaderError(f"a process that decodes images found no shared memory: {what} {_no_room()}")
    return LoaderError(
        f"a process that decodes images died: {what} Out of memory is the usual reason: fewer --num-workers need less. The same "
        "command goes on from the last checkpoint"
    )


def _no_room() -> str:
    free = free_shared_memory()
    left = "" if free is None else f"{free / 1e6:,.1f} MB are free in /dev/shm; "
    return (
        f"{left}take --num-workers 0 or fewer of them, or give the container more, such as `docker run --shm-size 8g`. The same "
        "command goes on from the last checkpoint"
    )


def _end_workers() -> None:
    # torch's handler would raise in the midst of this, once for each child that ends.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if threading.current_thread() is threading.main_thread() else None
    for process in multiprocessing.active_children():
        process.kill()
        process.join(5)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)


def _unchanged(item: Any) -> Any:
    return item


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM reach a whole group of processes; the training process decides when its workers end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class _Place:
    """Where one tensor lies in a packed batch."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Packed:
    """A batch in one buffer: one piece of shared memory from a worker, one pinned copy, one transfer to the device."""

    skeleton: Any
    """the batch, with a _Place for each tensor"""
    buffer: Tensor

    def pin_memory(self) -> _Packed:
        return _Packed(self.skeleton, self.buffer.pin_memory())

    def on(self, device: torch.device) -> Batch:
        buffer = self.buffer.to(device, non_blocking=True)

        def unpack(place: _Place) -> Tensor:
            end = place.offset + math.prod(place.shape) * place.dtype.itemsize
            return buffer[place.offset : end].view(place.dtype).view(place.shape)

        return _mapped(self.skeleton, _Place, unpack)


class _Packing(Dataset["_Packed | MGDError | OSError"]):
    """A training set whose items are packed. Errors with a message for the user are items too: DataLoader would wrap them, and
    those of the disk would lose their number and their file."""

    def __init__(self, dataset: TrainingSet) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> _Packed | MGDError | OSError:
        try:
            batch = self.dataset[step]
        except (MGDError, OSError) as error:
            return error
        tensors: dict[int, tuple[Tensor, _Place]] = {}
        end = 0

        def place(tensor: Tensor) -> _Place:
            nonlocal end
            # A partner's images may be the very tensors of its first image: they travel once.
            if id(tensor) not in tensors:
                start = -(-end // 64) * 64
                end = start + tensor.numel() * tensor.dtype.itemsize
                tensors[id(tensor)] = tensor, _Place(start, tuple(tensor.shape), tensor.dtype)
            return tensors[id(tensor)][1]

        skeleton = _mapped(batch, Tensor, place)
        buffer = torch.empty(end, dtype=torch.uint8)
        if get_worker_info() is not None:
            # Here and not on the way: torch would lose the error in a thread, and the training would wait for the batch.
            try:
                buffer = buffer.share_memory_()
            except (OSError, RuntimeError) as error:
                return LoaderError(f"a batch found no shared memory: {' '.join(str(error).split())}: {_no_room()}")
        for tensor, where in tensors.values():
            stop = where.offset + tensor.numel() * tensor.dtype.itemsize
            buffer[where.offset : stop].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return _Packed(skeleton, buffer)


def _mapped(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """`value` with everything of a kind replaced, in nested dataclasses, named tuples and dictionaries."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(item, kind, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, kind, function) for item in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _mapped(getattr(value, f.name), kind, function) for f in dataclasses.fields(value)}
        return type(value)(**fields)
    return value
