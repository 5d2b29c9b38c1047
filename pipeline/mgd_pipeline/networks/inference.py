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
from mgd_pipeline.networks.segmentation import pad_to_multiple, upsample

OVERLAP = 1 / 3
"""Default share of a window by which its neighbours overlap it."""


class Windows(NamedTuple):
    """Where a sliding window stops along one axis of an image, pixels. Where windows overlap, the nearest centre counts:
    that window shows most of a pixel's surroundings."""

    starts: list[int]
    """offsets, in increasing order; the last window ends at the border"""
    length: int
    """of each window"""

    def nearest(self, positions: np.ndarray) -> np.ndarray:
        """(n,) positions in pixels to (n,) int64 numbers of the windows whose centres are nearest; the first of two equals."""
        centres = np.array(self.starts) + (self.length - 1) / 2
        return np.abs(positions - centres[:, None]).argmin(0)

    def runs(self, length: int) -> list[slice]:
        """The pixels of `length` for which each window counts, from the window's own start."""
        ends = np.searchsorted(self.nearest(np.arange(length)), np.arange(len(self.starts)), side="right").tolist()
        return [slice(first - start, end - start) for start, first, end in zip(self.starts, [0, *ends], ends, strict=False)]


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

    With a `window` (height, width) in pixels, windows that overlap by the share `overlap` are predicted one by one, and each
    pixel is taken from the window whose centre is nearest. (MGD's code sums the logits of all windows.)
    """
    if network.training:
        raise ValueError("predict_logits needs a network in eval mode: in training mode its output depends on its batch")
    pixels = to_input(image, normalisation, next(network.parameters()).device)
    rows, columns = (windows(image.shape[axis], None if window is None else window[axis], overlap) for axis in (0, 1))
    strips = []
    for top, inner_rows in zip(rows.starts, rows.runs(image.shape[0]), strict=True):
        seen = (pixels[..., top : top + rows.length, left : left + columns.length] for left in columns.starts)
        logits = (run_padded(network, shown)[0] for shown in seen)
        runs = columns.runs(image.shape[1])
        strips.append(torch.cat([part[:, inner_rows, run] for part, run in zip(logits, runs, strict=True)], -1))
    return torch.cat(strips, -2)


def run_padded(network: nn.Module, pixels_B3HW: Tensor) -> Tensor:
    """(B, 3, H, W) normalised, any size, to (B, K, H, W) logits: padded, through the network, upsampled, cut back."""
    height, width = pixels_B3HW.shape[-2:]
    padded = pad_to_multiple(pixels_B3HW)
    logits = network(padded).logits.float()
    return upsample(logits, (padded.shape[-2], padded.shape[-1]))[..., :height, :width]


def run_whole(network: nn.Module, images_B3HW: Tensor, mean: Tensor, std: Tensor, long_side: int | None) -> Tensor:
    """(B, 3, H, W) RGB in 0 to 255, any size, to (B, K, H, W) logits: what `Student.predict` does with a whole image.

    Images larger than `long_side` are scaled down to it, and their logits brought back. No step branches on the size.
    """
    if long_side is None:
        return run_padded(network, (images_B3HW - mean) / std)
    logits = run_padded(network, (scale_down(images_B3HW, long_side) - mean) / std)
    return as_large_as(logits, images_B3HW)


def as_large_as(logits_BKhw: Tensor, images_B3HW: Tensor) -> Tensor:
    """(B, K, h, w) to (B, K, H, W), half-pixel centres: from the scaled images back to the images."""
    return F.interpolate(logits_BKhw, size=images_B3HW.shape[-2:], mode="bilinear", align_corners=False)


def resize_logits(logits_KHW: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, H, W) to (K, *size), half-pixel centres: from the working size back to the image's own."""
    if tuple(logits_KHW.shape[-2:]) == tuple(size):
        return logits_KHW
    return F.interpolate(logits_KHW[None], size=size, mode="bilinear", align_corners=False)[0]
