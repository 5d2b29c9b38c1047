"""What a batch is: images, labels and cached targets of the same drawn views, and what a step reads from it.

A batch holds whole images and whole target grids in their stored form, and the few numbers that say where the views lie in
them. The views are sampled on the device.

Letters: B batch, K classes, D channels, H W pixels of a view, h w cells of a network's output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mgd_pipeline.caches.format import Layout
from mgd_pipeline.caches.image_targets import target_grids
from mgd_pipeline.caches.reader import CachedTargets
from mgd_pipeline.caches.remote import NOTHING, Traffic
from mgd_pipeline.data.manifest import ImageRow
from mgd_pipeline.errors import DataError
from mgd_pipeline.networks.normalisation import Normalisation, in_order
from mgd_pipeline.networks.segmentation import STRIDE
from mgd_pipeline.params import LossesParams
from mgd_pipeline.views import (
    Grid,
    Points,
    Positions,
    ViewParams,
    both_inside,
    grid_points,
    inside_points,
    jitter_colours,
    label_points,
    mix,
    pixel_grid,
    sample_at,
    sample_images,
    sample_labels,
    source_positions,
)

_NOWHERE = Points(torch.empty(0), torch.empty(0))


class SourceTargets(NamedTuple):
    """One teacher's targets of a source's images in their stored form, and where the views lie in them."""

    logits: Tensor
    """(B, K, h', w') uint8 or float16, on a common canvas; K is 0 of a teacher that names no classes"""
    affine: Tensor
    """(B, 2) float32: offset, scale"""
    region_embeddings: Tensor
    """(B, D, r', c') float16 or uint8, on a common canvas; D is 0 of a teacher without features"""
    region_affine: Tensor
    """(B, D, 2) float32: offset, scale of each channel of uint8 embeddings; D is 0 for float16"""
    logits_grid: Grid
    region_grid: Grid
    logits_points: Points
    """at every pixel of the views"""
    region_points: Points
    """at the cells of the student's features"""
    own_points: Points
    """at cells of `region_stride`, see `view_regions`"""
    mirrored: bool
    """whether mirrored views have the targets of the mirror image, and read them without a flip"""
    region_stride: int
    """pixels between cells of the region embeddings"""


class ReadTargets(NamedTuple):
    """What a teacher cache holds for the images of a source."""

    cached: CachedTargets
    layout: Layout
    mirrored: bool = False
    """whether the targets of mirrored views are of the mirror images"""


@dataclass(frozen=True)
class Source:
    """Whole images of one stream and one drawn view of each; made by `make_source`."""

    rows: list[ImageRow]
    views: list[ViewParams]
    images: Tensor
    """(B, 3, H', W') uint8, placed at the top left of a common canvas"""
    labels: Tensor | None
    """(B, H', W') uint8, IGNORE outside"""
    targets: dict[str, SourceTargets]
    jitter: Tensor
    """(B, 6) float32, from `views.draw_jitter`"""
    image_points: Points
    label_points: Points
    inside: Points


@dataclass(frozen=True)
class Batch:
    """One step: labelled images, where the method uses them unlabelled ones, and with CutMix their partners and masks."""

    step: int
    labelled: Source
    unlabelled: Source | None = None
    partner: Source | None = None
    cutmix: Tensor | None = None
    """(B, H, W) bool, True where the pixel comes from the partner"""
    fetched: Traffic = NOTHING
    """What was read over the network since the process's last batch"""

    @property
    def mixed(self) -> list[Source]:
        """The sources of the mixed views: the unlabelled images and, with CutMix, their partners."""
        return [source for source in (self.unlabelled, self.partner) if source is not None]

    @property
    def sources(self) -> list[Source]:
        return [self.labelled, *self.mixed]


class ViewTargets(NamedTuple):
    """A teacher's targets on a batch of views, float32 on the device."""

    logits: Tensor
    """(B, K, H, W)"""
    features: Tensor
    """(B, D, h, w) at the places of the student's features"""


class StepTargets(NamedTuple):
    """One teacher's targets of the views of one step, float32 on the device, as MGD's losses need them."""

    labelled_logits: Tensor
    """(B, K, H, W) on the labelled views"""
    unmixed_logits: Tensor
    """(U, K, H, W) on the unlabelled views and on their partners, each seen unmixed, then mixed: for the pixel term"""
    mixed_logits: Tensor
    """(U, K, H, W) on the mixed views: for the image term"""
    mixed_features: Tensor
    """(U, D, h, w) on the mixed views, at the places of the student's features: for the region term"""
    labelled_regions: Tensor | None = None
    """(B, D, r, c) on the labelled views, at cells of the teacher's own stride: for the feature term"""
    mixed_regions: Tensor | None = None
    """(U, D, r, c) on the mixed views. A cell that shows both sources has the mean of both by their shares of its area, as the mean
    of the student's features over that cell."""


TargetProvider = Callable[[Batch], dict[str, StepTargets]]
"""Targets of each teacher, on the device of the batch: `cached_targets`, or `live.live_targets` with its teachers bound."""


def make_source(
    rows: list[ImageRow],
    views: list[ViewParams],
    images: Tensor,
    labels: Tensor | None,
    targets: Mapping[str, ReadTargets],
    jitter: Tensor,
) -> Source:
    """A source of images, labels and stored targets on their canvases. Raises DataError for targets of another size."""
    placed = placed_targets(rows, views, targets)
    return with_views(Source(rows, [], images, labels, placed, jitter, _NOWHERE, _NOWHERE, _NOWHERE), views, jitter)


def placed_targets(rows: list[ImageRow], views: list[ViewParams], targets: Mapping[str, ReadTargets]) -> dict[str, SourceTargets]:
    """Stored targets on their grids; `with_views` says where the views lie in them."""
    placed, grids = {}, {}
    expected = np.array([(view.height, view.width) for view in views])
    for name, (cached, layout, mirrored) in targets.items():
        sizes = cached.extents[:, :2]
        for i in np.flatnonzero((sizes != expected).any(1)):
            (height, width), (h, w) = expected[i], sizes[i]
            raise DataError(f"{rows[i].image_path}: is {height}x{width}, its targets are of {h}x{w}")
        alike = cached.extents.tobytes(), layout.stride, layout.region_stride
        if alike not in grids:  # teachers that saw the images alike share their grids, and so their points
            grids[alike] = target_grids(cached.extents, layout)
        logits_grid, region_grid = grids[alike]
        placed[name] = SourceTargets(
            torch.from_numpy(cached.logits),
            torch.from_numpy(cached.affine),
            torch.from_numpy(cached.region_embeddings),
            torch.from_numpy(cached.region_affine),
            logits_grid,
            region_grid,
            _NOWHERE,
            _NOWHERE,
            _NOWHERE,
            mirrored,
            layout.region_stride,
        )
    return placed


def with_views(source: Source, views: list[ViewParams], jitter: Tensor) -> Source:
    """The same images and targets, seen through other views; nothing large is copied."""
    shape = (views[0].crop_height // STRIDE, views[0].crop_width // STRIDE)
    # A mirrored view of an image is the same view, not mirrored, of its mirror image.
    straight = [dataclasses.replace(view, flip=False) for view in views]
    pixels = source_positions(views)

    def canvas(values: Tensor) -> tuple[int, int]:
        return values.shape[-2], values.shape[-1]

    looked: dict[tuple[object, ...], Positions] = {(False,): pixels}
    made: dict[tuple[object, ...], Points] = {}

    def points(values: Tensor, grid: Grid, mirrored: bool, *cells: Any) -> Points:
        """`cells`: none for the views' pixels, else as of `source_positions`."""
        if (where := (mirrored, *cells)) not in looked:
            looked[where] = source_positions(straight if mirrored else views, *cells)
        if (which := (canvas(values), id(grid), *where)) not in made:
            made[which] = grid_points(canvas(values), grid, looked[where])
        return made[which]

    def seen(stored: SourceTargets) -> SourceTargets:
        regions = stored.region_embeddings, stored.region_grid, stored.mirrored
        return stored._replace(
            logits_points=points(stored.logits, stored.logits_grid, stored.mirrored),
            region_points=points(*regions, shape),
            own_points=points(*regions, shape, own_cells(shape, stored.region_stride)),
        )

    targets = {name: seen(stored) for name, stored in source.targets.items()}
    return dataclasses.replace(
        source,
        views=views,
        targets=targets,
        jitter=jitter,
        image_points=grid_points(canvas(source.images), pixel_grid(views), pixels),
        label_points=label_points(pixels),
        inside=inside_points(pixels),
    )


def own_cells(shape: tuple[int, int], region_stride: int) -> tuple[int, int]:
    """Rows and columns of equal boxes of about `region_stride` pixels, for a network's output of `shape` (h, w)."""
    height, width = (max(1, side * STRIDE // region_stride) for side in shape)
    return height, width


@lru_cache(maxsize=16)
def _on_device(normalisation: Normalisation, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(normalisation.mean, device=device), torch.tensor(normalisation.std, device=device)


def view_images(source: Source, normalisation: Normalisation, jitter: float) -> Tensor:
    """(B, 3, H, W) normalised input of the views, colour-jittered; padding stays 0; channels in the network's order."""
    images = sample_images(source.images, source.image_points, source.inside, *_on_device(normalisation, source.images.device))
    if jitter:
        images = jitter_colours(images, jitter, source.jitter) * both_inside(source.inside)[:, None]
    return in_order(images, normalisation)


def view_labels(source: Source) -> Tensor:
    """(B, H, W) int64 labels of the views, IGNORE on void and padding."""
    if source.labels is None:
        raise ValueError("this source has no labels")
    return sample_labels(source.labels, source.label_points, source.inside)


def view_targets(source: Source, teacher: str, *, features: bool = True) -> ViewTargets:
    """Cached targets of the source's views: logits at every pixel, features at the cells of the student's features, which D = 0
    leaves out without `features`."""
    stored = source.targets[teacher]
    logits = stored.logits.float()
    if logits.shape[1]:
        offset, scale = (values.view(-1, 1, 1, 1) for values in stored.affine.unbind(1))
        logits = logits * scale + offset
    embeddings = _embeddings(stored) if features else stored.region_embeddings[:, :0].float()
    return ViewTargets(sample_at(logits, stored.logits_points), sample_at(embeddings, stored.region_points))


def view_regions(source: Source, teacher: str) -> Tensor:
    """(B, D, r, c) cached embeddings of the source's views at cells of their own stride, where means of the student's features over
    r x c equal boxes lie."""
    stored = source.targets[teacher]
    return sample_at(_embeddings(stored), stored.own_points)


def _embeddings(stored: SourceTargets) -> Tensor:
    """(B, D, r', c') float32, decoded before views are sampled: there are fewer cells than places in the views."""
    values = stored.region_embeddings.float()
    if not stored.region_affine.shape[1]:
        return values
    offset, scale = stored.region_affine[..., None, None].unbind(2)
    return torch.addcmul(offset, values, scale)


def cached_targets(batch: Batch, losses: LossesParams | None = None) -> dict[str, StepTargets]:
    """Targets of a step from the teacher caches: sampled at the views, mixed by the step's CutMix masks (a TargetProvider).

    The teachers saw neither crops nor mixtures. The targets of a mixed view are the mixed targets of its two sources. With `losses`
    the embeddings that none of its terms reads are left out: D is 0.
    """
    of_regions = [] if losses is None else [name for key, name, _ in losses.needed if key == "feature_teachers"]
    of_cells = None if losses is None else [name for key, name, _ in losses.needed if key == "region_teacher"]
    targets = {}
    for teacher in batch.labelled.targets:
        at_cells = of_cells is None or teacher in of_cells
        labelled = view_targets(batch.labelled, teacher, features=False)
        logits, features = zip(*(view_targets(source, teacher, features=at_cells) for source in batch.mixed), strict=True)
        mixed = mixed_views(batch, logits)
        targets[teacher] = StepTargets(labelled.logits, mixed, mixed, mixed_views(batch, features))
        if teacher in of_regions:
            regions = mixed_views(batch, [view_regions(source, teacher) for source in batch.mixed])
            targets[teacher] = targets[teacher]._replace(
                labelled_regions=view_regions(batch.labelled, teacher), mixed_regions=regions
            )
    return targets


def mixed_views(batch: Batch, seen: Sequence[Tensor]) -> Tensor:
    """The mixed views of a step from values seen on each of its `mixed` sources; without CutMix the first source alone."""
    return seen[0] if batch.cutmix is None else mix(seen[0], seen[1], batch.cutmix)


def valid_views(source: Source) -> Tensor:
    """(B, H, W) bool: the pixels of the views that exist."""
    return both_inside(source.inside)


def mixed_valid(batch: Batch) -> Tensor:
    """(B, H, W) bool: the pixels of the mixed views that exist."""
    return mixed_views(batch, [valid_views(source) for source in batch.mixed])
