"""What a frozen teacher says of whole images.

Letters: B batch, K classes, D channels, h w cells of the native grid, r c cells of the regions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mgd_pipeline.images import resize_image
from mgd_pipeline.networks import STRIDE, Normalisation, SegmentationNetwork, output_grid, pad_to_multiple
from mgd_pipeline.params import TargetsParams, TtaParams
from mgd_pipeline.prediction import to_input
from mgd_pipeline.targets import TeacherTargets

_ONE_PASS = TtaParams(scales=[1.0], flip=False)


@torch.inference_mode()
def dense_targets(
    network: SegmentationNetwork, images: list[np.ndarray], normalise: Normalisation, options: TargetsParams
) -> list[TeacherTargets]:
    """Runs a teacher over whole images of one size, each (H, W, 3) uint8: once un-augmented, or as `options.tta` says.

    Raises ValueError if the network is not in eval mode: batch statistics would let an image's targets depend on its
    neighbours in the batch.
    """
    if network.training:
        raise ValueError("dense_targets needs a teacher in eval mode")
    device = next(network.parameters()).device
    size = images[0].shape[0], images[0].shape[1]

    # --- the mean of all passes, each at the cells of the image's own grid
    tta = options.tta or _ONE_PASS
    passes = [(scale, flip) for scale in tta.scales for flip in ([False, True] if tta.flip else [False])]
    logits = regions = torch.zeros((), device=device)
    for scale, flip in passes:
        seen = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        pixels = pad_to_multiple(torch.cat([to_input(resize_image(image, *seen), normalise, device) for image in images]))
        # The padded input is mirrored as a whole, so that its cells lie where those of the mirrored output lie.
        outputs = network(pixels.flip(-1) if flip else pixels)
        found = [(values.flip(-1) if flip else values).float() for values in (outputs.logits, outputs.features)]
        logits = logits + at_cells(found[0], size, STRIDE, seen) / len(passes)
        regions = regions + region_means(found[1], size, options.region_stride, seen) / len(passes)

    # --- what is kept of them
    descriptors = pixel_means(logits, size)
    logits = at_cells(logits, size, options.stride, size)
    if options.top_k is not None:
        logits = largest_logits(logits, options.top_k)
    return [TeacherTargets(*(value.cpu().numpy() for value in values)) for values in zip(logits, regions, descriptors, strict=True)]


def largest_logits(logits_BKhw: Tensor, count: int) -> Tensor:
    """Keeps the `count` largest logits of each cell and sets the others to their mean: marginal smoothing, on logits.

    Source: Shen and Xing, A Fast Knowledge Distillation Framework for Visual Recognition, ECCV 2022.
    """
    others = logits_BKhw.shape[1] - count
    if others <= 0:
        return logits_BKhw
    kept = logits_BKhw.topk(count, dim=1)
    mean = (logits_BKhw.sum(1, keepdim=True) - kept.values.sum(1, keepdim=True)) / others
    return mean.expand_as(logits_BKhw).scatter(1, kept.indices, kept.values)


def interpolation_matrix(positions: np.ndarray, cells: int) -> Tensor:
    """(n, cells) float32 weights of linear interpolation at n cell coordinates in [0, cells - 1]."""
    low = np.minimum(np.floor(positions).astype(np.int64), max(cells - 2, 0))
    weight = positions - low
    matrix = np.zeros((len(positions), cells), dtype=np.float32)
    rows = np.arange(len(positions))
    np.add.at(matrix, (rows, low), 1 - weight)
    np.add.at(matrix, (rows, np.minimum(low + 1, cells - 1)), weight)
    return torch.from_numpy(matrix)


def at_cells(values_BChw: Tensor, size: tuple[int, int], stride: int, seen: tuple[int, int]) -> Tensor:
    """A network's outputs at the cells of an image of `size` that lie `stride` pixels apart: (B, C, h', w'), bilinear.

    `seen` is the image's size as the network saw it. Corners are aligned with the padded image, h' = its height / stride.
    """
    if seen == size and stride == STRIDE:
        return values_BChw
    frame = output_grid([size]).frames[0]
    rows, columns = (
        _at_pixels(np.linspace(0, frame[axis] - 1, frame[axis] // stride), axis, size, seen).to(values_BChw.device)
        for axis in (0, 1)
    )
    return rows @ values_BChw @ columns.T


def region_means(features_BDhw: Tensor, size: tuple[int, int], stride: int, seen: tuple[int, int]) -> Tensor:
    """Means of the interpolated features over blocks of stride x stride pixels: (B, D, ceil(H / stride), ceil(W / stride)).

    The blocks are those of the image at `size`; `seen` is its size as the network saw it. Blocks that reach over the
    image's border average its border pixel there, so that cell i is centred at pixel stride * (i + 1/2) - 1/2 of any image.
    """
    matrices = []
    for axis in (0, 1):
        blocks = -(-size[axis] // stride)
        pixels = np.minimum(np.arange(blocks * stride), size[axis] - 1).astype(np.float64)
        matrices.append(_at_pixels(pixels, axis, size, seen).view(blocks, stride, -1).mean(1).to(features_BDhw.device))
    return matrices[0] @ features_BDhw @ matrices[1].T


def pixel_means(logits_BKhw: Tensor, size: tuple[int, int]) -> Tensor:
    """Means of the upsampled logits over the pixels of the image, without its padding: (B, K)."""
    rows, columns = (
        _at_pixels(np.arange(size[axis], dtype=np.float64), axis, size, size).mean(0).to(logits_BKhw.device) for axis in (0, 1)
    )
    return torch.einsum("bkhw,h,w->bk", logits_BKhw, rows, columns)


def _at_pixels(pixels: np.ndarray, axis: int, size: tuple[int, int], seen: tuple[int, int]) -> Tensor:
    """(n, cells) weights that interpolate a network's outputs at n pixels of an image of `size` that it saw at size `seen`."""
    grid = output_grid([seen])
    scaled = (pixels + 0.5) * (seen[axis] / size[axis]) - 0.5
    return interpolation_matrix(grid.positions(scaled[None], axis)[0], int(grid.cells[0, axis]))
