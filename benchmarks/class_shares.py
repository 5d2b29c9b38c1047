"""What is in the unlabelled training images, by their masks, by the stored cells and by the global descriptors of each teacher.

python benchmarks/class_shares.py runs/camvid

Shares of all pixels and of all cells, in %: a class whose share of cells is the smaller is named too seldom. Rank correlations
(Spearman) over the images, with a class's share of an image's mask: what a sampler that looks for rare classes could go by.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from mgd_pipeline.caches.decoding import class_cells
from mgd_pipeline.caches.reader import open_cache
from unlabelled import open_unlabelled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path, help="folder of params.yaml, with finished targets")
    arguments = parser.parse_args()
    project, manifest, rows = open_unlabelled(arguments.project)
    classes = len(manifest.classes)

    masks_NK = np.stack([_counts(manifest.mask(row), classes) for row in rows])
    shares = {"masks": masks_NK}
    tellers: dict[str, np.ndarray] = {}
    for name in project.params.teachers:
        store = open_cache(project.targets(name))
        if store.layout.classes == 0:
            continue
        shares[f"cells of {name}"] = np.stack([_counts(class_cells(store, row.image_id)[0], classes) for row in rows])
        tellers[f"cells of {name}"] = _of_each(shares[f"cells of {name}"])
        tellers[f"global descriptors of {name}"] = np.stack(
            [store.record("global_descriptors", store.index.rows[store.index.by_id[row.image_id]]) for row in rows]
        )

    print(f"{len(rows)} unlabelled images of {arguments.project}\n")
    header = " | ".join(manifest.classes) + " |\n" + "|---" * (classes + 1) + "|"
    print(f"| share, % | {header}")
    for name, counts_NK in shares.items():
        share_K = 100 * _of_each(counts_NK.sum(0))
        print(f"| {name} | " + " | ".join(f"{share:.2f}" for share in share_K) + " |")
    print(f"\n| rank correlation | {header}")
    for name, told_NK in tellers.items():
        found = [_rank_correlation(told_NK[:, k], _of_each(masks_NK)[:, k]) for k in range(classes)]
        print(f"| {name} | " + " | ".join(found) + " |")


def _counts(labels: np.ndarray, classes: int) -> np.ndarray:
    """(K,) pixels or cells of each class; what is 255 (ignore) counts nowhere."""
    return np.bincount(labels.ravel(), minlength=256)[:classes]


def _of_each(counts: np.ndarray) -> np.ndarray:
    """Counts (..., K) as shares of their sum over the classes."""
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def _rank_correlation(told: np.ndarray, true: np.ndarray) -> str:
    """A dash where one of them is the same in every image, such as a class that nobody names."""
    if np.ptp(told) == 0 or np.ptp(true) == 0:
        return "-"
    return f"{spearmanr(told, true)[0]:.2f}"


if __name__ == "__main__":
    main()
