"""Stage 5, evaluate: both students on held-out images, beside the teachers; one table, per-class IoU, pictures and masks."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table

from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import DataError
from mgd_pipeline.images import read_image, read_mask
from mgd_pipeline.manifest import ImageRow, Manifest, read_manifest
from mgd_pipeline.metrics import confusion_matrix, iou_by_class, mean_iou
from mgd_pipeline.networks import Normalisation, SegmentationNetwork, multiply_accumulates, parameter_count
from mgd_pipeline.overlays import save_overlay
from mgd_pipeline.params import STUDENTS
from mgd_pipeline.prediction import Student, load_student, predict_logits, resize_logits
from mgd_stages.class_tables import class_tsv, confusion_csv
from mgd_stages.machine import require_writable
from mgd_stages.pictures import Predicted, to_look_at, write_masks
from mgd_stages.progress import console, progress, write_json
from mgd_stages.project import Project


@dataclass(frozen=True)
class Evaluation:
    """One network on one split."""

    confusion: np.ndarray
    """(K, K) int64 pixels, rows = truth"""
    image_miou: dict[str, float]
    """mIoU of each image alone, over the classes that occur in it; for choosing pictures only"""
    masks: dict[str, np.ndarray]
    """Predicted class ids of each image, (H, W) uint8, small enough to look at"""
    parameters: int
    macs: int
    """Multiply-accumulates of one training crop"""

    @property
    def miou(self) -> float:
        return mean_iou(self.confusion)

    def summary(self) -> dict[str, object]:
        """Plain numbers for JSON."""
        accuracy = float(np.diag(self.confusion).sum() / max(self.confusion.sum(), 1))
        return {
            "miou": round(self.miou, 6),
            "pixel_accuracy": round(accuracy, 6),
            "parameters": self.parameters,
            "macs": self.macs,
        }


def evaluate_network(
    project: Project, manifest: Manifest, network: SegmentationNetwork, normalise: Normalisation, title: str
) -> Evaluation:
    """Confusion matrix over `evaluation.split` at the images' own size, whole image or sliding window."""
    rows = evaluated_rows(project, manifest)
    total = np.zeros((len(manifest.classes),) * 2, np.int64)
    image_miou, masks = {}, {}
    with progress(title, len(rows), "images") as advance:
        for done, row in enumerate(rows, 1):
            truth = read_truth(project, manifest, row)
            prediction = _predict(project, manifest, network, normalise, row, (truth.shape[0], truth.shape[1]))
            confusion = confusion_matrix(truth, prediction, len(manifest.classes))
            total += confusion
            image_miou[row.image_id] = mean_iou(confusion)
            masks[row.image_id] = to_look_at(prediction)
            advance(done, f"mIoU {mean_iou(total) * 100:.1f}")
    crop = project.params.views.crop
    return Evaluation(total, image_miou, masks, parameter_count(network), multiply_accumulates(network, crop[0], crop[1]))


def evaluate(project: Project, *, device: torch.device) -> None:
    """Evaluates the students that exist; writes data/results/evaluation/ and prints the table."""
    manifest = read_manifest(project.manifest, project.base)
    students = {name: project.student(name) for name in STUDENTS if project.student(name).exists()}
    if not students:
        raise DataError(f"{project.base / 'data/students'}: holds no student; run `mgd-pipeline train-student`")
    folder = project.results / "evaluation"
    require_writable(
        [folder / "overlays"], [folder / name for name in ("confusion.csv", "class_iou.tsv", "masks.parquet", "metrics.json")]
    )
    summary: dict[str, object] = {"split": project.params.evaluation.split}
    ious: dict[str, dict[str, float]] = {}
    masks: list[Predicted] = []
    for name, path in students.items():
        student = load_student(path, device)
        if student.classes != list(manifest.classes):
            raise DataError(f"{path}: was trained for {len(student.classes)} other classes than the data set's")
        found = evaluate_network(project, manifest, student.network, student.normalisation, f"evaluate {name}")
        summary[name] = found.summary()
        ious[name] = iou_by_class(found.confusion, manifest.classes)
        masks += [Predicted(name, image_id, found.image_miou[image_id], mask) for image_id, mask in found.masks.items()]
        if name == next(iter(students)):
            replace_file(folder / "confusion.csv", confusion_csv(found.confusion, manifest.classes))
            _write_overlays(project, manifest, student, found)
    replace_file(folder / "class_iou.tsv", class_tsv(ious, manifest.classes))
    write_masks(folder / "masks.parquet", masks, manifest.palette)
    write_json(folder / "metrics.json", summary)
    show_table(project)


def show_table(project: Project) -> None:
    """Prints the table of the last evaluation: students and teachers, mIoU, parameters, MACs."""
    path = project.results / "evaluation/metrics.json"
    try:
        summary = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run `mgd-pipeline evaluate`") from None
    networks = project.params.student.network
    lines = [
        (f"student, {label} ({networks.encoder})", summary[name])
        for name, label in (("supervised", "labelled images only"), ("distilled", "distilled"))
        if name in summary
    ]
    teachers = {}
    for name, teacher in project.params.teachers.items():
        measured = project.results / f"teachers/{name}.json"
        if measured.exists():
            network = ", ".join(str(value) for value in list(teacher.identity.values())[:2])
            found = json.loads(measured.read_text())
            lines.append((f"teacher {name} ({network})", found))
            if "miou" in found:
                teachers[name] = found["miou"]
    crop = "x".join(str(side) for side in project.params.views.crop)
    table = Table(title=f"{project.params.data.dataset}, {summary['split']} split")
    table.add_column("network", overflow="fold")
    for column in ("mIoU, %", "parameters, M", f"GMACs at {crop}"):
        table.add_column(column, justify="right")
    for label, row in lines:
        miou = f"{row['miou'] * 100:.1f}" if "miou" in row else "-"
        table.add_row(label, miou, f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.2f}")
    console.print(table)
    if "distilled" in summary and "supervised" in summary:
        gain = (summary["distilled"]["miou"] - summary["supervised"]["miou"]) * 100
        console.print(f"distillation gains {gain:+.1f} mIoU points over the labelled images alone, at the same number of steps")
        if teachers and max(teachers.values()) < summary["supervised"]["miou"]:
            best = max(teachers, key=lambda name: teachers[name])
            console.print(
                f"warning: even teacher {best} ({teachers[best] * 100:.1f}) is worse than the student without teachers, "
                "which can learn little from it: train teachers longer (teacher_training.steps), or bring better ones"
            )
    for name in STUDENTS:
        if project.student(name).exists():
            console.print(f"student, {name}: {project.student(name)}")
    console.print(f"pictures and numbers: {path.parent}")


def evaluated_rows(project: Project, manifest: Manifest) -> list[ImageRow]:
    """The images of `evaluation.split` that have a mask. Raises DataError where there is none."""
    split = project.params.evaluation.split
    rows = [row for row in manifest.split(split) if row.mask_path is not None]
    if not rows:
        raise DataError(f"evaluation.split: {split} has no images with a mask; choose the other split, or add some")
    return rows


def read_truth(project: Project, manifest: Manifest, row: ImageRow) -> np.ndarray:
    """(H, W) uint8 train ids at the image's own size, 255 = void."""
    assert row.mask_path is not None
    return read_mask(project.base / manifest.root / row.mask_path, np.asarray(manifest.lookup))


def _predict(
    project: Project,
    manifest: Manifest,
    network: SegmentationNetwork,
    normalise: Normalisation,
    row: ImageRow,
    size: tuple[int, int],
) -> np.ndarray:
    """(H, W) uint8 at the image's own size."""
    image = read_image(project.base / manifest.root / row.image_path, manifest.long_side)
    settings = project.params.evaluation
    window = None if settings.window is None else (settings.window[0], settings.window[1])
    logits = predict_logits(network, image, normalise, window=window, overlap=settings.overlap)
    return resize_logits(logits, size).max(0).indices.to(torch.uint8).cpu().numpy()


def _write_overlays(project: Project, manifest: Manifest, student: Student, found: Evaluation) -> None:
    """Image, truth and prediction of the worst, median and best images."""
    count = project.params.evaluation.overlays
    ranked = sorted((miou, image_id) for image_id, miou in found.image_miou.items() if miou == miou)
    middle = max(0, len(ranked) // 2 - count // 2)
    chosen = {"worst": ranked[:count], "median": ranked[middle : middle + count], "best": ranked[::-1][:count]}
    rows = {row.image_id: row for row in manifest.split(project.params.evaluation.split)}
    for group, members in chosen.items():
        for place, (miou, image_id) in enumerate(members, 1):
            row = rows[image_id]
            truth = read_truth(project, manifest, row)
            size = (truth.shape[0], truth.shape[1])
            prediction = _predict(project, manifest, student.network, student.normalisation, row, size)
            save_overlay(
                project.results / f"evaluation/overlays/{group}_{place}.png",
                read_image(project.base / manifest.root / row.image_path),
                {"truth": truth, "prediction": prediction},
                manifest.classes,
                manifest.palette,
                title=f"{group} {place}: {image_id}, mIoU {miou * 100:.1f} %",
            )
