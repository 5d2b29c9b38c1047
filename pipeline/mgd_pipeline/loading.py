"""Batches for training: image, label and cached targets of the same drawn views.

A step's batch is a pure function of (seed, step): the loader keeps no state, so workers, resuming and skipping change
nothing. Letters: B batch, K classes, D channels, H W pixels of a view, h w cells of a network's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mgd_pipeline.cache import CachedTargets, TargetCache, open_cache
from mgd_pipeline.cache_format import ImageKey
from mgd_pipeline.errors import DataError
from mgd_pipeline.images import check_unchanged, read_image, read_mask
from mgd_pipeline.manifest import ImageRow, Manifest
from mgd_pipeline.networks import Normalisation
from mgd_pipeline.params import CutMixParams, OptimisationParams, ViewsParams
from mgd_pipeline.training import jitter_colours
from mgd_pipeline.views import (
    Grid,
    ViewParams,
    draw_cutmix,
    draw_view,
    mix,
    sample,
    sample_images,
    sample_labels,
    valid_pixels,
)

_MEMO_BYTES = 512 * 2**20
_STREAMS = {"labelled": 1, "unlabelled": 2, "partner": 3, "cutmix": 4, "jitter": 5}


@dataclass(frozen=True)
class Source:
    """Whole images of one stream and one drawn view of each; not yet on the device."""

    rows: list[ImageRow]
    views: list[ViewParams]
    images: Tensor
    """(B, 3, H', W') uint8, placed at the top left of a common canvas"""
    labels: Tensor | None
    """(B, H', W') uint8, IGNORE outside"""
    targets: dict[str, CachedTargets]
    jitter_seed: int


@dataclass(frozen=True)
class Batch:
    """One step: labelled images, and where the method uses them unlabelled ones, their CutMix partners and masks."""

    step: int
    labelled: Source
    unlabelled: Source | None = None
    partner: Source | None = None
    cutmix: Tensor | None = None
    """(B, H, W) bool, True where the pixel comes from the partner"""


class ViewTargets(NamedTuple):
    """A teacher's targets on a batch of views, float32 on the device."""

    logits: Tensor
    """(B, K, H, W)"""
    features: Tensor
    """(B, D, h, w) at the places of the student's features"""


class StepTargets(NamedTuple):
    """What one teacher says of the views of one step, float32 on the device: the three things that MGD's losses ask for."""

    labelled_logits: Tensor
    """(B, K, H, W) on the labelled views"""
    unmixed_logits: Tensor
    """(U, K, H, W) on the unlabelled views and on their partners, each seen unmixed, then mixed: for the pixel term"""
    mixed_logits: Tensor
    """(U, K, H, W) on the mixed views: for the image term"""
    mixed_features: Tensor
    """(U, D, h, w) on the mixed views, at the places of the student's features: for the region term"""


class TargetProvider(Protocol):
    """Where targets come from: `cached_targets`, or for studies `mgd_pipeline.live.live_targets`, with the first argument bound."""

    def __call__(self, batch: Batch, shape: tuple[int, int], device: torch.device) -> dict[str, StepTargets]:
        """Targets of each teacher; `shape` (h, w) is that of the student's features."""
        ...


@dataclass
class TrainingSet(Dataset[Batch]):
    """Item t is the batch of step t. `caches` maps teachers to stores; without any, batches carry no targets."""

    manifest: Manifest
    base: Path
    views: ViewsParams
    cutmix: CutMixParams
    optimisation: OptimisationParams
    seed: int
    caches: Mapping[str, Path] = field(default_factory=dict)
    with_unlabelled: bool = True
    expected: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.manifest.labelled:
            raise DataError("the partition has no labelled image; run `mgd-pipeline prepare-data` with a larger fraction")
        if self.with_unlabelled and not self.manifest.unlabelled:
            raise DataError("the partition has no unlabelled image; train with --supervised-only, or draw another partition")
        self._open: dict[str, TargetCache] = {}
        self._memo: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        self._memo_bytes = 0
        self._unchanged: set[str] = set()

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
                cache.row(ImageKey(row.image_id, row.image_sha256))

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(step)
        labelled_batch, unlabelled_batch = self.optimisation.labelled_batch, self.optimisation.unlabelled_batch
        if not self.with_unlabelled:
            # The same number of images a step as with unlabelled ones, so that both students cost the same.
            return Batch(step, self._source("labelled", step, labelled_batch + unlabelled_batch))
        labelled = self._source("labelled", step, labelled_batch)
        unlabelled = self._source("unlabelled", step, unlabelled_batch)
        partner = self._source("partner", step, unlabelled_batch, same=unlabelled)
        rng = self._rng("cutmix", step)
        low, high = self.cutmix.area
        masks = [draw_cutmix(rng, *self.views.crop, boxes=self.cutmix.boxes, area=(low, high)) for _ in unlabelled.rows]
        return Batch(step, labelled, unlabelled, partner, torch.from_numpy(np.stack(masks)))

    def _rng(self, stream: str, *position: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, _STREAMS[stream], *position])

    def _order(self, stream: str, start: int, count: int, rows: list[ImageRow]) -> list[ImageRow]:
        """Rows start .. start + count of the endless sequence of shuffled epochs."""
        chosen = []
        for position in range(start, start + count):
            epoch, place = divmod(position, len(rows))
            chosen.append(rows[self._rng(stream, epoch).permutation(len(rows))[place]])
        return chosen

    def _source(self, stream: str, step: int, batch: int, same: Source | None = None) -> Source:
        rng = self._rng(stream, step, 1)
        start = step * batch
        if stream == "labelled":
            rows = self._order(stream, start, batch, self.manifest.labelled)
        elif same is None or self.cutmix.partner == "other":
            rows = self._order(stream, start, batch, self.manifest.unlabelled)
        else:
            rows = same.rows
        crop = (self.views.crop[0], self.views.crop[1])
        reuse = same is not None and rows is same.rows
        decoded = [] if reuse else [self._decoded(row, stream == "labelled") for row in rows]
        views = [draw_view(rng, self.manifest.size(row), crop, self.views.scales, self.views.flip) for row in rows]
        jitter_seed = int(self._rng("jitter", _STREAMS[stream], step).integers(2**62))
        if reuse:
            assert same is not None
            return Source(rows, views, same.images, None, same.targets, jitter_seed)
        height, width = (max(image.shape[axis] for image, _ in decoded) for axis in (0, 1))
        images = np.zeros((batch, 3, height, width), np.uint8)
        labels = np.full((batch, height, width), 255, np.uint8) if stream == "labelled" else None
        for i, (image, mask) in enumerate(decoded):
            images[i, :, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
            if labels is not None and mask is not None:
                labels[i, : mask.shape[0], : mask.shape[1]] = mask
        targets = {
            name: cache.read([cache.row(ImageKey(row.image_id, row.image_sha256)) for row in rows])
            for name, cache in self.open_caches().items()
        }
        return Source(
            rows, views, torch.from_numpy(images), None if labels is None else torch.from_numpy(labels), targets, jitter_seed
        )

    def _decoded(self, row: ImageRow, labelled: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Image and mask at the working size, kept in memory up to a bound: small sets are decoded only once."""
        if row.image_id in self._memo:
            return self._memo[row.image_id]
        root = self.base / self.manifest.root
        if row.image_id not in self._unchanged:
            # Stored targets belong to the image's bytes, so these are checked when a process reads them for the first time.
            check_unchanged(root / row.image_path, row.image_sha256)
            if labelled and row.mask_path is not None and row.mask_sha256 is not None:
                check_unchanged(root / row.mask_path, row.mask_sha256)
            self._unchanged.add(row.image_id)
        image = read_image(root / row.image_path, self.manifest.long_side)
        mask = None
        if labelled:
            if row.mask_path is None:
                raise DataError(f"{row.image_path}: labelled, but the manifest names no mask")
            size = (image.shape[0], image.shape[1])
            mask = read_mask(root / row.mask_path, np.asarray(self.manifest.lookup), size)
        bytes_ = image.nbytes + (0 if mask is None else mask.nbytes)
        if self._memo_bytes + bytes_ <= _MEMO_BYTES:
            self._memo[row.image_id] = image, mask
            self._memo_bytes += bytes_
        return image, mask


def load_batches(dataset: TrainingSet, start: int, num_workers: int, seed: int) -> Iterator[Batch]:
    """Batches of steps start, start + 1, ...; the same for any number of workers."""
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=range(start, len(dataset)),
            num_workers=num_workers,
            collate_fn=_unchanged,
            # Its own generator: the loader would otherwise draw from the global one and shift every later dropout mask.
            generator=torch.Generator().manual_seed(seed),
            timeout=300 if num_workers else 0,
            prefetch_factor=2 if num_workers else None,
        )
    )


def _unchanged(item: Any) -> Any:
    return item


def view_images(source: Source, normalisation: Normalisation, jitter: float, device: torch.device) -> Tensor:
    """(B, 3, H, W) normalised input of the views, colour-jittered; padding stays 0."""
    mean, std = (torch.tensor(values, device=device) for values in normalisation)
    images = sample_images(source.images.to(device, non_blocking=True), source.views, mean, std)
    if jitter == 0:
        return images
    return jitter_colours(images, jitter, source.jitter_seed) * valid_pixels(source.views).to(device)[:, None]


def view_labels(source: Source, device: torch.device) -> Tensor:
    """(B, H, W) int64 labels of the views, IGNORE on void and padding."""
    if source.labels is None:
        raise ValueError("this source has no labels")
    return sample_labels(source.labels.to(device, non_blocking=True), source.views)


def view_targets(source: Source, cache: TargetCache, teacher: str, shape: tuple[int, int], device: torch.device) -> ViewTargets:
    """Cached targets of the source's views: logits at every pixel, features at the cells of an output of `shape` (h, w)."""
    cached = source.targets[teacher]
    logits = torch.from_numpy(cached.logits).to(device).float()
    affine = torch.from_numpy(cached.affine).to(device)
    logits = logits * affine[:, 1].view(-1, 1, 1, 1) + affine[:, 0].view(-1, 1, 1, 1)
    sizes, frames = cached.extents[:, :2], cached.extents[:, 2:]
    for row, view, size in zip(source.rows, source.views, sizes, strict=True):
        if (view.height, view.width) != tuple(size):
            raise DataError(f"{row.image_path}: is {view.height}x{view.width}, its targets are of {size[0]}x{size[1]}")
    logits_grid = Grid(frames // cache.layout.stride, frames, align_corners=True)
    stride = cache.layout.region_stride
    regions = -(-sizes // stride)
    region_grid = Grid(regions, regions * stride, align_corners=False)
    features = torch.from_numpy(cached.region_embeddings).to(device).float()
    return ViewTargets(sample(logits, logits_grid, source.views), sample(features, region_grid, source.views, shape=shape))


def cached_targets(
    caches: Mapping[str, TargetCache], batch: Batch, shape: tuple[int, int], device: torch.device
) -> dict[str, StepTargets]:
    """Targets of a step from the stores: sampled at the views, mixed by the step's CutMix masks (a TargetProvider, once bound).

    The teachers saw neither crops nor mixtures, so the targets of a mixed view are the mixed targets of its two sources.
    """
    assert batch.unlabelled is not None and batch.partner is not None and batch.cutmix is not None
    cutmix = batch.cutmix.to(device)
    found = {}
    for teacher, cache in caches.items():
        labelled = view_targets(batch.labelled, cache, teacher, shape, device)
        first, second = (view_targets(source, cache, teacher, shape, device) for source in (batch.unlabelled, batch.partner))
        logits = mix(first.logits, second.logits, cutmix)
        found[teacher] = StepTargets(labelled.logits, logits, logits, mix(first.features, second.features, cutmix))
    return found


def mixed_valid(batch: Batch, device: torch.device) -> Tensor:
    """(B, H, W) bool: the pixels of the CutMixed views that exist."""
    assert batch.unlabelled is not None and batch.partner is not None and batch.cutmix is not None
    first, second = (valid_pixels(source.views).to(device) for source in (batch.unlabelled, batch.partner))
    return mix(first, second, batch.cutmix.to(device))
