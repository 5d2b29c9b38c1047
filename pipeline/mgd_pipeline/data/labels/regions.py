"""What every annotation format is read into: images with regions, each of one class.

Coordinates are in pixels of the image as its annotator saw it: x to the right, y down, (0, 0) is the top left corner of the top
left pixel, so the centre of that pixel is (0.5, 0.5).

Regions are drawn in their order, and a later region covers an earlier one. Polygons become pixels by pycocotools' rasteriser, as in
COCO's evaluation and in CVAT's and Datumaro's exports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mgd_pipeline.data.index import Colour, Note
from mgd_pipeline.errors import DataError

Polygon = tuple[float, ...]
"""x0, y0, x1, y1 and so on, at least three points."""


NO_POLYGON = "polygon of fewer than three points"


@dataclass(frozen=True)
class Region:
    """Pixels of one class. Polygons are united, then holes are cut out, then the bitmap is added."""

    name: str
    polygons: tuple[Polygon, ...] = ()
    holes: tuple[Polygon, ...] = ()
    bitmap: np.ndarray | None = field(default=None, compare=False)
    """(h, w) bool."""
    corner: tuple[int, int] = (0, 0)
    """x and y of the bitmap's top left pixel."""


@dataclass(frozen=True)
class Drawing:
    """The regions of one image."""

    image: Path
    """Relative to the root of the data set."""
    regions: tuple[Region, ...]
    source: Path
    """The annotation file, relative to the root."""
    size: tuple[int, int] | None = None
    """Height and width in pixels that the annotation file says; None where it says none."""


@dataclass(frozen=True)
class Labels:
    """All drawings of a data set."""

    drawings: tuple[Drawing, ...]
    """Sorted by image; an image has at most one."""
    names: tuple[str, ...]
    """Names of the classes in the order of their file."""
    colours: Mapping[str, Colour] = field(default_factory=dict)
    """Colours of the annotation tool by name, where it has some."""
    notes: tuple[Note, ...] = ()


def draw(regions: tuple[Region, ...], ids: Mapping[str, int], size: tuple[int, int], background: int) -> np.ndarray:
    """(H, W) uint8: each pixel has the id of the last region that covers it, or `background`.

    `ids` has an id for each name that becomes a class; regions of other names are passed over. Raises DataError for a region that a
    rasteriser cannot draw.
    """
    mask = np.full(size, background, np.uint8)
    for region in regions:
        if region.name in ids:
            mask[pixels_of(region, size)] = ids[region.name]
    return mask


def pixels_of(region: Region, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the pixels of a region."""
    inside = _filled(region.polygons, size)
    if region.holes:
        inside &= ~_filled(region.holes, size)
    if region.bitmap is not None:
        x, y = region.corner
        height, width = region.bitmap.shape
        top, left = max(0, y), max(0, x)  # a brush may have gone over the edge of the image
        bottom, right = min(size[0], y + height), min(size[1], x + width)
        if bottom > top and right > left:
            inside[top:bottom, left:right] |= region.bitmap[top - y : bottom - y, left - x : right - x]
    return inside


def _filled(polygons: tuple[Polygon, ...], size: tuple[int, int]) -> np.ndarray:
    from pycocotools import mask as coco

    if not polygons:
        return np.zeros(size, bool)
    shapes: Any = [list(polygon) for polygon in polygons]
    return coco.decode(coco.merge(coco.frPyObjects(shapes, *size))).astype(bool)


def bitmap_of(rle: Mapping[str, Any], size: tuple[int, int], where: str) -> np.ndarray:
    """(H, W) bool from COCO's run lengths, compressed (text) or not (numbers). Raises DataError, which begins with `where`."""
    from pycocotools import mask as coco

    counts, stated = rle.get("counts"), rle.get("size")
    if not isinstance(stated, list) or tuple(stated) != size:
        raise DataError(f"{where}: a run-length mask of size {stated}, but the image has [{size[0]}, {size[1]}]; export it again")
    if isinstance(counts, list):
        if not all(isinstance(count, int) and count >= 0 for count in counts) or sum(counts) != size[0] * size[1]:
            raise DataError(f"{where}: run lengths do not add up to {size[0]} x {size[1]} pixels; export it again")
        values = np.arange(len(counts)) % 2 == 1
        return np.repeat(values, counts).reshape(size, order="F")
    if not isinstance(counts, str):
        raise DataError(f"{where}: run lengths are neither text nor a list of counts; export it again")
    try:
        pixels = coco.decode({"counts": counts.encode("ascii"), "size": list(size)})
    except (UnicodeEncodeError, ValueError) as error:
        raise DataError(f"{where}: run lengths cannot be decoded ({error}); export it again") from None
    return pixels.astype(bool)


def polygon_of(points: Any) -> Polygon | None:
    """A polygon from [[x, y], ...]; None for anything but three or more pairs of finite numbers."""
    try:
        pairs = np.asarray(points, np.float64)
    except (TypeError, ValueError):
        return None
    if pairs.ndim != 2 or pairs.shape[1] != 2 or len(pairs) < 3 or not (np.abs(pairs) < 1e9).all():
        return None
    return tuple(pairs.ravel().tolist())


def rectangle(left: float, top: float, right: float, bottom: float) -> Polygon:
    """The four corners as a polygon, whichever corners are given."""
    left, right = sorted((left, right))
    top, bottom = sorted((top, bottom))
    return (left, top, right, top, right, bottom, left, bottom)


def ellipse(x: float, y: float, radius_x: float, radius_y: float, turn: float = 0) -> Polygon:
    """64 points of an ellipse around (x, y), turned clockwise by `turn` degrees."""
    angles, turned = np.linspace(0, 2 * np.pi, 64, endpoint=False), np.deg2rad(turn)
    across, down = radius_x * np.cos(angles), radius_y * np.sin(angles)
    xs = x + across * np.cos(turned) - down * np.sin(turned)
    ys = y + across * np.sin(turned) + down * np.cos(turned)
    return tuple(np.stack([xs, ys], 1).ravel().tolist())


def checked_name(value: Any, where: str) -> str:
    """The name of a class; DataError where an annotation has none."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: an annotation has the class {value!r}; give it a name and export again")
    return value
