"""Run by reader.py in an environment of its own: the newest zarr and zarrs beside our reader, on a teacher cache of ours.

    python benchmarks/newest.py CACHE ROUNDS

All readers take turns in this one process. Prints JSON: seconds an image for each way and reader, and versions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.core.codec_pipeline as pipelines

from mgd_pipeline.caches.reader import open_cache
from turns import BATCH, LIMIT, READ, raw_reader, seconds_an_image

OURS = "ours"


def opened(path: Path, pipeline: str) -> dict[str, Any]:
    """The arrays of a cache, opened by zarr-python with a codec pipeline."""
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        return {name: zarr.open_array(path / name, mode="r") for name in READ}


def main(path: Path, rounds: int) -> None:
    cache = open_cache(path)
    cache.read(cache.index.rows)  # so that all are verified
    layout, count = cache.layout, len(cache.index)
    buffers = {name: np.ones((BATCH, *shape), dtype) for name, (shape, dtype) in layout.records.items()}
    raw = raw_reader(path, layout)
    batches: dict[str, Callable[[list[int]], object]] = {
        LIMIT: lambda rows: [raw(name, rows, buffers[name]) for name in READ],
        OURS: cache.read,
    }
    singles: dict[str, Callable[[list[int]], object]] = {
        LIMIT: lambda rows: [raw(name, [row], buffers[name]) for row in rows for name in READ],
        OURS: lambda rows: [cache.read([row]) for row in rows],
    }
    versions = {name: version(name) for name in ("zarr", "zarrs", "numpy") if find_spec(name)}
    ways = {f"zarr {versions['zarr']}": f"{pipelines.__name__}.BatchedCodecPipeline"}
    if hasattr(pipelines, "FusedCodecPipeline"):
        ways[f"zarr {versions['zarr']}, FusedCodecPipeline"] = f"{pipelines.__name__}.FusedCodecPipeline"
    if find_spec("zarrs"):
        import zarrs  # noqa: F401  # pyright: ignore[reportMissingImports]: it registers its pipeline

        ways[f"zarrs {versions['zarrs']}"] = "zarrs.ZarrsCodecPipeline"
    for name, pipeline in ways.items():
        arrays = opened(path, pipeline)
        batches[name] = lambda rows, arrays=arrays: [arrays[name].oindex[rows] for name in READ]
        singles[name] = lambda rows, arrays=arrays: [arrays[name][row] for row in rows for name in READ]
        expected: Any = cache.read([1, 0, 1])
        read: Any = batches[name]([1, 0, 1])
        assert all(np.array_equal(a, b) for a, b in zip(expected, read, strict=False)), f"{name} reads something else"
    seconds = {"batches": seconds_an_image(batches, count, rounds), "singles": seconds_an_image(singles, count, rounds)}
    print(json.dumps({**seconds, "versions": {"Python": sys.version.split()[0], **versions}}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
