"""The four terms of MGD (Qin et al., ECCV 2022), as pure functions: student first, target second.

Letters: B batch, K classes, D channels, H W pixels, h w cells, G boxes per side. All arithmetic is float32; gradients flow
to the student alone. `valid` is (B, H, W) bool, True where a pixel exists; padding takes no part in any mean.
Where the paper and the official code differ, the formulas follow the code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.views import area_weights, coverage


class Ohem(NamedTuple):
    """Online hard example mining: pixels of true-class probability <= threshold, and at least the min_kept hardest."""

    threshold: float = 0.7
    min_kept: int = 100_000


def supervised_loss(student_logits: Tensor, labels: Tensor, *, ohem: Ohem | None = None) -> Tensor:
    """Mean cross entropy of (B, K, H, W) logits against (B, H, W) int64 labels, without 255; 0 if no pixel has a class.

    With `ohem` the mean runs over the hard pixels only (MGD on Cityscapes: threshold 0.7, min_kept 100,000 a GPU).
    """
    per_pixel = F.cross_entropy(student_logits.float(), labels, ignore_index=IGNORE, reduction="none")
    kept = labels != IGNORE
    if ohem is not None:
        # cross entropy is -log p, so "p <= threshold" is a bound from below; the min_kept hardest loosen it.
        hard = per_pixel.detach().masked_fill(~kept, -torch.inf).flatten()
        smallest = hard.topk(min(ohem.min_kept, hard.numel())).values[-1]
        kept = kept & (per_pixel.detach() >= smallest.clamp(max=-math.log(ohem.threshold)))
    return _masked_mean(per_pixel, kept)


def pixel_consistency_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    valid: Tensor | None = None,
    soft: bool = False,
    confidence: float = 0.0,
    of_all: bool = False,
    class_offsets: Tensor | None = None,
) -> Tensor:
    """Mean cross entropy of (B, K, H, W) student logits against the argmax of (B, K, H, W) teacher logits.

    Hard labels, no confidence threshold and no temperature, as in MGD; on labelled images void pixels count too. Not in
    MGD: `soft` compares with the teacher's probabilities instead (Hinton et al., 2015, at temperature 1), and pixels
    whose largest probability is below `confidence` are left out (FixMatch, Sohn et al., 2020); the mean is over the other
    pixels, or with `of_all` over all valid pixels, as in FixMatch, so that few confident pixels weigh little. The (K,)
    `class_offsets` are taken off the teacher's logits first (logit adjustment), but `confidence` reads the logits without them:
    the same pixels count, and only their targets change.
    """
    teacher = teacher_logits.detach().float()
    adjusted = teacher if class_offsets is None else teacher - class_offsets.to(teacher)[:, None, None]
    if soft:
        target = adjusted.softmax(1)
    else:
        target = adjusted.max(1).indices  # argmax over a strided dimension is 5 times slower on CPUs
    per_pixel = F.cross_entropy(student_logits.float(), target, reduction="none")
    kept = torch.ones_like(per_pixel, dtype=torch.bool) if valid is None else valid
    if confidence > 0:
        # The largest probability is exp(max - logsumexp); the softmax of the other classes is not needed.
        confident = kept & (teacher.amax(1) - teacher.logsumexp(1) >= math.log(confidence))
        share = confident.sum() / kept.sum().clamp(min=1) if of_all else 1.0
        return _masked_mean(per_pixel, confident) * share
    return _masked_mean(per_pixel, kept)


def mean_of_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Logits whose softmax is the mean of the softmaxes of several (B, K, H, W) logits: an ensemble."""
    return torch.stack([values.float().log_softmax(1) for values in logits]).logsumexp(0) - math.log(len(logits))


def content_aware_loss(student_features: Tensor, teacher_features: Tensor, *, valid: Tensor | None = None, grid: int = 7) -> Tensor:
    """Mean squared difference of the cosine self-similarity matrices of grid x grid regions (MGD's region term).

    (B, D_s, h, w) and (B, D_t, h', w'): channels and sizes may differ. Both are averaged over the same grid x grid boxes,
    by exact area and over valid pixels only; M = cosine of every pair of boxes, (B, G*G, G*G); the mean runs over batch and
    pairs of boxes that hold any valid pixel. An all-zero region has similarity 0 with the others, not NaN.
    """
    student, exists = _region_similarity(student_features, valid, grid)
    teacher, _ = _region_similarity(teacher_features.detach(), valid, grid)
    pairs = exists[:, :, None] & exists[:, None, :]
    return _masked_mean((student - teacher).square(), pairs)


def semantic_sensitive_loss(student_logits: Tensor, teacher_logits: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Absolute difference of the mean logits of a view: summed over classes, averaged over images (MGD's image term).

    (B, K, H, W) raw logits, no softmax. The official code sums over the 2 images of a GPU instead: its lambda_1 = 0.002 is
    a weight of 0.004 here.
    """
    difference = _mean_logits(student_logits, valid) - _mean_logits(teacher_logits.detach(), valid)
    return difference.abs().sum(1).mean()


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over True; 0 with a zero gradient if nothing is True, so an empty term never makes NaN."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def _mean_logits(logits_BKHW: Tensor, valid_BHW: Tensor | None) -> Tensor:
    logits = logits_BKHW.float()
    if valid_BHW is None:
        return logits.mean((2, 3))
    mask = valid_BHW[:, None]
    return torch.where(mask, logits, 0).sum((2, 3)) / mask.sum((2, 3)).clamp(min=1)


def _region_similarity(features_BDhw: Tensor, valid_BHW: Tensor | None, boxes: int) -> tuple[Tensor, Tensor]:
    """Cosine similarity of region means (B, G*G, G*G), and (B, G*G) bool: which regions hold a valid pixel."""
    features = features_BDhw.float()
    h, w = features.shape[-2:]
    rows, columns = (area_weights(side, boxes, features.device) for side in (h, w))
    if valid_BHW is None:
        weight = features.new_ones((features.shape[0], 1, h, w))
    else:
        weight = coverage(valid_BHW, (h, w))[:, None]
    share = rows @ weight @ columns.T
    pooled = rows @ torch.where(weight > 0, features * weight, 0) @ columns.T / share.clamp(min=1e-6)
    # Cells that are valid for less than a ten-thousandth of their area are rounding, not regions.
    exists = (share > 1e-4).flatten(1)
    regions = F.normalize(pooled.flatten(2), dim=1, eps=1e-6)
    regions = torch.where(exists[:, None, :], regions, 0)
    return regions.transpose(1, 2) @ regions, exists
