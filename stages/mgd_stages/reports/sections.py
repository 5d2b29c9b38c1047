"""The sections of the report: what each shows of what the stages wrote, or a text that says why there is nothing to show."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mgd_pipeline.errors import DataError
from mgd_pipeline.metrics import iou_by_class
from mgd_pipeline.params import STUDENTS
from mgd_stages.reports import figures
from mgd_stages.run.class_tables import make_again, read_class_tsv, read_confusion, read_numbers, read_text
from mgd_stages.run.project import Project
from mgd_stages.run.verdicts import LABELS

_CURVES = (
    ("Supervised loss", "cross entropy in nats", "supervised", "Against the labels of the labelled views."),
    ("Pixel terms", "cross entropy in nats", "pixel_", "Against what each teacher says of each pixel."),
    ("Region term", "mean squared difference of cosines", "region", "Of the student’s and a teacher’s similarities of regions."),
    ("Image term", "summed difference of logits", "image", "Of the student’s and a teacher’s mean logits of a view."),
    ("Cross pseudo supervision of the teachers", "cross entropy in nats", "cross", "Of the two networks of a teacher’s training."),
    ("Total loss", "weighted sum, no unit", "loss", "What the optimiser sees; runs with other terms are not comparable."),
)
"""Title, unit, what the names of its files begin with, and what is compared."""


class Network(NamedTuple):
    """A student or a teacher that was measured on the evaluation split."""

    key: str
    """distilled, supervised, or the name of a teacher"""
    label: str
    built: str
    measured: dict[str, Any]
    """What its stage wrote: miou (0 to 1), parameters, macs, ..."""
    class_iou: dict[str, float]
    """IoU by class, 0 to 1; empty where it was not measured"""
    series: int
    """Number of its colour, dashes and hatch, on all figures"""


def label_of(key: str) -> str:
    """What a reader calls a student, or the teacher of that name."""
    return LABELS.get(key, f"teacher {key}")


def measured_networks(project: Project, evaluation: dict[str, Any], students: dict[str, dict[str, Any]]) -> list[Network]:
    """Students first, then teachers, with what `evaluate` and `precompute-teachers` measured."""
    params = project.params
    class_iou = read_class_tsv(project.results / "evaluation/class_iou.tsv")
    networks = []
    for i, key in enumerate(STUDENTS):
        if key in evaluation:
            network = students.get(key, {}).get("network", params.student.network.model_dump())
            built = f"{network['decoder']}, {network['encoder']}"
            networks.append(Network(key, LABELS[key], built, evaluation[key], class_iou.get(key, {}), i))
    for i, (name, teacher) in enumerate(params.teachers.items(), len(STUDENTS)):
        measured = read_numbers(project.results / f"teachers/{name}.json")
        if measured is not None:
            classes, confusion = read_confusion(project.results / f"teachers/{name}-confusion.csv") or ([], np.zeros((0, 0)))
            if confusion.sum():
                measured["pixel_accuracy"] = round(float(np.trace(confusion) / confusion.sum()), 6)
            identity = ", ".join(str(value) for value in list(teacher.identity.values())[:2])
            series = i % len(figures.DASHES)
            networks.append(Network(name, f"teacher {name}", identity, measured, iou_by_class(confusion, classes), series))
    return networks


def headline(networks: list[Network]) -> dict[str, Any] | str:
    """The student beside every further network: its twin without teachers, and each teacher."""
    student = next((network for network in networks if network.key in STUDENTS), None)
    if student is None:
        return "No student has been evaluated yet: run `mgd-pipeline train-student` and `mgd-pipeline evaluate`."
    own = student.measured
    return {
        "student": student,
        "others": [
            {
                "network": other,
                "gain": _difference(own.get("miou"), other.measured.get("miou")),
                # The work of your own teacher may not be countable.
                "parameters": own["parameters"] / (other.measured["parameters"] or math.nan),
                "macs": own["macs"] / (other.measured["macs"] or math.nan),
            }
            for other in networks
            if other is not student
        ],
    }


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def class_rows(networks: list[Network], confusion: tuple[list[str], np.ndarray] | None) -> dict[str, Any] | str:
    """IoU of each class and network, in the data set's order, with the share that the class has of the true pixels."""
    shown = [network for network in networks if network.class_iou]
    if not shown:
        return "No IoU of classes has been measured: run `mgd-pipeline evaluate`."
    names = confusion[0] if confusion else list(dict.fromkeys(name for n in shown for name in n.class_iou))
    truth = confusion[1].sum(1) / max(confusion[1].sum(), 1) if confusion else [None] * len(names)
    by_key = {network.key: network.class_iou for network in shown}
    rows = []
    for place, (name, share) in enumerate(zip(names, truth, strict=True)):
        ious = {key: class_iou.get(name) for key, class_iou in by_key.items()}
        student, twin = (ious.get(key) for key in STUDENTS)
        gain = None if student is None or twin is None else student - twin
        rows.append({"id": place, "name": name, "share": None if share is None else float(share), "ious": ious, "gain": gain})
    return {"networks": shown, "rows": rows}


def confusion_rows(confusion: tuple[list[str], np.ndarray] | None, networks: list[Network]) -> dict[str, Any] | str:
    """For each class, the shares of its true pixels that are predicted as each class."""
    if confusion is None or not networks or networks[0].key not in STUDENTS:
        return "There is no confusion matrix: run `mgd-pipeline evaluate`."
    names, counts = confusion
    rows = []
    for name, row in zip(names, counts, strict=True):
        shares = [float(count / row.sum()) if row.sum() else None for count in row]
        rows.append((name, [(share, *figures.heat(share or 0.0)) for share in shares]))
    return {"network": networks[0], "names": names, "rows": rows, "scale": [figures.heat(i / 10)[0] for i in range(11)]}


def curves_of(project: Project) -> list[dict[str, Any]] | str:
    """A chart for each kind of loss, with a line for each network, or for each term, that has it."""
    series = {key: i % len(figures.DASHES) for i, key in enumerate([*STUDENTS, *project.params.teachers])}
    charts = []
    for title, unit, prefix, note in _CURVES:
        lines = []
        for key, colour in series.items():
            for path in sorted((_training(project, key) / "plots").glob(f"{prefix}*.tsv")):
                label, dash = label_of(key), colour
                if prefix == "pixel_":
                    # A colour for each teacher, dashes for the images.
                    images, teacher = path.stem.removeprefix(prefix).split("_", 1)
                    label, dash = f"{teacher} on {images} views", int(images == "unlabelled")
                    colour = series.get(teacher, 0)
                lines.append(figures.Line(label, read_curve(path), colour, dash))
        if lines:
            chart = figures.line_chart(title, unit, lines)
            charts.append({"title": title, "unit": unit, "note": note, "lines": lines, "chart": chart})
    return charts or "No training has left curves here: run `mgd-pipeline train-student`."


def cost(project: Project) -> list[dict[str, Any]] | str:
    """What each training took where it ran, from its speed.json: seconds, waiting, memory."""
    rows = []
    for key in [*project.params.train_teachers, *reversed(STUDENTS)]:
        speed = read_numbers(_training(project, key) / "speed.json")
        if speed is not None:
            steps, seconds = steps_of(project, key), speed.get("seconds_per_step")
            rows.append({"label": label_of(key), "steps": steps, **speed, "minutes": seconds and steps * seconds / 60})
    return rows or "No training has run in this folder, and its measurements (speed.json) stay on the machine that made them."


def steps_of(project: Project, key: str) -> int:
    """Steps of a student's or teacher's training: the last step of its curve, or of params.yaml where no curve is left."""
    curve = read_curve(_training(project, key) / "plots/loss.tsv")
    asked = project.params.student if key in STUDENTS else project.params.teacher_training
    return int(curve[-1][0]) if curve else asked.steps


def read_curve(path: Path) -> list[tuple[float, float]]:
    """(step, value) of what MetricsLog wrote."""
    rows = (read_text(path) or "").splitlines()[1:]
    try:
        return [(float(step), float(value)) for step, value in (row.split("\t") for row in rows)]
    except ValueError:
        raise DataError(f"{path}: is not a curve; {make_again(path)}") from None


def _training(project: Project, key: str) -> Path:
    """Folder of the results of a student's or teacher's training."""
    return project.results / (f"train-student-{key}" if key in STUDENTS else f"train-teacher-{key}")


def plain(project: Project, error: Exception) -> str:
    """An error without the folder of the project, because the page goes to other people, too."""
    return str(error).replace(f"{project.base}{os.sep}", "")
