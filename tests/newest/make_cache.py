"""Run by `make test-newest` in both environments: builds a small cache with a gap, or grows the one that another environment built.

    python tests/newest/make_cache.py FOLDER COUNT

FOLDER/t.zarr gets COUNT images, FOLDER/values what mgd-pipeline reads from it, for `read_cache.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from caches import build, image, images, require_all_right


def main(folder: Path, count: int) -> None:
    path = build(folder, [*images(count), image("bad 1")], retry_skipped=False)
    cache = require_all_right(path, images(count))
    rows = cache.index.rows[cache.index.has_targets]
    (folder / "values").mkdir(exist_ok=True)
    np.save(folder / "values/rows.npy", rows)
    for name in cache.layout.records:
        np.save(folder / f"values/{name}.npy", np.stack([cache.record(name, int(row)) for row in rows]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
