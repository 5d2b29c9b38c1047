"""The loss terms of a step of the distilled student, and their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mgd_pipeline.distillation import (
    Ohem,
    content_aware_loss,
    mean_of_probabilities,
    pixel_consistency_loss,
    semantic_sensitive_loss,
    supervised_loss,
)
from mgd_pipeline.networks.encoders import normalisation
from mgd_pipeline.networks.segmentation import upsample
from mgd_pipeline.params import LossesParams, Params
from mgd_pipeline.training.batches import (
    Batch,
    StepTargets,
    TargetProvider,
    mixed_valid,
    mixed_views,
    valid_views,
    view_images,
    view_labels,
)
from mgd_pipeline.training.semi_supervised import Forward


def step_terms(forward: Forward, batch: Batch, provider: TargetProvider | None, params: Params) -> dict[str, torch.Tensor]:
    """The loss terms of one step, unweighted scalars by name; only `supervised` where the batch has no unlabelled images."""
    student, jitter, losses = params.student, params.views.colour_jitter, params.losses
    normalise = normalisation(student.network.encoder)
    ohem = None if student.ohem is None else Ohem(student.ohem.threshold, student.ohem.min_kept)

    inputs = view_images(batch.labelled, normalise, jitter)
    labels = view_labels(batch.labelled)
    count = len(batch.labelled.rows)
    if batch.unlabelled is not None:
        seen = [view_images(source, normalise, jitter) for source in batch.mixed]
        inputs = torch.cat([inputs, mixed_views(batch, seen)])
    size = (inputs.shape[-2], inputs.shape[-1])
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=student.precision == "bfloat16"):
        outputs = forward(inputs.contiguous(memory_format=torch.channels_last))
    logits = upsample(outputs.logits.float(), size)
    terms = {"supervised": supervised_loss(logits[:count], labels, ohem=ohem)}
    if batch.unlabelled is None or provider is None:
        return terms

    targets, valid = provider(batch), mixed_valid(batch)
    for teacher, on_labelled, on_unlabelled in _pixel_targets(targets, losses):
        for images, student_logits, teacher_logits, exists in (
            ("labelled", logits[:count], on_labelled, valid_views(batch.labelled)),
            ("unlabelled", logits[count:], on_unlabelled, valid),
        ):
            if images in losses.images:
                terms[f"pixel_{images}_{teacher}"] = pixel_consistency_loss(
                    student_logits, teacher_logits, valid=exists, soft=losses.pixel_labels == "soft", confidence=losses.confidence
                )
    if "unlabelled" in losses.images:
        if losses.region:
            region = targets[losses.region_teacher].mixed_features
            terms["region"] = content_aware_loss(outputs.features[count:], region, valid=valid)
        if losses.image:
            terms["image"] = semantic_sensitive_loss(logits[count:], targets[losses.image_teacher].mixed_logits, valid=valid)
    return terms


def _pixel_targets(targets: Mapping[str, StepTargets], losses: LossesParams) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, logits on labelled and logits on unlabelled views of each pixel term."""
    if not losses.pixel:
        return []
    each = [(name, targets[name].labelled_logits, targets[name].unmixed_logits) for name in losses.pixel_teachers]
    if not losses.pixel_ensemble:
        return each
    _, labelled, unlabelled = zip(*each, strict=True)
    return [("ensemble", mean_of_probabilities(labelled), mean_of_probabilities(unlabelled))]


def total_loss(terms: dict[str, torch.Tensor], losses: LossesParams) -> torch.Tensor:
    """supervised + pixel * (all pixel terms) + region * region + image * image."""
    weights = {"supervised": 1.0, "region": losses.region, "image": losses.image}
    return torch.stack([weights.get(term, losses.pixel) * value for term, value in terms.items()]).sum()
