"""The sections of the report: what each shows of what the stages wrote, or a text that says why there is nothing to show."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mgd_pipeline.data.images import resize_image
from mgd_pipeline.data.manifest import Manifest
from mgd_pipeline.errors import DataError
from mgd_pipeline.metrics import iou_by_class
from mgd_pipeline.params import STUDENTS, TeacherParams
from mgd_pipeline.pictures.overlays import blend
from mgd_stages.reports import figures
from mgd_stages.run.class_tables import make_again, read_class_tsv, read_confusion, read_numbers, read_text
from mgd_stages.run.pictures import Predicted, extremes, read_masks, to_look_at
from mgd_stages.run.project import Project
from mgd_stages.run.verdicts import LABELS, Confusion, stored_verdicts

_CURVES = (
    ("Supervised loss", "cross entropy in nats", "supervised", "Against the labels of the labelled views."),
    ("Pixel terms", "cross entropy in nats", "pixel_", "Against what each teacher says of each pixel."),
    ("Region term", "mean squared difference of cosines", "region", "Of the student’s and a teacher’s similarities of regions."),
    ("Image term", "summed difference of logits", "image", "Of the student’s and a teacher’s mean logits of a view."),
    ("Cross pseudo supervision of the teachers", "cross entropy in nats", "cross", "Of the two networks of a teacher’s training."),
    ("Consistency with the moving average", "cross entropy in nats", "consistency", "Of networks trained by mean-teacher."),
    ("Total loss", "weighted sum, no unit", "loss", "What the optimiser sees; runs with other terms are not comparable."),
)
"""Title, unit, what the names of its files begin with, and what is compared."""
_MOST_PICTURES = 6
"""Of each kind, so that the page stays small enough for a phone."""
_MOST_CONFUSED = 40
"""Classes of the matrix on the page."""
_GROUPS = {"worst": "Worst", "best": "Best", "only": "The only image"}


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


def identity_of(teacher: TeacherParams) -> str:
    """What a teacher is, in two words, such as 'fpn, resnet18'."""
    return ", ".join(teacher.network_names)


def label_of(key: str) -> str:
    """What a reader calls a student, or the teacher of that name."""
    return LABELS.get(key, f"teacher {key}")


def plain(project: Project, error: Exception) -> str:
    """An error without the folder of the project, because the page goes to other people, too."""
    return str(error).replace(f"{project.base}{os.sep}", "")


def measured_networks(
    project: Project, evaluation: dict[str, Any], students: dict[str, dict[str, Any]], classes: Sequence[str]
) -> list[Network]:
    """Students first, then teachers, with what `evaluate` and `precompute-teachers` measured; `classes` as they are called now."""
    params, networks = project.params, []
    of_students = read_class_tsv(project.results / "evaluation/class_iou.tsv", classes)
    for key in STUDENTS:
        if key in evaluation:
            network = students.get(key, {}).get("network", params.student.network.model_dump())
            method = students.get(key, {}).get("method")
            built = f"{network['decoder']}, {network['encoder']}{f', {method}' if method else ''}"
            networks.append(Network(key, LABELS[key], built, evaluation[key], of_students.get(key, {}), _series(project)[key]))
    for name, teacher in params.teachers.items():
        measured = read_numbers(project.results / f"teachers/{name}.json")
        if measured is not None:
            file = project.results / f"teachers/{name}-confusion.csv"
            names, confusion = read_confusion(file, classes) or ([], np.zeros((0, 0)))
            if confusion.sum():
                measured["pixel_accuracy"] = round(float(np.trace(confusion) / confusion.sum()), 6)
            class_iou = iou_by_class(confusion, names)
            networks.append(Network(name, label_of(name), identity_of(teacher), measured, class_iou, _series(project)[name]))
    return networks


def _series(project: Project) -> dict[str, int]:
    """The number of the colour of each student and teacher."""
    return {key: i % len(figures.DASHES) for i, key in enumerate([*STUDENTS, *project.params.teachers])}


def headline(networks: list[Network], best: str | None = None) -> dict[str, Any] | str:
    """The better student, whose key is `best`, beside every further network: the other student, and each teacher. Without `best` it
    is the distilled student."""
    students = [network for network in networks if network.key in STUDENTS]
    student = next((network for network in students if network.key == best), students[0] if students else None)
    if student is None:
        return "No student has been evaluated yet: run `mgd-pipeline train-student` and `mgd-pipeline evaluate`."
    own, others = student.measured, []
    for other in networks:
        if other is not student:
            # The work of your own teacher may not be countable.
            shares = {what: own[what] / (other.measured[what] or math.nan) for what in ("parameters", "macs")}
            others.append({"network": other, "gain": _difference(own.get("miou"), other.measured.get("miou")), **shares})
    return {"student": student, "others": others}


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def class_rows(networks: list[Network], confusion: Confusion | None) -> dict[str, Any] | str:
    """IoU of each class and network, in the data set's order, with the share that the class has of the true pixels."""
    shown = [network for network in networks if network.class_iou]
    if not shown:
        return "No IoU of classes has been measured: run `mgd-pipeline evaluate`."
    names = confusion[0] if confusion else list(dict.fromkeys(name for n in shown for name in n.class_iou))
    shares = (confusion[1].sum(1) / max(confusion[1].sum(), 1)).tolist() if confusion else [None] * len(names)
    rows = []
    for place, (name, share) in enumerate(zip(names, shares, strict=True)):
        ious = {network.key: network.class_iou.get(name) for network in shown}
        gain = _difference(*(ious.get(key) for key in STUDENTS))
        rows.append({"id": place, "name": name, "share": share, "ious": ious, "gain": gain})
    return {"networks": shown, "rows": rows}


def confusion_rows(confusion: Confusion | None, networks: list[Network]) -> dict[str, Any] | str:
    """For each class, the shares of its true pixels that are predicted as each class; of many the classes with most mistakes."""
    if confusion is None or not networks or networks[0].key not in STUDENTS:
        return "There is no confusion matrix: run `mgd-pipeline evaluate`."
    names, counts = confusion
    mistakes = counts.sum(0) + counts.sum(1) - 2 * np.diag(counts)
    shown = np.sort(np.argsort(-mistakes, kind="stable")[:_MOST_CONFUSED])
    left_out, names = len(names) - len(shown), [names[place] for place in shown]
    rows = []
    for name, row, total in zip(names, counts[np.ix_(shown, shown)], counts.sum(1)[shown], strict=True):
        shares = [float(count / total) if total else None for count in row]
        rows.append((name, [(share, *figures.heat(share or 0.0)) for share in shares]))
    return {
        "network": networks[0],
        "names": names,
        "left_out": left_out,
        "rows": rows,
        "scale": [figures.heat(i / 10)[0] for i in range(11)],
    }


def curves_of(project: Project) -> list[dict[str, Any]] | str:
    """A chart for each kind of loss, with a line for each network, or for each term, that has it."""
    series, charts = _series(project), []
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


def devices(project: Project, student: str | None) -> dict[str, Any] | None:
    """What `benchmark-device` measured of an exported student, and whether it is the one of this `weights_sha256`, where that is
    known; None where it has not run."""
    measured = read_numbers(project.results / "devices.json")
    if measured is None:
        return None
    rows = []
    for row in measured["rows"]:
        times = [row["times"].get(str(count), {}) for count in measured["threads"]]
        cells = [time.get(key) for time in times for key in ("median_ms", "p95_ms")]
        scaled = " (scaled)" if row["seen"] == "scaled" and row["miou"] is not None else ""
        rows.append({**row, "label": f"{row['form']}, {row['size'][0]} x {row['size'][1]}{scaled}", "cells": cells})
    return {**measured, "rows": rows, "own": student in (None, measured.get("weights_sha256"))}


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


def pictures(project: Project, manifest: Manifest | str) -> dict[str, Any] | str:
    """The worst and best images of the distilled student, or of the only student, with the truth and the masks of all networks."""
    if isinstance(manifest, str):
        return manifest
    path, teachers = project.results / "evaluation/masks.parquet", project.params.teachers
    by_image: dict[str, dict[str, Predicted]] = {}
    for file in (path, *(project.results / f"teachers/{name}-masks.parquet" for name in teachers)):
        for one in read_masks(file):
            by_image.setdefault(one.image_id, {})[one.network] = one
    networks = [key for key in (*STUDENTS, *teachers) if any(key in masks for masks in by_image.values())]
    if not networks or (by := networks[0]) not in STUDENTS:
        return f"There are no masks of the student ({path.name}): run `mgd-pipeline evaluate`."
    scores = {image_id: masks[by].score for image_id, masks in by_image.items() if by in masks}
    groups = []
    for group, chosen in extremes(scores, min(project.params.evaluation.overlays, _MOST_PICTURES), median=False).items():
        try:
            masks = [[by_image[image_id][key] for key in networks if key in by_image[image_id]] for image_id in chosen]
            groups.append((_GROUPS[group], [_picture(manifest, of_image) for of_image in masks]))
        except (DataError, KeyError) as error:
            return f"The images do not fit their masks ({plain(project, error)}): run `mgd-pipeline evaluate` again."
    if not groups:
        return "No image of the split has a pixel of any class, so that none is better than another."
    return {"student": LABELS[by], "groups": groups, "lacking": [name for name in teachers if name not in networks]}


def _picture(manifest: Manifest, masks: list[Predicted]) -> dict[str, Any]:
    """An image of the split with its truth, and with the masks and scores of the networks."""
    row = manifest.rows[masks[0].image_id]
    truth = to_look_at(manifest.mask(row))
    image = resize_image(to_look_at(manifest.whole_image(row)), *truth.shape)
    shown = [("truth", truth, None), *((label_of(mask.network), mask.mask, mask.score) for mask in masks)]
    return _panels(manifest, row.image_id, image, shown)


def _panels(
    manifest: Manifest, image_id: str, image: np.ndarray, masks: Sequence[tuple[str, np.ndarray, float | None]]
) -> dict[str, Any]:
    """The image, each of (title, mask, score) over it, and the classes that occur for a legend."""
    panels = [{"title": "image", "picture": figures.panel(image, f"image {image_id}"), "score": None}]
    for title, mask, score in masks:
        if mask.shape != image.shape[:2]:
            raise DataError(f"{image_id}, {title}: {mask.shape} and not {image.shape[:2]} pixels")
        alternative = f"{image_id}, {title}: {describe(mask, manifest.classes)}"
        picture = figures.panel(blend(image, mask, manifest.palette), alternative, mask)
        panels.append({"title": title, "picture": picture, "score": score})
    present = sorted({int(value) for _, mask, _ in masks for value in np.unique(mask)} & set(range(len(manifest.classes))))
    legend = [(k, manifest.classes[k], "#{:02x}{:02x}{:02x}".format(*manifest.palette[k])) for k in present]
    return {"image_id": image_id, "panels": panels, "legend": legend}


def describe(mask: np.ndarray, classes: Sequence[str]) -> str:
    """A mask in words: its classes by size, such as 'road 61 %, sky 30 %'."""
    counts = np.bincount(mask.ravel(), minlength=256)[: len(classes)]
    order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    return ", ".join(f"{classes[k]} {100 * counts[k] / mask.size:.0f} %" for k in order) or "no class"


def disagreement(project: Project, manifest: Manifest | str) -> dict[str, Any] | str:
    """What `compare-teachers` measured in the teacher caches, with the images on which the teachers differ most."""
    folder = project.results / "compare-teachers"
    measured = read_numbers(folder / "metrics.json")
    if measured is None:
        return "The teachers have not been compared: run `mgd-pipeline compare-teachers`."
    teachers = [name for name in project.params.teachers if name in measured]
    pairs = [pair for pair in map(" and ".join, combinations(teachers, 2)) if pair in measured]
    classes = () if isinstance(manifest, str) else manifest.classes
    agreement = read_class_tsv(folder / "disagreement/class_agreement.tsv", classes)
    names = list(dict.fromkeys(name for pair in pairs for name in agreement.get(pair, {})))
    by_image: dict[str, list[Predicted]] = {}
    for mask in read_masks(folder / "disagreement/masks.parquet"):
        by_image.setdefault(mask.image_id, []).append(mask)
    shown: list[Any] | str = []
    if isinstance(manifest, str):
        shown = manifest
    elif not by_image:
        again = "There are no masks to show: run `mgd-pipeline compare-teachers` again."
        shown = again if pairs else "Fewer than two teachers name classes, so that there are no differences to show."
    else:
        try:
            shown = [_differing(manifest, masks) for masks in list(by_image.values())[:_MOST_PICTURES]]
        except (DataError, KeyError) as error:
            shown = f"The images do not fit their masks ({plain(project, error)}): run `mgd-pipeline compare-teachers` again."
    return {
        "verdicts": stored_verdicts(measured, teachers),
        "teachers": {name: measured[name] for name in teachers},
        "pairs": {pair: measured[pair]["same_class_share"] for pair in pairs},
        "classes": [(name, [agreement[pair].get(name) for pair in pairs]) for name in names],
        "pictures": shown,
    }


def _differing(manifest: Manifest, masks: list[Predicted]) -> dict[str, Any]:
    row = manifest.rows[masks[0].image_id]
    image = to_look_at(manifest.image(row))
    picture = _panels(manifest, row.image_id, image, [(label_of(mask.network), mask.mask, None) for mask in masks])
    return {**picture, "share": masks[0].score}
