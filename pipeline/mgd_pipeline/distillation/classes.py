"""Losses of classes: where in the pixels of a view a class is likely, however few its pixels are."""

from __future__ import annotations

import torch
from torch import Tensor

from mgd_pipeline.distillation.means import masked_mean

_VARIANCE = 1e-8
"""Probabilities of a smaller variance are constant up to rounding, and have no correlation."""


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """DIST: 1 - correlation of student's and teacher's probabilities, over the classes of a pixel and over the pixels of a class.

    (B, K, H, W) logits (Huang et al., "Knowledge distillation from a stronger teacher", NeurIPS 2022, both weights and the
    temperature 1): the mean over valid pixels of 1 - correlation of the K probabilities, plus the mean over classes of
    1 - correlation of the probabilities of all valid pixels of the batch. Pixels and classes whose probabilities are constant on
    one side (variance below 1e-8) have no correlation and do not count. 0 where both are equal.
    """
    student, teacher = student_logits.float().softmax(1), teacher_logits.detach().float().softmax(1)
    if valid is None:
        valid = torch.ones_like(student[:, 0], dtype=torch.bool)
    pixels = valid[:, None]
    per_pixel, varies = _correlation(student, teacher, torch.ones_like(pixels), (1,))
    per_class, classes_vary = _correlation(student, teacher, pixels, (0, 2, 3))
    return masked_mean(1 - per_pixel, varies & pixels) + masked_mean(1 - per_class, classes_vary)


def channel_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, valid: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """temperature^2 times the KL divergence of where a class is: softmax over the valid pixels of an image, class by class.

    From the teacher's to the student's (B, K, H, W) logits, mean over images and classes (Shu et al., "Channel-wise knowledge
    distillation for dense prediction", ICCV 2021). A class counts the same however few pixels it has. The mean level of a class's
    logits does not count, so keep a pixel term beside it. Images without a valid pixel do not count. 0 where both are equal.
    """
    if valid is None:
        valid = torch.ones_like(student_logits[:, 0], dtype=torch.bool)
    pixels = valid.flatten(1)[:, None]
    log_s, log_t = (
        (logits.float().flatten(2) / temperature).masked_fill(~pixels, -torch.inf).log_softmax(2)
        for logits in (student_logits, teacher_logits.detach())
    )
    distances = (log_t.exp() * torch.where(pixels, log_t - log_s, 0)).sum(2)
    # An image without a valid pixel has no softmax: its NaN is not counted, and `masked_fill` passes no gradient on.
    return temperature**2 * masked_mean(distances.mean(1), pixels.any(2)[:, 0])


def _correlation(first: Tensor, second: Tensor, mask: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Pearson correlation over `dims` where `mask` is True, dimensions kept; and bool: False where one side is constant."""
    count = mask.expand_as(first).sum(dims, keepdim=True).clamp(min=1)
    centred = [
        torch.where(mask, values - torch.where(mask, values, 0).sum(dims, keepdim=True) / count, 0) for values in (first, second)
    ]
    variances = [values.square().sum(dims, keepdim=True) / count for values in centred]
    varies = (variances[0] >= _VARIANCE) & (variances[1] >= _VARIANCE)
    # The root of 0 has no gradient: constant values are replaced before it, and not counted after it.
    norms = [torch.where(varies, variance, 1).sqrt() for variance in variances]
    covariance = (centred[0] * centred[1]).sum(dims, keepdim=True) / count
    return covariance / (norms[0] * norms[1]), varies
