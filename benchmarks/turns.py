"""Readers that take turns. Needs numpy and what the reader of teacher caches needs, so it runs in any environment."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mgd_pipeline.caches.format import ARRAYS, Layout, shard_path

Read = Callable[[str, list[int], np.ndarray], object]
"""Reads rows of one array into a buffer of their shape."""
BATCH = 16
READ = ("logits", "logits_affine", "region_embeddings", "extents")
"""What `TargetCache.read` returns of an image."""
LIMIT = "limit: os.preadv into a buffer"


def raw_reader(path: Path, layout: Layout) -> Read:
    """The limit: `os.preadv` of the same bytes of the same files into a buffer, at known places."""
    per_shard, files = layout.rows_per_shard, {}
    for name in ARRAYS:
        count = len(list((path / name / "c").iterdir()))
        files[name] = [os.open(shard_path(path, layout, name, shard), os.O_RDONLY) for shard in range(count)]
    sizes = {name: layout.bytes_of(name) for name in ARRAYS}

    def read(name: str, rows: list[int], into: np.ndarray) -> None:
        size, descriptors, buffer = sizes[name], files[name], into.reshape(-1).view(np.uint8).data
        for i, row in enumerate(rows):
            shard, slot = divmod(row, per_shard)
            os.preadv(descriptors[shard], (buffer[i * size : i * size + size],), slot * (size + 4))

    return read


def seconds_an_image(contenders: dict[str, Callable[[list[int]], object]], count: int, rounds: int) -> dict[str, float]:
    """Median over rounds of turns. In a turn a reader reads batches of random rows for 20 ms, and at least one batch."""
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, read in contenders.items():
            batches = [rng.integers(count, size=BATCH).tolist() for _ in range(200)]
            read(batches[0])  # what the one before left in the processor's caches is no part of it
            start, done = time.perf_counter(), 0
            for rows in batches:
                read(rows)
                done += 1
                if time.perf_counter() - start > 0.02:
                    break
            times[name].append((time.perf_counter() - start) / done / BATCH)
    return {name: statistics.median(values) for name, values in times.items()}
