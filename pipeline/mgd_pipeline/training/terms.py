"""The loss terms of a step of the distilled student, and their weighted sum.

Letters: B views, K classes, D channels, H W pixels of a view, h w cells of a network's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mgd_pipeline.distillation import (
    Ohem,
    agreement_weight,
    among_known,
    best_by_class,
    binary_loss,
    cauchy_schwarz_loss,
    channel_loss,
    class_weight,
    confidence_weight,
    content_aware_loss,
    correct_weight,
    dist_loss,
    edge_weight,
    feature_loss,
    kl_loss,
    known_classes_kl,
    known_weight,
    margin_weight,
    mean_log_probability_loss,
    mean_of_probabilities,
    mean_one,
    pixel_consistency_loss,
    presence_loss,
    region_kl_loss,
    semantic_sensitive_loss,
    supervised_loss,
    ttm_loss,
)
from mgd_pipeline.networks.encoders import normalisation
from mgd_pipeline.networks.segmentation import DenseOutputs, upsample
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
from mgd_pipeline.training.features import ProjectedOutputs
from mgd_pipeline.training.knowledge import Knowledge
from mgd_pipeline.training.optimisation import StepLoss
from mgd_pipeline.views import coverage

_NOTHING = Knowledge()
_WHOLE = 0.999
"""Share of a cell's pixels; one pixel of the largest cells, 16 x 16, is 0.004 of them."""


@dataclass(frozen=True)
class Seen:
    """The labelled or the unlabelled views of a step, and what is said of them."""

    images: Literal["labelled", "unlabelled"]
    logits: Tensor
    """(B, K, H, W) of the student for all views of the step, with a gradient"""
    views: slice
    """which of them these are"""
    teachers: Mapping[str, Tensor]
    """(B, K, H, W) logits of each pixel teacher"""
    valid: Tensor
    """(B, H, W) bool: the pixels that exist"""
    labels: Tensor | None = None
    """(B, H, W) int64 of labelled views"""
    features: Tensor | None = None
    """(B, D, h, w) embeddings of unlabelled views by the first region teacher; None where no weight reads them"""

    @property
    def student(self) -> Tensor:
        """(B, K, H, W) logits of these views. Each term takes its own slice: gradients of a shared one would be summed in another
        order, and trainings of earlier versions not be repeated to the bit."""
        return self.logits[self.views]


def step_terms(
    forward: Callable[[Tensor], DenseOutputs | ProjectedOutputs],
    batch: Batch,
    provider: TargetProvider | None,
    params: Params,
    knowledge: Knowledge = _NOTHING,
) -> dict[str, Tensor]:
    """The loss terms of one step, unweighted scalars by name; only `supervised` where the batch has no unlabelled images.

    The name of a term begins with the key of its weight (`total_loss`), such as `pixel_labelled_wide`. `knowledge` is what
    `knowledge_of` returns for these parameters.
    """
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
    if losses.pixel or losses.channel:
        on_labelled = {name: targets[name].labelled_logits for name in losses.pixel_teachers}
        on_unlabelled = {name: targets[name].unmixed_logits for name in losses.pixel_teachers}
        features = None if knowledge.prototypes is None else targets[losses.region_teacher[0]].mixed_features
        labelled = Seen("labelled", logits, slice(count), on_labelled, valid_views(batch.labelled), labels)
        unlabelled = Seen("unlabelled", logits, slice(count, None), on_unlabelled, valid, features=features)
        terms |= pixel_terms([views for views in (labelled, unlabelled) if views.images in losses.images], losses, knowledge)
    if "unlabelled" in losses.images:
        if losses.region:
            terms |= region_terms(outputs.features[count:], targets, valid, losses)
        if losses.image:
            said = targets[losses.image_teacher].mixed_logits
            floor = params.targets.floor_of(logits.shape[1])
            terms["image"] = image_term(logits[count:], said, valid, knowledge.known_of_image, losses.image_distance, floor)
    if losses.feature:
        assert isinstance(outputs, ProjectedOutputs)  # of `features.with_projections`
        terms |= feature_terms(outputs.projected, targets, (valid_views(batch.labelled), valid), losses, knowledge)
    return terms


def pixel_terms(seen: Sequence[Seen], losses: LossesParams, knowledge: Knowledge = _NOTHING) -> dict[str, Tensor]:
    """The pixel terms and the channel terms, one for each teacher that is heard and each kind of views: `pixel_labelled_wide`."""
    heard = [_heard(views.teachers, losses, knowledge) for views in seen]
    weights = [_weight(views, losses, knowledge) if losses.pixel else None for views in seen]
    terms = {}
    for teacher in heard[0]:
        known = knowledge.known.get(teacher)
        for views, of_teachers, weight in zip(seen, heard, weights, strict=True):
            logits = of_teachers[teacher]
            if losses.pixel:
                # The prior comes off last: agreement, confidence and choice of teachers are read from what teachers say themselves.
                off = knowledge.offsets if views.images == "unlabelled" else None
                terms[f"pixel_{views.images}_{teacher}"] = _pixel_term(views, logits, off, weight, known, losses)
            if losses.channel:
                # Each class is compared with itself, wherever else it is likely.
                student, said = (views.student, logits) if known is None else (views.student[:, known], logits[:, known])
                term = channel_loss(student, said, valid=views.valid, temperature=losses.temperature)
                terms[f"channel_{views.images}_{teacher}"] = term
    return terms


def region_terms(features: Tensor, targets: Mapping[str, StepTargets], valid: Tensor, losses: LossesParams) -> dict[str, Tensor]:
    """The term of each region teacher, named `region` if there is one, for (B, D, h, w) student features of unlabelled views."""
    region_loss = region_kl_loss if losses.region_distance == "kl" else content_aware_loss
    names, terms = losses.region_teacher, {}
    for teacher in names:
        term = region_loss(features, targets[teacher].mixed_features, valid=valid)
        terms["region" if len(names) == 1 else f"region_{teacher}"] = term
    return terms


def image_term(student: Tensor, teacher: Tensor, valid: Tensor, known: Tensor | None, distance: str, floor: float) -> Tensor:
    """The image term of (B, K, H, W) logits, by `losses.image_distance`. `known` are the class ids of a teacher that lacks a class,
    `floor` is that of log-probabilities, nats."""
    if known is not None:
        if distance != "l1":  # probabilities among the known classes say nothing where the student names another class
            valid = valid & known_weight(student, known)
        student, teacher = student[:, known], teacher[:, known]
    match distance:
        case "l1":
            return semantic_sensitive_loss(student, teacher, valid=valid)
        case "log-probability":
            return mean_log_probability_loss(student, teacher, floor, valid=valid)
        case _:
            return presence_loss(student, teacher, valid=valid)


def feature_terms(
    projected: Mapping[str, Tensor],
    targets: Mapping[str, StepTargets],
    valid: tuple[Tensor, Tensor],
    losses: LossesParams,
    knowledge: Knowledge,
) -> dict[str, Tensor]:
    """The feature terms, one for each feature teacher and each kind of views: `feature_labelled_wide`.

    `projected` are (B, D of the teacher, r, c) of all views, `valid` the (B, H, W) pixels that exist in labelled and in unlabelled
    views. A cell counts if all of its pixels exist: padding is part of the student's mean over the other cells.
    """
    terms = {}
    for teacher in losses.feature_teachers:
        mean, std = knowledge.features[teacher]
        of_images = targets[teacher].labelled_regions, targets[teacher].mixed_regions
        students = projected[teacher].split([len(pixels) for pixels in valid])
        for images, student, regions, pixels in zip(("labelled", "unlabelled"), students, of_images, valid, strict=True):
            if images in losses.images and regions is not None:
                whole = coverage(pixels, (student.shape[-2], student.shape[-1])) > _WHOLE
                terms[f"feature_{images}_{teacher}"] = feature_loss(student, regions, mean, std, valid=whole)
    return terms


def _heard(teachers: Mapping[str, Tensor], losses: LossesParams, knowledge: Knowledge) -> Mapping[str, Tensor]:
    """(B, K, H, W) logits of the teachers that have a term each, or of what they say together, by name."""
    match losses.pixel_choice:
        case "ensemble":
            return {"ensemble": mean_of_probabilities(list(teachers.values()))}
        case "by-class":
            return {"by-class": best_by_class(list(teachers.values()), [knowledge.iou[name] for name in teachers])}
    return teachers


def _pixel_term(
    views: Seen, logits: Tensor, off: Tensor | None, weight: Tensor | None, known: Tensor | None, losses: LossesParams
) -> Tensor:
    student, valid = views.student, views.valid
    if losses.confidence:
        valid = valid & confidence_weight(logits, losses.confidence)
    if "correct" in losses.pixel_weights and views.labels is not None:
        valid = valid & correct_weight(logits, views.labels)
    if weight is not None and valid is not views.valid:
        weight = mean_one(weight, valid)  # the weight of the term stays
    if off is not None:
        logits = logits - off
    if known is not None and losses.pixel_distance == "dist":  # which takes no weight of a pixel
        valid = valid & known_weight(student, known)
        student, logits = student[:, known], logits[:, known]
    elif known is not None and losses.pixel_distance != "kl":
        student, logits, share = among_known(student, logits, known)
        weight = share if weight is None else weight * share
    match losses.pixel_distance:
        case "cross-entropy":
            return pixel_consistency_loss(student, logits, valid=valid, soft=losses.pixel_labels == "soft", weight=weight)
        case "kl" if known is not None:
            return known_classes_kl(student, logits, known, valid=valid, weight=weight, temperature=losses.temperature)
        case "kl":
            return kl_loss(student, logits, valid=valid, weight=weight, temperature=losses.temperature)
        case "dist":
            return dist_loss(student, logits, valid=valid)
        case "cauchy-schwarz":
            return cauchy_schwarz_loss(student, logits, valid=valid, weight=weight)
        case "ttm":
            return ttm_loss(student, logits, valid=valid, weight=weight)
        case "binary":
            return binary_loss(student, logits, valid=valid, weight=weight)


def _weight(views: Seen, losses: LossesParams, knowledge: Knowledge) -> Tensor | None:
    """(B, H, W) float32, mean 1 over valid pixels: the product of what weighs a pixel, whichever teacher speaks. None without."""
    valid, teachers, weights = views.valid, list(views.teachers.values()), []
    if "edges" in losses.pixel_weights:
        labels = _named(views, knowledge) if views.labels is None else views.labels
        weights.append(edge_weight(labels, strength=losses.edges, valid=valid))
    if knowledge.pixels is not None:
        weights.append(class_weight(_named(views, knowledge), knowledge.pixels, strength=losses.balance, valid=valid))
    if "agreement" in losses.pixel_weights and views.images == "unlabelled":
        weights.append(agreement_weight(*teachers, valid=valid))
    if views.features is not None and knowledge.prototypes is not None:
        size = (valid.shape[-2], valid.shape[-1])
        weights.append(margin_weight(views.features, knowledge.prototypes, size, valid=valid))
    if len(weights) < 2:
        return weights[0] if weights else None
    return mean_one(torch.stack(weights).prod(0), valid)


def step_loss(terms: dict[str, Tensor], params: Params) -> StepLoss:
    """`total_loss` with its terms; what teachers say apart from what labels say, if the student's optimiser treats them apart."""
    total = total_loss(terms, params.losses)
    of_teachers = {name: value for name, value in terms.items() if name != "supervised"}
    if not (params.student.distillation_momentum and of_teachers):
        return StepLoss(total, terms)
    return StepLoss(total, terms, (total_loss(of_teachers, params.losses), terms["supervised"]))


def _named(views: Seen, knowledge: Knowledge) -> Tensor:
    """(B, H, W) int64: the class that the teachers together name, after the prior has come off on unlabelled images."""
    logits = mean_of_probabilities(list(views.teachers.values()))
    if knowledge.offsets is not None and views.images == "unlabelled":
        logits = logits - knowledge.offsets
    return logits.max(1).indices


def total_loss(terms: dict[str, Tensor], losses: LossesParams) -> Tensor:
    """supervised + pixel * (all pixel terms) + channel * (all channel terms) + region * (all region terms) + image * image
    + feature * (all feature terms)."""
    weights = {"supervised": 1.0, "pixel": losses.pixel, "channel": losses.channel, "region": losses.region, "image": losses.image}
    weights["feature"] = losses.feature
    return torch.stack([weights[term.partition("_")[0]] * value for term, value in terms.items()]).sum()
