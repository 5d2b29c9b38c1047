"""The order of images for a training that reads its caches shard by shard, as from a bucket.

In each epoch the shards are shuffled, and up to `WINDOW` shards in a row are a window. The images of a window are shuffled, then
those of the next window follow. So an epoch shows each image once and needs the shards of one window at a time, and a cache of at
most `WINDOW` shards is shuffled as a whole. The order is a function of (seed, epoch) and of where the images lie in the caches.

Several caches may have shards of different sizes. The shards of the cache with the most images in a shard are shuffled; of the
other caches a window has the shards in which its images lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgd_pipeline.caches.copies import Ahead, CopiedCache, ShardFolder
from mgd_pipeline.caches.format import mirrored_key
from mgd_pipeline.caches.reader import TargetCache
from mgd_pipeline.caches.remote import RemoteFile, RemotePath
from mgd_pipeline.data.manifest import ImageKey, ImageRow, Manifest

WINDOW = 8


@dataclass(frozen=True)
class ShardReading:
    """Where copies of shards go."""

    folder: Path
    limit: int
    """Bytes"""
    window: int = WINDOW
    """Shards whose images are drawn together"""


class ShardOrder:
    """The order of some images, and the shards in which each of them lies."""

    def __init__(
        self, caches: Mapping[str, TargetCache], manifest: Manifest, rows: Sequence[ImageRow], window: int = WINDOW
    ) -> None:
        self.caches, self.window = caches, window
        keys = [manifest.key(row) for row in rows]
        self._shards = {name: shown_rows(cache, keys) // cache.layout.rows_per_shard for name, cache in caches.items()}
        leading = max(caches, key=lambda name: caches[name].layout.rows_per_shard)  # of equals the first
        self._leading = self._shards[leading][:, 0]

    @property
    def names(self) -> list[str]:
        """Texts that differ where the same seed gives another order."""
        return [f"by {self.window} shards", hashlib.sha256(self._leading.tobytes()).hexdigest()]

    def windows(self, rng: np.random.Generator) -> np.ndarray:
        """(N,) int64: the window of each image in an epoch."""
        shards, of_image = np.unique(self._leading, return_inverse=True)
        count = -(-len(shards) // self.window)
        return (rng.permutation(len(shards)) * count // len(shards))[of_image]

    def needed(self) -> int:
        """Bytes of the copies of any two windows in a row, at most: one is read while the next one is brought."""
        blocks = np.unique(self._leading)
        costs, total = np.zeros(len(blocks), np.int64), 0
        for name, cache in self._remote.items():
            shards = self._shards[name]
            size = {int(number): cache.shard_bytes(int(number)) for number in np.unique(shards)}
            total += sum(size.values())
            pairs = np.unique(np.stack([self._leading.repeat(shards.shape[1]), shards.ravel()]), axis=1)
            np.add.at(costs, blocks.searchsorted(pairs[0]), [size[int(number)] for number in pairs[1]])
        return min(total, int(np.sort(costs)[-2 * self.window :].sum()))

    def epoch_bytes(self) -> int:
        """Bytes of all shards that an epoch reads from URLs."""
        files = (file for name, cache in self._remote.items() for file in cache.files_of(np.unique(self._shards[name]).tolist()))
        return sum(file.size for file in files)

    def files(self, images: np.ndarray) -> list[RemoteFile]:
        """The shards at URLs in which images lie, in the order in which these images need them."""
        firsts = []
        for name in self._remote:
            shards, first = np.unique(self._shards[name][images].ravel(), return_index=True)
            firsts += [(int(place), name, int(number)) for number, place in zip(shards, first, strict=True)]
        return [file for _, name, number in sorted(firsts) for file in self._remote[name].files_of([number])]

    @property
    def _remote(self) -> dict[str, CopiedCache]:
        return {name: cache for name, cache in self.caches.items() if isinstance(cache, CopiedCache)}


def shown_rows(cache: TargetCache, keys: Sequence[ImageKey]) -> np.ndarray:
    """(N, 1) int64 rows of images; (N, 2) with those of the mirror images, where the cache has them."""
    looks = [keys, [mirrored_key(key) for key in keys]] if cache.mirrored else [keys]
    return np.array([[cache.row(key) for key in look] for look in looks], np.int64).T.reshape(len(keys), len(looks))


class ShardwiseCaches:
    """The caches of a training that reads by shards, in one process: those at URLs from copies, folders as they are."""

    def __init__(
        self, caches: Mapping[str, TargetCache], manifest: Manifest, rows: Sequence[ImageRow], reading: ShardReading
    ) -> None:
        folder = ShardFolder(reading.folder, reading.limit)
        self.caches, self.labelled = dict(caches), dict(caches)
        for name, cache in caches.items():
            if isinstance(cache.path, RemotePath):
                # The few labelled images come again in each of their epochs: only their records are copied, once, and kept.
                of_labelled = shown_rows(cache, [manifest.key(row) for row in manifest.labelled])
                self.caches[name] = CopiedCache(cache.contents, folder)
                self.labelled[name] = CopiedCache(cache.contents, folder, of_labelled.ravel().tolist())
        self.order = ShardOrder(self.caches, manifest, rows, reading.window)
        self._ahead, self._reading = Ahead(folder), (-1, -1)

    @property
    def copied(self) -> list[CopiedCache]:
        """The labelled images' part of each cache at a URL."""
        return [cache for cache in self.labelled.values() if isinstance(cache, CopiedCache)]

    def needed(self) -> int:
        """Bytes of copies without which shards would be brought again and again."""
        return self.order.needed() + sum(cache.bytes_of_rows() for cache in self.copied)

    def close(self) -> None:
        """Ends the reading ahead and closes all files."""
        self._ahead.close()
        for cache in [*self.caches.values(), *self.labelled.values()]:
            cache.close()

    def read_at(self, epoch: int, window: int, files: Callable[[], list[RemoteFile]]) -> None:
        """Says which window is read. `files` are the shards of this window and of the next one."""
        if self._reading == (epoch, window):
            return
        self._reading = epoch, window
        for cache in [*self.caches.values(), *self.copied]:
            if isinstance(cache, CopiedCache):
                cache.touch()
        for cache in self.caches.values():
            if isinstance(cache, CopiedCache):
                cache.close()  # an open file keeps its room on the disk
        self._ahead.want(files())
