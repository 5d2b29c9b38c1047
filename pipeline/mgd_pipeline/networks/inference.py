"""From an image to class scores, and the sliding window of students and teachers.

Letters: K classes, H W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd_pipeline.networks.normalisation import Normalisation, in_order
from mgd_pipeline.networks.scaling import scale_down
from mgd_pipeline.networks.segmentation import run_branches

OVERLAP = 1 / 3
"""Default share of a window by which its neighbours overlap it."""


class Windows(NamedTuple):
    """Where a sliding window stops along one axis of an image, pixels. Where windows overlap, their outputs are averaged."""

    starts: list[int]
    """offsets, in increasing order; the last window ends at the border"""
    length: int
    """of each window"""

    def counting(self, positions: np.ndarray, margin: float = 0.0) -> np.ndarray:
        """(windows, n) bool: which windows count at n positions, in pixels: each that reaches `margin` pixels beyond the position.

        At a position where no window reaches so far, the window that reaches farthest counts.
        """
        centres = np.array(self.starts)[:, None] + (self.length - 1) / 2
        reach = self.length / 2 - np.abs(positions - centres)
        return reach >= np.minimum(margin, reach.max(0))


def windows(length: int, window: int | None, overlap: float) -> Windows:
    """Windows of `window` pixels that cover `length` pixels; None, or a window that is not smaller, makes a single one."""
    size = length if window is None else min(window, length)
    step = max(1, int(size * (1 - overlap)))
    return Windows([*range(0, length - size, step), length - size], size)


def to_input(image: np.ndarray, normalisation: Normalisation, device: torch.device) -> Tensor:
    """(H, W, 3) uint8 RGB to a normalised (1, 3, H, W) float32 on the device, channels in the network's order."""
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).to(device).permute(2, 0, 1)[None].float()
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (normalisation.mean, normalisation.std))
    return in_order((pixels - mean) / std, normalisation)


@torch.inference_mode()
def predict_logits(
    network: nn.Module,
    image: np.ndarray,
    normalisation: Normalisation,
    *,
    window: tuple[int, int] | None = None,
    overlap: float = OVERLAP,
) -> Tensor:
    """(H, W, 3) uint8 to (K, H, W) float32 logits on the network's device; the network must be in eval mode.

    With a `window` (height, width) in pixels, windows that overlap by the share `overlap` are predicted one by one, and their
    logits averaged where they overlap. (MGD's code sums them; the argmax is the same.)
    """
    if network.training:
        raise ValueError("predict_logits needs a network in eval mode: in training mode its output depends on its batch")
    pixels = to_input(image, normalisation, next(network.parameters()).device)
    height, width = image.shape[:2]
    tall, wide = window or (None, None)
    rows, columns = windows(height, tall, overlap), windows(width, wide, overlap)
    if len(rows.starts) == len(columns.starts) == 1:
        return run_padded(network, pixels)[0]
    total = None
    for top in rows.starts:
        for left in columns.starts:
            inside = (..., slice(top, top + rows.length), slice(left, left + columns.length))
            logits = run_padded(network, pixels[inside])[0]
            total = logits.new_zeros(len(logits), height, width) if total is None else total
            total[inside] += logits
    assert total is not None
    down, across = (axis.counting(np.arange(side)).sum(0) for axis, side in ((rows, height), (columns, width)))
    return total / torch.from_numpy(np.outer(down, across)).to(total)


def run_padded(network: nn.Module, pixels_B3HW: Tensor) -> Tensor:
    """(B, 3, H, W) normalised, any size, to (B, K, H, W) logits: padded, through the network, upsampled, cut back."""
    return run_branches([network], pixels_B3HW)[0]


def run_whole(network: nn.Module, images_B3HW: Tensor, mean: Tensor, std: Tensor, long_side: int | None) -> Tensor:
    """(B, 3, H, W) RGB in 0 to 255, any size, to (B, K, H, W) logits: what `Student.predict` does with a whole image.

    Images larger than `long_side` are scaled down to it, and their logits brought back. No step branches on the size.
    """
    seen = images_B3HW if long_side is None else scale_down(images_B3HW, long_side)
    logits = run_padded(network, (seen - mean) / std)
    return logits if long_side is None else as_large_as(logits, images_B3HW)


def as_large_as(logits_BKhw: Tensor, images_B3HW: Tensor) -> Tensor:
    """(B, K, h, w) to (B, K, H, W), half-pixel centres: from the scaled images back to the images."""
    return F.interpolate(logits_BKhw, size=images_B3HW.shape[-2:], mode="bilinear", align_corners=False)


def resize_logits(logits_KHW: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, H, W) to (K, *size), half-pixel centres: from the working size back to the image's own."""
    if tuple(logits_KHW.shape[-2:]) == tuple(size):
        return logits_KHW
    return F.interpolate(logits_KHW[None], size=size, mode="bilinear", align_corners=False)[0]
