"""Reads target caches, and trusts nothing: what a reader gets is what was committed for that image, or a CacheError.

Zarr itself reads a missing shard as fill values and most damage as numbers. The reader here checks the commit when a store is
opened and each record when it is first read; and it saves Zarr's fixed cost of about a millisecond a record by keeping the
shards' indexes. The format is that of `cache_format`. No torch is imported here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import resource
import stat
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mgd_pipeline.access import access_error, is_absent, is_there
from mgd_pipeline.caches.encoding import TARGETS_VERSION
from mgd_pipeline.caches.format import (
    ARRAYS,
    COMMIT,
    FORMAT,
    INDEX,
    INDEX_SCHEMA,
    OLDEST_FORMAT,
    ImageKey,
    Layout,
    array_metadata,
    canonical,
    count_images,
    fingerprint,
    group_metadata,
    mirrored_key,
    shard_name,
)
from mgd_pipeline.caches.remote import RemotePath, remote_path
from mgd_pipeline.errors import CacheError, CacheIncomplete, MGDError, ParamsError, ProvenanceMismatch, StaleTarget
from mgd_pipeline.tables import open_parquet, read_parquet

if TYPE_CHECKING:
    from mgd_pipeline.caches.image_targets import ImageTargets

_CONTROL_BYTES = {"zarr.json": 2**20, COMMIT: 2**26, INDEX: 2**31, "receipt.json": 2**26}
_RECORD_BYTES = 2**30
_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
_OPEN_SHARDS = 4096 if _FILES == resource.RLIM_INFINITY else max(8, min(4096, _FILES // 4))
"""Files that one TargetCache keeps open: a process has several caches, and needs descriptors for other things, too."""
_WHOLE = 2**14
"""Bytes. Files up to this size, which those of affines and extents are, are read whole when they are opened, and closed: a system
call for each of their records would take a third of the time of one for a map of logits."""
_FOUND = 2**16
"""Images whose rows are remembered once they were found, in up to 12 MB."""
_READ = ("logits", "logits_affine", "region_embeddings", "extents")
_COMPARED = 2**15
_REQUESTS = 32
"""Of a remote store at a time."""
_OF_DVC = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")
_NAMES = {COMMIT, INDEX, "zarr.json", *ARRAYS}
"""All that lies at the top of a store."""
_Preadv = Callable[[Sequence[memoryview], int], int]
_REBUILD = "restore the store (`dvc checkout --force`), or remove it and run `mgd-pipeline precompute-teachers`"


class CachedTargets(NamedTuple):
    """A batch of rows as stored, on their canvas."""

    logits: np.ndarray
    """(B, K, h, w) uint8 or float16; K is 0 in a store without classes"""
    affine: np.ndarray
    """(B, 2) float32: offset, scale"""
    region_embeddings: np.ndarray
    """(B, D, r, c) float16; D is 0 in a store without embeddings"""
    extents: np.ndarray
    """(B, 4) int32: image height, width, frame height, width"""


class Index:
    """The rows of a store: which image each belongs to, the checksums of its records, or why it has none.

    Stores have up to 17 million rows, and every process that reads one has its index: what a reader needs stays in arrays, 150
    bytes a row. The lists and dictionaries, five times as large, are made for the tools that ask for them, and for errors.
    """

    def __init__(self, table: pa.Table) -> None:
        self.rows: np.ndarray = table["row"].to_numpy()
        """(N,) int64, ascending"""
        self._ids, self._sha256s, self._problems = (table[n].combine_chunks() for n in ("image_id", "image_sha256", "problem"))
        self.has_targets: np.ndarray = pc.call_function("equal", [self._problems, pa.scalar("")]).to_numpy(zero_copy_only=False)
        """(N,) bool; a row without has a problem."""
        self.checksums: dict[str, np.ndarray] = {name: table[f"{name}_crc32c"].to_numpy() for name in ARRAYS}
        """(N,) uint32 for each array"""
        self._found: dict[ImageKey, int] = {}
        """Positions of images that were asked for: those of a small set are asked for again and again."""

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, position: int) -> ImageKey:
        """The image of a row, by its position in this index."""
        return ImageKey(self._ids[position].as_py(), self._sha256s[position].as_py())

    def find(self, key: ImageKey) -> int | None:
        """Position of the last row of an image that has targets."""
        if (known := self._found.get(key)) is not None:
            return known
        hashes, positions = self._by_hash
        wanted = hash(key)
        for place in range(bisect_left(hashes, wanted), len(hashes)):
            if hashes[place] != wanted:
                break
            if self.key(positions[place]) == key:
                if len(self._found) < _FOUND:
                    self._found[key] = positions[place]
                return positions[place]
        return None

    @cached_property
    def _by_hash(self) -> tuple[memoryview, memoryview]:
        """Hashes of the keys that have targets in ascending order, and their positions in this index, of equal ones the last
        first: (n,) int64 each. As memoryviews, because NumPy takes a microsecond for each element that it gives to Python."""
        hashes = np.fromiter(map(hash, self._iterate()), np.int64, len(self))
        positions = np.flatnonzero(self.has_targets)[::-1]
        positions = positions[np.argsort(hashes[positions], kind="stable")]
        return hashes[positions].data, positions.data

    def _iterate(self) -> Iterator[tuple[str, str]]:
        for start in range(0, len(self), 2**16):
            yield from zip(*(column.slice(start, 2**16).to_pylist() for column in (self._ids, self._sha256s)), strict=True)

    @cached_property
    def keys(self) -> list[ImageKey]:
        return [ImageKey(*key) for key in self._iterate()]

    @cached_property
    def problems(self) -> list[str]:
        """Empty where the row has targets."""
        return self._problems.to_pylist()

    @cached_property
    def place(self) -> dict[ImageKey, int]:
        """Position in this index of each image that has targets; of several rows for one image the last."""
        return {key: i for i, (key, there) in enumerate(zip(self.keys, self.has_targets.tolist(), strict=True)) if there}

    @cached_property
    def by_id(self) -> dict[str, int]:
        """Position of the last row of each id, with targets or without."""
        return {key.image_id: i for i, key in enumerate(self.keys)}

    def stored(self, rows_per_shard: int) -> np.ndarray:
        """How many records each shard holds."""
        shards = self.rows // rows_per_shard
        return np.bincount(shards[self.has_targets], minlength=int(shards.max(initial=-1)) + 1)


class _Shard:
    """An open shard. It is closed when nothing refers to it any more, so that no thread reads from a descriptor which another
    has just closed, and which may be another file by now."""

    def __init__(
        self, path: Path | RemotePath, rows_per_shard: int, record_bytes: int, known: tuple[int, memoryview] | None
    ) -> None:
        """`known` is what the file was when it was open before: its identity and offsets, which then need not be read again."""
        try:
            if isinstance(path, Path):
                self.descriptor = os.open(path, os.O_RDONLY)
                self.preadv: _Preadv = partial(os.preadv, self.descriptor)
                status = os.fstat(self.descriptor)
                if status.st_size <= _WHOLE:
                    self.preadv = partial(_preadv_memory, memoryview(os.pread(self.descriptor, status.st_size, 0)))
                    self._close()
            else:
                self.preadv, status = path.preadv, path.stat()
        except OSError as error:
            raise _shard_error(path, error) from None
        self.path = path
        self.identity = hash((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        """Another one, and it is another file, or its content has changed."""
        self.offsets = (
            known[1]
            if known and known[0] == self.identity
            else self._read_index(path, rows_per_shard, record_bytes, status.st_size)
        )
        """Of each record in the file; negative where there is none (MISSING is beyond every end), or none of this size."""

    def _read_index(self, path: Path | RemotePath, rows_per_shard: int, record_bytes: int, size: int) -> memoryview:
        length = rows_per_shard * 16 + 4
        end = size - length
        data = bytearray(length)
        try:
            read = self.preadv((memoryview(data),), max(0, end))
        except OSError as error:
            raise _shard_error(path, error) from None
        if read != length or google_crc32c.value(bytes(data[:-4])) != struct.unpack("<I", data[-4:])[0]:
            raise CacheError(f"{path}: the shard's index is damaged; {_REBUILD}")
        places = np.frombuffer(data[:-4], "<u8").reshape(-1, 2)
        fits = (places[:, 1] == record_bytes) & (places[:, 0] <= max(0, end - record_bytes))
        return np.where(fits, places[:, 0].astype(np.int64), -1).data

    def _close(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
            del self.descriptor

    __del__ = _close


def _shard_error(path: Path | RemotePath, error: OSError) -> MGDError:
    if is_absent(error):
        return CacheError(f"{path}: shard cannot be opened: {error.strerror}; {_REBUILD}")
    return access_error(path, error)


def _preadv_memory(data: memoryview, buffers: Sequence[memoryview], offset: int) -> int:
    """As `os.preadv` does, from a file that was read whole."""
    start = offset
    for buffer in buffers:
        part = data[start : start + len(buffer)]
        buffer[: len(part)] = part
        start += len(part)
    return start - offset


class TargetCache:
    """A finished store, opened for reading by `open_cache`, which checks it first. Nothing is ever written to it."""

    def __init__(
        self, path: Path | RemotePath, provenance: dict[str, Any], layout: Layout, index: Index, commit: dict[str, Any]
    ) -> None:
        self.path = path
        self.provenance = provenance
        self.fingerprint = fingerprint(provenance)
        self.layout = layout
        self.index = index
        self.commit = commit
        # As memoryviews, because NumPy takes longer for each element that it gives to Python.
        self._rows, self._has_targets = index.rows.data, index.has_targets.data
        self._sizes = {name: layout.bytes_of(name) for name in layout.records}
        self._verified = {name: np.zeros(len(index), bool) for name in layout.records}
        self._shards: dict[tuple[str, int], _Shard] = {}
        """In the order in which they were opened; at most _OPEN_SHARDS."""
        self._known: dict[tuple[str, int], tuple[int, memoryview]] = {}

    @property
    def generation(self) -> int:
        """1 for a new store; one more each time that images were appended."""
        return self.commit["generation"]

    def row(self, key: ImageKey) -> int:
        """The row of an image.

        Raises CacheIncomplete if the image has none, StaleTarget if its file has changed since the teacher saw it.
        """
        if (position := self.index.find(key)) is not None:
            return int(self.index.rows[position])
        if key.image_id not in self.index.by_id:
            raise CacheIncomplete(
                f"{self.path}: has no targets for image {key.image_id!r}; run `mgd-pipeline precompute-teachers` again"
            )
        last = self.index.by_id[key.image_id]
        if self.index.keys[last] == key:
            raise CacheIncomplete(
                f"{self.path}: has no targets for image {key.image_id!r}, it was skipped: {self.index.problems[last]}; mend it, "
                "or leave it out by `mgd-pipeline prepare-data --on-error skip`, then run `mgd-pipeline precompute-teachers` again"
            )
        raise StaleTarget(
            f"{self.path}: image {key.image_id!r} has changed since its targets were made (its SHA-256 was "
            f"{self.index.keys[last].image_sha256[:12]}..., is {key.image_sha256[:12]}...); "
            "run `mgd-pipeline precompute-teachers` again"
        )

    def read(self, rows: Sequence[int] | np.ndarray) -> CachedTargets:
        """Rows as one batch, in the order asked for; raises CacheError naming the record that is damaged or missing,
        AccessError where the file may not be read or its disk does not answer."""
        places = self._places(rows)
        if isinstance(self.path, RemotePath) and len(places) > 1:  # a request takes 30 ms, whatever its size: all at once
            with ThreadPoolExecutor(_REQUESTS) as pool:
                parts = [pool.map(self._gather, [name] * len(places), [[place] for place in places]) for name in _READ]
                return CachedTargets(*map(np.concatenate, map(list, parts)))
        return CachedTargets(*(self._gather(name, places) for name in _READ))

    def record(self, name: str, row: int) -> np.ndarray:
        """One row of one array, read-only; its checksum is verified when this object reads it for the first time."""
        values = self._gather(name, self._places([row]))[0]
        values.flags.writeable = False
        return values

    def _places(self, rows: Sequence[int] | np.ndarray) -> list[tuple[int, int, int]]:
        """Of each row: its position in the index, its shard, and its slot there; CacheIncomplete for one without targets."""
        known, has_targets, places = self._rows, self._has_targets, []
        count, per_shard = len(known), self.layout.rows_per_shard
        for row in map(int, rows):
            # Without holes, a row is its own position.
            position = row if 0 <= row < count and known[row] == row else bisect_left(known, row)
            if position == count or known[position] != row or not has_targets[position]:
                raise CacheIncomplete(f"{self.path}: row {row} has no targets; ask `row` for the row of an image")
            places.append((position, *divmod(row, per_shard)))
        return places

    def _gather(self, name: str, places: list[tuple[int, int, int]]) -> np.ndarray:
        """(B, ...) records of one array. Each is read into its place in the batch, and nothing is copied after that; what is
        done for each costs half a microsecond besides the system call, as much as reading five kilobytes."""
        if name not in self._sizes:
            return self.layout.nothing(name, len(places))
        (shape, dtype), size = self.layout.records[name], self._sizes[name]
        values = np.empty(len(places) * size, np.uint8)
        into, shards, verified = values.data, self._shards, self._verified[name]
        for i, (position, number, slot) in enumerate(places):
            shard = shards.get((name, number)) or self._open_shard(name, number)
            offset = shard.offsets[slot]
            if offset < 0:
                raise CacheError(f"{self._where(name, position)}: is missing or has a wrong size; {_REBUILD}")
            record = into[i * size : i * size + size]
            try:
                if verified[position]:
                    complete = shard.preadv((record,), offset) == size
                else:
                    checksum = memoryview(bytearray(4))
                    complete = shard.preadv((record, checksum), offset) == size + 4
                    if complete:
                        self._verify(name, position, record, checksum)
            except OSError as error:
                raise _shard_error(shard.path, error) from None
            if not complete:
                raise CacheError(f"{self._where(name, position)}: the file ends before it; {_REBUILD}")
        return values.view(dtype).reshape(-1, *shape)

    def _verify(self, name: str, position: int, record: memoryview, stored: memoryview) -> None:
        checksum = google_crc32c.value(np.frombuffer(record, np.uint8))  # pyright: ignore[reportArgumentType]: it takes no memoryview
        if checksum != int.from_bytes(stored, "little"):
            raise CacheError(f"{self._where(name, position)}: is damaged (checksum differs); {_REBUILD}")
        if checksum != self.index.checksums[name][position]:
            raise CacheError(f"{self._where(name, position)}: belongs to another place; {_REBUILD}")
        # A file that is open stays the same one; what a URL leads to may be replaced at any time.
        self._verified[name][position] = isinstance(self.path, Path)

    def _where(self, name: str, position: int) -> str:
        row, image = self.index.rows[position], self.index.key(position).image_id
        path = self.path / shard_name(self.layout, name, row // self.layout.rows_per_shard)
        return f"{path}: {name} of row {row} (image {image!r})"

    def _open_shard(self, name: str, number: int) -> _Shard:
        per_shard = self.layout.rows_per_shard
        path, known = self.path / shard_name(self.layout, name, number), self._known.get((name, number))
        shard = _Shard(path, per_shard, self._sizes[name] + 4, known)
        if known is None or known[0] != shard.identity:
            # Opened anew, it may be another file than the one whose records were verified.
            first, after = self.index.rows.searchsorted([number * per_shard, number * per_shard + per_shard])
            self._verified[name][first:after] = False
            self._known[name, number] = shard.identity, shard.offsets
        while len(self._shards) >= _OPEN_SHARDS:
            # The one opened first, and not the one used last: rows are drawn at random, and noting each use would cost more.
            # By way of a list, because other threads may open some meanwhile.
            self._shards.pop(list(self._shards)[0], None)  # noqa: RUF015
        self._shards[name, number] = shard
        return shard

    def close(self) -> None:
        self._shards.clear()

    # --- by image id, for training loops of any kind

    def __getitem__(self, image: str | ImageKey) -> ImageTargets:
        """The decoded targets of an image, by its id; by its `ImageKey` where its file has changed and the cache has both.

        Raises CacheIncomplete for an image without targets, StaleTarget for an id of several files or a key of another file, and
        what `read` raises.
        """
        from mgd_pipeline.caches.image_targets import ImageTargets

        def decoded(row: int, mirrored: ImageTargets | None = None) -> ImageTargets:
            return ImageTargets.decode({name: self.record(name, row) for name in ARRAYS}, self.layout, mirrored)

        key = image if isinstance(image, ImageKey) else self._key_of(image)
        return decoded(self.row(key), decoded(self.row(mirrored_key(key))) if self.mirrored else None)

    @property
    def mirrored(self) -> bool:
        """Whether the cache has a row of each image's mirror image, too."""
        return bool(self.provenance.get("preprocessing", {}).get("mirrored"))

    def __iter__(self) -> Iterator[str]:
        """The ids of the images that have targets."""
        keys = (key for key, there in zip(self.index.keys, self._has_targets, strict=True) if there and count_images([key]))
        yield from dict.fromkeys(key.image_id for key in keys)

    def __reduce__(self) -> tuple[Any, ...]:
        # For worker processes that are spawned: they open their own files.
        return _opened_again, (str(self.path), self.fingerprint)

    def _key_of(self, image_id: str) -> ImageKey:
        if not isinstance(image_id, str):
            raise ParamsError(f"{self.path}: {image_id!r} is not the id of an image; `list(cache)` has the ids")
        hashes, positions = self._by_id
        first, last = (int(hashes.searchsorted(hash(image_id), side)) for side in ("left", "right"))
        # In the order of the rows, and of equal keys one.
        named = {self.index.key(p): p for p in positions[first:last].tolist()}
        named = {key: p for key, p in named.items() if key.image_id == image_id}
        usable = [key for key, p in named.items() if self._has_targets[p]] or list(named)[-1:]
        if len(usable) == 1:
            return usable[0]
        if not named:
            raise CacheIncomplete(f"{self.path}: has no image {image_id!r}{self._nearest(image_id)}")
        files = ", ".join(key.image_sha256[:12] + "..." for key in usable)
        raise StaleTarget(
            f"{self.path}: image {image_id!r} is ambiguous, the cache has {len(usable)} files of it (SHA-256 {files}); name one: "
            f"cache[ImageKey({image_id!r}, its SHA-256)]"
        )

    @cached_property
    def _by_id(self) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of all rows' ids in ascending order, and the rows' positions in the index: (N,) int64 each."""
        hashes = np.fromiter((hash(image_id) for image_id, _ in self.index._iterate()), np.int64, len(self.index))
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order

    def _nearest(self, image_id: str) -> str:
        ids = list(self)
        # In large caches only ids of the same file name are compared, or the first ones: each comparison takes 20 microseconds.
        stem = PurePosixPath(image_id).stem
        candidates = [other for other in ids if PurePosixPath(other).stem == stem] or ids[:_COMPARED]
        nearest = difflib.get_close_matches(image_id, candidates, 1, 0)
        return f"; the nearest id is {nearest[0]!r}" if nearest else "; it has no image with targets"


def _opened_again(path: str, fingerprint: str) -> TargetCache:
    cache = open_cache(path)
    if cache.fingerprint != fingerprint:
        raise ProvenanceMismatch(f"{path}: has been replaced by another cache while it was in use; open it again")
    return cache


# --- opening ----------------------------------------------------------------------------------------------------------


def open_cache(path: str | Path, expected: dict[str, Any] | None = None) -> TargetCache:
    """Opens a finished store after checking its commit, the sizes of its files, its metadata and its provenance.

    `path` may be a URL that fsspec reads, such as s3://bucket/targets/wide.zarr: all checks are the same, each record costs a
    request, and its checksum is compared each time.

    `expected` holds the provenance fields that the caller can vouch for; a differing field raises ProvenanceMismatch with
    both values. Raises CacheIncomplete where there is no finished store, AccessError where one may not be
    read or its disk does not answer, CacheError where files are missing or changed, or are not what this program writes: nothing
    is decoded and no shard is opened before all of that has passed.
    """
    store = remote_path(path) if isinstance(path, str) and "://" in path else Path(path)
    commit = read_commit(store)
    small = _check_files(store, commit)
    provenance, layout = _parse_group(store / "zarr.json", small.get("zarr.json", b""), commit["format"])
    difference = provenance_difference(provenance, expected or {})
    if provenance.get("targets_version") != TARGETS_VERSION:
        difference.insert(0, f"targets_version: the store has {provenance.get('targets_version')}, this code {TARGETS_VERSION}")
    if difference:
        raise ProvenanceMismatch(
            f"{store}: was made from something else: {'; '.join(difference)}. Run `mgd-pipeline precompute-teachers` again, "
            "or go back to the parameters that made it"
        )
    index, _ = _parse_index(store / INDEX, small.get(INDEX, b""))
    pa.default_memory_pool().release_unused()  # what decoding it took, nearly as much again
    rows = int(index.rows[-1]) + 1 if len(index) else 0
    if rows > len(commit["files"]) * layout.rows_per_shard:
        raise CacheError(f"{store / INDEX}: has a row {rows - 1}, more than there are shards for; {_REBUILD}")
    for name in layout.records:
        if small.get(f"{name}/zarr.json") != array_metadata(layout, name, rows, commit["format"]):
            raise CacheError(f"{store / name / 'zarr.json'}: is not the metadata of this store's {name}; {_REBUILD}")
    for shard, records in enumerate(index.stored(layout.rows_per_shard)):
        for name in layout.records:
            file = shard_name(layout, name, shard)
            if commit["files"].get(file, {}).get("size") != layout.shard_bytes(name, int(records)):
                raise CacheError(f"{store / file}: is not committed with the size of its {records} records; {_REBUILD}")
    return TargetCache(store, provenance, layout, index, commit)


def provenance_difference(found: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> list[str]:
    """One text for each field of `expected` that `found` has otherwise, with both values."""
    lines: list[str] = []
    for key, value in expected.items():
        have = found.get(key)
        if isinstance(value, dict) and isinstance(have, dict):
            lines += provenance_difference(have, value, f"{prefix}{key}.")
        elif have != value:
            lines.append(f"{prefix}{key}: the store has {have!r}, the parameters say {value!r}")
    return lines


def read_commit(path: Path | RemotePath) -> dict[str, Any]:
    """commit.json of a store, after its own hash and the types of its fields were checked."""
    if not _exists(path / COMMIT):
        raise CacheIncomplete(f"{path}: {_without_commit(path)}")
    commit = read_sealed(path / COMMIT)
    if commit is None:
        raise CacheError(f"{path / COMMIT}: damaged; {_REBUILD}")
    found = commit.get("format")
    if isinstance(found, int) and found > FORMAT:
        raise ProvenanceMismatch(
            f"{path}: is of format {found}, which a newer mgd-pipeline wrote; this one reads {OLDEST_FORMAT} to {FORMAT}: install "
            "the newer one"
        )
    if not isinstance(found, int) or found < OLDEST_FORMAT:
        raise ProvenanceMismatch(
            f"{path}: is of format {found}, this program reads {OLDEST_FORMAT} to {FORMAT}; remove it and run "
            "`mgd-pipeline precompute-teachers`"
        )
    files = commit.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    ):
        raise CacheError(f"{path / COMMIT}: is not the commit of a target cache; {_REBUILD}")
    if not isinstance(commit.get("generation"), int) or not isinstance(commit.get("shards"), list):
        raise CacheError(f"{path / COMMIT}: is not the commit of a target cache; {_REBUILD}")
    return commit


def _exists(path: Path | RemotePath) -> bool:
    return is_there(path) if isinstance(path, Path) else path.exists()


def _without_commit(path: Path | RemotePath) -> str:
    """What a place is that has no commit.json, and what to do."""
    if not _exists(path):
        return "does not exist; run `mgd-pipeline precompute-teachers`"
    if is_foreign(path) or not _names_in(path):
        return "is not a target cache; name a store, or a folder of stores such as data/targets"
    return "is not finished; run `mgd-pipeline precompute-teachers`"


def is_foreign(path: Path | RemotePath) -> bool:
    """Whether what lies at a place is something else than a store or a part of one: a file, a folder that has other things."""
    names = _names_in(path)
    return bool(names - _NAMES) or ("zarr.json" in names and b'"mgd"' not in _read_control(path / "zarr.json"))


def _names_in(path: Path | RemotePath) -> set[str]:
    """Of what lies in a folder, hidden files aside; "." for what is no folder."""
    try:
        names = path.names() if isinstance(path, RemotePath) else os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return {"."}
    except OSError as error:
        raise access_error(path, error) from None
    return {name for name in names if not name.startswith(".")}


def read_sealed(path: Path | RemotePath) -> dict[str, Any] | None:
    """A control file's content without its hash; None where it is damaged."""
    try:
        content = json.loads(_read_control(path))
        body = {key: value for key, value in content.items() if key != "self"}
        return body if content.get("self") == hashlib.sha256(canonical(body)).hexdigest() else None
    except (ValueError, RecursionError, AttributeError):
        return None


def read_index(path: Path) -> tuple[Index, int]:
    """images.parquet, and the generation that it notes."""
    return _parse_index(path, _read_control(path))


def _parse_index(path: Path | RemotePath, data: bytes) -> tuple[Index, int]:
    """Only what this program writes is decoded: plain, uncompressed columns without nulls cannot grow in memory."""
    try:
        file = open_parquet(data)
        meta = file.metadata
        columns = [meta.row_group(g).column(c) for g in range(meta.num_row_groups) for c in range(meta.num_columns)]
        plain = all(column.compression == "UNCOMPRESSED" and set(column.encodings) <= {"PLAIN", "RLE"} for column in columns)
        if not plain or not file.schema_arrow.equals(INDEX_SCHEMA, check_metadata=False):
            raise CacheError(f"{path}: is not the index of a target cache; {_REBUILD}")
        if sum(column.total_compressed_size for column in columns) > len(data):
            raise CacheError(f"{path}: claims more than it holds; {_REBUILD}")
        table = read_parquet(file)
        table.validate(full=True)
        generation = int((file.schema_arrow.metadata or {})[b"generation"])
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise CacheError(f"{path}: not a readable index ({' '.join(str(error).split())[:100]}); {_REBUILD}") from None
    rows = table["row"].to_numpy()
    if len(rows) and (rows[0] < 0 or (np.diff(rows) <= 0).any() or rows[-1] >= 2**40):
        raise CacheError(f"{path}: rows are not in ascending order; {_REBUILD}")
    return Index(table), generation


def _parse_group(path: Path | RemotePath, data: bytes, version: int) -> tuple[dict[str, Any], Layout]:
    """Provenance and layout from the store's zarr.json, which must be byte for byte what this program writes for them."""
    wrong = CacheError(f"{path}: is not the metadata of a target cache of format {version}; {_REBUILD}")
    try:
        mgd = json.loads(data)["attributes"]["mgd"]
        provenance, layout = mgd["provenance"], Layout(**mgd["layout"])
        if data != group_metadata(provenance, layout, version):
            raise wrong
    except (ValueError, RecursionError, KeyError, TypeError):
        raise wrong from None
    numbers = [value for key, value in asdict(layout).items() if key != "encoding"]
    if 0 in (layout.classes, layout.features) and layout.classes != layout.features:
        numbers.remove(0)  # a teacher without one of them; not without both
    if not isinstance(provenance, dict) or layout.encoding not in ("uint8", "float16"):
        raise wrong
    if not all(type(number) is int and 0 < number < 2**31 for number in numbers) or layout.rows_per_shard > 2**16:
        raise wrong
    if max(layout.height, layout.width) > 2**20 or max(layout.bytes_of(name) for name in layout.records) > _RECORD_BYTES:
        raise CacheError(f"{path}: a record would take more than {_RECORD_BYTES >> 30} GiB; this is no store of ours")
    return provenance, layout


def _check_files(path: Path | RemotePath, commit: dict[str, Any]) -> dict[str, bytes]:
    """Each committed file is there, is a file, lies where it should, and has its size. The small ones have their hash, too, and
    are returned: read again, they might be those of another store that has taken this one's place."""
    root, small = os.path.realpath(str(path)), {}
    for name, entry in commit["files"].items():
        problem = file_problem(path, root, name, entry["size"])
        if problem is None and "/c/" not in name:
            small[name] = _read_control(path / name)
            problem = "differs from what was committed" if hashlib.sha256(small[name]).hexdigest() != entry["sha256"] else None
        if problem is not None:
            raise CacheError(f"{path / name}: {problem}; {_REBUILD}")
    return small


def file_problem(path: Path | RemotePath, root: str, name: str, size: int) -> str | None:
    """What is wrong with a committed file, without opening it; `root` is the store's real path."""
    parts = name.split("/")
    if "\\" in name or "" in parts or ".." in parts or parts[0] in (".", COMMIT):
        return "is no name of a file in a store"
    try:
        status = (path / name).stat()
    except OSError as error:
        if is_absent(error):
            return "is missing"
        raise access_error(path / name, error) from None
    if not stat.S_ISREG(status.st_mode):
        return "is not a file"
    # DVC may link each file to its cache (cache.type symlink); other links out of the store are somebody's mistake or trick.
    if isinstance(path, Path):
        real = os.path.realpath(path / name)
        if os.path.commonpath([real, root]) != root and not (_OF_DVC.search(real) and (path / name).is_symlink()):
            return f"is a link out of the store, to {real}"
    if status.st_size != size:
        return f"has {status.st_size} bytes, not {size}"
    return None


def _read_control(path: Path | RemotePath) -> bytes:
    """A control file as a whole; CacheError where it is missing, no file, or larger than such a file may be."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _CONTROL_BYTES.get(path.name, 0):
            raise CacheError(f"{path}: is not a control file of a target cache ({status.st_size} bytes); {_REBUILD}")
        return path.read_bytes()
    except OSError as error:
        if is_absent(error):
            raise CacheError(f"{path}: cannot be read: {error.strerror}; {_REBUILD}") from None
        raise access_error(path, error) from None
