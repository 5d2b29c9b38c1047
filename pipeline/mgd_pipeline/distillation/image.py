"""Losses of a whole view: how much of each class it shows."""

from __future__ import annotations

import torch
from torch import Tensor

from mgd_pipeline.distillation.means import masked_mean
from mgd_pipeline.distillation.pixel import log_probabilities


def semantic_sensitive_loss(student_logits: Tensor, teacher_logits: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Absolute difference of the mean logits of a view: summed over classes, averaged over images (MGD's image term).

    (B, K, H, W) raw logits, no softmax. The official code sums over the 2 images of a GPU instead: its lambda_1 = 0.002 is
    a weight of 0.004 here.
    """
    difference = _mean_logits(student_logits, valid) - _mean_logits(teacher_logits.detach(), valid)
    return difference.abs().sum(1).mean()


def mean_log_probability_loss(
    student_logits: Tensor, teacher_logits: Tensor, floor: float, *, valid: Tensor | None = None
) -> Tensor:
    """`semantic_sensitive_loss` of log-probabilities, of which those below -floor count as -floor.

    (B, K, H, W) logits. Logits that differ by a constant for each pixel say the same here, so that caches which hold
    log-probabilities can be compared with. A student that is surer than the floor that a class is absent gets no gradient for it.
    """
    student, teacher = (logits.float().log_softmax(1).clamp(min=-floor) for logits in (student_logits, teacher_logits))
    return semantic_sensitive_loss(student, teacher, valid=valid)


def presence_loss(student_logits: Tensor, teacher_logits: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Binary KL divergence of the presence of each class, from teacher to student; summed over classes, averaged over images.

    The presence of a class in a view is its largest probability over the valid pixels of (B, K, H, W) logits. The distance is the
    multi-label one of Yang et al., "Multi-label knowledge distillation", ICCV 2023. Images without a valid pixel do not count.
    0 where all presences are equal.
    """
    if valid is None:
        valid = torch.ones_like(student_logits[:, 0], dtype=torch.bool)
    (log_s, log_not_s), (log_t, log_not_t) = (
        _presence(logits.float(), valid) for logits in (student_logits, teacher_logits.detach())
    )
    distances = log_t.exp() * (log_t - log_s) + log_not_t.exp() * (log_not_t - log_not_s)
    # An image without a valid pixel has no maximum: what stands for it is not counted, and `masked_fill` passes no gradient on.
    return masked_mean(distances.sum(1), valid.flatten(1).any(1))


def _presence(logits_BKHW: Tensor, valid_BHW: Tensor) -> tuple[Tensor, Tensor]:
    """Logs of the presence of each class and of its absence, (B, K)."""
    log_p, log_not_p = log_probabilities(logits_BKHW)
    outside = ~valid_BHW[:, None]
    return log_p.masked_fill(outside, -torch.inf).amax((2, 3)), log_not_p.masked_fill(outside, torch.inf).amin((2, 3))


def _mean_logits(logits_BKHW: Tensor, valid_BHW: Tensor | None) -> Tensor:
    logits = logits_BKHW.float()
    if valid_BHW is None:
        return logits.mean((2, 3))
    mask = valid_BHW[:, None]
    return torch.where(mask, logits, 0).sum((2, 3)) / mask.sum((2, 3)).clamp(min=1)
