"""Stage 5, evaluate: both students on held-out images, beside the teachers; one table, per-class IoU, pictures and masks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from mgd_pipeline.data.images import read_image, read_mask
from mgd_pipeline.data.manifest import ImageRow, Manifest, read_manifest, require_classes
from mgd_pipeline.durable import renew_folder, replace_file
from mgd_pipeline.errors import DataError, shell_command
from mgd_pipeline.metrics import confusion_matrix, iou_by_class, mean_iou
from mgd_pipeline.networks.counting import multiply_accumulates, parameter_count
from mgd_pipeline.networks.inference import OVERLAP, predict_logits, resize_logits
from mgd_pipeline.networks.normalisation import Normalisation
from mgd_pipeline.networks.segmentation import SegmentationNetwork
from mgd_pipeline.networks.weights import read_metadata
from mgd_pipeline.params import STUDENTS
from mgd_pipeline.pictures.overlays import save_overlay
from mgd_pipeline.students.student import Student, load_student
from mgd_pipeline.words import defined, per_cent
from mgd_stages.run.class_tables import class_tsv, confusion_csv, read_numbers
from mgd_stages.run.machine import require_writable
from mgd_stages.run.pictures import Predicted, extremes, to_look_at, write_masks
from mgd_stages.run.progress import console, progress, write_json
from mgd_stages.run.project import Project
from mgd_stages.run.verdicts import findings, measured_before, unmeasured, verdicts


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
        """Plain numbers for JSON; None for what is undefined because no pixel has a class."""
        pixels = self.confusion.sum()
        return {
            "miou": defined(self.miou),
            "pixel_accuracy": defined(np.diag(self.confusion).sum() / pixels) if pixels else None,
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
            advance(done, f"mIoU {per_cent(mean_iou(total))}")
    crop = project.params.views.crop
    return Evaluation(total, image_miou, masks, parameter_count(network), multiply_accumulates(network, crop[0], crop[1]))


def evaluate(project: Project, *, device: torch.device) -> None:
    """Evaluates the students that exist; writes data/results/evaluation/ and prints the table."""
    manifest = read_manifest(project.manifest, project.base)
    files = {name: project.student(name) for name in STUDENTS if project.student(name).exists()}
    if not files:
        raise DataError(f"{project.base / 'data/students'}: holds no student; run `mgd-pipeline train-student`")
    evaluated_rows(project, manifest)
    folder = project.results / "evaluation"
    require_writable(
        [folder / "overlays"], [folder / name for name in ("confusion.csv", "class_iou.tsv", "masks.parquet", "metrics.json")]
    )
    # All of them before the first image: a student that does not fit is not found behind one that took hours.
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    students = {name: _load(path, device, manifest) for name, path in files.items()}
    measured_before(project)
    summary: dict[str, object] = {"split": project.params.evaluation.split}
    ious: dict[str, dict[str, float]] = {}
    masks: list[Predicted] = []
    shown: tuple[Student, Evaluation] | None = None
    for name, student in students.items():
        found = evaluate_network(project, manifest, student.network, student.normalisation, f"evaluate {name}")
        summary[name] = {**found.summary(), "sha256": digests[name]}
        ious[name] = iou_by_class(found.confusion, manifest.classes)
        masks += [Predicted(name, image_id, found.image_miou[image_id], mask) for image_id, mask in found.masks.items()]
        shown = shown or (student, found)
    assert shown is not None
    # Numbers before pictures: whatever fails at a picture leaves them whole.
    replace_file(folder / "confusion.csv", confusion_csv(shown[1].confusion, manifest.classes))
    replace_file(folder / "class_iou.tsv", class_tsv(ious, manifest.classes))
    write_json(folder / "metrics.json", summary)
    write_masks(folder / "masks.parquet", masks, manifest.palette)  # before the table, which says of how many images it is
    show_table(project)
    _write_overlays(project, manifest, *shown)


def _load(path: Path, device: torch.device, manifest: Manifest) -> Student:
    """A student that fits the data set. Raises DataError for one of other classes, or of another size of the images."""
    student = load_student(path, device)
    if student.classes != list(manifest.classes):
        raise DataError(
            f"{path}: was trained for the classes {_few(student.classes)}, and the data set has {_few(manifest.classes)}; run "
            "`mgd-pipeline train-student` again, or move the student away"
        )
    if student.long_side != manifest.long_side:
        raise DataError(
            f"{path}: was trained with data.long_side {student.long_side}, and the data set is prepared with "
            f"{manifest.long_side}; run `mgd-pipeline train-student` again"
        )
    return student


def _few(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > 6 else ""
    return f"{', '.join(names[:6])}{more}"


def show_table(project: Project) -> None:
    """Prints the table of the last evaluation, students and teachers with mIoU, parameters and MACs, and what it says."""
    path = project.results / "evaluation/metrics.json"
    summary = read_numbers(path)
    if summary is None:
        raise DataError(f"{path}: no such file; run `mgd-pipeline evaluate`")
    lines = []
    for name, label in (("supervised", "labelled images only"), ("distilled", "distilled")):
        if name in summary:
            lines.append((f"student, {label} ({encoder_of(project, name)})", summary[name]))
    for name, teacher in project.params.teachers.items():
        measured = read_numbers(project.results / f"teachers/{name}.json")
        if measured is not None:
            network = ", ".join(str(value) for value in list(teacher.identity.values())[:2])
            lines.append((f"teacher {name} ({network})", measured))
    crop = "x".join(str(side) for side in project.params.views.crop)
    table = Table(title=f"{project.params.data.dataset}, {summary['split']} split")
    table.add_column("network", overflow="fold")
    for column in ("mIoU, %", "parameters, M", f"GMACs at {crop}"):
        table.add_column(column, justify="right")
    for label, row in lines:
        table.add_row(label, per_cent(row.get("miou")), f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.2f}")
    console.print(table)
    for line in [*unmeasured(project), *verdicts(findings(project))]:
        console.print(line)
    for name in STUDENTS:
        if project.student(name).exists():
            console.print(f"student, {name}: {project.student(name)}")
    if line := same_by_predict(project):
        console.print(line)
    console.print(f"pictures and numbers: {path.parent}")


def encoder_of(project: Project, name: str) -> str:
    """The encoder of a student as its file says it; that of params.yaml where no file says it."""
    path = project.student(name)
    network = read_metadata(path).get("network", {}) if path.exists() else {}
    return str(network.get("encoder", project.params.student.network.encoder))


def same_by_predict(project: Project) -> str | None:
    """How `predict` sees images as the evaluation does, where it does not do so without options."""
    settings = project.params.evaluation
    if settings.window is None:
        return None
    options = ["--window", f"{settings.window[0]}x{settings.window[1]}"]
    if settings.overlap != OVERLAP:
        options += ["--overlap", repr(settings.overlap)]
    same = shell_command("mgd-pipeline", "predict", *options)
    return f"these numbers were measured through windows (evaluation.window); `{same}` gives the same masks"


def evaluated_rows(project: Project, manifest: Manifest) -> list[ImageRow]:
    """The images of `evaluation.split` that have a mask. Raises DataError where there is none, or no mask says a class."""
    split = project.params.evaluation.split
    rows = [row for row in manifest.split(split) if row.mask_path is not None]
    if not rows:
        raise DataError(f"evaluation.split: {split} has no images with a mask; choose the other split, or add some")
    require_classes(manifest, project.base, rows, f"the {split} images")
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
    """Image, truth and prediction of the worst, median and best images, in place of those of an earlier evaluation."""
    chosen = extremes(found.image_miou, project.params.evaluation.overlays, median=True)
    renew_folder(project.results / "evaluation/overlays")  # DVC expects it, even of images without a class
    rows = {row.image_id: row for row in manifest.split(project.params.evaluation.split)}
    for group, members in chosen.items():
        for place, image_id in enumerate(members, 1):
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
                title=f"{group} {place}: {image_id}, mIoU {per_cent(found.image_miou[image_id])} %",
            )
