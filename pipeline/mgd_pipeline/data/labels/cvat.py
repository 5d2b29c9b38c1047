"""CVAT for images 1.1, an XML file: polygons, masks, boxes and ellipses, drawn in the order of z_order and then of the file."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import ImageColor

from mgd_pipeline.data.index import Colour, Note
from mgd_pipeline.data.labels.files import ImageFiles, as_expected, missing_note, twice, unconverted_note
from mgd_pipeline.data.labels.regions import NO_POLYGON, Drawing, Labels, Region, checked_name, ellipse, polygon_of, rectangle
from mgd_pipeline.errors import DataError

_WITHOUT_AREA = ("polyline", "points", "cuboid", "skeleton", "tag")
"""Types of labels; the parts of a skeleton are points."""
_SHAPES = ("polygon", "mask", "box", "ellipse", "polyline", "points", "cuboid", "skeleton")


def read_cvat(files: ImageFiles, sources: list[Path]) -> Labels:
    """The labels of CVAT's XML files."""
    drawings: dict[Path, Drawing] = {}
    names: dict[str, str] = {}
    notes: list[Note] = []
    for source in sources:
        where = str(files.root / source)
        try:
            top = ElementTree.parse(files.root / source).getroot()
        except (OSError, ElementTree.ParseError) as error:
            raise DataError(f"{where}: cannot be read ({error}); export CVAT for images 1.1 again") from None
        if top.tag != "annotations":
            raise DataError(f"{where}: begins with <{top.tag}>, not <annotations>; export CVAT for images 1.1 again")
        if top.find("track") is not None and top.find("image") is None:
            raise DataError(f"{where}: is CVAT for video; export CVAT for images 1.1, which has the shapes of each frame")
        for label in top.iter("label"):
            name = label.findtext("name")
            if name and label.findtext("type") not in _WITHOUT_AREA:
                names[checked_name(name, where)] = label.findtext("color") or ""
        missing: list[str] = []
        without: Counter[str] = Counter()
        for image in top.findall("image"):
            name = image.get("name") or ""
            subset = image.get("subset", "")
            path = files.named(f"{subset}/{name}" if subset else name, source.parent, where)
            if path is None:
                missing.append(name)
                continue
            if path in drawings:
                raise twice(where, path, drawings[path].source)
            with as_expected(f"{where}: {name}"):
                size = (int(image.get("height", "")), int(image.get("width", "")))
                shapes = sorted((one for one in image if one.tag in _SHAPES), key=lambda one: int(one.get("z_order", "0")))
                regions = [_region(shape, f"{where}: {name}") for shape in shapes]
            without.update(region for region in regions if isinstance(region, str))
            drawings[path] = Drawing(path, tuple(region for region in regions if isinstance(region, Region)), source, size)
        notes += missing_note(missing, source)
        notes += unconverted_note(without, source)
    used = sorted({region.name for one in drawings.values() for region in one.regions})
    names |= {name: "" for name in used if name not in names}
    colours = {name: colour for name, text in names.items() if (colour := _colour(text)) is not None}
    return Labels(tuple(drawings[path] for path in sorted(drawings)), tuple(names), colours, tuple(notes))


def _colour(text: str) -> Colour | None:
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError:
        return None
    return red, green, blue


def _region(shape: ElementTree.Element, where: str) -> Region | str:
    """The region of a shape, or what the shape is that has no area."""
    name = checked_name(shape.get("label"), where)

    def number(key: str) -> float:
        return float(shape.get(key, "0" if key == "rotation" else f"no {key}"))

    if shape.tag == "polygon":
        polygon = polygon_of([[float(word) for word in pair.split(",")] for pair in shape.get("points", "").split(";") if pair])
        return Region(name, (polygon,)) if polygon else NO_POLYGON
    if shape.tag == "box":
        corners = np.reshape(rectangle(number("xtl"), number("ytl"), number("xbr"), number("ybr")), (-1, 2))
        middle, angle = corners.mean(0), np.deg2rad(number("rotation"))
        turned = (corners - middle) @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) + middle
        return Region(name, (tuple(turned.ravel().tolist()),))
    if shape.tag == "ellipse":
        return Region(name, (ellipse(number("cx"), number("cy"), number("rx"), number("ry"), number("rotation")),))
    if shape.tag == "mask":
        size, corner = (int(number("height")), int(number("width"))), (int(number("left")), int(number("top")))
        counts = [int(word) for word in shape.get("rle", "").split(",") if word.strip()]
        if min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
            raise DataError(f"{where}: the run lengths of a mask do not fill {size[0]} x {size[1]} pixels; export again")
        return Region(name, bitmap=partial(_bitmap, counts, size), corner=corner)
    return shape.tag


def _bitmap(counts: list[int], size: tuple[int, int]) -> np.ndarray:
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size)
