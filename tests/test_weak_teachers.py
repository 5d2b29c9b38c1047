"""Teachers that cannot teach the student are told of before its training, with what to change; sound ones are not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import TINY
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.errors import DataError
from mgd_pipeline.networks.weights import read_metadata, read_state_dict, save_weights
from mgd_stages.run.class_tables import confusion_csv
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project, open_project
from mgd_stages.run.weak_teachers import weak_teachers
from mgd_stages.stages.compare_teachers import compare_teachers
from mgd_stages.stages.train_student import train_student

BOTH = ("wide", "deep")
SOUND: dict[str, Any] = {"wide": 0.6, "deep": 0.5, "share": 0.9}
LONG = ("teacher_training.steps=900", "student.steps=2000")
QUICK = ("teacher_training.steps=100", "student.steps=200")
DEEP_ALONE = ("losses.pixel_teachers=[deep]", "losses.region=0", "losses.image_teacher=deep")
HERE = "label more images, train the teachers longer (teacher_training.steps) or give wide and deep a pre-trained encoder"


def counts(of: dict[str, str], where: str) -> np.ndarray:
    """(9, 9) pixels of nine equally frequent classes; `of` names those that are absent or lost in the split or in the labels."""
    confusion = np.eye(9, dtype=np.int64) * 80 + 2
    for place, what in of.items():
        k, at = int(place[-1]), place[:-1]
        if at == where:
            confusion[k, k] = 0
            confusion[k] *= what == "lost"
    return confusion


def measured(
    project: Project,
    *,
    wide: float,
    deep: float,
    share: float,
    twin: float | None = None,
    other_labels: bool = False,
    classes: dict[str, dict[str, str]] | None = None,
) -> None:
    """The files that stages would have written."""
    names = read_manifest(project.manifest, project.base).classes
    of_teachers, compared, evaluation = (project.results / name for name in ("teachers", "compare-teachers", "evaluation"))
    for name, miou in zip(BOTH, (wide, deep), strict=True):
        numbers = json.loads((of_teachers / f"{name}.json").read_text())
        (of_teachers / f"{name}.json").write_text(json.dumps({**numbers, "miou": miou}))
        for folder, where in ((of_teachers, "split"), (compared, "labels")):
            (folder / f"{name}-confusion.csv").write_bytes(confusion_csv(counts((classes or {}).get(name, {}), where), names))
    (compared / "metrics.json").write_text(json.dumps({"wide and deep": {"same_class_share": share}}))
    (evaluation / "confusion.csv").write_bytes(confusion_csv(counts({}, "split"), names))
    path = project.student("supervised")
    if other_labels:
        save_weights(path, read_state_dict(path), {**read_metadata(path), "trained_on": "other images"})
    twin_numbers = {} if twin is None else {"supervised": {"miou": twin, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}}
    (evaluation / "metrics.json").write_text(json.dumps({"split": "test", **twin_numbers}))


LOST, LOST_IN_LABELS, ABSENT = {"split7": "lost"}, {"labels7": "lost"}, {"split7": "absent"}
LOST_WHERE_SHOWN = {**ABSENT, **LOST_IN_LABELS}


@pytest.mark.parametrize(
    ("overrides", "files", "says"),
    [
        (LONG, {}, None),
        # --- 1: nothing learnt
        (LONG, {"wide": 0.013, "deep": 0.01}, "even teacher wide reaches 1.3 mIoU on test, hardly more than one class everywhere"),
        (LONG, {"wide": 0.013, "deep": 0.1}, None),
        ((*LONG, "train_teachers=[]"), {"wide": 0.013, "deep": 0.01}, "label more images or bring better teachers"),
        # --- 2: the student without teachers has been measured
        (LONG, {"twin": 0.7}, "even teacher wide reaches 60.0 mIoU on test, and the student without teachers 70.0; before you"),
        (LONG, {"twin": 0.6}, HERE),
        (LONG, {"twin": 0.59}, None),
        (QUICK, {"twin": 0.59}, None),
        (LONG, {"twin": 0.7, "other_labels": True}, None),
        ((*LONG, "evaluation.split=val"), {"twin": 0.7}, None),
        ((*LONG, *DEEP_ALONE), {"twin": 0.55}, ": teacher deep reaches 50.0 mIoU on test, and the student without teachers 55.0"),
        # --- 3: it has not
        (
            QUICK,
            {},
            "after 100 steps from random weights, and the student alone can be expected to reach more in its 200;",
        ),
        ((*QUICK, "student.steps=100"), {}, None),
        ((*QUICK, "teachers.wide.encoder_weights=start.safetensors"), {}, None),
        ((*QUICK, "train_teachers=[wide]"), {}, None),
        # --- 4: contradictions
        (
            LONG,
            {"share": 0.49},
            "teachers wide and deep give the same class to 49.0 % of the cells only; before you train it",
        ),
        (LONG, {"share": 0.5}, None),
        ((*LONG, *DEEP_ALONE), {"share": 0.1}, None),
        # --- 5: classes that no teacher finds
        (
            LONG,
            {"classes": {"wide": LOST, "deep": LOST}},
            "no teacher finds {7} (IoU 0); before you train it, label more",
        ),
        (LONG, {"classes": {"wide": LOST}}, None),
        ((*LONG, *DEEP_ALONE), {"classes": {"deep": LOST}}, "teacher deep does not find {7} (IoU 0)"),
        (LONG, {"classes": dict.fromkeys(BOTH, ABSENT)}, None),
        (LONG, {"classes": dict.fromkeys(BOTH, LOST_IN_LABELS)}, None),  # the split shows that it is found
        (LONG, {"classes": dict.fromkeys(BOTH, LOST_WHERE_SHOWN)}, "no teacher finds {7} (IoU 0)"),
    ],
)
def test_what_is_said_of_which_teachers(
    project: Project, overrides: tuple[str, ...], files: dict[str, Any], says: str | None
) -> None:
    measured(project, **{**SOUND, **files})
    manifest = read_manifest(project.manifest, project.base)
    line = weak_teachers(open_project(project.base / "params.yaml", [*TINY, *overrides]), manifest)
    if says is None:
        assert line is None
    else:
        assert line is not None and line.startswith("warning: the student may learn little from its teachers: ")
        assert says.replace("{7}", manifest.classes[7]) in line and "\n" not in line


def test_a_class_is_one_class_under_its_old_name_and_its_new_one(project: Project) -> None:
    """The labelled images decide only where the split does not show the class."""
    measured(project, **SOUND, classes=dict.fromkeys(BOTH, LOST_IN_LABELS))
    manifest = read_manifest(project.manifest, project.base)
    for name in BOTH:
        path = project.results / f"compare-teachers/{name}-confusion.csv"
        path.write_text(path.read_text().replace(manifest.classes[7], "old name"))
    assert weak_teachers(open_project(project.base / "params.yaml", [*TINY, *LONG]), manifest) is None


def test_both_stages_say_it_and_a_student_without_teachers_does_not(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    said, machine = "the student may learn little from its teachers", Machine(torch.device("cpu"))
    measured(project, **SOUND, classes=dict.fromkeys(BOTH, LOST))
    train_student(project, machine, supervised_only=True)
    assert said not in capsys.readouterr().out
    train_student(project, machine)
    printed = capsys.readouterr().out
    assert printed.index(said) < printed.index("train-student distilled: 0/")
    compare_teachers(project)
    assert said in capsys.readouterr().out
    path: Path = project.results / "teachers/deep.json"
    path.write_text("{")
    for stage in (lambda: train_student(project, machine), lambda: compare_teachers(project)):
        with pytest.raises(DataError, match=r"deep\.json: is not what a stage wrote; remove it, and run `mgd-pipeline precompute"):
            stage()
        assert "0/" not in capsys.readouterr().out, "before the work"
