"""Losses of single pixels: the true label, and distances between what student and teacher say of a pixel.

Each distance is averaged by one rule: the sum of `weight` * distance over valid pixels, divided by the number of valid pixels.
`weight` is (B, H, W) and not negative; `mgd_pipeline.distillation.weights` makes it, and the masks that shrink `valid`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.distillation.means import masked_mean, pixel_mean
from mgd_pipeline.distillation.weights import confidence_weight


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
    return masked_mean(per_pixel, kept)


def pixel_consistency_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    valid: Tensor | None = None,
    soft: bool = False,
    confidence: float = 0.0,
    of_all: bool = False,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean cross entropy of (B, K, H, W) student logits against the argmax of (B, K, H, W) teacher logits.

    Hard labels, no confidence threshold and no temperature, as in MGD; on labelled images void pixels count too. Not in
    MGD: `soft` compares with the teacher's probabilities instead (Hinton et al., 2015, at temperature 1), and pixels
    whose largest probability is below `confidence` are left out (FixMatch, Sohn et al., 2020); the mean is over the other
    pixels, or with `of_all` over all valid pixels, as in FixMatch, so that few confident pixels weigh little. The distance
    of a pixel is multiplied by its `weight`, (B, H, W).
    """
    teacher = teacher_logits.detach().float()
    if soft:
        target = teacher.softmax(1)
    else:
        target = teacher.max(1).indices  # argmax over a strided dimension is 5 times slower on CPUs
    per_pixel = F.cross_entropy(student_logits.float(), target, reduction="none")
    kept = torch.ones_like(per_pixel, dtype=torch.bool) if valid is None else valid
    if confidence > 0:
        confident = kept & confidence_weight(teacher, confidence)
        share = confident.sum() / kept.sum().clamp(min=1) if of_all else 1.0
        return pixel_mean(per_pixel, confident, weight) * share
    return pixel_mean(per_pixel, kept, weight)


def mean_of_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Logits whose softmax is the mean of the softmaxes of several (B, K, H, W) logits: an ensemble."""
    return torch.stack([values.float().log_softmax(1) for values in logits]).logsumexp(0) - math.log(len(logits))


def best_by_class(logits: Sequence[Tensor], scores: Sequence[Tensor]) -> Tensor:
    """Log-probabilities (B, K, H, W): at each pixel those of the teacher with the best score for the class that it names there.

    `logits` are (B, K, H, W) of each teacher, `scores` its (K,) by class, such as the IoU on labelled images. Of equal scores the
    first teacher's counts. The static case of Choi et al., "ORC: network group-based knowledge distillation using online role
    change", ICCV 2023.
    """
    said = [values.detach().float().log_softmax(1) for values in logits]
    reached = [of_classes[values.max(1, keepdim=True).indices] for values, of_classes in zip(said, scores, strict=True)]
    chosen, best = said[0], reached[0]
    for values, score in zip(said[1:], reached[1:], strict=True):
        chosen, best = torch.where(score > best, values, chosen), torch.maximum(score, best)
    return chosen


def kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """temperature^2 times the mean KL divergence from the teacher's to the student's probabilities, both at `temperature`.

    (B, K, H, W) logits (Hinton et al., "Distilling the knowledge in a neural network", 2015). 0 where both are equal.
    """
    student, teacher = student_logits.float() / temperature, teacher_logits.detach().float() / temperature
    return temperature**2 * pixel_mean(_kl(student, teacher), valid, weight)


def ttm_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, valid: Tensor | None = None, weight: Tensor | None = None, gamma: float = 0.2
) -> Tensor:
    """Mean KL divergence from the teacher's tempered probabilities, p^gamma / sum(p^gamma), to the student's plain ones.

    (B, K, H, W) logits (Zheng and Yang, "Knowledge distillation based on transformed teacher matching", ICLR 2024). 0 where the
    student's logits are gamma times the teacher's.
    """
    return pixel_mean(_kl(student_logits.float(), gamma * teacher_logits.detach().float()), valid, weight)


def cauchy_schwarz_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, valid: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Mean Cauchy-Schwarz divergence of the probabilities of (B, K, H, W) logits: -2 log of the cosine of p and q.

    As Xu et al., "Multi-task learning with knowledge distillation for dense prediction", ICCV 2023. 0 where both are equal. A
    tail of small teacher probabilities weighs less than in `kl_loss`. The gradient vanishes where student and teacher are sure
    of different classes.
    """
    student, teacher = student_logits.float().log_softmax(1), teacher_logits.detach().float().log_softmax(1)
    distances = (2 * student).logsumexp(1) + (2 * teacher).logsumexp(1) - 2 * (student + teacher).logsumexp(1)
    return pixel_mean(distances, valid, weight)


def binary_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, valid: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Binary cross entropy of each class against all other classes, times |q - p|; summed over classes, mean over pixels.

    p and q are the softmax of the student's and the teacher's (B, K, H, W) logits (Yang et al., "Bridging cross-task protocol
    inconsistency for distillation in dense object detection", ICCV 2023, where they are sigmoids). 0 where both are equal.
    """
    sure, unsure = log_probabilities(student_logits.float())
    # The student's own arithmetic, so that equal logits differ by exactly 0: |q - p| has a slope beside it.
    target = teacher_logits.detach().float().log_softmax(1).exp()
    distances = (target - sure.exp()).abs() * -(target * sure + (1 - target) * unsure)
    return pixel_mean(distances.sum(1), valid, weight)


def among_known(student_logits: Tensor, teacher_logits: Tensor, known: Sequence[int] | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What remains where a teacher knows only the class ids `known`: (B, k, H, W) float32 logits of student and teacher, and the
    student's probability that a pixel has one of these classes, (B, H, W) float32 without a gradient.

    A distance of the former, weighted by the latter, teaches how the known classes compare, and leaves a student alone that is sure
    of another class. A tensor of ids on the logits' device saves a copy in each step.
    """
    if not len(known):
        raise ValueError("a teacher that knows no class says nothing; name at least one class that it knows")
    student, classes = student_logits.float(), torch.as_tensor(known, device=student_logits.device)
    among = student[:, classes]
    return among, teacher_logits.detach().float()[:, classes], (among.logsumexp(1) - student.logsumexp(1)).exp().detach()


def known_classes_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    known: Sequence[int] | Tensor,
    *,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """`kl_loss` among the `known` classes alone, times the student's probability that the pixel has one of them.

    (B, K, H, W) logits of a teacher that knows only the class ids `known`; its other logits are not read. A student that is sure of
    another class is left alone (`among_known`). After Gu et al.,
    "Class-relation knowledge distillation for novel class discovery", ICCV 2023. 0 where the probabilities among the known
    classes are equal.
    """
    among, teacher, share = among_known(student_logits, teacher_logits, known)
    return temperature**2 * pixel_mean(share * _kl(among / temperature, teacher / temperature), valid, weight)


def log_probabilities(logits_BKHW: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log(1 - p) of each class, (B, K, H, W); log(1 - p) is exact for a class of probability near 1, too."""
    log_p = logits_BKHW.log_softmax(1)
    largest = logits_BKHW.detach().max(1, keepdim=True).indices
    # Only the largest probability can be near 1, where 1 - p is nothing but rounding: there the other classes are summed.
    others = logits_BKHW.scatter(1, largest, -torch.inf).logsumexp(1, keepdim=True) - logits_BKHW.logsumexp(1, keepdim=True)
    return log_p, torch.log1p(-log_p.scatter(1, largest, -1.0).exp()).scatter(1, largest, others)


def _kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL divergence from the teacher's to the student's probabilities, over dimension 1."""
    student, teacher = student_logits.log_softmax(1), teacher_logits.log_softmax(1)
    return (teacher.exp() * (teacher - student)).sum(1)
