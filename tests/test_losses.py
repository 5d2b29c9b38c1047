"""Losses against hand-computed values, against the official expressions, and against their invariants."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.distillation import (
    Ohem,
    binary_loss,
    cauchy_schwarz_loss,
    channel_loss,
    content_aware_loss,
    dist_loss,
    feature_loss,
    kl_loss,
    known_classes_kl,
    mean_log_probability_loss,
    mean_of_probabilities,
    pixel_consistency_loss,
    presence_loss,
    region_kl_loss,
    semantic_sensitive_loss,
    supervised_loss,
    ttm_loss,
)
from mgd_pipeline.distillation.pixel import log_probabilities

PIXELS: dict[str, Callable[..., torch.Tensor]] = {
    "pixel_consistency": pixel_consistency_loss,
    "soft": partial(pixel_consistency_loss, soft=True),
    "confident": partial(pixel_consistency_loss, confidence=0.4),
    "kl": kl_loss,
    "kl at 4": partial(kl_loss, temperature=4.0),
    "ttm": ttm_loss,
    "cauchy_schwarz": cauchy_schwarz_loss,
    "binary": binary_loss,
    "known_classes": partial(known_classes_kl, known=[0, 2]),
}
"""Distances of single pixels, which take a weight."""
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    **PIXELS,
    "dist": dist_loss,
    "channel": channel_loss,
    "channel at 4": partial(channel_loss, temperature=4.0),
    "semantic_sensitive": semantic_sensitive_loss,
    "mean_log_probability": partial(mean_log_probability_loss, floor=3.0),
    "presence": presence_loss,
    "content_aware": content_aware_loss,
    "region_kl": region_kl_loss,
    "feature": partial(feature_loss, mean=torch.tensor([0.0, 1, 2, 3]), std=torch.tensor([1.0, 2, 3, 4])),
}
"""Every loss of student and teacher, for tensors of four channels."""


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_supervised_loss_by_hand() -> None:
    # Two pixels of two classes: p = 1/2 and p = e^2 / (e^2 + 1); a third one is void.
    logits = torch.tensor([[[[0.0, 2.0, 9.0]], [[0.0, 0.0, -9.0]]]])
    expected = (math.log(2) + math.log(1 + math.exp(-2))) / 2
    assert supervised_loss(logits, torch.tensor([[[1, 0, IGNORE]]])).item() == pytest.approx(expected, rel=1e-6)


def test_supervised_loss_without_any_class_is_zero_with_a_gradient() -> None:
    logits = rand(1, 3, 4, 4).requires_grad_()
    for ohem in (None, Ohem()):
        loss = supervised_loss(logits, torch.full((1, 4, 4), IGNORE), ohem=ohem)
        loss.backward()
        assert loss.item() == 0 and logits.grad is not None and torch.equal(logits.grad, torch.zeros_like(logits))


def test_ohem_by_hand() -> None:
    # True-class probabilities 0.9, 0.8, 0.6, 0.2 and a void pixel: threshold 0.7 keeps two; min_kept 3 keeps the 0.8 as well.
    p = torch.tensor([0.9, 0.8, 0.6, 0.2])
    logits = torch.stack([torch.cat([p, p[3:]]).log(), torch.cat([1 - p, 1 - p[3:]]).log()])[None, :, None, :]
    for min_kept, kept in ((1, p[2:]), (2, p[2:]), (3, p[1:]), (100, p)):
        loss = supervised_loss(logits, torch.tensor([[[0, 0, 0, 0, IGNORE]]]), ohem=Ohem(0.7, min_kept))
        assert loss.item() == pytest.approx(-kept.log().mean().item(), rel=1e-5), min_kept


def test_soft_labels_and_confidence_by_hand() -> None:
    student = torch.tensor([[[[0.0, 1.0]], [[0.0, -1.0]]]])  # one row of two pixels, two classes
    teacher = torch.tensor([[[[math.log(3.0), math.log(9.0)]], [[0.0, 0.0]]]])  # probabilities 3/4 and 9/10 of the first
    first, second = math.log(2.0), math.log(1 + math.exp(-2.0))
    options: dict[str, Any]
    for options, expected in (
        ({}, (first + second) / 2),
        ({"soft": True}, (first + second + 2 * 0.1) / 2),  # -log p1 + 0.1 * (logit difference of the second pixel)
        ({"confidence": 0.8}, second),
        ({"confidence": 0.95}, 0),
        ({"confidence": 0.8, "valid": torch.tensor([[[True, False]]])}, 0),
        ({"confidence": 0.7, "valid": torch.tensor([[[True, False]]])}, first),
        ({"weight": torch.tensor([[[0.5, 3.0]]])}, (0.5 * first + 3 * second) / 2),
        ({"confidence": 0.8, "weight": torch.tensor([[[0.5, 3.0]]])}, 3 * second),
        ({"confidence": 0.8, "of_all": True, "weight": torch.tensor([[[0.5, 3.0]]])}, 3 * second / 2),
    ):
        assert pixel_consistency_loss(student, teacher, **options).item() == pytest.approx(expected, rel=1e-5), options


def test_an_ensemble_speaks_the_mean_of_probabilities() -> None:
    first, second = rand(2, 5, 3, 4) * 4, rand(2, 5, 3, 4, seed=1)
    together = mean_of_probabilities([first, second + 7])  # a constant added to logits says nothing
    assert torch.allclose(together.softmax(1), (first.softmax(1) + second.softmax(1)) / 2, atol=1e-6)
    assert not torch.equal(together.argmax(1), ((first + second) / 2).argmax(1)), "not the mean of the logits"


def test_semantic_loss_by_hand_and_by_the_official_sum() -> None:
    student, teacher = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    teacher[0, 0], teacher[0, 2] = 1.0, -2.0  # image 0: class 0 differs by 1, class 2 by |-2|; image 1: nothing
    assert semantic_sensitive_loss(student, teacher).item() == pytest.approx((1 + 2) / 2)
    # --- officially the sum over the 2 images of a GPU and over classes; ours is its half, so weights double
    student, teacher = rand(2, 4, 6, 5), rand(2, 4, 6, 5, seed=1)
    official = (F.adaptive_avg_pool2d(student, 1) - F.adaptive_avg_pool2d(teacher, 1)).abs().sum()
    assert torch.allclose(semantic_sensitive_loss(student, teacher) * 2, official)


def test_region_loss_equals_the_official_expression_where_boxes_fit() -> None:
    """Pool, normalise, Gram, mean squared error."""
    student, teacher = rand(2, 6, 14, 21), rand(2, 9, 28, 14, seed=1)
    pooled = [F.normalize(F.adaptive_avg_pool2d(features, 7).flatten(2), dim=1) for features in (student, teacher)]
    ours, theirs = (regions.transpose(1, 2) @ regions for regions in pooled)
    official = F.mse_loss(ours, theirs)
    assert torch.allclose(content_aware_loss(student, teacher), official, atol=1e-6)


def test_region_loss_by_hand() -> None:
    # The student sees the upper and the lower row as equal (cosine 1), the teacher as orthogonal (cosine 0).
    student, teacher = torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    teacher[0, 0, 0], teacher[0, 1, 1] = 1.0, 3.0
    # Four boxes: 8 of 16 pairs join an upper and a lower box, and differ by 1.
    assert content_aware_loss(student, teacher, grid=2).item() == pytest.approx(8 / 16)


def test_equal_features_have_zero_region_loss_and_permuted_regions_do_not() -> None:
    features, rotation = rand(2, 8, 21, 21), torch.linalg.qr(rand(8, 8)).Q
    assert content_aware_loss(features, features.clone()).item() == pytest.approx(0, abs=1e-10)
    assert content_aware_loss(features, torch.roll(features, 9, dims=3)).item() > 0.01
    # A cosine ignores the scale of each side, and channels may be rotated: only similarities count.
    assert content_aware_loss(features, torch.einsum("ij,bjhw->bihw", rotation, features * 5)).item() < 1e-9


def test_all_zero_regions_do_not_make_nan() -> None:
    student = torch.zeros(1, 4, 14, 14, requires_grad=True)
    loss = content_aware_loss(student, rand(1, 4, 14, 14))
    loss.backward()
    assert torch.isfinite(loss) and student.grad is not None and torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("name", "size", "stride"),
    [
        *((name, 28, 1) for name in LOSSES),
        *((name, *cut) for name in ("content_aware", "region_kl", "feature") for cut in ((112, 4), (96, 4))),  # 96: cut boxes
    ],
)
def test_padded_pixels_touch_no_loss(name: str, size: int, stride: int) -> None:
    loss = LOSSES[name]
    valid = torch.ones(3, size, size, dtype=torch.bool)
    valid[0, :, size // 3 :], valid[1] = False, False  # most of image 0 and all of image 1 is padding
    cells = F.avg_pool2d(valid[:, None].float(), stride)
    student, teacher = rand(3, 4, *cells.shape[2:]), rand(3, 4, *cells.shape[2:], seed=1)
    loud = torch.tensor([1e4, -1e4, 5e3, 0])[:, None, None]
    changed = torch.where(cells > 0, student, loud).requires_grad_(), torch.where(cells > 0, teacher, -loud)
    value = loss(*changed, valid=valid)
    assert torch.allclose(loss(student, teacher, valid=valid), value)
    (gradient,) = torch.autograd.grad(value, changed[0])
    assert gradient.isfinite().all() and not torch.where(cells > 0, 0, gradient).any() and gradient.any()
    assert not torch.allclose(loss(student, teacher), loss(*changed)), "without the mask the change is noticed"


@pytest.mark.parametrize("name", LOSSES)
def test_views_without_a_valid_pixel_give_zero(name: str) -> None:
    student, teacher = rand(2, 4, 14, 14).requires_grad_(), rand(2, 4, 14, 14, seed=1)
    value = LOSSES[name](student, teacher, valid=torch.zeros(2, 14, 14, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(value, student)
    assert value.item() == 0 and torch.equal(gradient, torch.zeros_like(student))


@pytest.mark.parametrize("name", PIXELS)
def test_a_weight_multiplies_every_distance_of_a_pixel(name: str) -> None:
    """And passes no gradient on; its pixels stay in the mean even where it is 0."""
    loss, student, teacher = PIXELS[name], rand(1, 4, 6, 6), rand(1, 4, 6, 6, seed=1) * 3
    weight = rand(1, 6, 6, seed=2).abs().requires_grad_()
    halves = (torch.arange(6) < 3).expand(1, 6, 6)
    assert torch.allclose(loss(student, teacher, weight=3 * torch.ones(1, 6, 6)), 3 * loss(student, teacher))
    each = [loss(student, teacher, weight=weight * half) for half in (halves, ~halves)]
    assert torch.allclose(each[0] + each[1], loss(student, teacher, weight=weight)) and all(part > 0 for part in each)
    assert not each[0].requires_grad


MINIMUM = {
    "ttm": lambda teacher: 0.2 * teacher,
    "feature": lambda teacher: (teacher - torch.arange(4.0)[:, None, None]) / torch.arange(1.0, 5)[:, None, None],
}
"""The student that has nothing left to learn, where it is not the teacher's copy."""


@pytest.mark.parametrize(
    "name", [name for name, loss in LOSSES.items() if getattr(loss, "func", loss) is not pixel_consistency_loss]
)
def test_a_student_that_says_the_same_has_nothing_to_learn(name: str) -> None:
    loss, teacher = LOSSES[name], rand(2, 4, 14, 14, seed=1) * 3
    student = MINIMUM.get(name, torch.clone)(teacher).requires_grad_()
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.item() == pytest.approx(0, abs=1e-6) and gradient.norm() < 1e-5
    assert loss(rand(2, 4, 14, 14), teacher) > 0.01


@pytest.mark.parametrize("loss", [content_aware_loss, region_kl_loss])
def test_all_pad_regions_take_no_part(loss: Callable[..., torch.Tensor]) -> None:
    """With one image three quarters padding, the mean runs over the pairs of regions that exist."""
    student, teacher = rand(1, 4, 14, 14), rand(1, 4, 14, 14, seed=1)
    valid = torch.zeros(1, 14, 14, dtype=torch.bool)
    valid[:, :7, :7] = True
    inside = loss(student[..., :7, :7], teacher[..., :7, :7], grid=7)
    # With grid = 14 the valid quarter is exactly 7 x 7 regions.
    assert loss(student, teacher, valid=valid, grid=14).item() == pytest.approx(inside.item(), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_student_alone_in_float32(name: str, dtype: torch.dtype) -> None:
    loss, student, teacher = LOSSES[name], rand(2, 4, 14, 14), rand(2, 4, 14, 14, seed=1)
    given = student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()
    value = loss(*given)
    value.backward()
    assert value.dtype == torch.float32 and value.dim() == 0
    assert given[0].grad is not None and given[0].grad.abs().sum() > 0 and given[1].grad is None
    assert torch.equal(value, loss(*(tensor.float() for tensor in given))), "not all of it is float32"
    assert torch.allclose(value, loss(student, teacher), rtol=0.05)


@pytest.mark.parametrize("name", LOSSES)
def test_sure_logits_make_no_nan(name: str) -> None:
    """Probabilities of exactly 0 and 1 on both sides, as networks in bfloat16 give them."""
    student, teacher = (rand(2, 4, 14, 14) * 1e4).requires_grad_(), rand(2, 4, 14, 14, seed=1) * 1e4
    value = LOSSES[name](student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite() and gradient.isfinite().all()


def row(*pixels: tuple[float, ...]) -> torch.Tensor:
    """Logits (1, K, 1, W) of pixels whose probabilities are given."""
    return torch.tensor(pixels).log().T[None, :, None]


EVEN, ODD = (0.5, 0.5), (0.75, 0.25)
KL = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
"""From ODD to EVEN."""
FIRST = torch.tensor([[[True, False]]])


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "options", "expected"),
    [
        (kl_loss, row(EVEN, ODD), row(ODD, ODD), {}, KL / 2),
        (kl_loss, row(EVEN, ODD), row(ODD, ODD) + 7, {"valid": FIRST}, KL),
        (kl_loss, row(EVEN, EVEN), row((0.9, 0.1), EVEN), {"temperature": 2.0}, 4 * KL / 2),  # 9 to 1 is 3 to 1 at 2
        (ttm_loss, row(EVEN, ODD), row((0.9, 0.1), (0.9, 0.1)), {"gamma": 0.5}, KL / 2),
        (cauchy_schwarz_loss, row(EVEN, ODD), row(ODD, ODD), {}, -math.log(0.5**2 / (0.5 * 0.625)) / 2),
        (binary_loss, row(EVEN, ODD), row(ODD, ODD), {}, 2 * 0.25 * math.log(2) / 2),
        # Half of the student's probability lies on the known classes, and the third logit of the teacher is not read.
        (known_classes_kl, row((0.25, 0.25, 0.5)), row((0.03, 0.01, 0.96)), {"known": [0, 1]}, 0.5 * KL),
        # Over two classes correlations are 1 and -1: 0 and 2 by pixel, twice 2 by class.
        (dist_loss, row((0.8, 0.2), (0.2, 0.8)), row((0.6, 0.4), (0.7, 0.3)), {}, (0 + 2) / 2 + 2),
        # Class 0 lies to 3/4 on the first pixel, or half on each; class 1 is where it should be.
        (channel_loss, row((1, 1), (1, 1)), row((3, 1), (1, 1)), {}, KL / 2),
        (channel_loss, row((1, 1), (1, 1)), row((9, 1), (1, 1)), {"temperature": 2.0}, 4 * KL / 2),
        (
            channel_loss,
            row((1, 1), (1, 1), (5, 1)),
            row((3, 1), (1, 1), (1, 5)),
            {"valid": torch.tensor([[[True, True, False]]])},
            KL / 2,
        ),
        # Of two pixels the student says 1/2 and 1/2, the teacher 3/4 and 1/10, which counts as 1/8.
        (
            mean_log_probability_loss,
            row(EVEN, EVEN),
            row(ODD, (0.1, 0.9)),
            {"floor": math.log(8)},
            abs(math.log(1.5) - math.log(4)) / 2 + abs(math.log(0.5) + math.log(1.8)) / 2,
        ),
        # Presences 3/4 and 9/10 against 1/2; of the first pixel alone 3/4 and 1/4.
        (presence_loss, row(EVEN, EVEN), row(ODD, (0.1, 0.9)), {}, KL + 0.9 * math.log(1.8) + 0.1 * math.log(0.2)),
        (presence_loss, row(EVEN, EVEN), row(ODD, (0.1, 0.9)), {"valid": FIRST}, 2 * KL),
    ],
)
def test_losses_of_probabilities_by_hand(
    loss: Callable[..., torch.Tensor], student: torch.Tensor, teacher: torch.Tensor, options: dict[str, Any], expected: float
) -> None:
    assert loss(student, teacher, **options).item() == pytest.approx(expected, rel=1e-5)


def test_row_softmax_of_regions_by_hand() -> None:
    # Two upper and two lower boxes: all alike to the student, upper and lower orthogonal to the teacher.
    student, teacher = torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    teacher[0, 0, 0], teacher[0, 1, 1] = 1.0, 3.0
    # Each row is (3, 3, 1, 1) / 8 at this temperature, and the student's (2, 2, 2, 2) / 8.
    assert region_kl_loss(student, teacher, grid=2, temperature=1 / math.log(3)).item() == pytest.approx(KL, rel=1e-5)


def test_feature_loss_by_hand() -> None:
    teacher = torch.tensor([[[[3.0, 5.0]], [[-1.0, 1.0]]]])
    mean, std = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 1.0])  # the target is 1, 2 and 0, 2
    loss = partial(feature_loss, torch.zeros(1, 2, 1, 2), teacher, mean, std)
    assert loss().item() == pytest.approx((1 + 4 + 0 + 4) / 4)
    half = torch.tensor([[[True, True, True, False]]])  # half of the second cell
    assert loss(valid=half).item() == pytest.approx((0.5 + 0.5 * 4) / 1.5)
    # A dead channel has no scale: its target is 0.
    assert feature_loss(torch.ones(1, 2, 1, 2), teacher * 0, torch.zeros(2), torch.zeros(2)).item() == 1
    with pytest.raises(ValueError, match=r"\(1, 2, 1, 1\) and teacher features \(1, 2, 1, 2\) differ in shape"):
        feature_loss(torch.zeros(1, 2, 1, 1), teacher, mean, std)


def test_constant_classes_have_no_correlation() -> None:
    """A class that nobody predicts, and one that the student alone never predicts: numpy's mean over the other classes."""
    student, teacher = rand(1, 5, 4, 4), rand(1, 5, 4, 4, seed=1)
    student[:, 3:], teacher[:, 4] = -200, -200
    student.requires_grad_()
    loss = dist_loss(student, teacher)
    p, q = (logits.detach().double().softmax(1)[0].flatten(1).numpy() for logits in (student, teacher))
    by_pixel = [np.corrcoef(p[:, i], q[:, i])[0, 1] for i in range(16)]
    by_class = [np.corrcoef(p[k], q[k])[0, 1] for k in range(3)]
    assert loss.item() == pytest.approx(2 - np.mean(by_pixel) - np.mean(by_class), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()


def test_classes_are_correlated_over_all_pixels_of_the_batch() -> None:
    student, teacher = rand(3, 4, 2, 5), rand(3, 4, 2, 5, seed=1)
    one = [torch.cat(list(logits), 2)[None] for logits in (student, teacher)]  # the three images side by side
    assert torch.allclose(dist_loss(student, teacher), dist_loss(*one))


def test_a_student_sure_of_another_class_is_left_alone() -> None:
    student = torch.tensor([0.0, 1.0, 40.0])[None, :, None, None].requires_grad_()  # the teacher does not know the third class
    loss = known_classes_kl(student, torch.tensor([5.0, 0.0, 0.0])[None, :, None, None], [0, 1])
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() < 1e-10 and gradient.abs().max() < 1e-10
    student = rand(1, 3, 4, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(known_classes_kl(student, rand(1, 3, 4, 4, seed=1), [0, 1]), student)
    assert gradient[:, :2].any() and not gradient[:, 2].any(), "how much is said of the known classes is not learnt"
    with pytest.raises(ValueError, match="at least one class"):
        known_classes_kl(student, student, [])


def test_log_probabilities_are_exact_near_one() -> None:
    logits = torch.tensor([30.0, 1.0, 0.0, -90.0])[None, :, None, None]
    log_p, log_not_p = log_probabilities(logits)
    p = logits.double().softmax(1)
    rest = torch.stack([torch.cat([p[:, :k], p[:, k + 1 :]], 1).sum(1) for k in range(4)], 1)  # 1 - p, without cancellation
    assert torch.allclose(log_p.double(), p.log(), rtol=1e-5)
    assert torch.allclose(log_not_p.double(), rest.log(), rtol=1e-5, atol=1e-12)
