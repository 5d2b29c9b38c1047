"""The quality of a teacher on held-out images, measured when its targets have been made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mgd_pipeline.data.manifest import ImageRow
from mgd_pipeline.durable import replace_file
from mgd_pipeline.metrics import calibration_bins, confusion_matrix, expected_calibration_error, mean_iou, rare_numbers
from mgd_pipeline.params import TargetsParams
from mgd_pipeline.words import defined, per_cent
from mgd_stages.run.class_tables import confusion_csv
from mgd_stages.run.held_out import best_classes, evaluated_rows, labelled_counts
from mgd_stages.run.loaded_head import Loaded, LoadedHead
from mgd_stages.run.pictures import Predicted, to_look_at, write_masks
from mgd_stages.run.progress import console, progress, write_json
from mgd_stages.run.project import Project
from mgd_stages.run.verdicts import why_undefined

_OTHER_LOOKS = {"one_look": "with one plain look", "mirrored": "on mirror images", "float32": "in float32"}
"""Words for other ways of looking, by the ending of their keys in the teacher's metrics."""


def quality_files(project: Project, name: str) -> list[Path]:
    """What `evaluate_teacher` writes."""
    return [project.results / f"teachers/{name}{end}" for end in (".json", "-confusion.csv", "-masks.parquet")]


def evaluate_teacher(loaded: Loaded) -> None:
    """Measures a teacher on the evaluation split, seen as for its targets, and writes `quality_files`.

    What `targets` asks for beyond one plain look in float32 is measured beside the plain look: mIoU, and the share of pixels of
    the same class.
    """
    project, name, classes = loaded.project, loaded.name, loaded.manifest.classes
    summary: dict[str, Any] = dict(zip(("parameters", "macs"), loaded.cost(), strict=True))
    masks: list[Predicted] = []
    total = np.zeros((len(classes), len(classes)), np.int64)  # DVC expects the file of every teacher
    if loaded.channels[0]:
        measured = measure_teacher(loaded, evaluated_rows(project, loaded.manifest), masks)
        total, others = measured.total, measured.other_totals
        summary |= {"miou": defined(mean_iou(total)), "ece": defined(expected_calibration_error(measured.bins))}
        summary |= rare_numbers(total, labelled_counts(loaded.manifest), classes)
        for key, other in others.items():
            summary |= {f"miou_{key}": defined(mean_iou(other)), f"agreement_{key}": round(measured.same[key] / measured.pixels, 6)}
    numbers, confusion, pictures = quality_files(project, name)
    replace_file(confusion, confusion_csv(total, classes))
    console.print(_sentence(loaded, summary, bool(total.sum())))
    write_json(numbers, summary)  # numbers before pictures
    write_masks(pictures, masks, loaded.manifest.palette)


class _Measured:
    """Sums over images."""

    def __init__(self, classes: int, others: dict[str, tuple[TargetsParams, bool]]) -> None:
        self.total, self.bins = np.zeros((classes, classes), np.int64), np.zeros((3, 15))
        self.other_totals = {key: np.zeros((classes, classes), np.int64) for key in others}
        self.same, self.pixels = dict.fromkeys(others, 0), 0


def measure_teacher(loaded: Loaded, rows: list[ImageRow], masks: list[Predicted]) -> _Measured:
    """The sums, and into `masks` what the teacher says of each image."""
    options, classes = loaded.project.params.targets, len(loaded.manifest.classes)
    others = _other_looks(options)
    if isinstance(loaded, LoadedHead):  # for other looks at an image it would need the network behind the embeddings
        others = {key: other for key, other in others.items() if key == "mirrored"}
    sums = _Measured(classes, others)
    with progress(f"precompute-teachers {loaded.name}: evaluate", len(rows), "image") as advance:
        for done, row in enumerate(rows, 1):
            says, truth = loaded.on(row), loaded.manifest.mask(row)
            scores = says(options, False, truth.shape)
            prediction = best_classes(scores)
            confusion = confusion_matrix(truth, prediction, classes)
            sums.total += confusion
            sums.bins += calibration_bins(truth, scores.softmax(0).cpu().numpy())
            sums.pixels += prediction.size
            masks.append(Predicted(loaded.name, row.image_id, mean_iou(confusion), to_look_at(prediction)))
            for key, (other_options, mirrored) in others.items():
                other = says(other_options, mirrored, truth.shape)
                other_prediction = best_classes(other.flip(-1) if mirrored else other)
                sums.other_totals[key] += confusion_matrix(truth, other_prediction, classes)
                sums.same[key] += int((other_prediction == prediction).sum())
            advance(done, f"mIoU {per_cent(mean_iou(sums.total))}")
    return sums


def _other_looks(options: TargetsParams) -> dict[str, tuple[TargetsParams, bool]]:
    """What the targets' way of looking is compared with: options, and whether the teacher sees the mirror image."""
    looks = {}
    if options.tta is not None or options.window is not None:
        looks["one_look"] = TargetsParams(precision=options.precision), False
    if options.mirrored:
        looks["mirrored"] = options, True
    if options.precision != "float32":
        looks["float32"] = options.model_copy(update={"precision": "float32"}), False
    return looks


def _sentence(loaded: Loaded, summary: dict[str, Any], measured: bool) -> str:
    if "miou" not in summary:
        return f"teacher {loaded.name}: gives embeddings only, which no label measures"
    split = loaded.project.params.evaluation.split
    said = f"teacher {loaded.name}: {per_cent(summary['miou'])} mIoU on {split}"
    for key, what in _OTHER_LOOKS.items():
        if f"miou_{key}" in summary:
            alike = f"{100 * summary[f'agreement_{key}']:.2f} % of the pixels alike"
            said += f", {per_cent(summary[f'miou_{key}'])} {what} ({alike})"
    return f"{said}; calibration error {summary['ece']:.3f}" if measured else f"warning: {said}: {why_undefined(split)}"
