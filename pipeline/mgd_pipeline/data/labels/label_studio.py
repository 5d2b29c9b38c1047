"""Label Studio's JSON and JSON-MIN: brushes, bitmasks, polygons, rectangles and ellipses; later results cover earlier ones.

Coordinates are per cent of the image. A brush is RGBA in thi.ng's rle-pack, a bitmask is a PNG in a data URL; the fourth channel
says which pixels are painted (https://labelstud.io/tags/bitmasklabels).
"""

from __future__ import annotations

import base64
import io
import re
import unicodedata
import urllib.parse
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mgd_pipeline.data.index import Note
from mgd_pipeline.data.labels.files import ImageFiles, as_expected, missing_note, read_json, twice, unconverted_note
from mgd_pipeline.data.labels.regions import NO_POLYGON, Drawing, Labels, Region, checked_name, ellipse, polygon_of, rectangle
from mgd_pipeline.errors import DataError
from mgd_pipeline.words import verb

_IMAGE = re.compile(r"\.(jpe?g|jfif|png|bmp|webp|tiff?|avif|heic|heif)([?#].*)?$", re.I)
_EXPORTED = {"annotations", "completions", "annotation_id", "annotator"}
"""Keys of a task, the last two in JSON-MIN, that other lists of images lack."""
PNG_EXPORT = re.compile(r"task-\d+-annotation-\d+-.*-tag-.+\.png", re.I)
"""Names of the masks that Label Studio exports; they name their photos by the number of a task, which stands in the JSON alone."""
_KINDS = {"brushlabels", "bitmasklabels", "polygonlabels", "rectanglelabels", "ellipselabels"}


def is_label_studio(content: Any) -> bool:
    tasks = content if isinstance(content, list) else []
    return bool(tasks) and all(isinstance(task, dict) and _EXPORTED & task.keys() and _image_of(task) for task in tasks)


def read_label_studio(files: ImageFiles, sources: list[Path]) -> Labels:
    """The labels of exports. Of several annotations of an image one counts: a ground truth, or else the first with a region."""
    drawings: dict[Path, Drawing] = {}
    notes: list[Note] = []
    uploads = _uploads(files)
    for source in sources:
        where = str(files.root / source)
        content = read_json(files.root / source)
        if not is_label_studio(content):
            raise DataError(f"{where}: is no list of tasks with an image; export JSON from Label Studio again")
        missing: list[str] = []
        without: Counter[str] = Counter()
        several: list[Path] = []
        with as_expected(where):
            for task in content:
                name = _image_of(task)
                path = _find(files, uploads, name, source.parent, where)
                if path is None:
                    missing.append(name)
                    continue
                if path in drawings and drawings[path].source != source:
                    raise twice(where, path, drawings[path].source)
                results, count = _results(task)
                if count > 1 or path in drawings:  # JSON-MIN has an entry for each annotation
                    several.append(path)
                if path in drawings and (drawings[path].regions or not results):
                    continue
                regions = [_region(result, f"{where}: {name}") for result in results]
                without.update(region for region in regions if isinstance(region, str))
                size = next((_size(result) for result in results if _size(result)), None)
                drawings[path] = Drawing(path, tuple(region for region in regions if isinstance(region, Region)), source, size)
        notes += missing_note(missing, source)
        notes += unconverted_note(without, source)
        if several:
            have = verb(len(several), "image has", "images have")
            text = f"{source}: {len(several)} {have} several annotations, such as {several[0]}: the first one counts"
            notes.append(Note(text, "mark the right one as ground truth in Label Studio and export JSON to choose it"))
    names = sorted({region.name for drawing in drawings.values() for region in drawing.regions})
    return Labels(tuple(drawings[path] for path in sorted(drawings)), tuple(names), {}, tuple(notes))


def _image_of(task: dict[str, Any]) -> str:
    """The path or address of a task's image; empty where it has none."""
    data = task.get("data") if isinstance(task.get("data"), dict) else task
    values = [data.get("image"), *data.values()]  # pyright: ignore
    pictures = [value for value in values if isinstance(value, str) and _IMAGE.search(value)]
    return pictures[0] if pictures else ""


def _uploads(files: ImageFiles) -> dict[str, list[Path]]:
    """Images by what Label Studio makes of their names: it keeps letters, digits, -, _ and . alone, and writes _ for a blank."""
    uploads: dict[str, list[Path]] = defaultdict(list)
    for image in files.images:
        name = unicodedata.normalize("NFC", image.name.strip().replace(" ", "_"))
        uploads[re.sub(r"[^-.\w]", "", name)].append(image)
    return uploads


def _find(files: ImageFiles, uploads: dict[str, list[Path]], name: str, near: Path, where: str) -> Path | None:
    address = urllib.parse.urlsplit(name)
    local = re.search(r"/local-files/?\?d=(.+)", name)  # /data/local-files/?d=folder/photo.jpg
    path = urllib.parse.unquote(address.path)
    for spelling in (local[1], urllib.parse.unquote_plus(local[1])) if local else (name, path):
        if (image := files.named(spelling, near, where)) is not None:
            return image
    if not address.path.startswith("/data/upload/"):
        return None
    short = Path(path).name.partition("-")[2]
    fits = uploads.get(unicodedata.normalize("NFC", short), [])
    return fits[0] if len(fits) == 1 else None


def _results(task: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """The results that count, and how many annotations a task has."""
    if "data" not in task:  # JSON-MIN: a list of values under the name of each control
        lists = [value for value in task.values() if isinstance(value, list)]
        return [value for values in lists for value in values if isinstance(value, dict)], 1
    annotations = task.get("annotations", task.get("completions")) or []
    done = [one for one in annotations if isinstance(one, dict) and not one.get("was_cancelled")]
    done.sort(key=lambda one: (not one.get("ground_truth"), not one.get("result")))
    return ([result for result in done[0].get("result", []) if isinstance(result, dict)] if done else []), len(done)


def _size(result: dict[str, Any]) -> tuple[int, int] | None:
    height, width = result.get("original_height"), result.get("original_width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0 else None


def _region(result: dict[str, Any], where: str) -> Region | str:
    """The region of a result, or what the result is that has no area."""
    value = result.get("value", result)
    kind = next((key for key in value if key in _KINDS), None)
    if kind is None:
        return str(result.get("type", "result without labels"))
    size, names = _size(result), value[kind]
    if size is None:
        raise DataError(f"{where}: a result lacks original_width and original_height; export JSON from Label Studio again")
    if result.get("image_rotation", value.get("image_rotation", 0)):
        raise DataError(f"{where}: was turned in Label Studio, and its labels with it; turn the photo itself and export again")
    if not isinstance(names, list) or len(names) != 1:
        raise DataError(f"{where}: a region has the labels {names!r}; give it one label")
    name = checked_name(names[0], where)
    height, width = size
    scale = np.array([width, height]) / 100
    if kind == "brushlabels":
        return Region(name, bitmap=partial(_brush, value.get("rle"), size, where))
    if kind == "bitmasklabels":
        return Region(name, bitmap=partial(_bitmask, value, size, where))
    if kind == "polygonlabels":
        polygon = polygon_of(value.get("points"))
        return Region(name, (tuple((np.reshape(polygon, (-1, 2)) * scale).ravel().tolist()),)) if polygon else NO_POLYGON
    x, y = value["x"] * width / 100, value["y"] * height / 100
    turn = value.get("rotation", 0)
    if kind == "ellipselabels":
        return Region(name, (ellipse(x, y, value["radiusX"] * width / 100, value["radiusY"] * height / 100, turn),))
    across, down = value["width"] * width / 100, value["height"] * height / 100
    corners = np.reshape(rectangle(0, 0, across, down), (-1, 2))
    angle = np.deg2rad(turn)  # around the top left corner
    turned = corners @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) + (x, y)
    return Region(name, (tuple(turned.ravel().tolist()),))


def _brush(packed: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """(H, W) bool of a brush."""
    try:
        values = unpack(np.array(packed, np.uint8))
        if values.size != 4 * size[0] * size[1]:
            raise ValueError(f"it holds {values.size} values, not 4 x {size[0]} x {size[1]}")
    except (TypeError, ValueError, OverflowError, IndexError) as error:
        raise DataError(f"{where}: a brush cannot be decoded ({error}); export JSON from Label Studio again") from None
    return values.reshape(*size, 4)[..., 3] > 0


def _bitmask(value: dict[str, Any], size: tuple[int, int], where: str) -> np.ndarray:
    """(H, W) bool of a bitmask, in whichever entry of the value the data URL stands."""
    try:
        url = next(text for text in value.values() if isinstance(text, str) and text.startswith("data:image/png;base64,"))
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2], validate=True)), formats=["PNG"]) as picture:
            if picture.size != size[::-1]:
                raise ValueError(f"it has {picture.height} x {picture.width} pixels, not {size[0]} x {size[1]}")
            return np.asarray(picture.convert("RGBA"))[..., 3] > 0
    except StopIteration:
        raise DataError(f"{where}: a bitmask has no PNG; export JSON from Label Studio again") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{where}: a bitmask cannot be decoded ({error}); export JSON from Label Studio again") from None


def unpack(packed: np.ndarray) -> np.ndarray:
    """(N,) uint8 values of thi.ng's rle-pack, a stream of bits, the highest first: N in 32 bits; the bits of a value less one in 5;
    four sizes of run lengths less one in 4 each. Then runs: 1 bit (whether one value is repeated), 2 bits (which size), the length
    less one, and the value or the values. Raises ValueError where the stream ends too early.
    """
    bits = np.unpackbits(packed)
    place = 0

    def number(count: int) -> int:
        nonlocal place
        if place + count > bits.size:
            raise ValueError("the data end too early")
        place += count
        return int("".join(map(str, bits[place - count : place])), 2)

    total, word = number(32), number(5) + 1
    sizes = [number(4) + 1 for _ in range(4)]
    if word > 8 or total > 4 * 2**28:
        raise ValueError("the data have a damaged head")
    values = np.zeros(total, np.uint8)
    done = 0
    while done < total:
        repeated = number(1)
        length = number(sizes[number(2)]) + 1
        last = min(done + length, total)
        if repeated:
            values[done:last] = number(word)
        else:
            count = (last - done) * word
            if place + count > bits.size:
                raise ValueError("the data end too early")
            literal = bits[place : place + count].reshape(-1, word)
            values[done:last] = np.packbits(literal, axis=1).ravel() >> (8 - word)
            place += count
        done = last
    return values
