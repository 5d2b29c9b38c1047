"""From an image to class scores: whole, or by a sliding window.

Letters: K classes, H W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd_pipeline.networks.scaling import scale_down
from mgd_pipeline.networks.segmentation import Normalisation, in_order, pad_to_multiple, upsample

OVERLAP = 1 / 3
"""Share of a window by which its neighbours overlap it, where nobody says another."""


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

    With a `window` (height, width) in pixels, windows that overlap by the share `overlap` are predicted one by one and
    their logits averaged where they overlap (MGD sums them: the argmax is the same).
    """
    if network.training:
        raise ValueError("predict_logits needs a network in eval mode: in training mode its output depends on its batch")
    device = next(network.parameters()).device
    pixels = to_input(image, normalisation, device)
    height, width = image.shape[:2]
    if window is None or (height <= window[0] and width <= window[1]):
        return run_padded(network, pixels)[0]
    size = min(window[0], height), min(window[1], width)
    total, count = None, torch.zeros(height, width, device=device)
    for top in window_starts(height, size[0], overlap):
        for left in window_starts(width, size[1], overlap):
            inside = (..., slice(top, top + size[0]), slice(left, left + size[1]))
            logits = run_padded(network, pixels[inside])[0]
            if total is None:
                total = torch.zeros(logits.shape[0], height, width, device=device)
            total[inside] += logits
            count[inside] += 1
    assert total is not None
    return total / count


def run_padded(network: nn.Module, pixels_B3HW: Tensor) -> Tensor:
    """(B, 3, H, W) normalised, any size, to (B, K, H, W) logits: padded, through the network, upsampled, cut back."""
    height, width = pixels_B3HW.shape[-2:]
    padded = pad_to_multiple(pixels_B3HW)
    logits = network(padded).logits.float()
    return upsample(logits, (padded.shape[-2], padded.shape[-1]))[..., :height, :width]


def run_whole(network: nn.Module, images_B3HW: Tensor, mean: Tensor, std: Tensor, long_side: int | None) -> Tensor:
    """(B, 3, H, W) RGB in 0 to 255, any size, to (B, K, H, W) logits: what `Student.predict` does with a whole image.

    Larger images than `long_side` are scaled down to it, and their logits brought back. No step branches on the size.
    """
    if long_side is None:
        return run_padded(network, (images_B3HW - mean) / std)
    logits = run_padded(network, (scale_down(images_B3HW, long_side) - mean) / std)
    return as_large_as(logits, images_B3HW)


def as_large_as(logits_BKhw: Tensor, images_B3HW: Tensor) -> Tensor:
    """(B, K, h, w) to (B, K, H, W), half-pixel centres: from the scaled images back to the images."""
    return F.interpolate(logits_BKhw, size=images_B3HW.shape[-2:], mode="bilinear", align_corners=False)


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Offsets of windows that cover a length; the last one ends at the border."""
    step = max(1, int(window * (1 - overlap)))
    return [*range(0, length - window, step), length - window]


def resize_logits(logits_KHW: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, H, W) to (K, *size), half-pixel centres: from the working size back to the image's own."""
    if tuple(logits_KHW.shape[-2:]) == tuple(size):
        return logits_KHW
    return F.interpolate(logits_KHW[None], size=size, mode="bilinear", align_corners=False)[0]
