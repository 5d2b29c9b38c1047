"""Whether teachers can be expected to teach a student anything, as far as this is known before the student is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from mgd_pipeline.data.classes import current_names
from mgd_pipeline.data.manifest import Manifest
from mgd_pipeline.params import SmpTeacher
from mgd_pipeline.words import counted, listed, per_cent, verb
from mgd_stages.run.class_tables import read_confusion, read_numbers
from mgd_stages.run.project import Project
from mgd_stages.run.verdicts import (
    FEW_STEPS,
    Confusion,
    beside_one_class,
    findings,
    measured_before,
    one_class_everywhere,
    sign,
)

_Teachers = Mapping[str, tuple[Mapping[str, Any], Confusion | None]]
"""The teachers of the losses that name classes: numbers and confusion matrix on the evaluation split."""


@dataclass(frozen=True)
class _Reason:
    said: str
    changes: tuple[str, ...]
    """What to change, each as an imperative."""


def weak_teachers(project: Project, manifest: Manifest) -> str | None:
    """A warning in one line: why the student may learn little from the teachers of the losses, and what to change; None without.

    Teachers are judged on the evaluation split, because they were often trained on the labelled images and look too good there.
    The files of `precompute-teachers`, `compare-teachers` and an earlier `evaluate` are read; what is missing gives no reason.
    Raises DataError for a damaged file. The rules:

    1. No teacher is clearly better than one class everywhere (less than 1.2 times its mIoU, as in the check of a teacher's input):
       the teachers have learnt nothing yet.
    2. No teacher is better than the student without teachers, if the last evaluation measured that student on the same split with
       the same labelled images. This is the measured answer, and students have gained from better teachers only (docs/results.md).
    3. Before that student was measured it can be expected to be better if all teachers were trained here from random weights, for
       fewer steps than the student and fewer than 500. In such runs the student alone was better; with 1,000 steps for the teachers
       and 2,500 for the student it was not, so that fewer steps alone are no reason.
    4. Two teachers give the same class to less than half of the cells. Where two teachers disagree at most one is right, so that
       they are right on at most (1 + share)/2 of the cells on average, which is 75 % here.
    5. A class of the labels has IoU 0 for every teacher. The evaluation split decides where it shows the class, else the labelled
       images: a class that a teacher does not find on the images that it was trained on is not in its targets.
    """
    params = project.params
    of_split, _ = measured_before(project)
    used = {name: of_split[name] for name in params.teachers if name in params.losses.used_teachers and "miou" in of_split[name][0]}
    reasons = [*_low(project, manifest, used), *_contradicting(project, used), *_without_class(project, manifest, used)]
    if not reasons:
        return None
    changes = list(dict.fromkeys(change for reason in reasons for change in reason.changes))
    said = "; ".join(reason.said for reason in reasons)
    return f"warning: the student may learn little from its teachers: {said}; before you train it, {_alternatives(changes)}"


def _alternatives(changes: list[str]) -> str:
    return " or ".join([", ".join(changes[:-1]), changes[-1]] if len(changes) > 1 else changes)


def _low(project: Project, manifest: Manifest, used: _Teachers) -> Iterator[_Reason]:
    """Rules 1 to 3, of which the first that holds is enough."""
    params, measured, where = project.params, findings(project), project.params.evaluation.split
    mious = {name: miou for name in used if (miou := measured.mious.get(name)) is not None}
    if not mious:
        return
    best = max(mious, key=lambda name: mious[name])
    here = {
        name: teacher for name in used if name in params.train_teachers and isinstance(teacher := params.teachers[name], SmpTeacher)
    }
    random = [name for name, teacher in here.items() if teacher.encoder_weights == "none"]
    changes = ["label more images"]
    changes += ["train the teachers longer (teacher_training.steps)"] if here else ["bring better teachers"]
    changes += [f"give {listed(random)} a pre-trained encoder (encoder_weights)"] if random else []
    reached = f"{'even ' if len(mious) > 1 else ''}teacher {best} reaches {per_cent(mious[best])} mIoU on {where}"
    constants = {name: one_class_everywhere(confusion[1]) for name in mious if (confusion := used[name][1]) is not None}
    beside = {name: beside_one_class(mious[name], constant) for name, constant in constants.items() if constant is not None}
    twin, teacher_steps = measured.mious.get("supervised"), params.teacher_training.steps
    if measured.split != where or "supervised" in measured.replaced or best in measured.elsewhere:
        twin = None
    if len(beside) == len(mious) and all(beside.values()):
        yield _Reason(f"{reached}{beside[best]}", tuple(changes))
    elif twin is not None and measured.trained_on.get("supervised") == manifest.partition_fingerprint:
        if sign(mious[best], twin) != "+":
            yield _Reason(f"{reached}, and the student without teachers {per_cent(twin)}", tuple(changes))
    elif random == list(used) and teacher_steps < min(params.student.steps, FEW_STEPS):
        steps = f"after {counted(teacher_steps, 'step')} from random weights"
        alone = f"the student alone can be expected to reach more in its {params.student.steps}"
        yield _Reason(f"{reached} {steps}, and {alone}", tuple(changes))


def _contradicting(project: Project, used: _Teachers) -> Iterator[_Reason]:
    """Rule 4."""
    stored = read_numbers(project.results / "compare-teachers/metrics.json") or {}
    for first, second in combinations(used, 2):
        share = stored.get(f"{first} and {second}", {}).get("same_class_share")
        if share is not None and share < 0.5:
            said = f"teachers {first} and {second} give the same class to {per_cent(share)} % of the cells only"
            yield _Reason(said, ("listen to the better teacher alone (losses.pixel_teachers)",))


def _without_class(project: Project, manifest: Manifest, used: _Teachers) -> Iterator[_Reason]:
    """Rule 5."""
    folder = project.results / "compare-teachers"
    on_split = [_counts(confusion, manifest) for _, confusion in used.values()]
    on_labelled = [_counts(read_confusion(folder / f"{name}-confusion.csv"), manifest) for name in used]
    shown: dict[str, list[tuple[int, int]]] = {}
    for of_teachers in (on_labelled, on_split):  # the split decides where it shows the class
        for name in dict.fromkeys(name for counts in of_teachers for name in counts):
            of_class = [counts[name] for counts in of_teachers if name in counts]
            if len(of_class) == len(used) and any(pixels for pixels, _ in of_class):
                shown[name] = of_class
    if unknown := [name for name, of_class in shown.items() if not any(right for _, right in of_class)]:
        nobody = "no teacher finds" if len(used) > 1 else f"teacher {listed(list(used))} does not find"
        them = verb(len(unknown), "this class", "these classes")
        yield _Reason(f"{nobody} {listed(unknown)} (IoU 0)", (f"label more images with {them}", f"join {them} with others"))


def _counts(confusion: Confusion | None, manifest: Manifest) -> dict[str, tuple[int, int]]:
    """By class, as it is called now, its pixels, and how many of them are right."""
    if confusion is None:
        return {}
    names, counts = confusion
    pixels = zip(counts.sum(1).tolist(), np.diag(counts).tolist(), strict=True)
    return dict(zip(current_names(names, manifest.classes), pixels, strict=True))
