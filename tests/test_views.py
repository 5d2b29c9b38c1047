"""Views: a linear ramp written as a map must come back analytically through every view.

Each planted bug below is a real mistake; the property must notice every one of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    sample,
    sample_images,
    sample_labels,
    source_positions,
    valid_pixels,
)

TOLERANCE = 0.05  # pixels


def ramp_grid(height: int, width: int, align_corners: bool, stride: int = 4, multiple: int = 32) -> tuple[torch.Tensor, Grid]:
    """A map (1, 2, h, w) whose cells hold their own source pixel's y and x, as a network of this convention would place them."""
    frame = np.array([[-(-height // multiple) * multiple, -(-width // multiple) * multiple]])
    cells = frame // stride
    axes = []
    for length, count in zip(frame[0], cells[0], strict=True):
        index = np.arange(count, dtype=np.float64)
        axes.append(index * (length - 1) / max(count - 1, 1) if align_corners else (index + 0.5) * length / count - 0.5)
    y, x = np.meshgrid(*axes, indexing="ij")
    return torch.from_numpy(np.stack([y, x])[None]), Grid(cells, frame, align_corners)


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
    recovered = sample(ramp, dataclasses.replace(grid, align_corners=read_as), [sampled_with])[0].numpy()
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
NOMINAL = dataclasses.replace(BIG, resized_height=375 * 0.75)  # type: ignore[arg-type]
"""int(375 * 0.75) = 281, whose true ratio is 0.7493: code that uses 0.75 samples as if the image were resized to 281.25."""


@pytest.mark.parametrize(
    ("view", "planted"),
    [
        (dataclasses.replace(BIG, flip=True), BIG),
        (BIG, dataclasses.replace(BIG, left=BIG.left + 1)),
        (BIG, NOMINAL),
        (SMALL, dataclasses.replace(SMALL, top=0, left=0)),
    ],
    ids=["flip forgotten", "offset one too far", "nominal scale", "padding at one side"],
)
def test_planted_geometry_bugs_are_noticed(view: ViewParams, planted: ViewParams) -> None:
    assert ramp_error(view, view, True, True) < TOLERANCE < ramp_error(view, planted, True, True)


@pytest.mark.parametrize("align_corners", [True, False])
def test_swapped_corner_convention_is_off_by_a_pixel_and_a_half_at_the_border(align_corners: bool) -> None:
    view = identity_view(128, 160)
    assert ramp_error(view, view, align_corners, align_corners) < TOLERANCE
    assert ramp_error(view, view, align_corners, not align_corners) == pytest.approx(1.5, abs=0.1 if align_corners else 0.2)


def images_of(canvas: torch.Tensor, view: ViewParams, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    positions = source_positions([view])
    points = grid_points((canvas.shape[2], canvas.shape[3]), pixel_grid([view]), positions)
    return sample_images(canvas, points, inside_points(positions), mean, std)


def labels_of(canvas: torch.Tensor, view: ViewParams) -> torch.Tensor:
    positions = source_positions([view])
    return sample_labels(canvas, label_points(positions), inside_points(positions))


@settings(max_examples=60, deadline=None)
@given(view=views)
def test_labels_follow_the_same_map_as_logits(view: ViewParams) -> None:
    """A mask whose value is its column (then its row) comes back as the nearest source pixel, padding as IGNORE."""
    y, x = analytic(view)
    valid = valid_pixels([view])[0].numpy()
    for axis, position in ((0, y), (1, x)):
        size = (view.height, view.width)[axis]
        index = np.arange(size, dtype=np.uint8).reshape((-1, 1) if axis == 0 else (1, -1))
        mask = torch.from_numpy(np.broadcast_to(index, (view.height, view.width)).copy())
        labels = labels_of(mask[None], view)[0].numpy()
        assert (labels[~valid] == IGNORE).all()
        expected = np.clip(position, 0, size - 1)[valid]
        assert (np.abs(labels[valid] - expected) <= 0.5 + 1e-9).all()


def test_identity_view_returns_image_and_mask_unchanged() -> None:
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (1, 3, 37, 53), dtype=np.uint8))
    mask = torch.from_numpy(rng.integers(0, 9, (1, 37, 53), dtype=np.uint8))
    view = identity_view(37, 53)
    restored = images_of(image, view, torch.zeros(3), torch.ones(3))
    assert torch.allclose(restored, image.float(), atol=2e-2)  # float32 positions on a canvas of 53 pixels
    assert torch.equal(labels_of(mask, view), mask.long())


def test_flip_reverses_columns_exactly_and_only_once() -> None:
    coded = torch.arange(48, dtype=torch.uint8).repeat(32, 1)[None]
    view = dataclasses.replace(identity_view(32, 48), flip=True)
    assert torch.equal(labels_of(coded, view)[0], coded[0].flip(1).long())
    as_float = sample(coded[:, None].double(), pixel_grid([view]), [view])[0, 0]
    assert torch.allclose(as_float, coded[0].flip(1).double(), atol=1e-6)


def test_crop_of_the_upsampled_map_equals_the_sampled_map() -> None:
    """Sampling the native grid is what cropping the network's own upsampling would give, for both conventions."""
    logits = torch.randn(1, 5, 24, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    view = ViewParams(96, 128, 96, 128, 13, 40, 64, 64)
    for align_corners in (True, False):
        full = torch.nn.functional.interpolate(logits, size=(96, 128), mode="bilinear", align_corners=align_corners)
        grid = Grid(np.array([[24, 32]]), np.array([[96, 128]]), align_corners)
        assert torch.allclose(sample(logits, grid, [view]), full[..., 13:77, 40:104], atol=1e-5)


def test_offsets_never_leave_the_image_and_padding_is_centred() -> None:
    rng = np.random.default_rng(1)
    for _ in range(2000):
        view = draw_view(rng, (61, 47), (64, 32), [0.5, 1.0, 1.3])
        for offset, resized, crop in (
            (view.top, view.resized_height, view.crop_height),
            (view.left, view.resized_width, view.crop_width),
        ):
            if resized >= crop:
                assert 0 <= offset <= resized - crop
            else:
                assert -offset == (crop - resized) // 2
    full = draw_view(rng, (64, 32), (64, 32), [1.0])
    assert (full.top, full.left) == (0, 0)


def test_every_offset_of_the_range_is_drawn() -> None:
    rng = np.random.default_rng(2)
    drawn = {draw_view(rng, (64, 35), (64, 32), [1.0]).left for _ in range(200)}
    assert drawn == {0, 1, 2, 3}


def test_images_of_several_sizes_share_a_canvas_without_leaking() -> None:
    """What lies on the canvas beyond an image must never reach its view."""
    small = np.full((1, 3, 40, 40), 100, np.uint8)
    canvas = np.full((1, 3, 64, 80), 255, np.uint8)
    canvas[:, :, :40, :40] = small
    view = ViewParams(40, 40, 60, 60, -2, -2, 64, 64)
    alone = images_of(torch.from_numpy(small), view, torch.zeros(3), torch.ones(3))
    shared = images_of(torch.from_numpy(canvas), view, torch.zeros(3), torch.ones(3))
    assert torch.allclose(alone, shared, atol=1e-3)
    assert shared.max() <= 100.01


def test_padding_is_zero_after_normalisation_and_invalid() -> None:
    view = ViewParams(20, 30, 20, 30, -6, -1, 32, 32)
    image = torch.full((1, 3, 20, 30), 200, dtype=torch.uint8)
    out = images_of(image, view, torch.full((3,), 50.0), torch.full((3,), 10.0))
    valid = valid_pixels([view])[0]
    assert int(valid.sum()) == 20 * 30
    assert (out[0][:, ~valid] == 0).all() and torch.allclose(out[0][:, valid], torch.tensor(15.0))


def test_positions_at_a_networks_output_cells_align_their_corners() -> None:
    """With `shape`, the first and last samples lie on the view's first and last pixel: as smp's upsampling assumes."""
    view = identity_view(64, 64)
    y, x, _, _ = source_positions([view], (16, 16))
    assert y[0, 0] == 0 and y[0, -1] == 63 and x[0, 1] == pytest.approx(63 / 15)


def test_cutmix_uses_one_mask_for_images_labels_and_logits() -> None:
    """Class-coded colours: after mixing, the colour, the label and the argmax must name the same class."""
    rng = np.random.default_rng(3)
    classes = rng.integers(0, 8, (2, 4, 32, 32))
    first, second = torch.from_numpy(classes[0]), torch.from_numpy(classes[1])
    mask = torch.from_numpy(np.stack([draw_cutmix(rng, 32, 32) for _ in range(4)]))
    colours, labels = mix(first[:, None].float(), second[:, None].float(), mask), mix(first, second, mask)
    one_hot = [torch.nn.functional.one_hot(part, 8).permute(0, 3, 1, 2).float() for part in (first, second)]
    logits = mix(one_hot[0], one_hot[1], mask)
    assert torch.equal(colours[:, 0].long(), labels) and torch.equal(logits.argmax(1), labels)
    assert torch.equal(labels[mask], second[mask]) and torch.equal(labels[~mask], first[~mask])
    assert not torch.equal(mix(one_hot[0], one_hot[1], ~mask).argmax(1), labels)  # an inverted mask is noticed


def test_cutmix_area_matches_the_published_distribution() -> None:
    """MGD's: 25 % on average, 5 to 95 %: 15 to 37 %."""
    rng = np.random.default_rng(4)
    shares = [draw_cutmix(rng, 128, 128).mean() for _ in range(1500)]
    assert np.mean(shares) == pytest.approx(0.25, abs=0.04)
    low, high = np.quantile(shares, [0.05, 0.95])
    assert low == pytest.approx(0.15, abs=0.05) and high == pytest.approx(0.37, abs=0.05)


def test_features_are_mixed_by_the_share_of_their_area() -> None:
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, 8:24, 2:10] = True
    first, second = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    mixed = mix(first, second, mask)
    by_hand = torch.nn.functional.avg_pool2d(mask[:, None].float(), 4)
    assert torch.allclose(mixed, by_hand.expand_as(mixed))


@settings(max_examples=60, deadline=None)
@given(cells=st.integers(1, 90), boxes=st.integers(1, 20))
def test_area_weights_conserve_the_mean(cells: int, boxes: int) -> None:
    weights = area_weights(cells, boxes, torch.device("cpu")).double()
    assert torch.allclose(weights.sum(1), torch.ones(boxes, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(weights.mean(0), torch.full((cells,), 1 / cells, dtype=torch.float64), atol=1e-5)
    ones = coverage(torch.ones(2, cells, cells, dtype=torch.bool), (boxes, boxes))
    assert torch.allclose(ones, torch.ones_like(ones), atol=1e-5)
