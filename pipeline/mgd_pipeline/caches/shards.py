"""One shard of a teacher cache in the work folder: written in a folder of its own, synced, and renamed to its place.

`caches.build` shows the work folder, says which shards a cache needs, and puts them together.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numcodecs.zstd import compress

from mgd_pipeline.access import is_there
from mgd_pipeline.caches.commit import RECEIPT, read_sealed
from mgd_pipeline.caches.encoding import (
    EncodedLogits,
    Fidelity,
    TeacherTargets,
    encode_logits,
    require_finite,
    require_finite_float16,
)
from mgd_pipeline.caches.format import MISSING, ZSTD_LEVEL, Layout, canonical, sealed, sha256_file, shard_name
from mgd_pipeline.caches.reader import TargetCache
from mgd_pipeline.data.manifest import ImageKey
from mgd_pipeline.durable import link_or_copy, naming, private_name, publish_folder, sync_folder, write_all, write_synced
from mgd_pipeline.errors import CacheError, NonFiniteError

_WRITE = 2**18
"""Bytes of one array that are written at a time. Linux keeps what was written at once in pieces of memory of that size, and reads
records from them a third faster than from pieces of one record each. For larger pieces it may search long."""


class Skipped(NamedTuple):
    """In place of an image's targets: why it has none."""

    reason: str


class BuildImage(NamedTuple):
    """An image that a cache shall hold: its key, its size and the size of its padded network input, (height, width) in pixels."""

    key: ImageKey
    size: tuple[int, int]
    frame: tuple[int, int]


Compute = Callable[[Sequence[ImageKey]], Iterator[TeacherTargets | Skipped]]
"""Targets of images, one after the other, in their order."""


@dataclass(frozen=True)
class Shard:
    """A unit of work: the images of up to rows_per_shard consecutive rows."""

    number: int
    keys: tuple[ImageKey, ...]

    @property
    def name(self) -> str:
        return f"{self.number:05d}-{hashlib.sha256(canonical(self.keys)).hexdigest()[:16]}"


def build_shard(
    work: Path, layout: Layout, shard: Shard, images: Mapping[ImageKey, BuildImage], compute: Compute, made_by: Mapping[str, Any]
) -> int:
    """Builds one shard for a process that has no plan; returns how many images it computed, 0 if the shard is there already."""
    place = work / "shards" / shard.name
    if place.exists():
        return 0
    writer = fill_shard(work, layout, [images[key] for key in shard.keys], compute, lambda done: None)
    finish_shard(writer, place, made_by)
    return len(shard.keys)


class ShardWriter:
    """Writes one shard image by image, a file for each array, into a new folder, which `close` removes."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        os.mkdir(folder)
        self.rows: list[dict[str, Any]] = []
        self.fidelity: Fidelity | None = None
        """Of all rows, where something was encoded"""
        self._files = {name: os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o444) for name in layout.records}
        self._places = {name: np.full((layout.rows_per_shard, 2), MISSING, "<u8") for name in layout.records}
        self._ends: dict[str, int] = dict.fromkeys(layout.records, 0)
        self._waiting = {name: bytearray() for name in layout.records}
        # One record of each array with room for its checksum, filled again for each image. It is written from here, not copied.
        self._buffers = {name: np.zeros(layout.bytes_of(name) + 4, np.uint8) for name in layout.records}
        self._records = {
            name: self._buffers[name][:-4].view(dtype.newbyteorder("<")).reshape(shape)
            for name, (shape, dtype) in layout.records.items()
        }

    def append(self, image: BuildImage, targets: TeacherTargets) -> None:
        """Encodes and writes the next row. Raises NonFiniteError, naming the image, if the teacher said NaN or infinity."""
        try:
            self._encode(targets)
        except NonFiniteError as error:
            raise NonFiniteError(f"image {image.key.image_id}: {error}") from None
        self._records["extents"][:] = *image.size, *image.frame
        checksums = {}
        for name, buffer in self._buffers.items():
            if self.layout.is_compressed(name):
                record = np.frombuffer(compress(buffer[:-4], ZSTD_LEVEL) + bytes(4), np.uint8).copy()
            else:
                record = buffer
            checksums[name] = google_crc32c.value(record[:-4])  # pyright: ignore[reportArgumentType]: any contiguous buffer will do
            record[-4:].view("<u4")[0] = checksums[name]
            self._waiting[name] += record.data
            if len(self._waiting[name]) >= _WRITE:
                self._write(name)
            self._places[name][len(self.rows)] = self._ends[name], len(record)
            self._ends[name] += len(record)
        self.rows.append({"key": image.key, "problem": "", "crc32c": checksums})

    def _write(self, name: str) -> None:
        """Writes the whole pieces of what waits."""
        waiting = self._waiting[name]
        whole = len(waiting) // _WRITE * _WRITE
        # `del waiting[:whole]` would fail while somebody holds the bytes, such as the profiler of a Dask worker.
        self._waiting[name] = waiting[whole:]
        with naming(self.folder / name):
            write_all(self._files[name], memoryview(waiting)[:whole])

    def _encode(self, targets: TeacherTargets) -> None:
        """Fills the records of one image."""
        records = self._records
        if self.layout.classes:
            if targets.logits_affine is None:
                encoded = encode_logits(targets.logits, self.layout.encoding)  # pyright: ignore[reportArgumentType]
            else:
                encoded = EncodedLogits(targets.logits, *targets.logits_affine)
            require_finite(targets.global_descriptor, "global descriptor")
            _place(encoded.values, records["logits"])
            records["logits_affine"][:] = encoded.offset, encoded.scale
            records["global_descriptors"][:] = targets.global_descriptor
        if self.layout.features:
            if targets.region_affine is None:
                require_finite_float16(targets.region_embeddings, "region embeddings")
            else:
                records["region_affine"][:] = targets.region_affine
            _place(targets.region_embeddings, records["region_embeddings"])
        if targets.fidelity is not None:
            self.fidelity = Fidelity(*map(sum, zip(self.fidelity or Fidelity(), targets.fidelity, strict=True)))

    def skip(self, image: BuildImage, reason: str) -> None:
        """Leaves the next row without a record; the index says why."""
        self.rows.append({"key": image.key, "problem": reason or "no reason given", "crc32c": dict.fromkeys(self._files, 0)})

    def finish(self, made_by: Mapping[str, Any]) -> None:
        """Writes the shard's indexes and the receipt, and waits until all of it is on the disk."""
        for name, descriptor in self._files.items():
            places = self._places[name].tobytes()
            with naming(self.folder / name):
                write_all(descriptor, bytes(self._waiting[name]) + places + struct.pack("<I", google_crc32c.value(places)))
        # One flush of the disk serves several files, and other files are hashed meanwhile.
        with ThreadPoolExecutor(len(self._files)) as pool:
            files = dict(zip(self._files, pool.map(self._synced, self._files), strict=True))
        receipt = {"rows": self.rows, "files": files, "made_by": dict(made_by)}
        if self.fidelity is not None:
            receipt["fidelity"] = self.fidelity._asdict()
        write_synced(self.folder / RECEIPT, sealed(receipt), 0o444)
        sync_folder(self.folder)

    def _synced(self, name: str) -> dict[str, Any]:
        with naming(self.folder / name):
            os.fsync(self._files[name])
        return {"size": os.fstat(self._files[name]).st_size, "sha256": sha256_file(self.folder / name)}

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        shutil.rmtree(self.folder, ignore_errors=True)


def _place(values: np.ndarray, record: np.ndarray) -> None:
    """Fills a record with the cells of an image, and with 0 beyond them. Raises TypeError where NumPy would round silently."""
    if values.dtype != record.dtype:
        raise TypeError(f"{values.dtype} do not fit a record of {record.dtype}")
    record.fill(0)
    record[:, : values.shape[1], : values.shape[2]] = values


def fill_shard(
    work: Path, layout: Layout, images: Sequence[BuildImage], compute: Compute, advance: Callable[[int], None]
) -> ShardWriter:
    """A shard with all its rows, not yet on the disk."""
    with ExitStack() as on_error:
        stage = work / private_name("stage-shard")
        on_error.callback(shutil.rmtree, stage, ignore_errors=True)
        writer = on_error.enter_context(closing(ShardWriter(stage, layout)))
        for image, targets in zip(images, compute([image.key for image in images]), strict=True):
            if isinstance(targets, Skipped):
                writer.skip(image, targets.reason)
            else:
                writer.append(image, targets)
            advance(len(writer.rows))
        on_error.pop_all()
    return writer


def finish_shard(writer: ShardWriter, place: Path, made_by: Mapping[str, Any]) -> None:
    """Gives a shard its place, or drops it if another builder was first."""
    with closing(writer):
        writer.finish(made_by)
        publish_folder(writer.folder, place)


def finished(work: Path, shard: Shard) -> bool:
    """Whether a shard is there and its files have the hashes of its receipt.

    A damaged shard is moved aside, to be made again. Raises AccessError for a shard that may not be read.
    """
    folder = work / "shards" / shard.name
    if not is_there(folder):
        return False
    receipt = read_receipt(folder)
    if receipt is not None and all(
        is_there(folder / name) and sha256_file(folder / name) == receipt["files"][name]["sha256"] for name in receipt["files"]
    ):
        return True
    with suppress(FileNotFoundError):  # another builder may have moved it
        os.rename(folder, work / private_name("stage-damaged"))
    return False


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """The receipt of a shard; None if it is missing or damaged."""
    try:
        return read_sealed(folder / RECEIPT)
    except CacheError:
        return None


def adopt(work: Path, shard: Shard, output: Path, cache: TargetCache) -> None:
    """Links a shard of the cache at `output` into the work folder, if it is not there and its files are what was committed."""
    place = work / "shards" / shard.name
    files = {name: shard_name(cache.layout, name, shard.number) for name in cache.layout.records}
    if place.exists() or files["extents"] not in cache.commit["files"]:
        return
    entries = {name: cache.commit["files"][file] for name, file in files.items()}
    if any(sha256_file(output / files[name]) != entry["sha256"] for name, entry in entries.items()):
        return
    stage = work / private_name("stage-shard")
    os.mkdir(stage)
    try:
        for name, file in files.items():
            link_or_copy((output / file).resolve(), stage / name)
        first = int(cache.index.rows.searchsorted(shard.number * cache.layout.rows_per_shard))
        rows = [
            {
                "key": cache.index.keys[i],
                "problem": cache.index.problems[i],
                "crc32c": {name: int(cache.index.checksums[name][i]) for name in files},
            }
            for i in range(first, first + len(shard.keys))
        ]
        notes = {key: value for key, value in cache.commit["shards"][shard.number].items() if key != "rows"}
        write_synced(stage / RECEIPT, sealed({"rows": rows, "files": entries, **notes}), 0o444)
        sync_folder(stage)
        publish_folder(stage, place)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
