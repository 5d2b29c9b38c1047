"""What the measured numbers say, and what they cannot say, as sentences. `evaluate` prints them, and the report begins with them.

They are made from the files that the stages wrote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mgd_pipeline.networks.weights import read_metadata
from mgd_pipeline.params import STUDENTS
from mgd_pipeline.words import counted, defined, listed, per_cent, signed, verb
from mgd_stages.run.class_tables import read_class_tsv, read_confusion, read_numbers
from mgd_stages.run.data_notes import FEW_IMAGES
from mgd_stages.run.pictures import count_images
from mgd_stages.run.project import Project

Confusion = tuple[list[str], np.ndarray]
"""Classes and (K, K) pixels, rows = truth"""
LABELS = {"distilled": "distilled student", "supervised": "student without teachers"}
_FEW_STEPS = 500
"""Students with fewer steps show that everything works (`init --quick` has 200, `demo` 100); their quality says nothing."""
_TOY = "tu-test_"
"""Prefix of timm's networks for tests, which are meant for the built-in data set only."""


@dataclass(frozen=True)
class Findings:
    """What the stages have measured so far. IoU and mIoU from 0 to 1; None if undefined."""

    split: str
    images: int | None = None
    """Images on which the students were measured; None if unknown"""
    mious: Mapping[str, float | None] = field(default_factory=dict)
    """Of each student and teacher that was measured with labels, by its key"""
    class_ious: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of the students, without classes whose IoU is undefined"""
    confusion: Confusion | None = None
    """Of the first student"""
    elsewhere: tuple[str, ...] = ()
    """Teachers that were measured on other pixels than the students"""
    steps: Mapping[str, int] = field(default_factory=dict)
    """Of the students' trainings"""
    trained_on: Mapping[str, object] = field(default_factory=dict)
    """Fingerprint of the labelled images of each student"""
    replaced: tuple[str, ...] = ()
    """Students whose file has changed since the evaluation"""
    toys: tuple[str, ...] = ()
    """Encoders made for tests, if the data set is not"""


def findings(project: Project) -> Findings:
    """Reads what `evaluate`, `precompute-teachers` and `train-student` wrote. Raises DataError for a damaged file."""
    folder = project.results / "evaluation"
    summary = read_numbers(folder / "metrics.json") or {}
    confusion = read_confusion(folder / "confusion.csv")
    known, steps = measured_before(project)
    mious: dict[str, float | None] = {key: defined(summary[key].get("miou")) for key in STUDENTS if key in summary}
    elsewhere = []
    for name in project.params.teachers:
        measured, counts = known[name]
        if "miou" not in measured:
            continue
        mious[name] = defined(measured["miou"])
        if counts is not None and confusion is not None and not _same_truth(counts, confusion):
            elsewhere.append(name)
    trained = [key for key in STUDENTS if key in mious and project.student(key).exists()]
    trained_on = {key: read_metadata(project.student(key)).get("trained_on") for key in trained}
    return Findings(
        split=str(summary.get("split", project.params.evaluation.split)),
        images=count_images(folder / "masks.parquet"),
        mious=mious,
        class_ious=read_class_tsv(folder / "class_iou.tsv"),
        confusion=confusion,
        elsewhere=tuple(elsewhere),
        steps={key: count for key, count in steps.items() if key in mious},
        trained_on=trained_on,
        replaced=tuple(key for key in STUDENTS if _is_replaced(project.student(key), summary.get(key, {}).get("sha256"))),
        toys=_toys(project),
    )


def measured_before(project: Project) -> tuple[dict[str, tuple[dict[str, Any], Confusion | None]], dict[str, int]]:
    """The numbers and the confusion matrix of each teacher, as far as `precompute-teachers` has measured them; and the steps of
    each student's training. Raises DataError for a damaged file: `evaluate` asks before its first image."""
    folder = project.results / "teachers"
    teachers = {
        name: (read_numbers(folder / f"{name}.json") or {}, read_confusion(folder / f"{name}-confusion.csv"))
        for name in project.params.teachers
    }
    trained = {key: read_numbers(project.results / f"train-student-{key}/metrics.json") or {} for key in STUDENTS}
    return teachers, {key: int(numbers["steps"]) for key, numbers in trained.items() if "steps" in numbers}


def verdicts(measured: Findings) -> list[str]:
    """The sentences, the most important one first; none without students. Warnings begin with `warning: `."""
    if not any(key in measured.mious for key in STUDENTS):
        return []
    nothing = measured.confusion is not None and not measured.confusion[1].sum()
    said = [
        _quick(measured),
        _replaced(measured),
        compared(measured),
        None if nothing else _weak_teachers(measured),
        _other_pixels(measured),
    ]
    said += [
        _unlike(measured),
        _few_images(measured),
        *([] if nothing else [_absent_classes(measured), _one_answer(measured)]),
    ]
    return [line for line in said if line]


def unmeasured(project: Project) -> list[str]:
    """A sentence for each student and teacher of params.yaml without an mIoU: why, or which command measures it."""
    summary, said = read_numbers(project.results / "evaluation/metrics.json") or {}, []
    for key, command in (("distilled", "train-student"), ("supervised", "train-student --supervised-only")):
        if key not in summary:
            first = "" if project.student(key).exists() else f"`mgd-pipeline {command}` and "
            said.append(f"the {LABELS[key]} has not been evaluated: run {first}`mgd-pipeline evaluate`")
    for name in project.params.teachers:
        measured = read_numbers(project.results / f"teachers/{name}.json")
        if measured is None:
            said.append(f"teacher {name} has not been measured: run `mgd-pipeline precompute-teachers`")
        elif "miou" not in measured:
            said.append(f"teacher {name} names no classes, so that it has no mIoU")
    return said


def compared(measured: Findings) -> str | None:
    """What distillation gains or costs, or why it is unknown; None if one of the two students was not measured."""
    undefined = [key for key in STUDENTS if key in measured.mious and measured.mious[key] is None]
    if undefined:
        return f"warning: the mIoU of the {LABELS[undefined[0]]} is undefined: {why_undefined(measured.split)}"
    if not all(key in measured.mious for key in STUDENTS):
        return None
    student, twin = (measured.mious[key] for key in ("distilled", "supervised"))
    assert student is not None and twin is not None
    lengths = [measured.steps.get(key) for key in STUDENTS]
    alike = ", at the same number of steps" if None not in lengths and len(set(lengths)) == 1 else ""
    gain = signed(100 * (student - twin))
    if gain.startswith("+"):
        return f"distillation gains {gain[1:]} mIoU points over the labelled images alone{alike}"
    if gain.startswith("-"):
        return (
            f"warning: distillation costs {gain[1:]} mIoU points: the student without teachers is the better one "
            f"({per_cent(twin)} against {per_cent(student)}){alike}"
        )
    return (
        f"distillation makes no difference: {per_cent(student)} mIoU with teachers, {per_cent(twin)} from the labelled images "
        f"alone{alike}"
    )


def why_undefined(split: str) -> str:
    """The one reason for which an mIoU is undefined."""
    return f"no pixel of the {split} split has a class"


def _weak_teachers(measured: Findings) -> str | None:
    twin = measured.mious.get("supervised")
    teachers = {
        name: miou
        for name, miou in measured.mious.items()
        if name not in STUDENTS and name not in measured.elsewhere and miou is not None
    }
    if twin is None or not teachers or max(teachers.values()) >= twin:
        return None
    best = max(teachers, key=lambda name: teachers[name])
    even = "even " if len(teachers) > 1 else ""
    return (
        f"warning: {even}teacher {best} ({per_cent(teachers[best])}) is worse than the student without teachers "
        f"({per_cent(twin)}), which can learn little from it: train teachers longer (teacher_training.steps), or bring better ones"
    )


def _other_pixels(measured: Findings) -> str | None:
    if not measured.elsewhere:
        return None
    who = f"{verb(len(measured.elsewhere), 'teacher', 'teachers')} {listed(measured.elsewhere)}"
    return (
        f"warning: {who} {verb(len(measured.elsewhere), 'was', 'were')} measured on other images, masks or classes than the "
        "students, so that their mIoUs cannot be compared: run `mgd-pipeline precompute-teachers` and `mgd-pipeline evaluate`"
    )


def _unlike(measured: Findings) -> str | None:
    """The two students can be compared only if they had the same labels and steps."""
    lines = []
    if len(set(measured.steps.values())) > 1:
        lines.append(f"{measured.steps['distilled']} and {measured.steps['supervised']} steps")
    if len(set(measured.trained_on.values())) > 1:
        lines.append("different labelled images")
    if not lines:
        return None
    return (
        f"warning: the distilled student and the student without teachers were trained with {' and '.join(lines)}: "
        "the difference between them is not that of distillation alone"
    )


def _replaced(measured: Findings) -> str | None:
    if not measured.replaced:
        return None
    was = verb(len(measured.replaced), "was", "were")
    students = " and the ".join(LABELS[key] for key in measured.replaced)
    return (
        f"warning: the {students} {was} trained again after the evaluation, whose "
        "numbers and pictures are of the earlier training: run `mgd-pipeline evaluate`"
    )


def _is_replaced(path: Path, evaluated: str | None) -> bool:
    """Whether a student's file has changed since its evaluation; version 0.1.0 did not record it."""
    return evaluated is not None and path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != evaluated


def _few_images(measured: Findings) -> str | None:
    if measured.images is None or measured.images >= FEW_IMAGES:
        return None
    return (
        f"warning: networks are compared on {counted(measured.images, 'image')} ({measured.split}), which says little: one scene "
        "more or less is worth points"
    )


def _absent_classes(measured: Findings) -> str | None:
    if measured.confusion is None:
        return None
    names, counts = measured.confusion
    absent = [name for name, pixels in zip(names, counts.sum(1), strict=True) if not pixels]
    if not absent:
        return None
    these = verb(len(absent), "this class", "these classes")
    rest = counted(len(names) - len(absent), "class", "classes")
    line = (
        f"warning: no pixel of the {measured.split} split is {listed(absent)}: no network is measured on {these}; mIoU is the mean "
        f"over the other {rest}"
    )
    wrong = [
        LABELS[key]
        for key in STUDENTS
        if key in measured.mious and any(name in measured.class_ious.get(key, {}) for name in absent)
    ]
    if wrong:
        them = "this class" if len(absent) == 1 else "some of these classes"
        line += (
            f", and over {them} with an IoU of 0 for the {listed(wrong).replace(' and ', ' and the ')}, "
            f"which {verb(len(wrong), 'sees', 'see')} {verb(len(absent), 'it', 'them')} where nothing is"
        )
    return line


def _one_answer(measured: Findings) -> str | None:
    if measured.confusion is None:
        return None
    names, counts = measured.confusion
    told = [name for name, pixels in zip(names, counts.sum(0), strict=True) if pixels]
    if len(told) != 1 or len(names) == 1:
        return None
    student = next(key for key in STUDENTS if key in measured.mious)
    return f"warning: the {LABELS[student]} says {told[0]} everywhere: it has learnt nothing yet"


def _quick(measured: Findings) -> str | None:
    few = sorted({steps for steps in measured.steps.values() if steps < _FEW_STEPS})
    what = [f"{' and '.join(map(str, few))} {verb(few[-1], 'step', 'steps')} of training"] if few else []
    what += [f"networks made for tests ({listed(measured.toys)})"] if measured.toys else []
    if not what:
        return None
    return (
        f"warning: a quick run, with {' and '.join(what)}: it shows that everything works, and not what distillation can do on "
        "this data set"
    )


def stored_verdicts(summary: Mapping[str, Any], teachers: Sequence[str]) -> list[str]:
    """What `compare-teachers` could not measure in the caches of these teachers, and why."""
    said = []
    if not teachers:
        said.append("warning: no teacher names classes, so that there is nothing to compare")
    elif len(teachers) == 1:
        said.append(f"teacher {teachers[0]} is the only one that names classes, and cannot disagree")
    if any(summary[name]["miou_labelled"] is None for name in teachers):
        said.append(
            "warning: the mIoU on labelled images is undefined: no pixel of the labelled images in the teacher caches has a class"
        )
    return said


def one_class_everywhere(confusion: np.ndarray) -> float | None:
    """mIoU, 0 to 1, of a network that gives every pixel the most frequent class; None if (K, K) `confusion`, rows = truth,
    counts no pixel."""
    truth = confusion.sum(1)
    return float(truth.max() / truth.sum() / (truth > 0).sum()) if truth.sum() else None


def beside_one_class(reached: float, constant: float) -> str:
    """Half a sentence about a network that is hardly better than one class everywhere; empty for a better network."""
    if reached >= 1.2 * constant:
        return ""
    gain = signed(100 * (reached - constant))
    how = "less than" if gain.startswith("-") else "hardly more than" if gain.startswith("+") else "as much as"
    return f", {how} one class everywhere would have ({per_cent(constant)}): it has learnt nothing yet"


def _same_truth(one: tuple[list[str], np.ndarray], other: tuple[list[str], np.ndarray]) -> bool:
    """Whether two confusion matrices have the same classes, with the same number of true pixels of each class."""
    return one[0] == other[0] and np.array_equal(one[1].sum(1), other[1].sum(1))


def _toys(project: Project) -> tuple[str, ...]:
    params = project.params
    if params.data.dataset == "shapes":
        return ()
    encoders = [params.student.network.encoder, *(str(teacher.identity.get("encoder", "")) for teacher in params.teachers.values())]
    return tuple(dict.fromkeys(name for name in encoders if name.startswith(_TOY)))
