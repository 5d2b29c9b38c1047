"""Run by `make test-newest`: a small cache that has grown, with a gap, and what mgd-pipeline reads from it, for `read_cache.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from caches import build, image, images
from mgd_pipeline.caches.reader import open_cache


def main(folder: Path) -> None:
    build(folder, [*images(5), image("bad 1")])
    cache = open_cache(build(folder, [*images(14), image("bad 1")], retry_skipped=False))
    rows = cache.index.rows[cache.index.has_targets]
    (folder / "values").mkdir(exist_ok=True)
    np.save(folder / "values/rows.npy", rows)
    for name in cache.layout.records:
        np.save(folder / f"values/{name}.npy", np.stack([cache.record(name, int(row)) for row in rows]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
