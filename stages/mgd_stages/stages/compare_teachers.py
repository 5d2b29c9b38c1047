"""Stage compare-teachers: what the teacher caches say of the labelled images, and where the teachers disagree.

The stage needs no teacher and no device: it reads the stored targets alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from rich.table import Table

from mgd_pipeline.caches.decoding import class_cells, stored_scores
from mgd_pipeline.caches.provenance import expected_provenance
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.data.datasets import names_of
from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.data.manifest import Manifest, read_manifest
from mgd_pipeline.durable import renew_folder, replace_file
from mgd_pipeline.errors import CacheIncomplete
from mgd_pipeline.metrics import (
    calibration_bins,
    confusion_matrix,
    expected_calibration_error,
    iou_by_class,
    mean_iou,
    rare_numbers,
)
from mgd_pipeline.networks.inference import resize_logits
from mgd_pipeline.pictures.overlays import save_overlay
from mgd_pipeline.words import defined, per_cent
from mgd_stages.run.class_tables import class_tsv, confusion_csv
from mgd_stages.run.head_caches import refuse_stale_heads
from mgd_stages.run.held_out import best_classes
from mgd_stages.run.machine import require_writable
from mgd_stages.run.pictures import Predicted, to_look_at, write_masks
from mgd_stages.run.progress import console, progress, say_renamed, write_json
from mgd_stages.run.project import Project
from mgd_stages.run.verdicts import findings, stored_verdicts, what_is_rare
from mgd_stages.run.weak_teachers import weak_teachers

_CONFIDENT = 0.95
"""Probability from which on a pixel counts as confident, FixMatch's threshold (Sohn et al., 2020)."""
_PICTURES = 10


def compare_teachers(project: Project) -> None:
    """Measures the stored targets on the labelled images, and where teachers disagree on all images.

    Writes data/results/compare-teachers/: metrics.json, a confusion matrix for each teacher, and in disagreement/ the IoU of each
    class between two teachers, and pictures of the images on which the teachers differ most.
    """
    manifest = read_manifest(project.manifest, project.base, names_of(project.params.data))
    folder = project.results / "compare-teachers"
    confusions = {name: folder / f"{name}-confusion.csv" for name in project.params.teachers}
    require_writable([folder / "disagreement"], [folder / "metrics.json", *confusions.values()])
    findings(project)  # what `weak_teachers` reads at the end: a damaged file must not be noticed after the work
    caches = _open_caches(project, manifest)
    compared = _compare(manifest, caches)

    # --- numbers first: whatever fails at a picture leaves them whole
    summary = _summary(compared, manifest.classes)
    agreement = {" and ".join(pair): iou_by_class(counts, manifest.classes) for pair, counts in compared.together.items()}
    nothing = np.zeros((len(manifest.classes),) * 2, np.int64)
    for name, path in confusions.items():  # DVC expects the file of every teacher, also of one that gives embeddings only
        confusion = compared.teachers[name].confusion if name in compared.teachers else nothing
        replace_file(path, confusion_csv(confusion, manifest.classes))
    write_json(folder / "metrics.json", summary)
    renew_folder(folder / "disagreement")
    replace_file(folder / "disagreement/class_agreement.tsv", class_tsv(agreement, manifest.classes))
    _show(summary, list(caches), agreement)

    # --- pictures
    most = sorted(compared.disagreement.items(), key=lambda item: -item[1])[:_PICTURES]
    masks: list[Predicted] = []
    for place, (image_id, share) in enumerate(most, 1):
        differing = _save_disagreement(project, manifest, caches, image_id, f"{place:02d}.png", share)
        masks += [Predicted(name, image_id, share, to_look_at(mask)) for name, mask in differing.items()]
    write_masks(folder / "disagreement/masks.parquet", masks, manifest.palette)
    console.print(f"pictures and numbers: {folder}")
    if line := weak_teachers(project, manifest):
        console.print(line)


def _open_caches(project: Project, manifest: Manifest) -> dict[str, TargetCache]:
    """The caches of the teachers that name classes."""
    caches = {}
    for name, teacher in project.params.teachers.items():
        expected = expected_provenance(teacher, project.params.targets, manifest.classes, manifest.long_side)
        caches[name] = cache = open_cache(project.targets(name), expected)
        say_renamed(f"the teacher cache of {name}", cache.provenance["classes"], manifest.classes)
    refuse_stale_heads(project, caches)
    return {name: cache for name, cache in caches.items() if cache.layout.classes}


@dataclass
class _OfTeacher:
    """Sums over images: on labelled images at the pixels of their masks, on all images at the cells of the cache."""

    confusion: np.ndarray
    """(K, K) int64 pixels, rows = truth"""
    bins: np.ndarray = field(default_factory=lambda: np.zeros((3, 15)))
    confident: int = 0
    cells: int = 0


@dataclass
class _Compared:
    teachers: dict[str, _OfTeacher]
    together: dict[tuple[str, str], np.ndarray]
    """(K, K) int64 cells of each pair of teachers, rows = the first teacher"""
    disagreement: dict[str, float] = field(default_factory=dict)
    """Of each image the share of cells on which two teachers differ, the mean over pairs; empty with one teacher"""


def _compare(manifest: Manifest, caches: dict[str, TargetCache]) -> _Compared:
    rows = [row for row in manifest.training if all(manifest.key(row) in cache.index.place for cache in caches.values())]
    if not rows:
        raise CacheIncomplete("the teacher caches have none of the training images; run `mgd-pipeline precompute-teachers`")
    classes, labelled = len(manifest.classes), {row.image_id for row in manifest.labelled}
    compared = _Compared(
        {name: _OfTeacher(np.zeros((classes, classes), np.int64)) for name in caches},
        {pair: np.zeros((classes, classes), np.int64) for pair in combinations(caches, 2)},
    )
    with progress("compare-teachers", len(rows), "image") as advance:
        for done, row in enumerate(rows, 1):
            cells: dict[str, np.ndarray] = {}
            for name, cache in caches.items():
                sums = compared.teachers[name]
                cells[name], probability = class_cells(cache, row.image_id)
                sums.confident += int((probability >= _CONFIDENT).sum())
                sums.cells += probability.size
                if row.image_id in labelled:
                    truth = manifest.mask(row)
                    scores = resize_logits(stored_scores(cache, row.image_id), (truth.shape[0], truth.shape[1]))
                    sums.confusion += confusion_matrix(truth, best_classes(scores), classes)
                    sums.bins += calibration_bins(truth, scores.softmax(0).numpy())
            for (a, b), counts in compared.together.items():
                counts += confusion_matrix(cells[a], cells[b], classes)
            if differ := [(cells[a] != cells[b]).mean() for a, b in compared.together]:
                compared.disagreement[row.image_id] = float(np.mean(differ))
            advance(done, "")
    return compared


def _summary(compared: _Compared, classes: Sequence[str]) -> dict[str, Any]:
    """Plain numbers for JSON."""
    summary: dict[str, Any] = {
        name: {
            "miou_labelled": defined(mean_iou(sums.confusion)),
            # Here the truth is the labelled images themselves.
            "rare_miou_labelled": (rare := rare_numbers(sums.confusion, sums.confusion.sum(1), classes))["rare_miou"],
            "rare_classes": rare["rare_classes"],
            "ece_labelled": defined(expected_calibration_error(sums.bins)),
            "confident_share": round(sums.confident / sums.cells, 6),
        }
        for name, sums in compared.teachers.items()
    }
    for pair, counts in compared.together.items():
        summary[" and ".join(pair)] = {"same_class_share": round(float(np.trace(counts) / counts.sum()), 6)}
    return summary


def _save_disagreement(
    project: Project, manifest: Manifest, caches: dict[str, TargetCache], image_id: str, file: str, share: float
) -> dict[str, np.ndarray]:
    """Writes the picture, and returns what it shows: each teacher's mask, (H, W) uint8, void where the teachers agree."""
    masks = {name: best_classes(stored_scores(cache, image_id)) for name, cache in caches.items()}
    first, *others = masks.values()
    differ = np.any([other != first for other in others], axis=0)
    masks = {name: np.where(differ, mask, IGNORE).astype(np.uint8) for name, mask in masks.items()}
    save_overlay(
        project.results / f"compare-teachers/disagreement/{file}",
        manifest.image(manifest.rows[image_id]),
        {f"teacher {name}": mask for name, mask in masks.items()},
        manifest.classes,
        manifest.palette,
        title=f"{image_id}: the teachers differ on {100 * share:.1f} %; void where they agree",
    )
    return masks


def _show(summary: dict[str, Any], teachers: list[str], agreement: dict[str, dict[str, float]]) -> None:
    table = Table(title="stored targets")
    table.add_column("teacher")
    for column in ("mIoU on labelled images, %", "rare third, %", "calibration error", f"cells above {_CONFIDENT:g}, %"):
        table.add_column(column, justify="right")
    for name in teachers:
        row = summary[name]
        error = "-" if row["ece_labelled"] is None else f"{row['ece_labelled']:.3f}"
        ious = per_cent(row["miou_labelled"]), per_cent(row["rare_miou_labelled"])
        table.add_row(name, *ious, error, per_cent(row["confident_share"]))
    console.print(table)
    if teachers and (rare := summary[teachers[0]]["rare_classes"]):
        console.print(what_is_rare(rare))
    for line in stored_verdicts(summary, teachers):
        console.print(line)
    for pair, of_classes in agreement.items():
        least = sorted(of_classes.items(), key=lambda item: item[1])[:3]
        console.print(
            f"{pair}: the same class on {per_cent(summary[pair]['same_class_share'])} % of the cells; least agreed on (IoU): "
            + ", ".join(f"{name} {100 * value:.0f} %" for name, value in least)
        )
