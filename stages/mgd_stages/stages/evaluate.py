"""Stage 5, evaluate: both students on held-out images, beside the teachers; one table, per-class IoU, pictures and masks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from rich.table import Table

from mgd_pipeline.data.manifest import Manifest, read_manifest
from mgd_pipeline.durable import renew_folder, replace_file
from mgd_pipeline.errors import DataError, shell_command
from mgd_pipeline.metrics import iou_by_class, rare_numbers
from mgd_pipeline.networks.inference import OVERLAP
from mgd_pipeline.networks.weights import read_metadata, save_weights
from mgd_pipeline.params import STUDENTS
from mgd_pipeline.pictures.overlays import save_overlay
from mgd_pipeline.students.student import Student
from mgd_pipeline.words import per_cent
from mgd_stages.run.class_tables import class_tsv, confusion_csv, read_numbers
from mgd_stages.run.finished_student import finished_student
from mgd_stages.run.held_out import Evaluation, evaluate_network, evaluated_rows, labelled_counts, predict_row
from mgd_stages.run.machine import require_writable
from mgd_stages.run.pictures import Predicted, extremes, write_masks
from mgd_stages.run.progress import console, write_json
from mgd_stages.run.project import Project
from mgd_stages.run.verdicts import (
    LABELS,
    better_student,
    findings,
    measured_before,
    unmeasured,
    verdicts,
    what_is_rare,
    why_best,
)


def evaluate(project: Project, *, device: torch.device) -> None:
    """Evaluates the students that exist; writes data/results/evaluation/ and data/students/best.safetensors, and prints the table.

    The best student is a copy of the one that `better_student` chooses. Its metadata says which one it is, and why.
    """
    manifest = read_manifest(project.manifest, project.base)
    files = {name: project.student(name) for name in STUDENTS if project.student(name).exists()}
    if not files:
        raise DataError(f"{project.base / 'data/students'}: holds no student; run `mgd-pipeline train-student`")
    evaluated_rows(project, manifest)
    folder = project.results / "evaluation"
    written = [folder / name for name in ("confusion.csv", "class_iou.tsv", "masks.parquet", "metrics.json")]
    require_writable([folder / "overlays"], [*written, project.best_student])
    # All of them before the first image: a student that does not fit must not be noticed after hours.
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    students = {name: finished_student(name, path, device, manifest) for name, path in files.items()}
    measured_before(project)
    labelled = labelled_counts(manifest)
    evaluations = {
        name: evaluate_network(project, manifest, student.network, student.normalisation, f"evaluate {name}")
        for name, student in students.items()
    }
    # Numbers before pictures: whatever fails at a picture leaves them whole.
    first = next(iter(evaluations))
    ious = {name: iou_by_class(measured.confusion, manifest.classes) for name, measured in evaluations.items()}
    rare = {name: rare_numbers(measured.confusion, labelled, manifest.classes) for name, measured in evaluations.items()}
    summary = {name: {**measured.summary(), **rare[name], "sha256": digests[name]} for name, measured in evaluations.items()}
    masks = [
        Predicted(name, image_id, measured.image_miou[image_id], mask)
        for name, measured in evaluations.items()
        for image_id, mask in measured.masks.items()
    ]
    replace_file(folder / "confusion.csv", confusion_csv(evaluations[first].confusion, manifest.classes))
    replace_file(folder / "class_iou.tsv", class_tsv(ious, manifest.classes))
    best = better_student(
        {name: measured.confusion for name, measured in evaluations.items()},
        {name: measured.image_confusions for name, measured in evaluations.items()},
    )
    _save_best(project, manifest, students[best], best, summary, len(evaluations[best].image_miou))
    write_json(folder / "metrics.json", {"split": project.params.evaluation.split, **summary})
    write_masks(folder / "masks.parquet", masks, manifest.palette)  # before the table, which says of how many images it is
    show_table(project)
    _write_overlays(project, manifest, best, students[best], evaluations[best])
    console.print(f"overlays show the {LABELS[best]}{', which has the higher mIoU' if best != first else ''}")


def _save_best(
    project: Project, manifest: Manifest, student: Student, name: str, summary: Mapping[str, Mapping[str, Any]], images: int
) -> None:
    """Writes the student that was measured, with its tensors and metadata, the project's names and colours of the classes, and
    under "best" which student it is and why."""
    split, mious = project.params.evaluation.split, {key: numbers["miou"] for key, numbers in summary.items()}
    best = {
        "student": name,
        "why": why_best(mious, name, split, images),
        "miou": mious,
        "split": split,
        "images": images,
        "sha256": summary[name]["sha256"],
    }
    shown = {"classes": list(manifest.classes), "palette": [list(colour) for colour in manifest.palette]}
    save_weights(project.best_student, student.network.model.state_dict(), {**student.metadata, **shown, "best": best})


def show_table(project: Project) -> None:
    """Prints the table of the last evaluation, students and teachers with IoU, parameters and MACs, and what it says."""
    path = project.results / "evaluation/metrics.json"
    summary = read_numbers(path)
    if summary is None:
        raise DataError(f"{path}: no such file; run `mgd-pipeline evaluate`")
    measured, lines = findings(project), []
    for name in ("supervised", "distilled"):
        if name in summary:
            lines.append((name, f"{LABELS[name]} ({_encoder(project, name)})", summary[name]))
    for name, teacher in project.params.teachers.items():
        network = ", ".join(teacher.network_names)
        lines.append((name, f"teacher {name} ({network})", read_numbers(project.results / f"teachers/{name}.json")))
    crop = "x".join(str(side) for side in project.params.views.crop)
    table = Table(title=f"{project.name}, {summary['split']} split")
    table.add_column("network", overflow="fold")
    for column in ("mIoU,\n%", "rare\nthird, %", "parameters,\nM", f"GMACs at\n{crop}"):
        table.add_column(column, justify="right")
    for name, label, row in lines:
        if row is not None:
            ious = per_cent(row.get("miou")), per_cent(measured.rare_mious.get(name))
            table.add_row(label, *ious, f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.2f}")
    console.print(table)
    if measured.rare:
        console.print(what_is_rare(measured.rare))
    for line in [*verdicts(measured), *unmeasured(project)]:
        console.print(line)
    files = {"best": project.best_student, **{name: project.student(name) for name in STUDENTS}}
    for name, file in files.items():
        if file.exists():
            console.print(f"student, {name}: {file}")
    settings = project.params.evaluation
    if settings.window is not None:
        overlap = ["--overlap", repr(settings.overlap)] if settings.overlap != OVERLAP else []
        same = shell_command("mgd-pipeline", "predict", "--window", f"{settings.window[0]}x{settings.window[1]}", *overlap)
        console.print(f"these numbers were measured through windows (evaluation.window); `{same}` gives the same masks")
    console.print(f"pictures and numbers: {path.parent}")


def _encoder(project: Project, name: str) -> str:
    """The encoder of a student by its file, or else by params.yaml; and how it was trained, if from unlabelled images alone."""
    path = project.student(name)
    notes = read_metadata(path) if path.exists() else {}
    encoder = str(notes.get("network", {}).get("encoder", project.params.student.network.encoder))
    return f"{encoder}, {notes['method']}" if "method" in notes else encoder


def _write_overlays(project: Project, manifest: Manifest, name: str, student: Student, measured: Evaluation) -> None:
    """Image, truth and prediction of the worst, median and best images; replaces the pictures of an earlier evaluation."""
    chosen = extremes(measured.image_miou, project.params.evaluation.overlays, median=True)
    renew_folder(project.results / "evaluation/overlays")  # DVC expects it, even of images without a class
    for group, members in chosen.items():
        for place, image_id in enumerate(members, 1):
            row = manifest.rows[image_id]
            prediction = predict_row(project, manifest, student.network, student.normalisation, row)
            save_overlay(
                project.results / f"evaluation/overlays/{group}_{place}.png",
                manifest.whole_image(row),
                {"truth": manifest.mask(row), LABELS[name]: prediction},
                manifest.classes,
                manifest.palette,
                title=f"{group} {place}: {image_id}, mIoU {per_cent(measured.image_miou[image_id])} %",
            )
