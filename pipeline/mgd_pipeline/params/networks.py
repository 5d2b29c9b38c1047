"""Networks of students and of teachers that are trained here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, ValidationInfo, field_validator

from mgd_pipeline.params.sections import PositiveInt, Section, Text


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
