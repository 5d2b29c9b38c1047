"""What the measured numbers say, and what they cannot say, as sentences. `evaluate` prints them, and the report begins with them.

They are made from the files that the stages wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np

from mgd_pipeline.data.classes import current_names
from mgd_pipeline.metrics import mean_iou
from mgd_pipeline.networks.weights import read_metadata
from mgd_pipeline.params import STUDENTS
from mgd_pipeline.words import counted, defined, listed, per_cent, signed, verb
from mgd_stages.run.class_tables import read_class_tsv, read_confusion, read_numbers
from mgd_stages.run.data_notes import FEW_IMAGES
from mgd_stages.run.pictures import count_images
from mgd_stages.run.project import BEST, Project

Confusion = tuple[list[str], np.ndarray]
"""Classes and (K, K) pixels, rows = truth"""
LABELS = {"distilled": "distilled student", "supervised": "student without teachers"}
FEW_STEPS = 500
"""Students with fewer steps show that everything works (`demo` has 100); their quality says nothing."""
_TOY = "tu-test_"
"""Prefix of timm's networks for tests, which are meant for the built-in data set only."""


@dataclass(frozen=True)
class Findings:
    """What the stages have measured so far. IoU and mIoU from 0 to 1; None if undefined."""

    split: str
    images: int | None = None
    """Images on which the students were measured; None if unknown"""
    best: str | None = None
    """The student of which `Project.best_student` is a copy; None if that was not chosen by these numbers"""
    mious: Mapping[str, float | None] = field(default_factory=dict)
    """Of each student and teacher that was measured with labels, by its key"""
    rare: tuple[str, ...] = ()
    """The rare third of the classes, as `metrics.rare_third` defines it; empty for results of version 0.1.0"""
    rare_mious: Mapping[str, float | None] = field(default_factory=dict)
    """Mean IoU of the rare third, by the keys of `mious`"""
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
    alone: str = "the labelled images alone"
    """What the student without teachers learnt from"""
    toys: tuple[str, ...] = ()
    """Encoders made for tests, if the data set is not"""


def findings(project: Project) -> Findings:
    """Reads what `evaluate`, `precompute-teachers` and `train-student` wrote. Raises DataError for a damaged file."""
    folder = project.results / "evaluation"
    summary = read_numbers(folder / "metrics.json") or {}
    confusion = read_confusion(folder / "confusion.csv")
    of_teachers, steps = measured_before(project)
    teachers = {name: of_teacher for name, of_teacher in of_teachers.items() if "miou" in of_teacher[0]}
    students = {key: summary[key] for key in STUDENTS if key in summary}
    files = {key: project.student(key) for key in students if project.student(key).exists()}
    notes = {key: read_metadata(path) for key, path in files.items()}
    method = notes.get("supervised", {}).get("method")
    rare = rare_classes(summary)
    return Findings(
        split=str(summary.get("split", project.params.evaluation.split)),
        images=count_images(folder / "masks.parquet"),
        best=_measured_best(project, {key: numbers.get("miou") for key, numbers in students.items()}),
        mious={key: defined(numbers.get("miou")) for key, numbers in students.items()}
        | {name: defined(numbers["miou"]) for name, (numbers, _) in teachers.items()},
        rare=rare,
        rare_mious={key: defined(numbers.get("rare_miou")) for key, numbers in students.items()}
        | {name: of_rare(counts, rare, confusion[0] if confusion else ()) for name, (_, counts) in teachers.items()},
        class_ious=read_class_tsv(folder / "class_iou.tsv"),
        confusion=confusion,
        elsewhere=tuple(
            name for name, (_, counts) in teachers.items() if counts and confusion and _truth(counts) != _truth(confusion)
        ),
        steps={key: count for key, count in steps.items() if key in students},
        trained_on={key: of_file.get("trained_on") for key, of_file in notes.items()},
        # Version 0.1.0 did not record the hash of the file that it evaluated.
        replaced=tuple(
            key for key, path in files.items() if students[key].get("sha256") not in (None, sha256(path.read_bytes()).hexdigest())
        ),
        alone=f"{method} without teachers" if method else Findings.alone,
        toys=_toys(project),
    )


def _measured_best(project: Project, mious: Mapping[str, float | None]) -> str | None:
    """The student of which the best one is a copy, if it was chosen by these numbers."""
    noted = read_metadata(project.best_student).get("best", {}) if project.best_student.exists() else {}
    return noted["student"] if noted.get("miou") == mious else None


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
    parts = (_how_to_read, _gain, _best, _of_teachers, _unlike, _of_split)
    return [line for part in parts for line in part(measured)]


def better_student(totals: Mapping[str, np.ndarray], of_images: Mapping[str, Sequence[np.ndarray]]) -> str:
    """The student that is worth using, by the confusion matrices of the evaluated students, (K, K) pixels, rows = truth.

    It is the distilled student, unless the student without teachers is better by a difference. What `verdicts` prints as 0.0 mIoU
    points is none. `of_images` has the matrices of each image, in one order for all students, where there are fewer than
    `FEW_IMAGES`: one scene more or less is worth points then, so the difference must remain without any one of them. On a single
    image nothing is a difference: the distilled student has heard of more images.
    """
    if len(totals) < len(STUDENTS):
        return next(iter(totals))
    left = [totals, *({key: totals[key] - of_images[key][i] for key in totals} for i in range(len(of_images["distilled"])))]
    mious = [{key: mean_iou(confusion) for key, confusion in counts.items()} for counts in left]
    return "supervised" if all(sign(miou["distilled"], miou["supervised"]) == "-" for miou in mious) else "distilled"


def why_best(mious: Mapping[str, float | None], best: str, split: str, images: int | None) -> str:
    """Why `better_student` chose a student, as half a sentence; `images` is their number, None if unknown."""
    where = f"on the {split} split" if images is None else f"on {counted(images, f'{split} image')}"
    if len(mious) < len(STUDENTS):
        return f"no other student was evaluated ({per_cent(mious[best])} mIoU {where})"
    student, twin = mious["distilled"], mious["supervised"]
    if best == "supervised":
        return f"{per_cent(twin)} mIoU {where}, and the distilled student has {per_cent(student)}"
    said = {"+": "", "-": ", which is no difference on so few images"}.get(sign(student, twin), ", which is no difference")
    return f"{per_cent(student)} mIoU {where}, and the student without teachers has {per_cent(twin)}{said}"


def sign(student: float | None, twin: float | None) -> str:
    """+ or -, or a digit where a number is undefined or printed numbers show no difference."""
    student, twin = defined(student), defined(twin)
    return "0" if student is None or twin is None else signed(100 * (student - twin))[0]


def rare_classes(summary: Mapping[str, Any]) -> tuple[str, ...]:
    """The rare third by the numbers of `evaluate`; it is the same for each of its students. Empty for an older evaluation."""
    return next((tuple(summary[key]["rare_classes"]) for key in STUDENTS if "rare_classes" in summary.get(key, {})), ())


def of_rare(confusion: Confusion | None, rare: Sequence[str], classes: Sequence[str]) -> float | None:
    """Mean IoU, 0 to 1, of the classes `rare` by the matrix of a teacher; None where it is undefined. `classes`: how the matrix of
    the student calls all classes, in case they were renamed after the teacher was measured."""
    if confusion is None or not rare:
        return None
    names = current_names(confusion[0], classes)
    return defined(mean_iou(confusion[1], [names.index(name) for name in rare])) if set(rare) <= set(names) else None


def what_is_rare(rare: Sequence[str]) -> str:
    """What the rare third is, and which classes it has, as a sentence without a full stop."""
    return (
        f"rare third: the mean IoU of {listed(rare, 20)}, which {verb(len(rare), 'has', 'have')} the fewest pixels in the labelled "
        "images"
    )


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


def why_undefined(split: str) -> str:
    """The one reason for which an mIoU is undefined."""
    return f"no pixel of the {split} split has a class"


def _how_to_read(measured: Findings) -> Iterator[str]:
    """What limits everything that follows: a quick run, and numbers of an earlier training."""
    few = sorted({steps for steps in measured.steps.values() if steps < FEW_STEPS})
    what = [f"{' and '.join(map(str, few))} {verb(few[-1], 'step', 'steps')} of training"] if few else []
    what += [f"networks made for tests ({listed(measured.toys)})"] if measured.toys else []
    if what:
        yield (
            f"warning: this is a try, a quick run, with {' and '.join(what)}: it shows that everything works, and not what "
            "distillation can do on this data set; next, look at the pictures, then run `mgd-pipeline init` without --quick into "
            "another folder, or raise teacher_training.steps and student.steps"
        )
    if measured.replaced:
        students = " and the ".join(LABELS[key] for key in measured.replaced)
        yield (
            f"warning: the {students} {verb(len(measured.replaced), 'was', 'were')} trained again after the evaluation, whose "
            "numbers and pictures are of the earlier training: run `mgd-pipeline evaluate`"
        )


def _gain(measured: Findings) -> Iterator[str]:
    """What distillation gains or costs, or why it is unknown; nothing if one of the two students was not measured."""
    mious = {key: measured.mious[key] for key in STUDENTS if key in measured.mious}
    values = [miou for miou in mious.values() if miou is not None]
    if len(values) < len(mious):
        undefined = next(key for key, miou in mious.items() if miou is None)
        yield f"warning: the mIoU of the {LABELS[undefined]} is undefined: {why_undefined(measured.split)}"
    elif len(values) == len(STUDENTS):
        student, twin = values
        lengths = {measured.steps.get(key) for key in STUDENTS}
        alike = ", at the same number of steps" if len(lengths) == 1 and None not in lengths else ""
        gain = signed(100 * (student - twin))
        if gain.startswith("+"):
            yield f"distillation gains {gain[1:]} mIoU points over {measured.alone}{alike}"
            yield from _rare_loss(measured)
        elif gain.startswith("-") and measured.best == "distilled":
            yield (
                f"distillation makes no clear difference on so few images: {per_cent(student)} mIoU with teachers, "
                f"{per_cent(twin)} from {measured.alone}{alike}"
            )
        elif gain.startswith("-"):
            yield (
                f"warning: distillation costs {gain[1:]} mIoU points: the student without teachers is the better one "
                f"({per_cent(twin)} against {per_cent(student)}){alike}"
            )
        else:
            both = f"{per_cent(student)} mIoU with teachers, {per_cent(twin)} from {measured.alone}"
            yield f"distillation makes no difference: {both}{alike}"


def _rare_loss(measured: Findings) -> Iterator[str]:
    """Where mIoU rises, whether the rare third of the classes pays for it."""
    student, twin = (defined(measured.rare_mious.get(key)) for key in STUDENTS)
    if student is not None and twin is not None and sign(student, twin) == "-":
        yield (
            f"warning: mIoU rises, but the rare third of the classes ({listed(measured.rare)}) loses "
            f"{signed(100 * (twin - student))[1:]} points: {per_cent(student)} mIoU with teachers, {per_cent(twin)} without; a "
            "larger losses.prior_adjustment lets teachers name rare classes more often (0.5 is a first value to try)"
        )


def _best(measured: Findings) -> Iterator[str]:
    mious = {key: measured.mious[key] for key in STUDENTS if key in measured.mious}
    if measured.best is not None and measured.best in mious:
        why = why_best(mious, measured.best, measured.split, measured.images)
        yield f"`{BEST}` is the {LABELS[measured.best]}: {why}"


def _of_teachers(measured: Findings) -> Iterator[str]:
    """Teachers that know less than the student without teachers, and teachers that were measured on other pixels."""
    twin = measured.mious.get("supervised")
    comparable = {name: miou for name, miou in measured.mious.items() if name not in (*STUDENTS, *measured.elsewhere)}
    teachers = {name: miou for name, miou in comparable.items() if miou is not None}
    best = max(teachers, key=lambda name: teachers[name], default=None)
    if twin is not None and best is not None and teachers[best] < twin:
        even = "even " if len(teachers) > 1 else ""
        yield (
            f"warning: {even}teacher {best} ({per_cent(teachers[best])}) is worse than the student without teachers "
            f"({per_cent(twin)}), which can learn little from it: train teachers longer (teacher_training.steps), or bring better "
            "ones"
        )
    if count := len(measured.elsewhere):
        yield (
            f"warning: {verb(count, 'teacher', 'teachers')} {listed(measured.elsewhere)} {verb(count, 'was', 'were')} measured on "
            "other images, masks or classes than the students, so that their mIoUs cannot be compared: "
            "run `mgd-pipeline precompute-teachers` and `mgd-pipeline evaluate`"
        )


def _unlike(measured: Findings) -> Iterator[str]:
    """The two students can be compared only if they had the same labels and steps."""
    steps, images = measured.steps, set(measured.trained_on.values())
    what = [f"{steps['distilled']} and {steps['supervised']} steps"] if len(set(steps.values())) > 1 else []
    what += ["different labelled images"] if len(images) > 1 else []
    if what:
        yield (
            f"warning: the distilled student and the student without teachers were trained with {' and '.join(what)}: "
            "the difference between them is not that of distillation alone"
        )


def _of_split(measured: Findings) -> Iterator[str]:
    """Few images, classes that do not occur, and one class everywhere; a split without any class is no news beside `_gain`."""
    if measured.images is not None and measured.images < FEW_IMAGES:
        yield (
            f"warning: networks are compared on {counted(measured.images, 'image')} ({measured.split}), which says little: one "
            "scene more or less is worth points"
        )
    if measured.confusion is None or not measured.confusion[1].any():
        return
    names, counts = measured.confusion
    students = [key for key in STUDENTS if key in measured.mious]
    if absent := [name for name, pixels in zip(names, counts.sum(1), strict=True) if not pixels]:
        line = (
            f"warning: no pixel of the {measured.split} split is {listed(absent)}: no network is measured on "
            f"{verb(len(absent), 'this class', 'these classes')}; mIoU is the mean over the other "
            f"{counted(len(names) - len(absent), 'class', 'classes')}"
        )
        if wrong := [LABELS[key] for key in students if not measured.class_ious.get(key, {}).keys().isdisjoint(absent)]:
            over, it = verb(len(absent), "this class", "some of these classes"), verb(len(absent), "it", "them")
            line += (
                f", and over {over} with an IoU of 0 for the {' and the '.join(wrong)}, "
                f"which {verb(len(wrong), 'sees', 'see')} {it} where nothing is"
            )
        yield line
    told = [name for name, pixels in zip(names, counts.sum(0), strict=True) if pixels]
    if len(told) == 1 and len(names) > 1:
        yield f"warning: the {LABELS[students[0]]} says {told[0]} everywhere: it has learnt nothing yet"


def stored_verdicts(summary: Mapping[str, Any], teachers: Sequence[str]) -> list[str]:
    """What `compare-teachers` could not measure in the caches of these teachers, and why."""
    said = [] if teachers else ["warning: no teacher names classes, so that there is nothing to compare"]
    if len(teachers) == 1:
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
    how = {"-": "less than", "+": "hardly more than"}.get(signed(100 * (reached - constant))[0], "as much as")
    return f", {how} one class everywhere would have ({per_cent(constant)}): it has learnt nothing yet"


def _truth(confusion: Confusion) -> list[int]:
    """The true pixels of each class; the names may be those of another day."""
    return confusion[1].sum(1).tolist()


def _toys(project: Project) -> tuple[str, ...]:
    student, teachers = project.params.student.network.encoder, project.params.teachers.values()
    encoders = dict.fromkeys([student, *(str(teacher.identity.get("encoder", "")) for teacher in teachers)])
    return () if project.params.data.dataset == "shapes" else tuple(name for name in encoders if name.startswith(_TOY))
