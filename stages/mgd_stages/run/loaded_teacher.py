"""A frozen teacher of the project, ready to label its images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mgd_pipeline.access import is_there
from mgd_pipeline.caches.provenance import expected_provenance
from mgd_pipeline.data.images import scaled_size
from mgd_pipeline.data.manifest import ImageRow, Manifest
from mgd_pipeline.errors import NonFiniteError, WeightsError, shell_command
from mgd_pipeline.networks.counting import multiply_accumulates, parameter_count
from mgd_pipeline.networks.encoders import normalisation, unrecorded_normalisation
from mgd_pipeline.networks.inference import resize_logits
from mgd_pipeline.networks.weights import read_metadata, require_access, sha256_of_state
from mgd_pipeline.params import FixedSizeTeacher, ImportedTeacher, PromptsTeacher, SmpTeacher, TargetsParams, TimmTeacher
from mgd_pipeline.teachers.kinds import build_teacher
from mgd_pipeline.teachers.looks import class_scores, look, shown_sizes
from mgd_pipeline.teachers.probing import check_sees, on_meta, output_channels
from mgd_pipeline.teachers.teacher import Teacher, read_for, teacher_provenance
from mgd_stages.run.progress import console
from mgd_stages.run.project import Project, check_teacher, few_sizes

_OTHER_SIZE = 1.5
"""Ratio of an image's size to the published size of a teacher from which on the teacher is not what was published."""

Scores = Callable[[TargetsParams, bool, tuple[int, ...]], torch.Tensor]
"""(K, H, W) logits at a size of an image, or of its mirror image, which is seen as the options say."""


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher of params.yaml with its weights, in eval mode, and the data set whose images it labels."""

    project: Project
    manifest: Manifest
    name: str
    teacher: Teacher
    provenance: dict[str, Any]
    """Of the targets that it would make now"""

    @property
    def channels(self) -> tuple[int, int]:
        """Classes and channels of the features of its targets; 0 for an output that it does not give."""
        classes, features = output_channels(self.name, self.teacher)
        return (classes if self.teacher.groups is None else len(self.teacher.groups)), features

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The names of its classes if these are the data set's under the names of another day; None if unknown."""
        return self.teacher.labels if self.teacher.groups is None else None

    def cost(self) -> tuple[int, int]:
        """Parameters, and multiply-accumulate operations on a view of the parameters' size."""
        network, size = self.teacher.network, self.teacher.size
        height, width = size or self.project.params.views.crop
        return parameter_count(network), multiply_accumulates(network, height, width, 1 if size else self.teacher.multiple)

    def on(self, row: ImageRow) -> Scores:
        """What it says of an image, see `Scores`."""
        image = self.image(row)

        def scores(options: TargetsParams, mirrored: bool, size: tuple[int, ...]) -> torch.Tensor:
            return scores_of(self, np.ascontiguousarray(image[:, ::-1]) if mirrored else image, options, size)

        return scores

    def image(self, row: ImageRow) -> np.ndarray:
        """(H, W, 3) uint8 as this teacher is shown an image, see `read_for`."""
        manifest = self.manifest
        return read_for(self.teacher, manifest.image_file(row), manifest.long_side, manifest.decoding(row))


def require_weights(project: Project, name: str) -> Path:
    """The file of a teacher's weights. Raises WeightsError if there is none, AccessError if it cannot be read."""
    path = project.teacher(name)
    require_access(path)
    if not (is_there(path) and path.is_file()):
        train = shell_command("mgd-pipeline", "train-teacher", "--teacher", name)
        made_here = name in project.params.train_teachers or name in project.params.heads
        hint = f"run `{train}`" if made_here else "put it there"
        raise WeightsError(f"teachers.{name}.weights: {path}: no such file; {hint}")
    return path


def finished_teacher(project: Project, name: str, classes: Sequence[str]) -> Teacher:
    """A teacher with its weights, in eval mode on the CPU; the data set need not be here. Raises what `load_teacher` raises."""
    check_teacher(project, name)
    path = require_weights(project, name)
    built = build_teacher(name, project.params.teachers[name], classes, project.base)
    for key, value in built.network.named_parameters():
        if not value.isfinite().all():
            raise NonFiniteError(f"teacher {name}: {path}: {key} holds NaN or infinity; use other weights")
    return built


def load_teacher(project: Project, name: str, manifest: Manifest, device: torch.device) -> LoadedTeacher:
    """Raises ParamsError for an unknown name and for a head, WeightsError for weights that are missing or do not fit,
    NonFiniteError for weights that are not finite."""
    params, path = project.params, project.teacher(name)
    built = finished_teacher(project, name, manifest.classes)
    teacher = params.teachers[name]
    # A text-prompted teacher resizes its input itself: its outputs are squares for every input.
    if built.size is None and not isinstance(teacher, (ImportedTeacher, PromptsTeacher)):
        sizes = probed_sizes(project, name, manifest, built.multiple)
        fixable = isinstance(teacher, FixedSizeTeacher)
        check_sees(name, lambda: on_meta(built.network), built.multiple, sizes, fixed_size=fixable)
    # Channels last, as its input: convolutions are faster so, most of all in bfloat16, and differ in the last bits.
    built.network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    expected = expected_provenance(teacher, params.targets, manifest.classes, manifest.long_side)
    weights = sha256_of_state(built.network.state_dict())
    provenance = teacher_provenance(expected, built, weights, read_metadata(path).get("trained_on"))
    return LoadedTeacher(project, manifest, name, built, provenance)


def probed_sizes(project: Project, name: str, manifest: Manifest, multiple: int) -> list[tuple[int, int]]:
    """Sizes (height, width) in pixels on which a teacher of every size is tried without data, if its sides must be multiples of
    `multiple`:
    the smallest image, the largest image, and one whose sides are odd multiples of 32 if there is one.

    A teacher that names classes is measured on whole images, too.
    """
    params = project.params
    rows = [*manifest.training, *manifest.split(params.evaluation.split)]
    images = few_sizes(manifest.size(row) for row in rows)
    teacher = params.teachers[name]
    looks = [params.targets] if isinstance(teacher, TimmTeacher) else [params.targets, TargetsParams()]
    return [size for options in looks for size in shown_sizes(images, teacher.short_side, multiple, options)]


def other_size(loaded: LoadedTeacher) -> tuple[str, str] | None:
    """That a teacher sees images at another size than its publishers name, and the remedy; None if it does not, or if none is
    known."""
    notes, teacher = read_metadata(loaded.project.teacher(loaded.name)), loaded.teacher
    noted = notes.get("size") if notes.get("kind") == "transformers" else None
    if noted is None or teacher.short_side is not None or (teacher.size is not None and teacher.fixed_size == "resize"):
        return None
    published = noted if isinstance(noted, int) else min(noted)
    shown = int(np.median([min(loaded.manifest.size(row)) for row in loaded.manifest.training]))
    if teacher.size is not None:
        shown = max(shown, min(teacher.size))  # smaller images are enlarged
    if 1 / _OTHER_SIZE < shown / published < _OTHER_SIZE:
        return None
    return (
        f"is published for images whose shorter side is {published} pixels, and sees these at {shown}",
        f"write `short_side: {published}` in teachers.{loaded.name} to show it the published size",
    )


def say_unrecorded_input(loaded: LoadedTeacher) -> None:
    """Says which normalisation is used for a group's own network, if version 0.1.0 used another one."""
    project, name = loaded.project, loaded.name
    teacher = project.params.teachers[name]
    if not isinstance(teacher, SmpTeacher) or read_metadata(project.teacher(name)):
        return
    if normalisation(teacher.encoder) != unrecorded_normalisation(teacher.encoder):
        console.print(
            f"teacher {name}: {project.teacher(name)} does not say with which input it was trained; it is shown images as the "
            f"published weights of {teacher.encoder} were, not as ImageNet's ResNets"
        )


def seen_unlabelled(manifest: Manifest) -> dict[str, Any]:
    """What a teacher's file notes of the unlabelled images with which it was trained, if it is kept when they change."""
    return {"unlabelled_images": len(manifest.unlabelled), "unlabelled": manifest.unlabelled_fingerprint}


def say_kept(loaded: LoadedTeacher) -> None:
    """Says that a teacher was trained with other unlabelled images than there are now, if its file notes them."""
    project, name = loaded.project, loaded.name
    then, now = read_metadata(project.teacher(name)), seen_unlabelled(loaded.manifest)
    if name in project.params.train_teachers and then.get("unlabelled") not in (None, now["unlabelled"]):
        again = shell_command("mgd-pipeline", "train-teacher", "--teacher", name)
        if "DVC_STAGE" in os.environ:
            again = shell_command("dvc", "repro", "--force", "--single-item", f"train-teacher@{name}")
        key = "unlabelled_images"
        console.print(
            f"teacher {name} is kept: it was trained with other unlabelled images ({then[key]} then, {now[key]} now); "
            f"`{again}` trains it again (retrain_teachers in params.yaml)"
        )


def scores_of(loaded: LoadedTeacher, image: np.ndarray, options: TargetsParams, size: tuple[int, ...]) -> torch.Tensor:
    """(K, H, W) logits at `size`, usually that of the mask, of an image that the teacher sees as `options` say."""
    return scores_at(loaded.teacher, image, options, loaded.manifest.long_side, (size[0], size[1]))


@torch.inference_mode()
def scores_at(
    teacher: Teacher, image: np.ndarray, options: TargetsParams, long_side: int | None, size: tuple[int, int]
) -> torch.Tensor:
    """(K, H, W) logits at `size` of an image (H', W', 3) uint8, whose working size follows from `long_side`."""
    working = scaled_size(image.shape[0], image.shape[1], long_side)
    return resize_logits(class_scores(look(teacher, [image], options, long_side).logits, working)[0], size)
