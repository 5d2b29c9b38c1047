"""COCO's JSON, as COCO, CVAT, Roboflow, Label Studio and Supervisely write it: polygons, run lengths, crowds.

A crowd (iscrowd) is drawn as its class. An annotation of a bounding box without a segmentation has no area and is left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

from mgd_pipeline.data.index import Note
from mgd_pipeline.data.labels.files import ImageFiles, as_expected, missing_note, read_json, split_of, twice, unconverted_note
from mgd_pipeline.data.labels.regions import (
    NO_POLYGON,
    Drawing,
    Labels,
    Region,
    bitmap_of,
    check_run_lengths,
    checked_name,
    polygon_of,
)
from mgd_pipeline.errors import DataError


def is_coco(content: Any) -> bool:
    keys = ("images", "annotations", "categories")
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in keys)


def read_coco(files: ImageFiles, sources: list[Path]) -> Labels:
    """The labels of COCO files; categories of one name are one class. Raises DataError for a file that contradicts itself."""
    drawings: dict[Path, Drawing] = {}
    names: dict[str, None] = {}
    notes: list[Note] = []
    for source in sources:
        content = read_json(files.root / source)
        where = str(files.root / source)
        if not is_coco(content):
            raise DataError(f"{where}: lacks images, annotations or categories; export COCO again")
        with as_expected(where):
            categories = _categories(content, where)
            names |= dict.fromkeys(categories.values())
            regions, without = _regions(content, categories, where)
            notes += unconverted_note(without, str(source))
            missing: list[str] = []
            for entry in content["images"]:
                path = files.named(entry["file_name"], source.parent, where, split_of(source))
                if path is None:
                    missing.append(entry["file_name"])
                elif path in drawings and drawings[path].regions and regions[entry["id"]]:
                    raise twice(where, path, drawings[path].source)
                elif path not in drawings or regions[entry["id"]]:
                    drawings[path] = Drawing(path, tuple(regions[entry["id"]]), source, (entry["height"], entry["width"]))
            notes += missing_note(missing, source)
    return Labels(tuple(drawings[path] for path in sorted(drawings)), tuple(names), {}, tuple(notes))


def _categories(content: dict[str, Any], where: str) -> dict[int, str]:
    """Names by id. Roboflow's first category is the name of the project: other categories lie below it, and nothing is of it."""
    entries = content["categories"]
    above = {entry.get("supercategory") for entry in entries if isinstance(entry, dict)}
    used = {annotation.get("category_id") for annotation in content["annotations"] if isinstance(annotation, dict)}
    names: dict[int, str] = {}
    for entry in entries:
        key = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(key, int):
            raise DataError(f"{where}: a category has the id {key!r}, which is not a whole number; export COCO again")
        project = entry.get("supercategory") == "none" and entry.get("name") in above and key not in used
        if not project:
            names[key] = checked_name(entry.get("name"), where)
    return dict(sorted(names.items()))


def _regions(content: dict[str, Any], categories: dict[int, str], where: str) -> tuple[dict[Any, list[Region]], Counter[str]]:
    """The regions by image id in the file's order, and the kinds of annotations without an area."""
    sizes: dict[Any, tuple[int, int]] = {}
    for entry in content["images"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str) or "id" not in entry:
            raise DataError(f"{where}: an image lacks id or file_name; export COCO again")
        height, width = entry.get("height"), entry.get("width")
        if not isinstance(height, int) or not isinstance(width, int) or height < 1 or width < 1:
            raise DataError(f"{where}: {entry['file_name']} has the size {width} x {height}; export COCO again")
        if entry["id"] in sizes:
            raise DataError(f"{where}: two images have the id {entry['id']!r}; export COCO again")
        sizes[entry["id"]] = (height, width)
    regions: dict[Any, list[Region]] = defaultdict(list)
    without: Counter[str] = Counter()
    for annotation in content["annotations"]:
        if isinstance(annotation, dict) and "segments_info" in annotation:
            raise DataError(f"{where}: is a COCO panoptic file, whose masks are PNGs; export instances (polygons or RLE) instead")
        if not isinstance(annotation, dict) or annotation.get("image_id") not in sizes:
            raise DataError(f"{where}: the image of an annotation is not listed: {_short(annotation)}; export again")
        if annotation.get("category_id") not in categories:
            raise DataError(f"{where}: the category of an annotation is not listed: {_short(annotation)}; export again")
        image, name = annotation["image_id"], categories[annotation["category_id"]]
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, dict):
            of = f"{where}: annotation {annotation.get('id')!r}"
            check_run_lengths(segmentation, sizes[image], of)
            regions[image].append(Region(name, bitmap=partial(bitmap_of, segmentation, sizes[image], of)))
        elif isinstance(segmentation, list) and segmentation:
            polygons = [polygon_of([flat[i : i + 2] for i in range(0, len(flat), 2)]) for flat in map(_flat, segmentation)]
            without[NO_POLYGON] += polygons.count(None)
            if any(polygons):
                regions[image].append(Region(name, tuple(polygon for polygon in polygons if polygon)))
        else:
            without["bounding box"] += 1
    return regions, without


def _flat(polygon: Any) -> list[Any]:
    return polygon if isinstance(polygon, list) else []


def _short(annotation: Any) -> str:
    keys = ("id", "image_id", "category_id")
    return str({key: annotation.get(key) for key in keys}) if isinstance(annotation, dict) else repr(annotation)[:60]
