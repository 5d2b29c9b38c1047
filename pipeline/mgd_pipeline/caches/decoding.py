"""The targets of one image as a person or a tool wants them: decoded, at their cells or at the image's pixels.

Letters: K classes, H W pixels of the image, h w cells.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from mgd_pipeline.caches.reader import TargetCache


def stored_logits(cache: TargetCache, row: int) -> tuple[np.ndarray, np.ndarray]:
    """(K, h, w) float32 logits of the frame, without the rest of the canvas, and the row's extents, (4,) int32."""
    extent, stride, (offset, scale) = cache.record("extents", row), cache.layout.stride, cache.record("logits_affine", row)
    values = cache.record("logits", row)[:, : extent[2] // stride, : extent[3] // stride].astype(np.float32)
    return values * scale + offset, extent


def stored_scores(cache: TargetCache, image_id: str) -> torch.Tensor:
    """(K, H, W) float32: the stored logits of an image at each of its pixels."""
    logits, extent = stored_logits(cache, cache.index.rows[cache.index.by_id[image_id]])
    height, width, frame_height, frame_width = (int(value) for value in extent)
    upsampled = F.interpolate(torch.from_numpy(logits)[None], (frame_height, frame_width), mode="bilinear", align_corners=True)
    return upsampled[0, :, :height, :width]


def stored_prediction(cache: TargetCache, image_id: str) -> np.ndarray:
    """(H, W) uint8: the most likely class at each pixel of an image."""
    return stored_scores(cache, image_id).argmax(0).to(torch.uint8).numpy()


def class_cells(cache: TargetCache, image_id: str) -> tuple[np.ndarray, np.ndarray]:
    """The most likely class, (h, w) uint8, and its probability, (h, w) float32, at each stored cell that shows the image."""
    logits, extent = stored_logits(cache, cache.index.rows[cache.index.by_id[image_id]])
    height, width = (-(-int(side) // cache.layout.stride) for side in extent[:2])
    logits = logits[:, :height, :width]
    largest = logits.max(0)
    return logits.argmax(0).astype(np.uint8), 1 / np.exp(logits - largest).sum(0)
