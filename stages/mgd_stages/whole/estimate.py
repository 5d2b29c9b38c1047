"""How long the stages of a project will take on this machine, measured by a rehearsal.

A rehearsal runs the same stages on a few images and for a few steps, below .mgd/work/rehearsal. It also shows before the first long
training whether every training fits the memory.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mgd_pipeline.caches.build import build_shards, plan_cache, publish
from mgd_pipeline.data.manifest import ImageRow, Manifest, read_manifest, write_manifest
from mgd_pipeline.errors import MemoryShortage, MGDError, Stopped
from mgd_pipeline.params import STUDENTS
from mgd_pipeline.students.student import load_student
from mgd_stages.run.class_tables import read_numbers
from mgd_stages.run.held_out import evaluated_rows, few_with_class, predict_row
from mgd_stages.run.loaded_teacher import LoadedTeacher, load_teacher
from mgd_stages.run.machine import Machine
from mgd_stages.run.progress import console, silence
from mgd_stages.run.project import Project
from mgd_stages.run.teacher_batches import Batching, named_errors, teacher_compute
from mgd_stages.run.teacher_cache import estimate_cache
from mgd_stages.run.teacher_quality import measure_teacher
from mgd_stages.stages.train_student import train_student
from mgd_stages.stages.train_teacher import train_teacher

WORTH_IT = 50
"""With fewer steps in each training, a rehearsal would take as long as the stages."""
_STEPS = {"cpu": 3, "cuda": 20}
"""Steps of each training; the first one does not count."""
_IMAGES = {"cpu": 2, "cuda": 16}
"""Labelled, unlabelled and held-out images of the rehearsal, of each as many; a GPU must be busy to be measured."""


@dataclass(frozen=True)
class _Rehearsal(Project):
    """A project that reads what another one reads, and writes below a folder of its own."""

    folder: Path

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def targets(self, name: str) -> Path:
        return self.folder / f"targets/{name}.zarr"

    def student(self, name: str) -> Path:
        return self.folder / f"students/{name}/student.safetensors"

    def work(self, name: str) -> Path:
        return self.folder / "work" / name


def say_estimate(project: Project, waiting: set[str], machine: Machine) -> None:
    """Prints how long the waiting stages will take, a line each, if any of them is a long training.

    Raises MemoryShortage if a training does not fit the memory. Any other error is left to the stage itself.
    """
    params, training = project.params, {stage.partition("@")[0] for stage in waiting}
    steps = [params.teacher_training.steps] if "train-teacher" in training else []
    steps += [params.student.steps] if training & {"train-student", "train-student-supervised"} else []
    if max(steps, default=0) < WORTH_IT:
        return
    console.print("estimate: measures a few steps of each training and a few images of each teacher")
    folder, total = project.work("rehearsal"), 0.0
    shutil.rmtree(folder, ignore_errors=True)
    try:
        for stage, seconds in _rehearse(project, _rehearsal(project, waiting, machine, folder), waiting, machine):
            console.print(f"  {stage}: {_roughly(seconds)}")
            total += seconds
        console.print(f"  together: {_roughly(total)}, an estimate; compare-teachers and report are not measured")
    except (MemoryShortage, Stopped):
        raise
    except MGDError as error:
        console.print(f"no estimate: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rehearsal(project: Project, waiting: set[str], machine: Machine, folder: Path) -> _Rehearsal:
    """The project of the rehearsal, whose teachers are the finished ones and those that it will train itself."""
    params, steps = project.params, {"steps": _STEPS[machine.device.type]}
    teachers = {
        name: teacher.model_copy(
            update={"weights": str(folder / f"{name}.safetensors" if f"train-teacher@{name}" in waiting else project.teacher(name))}
        )
        for name, teacher in params.teachers.items()
    }
    changes = {
        "teachers": teachers,
        "teacher_training": params.teacher_training.model_copy(update=steps),
        "student": params.student.model_copy(update=steps),
        # Finished teachers know the labels of the whole partition; the rehearsal's own partition is a part of it.
        "losses": params.losses.model_copy(update={"other_partition": True}),
    }
    return _Rehearsal(project.base, params.model_copy(update=changes), folder)


def _rehearse(project: Project, small: _Rehearsal, waiting: set[str], machine: Machine) -> Iterator[tuple[str, float]]:
    """Name and seconds of each waiting stage of `project`, as soon as it is measured."""
    params, manifest = project.params, read_manifest(project.manifest, project.base)
    held_out = evaluated_rows(project, manifest)
    few = _few_images(manifest, held_out, _IMAGES[machine.device.type])
    write_manifest(few, small.manifest)
    alone = replace(machine, resume=False, log_to=None)
    for name in params.train_teachers:
        if (stage := f"train-teacher@{name}") in waiting:
            with silence():
                train_teacher(small, name, alone)
            yield stage, _per_step(small, f"train-teacher-{name}") * params.teacher_training.steps
    heard = params.losses.used_teachers if "train-student" in waiting else []
    for name in params.teachers:
        if (stage := f"precompute-teachers@{name}") in waiting or name in heard:
            with silence():
                loaded = load_teacher(small, name, few, machine.device)
                new = estimate_cache(project, name, manifest, loaded.provenance, loaded.channels).new
                seconds = _measuring(loaded) * len(held_out) + _labelling(loaded, Batching(machine.device)) * new
            if stage in waiting:
                yield stage, seconds
    for name, stage in (("distilled", "train-student"), ("supervised", "train-student-supervised")):
        if stage in waiting:
            with silence():
                train_student(small, alone, supervised_only=name == "supervised")
            yield stage, _per_step(small, f"train-student-{name}") * params.student.steps
    if students := [small.student(name) for name in STUDENTS if small.student(name).exists()]:
        student = load_student(students[0], machine.device)
        predict = partial(predict_row, small, few, student.network, student.normalisation)
        yield "evaluate", len(STUDENTS) * len(held_out) * _each(predict, evaluated_rows(small, few))


def _few_images(manifest: Manifest, held_out: Sequence[ImageRow], count: int) -> Manifest:
    """A manifest of at most `count` labelled, unlabelled and held-out images each, whose masks have a class."""
    labelled = [row for row, _ in few_with_class(manifest, manifest.labelled, count)]
    training = [*labelled, *manifest.unlabelled[:: -(-len(manifest.unlabelled) // count) or 1]]
    rows = [*training, *(row for row, _ in few_with_class(manifest, held_out, count))]
    return replace(
        manifest,
        rows={row.image_id: row for row in sorted(rows, key=lambda row: row.image_id)},
        subsets={row.image_id: manifest.subsets[row.image_id] for row in sorted(training, key=lambda row: row.image_id)},
    )


def _per_step(small: Project, run: str) -> float:
    """Seconds, as the training noted them."""
    return (read_numbers(small.results / run / "speed.json") or {})["seconds_per_step"]


def _measuring(loaded: LoadedTeacher) -> float:
    """Seconds to measure a teacher on one held-out image; 0 if it names no classes."""
    if not loaded.channels[0]:
        return 0.0
    return _each(lambda row: measure_teacher(loaded, [row], []), evaluated_rows(loaded.project, loaded.manifest))


def _labelling(loaded: LoadedTeacher, batching: Batching) -> float:
    """Seconds for the targets of one image; makes the teacher's cache of the rehearsal."""
    now = estimate_cache(loaded.project, loaded.name, loaded.manifest, loaded.provenance, loaded.channels)
    plan = plan_cache(now.work, now.output, now.provenance, now.layout, now.images)
    assert plan is not None  # the folder of the rehearsal is new
    began = time.monotonic()
    with named_errors(loaded.name, batching):
        build_shards(plan, plan.todo, teacher_compute(loaded, batching), batching.made_by(), lambda _: None)
    publish(plan)
    return (time.monotonic() - began) / len(now.images)


def _each(work: Callable[[Any], object], items: Sequence[Any]) -> float:
    """Mean seconds of the work on an item; the first item is done once more, before, so that everything is warm."""
    work(items[0])
    began = time.monotonic()
    for item in items:
        work(item)
    return (time.monotonic() - began) / len(items)


def _roughly(seconds: float) -> str:
    if seconds < 60:
        return "under 1 min"
    return f"about {seconds / 60:.0f} min" if seconds < 100 * 60 else f"about {seconds / 3600:.1f} hours"
