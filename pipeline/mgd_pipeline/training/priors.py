"""Shares of the classes among the labelled pixels, for logit adjustment.

Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, section 4.1.
"""

from __future__ import annotations

import numpy as np
import torch

from mgd_pipeline.data.manifest import Manifest
from mgd_pipeline.networks.segmentation import SegmentationNetwork


def labelled_pixels(manifest: Manifest) -> np.ndarray:
    """How many pixels of the labelled images each class has, (K,) int64."""
    counts = [np.bincount(manifest.mask(row).ravel(), minlength=256) for row in manifest.labelled]
    return np.sum(counts, 0)[: len(manifest.classes)]


def log_prior(pixels_K: np.ndarray) -> torch.Tensor:
    """Log of each class's share of the pixels, (K,) float32; 0 for a class without pixels, because its share is not known."""
    return torch.as_tensor(np.log(np.where(pixels_K, pixels_K / max(1, pixels_K.sum()), 1.0)), dtype=torch.float32)


def adjust_logits(network: SegmentationNetwork, pixels_K: np.ndarray, weight: float) -> None:
    """Takes weight * log(share of the pixels) off each class's logit, for good: it becomes part of the last layer's bias.

    Post-hoc logit adjustment (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, section 4.1). The logit of a
    class without pixels does not change.
    """
    bias = network.model.segmentation_head[0].bias
    with torch.no_grad():
        bias -= weight * log_prior(pixels_K).to(bias)
