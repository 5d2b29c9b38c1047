"""What teacher caches hold, what students learn from them, and how networks are measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mgd_pipeline.params.sections import NonNegative, Positive, PositiveInt, Section


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
