"""What a frozen teacher says of whole images.

Letters: B batch, K classes, D channels, h w cells of the native grid, r c cells of the regions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mgd_pipeline.networks import (
    Normalisation,
    SegmentationNetwork,
    output_grid,
    pad_to_multiple,
)
from mgd_pipeline.prediction import to_input
from mgd_pipeline.targets import REGION_STRIDE, TeacherTargets
from mgd_pipeline.views import Grid


@torch.inference_mode()
def dense_targets(network: SegmentationNetwork, images: list[np.ndarray], normalise: Normalisation) -> list[TeacherTargets]:
    """Runs a teacher once over whole, un-augmented images of one size, each (H, W, 3) uint8.

    Raises ValueError if the network is not in eval mode: batch statistics would let an image's targets depend on its
    neighbours in the batch.
    """
    if network.training:
        raise ValueError("dense_targets needs a teacher in eval mode")
    device = next(network.parameters()).device
    size = images[0].shape[0], images[0].shape[1]
    pixels = pad_to_multiple(torch.cat([to_input(image, normalise, device) for image in images]))
    outputs = network(pixels)
    grid = output_grid([size])
    logits = outputs.logits.float()
    regions = region_means(outputs.features.float(), grid, size)
    descriptors = pixel_means(logits, grid, size)
    return [TeacherTargets(*(value.cpu().numpy() for value in values)) for values in zip(logits, regions, descriptors, strict=True)]


def interpolation_matrix(positions: np.ndarray, cells: int) -> Tensor:
    """(n, cells) float32 weights of linear interpolation at n cell coordinates in [0, cells - 1]."""
    low = np.minimum(np.floor(positions).astype(np.int64), max(cells - 2, 0))
    weight = positions - low
    matrix = np.zeros((len(positions), cells), dtype=np.float32)
    rows = np.arange(len(positions))
    np.add.at(matrix, (rows, low), 1 - weight)
    np.add.at(matrix, (rows, np.minimum(low + 1, cells - 1)), weight)
    return torch.from_numpy(matrix)


def region_means(features_BDhw: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
    """Means of the (bilinearly interpolated) features over 16 x 16 pixel blocks of an image: (B, D, ceil(H/16), ceil(W/16)).

    Blocks that reach over the image's border average its border pixel there, so that cell i is centred at pixel
    16 i + 7.5 whatever the image's size.
    """
    rows, columns = (_block_matrix(grid, axis, size[axis], features_BDhw.device) for axis in (0, 1))
    return rows @ features_BDhw @ columns.T


def _block_matrix(grid: Grid, axis: int, pixels: int, device: torch.device) -> Tensor:
    blocks = -(-pixels // REGION_STRIDE)
    source = np.minimum(np.arange(blocks * REGION_STRIDE), pixels - 1)[None].astype(np.float64)
    positions = grid.positions(source, axis)[0]
    matrix = interpolation_matrix(positions, int(grid.cells[0, axis]))
    return matrix.view(blocks, REGION_STRIDE, -1).mean(1).to(device)


def pixel_means(logits_BKhw: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
    """Means of the upsampled logits over the pixels of the image, without its padding: (B, K)."""
    weights = []
    for axis in (0, 1):
        positions = grid.positions(np.arange(size[axis], dtype=np.float64)[None], axis)[0]
        matrix = interpolation_matrix(positions, int(grid.cells[0, axis]))
        weights.append(matrix.mean(0).to(logits_BKhw.device))
    return torch.einsum("bkhw,h,w->bk", logits_BKhw, *weights)
