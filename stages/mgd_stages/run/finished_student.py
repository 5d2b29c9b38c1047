"""A finished student of a project, ready to be measured or trained further."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mgd_pipeline.data.classes import compare_names
from mgd_pipeline.data.manifest import Manifest
from mgd_pipeline.errors import DataError, ParamsError
from mgd_pipeline.networks.segmentation import SegmentationNetwork
from mgd_pipeline.students.student import Student, load_student
from mgd_pipeline.training.priors import adjust_logits, labelled_pixels
from mgd_stages.run.progress import console, say_renamed
from mgd_stages.run.project import Project


def finished_student(name: str, path: Path, device: torch.device, manifest: Manifest) -> Student:
    """A student that fits the data set; says which classes were renamed since. Raises DataError if its classes or its image size
    differ; WeightsError."""
    student, again = load_student(path, device), "run `mgd-pipeline train-student` again"
    if len(student.classes) != len(manifest.classes):
        raise DataError(
            f"{path}: was trained for the classes {_few(student.classes)}, and the data set has {_few(manifest.classes)}; "
            f"{again}, or move the student away"
        )
    if fault := compare_names("the student", student.classes, manifest.classes).fault:
        keep = "write data.classes in the student's order and run `mgd-pipeline prepare-data`"
        raise DataError(f"{path}: {fault}; {keep}, or {again}")
    say_renamed(f"student {name}", student.classes, manifest.classes)
    if student.long_side != manifest.long_side:
        raise DataError(
            f"{path}: was trained with data.long_side {student.long_side}, and the data set is prepared with "
            f"{manifest.long_side}; {again}"
        )
    return student


def _few(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > 6 else ""
    return f"{', '.join(names[:6])}{more}"


@dataclass(frozen=True)
class StartingStudent:
    """The student that a fine-tuning begins with."""

    network: SegmentationNetwork
    """On the CPU, its logits as they were trained, without `student.logit_adjustment`"""
    path: str
    """Of its file, below the project"""
    sha256: str
    """Of its file"""


def starting_student(project: Project, name: str, manifest: Manifest) -> StartingStudent:
    """Raises DataError if there is no such student, or one of other classes; ParamsError if it is another network."""
    path, params = project.student(name), project.params
    if not path.exists():
        command = f"mgd-pipeline train-student{' --supervised-only' if name == 'supervised' else ''}"
        raise DataError(f"{path}: no such file, and --quantised fine-tunes a finished student; run `{command}` first")
    student = finished_student(name, path, torch.device("cpu"), manifest)
    now = params.student.network.model_dump(exclude={"encoder_weights"})
    for key, value in now.items():
        if (then := student.metadata["network"].get(key, value)) != value:
            raise ParamsError(
                f"student.network.{key}: is {value}, but {path} was trained with {then}; set it to {then}, or train the student "
                "again"
            )
    if params.losses.feature:
        console.print("losses.feature: is left out of the fine-tuning; the projections of that term are not in a student's file")
    if params.student.logit_adjustment:
        adjust_logits(student.network, labelled_pixels(manifest), -params.student.logit_adjustment)
    return StartingStudent(student.network, str(path.relative_to(project.base)), hashlib.sha256(path.read_bytes()).hexdigest())
