"""Reads teacher caches and trusts nothing: a reader gets what was committed for an image, or a CacheError.

Zarr itself reads a missing shard as fill values and most damage as numbers. `open_cache` checks the commit, and `TargetCache`
checks each record when it is first read. Keeping the shards' indexes saves Zarr's fixed cost of about a millisecond a record.
The format is that of `caches.format`. No torch is imported here.

Compressed records are decoded by numcodecs, which decodes into the batch, never beyond the record's place in it, and without the
interpreter's lock. pyarrow is as fast, but it makes a buffer of its own for each record.
"""

from __future__ import annotations

import difflib
import resource
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import google_crc32c
import numpy as np
from numcodecs.zstd import decompress

from mgd_pipeline.caches.commit import REBUILD
from mgd_pipeline.caches.encoding import decoded
from mgd_pipeline.caches.format import count_images, fingerprint, mirrored_key, shard_name
from mgd_pipeline.caches.frames import holds
from mgd_pipeline.caches.opening import Contents, check_contents
from mgd_pipeline.caches.remote import Place, RemotePath
from mgd_pipeline.caches.shard_reader import KnownIndex, ShardReader, shard_error
from mgd_pipeline.data.manifest import ImageKey
from mgd_pipeline.errors import CacheError, CacheIncomplete, ParamsError, ProvenanceMismatch, StaleTarget

if TYPE_CHECKING:
    from mgd_pipeline.caches.image_targets import ImageTargets

_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
_OPEN_SHARDS = 4096 if _FILES == resource.RLIM_INFINITY else max(8, min(4096, _FILES // 4))
"""Files that one TargetCache keeps open. A process has several caches, and needs descriptors for other things."""
READ = ("logits", "logits_affine", "region_embeddings", "extents", "region_affine")
_COMPARED = 2**15
_NO_FRAME = "is not one frame of Zstandard with the bytes of a record"
_REQUESTS = 32
"""Requests to a remote cache at a time."""


def open_cache(path: str | Place, expected: dict[str, Any] | None = None) -> TargetCache:
    """Opens a finished teacher cache after checking its commit, the sizes of its files, its metadata and its provenance.

    `path` may be a URL: s3://bucket/targets/wide.zarr, gs://, az://, http:// or https://. All checks are the same, except that a
    shard that is missing or has another size is an error when it is first read. Each record costs a request, and its checksum is
    compared each time. Keys are taken from the environment.

    `expected` holds the provenance fields that the caller knows; a field that differs raises ProvenanceMismatch with both
    values. Raises CacheIncomplete if there is no finished cache, AccessError if it may not be read or its disk does not answer,
    CacheError if files are missing, changed, or not written by mgd-pipeline.
    """
    return TargetCache(check_contents(path, expected or {}))


class CachedTargets(NamedTuple):
    """A batch of rows as stored, on their canvas."""

    logits: np.ndarray
    """(B, K, h, w) uint8 or float16; K is 0 in a cache without classes"""
    affine: np.ndarray
    """(B, 2) float32: offset, scale"""
    region_embeddings: np.ndarray
    """(B, D, r, c) float16 or uint8; D is 0 in a cache without embeddings"""
    extents: np.ndarray
    """(B, 4) int32: image height, width, frame height, width"""
    region_affine: np.ndarray = np.empty((0, 0, 2), np.float32)
    """(B, D, 2) float32: offset, scale of each channel of uint8 embeddings; D is 0 in a cache of float16 embeddings"""


class TargetCache:
    """A finished teacher cache, which `open_cache` has checked and opened. Nothing is ever written to it."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents
        self.path, self.commit = contents.path, contents.commit
        self.provenance, self.fingerprint = contents.provenance, fingerprint(contents.provenance)
        self.layout, self.index = contents.layout, contents.index
        layout, index = contents.layout, contents.index
        # As memoryviews, because NumPy takes longer for each element that it gives to Python.
        self._rows, self._has_targets = index.rows.data, index.has_targets.data
        self._sizes = {name: layout.bytes_of(name) for name in layout.records}
        self._verified = {name: np.zeros(len(index), bool) for name in layout.records}
        self._shards: dict[tuple[str, int], ShardReader] = {}
        """In the order in which they were opened; at most _OPEN_SHARDS."""
        self._known: dict[tuple[str, int], KnownIndex] = {}

    @property
    def generation(self) -> int:
        """1 for a new cache; one more each time that images were appended."""
        return self.commit["generation"]

    def row(self, key: ImageKey) -> int:
        """The row of an image.

        Raises CacheIncomplete if the image has none, StaleTarget if its file has changed since the teacher saw it.
        """
        if (position := self.index.find(key)) is not None:
            return int(self.index.rows[position])
        if not (positions := self.index.positions(key.image_id)):
            raise CacheIncomplete(
                f"{self.path}: has no targets for image {key.image_id!r}; run `mgd-pipeline precompute-teachers` again"
            )
        last = positions[-1]
        if self.index.key(last) == key:
            raise CacheIncomplete(
                f"{self.path}: has no targets for image {key.image_id!r}, it was skipped: {self.index.problems[last]}; mend it, "
                "or leave it out by `mgd-pipeline prepare-data --on-error skip`, then run `mgd-pipeline precompute-teachers` again"
            )
        raise StaleTarget(
            f"{self.path}: image {key.image_id!r} has changed since its targets were made (its SHA-256 was "
            f"{self.index.key(last).image_sha256[:12]}..., is {key.image_sha256[:12]}...); "
            "run `mgd-pipeline precompute-teachers` again"
        )

    def read(self, rows: Sequence[int] | np.ndarray) -> CachedTargets:
        """Rows as one batch, in the order of `rows`.

        Raises CacheError naming the record that is damaged or missing, AccessError if the file may not be read or its disk does
        not answer.
        """
        places = self._places(rows)
        if self._by_requests and len(places) > 1:  # a request takes 30 ms, whatever its size: all at once
            with ThreadPoolExecutor(_REQUESTS) as pool:
                parts = [pool.map(self._gather, [name] * len(places), [[place] for place in places]) for name in READ]
                return CachedTargets(*map(np.concatenate, map(list, parts)))
        return CachedTargets(*(self._gather(name, places) for name in READ))

    def record(self, name: str, row: int) -> np.ndarray:
        """One row of one array, read-only. Its checksum is verified when this object reads it for the first time."""
        values = self._gather(name, self._places([row]))[0]
        values.flags.writeable = False
        return values

    def embeddings(self, row: int) -> np.ndarray:
        """(D, r, c) region embeddings of a row, on its canvas: float16 as stored, or float32 decoded from uint8."""
        return decoded(self.record("region_embeddings", row), self.record("region_affine", row))

    def _places(self, rows: Sequence[int] | np.ndarray) -> list[tuple[int, int, int]]:
        """Position in the index, shard, and slot in the shard of each row; CacheIncomplete for a row without targets."""
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
        """(B, ...) records of one array. Each record is read into its place in the batch, and nothing is copied after that.

        The work for a record besides the system call costs half a microsecond, as much as reading five kilobytes.
        """
        if name not in self._sizes:
            return self.layout.nothing(name, len(places))
        (shape, dtype), size = self.layout.records[name], self._sizes[name]
        values = np.empty(len(places) * size, np.uint8)
        into, shards, verified = values.data, self._shards, self._verified[name]
        compressed = np.empty(self.layout.stored_sizes(name)[-1], np.uint8).data if self.layout.is_compressed(name) else None
        for i, (position, number, slot) in enumerate(places):
            shard = shards.get((name, number)) or self._open_shard(name, number)
            offset = shard.offsets[slot]
            if offset < 0:
                raise CacheError(f"{self._where(name, position)}: is missing or has a wrong size; {REBUILD}")
            record = into[i * size : i * size + size]
            stored = record if compressed is None else compressed[: shard.sizes[slot] - 4]
            try:
                if verified[position]:
                    complete = shard.preadv((stored,), offset) == len(stored)
                else:
                    checksum = memoryview(bytearray(4))
                    complete = shard.preadv((stored, checksum), offset) == len(stored) + 4
                    if complete:
                        self._verify(name, position, stored, checksum)
            except OSError as error:
                raise shard_error(shard.path, error) from None
            if not complete:
                raise CacheError(f"{self._where(name, position)}: the file ends before it; {REBUILD}")
            if compressed is not None:
                self._decompress(name, position, stored, record)
        return values.view(dtype).reshape(-1, *shape)

    def _verify(self, name: str, position: int, record: memoryview, stored: memoryview) -> None:
        checksum = google_crc32c.value(np.frombuffer(record, np.uint8))  # pyright: ignore[reportArgumentType]: it takes no memoryview
        if checksum != int.from_bytes(stored, "little"):
            raise CacheError(f"{self._where(name, position)}: is damaged (checksum differs); {REBUILD}")
        if checksum != self.index.checksums[name][position]:
            raise CacheError(f"{self._where(name, position)}: belongs to another place; {REBUILD}")
        if self.layout.is_compressed(name) and not holds(record, self._sizes[name]):
            raise CacheError(f"{self._where(name, position)}: {_NO_FRAME}; {REBUILD}")
        # An open file stays the same file. The object at a URL may be replaced at any time.
        self._verified[name][position] = not self._by_requests

    def _decompress(self, name: str, position: int, stored: memoryview, record: memoryview) -> None:
        try:
            decompress(stored, record)
        except (RuntimeError, ValueError):
            raise CacheError(f"{self._where(name, position)}: {_NO_FRAME}; {REBUILD}") from None

    def _where(self, name: str, position: int) -> str:
        row, image = self.index.rows[position], self.index.key(position).image_id
        path = self.path / shard_name(self.layout, name, row // self.layout.rows_per_shard)
        return f"{path}: {name} of row {row} (image {image!r})"

    @property
    def _by_requests(self) -> bool:
        """Whether each record is read by a request to a server."""
        return isinstance(self.path, RemotePath)

    def _shard_place(self, name: str, number: int) -> Place:
        return self.path / shard_name(self.layout, name, number)

    def _open_shard(self, name: str, number: int) -> ShardReader:
        per_shard = self.layout.rows_per_shard
        path, known = self._shard_place(name, number), self._known.get((name, number))
        shard = ShardReader(path, per_shard, self.layout.stored_sizes(name), known)
        if shard.known is not known:
            # This may be another file than the one whose records were verified.
            first, after = self.index.rows.searchsorted([number * per_shard, number * per_shard + per_shard])
            self._verified[name][first:after] = False
            self._known[name, number] = shard.known
        while len(self._shards) >= _OPEN_SHARDS:
            # Closes the shard that was opened first, not the one used longest ago: rows are drawn at random, and noting each use
            # would cost more. Through a list, because other threads may open shards meanwhile.
            self._shards.pop(list(self._shards)[0], None)  # noqa: RUF015
        self._shards[name, number] = shard
        return shard

    def close(self) -> None:
        """Closes all files; reading opens them again."""
        self._shards.clear()

    # --- by image id, for training loops of any kind

    def __getitem__(self, image: str | ImageKey) -> ImageTargets:
        """The decoded targets of an image, by its id; by its `ImageKey` where its file has changed and the cache has both.

        Raises CacheIncomplete for an image without targets, StaleTarget for an id of several files or a key of another file, and
        what `read` raises.
        """
        from mgd_pipeline.caches.image_targets import ImageTargets

        def of_row(row: int, mirrored: ImageTargets | None = None) -> ImageTargets:
            return ImageTargets.decode({name: self.record(name, row) for name in self.layout.arrays}, self.layout, mirrored)

        key = image if isinstance(image, ImageKey) else self._key_of(image)
        return of_row(self.row(key), of_row(self.row(mirrored_key(key))) if self.mirrored else None)

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
        # Of equal keys one.
        named = {self.index.key(position): position for position in self.index.positions(image_id)}
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
