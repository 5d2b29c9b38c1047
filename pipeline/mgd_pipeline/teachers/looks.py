"""How teachers look at images: at several scales, mirrored, through windows; and their outputs on the grid of the teacher caches.

Each teacher's outputs lie on a grid of its own. Here they are brought to one grid, in the image's own frame and in the data
set's classes. Letters: B batch, K classes, D channels, h w cells of an output or of a cache, r c cells of the regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mgd_pipeline.caches.encoding import TeacherTargets
from mgd_pipeline.caches.levels import as_targets
from mgd_pipeline.data.images import resize_image, scaled_size
from mgd_pipeline.networks.inference import Windows, to_input, windows
from mgd_pipeline.networks.segmentation import MULTIPLE, STRIDE, output_grid, pad_to_multiple
from mgd_pipeline.params import FixedSize, TargetsParams, TtaParams
from mgd_pipeline.teachers.teacher import Teacher, TeacherOutputs, data_classes
from mgd_pipeline.views import Grid

_MARGIN = 1.5
"""Cells between a place and the border of a window within which the window does not count, if another window does."""


@torch.inference_mode()
def dense_targets(
    teacher: Teacher, images: list[np.ndarray], options: TargetsParams, long_side: int | None = None
) -> list[TeacherTargets]:
    """Runs a teacher over whole images of one size, each (H, W, 3) uint8, and returns the targets of each.

    Images larger than `long_side` get the targets of their working size. Raises ValueError if the network is not in eval mode:
    batch statistics would let an image's targets depend on the other images of the batch.
    """
    size = scaled_size(images[0].shape[0], images[0].shape[1], long_side)
    return looks_as_targets(look(teacher, images, options, long_side), size, options)


class Looks(NamedTuple):
    """The mean of all looks of a teacher at images of one size, in the frame of the image at its working size."""

    logits: Tensor
    """(B, K, h, w) at cells 4 pixels apart, or 2 if the cache's are (`output_grid`); K is 0 if it names no classes"""
    features: Tensor
    """(B, D, r, c) averaged over blocks of `region_stride` pixels; D is 0 if it has none"""


def looks_as_targets(looks: Looks, size: tuple[int, int], options: TargetsParams) -> list[TeacherTargets]:
    """The targets of each image of `size`, the working size."""
    logits, features = looks
    descriptors = pixel_means(logits, size)
    logits = at_cells(logits, size, options.stride)
    if options.top_k is not None:
        logits = largest_logits(logits, options.top_k)
    return as_targets(logits, features, descriptors, options)


def look_of_regions(logits_BKrc: Tensor, size: tuple[int, int], options: TargetsParams) -> Looks:
    """The look of a teacher that has logits at the cells of the regions, for images of `size`, the working size."""
    cells = [_cell_pixels(size, axis, min(options.stride, STRIDE)) for axis in (0, 1)]
    logits = region_values_at(logits_BKrc, cells[0], cells[1], options.region_stride)
    return Looks(logits, logits_BKrc.new_zeros(len(logits_BKrc), 0, *logits_BKrc.shape[2:]))


def region_values_at(values_BCrc: Tensor, rows: np.ndarray, columns: np.ndarray, region_stride: int) -> Tensor:
    """Values of the regions at these rows and columns of pixels, bilinear: (B, C, rows, columns).

    Cells lie at the centres of the blocks of `_block_pixels`. Pixels beyond the outermost centres get the values there.
    """
    down, across = (
        _interpolation(places, cells, cells * region_stride, align_corners=False).to(values_BCrc)
        for places, cells in ((rows, values_BCrc.shape[2]), (columns, values_BCrc.shape[3]))
    )
    return down @ values_BCrc @ across.T


@torch.inference_mode()
def look(teacher: Teacher, images: list[np.ndarray], options: TargetsParams, long_side: int | None = None) -> Looks:
    """Shows a teacher images of one size, each (H, W, 3) uint8, at the scales, flips and windows of `options`.

    The working size of images larger than `long_side` follows from it; the teacher sees them scaled to the working size, or to
    its own short side.
    """
    if teacher.network.training:
        raise ValueError("a teacher must be in eval mode")
    size = scaled_size(images[0].shape[0], images[0].shape[1], long_side)
    # The pixels of the image, rows and columns, at which logits and features are wanted. Cells of 2 pixels are read from the
    # teacher's own output, which may come from more than the working size; `at_cells` makes coarser cells than 4 afterwards.
    cells = [_cell_pixels(size, axis, min(options.stride, STRIDE)) for axis in (0, 1)]
    blocks = [_block_pixels(size[axis], options.region_stride) for axis in (0, 1)]
    passes = _passes(teacher.short_side, size, options)
    window = options.window
    if teacher.size is not None:  # scales at which the image looks the same count once
        passes = list(dict.fromkeys((_fixed(teacher.size, teacher.fixed_size, seen), flip) for seen, flip in passes))
        window = teacher.size
    logits = torch.zeros(len(images), 0, len(cells[0]), len(cells[1]), device=teacher.device)
    features = torch.zeros(len(images), 0, *(len(pixels) // options.region_stride for pixels in blocks), device=teacher.device)
    for seen, flip in passes:
        inputs = torch.cat([to_input(resize_image(image, *seen), teacher.normalisation, teacher.device) for image in images])
        axes = _windows(seen, window, options.overlap)
        for numbers in np.ndindex(*(len(axis.starts) for axis in axes)):
            rows, columns = (slice(axis.starts[i], axis.starts[i] + axis.length) for axis, i in zip(axes, numbers, strict=True))
            outputs, padded = _run(teacher, inputs[..., rows, columns], flip, options.precision)
            shown = [_Shown(size[axis], seen[axis], axes[axis], numbers[axis], padded[axis]) for axis in (0, 1)]
            if (part := outputs.logits) is not None:
                # This project's own networks have the cells of the teacher caches already.
                own = teacher.align_corners and teacher.multiple == MULTIPLE and seen == size == tuple(axis.length for axis in axes)
                if not own or part.shape[-2:] != (len(cells[0]), len(cells[1])):
                    weights = _weights(shown, cells, part, teacher.align_corners)
                    part = weights[0] @ part @ weights[1].T
                logits = part / len(passes) + (logits if logits.shape[1] else 0)
            if outputs.features is not None:
                pixels = _weights(shown, blocks, outputs.features, teacher.align_corners)
                means = [matrix.view(-1, options.region_stride, matrix.shape[1]).mean(1) for matrix in pixels]
                features = means[0] @ outputs.features @ means[1].T / len(passes) + (features if features.shape[1] else 0)
    return Looks(logits, features)


def shown_sizes(
    sizes: Sequence[tuple[int, int]], short_side: int | None, multiple: int, options: TargetsParams
) -> list[tuple[int, int]]:
    """Height and width, pixels, of the padded inputs that a network of every size gets for images of these working sizes, each
    once."""
    passes = [seen for size in sizes for seen, _ in _passes(short_side, size, options)]
    axes = [_windows(seen, options.window, options.overlap) for seen in passes]
    return list(dict.fromkeys((-(-h.length // multiple) * multiple, -(-w.length // multiple) * multiple) for h, w in axes))


def _windows(seen: tuple[int, int], window: Sequence[int] | None, overlap: float) -> tuple[Windows, Windows]:
    """The windows over the rows and over the columns of an image of the size `seen`."""
    height, width = window or (None, None)
    return windows(seen[0], height, overlap), windows(seen[1], width, overlap)


def _fixed(size: tuple[int, int], how: FixedSize, seen: tuple[int, int]) -> tuple[int, int]:
    """The size at which a network that takes inputs of `size` alone sees an image that another network would see at `seen`.

    For windows an image is enlarged until one fits; padding would show the network borders that it was not trained with.
    """
    if how == "resize":
        return size
    larger = max(1.0, size[0] / seen[0], size[1] / seen[1])
    return max(size[0], round(seen[0] * larger)), max(size[1], round(seen[1] * larger))


def _passes(short_side: int | None, size: tuple[int, int], options: TargetsParams) -> list[tuple[tuple[int, int], bool]]:
    """Of each pass the size at which the image is seen, and whether it is mirrored."""
    own = 1.0 if short_side is None else short_side / min(size)
    tta = options.tta or TtaParams(scales=[1.0], flip=False)
    return [
        ((max(1, round(size[0] * scale * own)), max(1, round(size[1] * scale * own))), flip)
        for scale in tta.scales
        for flip in ([False, True] if tta.flip else [False])
    ]


def _run(teacher: Teacher, inputs_B3HW: Tensor, flip: bool, precision: str) -> tuple[TeacherOutputs, tuple[int, int]]:
    """Logits of the data set's classes and features, float32, mirrored back; and the size of the padded input."""
    padded = pad_to_multiple(inputs_B3HW, teacher.multiple) if teacher.size is None else inputs_B3HW
    # The padded input is mirrored as a whole, so that the mirrored output has its cells at the same places.
    shown = (padded.flip(-1) if flip else padded).contiguous(memory_format=torch.channels_last)
    with torch.autocast(shown.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        outputs = teacher.network(shown)
    logits, features = (
        None if values is None else (values.flip(-1) if flip else values).float() for values in (outputs.logits, outputs.features)
    )
    if logits is not None and teacher.groups is not None:
        logits = data_classes(logits, teacher.groups)
    return TeacherOutputs(logits, features), (padded.shape[-2], padded.shape[-1])


class _Shown(NamedTuple):
    """What one window of a pass shows of the image along one axis, pixels."""

    size: int
    """of the image"""
    seen: int
    """of the image at the scale of this pass"""
    windows: Windows
    """over the scaled image"""
    number: int
    """of this window"""
    padded: int
    """of the network's input"""


def _weights(shown: list[_Shown], places: list[np.ndarray], values_BChw: Tensor, align_corners: bool) -> list[Tensor]:
    """For rows and columns (n, cells) weights that interpolate a window's output at places of the image, in its pixels, times the
    window's share: where windows overlap, their outputs are averaged."""
    matrices = []
    for axis, (window, pixels) in enumerate(zip(shown, places, strict=True)):
        scaled = (pixels + 0.5) * (window.seen / window.size) - 0.5
        cells, start = values_BChw.shape[2 + axis], window.windows.starts[window.number]
        # A window has no values beyond its outermost cells, and these see padding: the other windows speak there.
        counting = window.windows.counting(scaled, margin=_MARGIN * window.padded / cells)
        share = torch.from_numpy((counting[window.number] / counting.sum(0)).astype(np.float32))
        matrix = _interpolation(scaled - start, cells, window.padded, align_corners)
        matrices.append((matrix * share[:, None]).to(values_BChw.device))
    return matrices


def class_scores(logits_BKhw: Tensor, size: tuple[int, int]) -> Tensor:
    """The logits of `look` at every pixel of images of `size`: (B, K, H, W) float32."""
    rows, columns = (_pixel_weights(size, axis, logits_BKhw) for axis in (0, 1))
    return rows @ logits_BKhw @ columns.T


def pixel_means(logits_BKhw: Tensor, size: tuple[int, int]) -> Tensor:
    """Means of the upsampled logits over the pixels of the image, without its padding: (B, K)."""
    rows, columns = (_pixel_weights(size, axis, logits_BKhw).mean(0) for axis in (0, 1))
    return torch.einsum("bkhw,h,w->bk", logits_BKhw, rows, columns)


def at_cells(logits_BKhw: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """The logits of `look` at the cells of an image of `size` that lie `stride` pixels apart: (B, K, h', w'), bilinear."""
    if stride <= STRIDE:
        return logits_BKhw
    rows, columns = (_pixel_weights(size, axis, logits_BKhw, _cell_pixels(size, axis, stride)) for axis in (0, 1))
    return rows @ logits_BKhw @ columns.T


def largest_logits(logits_BKhw: Tensor, count: int) -> Tensor:
    """Keeps the `count` largest logits of each cell and sets the other logits to their mean: marginal smoothing, on logits.

    Source: Shen and Xing, A Fast Knowledge Distillation Framework for Visual Recognition, ECCV 2022.
    """
    others = logits_BKhw.shape[1] - count
    if others <= 0:
        return logits_BKhw
    kept = logits_BKhw.topk(count, dim=1)
    mean = (logits_BKhw.sum(1, keepdim=True) - kept.values.sum(1, keepdim=True)) / others
    return mean.expand_as(logits_BKhw).scatter(1, kept.indices, kept.values)


def _interpolation(pixels: np.ndarray, cells: int, frame: int, align_corners: bool) -> Tensor:
    """(n, cells) float32 weights of linear interpolation at n pixels of a frame of so many pixels that the cells span."""
    positions = Grid(np.array([[cells]]), np.array([[frame]]), align_corners).positions(pixels[None], 0)[0]
    low = np.minimum(np.floor(positions).astype(np.int64), max(cells - 2, 0))
    weight = positions - low
    matrix = np.zeros((len(positions), cells), dtype=np.float32)
    rows = np.arange(len(positions))
    np.add.at(matrix, (rows, low), 1 - weight)
    np.add.at(matrix, (rows, np.minimum(low + 1, cells - 1)), weight)
    return torch.from_numpy(matrix)


def _block_pixels(side: int, stride: int) -> np.ndarray:
    """The pixels of blocks of `stride` along one side. Blocks that reach over the image's border repeat its border pixel, so that
    block i is centred at pixel stride * (i + 1/2) - 1/2 of any image."""
    return np.minimum(np.arange(-(-side // stride) * stride), side - 1).astype(np.float64)


def _cell_pixels(size: tuple[int, int], axis: int, stride: int) -> np.ndarray:
    """The pixels, on one axis of an image of `size`, at which a cache's cells of `stride` pixels lie."""
    grid = output_grid([size], stride)
    return np.linspace(0, grid.frames[0, axis] - 1, grid.cells[0, axis])


def _pixel_weights(size: tuple[int, int], axis: int, logits_BKhw: Tensor, pixels: np.ndarray | None = None) -> Tensor:
    """(n, cells) weights that interpolate logits at a cache's cells of an image of `size` at these pixels, or at all pixels."""
    places = np.arange(size[axis], dtype=np.float64) if pixels is None else pixels
    frame = int(output_grid([size]).frames[0, axis])
    return _interpolation(places, logits_BKhw.shape[2 + axis], frame, align_corners=True).to(logits_BKhw.device)
