"""LabelMe: a JSON file for each image, beside it or in a folder of its own. Shapes are drawn in the file's order."""

from __future__ import annotations

import base64
import binascii
import io
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mgd_pipeline.data.index import Note
from mgd_pipeline.data.labels.files import ImageFiles, as_expected, missing_note, nfc, read_json, twice, unconverted_note
from mgd_pipeline.data.labels.regions import NO_POLYGON, Drawing, Labels, Region, checked_name, ellipse, polygon_of, rectangle
from mgd_pipeline.errors import DataError

_POLYGONS = ("polygon", "rotation", "oriented_rectangle")  # the last two have four corners


def is_labelme(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("shapes"), list) and "imagePath" in content


def read_labelme(files: ImageFiles, sources: list[Path]) -> Labels:
    """The labels of LabelMe's files. Names are in the order of the alphabet, because no file lists them all."""
    drawings: dict[Path, Drawing] = {}
    missing: list[str] = []
    without: Counter[str] = Counter()
    for source in sources:
        where = str(files.root / source)
        content = read_json(files.root / source)
        if not is_labelme(content):
            raise DataError(f"{where}: lacks shapes or imagePath; remove the file or export LabelMe again")
        with as_expected(where):
            beside = _beside(files, source)
            path = files.named(str(content["imagePath"]), source.parent, where) or beside
            if beside is not None and path != beside:
                raise DataError(
                    f"{where}: is called like {beside.name}, but its imagePath is {path}; correct imagePath or rename the file"
                )
            if path is None:
                missing.append(str(content["imagePath"]))
                continue
            if path in drawings:
                raise twice(where, path, drawings[path].source)
            shapes = [_region(shape, where) for shape in content["shapes"]]
            without.update(shape for shape in shapes if isinstance(shape, str))
            size = (content.get("imageHeight"), content.get("imageWidth"))
            stated = (int(size[0]), int(size[1])) if all(isinstance(side, int) and side > 0 for side in size) else None  # pyright: ignore
            drawings[path] = Drawing(path, tuple(shape for shape in shapes if isinstance(shape, Region)), source, stated)
    names = sorted({region.name for drawing in drawings.values() for region in drawing.regions})
    notes: list[Note] = [*missing_note(missing, Path("LabelMe's JSON")), *unconverted_note(without, "LabelMe's JSON")]
    return Labels(tuple(drawings[path] for path in sorted(drawings)), tuple(names), {}, tuple(notes))


def _beside(files: ImageFiles, source: Path) -> Path | None:
    """The image that has the file's own name: whoever renames photos rarely renames `imagePath`."""
    same = files.by_stem.get(nfc(source).with_suffix(""), [])
    return same[0] if len(same) == 1 else None


def _region(shape: Any, where: str) -> Region | str:
    """The region of a shape, or what the shape is that has no area."""
    if not isinstance(shape, dict):
        raise DataError(f"{where}: a shape is {shape!r}; export LabelMe again")
    name, points = checked_name(shape.get("label"), where), shape.get("points")
    kind = shape.get("shape_type") or "polygon"
    if kind in _POLYGONS:
        polygon = polygon_of(points)
        return Region(name, (polygon,)) if polygon else NO_POLYGON
    if kind in ("rectangle", "circle", "mask"):
        corners = np.asarray(points, np.float64) if isinstance(points, list) else np.empty(0)
        if corners.shape != (2, 2) and not (kind == "rectangle" and corners.shape == (4, 2)):
            raise DataError(f"{where}: a {kind} of {name!r} has not two points; correct it in LabelMe")
        (x0, y0), (x1, y1) = corners.min(0).tolist(), corners.max(0).tolist()
        if kind == "rectangle":
            return Region(name, (rectangle(x0, y0, x1, y1),))
        if kind == "circle":
            radius = float(np.hypot(*(corners[1] - corners[0])))
            x, y = corners[0].tolist()
            return Region(name, (ellipse(x, y, radius, radius),))
        return Region(name, bitmap=partial(_mask, shape.get("mask"), where), corner=(round(x0), round(y0)))
    return str(kind)


def _mask(text: Any, where: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            return np.asarray(image.convert("L")) > 0
    except (binascii.Error, TypeError, ValueError, OSError) as error:
        raise DataError(f"{where}: the picture of a mask cannot be decoded ({error}); draw it again in LabelMe") from None
