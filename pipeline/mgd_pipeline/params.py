"""`params.yaml`: everything that changes a result, and nothing else, as frozen typed models.

Parsing is strict: an unknown key, a wrong type or an impossible value becomes one line that names the key, the value and
the nearest right one. Devices, workers and other properties of a machine are options of the command line instead, so that
two members of a lab with different machines share one DVC key.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mgd_pipeline.errors import ParamsError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A part of params.yaml: no unknown keys, no silent conversions, immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class IdLists(Section):
    labelled: str
    """Text file with the labelled training images: one id a line, or image and mask path a line."""
    unlabelled: str | None = None
    """The same for the unlabelled ones; null takes all other training images."""


class _Data(Section):
    root: str
    """Folder of the data set, relative to this file (a link such as data/raw/voc keeps it the same for all members)."""
    partition: str | IdLists
    """Labelled share of the training images, such as 1/8, or two id lists."""
    partition_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draw of a fractional partition."""
    long_side: PositiveInt | None = None
    """Images whose longer side exceeds this many pixels are scaled down to it; null keeps every image as it is."""

    @field_validator("partition", mode="before")
    @classmethod
    def _fraction(cls, value: object) -> object:
        if isinstance(value, (dict, IdLists)):
            return value
        if isinstance(value, str) and re.fullmatch(r"1/[1-9]\d{0,5}", value):
            return value
        if isinstance(value, int) and not isinstance(value, bool) and str(value).startswith("1") and value > 10:
            raise ValueError(f"YAML reads 1_{str(value)[1:]} as the number {value}; write 1/{str(value)[1:]}")
        digits = re.findall(r"\d+", str(value))
        raise ValueError(f"write a fraction such as 1/{digits[-1] if digits and int(digits[-1]) > 0 else 8}, or two id lists")


class ShapesData(_Data):
    dataset: Literal["shapes"]
    height: PositiveInt = 96
    """Height of a rendered scene, pixels."""
    width: PositiveInt = 128
    """Width of a rendered scene, pixels."""
    train: PositiveInt = 480
    """Number of training scenes."""
    val: PositiveInt = 48
    """Number of validation scenes."""
    test: PositiveInt = 128
    """Number of test scenes."""
    render_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the renderer; scene i of a split is a function of (render_seed, split, i)."""


class VocData(_Data):
    dataset: Literal["voc"]


class CityscapesData(_Data):
    dataset: Literal["cityscapes"]


class FolderData(_Data):
    dataset: Literal["folder"]
    classes: Annotated[list[str], Field(min_length=2, max_length=254)]
    """Names of the classes; pixel value i of a mask means classes[i]."""
    ignore: Annotated[int, Field(ge=0, le=255)] = 255
    """Pixel value of a mask that means "no class"."""
    images: str | None = None
    """Glob of the images below root, such as photos/**/*.jpg; null expects images/<split>/."""
    masks: str | None = None
    """Glob of the masks below root, matched to images by their path below the glob's fixed part; null expects masks/<split>/."""
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """With globs only: share of the images with a mask that becomes the validation split."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """With globs only: share of the images with a mask that becomes the test split."""

    @model_validator(mode="after")
    def _both_globs(self) -> FolderData:
        if (self.images is None) != (self.masks is None):
            raise ValueError("give both globs, images and masks, or neither")
        return self


DataParams = Annotated[ShapesData | VocData | CityscapesData | FolderData, Field(discriminator="dataset")]


class NetworkParams(Section):
    decoder: Literal["deeplabv3plus", "fpn", "upernet"] = "deeplabv3plus"
    """Decoder from segmentation-models-pytorch; these three predict at stride 4."""
    encoder: str
    """Encoder name of segmentation-models-pytorch; `tu-<name>` takes any of timm's."""
    decoder_channels: PositiveInt = 256
    """Channels of the decoder features, which are the region embeddings."""
    encoder_weights: str = "none"
    """Initial weights of the encoder: none (random), imagenet (from the hub), or a local safetensors or state-dict file."""


class TeacherParams(NetworkParams):
    weights: str
    """The finished teacher, safetensors: train-teacher writes it, or the group puts its own there."""


class ViewsParams(Section):
    crop: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
    """Height and width of a training view, pixels; multiples of 32."""
    scales: Annotated[list[Positive], Field(min_length=1)] = [0.5, 0.75, 1.0, 1.5, 1.75, 2.0]
    """A view's nominal scale is drawn from these."""
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
    boxes: PositiveInt = 3
    """Boxes of one mask; overlapping ones are XOR-ed."""
    area: Annotated[list[Positive], Field(min_length=2, max_length=2)] = [0.25, 0.5]
    """Range of the area of all boxes together, as a share of the view."""
    partner: Literal["same", "other"] = "same"
    """Source of the pasted pixels: another view of the same image (as MGD's code does) or of another image."""


class OptimisationParams(Section):
    steps: PositiveInt
    """Optimiser steps."""
    labelled_batch: Annotated[int, Field(ge=2)]
    """Labelled images of one step."""
    unlabelled_batch: Annotated[int, Field(ge=2)]
    """Unlabelled images of one step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
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
    """At least this many pixels of a batch are kept."""


class TeacherTrainingParams(OptimisationParams):
    cps: NonNegative = 1.0
    """Weight of the cross pseudo supervision."""
    ohem: OhemParams | None = None
    """Online hard example mining for the supervised term; null is plain cross entropy."""


class StudentParams(OptimisationParams):
    network: NetworkParams
    ohem: OhemParams | None = None
    """Online hard example mining for the supervised term; null is plain cross entropy."""


class TargetsParams(Section):
    logits: Literal["uint8", "float16"] = "uint8"
    """Encoding of the stored logits; uint8 carries an offset and a scale for each image."""


class LossesParams(Section):
    pixel: NonNegative = 1.0
    """Weight of the pixel consistency with each teacher in pixel_teachers."""
    region: NonNegative
    """Weight of the content-aware (region) loss: lambda_2."""
    image: NonNegative
    """Weight of the semantic-sensitive (image) loss, a mean over images: 2 x lambda_1 of the official code."""
    pixel_teachers: list[str] = ["wide", "deep"]
    region_teacher: str = "wide"
    image_teacher: str = "deep"


class EvaluationParams(Section):
    split: Literal["val", "test"] = "val"
    """Split on which teachers and students are compared."""
    window: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None
    """Height and width of a sliding window, pixels; null predicts the whole image."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 1 / 3
    """Share of the window by which neighbours overlap."""
    overlays: PositiveInt = 3
    """Pictures of each of the worst, median and best images."""


class Params(Section):
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initial weights, order, views and CutMix."""
    data: DataParams
    views: ViewsParams
    cutmix: CutMixParams = CutMixParams()
    teachers: Annotated[dict[str, TeacherParams], Field(min_length=1)]
    train_teachers: list[str]
    """Teachers that train-teacher trains; [] where the group brings all of them."""
    teacher_training: TeacherTrainingParams
    targets: TargetsParams = TargetsParams()
    student: StudentParams
    losses: LossesParams
    evaluation: EvaluationParams = EvaluationParams()

    @model_validator(mode="after")
    def _known_teachers(self) -> Params:
        named = {
            "train_teachers": self.train_teachers,
            "losses.pixel_teachers": self.losses.pixel_teachers,
            "losses.region_teacher": [self.losses.region_teacher],
            "losses.image_teacher": [self.losses.image_teacher],
        }
        for key, names in named.items():
            for name in names:
                if name not in self.teachers:
                    raise ValueError(f"{key}: {name!r} is not among teachers: {', '.join(self.teachers)}")
        for name in self.teachers:
            if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
                raise ValueError(f"teachers: {name!r} names files; use lower-case letters, digits, - and _")
        return self


def load_params(path: str | Path, overrides: list[str] | None = None) -> Params:
    """Reads and checks `params.yaml`; `overrides` are `dotted.key=value` texts, values in YAML.

    Raises ParamsError with one line for each problem.
    """
    path = Path(path)
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; write one with `mgd-pipeline init`, or name yours with --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path}: cannot be read: {error}") from None
    except YAMLError as error:
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{path}: expected sections such as data: and student:, found {type(raw).__name__}")
    for override in overrides or []:
        _set(raw, override)
    return parse_params(raw, source=str(path))


def parse_params(raw: dict[str, Any], source: str = "params.yaml") -> Params:
    """Checks a plain dictionary, as parsed from YAML; `source` stands at the head of each error line."""
    try:
        return Params.model_validate_json(json.dumps(raw), strict=True)
    except TypeError as error:
        raise ParamsError(f"{source}: only plain YAML values are understood: {error}") from None
    except ValidationError as error:
        lines = dict.fromkeys(f"{source}: {_explain(problem)}" for problem in error.errors())
        raise ParamsError("\n".join(lines)) from None


def _set(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ParamsError(f"--set {override}: write key=value, such as student.steps=500")
    *parents, last = key.split(".")
    for parent in parents:
        child = raw.get(parent) if isinstance(raw, dict) else None
        if not isinstance(child, dict):
            near = difflib.get_close_matches(parent, list(raw), n=1)
            raise ParamsError(f"--set {override}: no section {parent!r}" + (f"; nearest is {near[0]!r}" if near else ""))
        raw = child
    try:
        raw[last] = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise ParamsError(f"--set {override}: {text!r} is not a YAML value") from None


def _explain(problem: Any) -> str:
    """One line of pydantic's report: key, value, and what would be right."""
    tags = ("shapes", "voc", "cityscapes", "folder", "str", "IdLists")
    location = [str(part) for part in problem["loc"] if str(part) not in tags]
    key, value, kind = ".".join(location), problem["input"], problem["type"]
    shown = "" if isinstance(value, (dict, list)) and len(str(value)) > 60 else f" = {value!r}"
    if kind == "extra_forbidden":
        known = _fields_at(problem["loc"][:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        remedy = f"nearest is {near[0]!r}" if near else f"known keys: {', '.join(known)}"
        return f"{key}{shown}: unknown key; {remedy}"
    if kind == "missing":
        return f"{key}: missing; add it (see `mgd-pipeline init`)"
    if kind == "value_error":
        text = str(problem["ctx"]["error"])
        return f"{key}{shown}: {text}" if key else text
    if kind in ("literal_error", "union_tag_invalid"):
        context = problem["ctx"]
        expected = re.findall(r"'([^']+)'", context.get("expected") or context.get("expected_tags"))
        if kind == "union_tag_invalid":
            key, shown = f"{key}.dataset", f" = {context['tag']!r}"
        near = difflib.get_close_matches(str(context.get("tag", value)), expected, n=1, cutoff=0.3)
        return f"{key}{shown}: must be one of {', '.join(expected)}" + (f"; nearest is {near[0]!r}" if near else "")
    if kind == "union_tag_not_found":
        return f"{key}.dataset: missing; must be one of shapes, voc, cityscapes, folder"
    return f"{key}{shown}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    """The keys that a section may have, found by walking the models along pydantic's location."""
    data = {"shapes": ShapesData, "voc": VocData, "cityscapes": CityscapesData, "folder": FolderData, "IdLists": IdLists}
    model: type[BaseModel] = Params
    for part in location:
        field = model.model_fields.get(str(part))
        if str(part) in data:
            model = data[str(part)]
        elif field is not None:
            classes = [c for c in _classes(field.annotation) if issubclass(c, Section)]
            model = classes[0] if classes else model
    return list(model.model_fields)


def _classes(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        return [annotation]
    return [found for argument in getattr(annotation, "__args__", ()) for found in _classes(argument)]
