"""Losses against hand-computed values, against the official expressions, and against their invariants."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.distillation.losses import (
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
    labels = torch.tensor([[[1, 0, IGNORE]]])
    expected = (math.log(2) + math.log(1 + math.exp(-2))) / 2
    assert supervised_loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_supervised_loss_without_any_class_is_zero_with_a_gradient() -> None:
    logits = rand(1, 3, 4, 4).requires_grad_()
    for ohem in (None, Ohem()):
        loss = supervised_loss(logits, torch.full((1, 4, 4), IGNORE), ohem=ohem)
        loss.backward()
        assert loss.item() == 0 and logits.grad is not None and torch.equal(logits.grad, torch.zeros_like(logits))


def test_ohem_by_hand() -> None:
    # True-class probabilities 0.9, 0.8, 0.6, 0.2: threshold 0.7 keeps two; min_kept 3 keeps the 0.8 as well.
    p = torch.tensor([0.9, 0.8, 0.6, 0.2])
    logits = torch.stack([p.log(), (1 - p).log()])[None, :, None, :]
    labels = torch.zeros(1, 1, 4, dtype=torch.long)
    for min_kept, kept in ((1, p[2:]), (2, p[2:]), (3, p[1:]), (100, p)):
        loss = supervised_loss(logits, labels, ohem=Ohem(0.7, min_kept))
        assert loss.item() == pytest.approx(-kept.log().mean().item(), rel=1e-5), min_kept


def test_ohem_equals_the_official_expression() -> None:
    """ProbOhemCrossEntropy2d of the official code: threshold = max(thresh, the min_kept-th smallest probability)."""
    logits, labels = rand(2, 5, 16, 16) * 3, torch.randint(0, 5, (2, 16, 16), generator=torch.Generator().manual_seed(1))
    labels[0, :4] = IGNORE
    for min_kept in (1, 50, 300, 10_000):
        valid = labels != IGNORE
        p = logits.softmax(1).gather(1, labels.clamp(max=4)[:, None])[:, 0]
        p_valid = p[valid]
        threshold = max(0.7, p_valid.sort().values[min(len(p_valid), min_kept) - 1].item())
        expected = -p[valid & (p <= threshold + 1e-7)].log().mean()
        assert supervised_loss(logits, labels, ohem=Ohem(0.7, min_kept)).item() == pytest.approx(expected.item(), rel=1e-4)


def test_pixel_loss_is_cross_entropy_against_the_argmax() -> None:
    student, teacher = rand(2, 4, 6, 5), rand(2, 4, 6, 5, seed=1)
    assert torch.allclose(pixel_consistency_loss(student, teacher), F.cross_entropy(student, teacher.argmax(1)))
    assert torch.allclose(pixel_consistency_loss(student, teacher * 100), pixel_consistency_loss(student, teacher))


def test_semantic_loss_by_hand() -> None:
    student = torch.zeros(2, 3, 2, 2)
    teacher = torch.zeros(2, 3, 2, 2)
    teacher[0, 0] = 1.0  # image 0: class 0 differs by 1, class 2 by |-2|; image 1: nothing
    teacher[0, 2] = -2.0
    assert semantic_sensitive_loss(student, teacher).item() == pytest.approx((1 + 2) / 2)


def test_semantic_loss_relates_to_the_official_sum() -> None:
    """Official: sum over batch (2 images a GPU) and classes; ours is its half there, so weights double."""
    student, teacher = rand(2, 4, 6, 5), rand(2, 4, 6, 5, seed=1)
    official = (F.adaptive_avg_pool2d(student, 1) - F.adaptive_avg_pool2d(teacher, 1)).abs().sum()
    assert torch.allclose(semantic_sensitive_loss(student, teacher) * 2, official)


def official_region_loss(student: torch.Tensor, teacher: torch.Tensor, grid: int) -> torch.Tensor:
    """The expression of the official code, where `grid` divides the size: pool, normalise, Gram, mean squared error."""
    matrices = []
    for features in (student, teacher):
        pooled = F.adaptive_avg_pool2d(features, grid).flatten(2)
        pooled = pooled / pooled.norm(dim=1, keepdim=True)
        matrices.append(pooled.transpose(1, 2) @ pooled)
    return F.mse_loss(*matrices)


def test_region_loss_equals_the_official_expression_where_boxes_fit() -> None:
    student, teacher = rand(2, 6, 14, 21), rand(2, 9, 28, 14, seed=1)
    assert torch.allclose(content_aware_loss(student, teacher), official_region_loss(student, teacher, 7), atol=1e-6)


def test_region_loss_by_hand() -> None:
    # Two regions; the student sees them as equal (cosine 1), the teacher as orthogonal (cosine 0): 2 of 4 entries differ by 1.
    student, teacher = torch.ones(1, 2, 2, 1), torch.zeros(1, 2, 2, 1)
    teacher[0, 0, 0], teacher[0, 1, 1] = 1.0, 3.0
    wide = student.repeat(1, 1, 1, 2), teacher.repeat(1, 1, 1, 2)
    # grid = 2: four boxes, pairs (top, bottom) x (left, right); 8 of 16 pairs join a top and a bottom box.
    assert content_aware_loss(*wide, grid=2).item() == pytest.approx(8 / 16)


def test_equal_features_have_zero_region_loss_and_permuted_regions_do_not() -> None:
    features = rand(2, 8, 21, 21)
    assert content_aware_loss(features, features.clone()).item() == pytest.approx(0, abs=1e-10)
    permuted = torch.roll(features, 9, dims=3)
    assert content_aware_loss(features, permuted).item() > 0.01
    # A cosine ignores the scale of each side, and channels may be rotated: only similarities count.
    rotation = torch.linalg.qr(rand(8, 8)).Q
    assert content_aware_loss(features, torch.einsum("ij,bjhw->bihw", rotation, features * 5)).item() < 1e-9


def test_all_zero_regions_do_not_make_nan() -> None:
    student = torch.zeros(1, 4, 14, 14, requires_grad=True)
    loss = content_aware_loss(student, rand(1, 4, 14, 14))
    loss.backward()
    assert torch.isfinite(loss) and student.grad is not None and torch.isfinite(student.grad).all()


def padded(height: int, width: int) -> torch.Tensor:
    valid = torch.ones(2, height, width, dtype=torch.bool)
    valid[0, :, width // 3 :] = False  # most of image 0 is padding: some 7x7 boxes hold none of it
    return valid


def test_an_ensemble_speaks_the_mean_of_probabilities() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 5, 3, 4) * 4, torch.randn(2, 5, 3, 4)
    together = mean_of_probabilities([first, second + 7])  # a constant added to logits says nothing
    assert torch.allclose(together.softmax(1), (first.softmax(1) + second.softmax(1)) / 2, atol=1e-6)
    assert not torch.equal(together.argmax(1), ((first + second) / 2).argmax(1)), "not the mean of the logits"
    assert torch.allclose(mean_of_probabilities([first]).softmax(1), first.softmax(1), atol=1e-6)


def test_soft_labels_and_confidence_by_hand() -> None:
    student = torch.tensor([[[[0.0, 1.0]], [[0.0, -1.0]]]])  # one row of two pixels, two classes
    teacher = torch.tensor([[[[math.log(3.0), math.log(9.0)]], [[0.0, 0.0]]]])  # probabilities 3/4 and 9/10 of the first
    first, second = math.log(2.0), math.log(1 + math.exp(-2.0))
    assert pixel_consistency_loss(student, teacher).item() == pytest.approx((first + second) / 2, rel=1e-5)
    soft = (first + second + 2 * 0.1) / 2  # cross entropy = -log p1 + 0.1 * (logit difference of the second pixel)
    assert pixel_consistency_loss(student, teacher, soft=True).item() == pytest.approx(soft, rel=1e-5)
    assert pixel_consistency_loss(student, teacher, confidence=0.8).item() == pytest.approx(second, rel=1e-5)
    assert pixel_consistency_loss(student, teacher, confidence=0.95).item() == 0
    valid = torch.tensor([[[True, False]]])
    assert pixel_consistency_loss(student, teacher, confidence=0.8, valid=valid).item() == 0
    assert pixel_consistency_loss(student, teacher, confidence=0.7, valid=valid).item() == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("loss", [pixel_consistency_loss, semantic_sensitive_loss])
def test_padded_pixels_touch_no_logit_loss(loss) -> None:
    student, teacher, valid = rand(2, 4, 28, 28), rand(2, 4, 28, 28, seed=1), padded(28, 28)
    garbage = torch.where(valid[:, None], student, 1e4), torch.where(valid[:, None], teacher, -1e4)
    assert torch.equal(loss(student, teacher, valid=valid), loss(*garbage, valid=valid))
    assert not torch.allclose(loss(student, teacher), loss(*garbage))  # without the mask the change is noticed
    assert loss(student, teacher, valid=torch.zeros_like(valid)).item() == 0


def test_padded_pixels_touch_no_region() -> None:
    """On grids at the pixels' own size, at stride 4, and where a box is cut in the middle."""
    for size, stride in ((28, 1), (112, 4), (96, 4)):
        valid = padded(size, size)
        cells = F.avg_pool2d(valid[:, None].float(), stride)
        student, teacher = rand(2, 4, size // stride, size // stride), rand(2, 6, size // stride, size // stride, seed=1)
        changed = torch.where(cells > 0, student, 1e4), torch.where(cells > 0, teacher, -1e4)
        assert torch.allclose(content_aware_loss(student, teacher, valid=valid), content_aware_loss(*changed, valid=valid))
        assert not torch.allclose(content_aware_loss(student, teacher), content_aware_loss(*changed))


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
def test_gradients_reach_the_student_alone_in_float32(loss, dtype) -> None:
    student = rand(2, 4, 14, 14).to(dtype).requires_grad_()
    teacher = rand(2, 4, 14, 14, seed=1).to(dtype).requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32 and value.dim() == 0
    assert student.grad is not None and student.grad.abs().sum() > 0 and teacher.grad is None


def test_region_gradient_is_right() -> None:
    student, teacher = rand(1, 3, 5, 6), rand(1, 2, 5, 6, seed=1)
    valid = torch.ones(1, 20, 24, dtype=torch.bool)
    valid[:, 13:] = False
    # Finite differences on a few entries; the loss computes in float32, hence the coarse step and tolerance.
    student.requires_grad_()
    content_aware_loss(student, teacher, valid=valid, grid=3).backward()
    assert student.grad is not None
    for index in [(0, 0, 0, 0), (0, 1, 2, 3), (0, 2, 1, 5)]:
        step = torch.zeros_like(student)
        step[index] = 0.01
        with torch.no_grad():
            up, down = (content_aware_loss(student + s, teacher, valid=valid, grid=3) for s in (step, -step))
        assert student.grad[index].item() == pytest.approx((up - down).item() / 0.02, abs=2e-4)
