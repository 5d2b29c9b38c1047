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
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from mgd_pipeline.caches.build import build_shards, plan_cache, publish
from mgd_pipeline.data.manifest import ImageRow, Manifest, read_manifest, write_manifest
from mgd_pipeline.errors import MemoryShortage, MGDError, Stopped
from mgd_pipeline.params import STUDENTS, HeadTeacher, Params
from mgd_pipeline.students.student import load_student
from mgd_stages.run.class_tables import read_numbers
from mgd_stages.run.held_out import evaluated_rows, few_with_class, predict_row
from mgd_stages.run.loaded_head import Loaded, load_any
from mgd_stages.run.machine import Machine
from mgd_stages.run.progress import console, silence
from mgd_stages.run.project import Project
from mgd_stages.run.teacher_batches import Batching, named_errors, teacher_compute
from mgd_stages.run.teacher_cache import estimate_cache
from mgd_stages.run.teacher_quality import measure_teacher
from mgd_stages.stages.train_student import train_student
from mgd_stages.stages.train_teacher import train_teacher
from mgd_stages.whole.records import shown

WORTH_IT = 50
"""With fewer steps in each training, a rehearsal would take as long as the stages."""
_STEPS = {"cpu": 5, "cuda": 20}
"""Steps of each training, of which the first one does not count, unless they take longer than _PATIENCE: then two steps."""
_PATIENCE = 10.0
"""Seconds for these steps, as the first of them that counts tells."""
IMAGES = {"cpu": 2, "cuda": 16}
"""Labelled, unlabelled and held-out images of the rehearsal, of each as many; a GPU must be busy to be measured."""


@dataclass(frozen=True)
class Rehearsal(Project):
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


@dataclass(frozen=True)
class Cost:
    """What a part of a stage costs on this machine."""

    stage: str
    of: Literal["steps", "training", "held out"]
    """The stage does this work for each step, each image whose targets are to be made, or each held-out image."""
    each: float
    """Seconds"""
    count: int

    @property
    def seconds(self) -> float:
        return self.each * self.count


def say_estimate(project: Project, waiting: set[str], machine: Machine) -> None:
    """Prints how long the waiting stages will take, a line each, if any of them is a long training.

    Raises MemoryShortage if a training does not fit the memory. Any other error is left to the stage itself.
    """
    params, training = project.params, {stage.partition("@")[0] for stage in waiting}
    steps = [params.teacher_training.steps] if "train-teacher" in training else []
    steps += [params.student.steps] if training & {"train-student", "train-student-supervised"} else []
    if max(steps, default=0) < WORTH_IT:
        return
    console.print(
        "estimate: measures a few steps of each training and a few images of each teacher, which takes minutes for large networks "
        "without a GPU"
    )
    folder, total = project.work("rehearsal"), 0.0
    shutil.rmtree(folder, ignore_errors=True)
    try:
        costs = rehearse(project, rehearsal_of(project, waiting, folder), waiting, machine)
        for stage, parts in groupby(costs, lambda cost: cost.stage):
            seconds = sum(part.seconds for part in parts)
            console.print(f"  {shown(stage)}: {roughly(seconds)}")
            total += seconds
        console.print(f"  together: {roughly(total)}, an estimate; compare-teachers and report are not measured")
    except (MemoryShortage, Stopped):
        raise
    except MGDError as error:
        console.print(f"no estimate: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def rehearsal_of(project: Project, waiting: set[str], folder: Path) -> Rehearsal:
    """The project of the rehearsal, whose teachers are the finished ones and those that it will train itself."""
    params = project.params
    teachers = {
        name: teacher.model_copy(
            # A head of the rehearsal is trained on the rehearsal's own cache.
            update={
                "weights": str(
                    folder / f"{name}.safetensors"
                    if f"train-teacher@{name}" in waiting or name in params.heads
                    else project.teacher(name)
                )
            }
        )
        for name, teacher in params.teachers.items()
    }
    changes = {
        "teachers": teachers,
        # Finished teachers know the labels of the whole partition; the rehearsal's own partition is a part of it.
        "losses": params.losses.model_copy(update={"other_partition": True}),
    }
    return Rehearsal(project.base, params.model_copy(update=changes), folder)


def rehearse(project: Project, small: Rehearsal, waiting: set[str], machine: Machine) -> Iterator[Cost]:
    """What the waiting stages of `project` cost, as soon as it is measured, those of a stage together."""
    params, manifest = project.params, read_manifest(project.manifest, project.base)
    held_out = evaluated_rows(project, manifest)
    few = _few_images(manifest, held_out, IMAGES[machine.device.type])
    write_manifest(few, small.manifest)
    alone = replace(machine, resume=False, log_to=None)
    for name in params.train_teachers:
        if (stage := f"train-teacher@{name}") in waiting:
            each = _per_step(small, alone, "teacher_training", f"train-teacher-{name}", partial(train_teacher, name=name))
            yield Cost(stage, "steps", each, params.teacher_training.steps)
    heard = params.losses.used_teachers if "train-student" in waiting else []
    heads = [name for name in params.heads if name in heard or {f"train-head@{name}", f"precompute-teachers@{name}"} & waiting]
    for name in params.bases_first:
        if (stage := f"precompute-teachers@{name}") in waiting or name in (*heard, *heads, *(params.heads[head] for head in heads)):
            if name in heads:
                each = _head_step(small, alone, name)
                if f"train-head@{name}" in waiting:
                    yield Cost(f"train-head@{name}", "steps", each, _head(params, name).steps)
            with silence():
                loaded = load_any(small, name, few, machine.device)
                new = estimate_cache(project, name, manifest, loaded.provenance, loaded.channels).new
                measuring, labelling = _measuring(loaded), _labelling(loaded, Batching(machine.device))
            if stage in waiting:
                yield Cost(stage, "held out", measuring, len(held_out))
                yield Cost(stage, "training", labelling, new)
    for name, stage in (("distilled", "train-student"), ("supervised", "train-student-supervised")):
        if stage in waiting:
            train = partial(train_student, supervised_only=name == "supervised")
            yield Cost(stage, "steps", _per_step(small, alone, "student", f"train-student-{name}", train), params.student.steps)
    if students := [small.student(name) for name in STUDENTS if small.student(name).exists()]:
        student = load_student(students[0], machine.device)
        predict = partial(predict_row, small, few, student.network, student.normalisation)
        yield Cost("evaluate", "held out", len(STUDENTS) * _each(predict, evaluated_rows(small, few)), len(held_out))


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


def _per_step(small: Rehearsal, machine: Machine, section: str, run: str, train: Callable[..., None]) -> float:
    """Seconds a step of a training whose settings stand in `section`, as `run` notes them."""
    each = 0.0
    for steps in (2, _STEPS[machine.device.type]):
        if each * steps <= _PATIENCE:
            settings = getattr(small.params, section).model_copy(update={"steps": steps})
            with silence():
                train(replace(small, params=small.params.model_copy(update={section: settings})), machine=machine)
            each = (read_numbers(small.results / run / "speed.json") or {})["seconds_per_step"]
    return each


def _head(params: Params, name: str) -> HeadTeacher:
    head = params.teachers[name]
    assert isinstance(head, HeadTeacher)
    return head


def _head_step(small: Rehearsal, machine: Machine, name: str) -> float:
    """Seconds a step of a head's training; makes the head of the rehearsal."""
    steps = _STEPS[machine.device.type]
    head = _head(small.params, name).model_copy(update={"steps": steps})
    params = small.params.model_copy(update={"teachers": {**small.params.teachers, name: head}})
    began = time.monotonic()
    with silence():
        train_teacher(replace(small, params=params), name, machine)
    return (time.monotonic() - began) / steps


def _measuring(loaded: Loaded) -> float:
    """Seconds to measure a teacher on one held-out image; 0 if it names no classes."""
    if not loaded.channels[0]:
        return 0.0
    return _each(lambda row: measure_teacher(loaded, [row], []), evaluated_rows(loaded.project, loaded.manifest))


def _labelling(loaded: Loaded, batching: Batching) -> float:
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


def roughly(seconds: float) -> str:
    if seconds < 2.5:
        return "a few seconds"
    if seconds < 117.5:
        return f"about {5 * round(seconds / 5)} s"
    return f"about {seconds / 60:.0f} min" if seconds < 100 * 60 else f"about {seconds / 3600:.1f} hours"
