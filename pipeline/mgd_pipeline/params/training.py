"""How teachers and students are trained: views, optimisation, methods."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mgd_pipeline.params.networks import NetworkParams
from mgd_pipeline.params.sections import NonNegative, Positive, PositiveInt, Section


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
    prior_adjustment: NonNegative = 0.0
    """Takes this times the log of each class's share of the labelled pixels off the logits before that pseudo label is read, so
    that rare classes are named more often; confidence is read before. MGD takes nothing off."""

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
    consistency_rampup: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the steps over which consistency rises from 0. From the first step on, a student from random weights learns its own
    first mistakes."""


class StudentParams(OptimisationParams):
    network: NetworkParams
    """The network that is trained, and used afterwards."""
    ohem: OhemParams | None = None
    """Hard example mining in the supervised term, such as {threshold: 0.7, min_kept: 400000}; null is plain cross entropy."""
    logit_adjustment: NonNegative = 0.0
    """Factor of the logarithm of a class's share of the labelled pixels, which the finished student's logits lose. Rare classes
    are then named more often; MGD has none."""
    distillation_momentum: NonNegative = 0.0
    """Momentum that the gradients of the teachers' terms have more than momentum, and the gradients of the labels less (DOT, Zhao
    et al., ICCV 2023). It needs sgd and a second backward pass each step; the paper takes 0.075 and 0.09. MGD has plain SGD, 0."""
    without_teachers: WithoutTeachersParams = WithoutTeachersParams()
    """How the student without teachers is trained, with which the distilled student is compared."""

    @model_validator(mode="after")
    def _average(self) -> StudentParams:
        _require_average(self.without_teachers.method, self.ema)
        return self

    @model_validator(mode="after")
    def _two_momenta(self) -> StudentParams:
        more, momentum = self.distillation_momentum, self.momentum
        if more and self.optimizer != "sgd":
            said = f"distillation_momentum = {more}: is defined for sgd, but optimizer is {self.optimizer}"
            raise ValueError(f"{said}; set optimizer to sgd, or distillation_momentum to 0")
        if more and (momentum - more < 0 or momentum + more >= 1):
            raise ValueError(
                f"distillation_momentum = {more}: must be below {min(momentum, 1 - momentum):g}, so that momentum = {momentum} "
                "less it and plus it lie between 0 and 1"
            )
        return self


def _require_average(method: str, ema: float) -> None:
    if method == "mean-teacher" and not ema:
        raise ValueError("ema: mean-teacher labels images by the moving average of the weights; set ema, such as 0.99")
