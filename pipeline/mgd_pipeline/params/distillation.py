"""What teacher caches hold, what students learn from them, and how networks are measured."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from mgd_pipeline.params.sections import NonNegative, Positive, PositiveInt, Section


class TtaParams(Section):
    scales: Annotated[list[Positive], Field(min_length=1)] = [1.0]
    """The teacher sees the image at each of these scales."""
    flip: bool = True
    """Whether the teacher also sees each of them mirrored."""


class TargetsParams(Section):
    logits: Literal["uint8", "float16", "log-probability"] = "uint8"
    """Encoding of the stored logits; uint8 has an offset and a scale per image. log-probability keeps log-probabilities down to a
    floor: with compression a quarter to a half of the bytes."""
    floor: Annotated[float, Field(ge=4, le=64)] | None = None
    """Of log-probability, nats: minus this is stored for everything less than 2 above it. null takes 7 + log(number of classes), at
    which all classes at the floor together have less than a thousandth of the probability."""
    levels: Annotated[int, Field(ge=16, le=256)] = 64
    """Of log-probability: how many even levels there are from minus the floor to 0."""
    stride: Literal[2, 4, 8, 16] = 4
    """Pixels between stored cells of the logits. 4 is the network's own stride; larger strides cost accuracy. 2 keeps the thin
    things that a teacher with a short_side or with scales above 1 sees."""
    top_k: PositiveInt | None = None
    """Number of logits per cell that are stored; all smaller ones become their mean. null stores all."""
    region_stride: Literal[4, 8, 16] = 16
    """Pixels between stored cells of the region embeddings; small crops need a small stride."""
    region_embeddings: Literal["float16", "uint8"] = "float16"
    """Encoding of the stored region embeddings; uint8 has an offset and a scale per channel and image."""
    region_levels: Annotated[int, Field(ge=16, le=256)] = 128
    """Of region_embeddings uint8: how many even levels a channel has. Fewer levels compress better."""
    compression: Literal["none", "zstd"] = "none"
    """Of the stored logits and region embeddings, without loss. zstd gains little with the logits uint8 and the embeddings
    float16."""
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

    def floor_of(self, classes: int) -> float:
        """The floor of log-probabilities of so many classes, nats."""
        return round(7 + math.log(classes), 1) if self.floor is None else self.floor

    @model_validator(mode="after")
    def _mirrored_once(self) -> TargetsParams:
        if self.mirrored and self.tta is not None and self.tta.flip:
            raise ValueError("mirrored: tta.flip makes both the same, for it averages them; set one of them to false")
        return self

    @model_validator(mode="after")
    def _floor_of_something(self) -> TargetsParams:
        if self.floor is not None and self.logits != "log-probability":
            raise ValueError(
                f"floor: is of log-probabilities, but logits is {self.logits}; set logits to log-probability, or floor to null"
            )
        return self


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_written(names: list[str]) -> str | list[str]:
    return names[0] if len(names) == 1 else names


_NameList = Annotated[list[str], Field(min_length=1)]
Names = Annotated[_NameList, BeforeValidator(_listed, json_schema_input_type=str | _NameList), PlainSerializer(_as_written)]
"""A name or a list of names, in params.yaml; here always a list. Version 0.1.0 had one name."""


class LossesParams(Section):
    pixel: NonNegative = 1.0
    """Weight of the pixel term for each teacher in pixel_teachers."""
    channel: NonNegative = 0.0
    """Weight of the channel term for each teacher in pixel_teachers: where in the view each class is. It counts all classes alike,
    however few pixels they have. MGD has no such term."""
    region: NonNegative
    """Weight of the content-aware (region) loss: lambda_2."""
    image: NonNegative
    """Weight of the semantic-sensitive (image) loss, a mean over images: 2 x lambda_1 of the official code."""
    feature: NonNegative = 0.0
    """Weight of the feature term for each teacher in feature_teachers: a trained projection of the student's features is compared
    with the teacher's embeddings. MGD has no such term; a usual weight is 1."""
    pixel_teachers: list[str] = ["wide", "deep"]
    """Teachers whose classes the student learns; each adds one term."""
    region_teacher: Names = Field("wide", validate_default=True)
    """Teacher whose region embeddings the student's are compared with, or a list of teachers, each of which adds one term."""
    image_teacher: str = "deep"
    """Teacher whose classes of a whole view the student's are compared with."""
    feature_teachers: list[str] = []
    """Teachers whose embeddings the student learns to predict, on labelled and unlabelled images; they may name no classes."""
    images: Annotated[list[Literal["labelled", "unlabelled"]], Field(min_length=1)] = ["labelled", "unlabelled"]
    """Images on which the student learns from teachers; MGD's region and image terms use unlabelled images only."""
    pixel_choice: Literal["each", "ensemble", "by-class"] = "each"
    """Which of several pixel_teachers is heard at a pixel: each, with a term of its own, as in MGD; ensemble, the mean of their
    probabilities; by-class, the teacher whose class there it segments best on the labelled images."""
    pixel_distance: Literal["cross-entropy", "kl", "dist", "cauchy-schwarz", "ttm", "binary"] = "cross-entropy"
    """How the pixel term compares student and teacher; MGD takes cross-entropy. The page "A map of the field" of the documentation
    says what each distance is."""
    pixel_labels: Literal["hard", "soft"] = "hard"
    """What cross-entropy learns: the teacher's most likely class, as in MGD, or its probabilities. The other distances always
    compare probabilities, whatever stands here."""
    temperature: Positive = 1.0
    """Divides the logits of student and teacher in the distance kl and in the channel term, which are multiplied by its square; the
    other terms have none."""
    confidence: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """A teacher's pixel term ignores pixels whose largest probability is below this; MGD ignores none."""
    pixel_weights: list[Literal["agreement", "correct", "margin", "edges", "balance"]] = []
    """What else weighs a pixel in the pixel term; several are multiplied. agreement: two teachers say the same of an unlabelled
    image. correct: the teacher is right, on labelled images. margin: the cell of an unlabelled image is like one class of the
    labelled images only, by the embeddings of the first region_teacher. edges: where classes meet. balance: the class is rare
    among the labelled pixels. MGD weighs all pixels alike."""
    edges: Positive = 2.0
    """What a pixel of the weight edges counts more than others, within 3 pixels of a boundary of classes."""
    balance: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The weight balance is the share of the class that the teachers name, to the power of minus this; 1 makes classes count alike
    that have the same shares there as among the labelled pixels."""
    region_distance: Literal["mse", "kl"] = "mse"
    """How the region term compares similarities of regions: by the squared difference, as in MGD, or by the KL divergence of their
    softmax, which looks at the most similar regions."""
    image_distance: Literal["l1", "log-probability", "presence"] = "l1"
    """How the image term compares a view: the difference of the mean logits, as in MGD, or of the mean log-probabilities, down to
    targets.floor; or which classes are there at all."""
    prior_adjustment: NonNegative = 0.0
    """Takes this times the log of each class's share of the labelled pixels off a teacher's logits on unlabelled images, so that
    rare classes are named more often; MGD takes nothing off."""
    other_partition: bool = False
    """Whether teachers may have seen labels that this partition does not have; true lets these labels leak into the student."""

    @model_validator(mode="before")
    @classmethod
    def _names_of_0_1(cls, value: object) -> object:
        """Version 0.1.0 had two choices, and named one of them."""
        if not isinstance(value, dict) or "pixel_ensemble" not in value:
            return value
        if "pixel_choice" in value:
            raise ValueError("pixel_ensemble: is the former name of pixel_choice: ensemble; write only pixel_choice")
        former = {True: "ensemble", False: "each"}
        ensemble = value["pixel_ensemble"]
        others = {key: entry for key, entry in value.items() if key != "pixel_ensemble"}
        return {**others, "pixel_choice": former[ensemble] if isinstance(ensemble, bool) else ensemble}

    @model_validator(mode="after")
    def _weights_that_weigh(self) -> LossesParams:
        weights, teachers = self.pixel_weights, self.pixel_teachers
        for weight in weights:
            if weights.count(weight) > 1:
                raise ValueError(f"pixel_weights: {weight} stands twice; name it once")
            images = {"correct": "labelled", "agreement": "unlabelled", "margin": "unlabelled"}.get(weight, self.images[0])
            if images not in self.images:
                said = f"{weight} weighs {images} images, but images is [{', '.join(self.images)}]"
                raise ValueError(f"pixel_weights: {said}; add {images} there, or leave {weight} out")
            if self.pixel_distance == "dist" and weight != "correct":
                said = f"dist compares all pixels together, and {weight} weighs single ones"
                raise ValueError(f"pixel_weights: {said}; leave {weight} out, or choose another pixel_distance")
        if "agreement" in weights and len(teachers) != 2:
            said = f"agreement compares two teachers, but pixel_teachers is [{', '.join(teachers)}]"
            raise ValueError(f"pixel_weights: {said}; name two there, or leave agreement out")
        return self

    @model_validator(mode="after")
    def _someone_to_predict(self) -> LossesParams:
        if self.feature and not self.feature_teachers:
            raise ValueError("feature_teachers: is empty, and the feature term needs a teacher; name one, or set feature to 0")
        return self

    @property
    def in_vain(self) -> list[str]:
        """A line for each reason why keys that are set change nothing."""
        of_pixels = [key for key in ("confidence", "pixel_weights", "prior_adjustment") if getattr(self, key)]
        if of_pixels and not self.pixel:
            return [
                f"losses.{', losses.'.join(of_pixels)}: nothing reads this, because the pixel term has the weight 0 (losses.pixel)"
            ]
        if self.prior_adjustment and "unlabelled" not in self.images:
            return ["losses.prior_adjustment: nothing reads this, because losses.images has no unlabelled images"]
        return []

    @property
    def needed(self) -> list[tuple[str, str, str]]:
        """What terms of positive weight need: a key, a teacher that it names, and "classes" or "features" of its cache."""
        of_pixels = bool(self.pixel or self.channel)
        needed = [("pixel_teachers", name, "classes") for name in self.pixel_teachers if of_pixels]
        needed += [("feature_teachers", name, "features") for name in self.feature_teachers if self.feature]
        if "unlabelled" in self.images:
            needed += [("region_teacher", name, "features") for name in self.region_teacher if self.region]
            needed += [("image_teacher", self.image_teacher, "classes")] if self.image else []
            if self.pixel and "margin" in self.pixel_weights:
                needed += [("region_teacher", self.region_teacher[0], "features")]
        return needed

    @property
    def measured(self) -> str | None:
        """The key, or key and value, by which caches are measured before the first step; None without."""
        if self.feature:
            return "feature_teachers"
        by_class = (self.pixel or self.channel) and self.pixel_choice == "by-class"
        margin = self.pixel and "margin" in self.pixel_weights
        return "pixel_choice: by-class" if by_class else "pixel_weights: margin" if margin else None

    @property
    def used_teachers(self) -> list[str]:
        """The teachers that some term of positive weight listens to."""
        return list(dict.fromkeys(name for _, name, _ in self.needed))


class EvaluationParams(Section):
    split: Literal["val", "test"] = "val"
    """Split on which teachers and students are compared."""
    window: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None
    """Height and width of a sliding window, pixels; null predicts the whole image."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 1 / 3
    """Share of the window by which neighbours overlap."""
    overlays: PositiveInt = 3
    """Number of pictures each of the worst, median and best images."""
