"""One geometry: a view is drawn once and applied to image, label and every cached grid through the same map.

Letters: B batch, C channels, K classes, H W pixels of a view, h w cells of a grid.

A source image has integer size (height, width). A view flips it, resizes it to integer (resized_height, resized_width),
pads it symmetrically where it is smaller than the crop, and cuts the crop out. From these numbers follows one affine map
for each axis from a view's pixel u to the source pixel x(u), half-pixel centres at integers:

    u' = u + offset                      pixel of the resized image; offset is negative where padding comes first
    x  = (u' + 0.5) * size / resized - 0.5           (size / resized, never the nominal scale: sizes are rounded)
    x  = size - 1 - x                    if flipped
    valid(u)  iff  0 <= u' < resized

A grid that was computed from the source image says at which cell a source pixel lies (`Grid`). Sampling clamps to the
source image before it asks the grid, so padding and other images on a canvas never leak in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_pipeline.data.images import IGNORE


@dataclass(frozen=True, slots=True)
class ViewParams:
    """The numbers of one drawn view; offsets are in pixels of the resized image."""

    height: int
    width: int
    resized_height: int
    resized_width: int
    top: int
    left: int
    crop_height: int
    crop_width: int
    flip: bool = False


def identity_view(height: int, width: int) -> ViewParams:
    """The whole image, unchanged."""
    return ViewParams(height, width, height, width, 0, 0, height, width)


def draw_view(
    rng: np.random.Generator, size: tuple[int, int], crop: tuple[int, int], scales: list[float], flip: float = 0.5
) -> ViewParams:
    """Draws scale, crop and flip for an image of `size` (height, width); in the order and distribution of MGD's code.

    If the resized image is smaller than the crop, the padding is centred, as in MGD; otherwise the offset is uniform
    over the positions that stay inside the image.
    """
    scale = scales[int(rng.integers(len(scales)))]
    resized = [max(1, round(side * scale)) for side in size]
    offsets = [int(rng.integers(r - c + 1)) if r >= c else -((c - r) // 2) for r, c in zip(resized, crop, strict=True)]
    flipped = bool(rng.random() < flip)
    return ViewParams(size[0], size[1], resized[0], resized[1], offsets[0], offsets[1], crop[0], crop[1], flipped)


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the cells of an array of (B, C, canvas height, canvas width) lie in each source image.

    `cells` (B, 2): rows and columns that belong to the image, placed at the canvas' top left.
    `frames` (B, 2): height and width in source pixels that these cells span: the image, and any padding of the network's
    input at the bottom and right.
    `align_corners`: True if cell 0 and the last cell lie on the first and last pixel of the frame, else cells are areas.
    """

    cells: np.ndarray
    frames: np.ndarray
    align_corners: bool

    def positions(self, pixels: np.ndarray, axis: int) -> np.ndarray:
        """Cell coordinate of source pixels: (B, n) float64 to (B, n) float64, clamped to the cells."""
        cells, frame = self.cells[:, axis : axis + 1], self.frames[:, axis : axis + 1]
        if self.align_corners:
            places = pixels * ((cells - 1) / np.maximum(frame - 1, 1))
        else:
            places = (pixels + 0.5) * (cells / frame) - 0.5
        return np.minimum(np.maximum(places, 0), cells - 1)  # np.clip takes three times as long


def pixel_grid(views: list[ViewParams]) -> Grid:
    """The grid of the source images themselves: one cell, one pixel."""
    sizes = np.array([(v.height, v.width) for v in views])
    return Grid(cells=sizes, frames=sizes, align_corners=False)


@lru_cache(maxsize=64)
def _evenly(pixels: int, count: int, boxes: int | None) -> np.ndarray:
    """`count` positions from the first to the last pixel, or their means over equal `boxes`; kept, because every batch asks for the
    same ones."""
    positions = np.linspace(0, pixels - 1, count)
    if boxes is not None:
        positions = area_weights(count, boxes, torch.device("cpu")).double().numpy() @ positions
    positions.flags.writeable = False
    return positions


class Positions(NamedTuple):
    """Where a batch of views looks in its source images."""

    y: np.ndarray
    """(B, h) float64, source pixels clamped to the image"""
    x: np.ndarray
    """(B, w) float64"""
    inside_y: np.ndarray
    """(B, h) bool: False where a row is padding"""
    inside_x: np.ndarray
    """(B, w) bool"""


def source_positions(
    views: list[ViewParams], shape: tuple[int, int] | None = None, boxes: tuple[int | None, int | None] = (None, None)
) -> Positions:
    """The affine map of the module's docstring for a batch of views of equal crop.

    Without `shape` at the views' pixels; with the `shape` (h, w) of a network's output at the places of its cells, whose corners
    are aligned with the view's (`SegmentationNetwork`). With `boxes` (r, c) at the mean places of the cells in each of r x c equal
    boxes, where the means of the network's output by `area_weights` lie.
    """

    def axis(u: np.ndarray, numbers: list[tuple[int, int, int, bool]]) -> tuple[np.ndarray, np.ndarray]:
        size, resized, offset, flip = (column[:, None] for column in np.array(numbers, np.float64).T)
        resized_position = u + offset
        source = (resized_position + 0.5) * (size / resized) - 0.5
        source = np.where(flip, size - 1 - source, source)
        # A pixel is an area: positions up to half a pixel beyond the outermost centre belong to it.
        inside = (resized_position > -0.5) & (resized_position < resized - 0.5)
        return np.minimum(np.maximum(source, 0), size - 1), inside

    height, width = views[0].crop_height, views[0].crop_width
    h, w = shape or (height, width)
    y, inside_y = axis(_evenly(height, h, boxes[0]), [(v.height, v.resized_height, v.top, False) for v in views])
    x, inside_x = axis(_evenly(width, w, boxes[1]), [(v.width, v.resized_width, v.left, v.flip) for v in views])
    return Positions(y, x, inside_y, inside_x)


def view_matrix(view: ViewParams) -> np.ndarray:
    """(2, 3) float64: the map of the module's docstring as a matrix, which takes a pixel (x, y, 1) of the view to (x, y) of its
    source image."""
    x_step, y_step = view.width / view.resized_width, view.height / view.resized_height
    x, y = (view.left + 0.5) * x_step - 0.5, (view.top + 0.5) * y_step - 0.5
    if view.flip:
        x_step, x = -x_step, view.width - 1 - x
    return np.array([[x_step, 0, x], [0, y_step, y]])


def affine_positions(matrix: np.ndarray, shape: tuple[int, int], size: tuple[int, int]) -> Positions:
    """Where the pixels of one view of `shape` (h, w) look in a source image of `size` (height, width) under any affine map: each
    array is (1, h * w), one pixel of the view after another. `matrix` (2, 3) is as `view_matrix` gives it."""
    y_view, x_view = (pixels.ravel() for pixels in np.indices(shape, np.float64))
    x, y = matrix @ np.stack([x_view, y_view, np.ones_like(x_view)])
    axes = [(y[None], size[0]), (x[None], size[1])]
    clamped = [np.clip(source, 0, side - 1) for source, side in axes]
    return Positions(*clamped, *((source > -0.5) & (source < side - 0.5) for source, side in axes))


class Points(NamedTuple):
    """Where a canvas is read for a batch of views; a view's rows and columns are independent, so these are few numbers."""

    rows: Tensor
    """(B, h)"""
    columns: Tensor
    """(B, w)"""


def inside_points(positions: Positions) -> Points:
    """(B, H) and (B, W) bool: True where a row or column of a view comes from its image, False where it is padding."""
    return Points(torch.from_numpy(positions.inside_y), torch.from_numpy(positions.inside_x))


def valid_pixels(views: list[ViewParams]) -> Tensor:
    """(B, H, W) bool: True where a view's pixel comes from its image, False where it is padding."""
    return both_inside(inside_points(source_positions(views)))


def both_inside(inside: Points) -> Tensor:
    """(B, H, W) bool from `inside_points`."""
    return inside.rows[:, :, None] & inside.columns[:, None, :]


def grid_points(canvas: tuple[int, int], grid: Grid, positions: Positions) -> Points:
    """Where `sample_at` reads a canvas of (height, width) cells to see the positions; float32, -1 to 1 as in grid_sample."""
    # grid_sample's own convention (align_corners=False) on the canvas, in float64 until the end.
    rows = (grid.positions(positions.y, 0) + 0.5) * (2 / canvas[0]) - 1
    columns = (grid.positions(positions.x, 1) + 0.5) * (2 / canvas[1]) - 1
    return Points(torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(columns.astype(np.float32)))


def sample_at(canvas_BChw: Tensor, points: Points) -> Tensor:
    """Reads a batch of canvases at `grid_points`: (B, C, H, W), dtype and device of the canvas. Floating point only."""
    rows, columns = (p.to(canvas_BChw.dtype) for p in points)
    size = (-1, rows.shape[1], columns.shape[1])
    return _read(canvas_BChw, torch.stack([columns[:, None, :].expand(size), rows[:, :, None].expand(size)], -1))


def sample_each(canvas_BChw: Tensor, points: Points, shape: tuple[int, int]) -> Tensor:
    """As `sample_at` reads, for the points of `affine_positions`, which are not rows and columns: (B, C, *shape)."""
    rows, columns = points
    return _read(canvas_BChw, torch.stack([columns, rows], -1).view(-1, *shape, 2))


def _read(canvas_BChw: Tensor, where: Tensor) -> Tensor:
    return F.grid_sample(canvas_BChw, where, mode="bilinear", padding_mode="border", align_corners=False)


def sample_images(canvas_B3HW: Tensor, points: Points, inside: Points, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 images on a canvas to the network's input (B, 3, H, W) float32, normalised; padding is 0, the mean colour.

    Bilinear without antialiasing, as MGD's resize. `mean` and `std` are (3,) in the unit of the pixels, 0 to 255.
    """
    images = sample_at(canvas_B3HW.float(), points)
    images = (images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    return images * both_inside(inside)[:, None]


def label_points(positions: Positions) -> Points:
    """Where `sample_labels` reads: the nearest source pixels, int64.

    Not by grid_sample: its float32 positions may round a half to another neighbour than the image's own map does.
    """
    return Points(*(torch.from_numpy(np.rint(where).astype(np.int64)) for where in (positions.y, positions.x)))


def sample_labels(canvas_BHW: Tensor, points: Points, inside: Points) -> Tensor:
    """uint8 labels on a canvas to (B, H, W) int64, nearest source pixel; padding is IGNORE."""
    batch = torch.arange(len(canvas_BHW), device=canvas_BHW.device)[:, None, None]
    labels = canvas_BHW[batch, points.rows[:, :, None], points.columns[:, None, :]].long()
    return labels.masked_fill(~both_inside(inside), IGNORE)


def draw_jitter(seed: int, batch: int) -> Tensor:
    """(B, 6) float32, uniform in -1 .. 1: the draws of `jitter_colours` for a batch of images."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.rand(batch, count, generator=generator) for count in (1, 1, 3, 1)]
    return torch.cat(draws, 1) * 2 - 1


def jitter_colours(images_B3HW: Tensor, strength: float, draws_B6: Tensor) -> Tensor:
    """Random contrast, saturation, channel gain and brightness of normalised images, one draw an image; strength 0 is identity.

    Contrast and saturation are scaled by 1 - strength .. 1 + strength, channels by 0.3 of that range, brightness shifts by
    +-strength; the unit is the input's standard deviation. Only the student's input is jittered, never the targets.
    """
    contrast, saturation, gain, brightness = (d[:, :, None, None] for d in (draws_B6 * strength).split([1, 1, 3, 1], 1))
    mean = images_B3HW.mean((2, 3), keepdim=True).mean(1, keepdim=True)
    jittered = (images_B3HW - mean) * (1 + contrast) + mean
    grey = jittered.mean(1, keepdim=True)
    jittered = grey + (jittered - grey) * (1 + saturation)
    return jittered * (1 + 0.3 * gain) + brightness


def draw_cutmix(
    rng: np.random.Generator, height: int, width: int, *, boxes: int = 3, area: tuple[float, float] = (0.25, 0.5)
) -> np.ndarray:
    """A CutMixMask (H, W) bool: True where the pixel comes from the partner.

    As in MGD's code: each box has an area drawn from `area` / `boxes` of the view and a random aspect ratio, lies inside the
    view, and overlapping boxes are XOR-ed.
    """
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(boxes):
        share = rng.uniform(*area) / boxes
        # height share drawn log-uniformly between `share` and 1, so that box height x width = share x view.
        tall = float(np.exp(rng.uniform(np.log(share), 0)))
        box_height = min(height, max(1, round(height * tall)))
        box_width = min(width, max(1, round(width * share / tall)))
        top = int(rng.integers(height - box_height + 1))
        left = int(rng.integers(width - box_width + 1))
        mask[top : top + box_height, left : left + box_width] ^= True
    return mask


def mix(first: Tensor, second: Tensor, mask_BHW: Tensor) -> Tensor:
    """CutMix: `second` where the mask is True, else `first`.

    Takes (B, H, W) and (B, C, H, W) at the mask's size. On a coarser (B, C, h, w) grid each cell is mixed by the share of
    its area that the mask covers, which is what averaging the mixed full-resolution map gives.
    """
    if first.dim() == 3:
        return torch.where(mask_BHW, second, first)
    if first.shape[-2:] == mask_BHW.shape[-2:]:
        return torch.where(mask_BHW[:, None], second, first)
    share = coverage(mask_BHW, (first.shape[-2], first.shape[-1])).to(first.dtype)[:, None]
    return first * (1 - share) + second * share


def coverage(mask_BHW: Tensor, shape: tuple[int, int]) -> Tensor:
    """Share of each cell's area that is True: (B, H, W) bool to (B, h, w) float32, exact for any sizes."""
    rows = area_weights(mask_BHW.shape[-2], shape[0], mask_BHW.device)
    columns = area_weights(mask_BHW.shape[-1], shape[1], mask_BHW.device)
    return rows @ mask_BHW.float() @ columns.T


@lru_cache(maxsize=64)
def area_weights(cells: int, boxes: int, device: torch.device) -> Tensor:
    """(boxes, cells) float32: the share of box i that cell j covers when both divide the same length evenly; rows sum to 1.

    Kept for each size, because a copy to a GPU would make every step wait for the previous one.
    """
    with torch.inference_mode(False):
        edges = torch.arange(boxes + 1, dtype=torch.float64) * (cells / boxes)
        left = torch.arange(cells, dtype=torch.float64)
        overlap = torch.minimum(edges[1:, None], left + 1) - torch.maximum(edges[:-1, None], left)
        return (overlap.clamp(min=0) * (boxes / cells)).float().to(device)
