"""`params.yaml` as frozen typed models: every setting that affects results, and nothing else.

Parsing is strict: an unknown key, a wrong type or an impossible value becomes one line that names the key, the value and
the nearest valid one. Devices, workers and other properties of a machine are options of the command line, so that two
members of a lab with different machines share one DVC key.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mgd_pipeline.params.data import DATASETS, CityscapesData, Colour, DataParams, FolderData, IdLists, ShapesData, VocData
from mgd_pipeline.params.distillation import EvaluationParams, LossesParams, TargetsParams, TtaParams
from mgd_pipeline.params.networks import NetworkParams, TeacherNetworkParams
from mgd_pipeline.params.sections import NonNegative, Positive, PositiveInt, Section, Text, nearest
from mgd_pipeline.params.teachers import (
    TEACHERS,
    FixedSize,
    FixedSizeTeacher,
    HeadTeacher,
    ImportedTeacher,
    PromptsTeacher,
    SmpTeacher,
    TeacherParams,
    TimmTeacher,
    TorchvisionTeacher,
    TransformersTeacher,
)
from mgd_pipeline.params.training import (
    CutMixParams,
    MethodParams,
    OhemParams,
    OptimisationParams,
    StudentParams,
    TeacherTrainingParams,
    ViewsParams,
    WithoutTeachersParams,
)

__all__ = [
    "DATASETS",
    "LONGEST_NAME",
    "STUDENTS",
    "TEACHERS",
    "CityscapesData",
    "Colour",
    "CutMixParams",
    "DataParams",
    "EvaluationParams",
    "FixedSize",
    "FixedSizeTeacher",
    "FolderData",
    "HeadTeacher",
    "IdLists",
    "ImportedTeacher",
    "LossesParams",
    "MethodParams",
    "NetworkParams",
    "NonNegative",
    "OhemParams",
    "OptimisationParams",
    "Params",
    "Positive",
    "PositiveInt",
    "PromptsTeacher",
    "RetrainTeachers",
    "Section",
    "ShapesData",
    "SmpTeacher",
    "StudentParams",
    "TargetsParams",
    "TeacherNetworkParams",
    "TeacherParams",
    "TeacherTrainingParams",
    "Text",
    "TimmTeacher",
    "TorchvisionTeacher",
    "TransformersTeacher",
    "TtaParams",
    "ViewsParams",
    "VocData",
    "WithoutTeachersParams",
    "nearest",
]

RetrainTeachers = Literal["new-labels", "new-images"]

STUDENTS = ("distilled", "supervised")
"""Names of the students that are compared: with teachers, and without."""
LONGEST_NAME = 150
"""Letters of a name that names files. With what stages add to it, the name stays below the 255 bytes of a file system."""
_OF_ALL_CLASSES = ("dist", "cauchy-schwarz", "ttm", "binary")
"""Distances that read the probabilities of unlikely classes, which targets.top_k makes equal."""
_LEAST_TEMPERATURE = 0.5
"""Half a step of uint8 multiplies odds by exp(step / 2 / temperature)."""


class Params(Section):
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initial weights, order, views and CutMix."""
    data: DataParams
    """Which images, and which of them count as labelled."""
    views: ViewsParams
    """How a training view is drawn from an image."""
    cutmix: CutMixParams = CutMixParams()
    """How unlabelled views are mixed."""
    teachers: Annotated[dict[str, TeacherParams], Field(min_length=1)]
    """The large networks, by name; each runs once over all training images."""
    train_teachers: list[str]
    """Teachers that train-teacher trains or fetches; [] if you have all of them."""
    retrain_teachers: RetrainTeachers = "new-images"
    """When these teachers are trained again: only if labels, or images of val and test, were added, changed or removed; or if any
    image was. Run `mgd-pipeline dvc-yaml` after a change of this key."""
    teacher_training: TeacherTrainingParams
    """How the teachers in train_teachers are trained."""
    targets: TargetsParams = TargetsParams()
    """What a teacher cache holds."""
    student: StudentParams
    """The small network and its training."""
    losses: LossesParams
    """What the student learns from the teachers."""
    evaluation: EvaluationParams = EvaluationParams()
    """How teachers and students are measured."""

    @property
    def heads(self) -> dict[str, str]:
        """The teachers that are heads on cached embeddings, and the teacher that each of them reads."""
        return {name: teacher.of for name, teacher in self.teachers.items() if isinstance(teacher, HeadTeacher)}

    @property
    def bases_first(self) -> list[str]:
        """The teachers in an order in which their caches can be made: heads come last."""
        return sorted(self.teachers, key=lambda name: name in self.heads)

    @model_validator(mode="after")
    def _known_bases(self) -> Params:
        problems = []
        bases = [name for name in self.teachers if name not in self.heads]
        for name, of in self.heads.items():
            if of not in bases:
                what = "is a head itself" if of in self.heads else "is not among teachers"
                problems.append(f"teachers.{name}.of: {of!r} {what}; name one of {', '.join(bases)}{nearest(of, bases)}")
            if name in self.train_teachers:
                problems.append(f"train_teachers: {name!r} is a head, which is always trained here; leave it out of this list")
        if problems:
            raise ValueError("\n".join(problems))
        for teacher in self.teachers.values():
            if isinstance(teacher, HeadTeacher):
                teacher._base = self.teachers[teacher.of]
        return self

    @model_validator(mode="after")
    def _known_teachers(self) -> Params:
        named = {
            "train_teachers": self.train_teachers,
            "losses.pixel_teachers": self.losses.pixel_teachers,
            "losses.region_teacher": self.losses.region_teacher,
            "losses.image_teacher": [self.losses.image_teacher],
            "losses.feature_teachers": self.losses.feature_teachers,
        }
        problems = []
        for key, names in named.items():
            problems += [f"{key}: {name!r} stands twice" for name in dict.fromkeys(names) if names.count(name) > 1]
            for name in (name for name in names if name not in self.teachers):
                problems.append(f"{key}: {name!r} is not among teachers: {', '.join(self.teachers)}{nearest(name, self.teachers)}")
        for name in self.teachers:
            if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
                problems.append(f"teachers: {name!r} names files; use lower-case letters, digits, - and _")
            if len(name) > LONGEST_NAME:
                problems.append(f"teachers: {name[:20]}... names files, and has {len(name)} letters; {LONGEST_NAME} are allowed")
            if name in STUDENTS:
                problems.append(f"teachers: {name!r} is the name of a student; call it otherwise")
        written: dict[str, str] = {}
        for name in dict.fromkeys([*self.train_teachers, *self.heads]):
            if name in self.teachers and (other := written.setdefault(self.teachers[name].weights, name)) != name:
                problems.append(f"teachers.{name}.weights = {self.teachers[name].weights!r}: {other} is written there, too")
        for name in self.train_teachers:
            problems += self._frozen_in_vain(name)
        problems += self._stored_too_little()
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))
        return self

    def training_of(self, name: str) -> TeacherTrainingParams:
        """`teacher_training` with what a teacher itself says of its encoder."""
        training, own = self.teacher_training, self.teachers[name]
        if not isinstance(own, SmpTeacher):
            return training
        frozen = training.frozen_encoder if own.frozen_encoder is None else own.frozen_encoder
        rate = None if frozen else own.encoder_learning_rate or training.encoder_learning_rate
        return training.model_copy(update={"frozen_encoder": frozen, "encoder_learning_rate": rate})

    def _frozen_in_vain(self, name: str) -> list[str]:
        """What contradicts that a teacher's encoder is frozen."""
        teacher = self.teachers.get(name)
        if not isinstance(teacher, SmpTeacher) or not self.training_of(name).frozen_encoder:
            return []
        key = "teacher_training" if teacher.frozen_encoder is None else f"teachers.{name}"
        thaw, problems = f"set teachers.{name}.frozen_encoder to false", []
        if teacher.encoder_learning_rate is not None:
            said = f"its encoder is frozen ({key}.frozen_encoder) and has none; leave it out, or {thaw}"
            problems.append(f"teachers.{name}.encoder_learning_rate: {said}")
        if teacher.encoder_weights == "none":
            said = f"a frozen encoder ({key}.frozen_encoder) of random weights teaches nothing; take imagenet or a file, or {thaw}"
            problems.append(f"teachers.{name}.encoder_weights = 'none': {said}")
        return problems

    def _stored_too_little(self) -> list[str]:
        """What losses read and teacher caches of these targets do not hold."""
        losses, targets, problems = self.losses, self.targets, []
        if losses.pixel and losses.pixel_distance in _OF_ALL_CLASSES:
            compares, instead = f"losses.pixel_distance: {losses.pixel_distance}", "take cross-entropy or kl"
        elif losses.channel:
            compares, instead = "losses.channel: this term", "set losses.channel to 0"
        else:
            compares = instead = ""
        if compares and targets.top_k is not None:
            problems.append(
                f"{compares} compares all classes, but targets.top_k stores {targets.top_k} of them; set targets.top_k to null, or "
                f"{instead}"
            )
        if targets.top_k is not None and losses.pixel and losses.prior_adjustment and "unlabelled" in losses.images:
            problems.append(
                f"losses.prior_adjustment = {losses.prior_adjustment:g}: would lift rare classes above scores that no teacher gave "
                f"them, because targets.top_k stores {targets.top_k} scores of a cell and the mean of the rest; set targets.top_k "
                "to null, or prior_adjustment to 0"
            )
        tempered = losses.channel or (losses.pixel and losses.pixel_distance == "kl")
        if tempered and losses.temperature < _LEAST_TEMPERATURE and targets.logits != "float16":
            problems.append(
                f"losses.temperature = {losses.temperature}: magnifies the rounding of targets.logits {targets.logits}; take a "
                f"temperature of {_LEAST_TEMPERATURE} or more, or set targets.logits to float16"
            )
        if targets.logits == "log-probability":
            problems += [f"{said}, or set targets.logits to uint8" for said in self._asking_for_logits()]
        return problems

    def _asking_for_logits(self) -> list[str]:
        """What losses read of logits and log-probabilities down to a floor do not tell, each with a remedy in the losses."""
        losses, kept = self.losses, "targets.logits log-probability"
        problems: list[str] = []
        if losses.image and losses.image_distance == "l1":
            problems.append(
                f"losses.image_distance: l1 compares mean logits, and {kept} does not keep their level; set it to log-probability, "
                "set losses.image to 0"
            )
        if losses.channel:
            problems.append(
                f"losses.channel: this term compares logits of different pixels, and {kept} does not keep their level; set it to 0"
            )
        if losses.pixel and losses.pixel_distance == "ttm":
            problems.append(f"losses.pixel_distance: ttm magnifies unlikely classes, and {kept} has cut them off; take kl")
        if losses.pixel and losses.pixel_distance == "kl" and losses.temperature > 1:
            said = f"losses.temperature = {losses.temperature}: magnifies unlikely classes, and {kept} has cut them off"
            problems.append(f"{said}; set it to 1")
        return problems
