"""A weight of pixels by the rarity of their class."""

from __future__ import annotations

from torch import Tensor

from mgd_pipeline.distillation.weights import mean_one


def class_weight(labels: Tensor, shares: Tensor, *, strength: float = 0.5, valid: Tensor | None = None) -> Tensor:
    """share ** -strength of the class of each pixel, with mean 1 over valid pixels: (B, H, W) float32.

    `labels` are (B, H, W) int64 without 255, true or a teacher's; `shares` are (K,), of the labelled pixels, with any positive sum.
    Strength 0 weighs all pixels alike; with strength 1, classes of these shares count alike, however many pixels each has. A class
    without a share weighs as much as the rarest class that has one, because how rare it is, is not known.
    """
    known = shares.float().clamp(min=float(shares[shares > 0].min()))
    return mean_one(((known / known.max()) ** -strength).to(labels.device)[labels], valid)
