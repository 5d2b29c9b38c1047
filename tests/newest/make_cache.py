"""Run by `make test-newest` in both environments: builds two small caches with a gap, or grows those of the other environment.

    python tests/newest/make_cache.py FOLDER COUNT

FOLDER/plain and FOLDER/small get a cache t.zarr of COUNT images each, which stores values as they are, or encoded and compressed,
and a folder values with what mgd-pipeline reads from it, for `read_cache.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from caches import LAYOUT, SMALL, build, compute_with, image, images, targets_of
from mgd_pipeline.caches.encoding import TeacherTargets, encode_logits
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.caches.shards import Skipped
from mgd_pipeline.data.manifest import ImageKey


def encoded(keys: Sequence[ImageKey]) -> Iterator[TeacherTargets | Skipped]:
    """Targets in levels, without torch, which the newest environment lacks."""
    for key in keys:
        if key.image_id.startswith("image bad"):
            yield Skipped("truncated")
            continue
        targets = targets_of(key, SMALL)
        logits, regions = encode_logits(targets.logits, "uint8"), targets.region_embeddings.astype(np.float32)
        low = regions.min((1, 2), keepdims=True)
        scale = (regions.max((1, 2), keepdims=True) - low) / 255
        levels = np.rint((regions - low) / scale).astype(np.uint8)
        affine = np.concatenate([low, scale], 2)[:, 0]
        yield TeacherTargets(logits.values, levels, targets.global_descriptor, (logits.offset, logits.scale), affine)


def main(folder: Path, count: int) -> None:
    for kind, layout, compute in (("plain", LAYOUT, compute_with(LAYOUT)), ("small", SMALL, encoded)):
        wanted, values = [*images(count), image("bad 1")], folder / kind / "values"
        values.mkdir(parents=True, exist_ok=True)
        cache = open_cache(build(folder / kind, wanted, layout=layout, compute=compute, retry_skipped=False))
        rows = cache.index.rows[cache.index.has_targets]
        np.save(values / "rows.npy", rows)
        for name in cache.layout.records:
            np.save(values / f"{name}.npy", np.stack([cache.record(name, int(row)) for row in rows]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
