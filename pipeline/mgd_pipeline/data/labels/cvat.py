"""CVAT for images 1.1, an XML file: polygons, masks, boxes and ellipses, drawn in the order of z_order and then of the file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import ImageColor

from mgd_pipeline.data.index import Colour, Note
from mgd_pipeline.data.labels.files import ImageFiles, missing_note, unconverted_note
from mgd_pipeline.data.labels.regions import NO_POLYGON, Drawing, Labels, Region, checked_name, ellipse, polygon_of, rectangle
from mgd_pipeline.errors import DataError

_SHAPES = ("polygon", "mask", "box", "ellipse", "polyline", "points", "cuboid", "skeleton")


def read_cvat(files: ImageFiles, sources: list[Path]) -> Labels:
    """The labels of CVAT's XML files."""
    drawings: dict[Path, Drawing] = {}
    colours: dict[str, Colour] = {}
    notes: list[Note] = []
    for source in sources:
        where = str(files.root / source)
        try:
            top = ElementTree.parse(files.root / source).getroot()
        except (OSError, ElementTree.ParseError) as error:
            raise DataError(f"{where}: cannot be read ({error}); export CVAT for images 1.1 again") from None
        if top.tag != "annotations":
            raise DataError(f"{where}: begins with <{top.tag}>, not <annotations>; export CVAT for images 1.1 again")
        for label in top.iter("label"):
            name, colour = label.findtext("name"), label.findtext("color")
            if name and colour:
                colours[name] = ImageColor.getrgb(colour)[:3]
        missing: list[str] = []
        without: Counter[str] = Counter()
        for image in top.findall("image"):
            name = image.get("name") or ""
            path = files.named(name, source.parent, where)
            if path is None:
                missing.append(name)
                continue
            if path in drawings:
                raise DataError(f"{where}: {path} is annotated twice, in {drawings[path].source} too; remove one of the two")
            try:
                size = (int(image.get("height", "")), int(image.get("width", "")))
                shapes = sorted((one for one in image if one.tag in _SHAPES), key=lambda one: int(one.get("z_order", "0")))
                regions = [_region(shape, f"{where}: {name}") for shape in shapes]
            except (ValueError, TypeError) as error:
                raise (
                    error
                    if isinstance(error, DataError)
                    else DataError(f"{where}: {name} has a number that cannot be read ({error}); export CVAT for images 1.1 again")
                ) from None
            without.update(region for region in regions if isinstance(region, str))
            drawings[path] = Drawing(path, tuple(region for region in regions if isinstance(region, Region)), source, size)
        notes += missing_note(missing, source)
        notes += unconverted_note(without, source)
    names = colours or dict.fromkeys(sorted({region.name for one in drawings.values() for region in one.regions}))
    return Labels(tuple(drawings[path] for path in sorted(drawings)), tuple(names), colours, tuple(notes))


def _region(shape: ElementTree.Element, where: str) -> Region | str:
    """The region of a shape, or what the shape is that has no area."""
    name = checked_name(shape.get("label"), where)

    def number(key: str) -> float:
        return float(shape.get(key, "0"))

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
        size = int(shape.get("height", "0")), int(shape.get("width", "0"))
        counts = [int(word) for word in shape.get("rle", "").split(",") if word.strip()]
        if sum(counts) != size[0] * size[1]:
            raise DataError(f"{where}: the run lengths of a mask do not fill {size[0]} x {size[1]} pixels; export again")
        bitmap = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size)
        return Region(name, bitmap=bitmap, corner=(int(shape.get("left", "0")), int(shape.get("top", "0"))))
    return shape.tag
