"""Which pixels a student hears, and how loud: masks and weights of pixels, for every per-pixel distance.

One rule holds for all distances (`pixel_mean`): the sum of weight * distance over valid pixels, divided by the number of valid
pixels. Two kinds of weights follow.

- `confidence_weight`, `correct_weight` and `known_weight` are masks, (B, H, W) bool. Pixels that are False leave the mean: use
  `valid & confidence_weight(...)` as `valid`. Distances over all pixels of a class (`dist_loss`, `channel_loss`) take them, too.
- `agreement_weight`, `margin_weight` and `edge_weight` are (B, H, W) float32, not negative, with mean 1 over valid pixels and 0
  outside, so that the weight of the term stays. They are a distance's `weight`. The product of several goes through `mean_one`.

No gradient flows through any of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.errors import DataError
from mgd_pipeline.views import coverage

_CELL_SHARE = 0.9
"""A cell is of one class if the class covers this share of its area."""


def confidence_weight(teacher_logits: Tensor, threshold: float) -> Tensor:
    """(B, H, W) bool: where the largest probability of (B, K, H, W) logits is `threshold` or more (FixMatch, Sohn et al., 2020)."""
    teacher = teacher_logits.detach().float()
    # The largest probability is exp(max - logsumexp); the softmax of the other classes is not needed.
    return teacher.amax(1) - teacher.logsumexp(1) >= (math.log(threshold) if threshold > 0 else -torch.inf)


def correct_weight(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """(B, H, W) bool: where the most likely class of (B, K, H, W) logits is the label; False where the label is 255.

    As Zhao et al., "MDCS: more diverse experts with consistency self-distillation for long-tailed recognition", ICCV 2023.
    """
    return teacher_logits.detach().max(1).indices == labels


def known_weight(student_logits: Tensor, known: Tensor) -> Tensor:
    """(B, H, W) bool: where the most likely class of (B, K, H, W) logits is one of the class ids `known`."""
    logits = student_logits.detach()
    return logits[:, known].amax(1) >= logits.amax(1)


def agreement_weight(logits_a: Tensor, logits_b: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """exp(-KL(a || b)) of two teachers' (B, K, H, W) logits, with mean 1 over valid pixels: (B, H, W) float32.

    After Liang et al., "Relative difficulty distillation for semantic segmentation", 2024, who compare two heads of one teacher.
    """
    a, b = (logits.detach().float().log_softmax(1) for logits in (logits_a, logits_b))
    return mean_one((-(a.exp() * (a - b)).sum(1)).exp(), valid)


def edge_weight(labels: Tensor, *, strength: float, radius: int = 3, valid: Tensor | None = None) -> Tensor:
    """1 + strength within `radius` pixels of a boundary of classes, 1 elsewhere, with mean 1 over valid pixels: (B, H, W) float32.

    `labels` are (B, H, W) int64, true or a teacher's. A pixel is near a boundary if the square of 2 * radius + 1 pixels around it
    shows two classes; that is the union over classes of dilation minus erosion (Liu et al., "BPKD: boundary privileged knowledge
    distillation for semantic segmentation", WACV 2024). 255 and pixels that are not valid are no class and make no boundary.
    """
    classless = labels == IGNORE if valid is None else (labels == IGNORE) | ~valid
    highest, lowest = labels.float().masked_fill(classless, -1), labels.float().masked_fill(classless, IGNORE)
    window = 2 * radius + 1
    near = F.max_pool2d(highest[:, None], window, 1, radius) > -F.max_pool2d(-lowest[:, None], window, 1, radius)
    return mean_one(1 + strength * near[:, 0], valid)


def margin_weight(teacher_features: Tensor, prototypes: Tensor, size: tuple[int, int], *, valid: Tensor | None = None) -> Tensor:
    """How clearly a cell looks like one class of the labelled images, with mean 1 over valid pixels: (B, *size) float32.

    The difference of the two largest cosines of a cell of (B, D, h, w) features with the (K, D) `class_prototypes` (Du et al.,
    "Semi-supervised learning via weight-aware distillation under class distribution mismatch", ICCV 2023), resized to the pixels
    of the view. The corner cells lie on the corners of the view. Classes without a prototype (all zero) are not compared.
    """
    known = prototypes.any(1)
    cosines = torch.einsum(
        "bdhw,kd->bkhw",
        F.normalize(teacher_features.detach().float(), dim=1, eps=1e-6),
        F.normalize(prototypes.detach().float(), dim=1, eps=1e-6),
    )
    best = cosines.masked_fill(~known[:, None, None], -1).topk(2, dim=1).values
    margin = best[:, :1] - best[:, 1:]
    exists = torch.ones_like(margin)
    if valid is not None:  # cells of padding alone say nothing to the pixels beside them
        exists = (coverage(valid, (margin.shape[-2], margin.shape[-1])) > 0)[:, None].float()
    shares = torch.cat([torch.where(exists > 0, margin, 0), exists], 1)
    summed, share = F.interpolate(shares, size=size, mode="bilinear", align_corners=True).unbind(1)
    return mean_one(summed / share.clamp(min=1e-6), valid)


def class_prototypes(labelled: Iterable[tuple[Tensor, Tensor]], classes: int) -> Tensor:
    """Mean of the normalised features of the cells of each class: (classes, D) float32, all zero for a class without a cell.

    `labelled` are pairs of teacher features (B, D, h, w) and labels (B, H, W) int64 of the same area. A cell is of a class if the
    class covers at least nine tenths of it. Raises DataError where fewer than two classes have a cell.
    """
    sums: Tensor | None = None
    cells = torch.zeros(classes)
    for features, labels in labelled:
        unit = F.normalize(features.float(), dim=1, eps=1e-6)
        if sums is None:
            sums, cells = unit.new_zeros((classes, unit.shape[1])), cells.to(unit.device)
        for number in range(classes):
            inside = coverage(labels == number, (unit.shape[-2], unit.shape[-1])) >= _CELL_SHARE
            sums[number] += torch.where(inside[:, None], unit, 0).sum((0, 2, 3))
            cells[number] += inside.sum()
    if sums is None or (cells > 0).sum() < 2:
        raise DataError(
            "the labelled images have cells of one class for fewer than two classes, and a margin needs two; "
            "label more images, or leave `margin` out of losses.pixel_weights"
        )
    return sums / cells.clamp(min=1)[:, None]


def mean_one(weight: Tensor, valid: Tensor | None = None) -> Tensor:
    """(B, H, W) weights, 0 outside of valid pixels, scaled to a mean of 1 over valid pixels; all 0 where no weight is positive."""
    kept = torch.ones_like(weight, dtype=torch.bool) if valid is None else valid
    weight = torch.where(kept, weight.detach().float(), 0)
    return weight / weight.sum().clamp(min=torch.finfo(torch.float32).tiny) * kept.sum()
