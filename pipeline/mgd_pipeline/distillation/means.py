"""The one rule of every mean: over valid pixels, each distance times its pixel's weight."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over True; 0 with a zero gradient if nothing is True, so an empty term never makes NaN."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def pixel_mean(distances_BHW: Tensor, valid_BHW: Tensor | None, weight_BHW: Tensor | None) -> Tensor:
    """Sum of weight * distance over valid pixels, divided by their number; the weight passes no gradient on."""
    valid = torch.ones_like(distances_BHW, dtype=torch.bool) if valid_BHW is None else valid_BHW
    return masked_mean(distances_BHW if weight_BHW is None else distances_BHW * weight_BHW.detach().float(), valid)
