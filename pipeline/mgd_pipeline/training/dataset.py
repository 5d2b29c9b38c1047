"""Drawing and reading the batches of a training; what a batch is stands in `batches`.

The batch of a step is a pure function of (seed, step). So the number of workers and ranks, resuming and skipping change
nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from mgd_pipeline.caches.format import canonical, mirrored_key
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.caches.remote import RemoteFile, counter
from mgd_pipeline.data.decoded import decoded
from mgd_pipeline.data.images import IGNORE, check_unchanged
from mgd_pipeline.data.manifest import ImageRow, Manifest
from mgd_pipeline.errors import DataError, ProvenanceMismatch
from mgd_pipeline.params import CutMixParams, OptimisationParams, ViewsParams
from mgd_pipeline.training.batches import Batch, ReadTargets, Source, make_source, placed_targets, with_views
from mgd_pipeline.training.shard_order import ShardReading, ShardwiseCaches
from mgd_pipeline.views import ViewParams, draw_cutmix, draw_jitter, draw_view

_MEMO_BYTES = 512 * 2**20
_STREAMS = {"labelled": 1, "unlabelled": 2, "partner": 3, "cutmix": 4, "jitter": 5, "shards": 6}


class CheckedFiles:
    """Images and masks of a manifest. A process compares the bytes of a file when it reads the file for the first time, because
    targets belong to these bytes. Raises DataError for a file that is missing, damaged or changed."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._unchanged: set[Path] = set()

    def planes(self, row: ImageRow) -> np.ndarray:
        """(3, H, W) uint8 at the working size."""
        self._check(self.manifest.image_file(row), row.image_sha256)
        image = self.manifest.image(row)
        # Turned into planes here, once: a strided copy into each batch would take 25 times as long as a plain one.
        return np.ascontiguousarray(image.transpose(2, 0, 1))

    def mask(self, row: ImageRow, size: tuple[int, int]) -> np.ndarray:
        """(H, W) uint8 classes of a labelled image, at `size` (height, width)."""
        if row.mask_sha256 is None:
            raise DataError(f"{row.image_path}: labelled, but the manifest names no mask")
        self._check(self.manifest.mask_file(row), row.mask_sha256)
        return self.manifest.mask(row, size)

    def _check(self, path: Path, sha256: str) -> None:
        if path not in self._unchanged:
            check_unchanged(path, sha256)
            self._unchanged.add(path)


def check_rows(caches: Iterable[TargetCache], manifest: Manifest, rows: Sequence[ImageRow]) -> None:
    """Raises CacheIncomplete or StaleTarget for the first of these images that a cache lacks or has in another version."""
    for cache in caches:
        for key in map(manifest.key, rows):
            cache.row(key)
            if cache.mirrored:
                cache.row(mirrored_key(key))


def refuse_hidden_labels(caches: Iterable[TargetCache], manifest: Manifest) -> None:
    """Raises ProvenanceMismatch for a cache whose teacher was trained on labels that the partition of the manifest may not have."""
    here = manifest.partition_fingerprint
    for cache in caches:
        trained_on = cache.provenance["teacher"].get("trained_on")
        if trained_on not in (None, here):
            raise ProvenanceMismatch(
                f"{cache.path}: its teacher was trained on the labels of another partition ({trained_on[:12]}..., here "
                f"{here[:12]}...): they would leak into this experiment. "
                "Train the teacher on this partition, or set losses.other_partition to true if that is what you study"
            )


def read_targets(
    caches: Mapping[str, TargetCache], manifest: Manifest, rows: Sequence[ImageRow], views: Sequence[ViewParams]
) -> dict[str, ReadTargets]:
    """What each teacher's cache holds of these images; for mirrored views of the mirror images, where the cache has them."""
    keys = [manifest.key(row) for row in rows]
    seen = [mirrored_key(key) if view.flip else key for key, view in zip(keys, views, strict=True)]
    return {
        name: ReadTargets(cache.read([cache.row(key) for key in (seen if cache.mirrored else keys)]), cache.layout, cache.mirrored)
        for name, cache in caches.items()
    }


@dataclass
class TrainingSet(Dataset[Batch]):
    """Item t is the batch of step t. `caches` maps teachers to their caches; without any, batches carry no targets.

    Several ranks share the images of a batch: each gets every `ranks`-th image, from its own number on.
    """

    manifest: Manifest
    views: ViewsParams
    cutmix: CutMixParams
    optimisation: OptimisationParams
    seed: int
    caches: Mapping[str, str | Path] = field(default_factory=dict)
    with_unlabelled: bool = True
    expected: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    rank: int = 0
    ranks: int = 1
    image_cache: Path | None = None
    """A folder on this machine for decoded images, see `decoded.decoded`."""
    by_shards: ShardReading | None = None
    """Reads the caches shard by shard, in the order of `shard_order`, caches at URLs from local copies."""

    def __post_init__(self) -> None:
        if not self.manifest.labelled:
            raise DataError("the partition has no labelled image; run `mgd-pipeline prepare-data` with a larger fraction")
        self._files = CheckedFiles(self.manifest)
        self._open: dict[str, TargetCache] = {}
        self._shardwise: ShardwiseCaches | None = None
        self._commits: dict[str, str] = {}
        self._ends: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._memo: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        self._memo_bytes = 0
        self._permutations: dict[str, tuple[int, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Workers open their own files and keep their own memo.
        own = {"_open": {}, "_shardwise": None, "_memo": {}, "_memo_bytes": 0, "_files": CheckedFiles(self.manifest)}
        return {**self.__dict__, **own}

    def __len__(self) -> int:
        return self.optimisation.steps

    def open_caches(self) -> dict[str, TargetCache]:
        """Opens every teacher cache; raises what `open_cache` raises for one that does not fit the parameters."""
        for name, path in self.caches.items():
            if name not in self._open:
                self._open[name] = open_cache(path, self.expected.get(name))
                # The order depends on what every process reads here: a cache that has grown in between gives another one.
                commit = hashlib.sha256(canonical(self._open[name].commit)).hexdigest()
                if self._commits.setdefault(name, commit) != commit:
                    raise ProvenanceMismatch(
                        f"{self._open[name].path}: has been replaced by another cache while it was in use; call the same command "
                        "again"
                    )
        return self._open

    @property
    def shardwise(self) -> ShardwiseCaches | None:
        """The caches where they are read by shards. Raises what opening raises, CacheIncomplete or StaleTarget."""
        if self.by_shards is not None and self.caches and self._shardwise is None:
            self._shardwise = ShardwiseCaches(self.open_caches(), self.manifest, self.manifest.for_consistency, self.by_shards)
        return self._shardwise

    def close(self) -> None:
        """Ends the reading ahead of this process. Reading a batch begins it again."""
        if self._shardwise is not None:
            self._shardwise.close()
            self._shardwise = None

    def check_rows(self) -> None:
        """Raises CacheIncomplete or StaleTarget for the first training image that a cache lacks or has in another version."""
        check_rows(self.open_caches().values(), self.manifest, self.manifest.training)

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(step)
        if self.by_shards is None:
            return self._batch(step)
        self._read_ahead(step)
        return dataclasses.replace(self._batch(step), fetched=counter.take())

    def _batch(self, step: int) -> Batch:
        labelled_batch, unlabelled_batch = self.optimisation.labelled_batch, self.optimisation.unlabelled_batch
        if not self.with_unlabelled:
            # As many images a step as with unlabelled images, so that both students cost the same.
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
                self._permutations[stream] = epoch, self._permutation(stream, epoch, len(rows))
            chosen.append(rows[self._permutations[stream][1][place]])
        return chosen

    def _permutation(self, stream: str, epoch: int, count: int) -> np.ndarray:
        shuffled = self._rng(stream, epoch).permutation(count)
        if self.shardwise is None or stream == "labelled":
            return shuffled
        return shuffled[np.argsort(self._windows(epoch)[shuffled], kind="stable")]

    def _windows(self, epoch: int) -> np.ndarray:
        """The window of each image that gets consistency; the same for images and their partners."""
        assert self.shardwise is not None
        return self.shardwise.order.windows(self._rng("shards", epoch))

    def _read_ahead(self, step: int) -> None:
        """Has the shards of the window that a step ends in brought, and those of the next window."""
        if (shardwise := self.shardwise) is None:
            return
        count = len(self.manifest.for_consistency)
        epoch, place = divmod((step + 1) * self.optimisation.unlabelled_batch - 1, count)
        if self._ends[0] != epoch:
            self._ends = epoch, np.bincount(self._windows(epoch)).cumsum()
        ends = self._ends[1]
        window = int(ends.searchsorted(place, side="right"))

        def images(epoch: int, window: int) -> np.ndarray:
            order = self._permutation("unlabelled", epoch, count)
            return order[self._windows(epoch)[order] == window]

        def files() -> list[RemoteFile]:
            after = (epoch, window + 1) if window + 1 < len(ends) else (epoch + 1, 0)
            return [file for of in ((epoch, window), after) for file in shardwise.order.files(images(*of))]

        shardwise.read_at(epoch, window, files)

    def _caches_of(self, stream: str) -> dict[str, TargetCache]:
        if self.shardwise is None:
            return self.open_caches()
        return self.shardwise.labelled if stream == "labelled" else self.shardwise.caches

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
            # In a cache of mirror images, a mirrored view has a row of its own.
            others = {name: cache for name, cache in self._caches_of(stream).items() if cache.mirrored}
            read = placed_targets(rows, views, read_targets(others, self.manifest, rows, views))
            return with_views(dataclasses.replace(same, targets={**same.targets, **read}), views, jitter)
        # By its subset, not by the stream: an image in both streams is kept with its mask.
        whole = [self._decoded(row, self.manifest.subsets[row.image_id] == "labelled") for row in rows]
        height, width = (max(image.shape[axis] for image, _ in whole) for axis in (1, 2))
        images = np.zeros((len(rows), 3, height, width), np.uint8)
        labels = np.full((len(rows), height, width), IGNORE, np.uint8) if stream == "labelled" else None
        for i, (image, mask) in enumerate(whole):
            images[i, :, : image.shape[1], : image.shape[2]] = image
            if labels is not None and mask is not None:
                labels[i, : mask.shape[0], : mask.shape[1]] = mask
        masks = None if labels is None else torch.from_numpy(labels)
        targets = read_targets(self._caches_of(stream), self.manifest, rows, views)
        return make_source(rows, views, torch.from_numpy(images), masks, targets, jitter)

    def _decoded(self, row: ImageRow, labelled: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Image (3, H, W) and mask (H, W) at the working size, kept in memory up to a bound: small sets are decoded once."""
        if row.image_id in self._memo:
            return self._memo[row.image_id]
        image = self._kept(
            ("planes", self.manifest.key(row).image_sha256, self.manifest.long_side), lambda: self._files.planes(row)
        )
        mask = None
        if labelled:
            size = (image.shape[1], image.shape[2])
            parts = (row.mask_sha256, list(self.manifest.lookup), size)
            mask = self._kept(parts, lambda: self._files.mask(row, size))
        bytes_ = image.nbytes + (0 if mask is None else mask.nbytes)
        worker = get_worker_info()
        if self._memo_bytes + bytes_ <= _MEMO_BYTES // (worker.num_workers if worker else 1):
            self._memo[row.image_id] = image, mask
            self._memo_bytes += bytes_
        return image, mask

    def _kept(self, parts: tuple[object, ...], decode: Callable[[], np.ndarray]) -> np.ndarray:
        return decode() if self.image_cache is None else decoded(self.image_cache, parts, decode)


def cached_embeddings(cache: TargetCache, manifest: Manifest, row: ImageRow, *, mirrored: bool = False) -> np.ndarray:
    """(D, r, c) float16, or float32 from uint8, of an image or of its mirror image.

    Raises CacheIncomplete or StaleTarget if the cache lacks it.
    """
    key = manifest.key(row)
    record = cache.embeddings(cache.row(mirrored_key(key) if mirrored else key))
    height, width = (-(-side // cache.layout.region_stride) for side in manifest.size(row))
    return record[:, :height, :width]
