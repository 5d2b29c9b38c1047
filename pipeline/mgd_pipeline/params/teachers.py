"""The section teachers: each kind of teacher."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, PrivateAttr, Tag, field_validator, model_validator

from mgd_pipeline.params.networks import TeacherNetworkParams
from mgd_pipeline.params.sections import NonNegative, Positive, PositiveInt, Section, Text


class _Teacher(Section):
    recorded: ClassVar[tuple[str, ...]]
    """Keys that a teacher cache records of the network besides its weights."""

    @property
    def identity(self) -> dict[str, object]:
        values = self.model_dump()
        return {key: values[key] for key in self.recorded}

    @property
    def network_names(self) -> list[str]:
        """What tables call the network, at most two names. Phrases would fill a table."""
        return [str(value) for key, value in self.identity.items() if key != "prompts"][:2]


class _OtherFrame(_Teacher):
    """Of a teacher that may know other classes, and images of another size, than the data set has."""

    class_map: dict[str, list[str | int]] | None = None
    """For each class of the data set the teacher's name or number of it, a list of several, or [] for none; null if the teacher
    has the data set's classes."""
    short_side: PositiveInt | None = None
    """Shorter side at which this teacher sees an image, pixels, scaled from the file itself whatever data.long_side is; null
    shows the image at its working size."""

    @field_validator("class_map", mode="before")
    @classmethod
    def _lists(cls, value: object) -> object:
        if value is None:
            return None
        if not isinstance(value, dict) or not value:
            raise ValueError("write a line for each class of the data set, such as person: [pedestrian, rider]")
        lists = {name: members if isinstance(members, list) else [members] for name, members in value.items()}
        for name, members in lists.items():
            if not isinstance(name, str) or not all(type(member) in (str, int) for member in members):
                raise ValueError(f"{name}: {members} must be names or numbers of the teacher's classes, [] for none")
        return lists


FixedSize = Literal["windows", "resize"]


class FixedSizeTeacher(_Teacher):
    """Of a teacher whose network may take inputs of one size only."""

    short_side: PositiveInt | None = None
    """Shorter side at which this teacher sees an image, pixels, scaled from the file itself whatever data.long_side is; null
    shows the image at its working size."""
    fixed_size: FixedSize | None = None
    """How images meet a network that takes inputs of one size: windows of that size, over images that are enlarged until one fits;
    or the whole image, resized to that size. null is windows where they are needed, and the only choice for other networks."""

    @model_validator(mode="after")
    def _one_scale(self) -> FixedSizeTeacher:
        if self.fixed_size == "resize" and self.short_side is not None:
            raise ValueError(
                "short_side: has no effect with fixed_size: resize, which shows whole images at one size; leave it out"
            )
        return self


class SmpTeacher(_OtherFrame, TeacherNetworkParams):
    recorded = ("decoder", "encoder", "decoder_channels")
    weights: Text
    """The finished teacher, safetensors: train-teacher writes it, or you put your own file there."""
    frozen_encoder: bool | None = None
    """teacher_training.frozen_encoder of this teacher; null takes that value."""
    encoder_learning_rate: Positive | None = None
    """teacher_training.encoder_learning_rate of this teacher; null takes that value."""


class TorchvisionTeacher(_OtherFrame):
    recorded = ("torchvision",)
    torchvision: Text
    """A segmentation network of torchvision, such as deeplabv3_resnet101."""
    pretrained: Text | None = None
    """Published weights that train-teacher fetches, such as COCO_WITH_VOC_LABELS_V1; null if you have your own."""
    weights: Text
    """The finished teacher: train-teacher writes it from the published weights, or you put your own file there."""


class TransformersTeacher(FixedSizeTeacher, _OtherFrame):
    recorded = ("transformers",)
    transformers: Text
    """A segmenter of Hugging Face transformers that train-teacher fetches: its name on the hub, or a folder."""
    weights: Text
    """The finished teacher, safetensors: train-teacher writes it, with the network's configuration."""


class PromptsTeacher(_Teacher):
    recorded = ("transformers", "prompts")
    prompts: dict[str, list[Text]]
    """For each class of the data set the phrases that name it; [] for at most one class, which is everything that
    no phrase names."""
    transformers: Text
    """A CLIPSeg or SAM 3 network that train-teacher fetches: its name on the hub, or a folder."""
    weights: Text
    """The finished teacher, safetensors: train-teacher writes it, with the network's configuration and the phrases' tokens."""
    short_side: PositiveInt | None = None
    """Shorter side at which this teacher sees an image, pixels, scaled from the file itself whatever data.long_side is; null
    shows the image at its working size."""

    @field_validator("prompts")
    @classmethod
    def _phrases(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        """A phrase has one meaning, and what no phrase names is one class."""
        empty = [name for name, phrases in value.items() if not phrases]
        if len(empty) > 1:
            raise ValueError(f"{empty[0]} and {empty[1]} have no phrase; one class can be everything that no phrase names")
        class_of: dict[str, str] = {}
        for name, phrases in value.items():
            for phrase in phrases:
                if not phrase.strip():
                    raise ValueError(f"{name}: {phrase!r} is no phrase; write words, such as a red car")
                if (other := class_of.setdefault(phrase, name)) != name or phrases.count(phrase) > 1:
                    places = f"of {name}" if other == name else f"of {other} and of {name}"
                    raise ValueError(f"the phrase {phrase!r} stands twice ({places}); it can name one class, once")
        if not class_of:
            raise ValueError("no class has a phrase; write a line for each class, such as road: [road, asphalt]")
        return value

    @property
    def class_map(self) -> None:
        return None


class TimmTeacher(FixedSizeTeacher):
    recorded = ("timm",)
    timm: Text
    """A backbone of timm, such as vit_small_patch14_dinov2.lvd142m. It gives region embeddings, and no classes."""
    weights: Text
    """Weights of the backbone: train-teacher fetches the published ones, or you put your own file there."""

    @property
    def class_map(self) -> None:
        return None


class ImportedTeacher(FixedSizeTeacher, _OtherFrame):
    recorded = ("import", "options")
    import_: Annotated[str, Field(alias="import", pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """Your own function that returns a `mgd_pipeline.Teacher`: package.module:function."""
    options: dict[str, str | int | float | bool | None] = {}
    """Further keyword arguments of that function."""
    weights: Text
    """The file that the function is given."""


class HeadTeacher(_Teacher):
    recorded = ("head",)
    head: Literal["linear", "mlp", "conv"]
    """A small head on another teacher's cached embeddings: one 1x1 convolution, two of them, or two 3x3 convolutions before it."""
    of: Text
    """The teacher whose cached embeddings it reads."""
    weights: Text
    """The finished head, safetensors: train-teacher writes it, in seconds and without the other teacher's network."""
    hidden: PositiveInt = 128
    """Channels between the convolutions of mlp and conv; linear has none."""
    steps: PositiveInt = 400
    """Optimiser steps (AdamW); the learning rate falls to 0 along a cosine."""
    learning_rate: Positive = 2e-3
    """Initial learning rate."""
    weight_decay: NonNegative = 1e-2
    """Weight decay of the convolutions' weights, not of their biases."""
    batch: PositiveInt = 8
    """Labelled images of one step; with self_training, as many unlabelled ones in addition."""
    self_training: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Confidence threshold, such as 0.9: in the second half of the steps, the head of the first half labels unlabelled images where
    its largest probability is at least this. null learns from labelled images only."""
    _base: _Teacher | None = PrivateAttr(None)

    @property
    def identity(self) -> dict[str, object]:
        """With the network whose embeddings it reads: a cache of the head does not outlive another network behind it."""
        return {**super().identity, "of": None if self._base is None else self._base.identity}

    @property
    def network_names(self) -> list[str]:
        return [f"{self.head} head on {self.of}"]

    @property
    def short_side(self) -> int | None:
        return getattr(self._base, "short_side", None)

    @property
    def class_map(self) -> None:
        return None


TEACHERS: dict[str, type[Section]] = {
    "head": HeadTeacher,
    "smp": SmpTeacher,
    "torchvision": TorchvisionTeacher,
    "prompts": PromptsTeacher,  # before transformers, which is one of its keys
    "transformers": TransformersTeacher,
    "timm": TimmTeacher,
    "import": ImportedTeacher,
}
"""Kinds of teachers, by the key that tells them apart; a teacher with none of these keys is of segmentation-models-pytorch."""


def _kind_of_teacher(value: object) -> str:
    if isinstance(value, dict):
        return next((kind for kind in TEACHERS if kind in value), "smp")
    return next((kind for kind, model in TEACHERS.items() if isinstance(value, model)), "smp")


TeacherParams = Annotated[
    Annotated[SmpTeacher, Tag("smp")]
    | Annotated[HeadTeacher, Tag("head")]
    | Annotated[TorchvisionTeacher, Tag("torchvision")]
    | Annotated[PromptsTeacher, Tag("prompts")]
    | Annotated[TransformersTeacher, Tag("transformers")]
    | Annotated[TimmTeacher, Tag("timm")]
    | Annotated[ImportedTeacher, Tag("import")],
    Discriminator(_kind_of_teacher),
]
