"""What a store of targets was made from, as plain JSON: its hash is the store's identity (`cache.fingerprint`)."""

from __future__ import annotations

from typing import Any

from mgd_pipeline.networks import MULTIPLE, normalisation
from mgd_pipeline.params import TargetsParams, TeacherParams
from mgd_pipeline.targets import TARGETS_VERSION


def expected_provenance(
    params: TeacherParams, targets: TargetsParams, classes: tuple[str, ...], long_side: int | None
) -> dict[str, Any]:
    """The provenance that follows from the parameters alone, without the teacher's weights."""
    mean, std = normalisation(params.encoder)
    return {
        "targets_version": TARGETS_VERSION,
        "teacher": {
            "decoder": params.decoder,
            "encoder": params.encoder,
            "decoder_channels": params.decoder_channels,
        },
        "preprocessing": {
            "mean": list(mean),
            "std": list(std),
            "long_side": long_side,
            "resize": "PIL bilinear, antialiased",
            "exif_orientation": "ignored",
            "pad_multiple": MULTIPLE,
            "tta": None if targets.tta is None else targets.tta.model_dump(),
        },
        "classes": list(classes),
        "encoding": {
            "logits": targets.logits,
            "stride": targets.stride,
            "top_k": targets.top_k,
            "region_embeddings": "float16",
            "region_stride": targets.region_stride,
        },
    }


def teacher_provenance(expected: dict[str, Any], weights_sha256: str, trained_on: str | None) -> dict[str, Any]:
    """The whole provenance of a store: `expected_provenance`, the hash of the weights, and the fingerprint of the labelled
    ids that the teacher was trained on (None where its weights do not say)."""
    return {**expected, "teacher": {**expected["teacher"], "weights_sha256": weights_sha256, "trained_on": trained_on}}
