"""Supervisely: meta.json, and in each data set's folder img/<name> and ann/<name>.json. Objects are drawn in the file's order."""

from __future__ import annotations

import base64
import binascii
import io
import zlib
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from mgd_pipeline.data.index import Colour, Note
from mgd_pipeline.data.labels.files import ImageFiles, as_expected, missing_note, read_json, unconverted_note
from mgd_pipeline.data.labels.regions import NO_POLYGON, Drawing, Labels, Region, checked_name, polygon_of, rectangle
from mgd_pipeline.errors import DataError


def is_supervisely(content: Any) -> bool:
    """Whether this is the content of meta.json."""
    classes = content.get("classes") if isinstance(content, dict) else None
    return isinstance(classes, list) and bool(classes) and all(isinstance(one, dict) and "title" in one for one in classes)


def read_supervisely(files: ImageFiles, meta: Path) -> Labels:
    """The labels of a project whose meta.json is given. Raises DataError for an object of a class that meta.json does not list."""
    where = str(files.root / meta)
    content = read_json(files.root / meta)
    if not is_supervisely(content):
        raise DataError(f"{where}: has no list of classes with titles; export the project again")
    names = {one["title"]: checked_name(one["title"], where) for one in content["classes"]}
    colours: dict[str, Colour] = {}
    for one in content["classes"]:
        name = names[one["title"]]
        try:
            colours[name] = ImageColor.getrgb(str(one.get("color", "")))[:3]
        except ValueError:
            raise DataError(f"{where}: class {name!r} has the colour {one.get('color')!r}; write it as #RRGGBB") from None
    drawings, missing = [], []
    without: Counter[str] = Counter()
    for source in sorted(path for path in files.with_suffix(".json") if path.parent.name == "ann"):
        image = files.named(source.stem, source.parent.parent, str(files.root / source))
        if image is None:
            missing.append(source.stem)
            continue
        drawing, further = _drawing(files.root, source, image, names)
        drawings.append(drawing)
        without += further
    notes: list[Note] = [*missing_note(missing, Path("the folders ann/")), *unconverted_note(without, "the folders ann/")]
    return Labels(tuple(sorted(drawings, key=lambda drawing: drawing.image)), tuple(colours), colours, tuple(notes))


def _drawing(root: Path, source: Path, image: Path, names: Mapping[str, str]) -> tuple[Drawing, Counter[str]]:
    where, content = str(root / source), read_json(root / source)
    with as_expected(where):
        size = (int(content["size"]["height"]), int(content["size"]["width"]))
        regions: list[Region] = []
        without: Counter[str] = Counter()
        for entry in content["objects"]:
            title, kind = entry["classTitle"], entry.get("geometryType")
            if title not in names:
                raise DataError(
                    f"{where}: an object has the class {title!r}, which meta.json does not list; export the project again"
                )
            name = names[title]
            points = entry.get("points") or {}
            outside = points.get("exterior") or []
            if kind == "bitmap":
                x, y = entry["bitmap"]["origin"]
                regions.append(Region(name, bitmap=partial(_bitmap, entry["bitmap"].get("data"), where), corner=(int(x), int(y))))
            elif kind == "polygon" and (polygon := polygon_of(outside)):
                holes = tuple(hole for hole in map(polygon_of, points.get("interior") or []) if hole)
                regions.append(Region(name, (polygon,), holes))
            elif kind == "rectangle" and len(outside) == 2:
                regions.append(Region(name, (rectangle(*outside[0], *outside[1]),)))
            else:
                without[NO_POLYGON if kind == "polygon" else str(kind)] += 1
    return Drawing(image, tuple(regions), source, size), without


def _bitmap(text: Any, where: str) -> np.ndarray:
    """(h, w) bool of a PNG, deflated and in base64; its alpha channel counts where it has one."""
    try:
        with Image.open(io.BytesIO(zlib.decompress(base64.b64decode(text))), formats=["PNG"]) as picture:
            return (
                np.asarray(picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else picture.convert("L")) > 0
            )
    except (binascii.Error, TypeError, ValueError, OSError, zlib.error) as error:
        raise DataError(f"{where}: a bitmap cannot be decoded ({error}); export the project again") from None
