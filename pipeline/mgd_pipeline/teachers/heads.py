"""Heads on cached embeddings: small networks that make logits from the region embeddings of a teacher cache.

The teacher behind the cache is neither built nor read. Letters: B batch, D channels, K classes, r c cells of the regions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mgd_pipeline.params import HeadTeacher


class Head(nn.Module):
    """(B, D, r, c) float32 embeddings to (B, K, r, c) logits at the same cells.

    The images of a batch have one size, so that a convolution pads each image at its own border and nowhere else.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, params: HeadTeacher, channels: int, classes: int) -> None:
        super().__init__()
        hidden = params.hidden
        match params.head:
            case "linear":
                layers = [nn.Conv2d(channels, classes, 1)]
            case "mlp":
                layers = [nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, classes, 1)]
            case "conv":
                # GroupNorm, because batches of images of one size may have one image only.
                first = [nn.Conv2d(channels, hidden, 3, padding=1), nn.GroupNorm(1, hidden), nn.ReLU()]
                second = [nn.Conv2d(hidden, hidden, 3, padding=1), nn.GroupNorm(1, hidden), nn.ReLU()]
                layers = [*first, *second, nn.Conv2d(hidden, classes, 1)]
        self.layers = nn.Sequential(*layers)
        # A part of the network and not folded into its weights: the padding of a convolution is 0 after it, the mean embedding.
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, embeddings_BDrc: Tensor) -> Tensor:
        return self.layers((embeddings_BDrc - self.mean) / self.std)
