"""`mgd-pipeline init --hours`: the largest networks that this machine can train well enough in a given time, and the steps.

Scales are measured from the smallest to the largest by a rehearsal of all stages on copies of a few images, until one does not fit.
"""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from mgd_pipeline.data.datasets import index_dataset
from mgd_pipeline.data.images import PhotoRules, read_photo
from mgd_pipeline.data.partition import partition_images
from mgd_pipeline.errors import DataError, MemoryShortage, ParamsError
from mgd_pipeline.params import Params
from mgd_pipeline.params_file import parse_params
from mgd_pipeline.words import counted
from mgd_stages.projects.init import Sized
from mgd_stages.projects.machines import (
    CPU,
    CPU_192,
    CPU_384,
    CPU_512,
    LARGE_GPU,
    SMALL_GPU,
    Scale,
    from_random_weights,
    on_scale,
    say_unavailable,
    unavailable_weights,
)
from mgd_stages.run.machine import Machine
from mgd_stages.run.progress import console, silence
from mgd_stages.run.project import Project
from mgd_stages.stages.prepare_data import prepare_data
from mgd_stages.whole.estimate import IMAGES, rehearsal_of, rehearse, roughly

SCALES = (CPU_192, CPU, CPU_384, CPU_512, SMALL_GPU, LARGE_GPU)
# The fewest steps that are worth the time. Students gained from teachers of 1,000 steps, on the built-in data set and on CamVid.
# There, MobileNetV2 from random weights reached 27 % mIoU from labels alone and 31 % distilled after 1,000 steps, 28 and 32 % after
# 2,000, 32 and 35 % after 5,000 (docs/experiments/2026-11-28-camvid-longer-training.md). Teachers of 100 steps and students of 200
# know nothing.
STUDENT_STEPS = 2000
MOST_STEPS = 40_000
"""As many as MGD's longest training of a student; more is not known to help."""
RESERVE = 0.15
"""Share of the time that is kept for what is not measured, such as pictures and the report, and for a machine with other work."""
_GROWTH = 1.5
"""On a CPU a scale takes at least so many times as long as the scale below; on a GPU small networks all take about as long."""
_READ, _TRIED = 8, 40
"""Photos that a measurement uses, of the first of the data set that it tries to read."""


@dataclass(frozen=True)
class Work:
    """How many images the stages go through."""

    training: int
    held_out: int


@dataclass(frozen=True)
class Costs:
    """Seconds on this machine."""

    scale: Scale
    teacher_step: float
    """A step of both teachers together; `student_step` likewise of both students."""
    student_step: float
    image: float
    """The targets of one training image from both teachers."""
    held_out: float
    """One held-out image through both teachers and both students."""

    def stages(self, work: Work, student_steps: int) -> dict[str, float]:
        """Seconds of each kind of stage, if a teacher takes half of the student's steps, about as where distillation gained."""
        return {
            f"teachers, {student_steps // 2:,} steps each": student_steps // 2 * self.teacher_step,
            f"targets of {counted(work.training, 'image')}": work.training * self.image,
            f"students, {student_steps:,} steps each": student_steps * self.student_step,
            f"evaluation on {counted(work.held_out, 'image')}": work.held_out * self.held_out,
        }

    def hours(self, work: Work, student_steps: int = STUDENT_STEPS) -> float:
        """With the reserve."""
        return sum(self.stages(work, student_steps).values()) / (1 - RESERVE) / 3600


def choose(measured: Sequence[Costs], hours: float, work: Work) -> tuple[Costs, int]:
    """The last scale whose fewest useful steps fit the hours, and the student's steps: all that fit, in hundreds.

    Raises ParamsError, with the least hours, if none fits.
    """
    fitting = [costs for costs in measured if costs.hours(work) <= hours]
    if not fitting:
        least = math.ceil(10 * min(costs.hours(work) for costs in measured)) / 10
        raise ParamsError(
            f"--hours {hours:g}: too few for a network worth having; {STUDENT_STEPS // 2:,} steps of the smallest teachers and "
            f"{STUDENT_STEPS:,} of the student take {least:g} hours on this machine; give these, or see the whole way by --quick"
        )
    costs = fitting[-1]
    fixed = costs.hours(work, 0)
    steps = (hours - fixed) / (costs.hours(work) - fixed) * STUDENT_STEPS
    return costs, int(min(MOST_STEPS, max(STUDENT_STEPS, steps // 100 * 100)))


def within(hours: float, machine: Machine, scales: Sequence[Scale] = SCALES) -> Sized:
    """Settings that `hours` suffice for on this machine, for `init_project`. Raises ParamsError for an impossible number."""
    if not 0 < hours < math.inf:
        raise ParamsError(f"--hours {hours:g}: write a number of hours above 0, such as 2 or 0.5")
    return partial(_within, hours, machine, scales)


def _within(hours: float, machine: Machine, scales: Sequence[Scale], params: Params) -> tuple[Params, list[str]]:
    index = index_dataset(params.data, Path())
    held_out = sum(sample.split == params.evaluation.split and sample.mask is not None for sample in index.samples)
    work = Work(len(partition_images(params.data, index.samples)), held_out)
    console.print(f"--hours {hours:g}: measures this machine with {machine.device}, for a minute or a few")
    candidates: dict[str, tuple[Params, list[str]]] = {}
    measured: list[Costs] = []
    with tempfile.TemporaryDirectory(prefix="mgd-hours-") as folder:
        photos = Path(folder) / "photos"
        _few_photos(params, photos, IMAGES[machine.device.type])
        for scale in scales:
            candidate = on_scale(params, scale)
            absent = unavailable_weights(candidate)
            candidates[scale.name] = from_random_weights(candidate, absent), say_unavailable(absent, kept=False)
            try:
                costs = measure(candidates[scale.name][0], scale, photos, machine, work, hours if measured else math.inf)
            except MemoryShortage:
                if not measured:
                    raise
                console.print(f"  {scale.name}: does not fit the memory")
                break
            if costs is None:
                console.print(f"  {scale.name}: takes too long")
                break
            measured.append(costs)
            console.print(
                f"  {scale.name}: {costs.teacher_step:.2g} s a step of both teachers, {costs.student_step:.2g} s of both students, "
                f"{costs.image:.2g} s for the targets of an image; at least {costs.hours(work):.1f} hours"
            )
            if machine.device.type == "cpu" and _GROWTH * costs.hours(work) > hours:
                break
    costs, steps = choose(measured, hours, work)
    chosen, said = candidates[costs.scale.name]
    raw = chosen.model_dump()
    raw["teacher_training"]["steps"], raw["student"]["steps"] = steps // 2, steps
    networks = [*(teacher["encoder"] for teacher in raw["teachers"].values()), raw["student"]["network"]["encoder"]]
    more = " (more steps are not known to help)" if steps == MOST_STEPS else ""
    return parse_params(raw), [
        *said,
        f"--hours {hours:g}: {costs.scale.name}: teachers {networks[0]} and {networks[1]}, student {networks[2]}, views of "
        f"{costs.scale.crop} x {costs.scale.crop} pixels, images of {costs.scale.long_side}",
        *(f"  {part}: {roughly(seconds)}" for part, seconds in costs.stages(work, steps).items()),
        f"  together: about {costs.hours(work, steps):.1f} hours, {RESERVE:.0%} of them in reserve{more}",
    ]


def measure(params: Params, scale: Scale, photos: Path, machine: Machine, work: Work, hours: float) -> Costs | None:
    """The costs of a scale's settings, by a rehearsal on the photos; None as soon as they are known not to fit the hours.

    Networks begin from random weights, which takes as long and needs no hub. Raises MemoryShortage.
    """
    raw = params.model_dump()
    for network in (*raw["teachers"].values(), raw["student"]["network"]):
        network["encoder_weights"] = "none"
    classes = [f"class {number}" for number in range(len(index_dataset(params.data, Path()).classes))]
    raw["data"] = {"dataset": "folder", "root": str(photos), "partition": "1/1", "classes": classes, "long_side": scale.long_side}
    raw["evaluation"]["split"] = "val"
    base = photos.parent / scale.name
    project = Project(base, parse_params(raw))
    with silence():
        prepare_data(project)
    trainings = [*(f"train-teacher@{name}" for name in params.train_teachers), "train-student", "train-student-supervised"]
    waiting = {*trainings, *(f"precompute-teachers@{name}" for name in params.teachers)}
    costs = Costs(scale, 0, 0, 0, 0)
    for cost in rehearse(project, rehearsal_of(project, waiting, base / "rehearsal"), waiting, machine):
        match cost.of:
            case "steps":
                key = "teacher_step" if cost.stage.startswith("train-teacher") else "student_step"
            case "training":
                key = "image"
            case "held out":
                key = "held_out"
        costs = replace(costs, **{key: getattr(costs, key) + cost.each})
        if costs.hours(work) > hours:
            return None
    shutil.rmtree(base)
    return costs


def _few_photos(params: Params, folder: Path, count: int) -> None:
    """Writes a data set of `count` labelled, unlabelled and held-out images each below `folder`: the first photos of the data set,
    each in its size, with masks of random classes. Raises DataError if none of them can be read."""
    index = index_dataset(params.data, Path())
    samples = [sample for sample in index.samples if sample.split == "train"] or index.samples
    photos: list[np.ndarray] = []
    problem = None
    # What params.yaml may have to say of photos does not change how long they take.
    rules = PhotoRules(background_colour=(0, 0, 0), value_range=(0, 65535))
    for sample in samples[:_TRIED]:
        try:
            photos.append(read_photo(Path(params.data.root) / sample.image, rules)[0])
        except DataError as error:
            problem = error
        if len(photos) == _READ:
            break
    if not photos:
        raise DataError(f"--hours: no photo could be measured: {problem}")
    random = np.random.default_rng(0)
    for number, photo in zip(range(3 * count), itertools.cycle(photos), strict=False):
        name = f"{'train' if number < 2 * count else 'val'}/{number}"
        image = photo.copy()
        image[:16, :16] = 5 * number  # no image of val may be a copy of one of train
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"images/{name}.jpg", quality=90)
        if number < count or number >= 2 * count:
            cells = random.integers(0, len(index.classes), (16, 16), np.uint8)
            (folder / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
            mask = Image.fromarray(cells).resize((photo.shape[1], photo.shape[0]), Image.Resampling.NEAREST)
            mask.save(folder / f"masks/{name}.png")
