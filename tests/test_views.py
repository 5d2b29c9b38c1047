"""Views: a linear ramp written as a map must come back analytically through every view.

Each planted bug below is a real mistake; the property must notice every one of them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import avg_pool2d, interpolate, one_hot

from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.views import (
    Grid,
    ViewParams,
    area_weights,
    coverage,
    draw_cutmix,
    draw_view,
    grid_points,
    identity_view,
    inside_points,
    label_points,
    mix,
    pixel_grid,
    sample_at,
    sample_images,
    sample_labels,
    source_positions,
    valid_pixels,
)

TOLERANCE = 0.05  # pixels


def sample(canvas: torch.Tensor, grid: Grid, view: ViewParams) -> torch.Tensor:
    return sample_at(canvas, grid_points((canvas.shape[2], canvas.shape[3]), grid, source_positions([view])))


def images_of(canvas: torch.Tensor, view: ViewParams, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    positions = source_positions([view])
    points = grid_points((canvas.shape[2], canvas.shape[3]), pixel_grid([view]), positions)
    return sample_images(canvas, points, inside_points(positions), torch.full((3,), mean), torch.full((3,), std))


def labels_of(canvas: torch.Tensor, view: ViewParams) -> torch.Tensor:
    positions = source_positions([view])
    return sample_labels(canvas, label_points(positions), inside_points(positions))


def ramp_grid(height: int, width: int, align_corners: bool, stride: int = 4, multiple: int = 32) -> tuple[torch.Tensor, Grid]:
    """A map (1, 2, h, w) whose cells hold their own source pixel's y and x, as a network of this convention would place them."""
    frame = np.array([[-(-height // multiple) * multiple, -(-width // multiple) * multiple]])
    cells = frame // stride
    axes = []
    for length, count in zip(frame[0], cells[0], strict=True):
        index = np.arange(count, dtype=np.float64)
        axes.append(index * (length - 1) / max(count - 1, 1) if align_corners else (index + 0.5) * length / count - 0.5)
    return torch.from_numpy(np.stack(np.meshgrid(*axes, indexing="ij"))[None]), Grid(cells, frame, align_corners)


def analytic(view: ViewParams) -> tuple[np.ndarray, np.ndarray]:
    """Source y and x of every pixel of a view, written down once more, step by step: crop, padding, resize, flip."""
    y = np.arange(view.crop_height)[:, None] + view.top + np.zeros((1, view.crop_width))
    x = np.arange(view.crop_width)[None, :] + view.left + np.zeros((view.crop_height, 1))
    y = (y + 0.5) / view.resized_height * view.height - 0.5
    x = (x + 0.5) / view.resized_width * view.width - 0.5
    if view.flip:
        x = (view.width - 1) - x
    return y, x


def ramp_error(view: ViewParams, sampled_with: ViewParams, align_corners: bool, read_as: bool) -> float:
    """Largest distance in pixels between the recovered and the analytic position, over valid pixels inside the cells' centres."""
    ramp, grid = ramp_grid(view.height, view.width, align_corners)
    recovered = sample(ramp, replace(grid, align_corners=read_as), sampled_with)[0].numpy()
    y, x = analytic(view)
    # Beyond the outermost pixel centre a sample is clamped to the image, as in every resize.
    y, x = np.clip(y, 0, view.height - 1), np.clip(x, 0, view.width - 1)
    # A half-pixel grid has no cell within stride / 2 of its border: a ramp cannot be extrapolated there.
    margin = 0 if align_corners else 1.5
    inside = valid_pixels([view])[0].numpy() & (y >= margin) & (y <= view.height - 1 - margin)
    inside &= (x >= margin) & (x <= view.width - 1 - margin)
    return float(np.maximum(abs(recovered[0] - y), abs(recovered[1] - x))[inside].max(initial=0))


views = st.builds(
    lambda h, w, seed, crop: draw_view(np.random.default_rng(seed), (h, w), crop, [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0], flip=0.5),
    st.integers(33, 150),
    st.integers(33, 150),
    st.integers(0, 2**32),
    st.sampled_from([(64, 64), (96, 64), (32, 128)]),
)


@settings(max_examples=150, deadline=None)
@given(view=views, align_corners=st.booleans())
def test_ramp_comes_back_through_every_view(view: ViewParams, align_corners: bool) -> None:
    assert ramp_error(view, view, align_corners, align_corners) < TOLERANCE


BIG, SMALL = ViewParams(375, 500, 281, 375, 100, 40, 64, 96), ViewParams(60, 90, 45, 68, -9, -14, 64, 96)
NOMINAL = replace(BIG, resized_height=375 * 0.75)  # type: ignore[arg-type]
"""int(375 * 0.75) = 281, whose true ratio is 0.7493: code that uses 0.75 samples as if the image were resized to 281.25."""


@pytest.mark.parametrize(
    ("view", "planted"),
    [
        (replace(BIG, flip=True), BIG),
        (BIG, replace(BIG, left=BIG.left + 1)),
        (BIG, NOMINAL),
        (SMALL, replace(SMALL, top=0, left=0)),
    ],
    ids=["flip forgotten", "offset one too far", "nominal scale", "padding at one side"],
)
def test_planted_geometry_bugs_are_noticed(view: ViewParams, planted: ViewParams) -> None:
    assert ramp_error(view, view, True, True) < TOLERANCE < ramp_error(view, planted, True, True)


@pytest.mark.parametrize("align_corners", [True, False])
def test_swapped_corner_convention_is_off_by_a_pixel_and_a_half_at_the_border(align_corners: bool) -> None:
    view = identity_view(128, 160)
    assert ramp_error(view, view, align_corners, not align_corners) == pytest.approx(1.5, abs=0.1 if align_corners else 0.2)


@settings(max_examples=60, deadline=None)
@given(view=views)
def test_labels_follow_the_same_map_as_logits(view: ViewParams) -> None:
    """A mask whose value is its row (then its column) comes back as the nearest source pixel, padding as IGNORE."""
    valid = valid_pixels([view])[0].numpy()
    for mask, position in zip(np.indices((view.height, view.width), np.uint8), analytic(view), strict=True):
        labels = labels_of(torch.from_numpy(mask)[None], view)[0].numpy()
        assert (labels[~valid] == IGNORE).all()
        assert (np.abs(labels[valid] - np.clip(position, 0, mask.max())[valid]) <= 0.5 + 1e-9).all()


def test_identity_view_returns_image_and_mask_unchanged_and_a_flip_reverses_columns() -> None:
    rng, view = np.random.default_rng(0), identity_view(37, 53)
    image = torch.from_numpy(rng.integers(0, 256, (1, 3, 37, 53), dtype=np.uint8))
    for flip in (False, True):
        expected, seen = image.flip(3) if flip else image, replace(view, flip=flip)
        assert torch.allclose(images_of(image, seen), expected.float(), atol=2e-2)  # float32 positions on a canvas of 53 pixels
        assert torch.equal(labels_of(image[:, 0], seen), expected[:, 0].long())
        assert torch.allclose(sample(image.double(), pixel_grid([view]), seen), expected.double(), atol=2e-2)


def test_crop_of_the_upsampled_map_equals_the_sampled_map() -> None:
    """Sampling the native grid is what cropping the network's own upsampling would give, for both conventions."""
    logits = torch.randn(1, 5, 24, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for align_corners in (True, False):
        full = interpolate(logits, size=(96, 128), mode="bilinear", align_corners=align_corners)
        grid = Grid(np.array([[24, 32]]), np.array([[96, 128]]), align_corners)
        sampled = sample(logits, grid, ViewParams(96, 128, 96, 128, 13, 40, 64, 64))
        assert torch.allclose(sampled, full[..., 13:77, 40:104], atol=1e-5)


def test_offsets_never_leave_the_image_each_is_drawn_and_padding_is_centred() -> None:
    rng = np.random.default_rng(1)
    for _ in range(2000):
        view = draw_view(rng, (61, 47), (64, 32), [0.5, 1.0, 1.3])
        for offset, resized, crop in ((view.top, view.resized_height, 64), (view.left, view.resized_width, 32)):
            assert 0 <= offset <= resized - crop if resized >= crop else -offset == (crop - resized) // 2
    assert {draw_view(rng, (64, 35), (64, 32), [1.0]).left for _ in range(200)} == {0, 1, 2, 3}


def test_padding_is_zero_after_normalisation_and_nothing_else_on_a_canvas_is_seen() -> None:
    """What lies on the canvas beyond an image must never reach its view."""
    canvas, view = torch.full((1, 3, 64, 80), 255, dtype=torch.uint8), ViewParams(20, 30, 40, 60, -6, -1, 64, 62)
    canvas[:, :, :20, :30] = 200
    alone, shared = images_of(canvas[:, :, :20, :30], view, 50.0, 10.0)[0], images_of(canvas, view, 50.0, 10.0)[0]
    valid = valid_pixels([view])[0]
    assert int(valid.sum()) == 40 * 60
    for out in (alone, shared):
        assert (out[:, ~valid] == 0).all() and torch.allclose(out[:, valid], torch.tensor(15.0), atol=1e-3)


def test_positions_at_a_networks_output_cells_align_their_corners() -> None:
    """With `shape`, the first and last samples lie on the view's first and last pixel: as smp's upsampling assumes."""
    y, x, _, _ = source_positions([identity_view(64, 64)], (16, 16))
    assert y[0, 0] == 0 and y[0, -1] == 63 and x[0, 1] == pytest.approx(63 / 15)


def test_cutmix_uses_one_mask_for_images_labels_logits_and_features() -> None:
    """Class-coded colours: after mixing, the colour, the label and the argmax must name the same class."""
    rng = np.random.default_rng(3)
    first, second = torch.from_numpy(rng.integers(0, 8, (2, 4, 32, 32)))
    mask = torch.from_numpy(np.stack([draw_cutmix(rng, 32, 32) for _ in range(4)]))
    labels = mix(first, second, mask)
    assert torch.equal(labels[mask], second[mask]) and torch.equal(labels[~mask], first[~mask])
    assert torch.equal(mix(first[:, None].float(), second[:, None].float(), mask)[:, 0].long(), labels)
    ours, theirs = (one_hot(part, 8).permute(0, 3, 1, 2).float() for part in (first, second))
    assert torch.equal(mix(ours, theirs, mask).argmax(1), labels)
    # --- coarser features by the share of their area
    features = mix(torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8), mask)
    assert torch.allclose(features, avg_pool2d(mask[:, None].float(), 4).expand_as(features))


def test_cutmix_area_matches_the_published_distribution() -> None:
    """MGD's: 25 % on average, 5 to 95 %: 15 to 37 %."""
    rng = np.random.default_rng(4)
    shares = [draw_cutmix(rng, 128, 128).mean() for _ in range(1500)]
    assert np.mean(shares) == pytest.approx(0.25, abs=0.04)
    low, high = np.quantile(shares, [0.05, 0.95])
    assert low == pytest.approx(0.15, abs=0.05) and high == pytest.approx(0.37, abs=0.05)


@settings(max_examples=60, deadline=None)
@given(cells=st.integers(1, 90), boxes=st.integers(1, 20))
def test_area_weights_conserve_the_mean(cells: int, boxes: int) -> None:
    weights = area_weights(cells, boxes, torch.device("cpu")).double()
    assert torch.allclose(weights.sum(1), torch.ones(boxes, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(weights.mean(0), torch.full((cells,), 1 / cells, dtype=torch.float64), atol=1e-5)
    ones = coverage(torch.ones(2, cells, cells, dtype=torch.bool), (boxes, boxes))
    assert torch.allclose(ones, torch.ones_like(ones), atol=1e-5)
