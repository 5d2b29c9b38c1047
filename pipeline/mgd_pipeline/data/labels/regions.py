"""What every annotation format is read into: images with regions, each of one class.

Coordinates are in pixels of the image as its annotator saw it: x to the right, y down, (0, 0) is the top left corner of the top
left pixel, so the centre of that pixel is (0.5, 0.5).

Regions are drawn in their order, and a later region covers an earlier one. Polygons become pixels by pycocotools' rasteriser, as in
COCO's evaluation and in CVAT's and Datumaro's exports.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
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
    bitmap: Callable[[], np.ndarray] | None = field(default=None, compare=False)
    """Decodes (h, w) bool when it is drawn: all bitmaps of a data set at once fill no memory. Raises DataError."""
    corner: tuple[int, int] = (0, 0)
    """x and y of the bitmap's top left pixel."""
    shares: bool = False
    """Whether coordinates of polygons are shares of the image's width and height, as in YOLO's files."""


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

    `ids` has an id for each name that becomes a class; regions of other names are passed over. Raises DataError for a bitmap that
    cannot be decoded.
    """
    mask = np.full(size, background, np.uint8)
    for region in regions:
        if region.name in ids:
            mask[pixels_of(region, size)] = ids[region.name]
    return mask


def pixels_of(region: Region, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the pixels of a region."""
    scale = (size[1], size[0]) if region.shares else (1, 1)
    inside = _filled(region.polygons, size, scale)
    if region.holes:
        inside &= ~_filled(region.holes, size, scale)
    if region.bitmap is not None:
        bitmap, (x, y) = region.bitmap(), region.corner
        height, width = bitmap.shape
        top, left = max(0, y), max(0, x)  # a brush may have gone over the edge of the image
        bottom, right = min(size[0], y + height), min(size[1], x + width)
        if bottom > top and right > left:
            inside[top:bottom, left:right] |= bitmap[top - y : bottom - y, left - x : right - x]
    return inside


def _filled(polygons: tuple[Polygon, ...], size: tuple[int, int], scale: tuple[int, int]) -> np.ndarray:
    from pycocotools import mask as coco

    shapes: Any = [_near(np.reshape(polygon, (-1, 2)) * scale, size).ravel().tolist() for polygon in polygons]
    shapes = [shape for shape in shapes if len(shape) >= 6]
    return coco.decode(coco.merge(coco.frPyObjects(shapes, *size))).astype(bool) if shapes else np.zeros(size, bool)


def _near(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(N, 2) points of a polygon without what lies further from the image than its own size: the rasteriser walks along all edges,
    pixel by pixel, and its numbers overflow. The pixels of the image stay the same.
    """
    for axis, side in ((0, size[1]), (1, size[0])):
        for sign, limit in ((1.0, 2.0 * side), (-1.0, 1.0 * side)):  # sign * x <= limit is kept
            over = sign * points[:, axis] - limit
            if not (over > 0).any():
                continue
            kept = []
            for here, there, out, out_there in zip(points, np.roll(points, -1, 0), over, np.roll(over, -1), strict=True):
                if out <= 0:
                    kept.append(here)
                if (out > 0) != (out_there > 0):
                    kept.append(here + (there - here) * (out / (out - out_there)))
            points = np.reshape(kept, (-1, 2))
    return points


def check_run_lengths(rle: Mapping[str, Any], size: tuple[int, int], where: str) -> None:
    """Raises DataError, which begins with `where`, for COCO's run lengths of another size, as far as is known without decoding."""
    counts, stated = rle.get("counts"), rle.get("size")
    if not isinstance(stated, list) or tuple(stated) != size:
        raise DataError(f"{where}: a run-length mask of size {stated}, but the image has [{size[0]}, {size[1]}]; export it again")
    if isinstance(counts, list):
        if not all(isinstance(count, int) and count >= 0 for count in counts) or sum(counts) != size[0] * size[1]:
            raise DataError(f"{where}: run lengths do not add up to {size[0]} x {size[1]} pixels; export it again")
    elif not isinstance(counts, str):
        raise DataError(f"{where}: run lengths are neither text nor a list of counts; export it again")


def bitmap_of(rle: Mapping[str, Any], size: tuple[int, int], where: str) -> np.ndarray:
    """(H, W) bool from COCO's run lengths, compressed (text) or not (numbers), that `check_run_lengths` knows. Raises DataError,
    which begins with `where`, for text that cannot be decoded.
    """
    from pycocotools import mask as coco

    counts: Any = rle["counts"]
    if isinstance(counts, list):
        return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size, order="F")
    try:
        packed: Any = {"counts": counts.encode("ascii"), "size": list(size)}
        pixels = coco.decode(packed)
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
    """The four corners as a polygon, whichever corners are given. Raises ValueError unless all numbers are finite."""
    _require_finite(left, top, right, bottom)
    left, right = sorted((left, right))
    top, bottom = sorted((top, bottom))
    return (left, top, right, top, right, bottom, left, bottom)


def _require_finite(*numbers: float) -> None:
    if not all(abs(number) < 1e9 for number in numbers):
        raise ValueError(f"{numbers} are not coordinates")


def ellipse(x: float, y: float, radius_x: float, radius_y: float, turn: float = 0) -> Polygon:
    """64 points of an ellipse around (x, y), turned clockwise by `turn` degrees. Raises ValueError for infinite numbers and NaN."""
    _require_finite(x, y, radius_x, radius_y, turn)
    angles, turned = np.linspace(0, 2 * np.pi, 64, endpoint=False), np.deg2rad(turn)
    across, down = radius_x * np.cos(angles), radius_y * np.sin(angles)
    xs = x + across * np.cos(turned) - down * np.sin(turned)
    ys = y + across * np.sin(turned) + down * np.cos(turned)
    return tuple(np.stack([xs, ys], 1).ravel().tolist())


def checked_name(value: Any, where: str) -> str:
    """The name of a class, NFC and without blanks around it; DataError where an annotation has none."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: an annotation has the class {value!r}; give it a name and export again")
    return unicodedata.normalize("NFC", value.strip())
