"""Scaling inside the graph gives Pillow's pixels, to the bit, and gradients; a student sees what `predict` shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import tiny_student
from mgd_pipeline.data.images import resize_image, scaled_size
from mgd_pipeline.networks.scaling import scale_down
from mgd_pipeline.students.student import load_student


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def batch(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 200), st.booleans())
@example(1, 1, 1, False)
@example(1, 100, 64, False)
@example(480, 640, 320, True)  # halves: every second mean lies between two whole numbers
@example(97, 130, 128, False)
@example(300, 149, 100, False)  # Pillow 13 scales columns first: 200 rows fewer, 99 columns fewer
@example(300, 150, 100, False)  # rows first: 200 rows fewer, 100 columns fewer
@example(239, 114, 227, False)  # rows first, though more than twice as tall as wide
@example(200, 100, 11, False)  # columns first, though not
def test_pixels_are_pillow_s(height: int, width: int, long_side: int, extreme: bool) -> None:
    image = photo(height, width)
    if extreme:
        image = (image > 127).astype(np.uint8) * 255
    expected = resize_image(image, *scaled_size(height, width, long_side))
    assert np.array_equal(scale_down(batch(image), long_side)[0].permute(1, 2, 0).numpy(), expected)


def test_each_image_of_a_batch_is_scaled_alone() -> None:
    images = [photo(70, 91, seed) for seed in range(3)]
    together = scale_down(batch(*images), 40)
    assert torch.equal(together, torch.cat([scale_down(batch(image), 40) for image in images]))


def test_images_that_are_not_larger_pass_through() -> None:
    """With their fractions, which a scaled image does not keep."""
    images = 255 * torch.rand(2, 3, 30, 47)
    assert torch.equal(scale_down(images, 47), images)
    assert torch.equal(scale_down(images, 46), scale_down(images, 46).round())


def test_gradients_are_those_without_rounding() -> None:
    """Each target pixel is a mean of weights that sum to 1: its gradient spreads 1 over the source."""
    images = batch(photo(50, 75)).requires_grad_()
    scale_down(images, 30).sum().backward()
    assert images.grad is not None and images.grad.min() >= 0
    assert float(images.grad.sum()) == pytest.approx(3 * 20 * 30, rel=1e-5)


@pytest.mark.parametrize("size", [(40, 60), (64, 64), (65, 64), (97, 131), (200, 150), (33, 300), (1, 90), (1, 1)])
def test_a_student_s_logits_give_the_mask_that_it_predicts(tmp_path: Path, size: tuple[int, int]) -> None:
    student, image = load_student(tiny_student(tmp_path / "s.safetensors", long_side=64)), photo(*size)
    with torch.no_grad():
        assert np.array_equal(student(batch(image)).argmax(1)[0].numpy(), student.predict(image))


def test_a_student_has_gradients_through_the_scaling(tmp_path: Path) -> None:
    student = load_student(tiny_student(tmp_path / "s.safetensors", long_side=32))
    images = batch(photo(50, 75)).requires_grad_()
    student(images).square().sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
