"""YOLO segmentation: `labels/<path>.txt` beside `images/<path>`, a line each: class x1 y1 x2 y2 ..., as shares of width and height.

Names come from data.yaml (or dataset.yaml) or classes.txt. Lines are drawn in the file's order.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mgd_pipeline.data.index import Note
from mgd_pipeline.data.labels.files import ImageFiles, missing_note, nfc, unconverted_note
from mgd_pipeline.data.labels.regions import NO_POLYGON, Drawing, Labels, Region, checked_name, polygon_of
from mgd_pipeline.data.listing import read_text
from mgd_pipeline.errors import DataError

_NOT_LABELS = ("classes.txt", "readme.roboflow.txt", "readme.dataset.txt", "readme.txt", "requirements.txt", "labelmap.txt")


def label_files(files: ImageFiles) -> dict[Path, Path]:
    """The label file of each image that has one."""
    texts = {nfc(path): path for path in files.with_suffix(".txt") if path.name.lower() not in _NOT_LABELS}
    places = {image: next((texts[place] for place in _places(nfc(image)) if place in texts), None) for image in files.images}
    return {image: place for image, place in places.items() if place is not None}


def is_yolo(files: ImageFiles) -> bool:
    """Whether there are label files, and either names of classes or a label file of numbers."""
    texts = sorted(label_files(files).values())
    return bool(texts) and (
        names_file(files) is not None or any("labels" in path.parts and _numbers(files.root / path) for path in texts)
    )


def _numbers(path: Path) -> bool:
    try:
        return re.match(rb"\s*\d+( [\d.eE+-]+){4,}\s", path.read_bytes() + b"\n") is not None
    except OSError:
        return False


def names_file(files: ImageFiles) -> Path | None:
    """The file with the names of the classes, nearest to the root: a YAML file with names, or else classes.txt or obj.names."""
    texts = [path for path in files.files if path.name in ("classes.txt", "obj.names")]
    named = [path for path in files.with_suffix(".yaml", ".yml") if _has_names(files.root / path)]
    return min(named or texts, key=lambda path: (path.name not in ("data.yaml", "data.yml"), len(path.parts), path), default=None)


def _has_names(path: Path) -> bool:
    """In whatever encoding: `read_names` says what it cannot read."""
    try:
        content = path.read_bytes().replace(b"\0", b"")  # of UTF-16
    except OSError:
        return False
    return re.search(rb"^(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff)?[\"']?names[\"']?\s*:", content, re.MULTILINE) is not None


def read_yolo(files: ImageFiles) -> Labels:
    """The labels of all label files. Raises DataError for a line that is none, and for a class without a name."""
    of = label_files(files)
    source = names_file(files)
    if source is None:
        raise DataError(f"{files.root}: has YOLO's labels, but no data.yaml (names: [...]) or classes.txt (a name a line); add it")
    names = read_names(files.root / source)
    without: Counter[str] = Counter()
    drawings = []
    for image, place in sorted(of.items()):
        regions, boxes = _regions(files.root / place, names, source.name)
        without.update(boxes)
        drawings.append(Drawing(image, tuple(regions), place))
    used = set(of.values())
    lonely = sorted(path for path in files.with_suffix(".txt") if "labels" in path.parts and path not in used)
    notes: list[Note] = [
        *missing_note(map(str, lonely), Path("labels/")),
        *unconverted_note(without, "labels/"),
    ]
    return Labels(tuple(drawings), tuple(names[key] for key in sorted(names)), {}, tuple(notes))


def _places(image: Path) -> list[Path]:
    """Where the labels of an image may lie: in the folder labels/ in place of the last images/, or beside the image."""
    parts = list(image.parent.parts)
    places = [image.with_suffix(".txt")]
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        places.insert(0, Path(*parts[:last], "labels", *parts[last + 1 :], image.with_suffix(".txt").name))
    return places


def read_names(path: Path) -> dict[int, str]:
    """The names of classes by id: `names` of a YAML file, or the lines of another file. Empty lines at its end and lines that begin
    with # do not count. Raises DataError for an empty line between names, and for two classes of one name.
    """
    try:
        text = read_text(path)
        content: Any = YAML(typ="safe").load(text) if path.suffix in (".yaml", ".yml") else None
    except (OSError, ValueError, YAMLError) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]}); correct it, save it as UTF-8") from None
    if path.suffix not in (".yaml", ".yml"):
        lines = [(count, line) for count, line in enumerate(text.rstrip().splitlines(), start=1) if not line.startswith("#")]
        if empty := [count for count, line in lines if not line.strip()]:
            raise DataError(f"{path}, line {empty[0]}: is empty; write the name of a class there, or remove the line")
        names = {key: checked_name(line, str(path)) for key, (_, line) in enumerate(lines)}
    else:
        given = content.get("names") if isinstance(content, dict) else None
        given = dict(enumerate(given)) if isinstance(given, list) else given
        if not isinstance(given, dict) or not given or not all(str(key).isdecimal() for key in given):
            raise DataError(f"{path}: has no list of names; add names: [first class, second class]")
        if isinstance(content.get("nc"), int) and content["nc"] != len(given):
            raise DataError(f"{path}: nc is {content['nc']}, but there are {len(given)} names; correct one of the two")
        names = {int(key): checked_name("" if given[key] is None else str(given[key]), str(path)) for key in sorted(given, key=int)}
    if not names:
        raise DataError(f"{path}: holds no name; write a name a line")
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise DataError(f"{path}: {twice[0]!r} stands twice; give each class a name of its own")
    return names


def _regions(path: Path, names: dict[int, str], source: str) -> tuple[list[Region], Counter[str]]:
    regions: list[Region] = []
    without: Counter[str] = Counter()
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); export the labels again") from None
    for count, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        try:
            key, numbers = int(float(words[0])), [float(word) for word in words[1:]]
        except (ValueError, OverflowError):
            raise DataError(f"{path}, line {count}: {line[:40]!r} is not a class and numbers; export the labels again") from None
        if key not in names:
            raise DataError(f"{path}, line {count}: class {key} has no name; there are {len(names)} names; correct {source}")
        if len(numbers) == 4:
            without["bounding box"] += 1
            continue
        if len(numbers) % 2 or any(not -0.01 <= number <= 1.01 for number in numbers):
            raise DataError(f"{path}, line {count}: needs pairs of numbers from 0 to 1 behind the class; export the labels again")
        polygon = polygon_of(np.reshape(numbers, (-1, 2)))
        if polygon:
            regions.append(Region(names[key], (polygon,), shares=True))
        else:
            without[NO_POLYGON] += 1
    return regions, without
