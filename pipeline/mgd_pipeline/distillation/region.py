"""Losses of regions: how alike the parts of a view are, to the student and to the teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_pipeline.distillation.means import masked_mean
from mgd_pipeline.views import area_weights, coverage


def content_aware_loss(student_features: Tensor, teacher_features: Tensor, *, valid: Tensor | None = None, grid: int = 7) -> Tensor:
    """Mean squared difference of the cosine self-similarity matrices of grid x grid regions (MGD's region term).

    (B, D_s, h, w) and (B, D_t, h', w'): channels and sizes may differ. Both are averaged over the same grid x grid boxes,
    by exact area and over valid pixels only; M = cosine of every pair of boxes, (B, G*G, G*G); the mean runs over batch and
    pairs of boxes that hold any valid pixel. An all-zero region has similarity 0 with the others, not NaN.
    """
    student, exists = _region_similarity(student_features, valid, grid)
    teacher, _ = _region_similarity(teacher_features.detach(), valid, grid)
    pairs = exists[:, :, None] & exists[:, None, :]
    return masked_mean((student - teacher).square(), pairs)


def region_kl_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    valid: Tensor | None = None,
    grid: int = 7,
    temperature: float = 0.07,
) -> Tensor:
    """KL divergence of what each region finds similar: softmax over regions of the cosines of `content_aware_loss` / temperature.

    From the teacher's distribution to the student's; mean over all regions of the batch that hold a valid pixel (the local loss of
    LightlyTrain's DINOv3 distillation, 2025). A small temperature looks at the few most similar regions. 0 where both matrices
    are equal.
    """
    student, exists = _region_similarity(student_features, valid, grid)
    teacher, _ = _region_similarity(teacher_features.detach(), valid, grid)
    # A row is a distribution over the regions that exist. Where none does it is NaN, and neither counted nor given a gradient.
    regions = exists[:, None, :]
    log_s, log_t = ((matrix / temperature).masked_fill(~regions, -torch.inf).log_softmax(2) for matrix in (student, teacher))
    rows = (log_t.exp() * torch.where(regions, log_t - log_s, 0)).sum(2)
    return masked_mean(rows, exists)


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
