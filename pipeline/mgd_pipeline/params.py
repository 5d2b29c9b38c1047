"""`params.yaml` as frozen typed models: every setting that affects results, and nothing else.

Parsing is strict: an unknown key, a wrong type or an impossible value becomes one line that names the key, the value and
the nearest valid one. Devices, workers and other properties of a machine are options of the command line, so that two
members of a lab with different machines share one DVC key.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

PositiveInt = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]

RetrainTeachers = Literal["new-labels", "new-images"]

STUDENTS = ("distilled", "supervised")
"""Names of the students that are compared: with teachers, and without."""
LONGEST_NAME = 150
"""Letters of a name that names files. With what stages add to it, the name stays below the 255 bytes of a file system."""


def nearest(name: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """'; nearest is 'seed'' where a known name is like the given one, else nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return f"; nearest is {near[0]!r}" if near else ""


class Section(BaseModel):
    """A part of params.yaml: no unknown keys, no silent conversions, immutable once read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True, serialize_by_alias=True
    )


class IdLists(Section):
    labelled: Text
    """Text file with the labelled training images: one id per line, or an image path and a mask path per line."""
    unlabelled: Text | None = None
    """The same for the unlabelled training images; null takes all other training images."""


Colour = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]


class _Data(Section):
    root: Text
    """Folder of the data set, relative to this file. A link such as data/raw/voc is the same for all members of a group."""
    partition: Annotated[
        Annotated[str, Tag("share")] | Annotated[IdLists, Tag("lists")],
        Discriminator(lambda value: "share" if isinstance(value, str) else "lists"),
    ]
    """Labelled share of the training images, such as 1/8, or two id lists."""
    partition_seed: Annotated[int, Field(ge=0)] = 0
    """Seed for drawing a fractional partition."""
    long_side: PositiveInt | None = None
    """Longer sides above this many pixels are scaled down to it; null keeps the size of every image."""

    @field_validator("partition", mode="before")
    @classmethod
    def _share(cls, value: object) -> object:
        if isinstance(value, (dict, IdLists)) or (isinstance(value, str) and re.fullmatch(r"1/[1-9]\d{0,5}", value)):
            return value
        if type(value) is int and str(value).startswith("1") and int(str(value)[1:] or 0) > 0:
            meant = int(str(value)[1:])
            raise ValueError(f"YAML reads 1_{meant} as the number {value}; write 1/{meant} (or 1/{value})")
        raise ValueError(f"write a share such as {_nearest_share(value)}, or two id lists (labelled: and unlabelled:)")


def _nearest_share(value: object) -> str:
    """The 1/n that was probably meant: 0.125 and '12.5 %' -> 1/8, 8 and '1-8' -> 1/8, '2/8' -> 1/4; 1/8 for no number at all."""
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", str(value))]
    if "%" in str(value):
        numbers = [number / 100 for number in numbers]
    ratio = numbers[0] / numbers[1] if len(numbers) == 2 and numbers[1] else numbers[0] if len(numbers) == 1 else 0
    denominator = round(1 / ratio) if 0 < ratio < 1 else round(ratio)
    return f"1/{denominator}" if 2 <= denominator < 10**6 else "1/8"


class ShapesData(_Data):
    dataset: Literal["shapes"]
    """The built-in data set, rendered by prepare-data. Other kinds are voc, cityscapes and folder (your own images)."""
    height: PositiveInt = 96
    """Height of a rendered scene, pixels."""
    width: PositiveInt = 128
    """Width of a rendered scene, pixels."""
    train: PositiveInt = 480
    """Number of training scenes."""
    val: PositiveInt = 128
    """Number of validation scenes."""
    test: PositiveInt = 128
    """Number of test scenes."""
    render_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the renderer; scene i of a split is a function of (render_seed, split, i)."""


class VocData(_Data):
    dataset: Literal["voc"]
    """PASCAL VOC 2012, with SBD's masks if SegmentationClassAug exists. Other kinds are shapes, cityscapes and folder."""


class CityscapesData(_Data):
    dataset: Literal["cityscapes"]
    """Cityscapes with fine annotations, 19 classes. Other kinds are shapes, voc and folder."""


class FolderData(_Data):
    dataset: Literal["folder"]
    """Your own images and masks, in folders or named by globs. Other kinds are shapes, voc and cityscapes."""
    labels: Literal["masks", "colours", "coco", "cvat", "label_studio", "labelme", "supervisely", "yolo"] = "masks"
    """What the labels are: masks of class ids, masks of colours, or files of an annotation tool below root."""
    annotations: str | None = None
    """Glob of the annotation files below root; null reads all files of the tool."""
    classes: Annotated[list[str], Field(min_length=2, max_length=254)]
    """Names of the classes. Class i has the id i, and may be renamed; an annotation tool's classes are found by their names."""
    values: list[Annotated[int, Field(ge=0, le=255)]] | None = None
    """Pixel value of each class in a mask, such as [0, 75, 150]; null means 0, 1, 2 and so on."""
    colours: list[Colour] | None = None
    """RGB of each class, 0 to 255, in all pictures, and in masks of colours; null takes PASCAL VOC's colours."""
    ignore: Annotated[int, Field(ge=0, le=255)] = 255
    """Pixel value of a mask that means "no class"."""
    ignore_colours: list[Colour] = []
    """Colours of masks that mean "no class"."""
    names: dict[str, str | None] = {}
    """An annotation tool's names for a class that is called otherwise, such as truck: car; null means "no class"."""
    uncovered: str | None = None
    """Class of the pixels that no annotation covers, such as background; null means "no class"."""
    empty: Literal["unlabelled", "labelled"] = "unlabelled"
    """Images that an annotation tool lists without a region: unlabelled, or labelled with `uncovered` everywhere."""
    images: str | None = None
    """Glob of the images below root, such as photos/**/*.jpg; null expects images/<split>/, with a tool all images."""
    masks: str | None = None
    """Glob of the masks below root, matched to images by path; null expects masks/<split>/."""
    splits: Literal["drawn", "folders", "lists"] = "drawn"
    """With globs or an annotation tool: splits are drawn, or are folders and files called train, val and test, or VOC's lists."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the labelled images that becomes the validation split, if splits are drawn; of 20 images and more at least five."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the labelled images that becomes the test split, if splits are drawn; of 20 images and more at least five."""
    exif_orientation: Literal["applied", "ignored"] = "applied"
    """Whether photos are turned as viewers and annotation tools show them; ignored is for masks drawn on stored pixels."""
    value_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """Values of 16-bit, 32-bit and float images that become black and white; null refuses such images."""
    background_colour: Colour | None = None
    """RGB behind transparent pixels; null refuses images with transparent pixels."""

    @field_validator("classes")
    @classmethod
    def _names(cls, value: list[str]) -> list[str]:
        """Tables, files and class_map hold numbers by the name of a class, a line each."""
        names: dict[str, str] = {}
        for name in value:
            if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
                raise ValueError(f"{name!a}: a class name is one line of text; remove the line break, tab or control character")
            seen = _as_seen(name)
            if not seen:
                raise ValueError(f"{name!r}: a class needs a name that can be seen")
            if seen in names:
                same = f"{name!r} stands twice" if names[seen] == name else f"{names[seen]!a} and {name!a} look the same"
                raise ValueError(f"{same}; give each class a name of its own, such as '{seen} 2'")
            names[seen] = name
        return value

    @model_validator(mode="after")
    def _splits(self) -> FolderData:
        if self.labels in ("masks", "colours") and (self.images is None) != (self.masks is None):
            raise ValueError("give both globs, images and masks, or neither")
        if self.labels not in ("masks", "colours") and self.masks is not None:
            raise ValueError(f"labels: {self.labels} reads no masks; leave the glob of masks out")
        read = self.labels if self.labels in _READ_WITH else "files of an annotation tool"
        for what, keys in _READ_WITH.items():
            if what != read and (idle := [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]):
                raise ValueError(f"{idle[0]}: is for labels that are {what}, and has no effect on {self.labels}; leave it out")
        for name, given in (("values", self.values), ("colours", self.colours)):
            if given is not None and (len(given) != len(self.classes) or len({str(one) for one in given}) < len(given)):
                raise ValueError(f"{name}: {len(given)} for {len(self.classes)} classes; give each class one of its own")
        if self.labels == "colours" and self.colours is None:
            raise ValueError("labels: colours needs data.colours, one for each class")
        if foreign := [name for name in self.names.values() if name is not None and name not in self.classes]:
            raise ValueError(f"names: {foreign[0]!r} is not among the classes; add it there or correct the name")
        if self.uncovered is not None and self.uncovered not in self.classes:
            raise ValueError(f"uncovered: {self.uncovered!r} is not among the classes; add it there or write null")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError("value_range: the first value must be less than the second")
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction together must be less than 1, or nothing is left to train on")
        return self


_READ_WITH = {
    "masks": ("values", "ignore"),
    "colours": ("ignore_colours",),
    "files of an annotation tool": ("annotations", "names", "uncovered", "empty"),
}
"""Keys of FolderData that nothing reads with labels of another kind."""


def _as_seen(name: str) -> str:
    """A name as a reader tells it from others: composed, without invisible characters, each run of blanks one blank."""
    composed = unicodedata.normalize("NFC", name)
    visible = "".join(character for character in composed if unicodedata.category(character) != "Cf")
    return " ".join(visible.split())


DATASETS: dict[str, type[Section]] = {"shapes": ShapesData, "voc": VocData, "cityscapes": CityscapesData, "folder": FolderData}
DataParams = Annotated[ShapesData | VocData | CityscapesData | FolderData, Field(discriminator="dataset")]


def _no_dpt(value: object) -> object:
    if value == "dpt":
        raise ValueError("is for teachers: a student needs cells of 4 pixels; take deeplabv3plus, fpn or upernet")
    return value


class NetworkParams(Section):
    decoder: Annotated[Literal["deeplabv3plus", "fpn", "upernet"], BeforeValidator(_no_dpt)] = "deeplabv3plus"
    """Decoder of segmentation-models-pytorch; these three predict at stride 4."""
    encoder: Text
    """Encoder name of segmentation-models-pytorch; `tu-<name>` takes any of timm's."""
    decoder_channels: PositiveInt = 256
    """Channels of the decoder's features, which are the region embeddings; a multiple of 32 for fpn."""
    encoder_weights: Text = "none"
    """Initial weights of the encoder: none (random), imagenet (from the hub), or a local safetensors or state-dict file."""

    @field_validator("decoder_channels")
    @classmethod
    def _groups(cls, value: int, others: ValidationInfo) -> int:
        if others.data.get("decoder") == "fpn" and value % 32:
            raise ValueError(f"fpn normalises in 32 groups; take a multiple of 32, such as {max(32, round(value / 32) * 32)}")
        return value


class TeacherNetworkParams(NetworkParams):
    decoder: Literal["deeplabv3plus", "fpn", "upernet", "dpt"] = "deeplabv3plus"
    """Decoder of segmentation-models-pytorch; dpt is for plain ViTs of timm, such as DINOv2 and DINOv3."""


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


class ViewsParams(Section):
    crop: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
    """Height and width of a training view, pixels; multiples of 32."""
    scales: Annotated[list[Positive], Field(min_length=1)] = [0.5, 0.75, 1.0, 1.5, 1.75, 2.0]
    """The scale of a view is drawn from these."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of a horizontal flip."""
    colour_jitter: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Strength of random brightness, contrast and saturation of the network's input; MGD has none."""

    @field_validator("crop")
    @classmethod
    def _multiple(cls, value: list[int]) -> list[int]:
        if any(side % 32 for side in value):
            raise ValueError(f"sides must be multiples of 32, such as {[max(32, round(side / 32) * 32) for side in value]}")
        return value


class CutMixParams(Section):
    boxes: Annotated[int, Field(ge=0)] = 3
    """Boxes per mask; overlapping boxes are XOR-ed. 0 turns CutMix off."""
    area: Annotated[list[Positive], Field(min_length=2, max_length=2)] = [0.25, 0.5]
    """Range of the area of all boxes together, as a share of the view."""
    partner: Literal["same", "other"] = "same"
    """Source of the pasted pixels: another view of the same image (as MGD's code does) or of another image."""

    @field_validator("area")
    @classmethod
    def _range(cls, value: list[float]) -> list[float]:
        if not value[0] <= value[1] <= 1:
            raise ValueError("write the lower bound first, both at most 1, such as [0.25, 0.5]")
        return value


class OptimisationParams(Section):
    steps: PositiveInt
    """Optimiser steps."""
    labelled_batch: Annotated[int, Field(ge=2)]
    """Labelled images of one step."""
    unlabelled_batch: Annotated[int, Field(ge=2)]
    """Unlabelled images of one step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Kind of optimiser; MGD uses SGD."""
    learning_rate: Positive
    """Initial learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD; AdamW uses its own betas."""
    weight_decay: NonNegative = 1e-4
    """Weight decay of convolution and linear weights; never of biases and normalisation."""
    poly_power: NonNegative = 0.9
    """Learning rate at step t is learning_rate * (1 - t / steps) ** poly_power."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights that is kept as the result; 0 keeps the last weights."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the networks' forward passes; losses are always float32."""


class OhemParams(Section):
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Pixels whose true class has at most this probability are kept."""
    min_kept: PositiveInt = 100_000
    """At least this many pixels of a batch are kept; MGD keeps 50,000 an image."""


class MethodParams(Section):
    method: Literal["cps", "mean-teacher", "supervised"]
    consistency: NonNegative = 1.0
    """Weight of the term on unlabelled images, of cps and of mean-teacher; 0 leaves them out, as supervised does."""
    consistency_rampup: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the steps over which consistency rises from 0, for networks without pre-trained weights; MGD has no such ramp."""
    confidence: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """That term ignores pixels whose pseudo label has a probability below this, as FixMatch does; MGD ignores none."""

    @property
    def uses_unlabelled(self) -> bool:
        return self.method != "supervised" and self.consistency > 0


class TeacherTrainingParams(MethodParams, OptimisationParams):
    method: Literal["cps", "mean-teacher", "supervised"] = "cps"
    """How teachers learn: cps, two networks that teach each other, as in MGD; mean-teacher, one network that its own moving average
    teaches; supervised, one network on labelled images only, with as many of them per step as there would be images in all."""
    ohem: OhemParams | None = None
    """Hard example mining in the supervised term, such as {threshold: 0.7, min_kept: 400000}; null is plain cross entropy."""
    frozen_encoder: bool = False
    """Whether encoders keep their initial weights, as is usual for a ViT of DINOv2 and few labels; MGD trains them."""
    encoder_learning_rate: Positive | None = None
    """Initial learning rate of encoders; null is learning_rate, as in MGD."""

    @model_validator(mode="after")
    def _frozen_learns_nothing(self) -> TeacherTrainingParams:
        if self.frozen_encoder and self.encoder_learning_rate is not None:
            raise ValueError("encoder_learning_rate: a frozen encoder has none; leave it out, or set frozen_encoder to false")
        return self

    @model_validator(mode="before")
    @classmethod
    def _names_of_0_1(cls, value: object) -> object:
        """Version 0.1.0 had cross pseudo supervision only, and named its weight cps."""
        if not isinstance(value, dict):
            return value
        renamed = {"cps": "consistency", "cps_rampup": "consistency_rampup"}
        if twice := [old for old, new in renamed.items() if old in value and new in value]:
            raise ValueError(f"{twice[0]}: is the former name of {renamed[twice[0]]}; write only {renamed[twice[0]]}")
        return {renamed.get(key, key): entry for key, entry in value.items()}

    @model_validator(mode="after")
    def _average(self) -> TeacherTrainingParams:
        _require_average(self.method, self.ema)
        return self


class WithoutTeachersParams(MethodParams):
    method: Literal["supervised", "mean-teacher"] = "supervised"
    """From labelled images alone, or also from unlabelled images, which the moving average of the student labels."""


class StudentParams(OptimisationParams):
    network: NetworkParams
    """The network that is trained, and used afterwards."""
    ohem: OhemParams | None = None
    """Hard example mining in the supervised term, such as {threshold: 0.7, min_kept: 400000}; null is plain cross entropy."""
    logit_adjustment: NonNegative = 0.0
    """Factor of the logarithm of a class's share of the labelled pixels, which the finished student's logits lose. Rare classes
    are then named more often; MGD has none."""
    without_teachers: WithoutTeachersParams = WithoutTeachersParams()
    """How the student without teachers is trained, with which the distilled student is compared."""

    @model_validator(mode="after")
    def _average(self) -> StudentParams:
        _require_average(self.without_teachers.method, self.ema)
        return self


def _require_average(method: str, ema: float) -> None:
    if method == "mean-teacher" and not ema:
        raise ValueError("ema: mean-teacher labels images by the moving average of the weights; set ema, such as 0.99")


class TtaParams(Section):
    scales: Annotated[list[Positive], Field(min_length=1)] = [1.0]
    """The teacher sees the image at each of these scales."""
    flip: bool = True
    """Whether the teacher also sees each of them mirrored."""


class TargetsParams(Section):
    logits: Literal["uint8", "float16"] = "uint8"
    """Encoding of the stored logits; uint8 has an offset and a scale per image."""
    stride: Literal[2, 4, 8, 16] = 4
    """Pixels between stored cells of the logits. 4 is the network's own stride; larger strides cost accuracy. 2 keeps the thin
    things that a teacher with a short_side or with scales above 1 sees."""
    top_k: PositiveInt | None = None
    """Number of logits per cell that are stored; all smaller ones become their mean. null stores all."""
    region_stride: Literal[4, 8, 16] = 16
    """Pixels between stored cells of the region embeddings; small crops need a small stride."""
    window: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None
    """Height and width of a sliding window through which teachers see larger images, pixels; null shows whole images, as in MGD."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 1 / 3
    """Share of that window by which neighbours overlap; where they do, their outputs are averaged."""
    tta: TtaParams | None = None
    """Targets averaged over scales and flips, such as {scales: [1.0, 1.25], flip: true}; null is one plain pass, as in MGD."""
    mirrored: bool = False
    """Whether teachers also see the mirror image of each image, for targets of mirrored views; doubles the teacher cache."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the teachers' forward passes."""

    @model_validator(mode="after")
    def _mirrored_once(self) -> TargetsParams:
        if self.mirrored and self.tta is not None and self.tta.flip:
            raise ValueError("mirrored: tta.flip makes both the same, for it averages them; set one of them to false")
        return self


class LossesParams(Section):
    pixel: NonNegative = 1.0
    """Weight of the pixel term for each teacher in pixel_teachers."""
    region: NonNegative
    """Weight of the content-aware (region) loss: lambda_2."""
    image: NonNegative
    """Weight of the semantic-sensitive (image) loss, a mean over images: 2 x lambda_1 of the official code."""
    pixel_teachers: list[str] = ["wide", "deep"]
    """Teachers whose most likely classes the student learns; each adds one term."""
    region_teacher: str = "wide"
    """Teacher whose region embeddings the student's are compared with."""
    image_teacher: str = "deep"
    """Teacher whose mean logits of a view the student's are compared with."""
    images: Annotated[list[Literal["labelled", "unlabelled"]], Field(min_length=1)] = ["labelled", "unlabelled"]
    """Images on which the student learns from teachers; MGD's region and image terms use unlabelled images only."""
    pixel_labels: Literal["hard", "soft"] = "hard"
    """What the pixel term learns: the teacher's most likely class, as in MGD, or its probabilities."""
    pixel_ensemble: bool = False
    """Whether one pixel term uses the mean probabilities of all pixel_teachers; false gives each teacher a term, as in MGD."""
    confidence: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """A teacher's pixel term ignores pixels whose largest probability is below this; MGD ignores none."""
    prior_adjustment: NonNegative = 0.0
    """Takes this times the log of each class's share of the labelled pixels off a teacher's logits on unlabelled images, so that
    rare classes are named more often; MGD takes nothing off."""
    other_partition: bool = False
    """Whether teachers may have seen labels that this partition does not have; true lets these labels leak into the student."""

    @property
    def used_teachers(self) -> list[str]:
        """The teachers that some term of positive weight listens to."""
        names = list(self.pixel_teachers) if self.pixel else []
        if "unlabelled" in self.images:
            names += [self.region_teacher] if self.region else []
            names += [self.image_teacher] if self.image else []
        return list(dict.fromkeys(names))


class EvaluationParams(Section):
    split: Literal["val", "test"] = "val"
    """Split on which teachers and students are compared."""
    window: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None
    """Height and width of a sliding window, pixels; null predicts the whole image."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 1 / 3
    """Share of the window by which neighbours overlap."""
    overlays: PositiveInt = 3
    """Number of pictures each of the worst, median and best images."""


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
    """How the teachers in train_teachers are trained: cross pseudo supervision."""
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
            "losses.region_teacher": [self.losses.region_teacher],
            "losses.image_teacher": [self.losses.image_teacher],
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
