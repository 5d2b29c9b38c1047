"""A weight of pixels by the rarity of their class."""

from __future__ import annotations

import torch
from torch import Tensor

from mgd_pipeline.distillation.weights import mean_one


def class_weight(labels: Tensor, shares: Tensor, *, strength: float = 0.5, valid: Tensor | None = None) -> Tensor:
    """share ** -strength of the class of each pixel, with mean 1 over valid pixels: (B, H, W) float32.

    `labels` are (B, H, W) int64 without 255, true or a teacher's; `shares` are (K,) float, of the labelled pixels, with any
    positive sum, on the same device. Strength 0 weighs all pixels alike; with strength 1, classes of these shares count alike,
    however many pixels each has. A class without a share weighs as much as the rarest class that has one, because how rare it is,
    is not known.
    """
    rarest = torch.where(shares > 0, shares, torch.inf).amin()  # on its device: a step of training waits for nothing
    known = torch.maximum(shares, rarest).float()
    return mean_one(((known / known.amax()) ** -strength)[labels], valid)
