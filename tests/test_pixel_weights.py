"""Masks and weights of pixels: hand-computed values, a mean of 1, and no word from padding."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.ndimage import grey_dilation, grey_erosion

from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.distillation import (
    agreement_weight,
    class_prototypes,
    class_weight,
    confidence_weight,
    correct_weight,
    edge_weight,
    margin_weight,
    mean_one,
)
from mgd_pipeline.errors import DataError
from test_losses import EVEN, KL, ODD, rand, row

Weight = Callable[..., torch.Tensor]
WEIGHTS: dict[str, Weight] = {
    "agreement": lambda logits, valid=None: agreement_weight(logits, rand(*logits.shape, seed=5), valid=valid),
    "agreed": lambda logits, valid=None: agreement_weight(rand(*logits.shape, seed=5), logits, valid=valid),
    "edges": lambda logits, valid=None: edge_weight(logits.argmax(1) // 3, strength=2.0, radius=1, valid=valid),
    "balance": lambda logits, valid=None: class_weight(logits.argmax(1), torch.tensor([8.0, 4, 2, 1]), valid=valid),
    "margin": lambda logits, valid=None: margin_weight(logits, rand(3, 4, seed=5), (12, 12), valid=valid),
    "margin of coarse cells": lambda logits, valid=None: margin_weight(
        logits[..., ::4, ::4], rand(3, 4, seed=5), (12, 12), valid=valid
    ),
}
"""Weights (B, 12, 12) from a teacher's (B, 4, 12, 12)."""


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_the_mean_one_and_hear_nothing_from_padding(name: str, dtype: torch.dtype) -> None:
    weight, valid = WEIGHTS[name], torch.ones(2, 12, 12, dtype=torch.bool)
    valid[0, :, 4:] = False
    logits = rand(2, 4, 12, 12).to(dtype).requires_grad_()
    changed = torch.where(valid[:, None], logits, torch.tensor([9.0, -9, 9, -9], dtype=dtype)[:, None, None])
    for mask in (valid, None):
        values = weight(logits, valid=mask)
        kept = values[valid if mask is not None else torch.ones_like(valid)]
        assert values.dtype == torch.float32 and values.shape == valid.shape and not values.requires_grad
        assert torch.equal(values, weight(logits.float(), valid=mask)), "not all of it is float32"
        assert kept.mean().item() == pytest.approx(1, rel=1e-5) and kept.min() >= 0 and kept.std() > 0.1
        if mask is not None:
            assert torch.equal(values, weight(changed, valid=mask)) and not values[~valid].any()
        else:
            assert not torch.equal(values, weight(changed)), "without the mask the change is noticed"
    assert not weight(logits, valid=torch.zeros_like(valid)).any()


def test_agreement_by_hand() -> None:
    weight = agreement_weight(row(EVEN, ODD) + 3, row(EVEN, EVEN))[0, 0]
    assert (weight[1] / weight[0]).item() == pytest.approx(math.exp(-KL), rel=1e-5) and weight.sum().item() == pytest.approx(2)


def test_masks_by_hand() -> None:
    teacher = row((0.6, 0.4), (0.2, 0.8), (0.5001, 0.4999))
    assert confidence_weight(teacher, 0.7).tolist() == [[[False, True, False]]]
    assert confidence_weight(teacher, 0.0).all()
    assert correct_weight(teacher, torch.tensor([[[0, 0, IGNORE]]])).tolist() == [[[True, False, False]]]


def test_balance_by_hand() -> None:
    """Shares of 16, 4 and 1 and a class without a share, which counts as the rarest one."""
    labels, pixels = torch.tensor([[[0, 0, 1, 2, 3]]]), torch.tensor([160.0, 40, 10, 0])
    for strength, weights in ((0.5, [1, 1, 2, 4, 4]), (1.0, [1, 1, 4, 16, 16])):
        expected = torch.tensor(weights) / (sum(weights) / 5)
        assert torch.allclose(class_weight(labels, pixels, strength=strength)[0, 0], expected)
    valid = labels < 3
    expected = torch.tensor([0.5, 0.5, 1, 2, 0])
    assert torch.allclose(class_weight(labels, pixels, valid=valid)[0, 0], expected)


def test_edges_by_hand() -> None:
    labels = torch.tensor([[[0, 0, 0, 1, 1, IGNORE, IGNORE, IGNORE, 2, 2]]])
    near = edge_weight(labels, strength=3.0, radius=1)[0, 0]
    assert torch.allclose(near, torch.tensor([1.0, 1, 4, 4, 1, 1, 1, 1, 1, 1]) / 1.6), "a void strip is no boundary"
    valid = torch.ones_like(labels, dtype=torch.bool)
    valid[..., 3:] = False
    assert torch.equal(edge_weight(labels, strength=3.0, radius=1, valid=valid)[0, 0], valid[0, 0].float()), (
        "padding is no boundary"
    )


@pytest.mark.parametrize("radius", [1, 3])
def test_edges_are_dilation_minus_erosion_of_any_class(radius: int) -> None:
    labels = np.kron(np.random.default_rng(0).integers(4, size=(4, 5)), np.ones((7, 9), np.int64))
    near = np.zeros(labels.shape, bool)
    for number in range(4):
        mask, size = labels == number, (2 * radius + 1,) * 2
        near |= grey_dilation(mask, size, mode="nearest") > grey_erosion(mask, size, mode="nearest")
    assert 0.1 < near.mean() < 0.9
    weight = edge_weight(torch.from_numpy(labels)[None], strength=2.0, radius=radius)[0].numpy()
    assert np.allclose(weight, (1 + 2 * near) / (1 + 2 * near).mean())


def test_margin_by_hand() -> None:
    # Cosines with three prototypes: 1, 0, 0; then sqrt(1/2) twice; then -1, 0, 0. The fourth class has no prototype.
    prototypes = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 5], [0, 0, 0]])
    features = torch.tensor([[[4.0, 0, 0], [1, 1, 0], [-1, 0, 0]]]).mT[:, :, None]
    assert margin_weight(features, prototypes, (1, 3)).tolist() == [[[3.0, 0.0, 0.0]]]
    # Halfway between two cells half of both margins; the corners stay.
    assert torch.allclose(margin_weight(features, prototypes, (1, 5)), torch.tensor([1, 0.5, 0, 0, 0]) / 0.3)
    # Where the first class alone has a prototype, what matters is how like it a cell is: 2, 1.7 and 0.
    alone = margin_weight(features, prototypes[:1].repeat(3, 1) * torch.tensor([[1.0], [0], [0]]), (1, 3))[0, 0]
    assert torch.allclose(alone / alone[0], torch.tensor([2, 1 + math.sqrt(0.5), 0]) / 2)


def test_prototypes_by_hand() -> None:
    features = torch.tensor([[[[3.0, 0.0, 0.0, 1.0]], [[4.0, 7.0, 1.0, 0.0]]]])  # four cells of 2 x 10 pixels
    labels = torch.zeros(1, 2, 40, dtype=torch.int64)
    labels[..., 10:20], labels[..., 20:] = 1, 2
    labels[:, 0, 20:22] = IGNORE  # nine tenths of the third cell stay
    labels[..., 30:35] = 0  # the fourth cell is of two classes
    expected = torch.tensor([[0.6, 0.8], [0, 1], [0, 1], [0, 0]])
    assert torch.allclose(class_prototypes([(features, labels)], 4), expected)
    twice = class_prototypes([(features, labels), (features.flip(1), labels)], 4)
    assert torch.allclose(twice, torch.tensor([[0.7, 0.7], [0.5, 0.5], [0.5, 0.5], [0, 0]]))
    for nothing in ([], [(features, labels * 0)]):
        with pytest.raises(DataError, match="fewer than two classes, and a margin needs two"):
            class_prototypes(nothing, 4)


def test_products_of_weights_are_scaled_by_mean_one() -> None:
    weight, valid = torch.tensor([[[1.0, 3.0, 9.0]]]), torch.tensor([[[True, True, False]]])
    scaled = mean_one(weight.requires_grad_(), valid)
    assert scaled.tolist() == [[[0.5, 1.5, 0.0]]] and not scaled.requires_grad
    assert not mean_one(torch.zeros(1, 2, 2)).any()
