"""Whether masks lie on their photos: the edges of a mask that fits lie where the photo has edges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from mgd_pipeline.data.images import IGNORE, ORIENTATIONS, SWAPPING, turned

_FEWEST = 4
"""Masks that must be looked at before anything is said."""
_SHARE, CLEARLY = 0.75, 1.15
"""In so many of the masks another turn must fit better, by so much in the median."""


def contrast_at_edges(image: np.ndarray, mask: np.ndarray) -> float:
    """The mean brightness gradient of an image at the edges of a mask over its mean everywhere: 1 for a mask that does not fit.

    `image`: (H, W, 3) uint8. `mask`: (H, W) uint8; edges to void do not count. NaN for a mask without edges and a flat image.
    """
    grey = image.astype(np.float32).mean(2)
    down, across = np.abs(np.diff(grey, axis=0))[:, :-1], np.abs(np.diff(grey, axis=1))[:-1]
    here, below, right = mask[:-1, :-1], mask[1:, :-1], mask[:-1, 1:]
    known = here != IGNORE
    edges = known & (((here != below) & (below != IGNORE)) | ((here != right) & (right != IGNORE)))
    gradient = down + across
    if not edges.any() or not gradient.any():
        return float("nan")
    return float(gradient[edges].mean() / gradient.mean())


def gain_of_turn(image: np.ndarray, mask: np.ndarray, orientation: int) -> float:
    """How many times better the mask fits the image if it is turned as an EXIF orientation says; 1 where nothing can be told.

    `image`: (H, W, 3) uint8. `mask`: (H, W) uint8, square for a turn that exchanges height and width. Of CamVid's masks with all
    classes, turned by 180 degrees, none gains: the median is 0.43 and the largest 0.77. Single small objects may gain by chance.
    """
    plain = contrast_at_edges(image, mask)
    gain = contrast_at_edges(image, turned(mask, orientation)) / plain if plain > 0 else float("nan")
    return gain if np.isfinite(gain) else 1.0


def better_turn(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[int, int, int] | None:
    """An EXIF orientation, 2 to 8, that fits masks to their images better than none: (orientation, masks that it fits better, masks
    that were looked at). None where the masks fit, or where too few were looked at.

    `pairs`: images (H, W, 3) uint8 and masks (H, W) uint8. Turns that exchange height and width are tried on squares alone.
    """
    gains: dict[int, list[float]] = {orientation: [] for orientation in ORIENTATIONS}
    for image, mask in pairs:
        plain = contrast_at_edges(image, mask)
        if not np.isfinite(plain) or plain == 0:
            continue
        for orientation, measured in gains.items():
            if orientation not in SWAPPING or mask.shape[0] == mask.shape[1]:
                measured.append(contrast_at_edges(image, turned(mask, orientation)) / plain)
    better: Counter[int] = Counter()
    for orientation, measured in gains.items():
        if len(measured) >= _FEWEST and np.mean(np.array(measured) > 1) >= _SHARE and np.median(measured) >= CLEARLY:
            better[orientation] = int((np.array(measured) > 1).sum())
    if not better:
        return None
    best = max(better, key=lambda orientation: float(np.median(gains[orientation])))
    return best, better[best], len(gains[best])
