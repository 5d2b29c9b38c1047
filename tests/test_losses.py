"""Losses against hand-computed values, against the official expressions, and against their invariants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.distillation import (
    Ohem,
    content_aware_loss,
    mean_of_probabilities,
    pixel_consistency_loss,
    semantic_sensitive_loss,
    supervised_loss,
)


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
    ("loss", "size", "stride"),
    [
        (pixel_consistency_loss, 28, 1),
        (semantic_sensitive_loss, 28, 1),
        *((content_aware_loss, *grid) for grid in ((28, 1), (112, 4), (96, 4))),  # boxes of the last are cut in the middle
    ],
)
def test_padded_pixels_touch_no_loss(loss: Any, size: int, stride: int) -> None:
    valid = torch.ones(2, size, size, dtype=torch.bool)
    valid[0, :, size // 3 :] = False  # most of image 0 is padding: some 7 x 7 boxes hold none of it
    cells = F.avg_pool2d(valid[:, None].float(), stride)
    student, teacher = rand(2, 4, *cells.shape[2:]), rand(2, 4, *cells.shape[2:], seed=1)
    changed = torch.where(cells > 0, student, 1e4), torch.where(cells > 0, teacher, -1e4)
    assert torch.allclose(loss(student, teacher, valid=valid), loss(*changed, valid=valid))
    assert not torch.allclose(loss(student, teacher), loss(*changed)), "without the mask the change is noticed"
    assert loss(student, teacher, valid=torch.zeros_like(valid)).item() == 0


def test_all_pad_regions_take_no_part() -> None:
    """With one image three quarters padding, the mean runs over the pairs of regions that exist."""
    student, teacher = rand(1, 4, 14, 14), rand(1, 4, 14, 14, seed=1)
    valid = torch.zeros(1, 14, 14, dtype=torch.bool)
    valid[:, :7, :7] = True
    inside = content_aware_loss(student[..., :7, :7], teacher[..., :7, :7], grid=7)
    # With grid = 14 the valid quarter is exactly 7 x 7 regions.
    assert content_aware_loss(student, teacher, valid=valid, grid=14).item() == pytest.approx(inside.item(), rel=1e-5)


@pytest.mark.parametrize("loss", [pixel_consistency_loss, semantic_sensitive_loss, content_aware_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_student_alone_in_float32(loss: Any, dtype: torch.dtype) -> None:
    student = rand(2, 4, 14, 14).to(dtype).requires_grad_()
    teacher = rand(2, 4, 14, 14, seed=1).to(dtype).requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32 and value.dim() == 0
    assert student.grad is not None and student.grad.abs().sum() > 0 and teacher.grad is None
