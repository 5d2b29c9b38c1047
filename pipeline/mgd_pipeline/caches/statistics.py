"""Mean and standard deviation of each channel of a teacher cache's region embeddings: stage one keeps them with the cache.

They lie in the commit, under `feature_statistics`, and are no part of the cache's identity. They belong to the images of which they
were made: for other images, and for a cache without them, they are computed when they are needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mgd_pipeline.caches.format import canonical, mirrored_key
from mgd_pipeline.caches.reader import TargetCache
from mgd_pipeline.data.manifest import ImageKey, Manifest


class FeatureStatistics(NamedTuple):
    """Of the region embeddings of some images of a cache, over all cells of these images."""

    mean: np.ndarray
    """(D,) float64"""
    std: np.ndarray
    """(D,) float64, 0 for a channel that is constant"""


def training_keys(manifest: Manifest, *, mirrored: bool) -> list[ImageKey]:
    """The images over which the statistics of a teacher are taken: labelled and unlabelled ones, and their mirror images if the
    cache has them. Images that a cache holds besides, such as those of val, do not count."""
    keys = [manifest.key(row) for row in manifest.training]
    return [*keys, *map(mirrored_key, keys)] if mirrored else keys


def stored_statistics(cache: TargetCache, keys: Iterable[ImageKey]) -> FeatureStatistics | None:
    """The statistics that the cache has; None if it has none, or those of other images than `keys`."""
    stored = cache.commit.get("feature_statistics")
    if not isinstance(stored, dict) or stored.get("images") != _digest(cache, _rows(cache, keys)):
        return None
    return FeatureStatistics(np.array(stored["mean"], np.float64), np.array(stored["std"], np.float64))


def compute_statistics(cache: TargetCache, keys: Iterable[ImageKey]) -> FeatureStatistics:
    """One pass over the region embeddings of the images: float64 sums, one row of the cache after the other, whatever the order of
    `keys`. Raises what `TargetCache.read` raises."""
    return statistics_of_rows(cache, _rows(cache, keys))


def committed_statistics(cache: TargetCache, keys: Iterable[ImageKey]) -> dict[str, Any] | None:
    """What stage one writes into the commit; None if the cache has no embeddings of these images."""
    known = cache.index.place
    rows = _rows(cache, (key for key in keys if key in known))
    if not cache.layout.features or not rows:
        return None
    mean, std = statistics_of_rows(cache, rows)
    return {"images": _digest(cache, rows), "mean": mean.tolist(), "std": std.tolist()}


def statistics_of_rows(cache: TargetCache, rows: Sequence[int]) -> FeatureStatistics:
    """As `compute_statistics`, of these rows in their order."""
    count, total, squares = 0, np.zeros(cache.layout.features), np.zeros(cache.layout.features)
    for row in rows:
        height, width = -(-cache.record("extents", row)[:2] // cache.layout.region_stride)
        cells = cache.embeddings(row)[:, :height, :width].astype(np.float64)
        count += int(height * width)
        total, squares = total + cells.sum((1, 2)), squares + (cells**2).sum((1, 2))
    mean = total / count
    return FeatureStatistics(mean, np.sqrt(np.maximum(squares / count - mean**2, 0)))


def _rows(cache: TargetCache, keys: Iterable[ImageKey]) -> list[int]:
    return sorted({cache.row(key) for key in keys})


def _digest(cache: TargetCache, rows: list[int]) -> str:
    """Names the images of these rows."""
    positions = cache.index.rows.searchsorted(rows).tolist()
    return hashlib.sha256(canonical([list(cache.index.key(position)) for position in positions])).hexdigest()
