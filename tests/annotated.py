"""Photos with labels as each annotation tool writes them, from one description, and the masks that they mean."""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("road", "tree", "car")
COLOURS = {"background": (0, 0, 0), "road": (128, 64, 128), "tree": (107, 142, 35), "car": (0, 0, 142)}


@dataclass(frozen=True)
class Photo:
    name: str
    """Path of the image without suffix."""
    size: tuple[int, int]
    """Height and width."""
    boxes: tuple[tuple[str, int, int, int, int], ...]
    """Class, left, top, right, bottom in pixels; each covers what lies before it. None without a label."""

    def mask(self, names: Sequence[str] = ("background", *NAMES)) -> np.ndarray:
        mask = np.zeros(self.size, np.uint8)
        for name, left, top, right, bottom in self.boxes:
            mask[top:bottom, left:right] = names.index(name)
        return mask


def photos(count: int, size: tuple[int, int] = (48, 64), folder: str = "images", seed: int = 0) -> list[Photo]:
    """Photos of boxes that overlap; the first one has all classes."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        height, width = size
        boxes = []
        for name in rng.permutation(NAMES) if number else NAMES:
            left, top = int(rng.integers(0, width - 16)), int(rng.integers(0, height - 16))
            boxes.append((str(name), left, top, left + int(rng.integers(8, 16)), top + int(rng.integers(8, 16))))
        made.append(Photo(f"{folder}/photo_{number:03}" if folder else f"photo_{number:03}", size, tuple(boxes)))
    return made


def write_image(root: Path, photo: Photo, suffix: str = ".png", **options: Any) -> None:
    """Noise over the colours of the classes, so that a network can learn it."""
    rng = np.random.default_rng(len(photo.name) + sum(map(ord, photo.name)))
    palette = np.array(list(COLOURS.values()), np.int16)
    pixels = np.clip(palette[photo.mask()] + rng.integers(-20, 20, (*photo.size, 3)), 0, 255).astype(np.uint8)
    path = root / f"{photo.name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def corners(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def coco(root: Path, made: Sequence[Photo], file: str = "annotations/instances_default.json", rle: str = "") -> None:
    """`rle`: "" writes polygons, "counts" run lengths as numbers, "text" COCO's compressed ones."""
    from pycocotools import mask as tool

    images, annotations = [], []
    for number, photo in enumerate(made):
        height, width = photo.size
        images.append({"id": number, "file_name": f"{Path(photo.name).name}.png", "height": height, "width": width})
        for name, left, top, right, bottom in photo.boxes:
            inside = np.zeros(photo.size, np.uint8)
            inside[top:bottom, left:right] = 1
            segmentation: Any = [[float(v) for pair in corners(left, top, right, bottom) for v in pair]]
            if rle == "text":
                packed: Any = tool.encode(np.asfortranarray(inside))
                segmentation = {"size": packed["size"], "counts": packed["counts"].decode()}
            elif rle == "counts":
                flat = inside.ravel(order="F")
                edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
                segmentation = {"size": [height, width], "counts": np.diff([0, *edges, flat.size]).tolist()}
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": NAMES.index(name) + 1, "iscrowd": int(bool(rle))}
                | {"segmentation": segmentation, "bbox": [left, top, right - left, bottom - top]}
            )
    categories = [{"id": place, "name": name, "supercategory": ""} for place, name in enumerate(NAMES, start=1)]
    dump(root / file, {"images": images, "annotations": annotations, "categories": categories})


def labelme(root: Path, made: Sequence[Photo], folder: str = "") -> None:
    for photo in made:
        shapes = [{"label": name, "points": corners(*box), "shape_type": "polygon"} for name, *box in photo.boxes]
        place = root / folder / Path(photo.name).with_suffix(".json").name if folder else root / f"{photo.name}.json"
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": f"{Path(photo.name).name}.png",
            "imageData": None,
        }
        dump(place, content | {"imageHeight": photo.size[0], "imageWidth": photo.size[1]})


def pack(values: np.ndarray) -> list[int]:
    """thi.ng's rle-pack: repeated values and literal ones by turns."""
    bits = [f"{values.size:032b}", f"{7:05b}", *(f"{size - 1:04b}" for size in (3, 4, 8, 16))]
    place = 0
    while place < values.size:
        same = place
        while same < values.size and values[same] == values[place] and same - place < 1 << 16:
            same += 1
        if same - place > 2:
            bits.append(f"1{3:02b}{same - place - 1:016b}{values[place]:08b}")
        else:
            same = min(place + 5, values.size)
            bits += [f"0{0:02b}{same - place - 1:03b}", *(f"{value:08b}" for value in values[place:same])]
        place = same
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def label_studio(root: Path, made: Sequence[Photo], brush: bool = False) -> None:
    tasks = []
    for number, photo in enumerate(made):
        height, width = photo.size
        results = []
        for name, left, top, right, bottom in photo.boxes:
            base = {"original_width": width, "original_height": height, "image_rotation": 0, "from_name": "tag", "to_name": "image"}
            if brush:
                painted = np.zeros((*photo.size, 4), np.uint8)
                painted[top:bottom, left:right] = (255, 0, 0, 255)
                value: dict[str, Any] = {"format": "rle", "rle": pack(painted.ravel()), "brushlabels": [name]}
            else:
                points = [[100 * x / width, 100 * y / height] for x, y in corners(left, top, right, bottom)]
                value = {"points": points, "closed": True, "polygonlabels": [name]}
            results.append({**base, "type": "brushlabels" if brush else "polygonlabels", "value": value})
        address = f"/data/upload/1/{number:08x}-{Path(photo.name).name}.png"
        tasks.append({"id": number, "annotations": [{"was_cancelled": False, "result": results}], "data": {"image": address}})
    dump(root / "project-1-at-2026-11-29.json", tasks)


def yolo(root: Path, made: Sequence[Photo]) -> None:
    (root / "data.yaml").write_text(f"path: .\ntrain: images\nval: images\nnames: {json.dumps(dict(enumerate(NAMES)))}\n")
    for photo in made:
        height, width = photo.size
        lines = [
            " ".join([str(NAMES.index(name)), *(f"{v:.9g}" for x, y in corners(*box) for v in (x / width, y / height))])
            for name, *box in photo.boxes
        ]
        path = root / f"{photo.name.replace('images/', 'labels/')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


def supervisely(root: Path, made: Sequence[Photo], bitmap: bool = False) -> None:
    """The photos must lie in a folder called img."""
    colours = {name: "#{:02X}{:02X}{:02X}".format(*COLOURS[name]) for name in NAMES}
    dump(root / "meta.json", {"classes": [{"title": name, "shape": "any", "color": colour} for name, colour in colours.items()]})
    for photo in made:
        objects = []
        for name, left, top, right, bottom in photo.boxes:
            if bitmap:
                data = io.BytesIO()
                Image.fromarray(np.full((bottom - top, right - left), True)).save(data, "PNG")
                text = base64.b64encode(zlib.compress(data.getvalue())).decode()
                objects.append({"classTitle": name, "geometryType": "bitmap", "bitmap": {"origin": [left, top], "data": text}})
            else:
                points = {"exterior": corners(left, top, right, bottom), "interior": []}
                objects.append({"classTitle": name, "geometryType": "polygon", "points": points})
        image = Path(photo.name)
        size = {"height": photo.size[0], "width": photo.size[1]}
        dump(root / image.parent.parent / "ann" / f"{image.name}.png.json", {"size": size, "objects": objects})


def cvat(root: Path, made: Sequence[Photo], masks: bool = False) -> None:
    """Shapes stand in the file in reverse; z_order says how they lie."""
    labels = "".join(f"<label><name>{name}</name><color>#%02x%02x%02x</color></label>" % COLOURS[name] for name in NAMES)
    images = []
    for number, photo in enumerate(made):
        shapes = []
        for order, (name, left, top, right, bottom) in enumerate(photo.boxes):
            if masks:
                size = f'left="{left}" top="{top}" width="{right - left}" height="{bottom - top}"'
                shapes.append(f'<mask label="{name}" rle="0, {(bottom - top) * (right - left)}" {size} z_order="{order}"/>')
            else:
                points = ";".join(f"{x:.2f},{y:.2f}" for x, y in corners(left, top, right, bottom))
                shapes.append(f'<polygon label="{name}" points="{points}" z_order="{order}" occluded="0"/>')
        attributes = f'id="{number}" name="{photo.name}.png" width="{photo.size[1]}" height="{photo.size[0]}"'
        images.append(f"<image {attributes}>{''.join(shapes[::-1])}</image>")
    meta = f"<version>1.1</version><meta><task><labels>{labels}</labels></task></meta>"
    (root / "annotations.xml").write_text(f'<?xml version="1.0"?><annotations>{meta}{"".join(images)}</annotations>')


def colour_masks(root: Path, made: Sequence[Photo]) -> None:
    """CVAT's "Segmentation mask 1.1"."""
    lines = [f"{name}:{','.join(map(str, colour))}::" for name, colour in COLOURS.items()]
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + "\n".join(lines) + "\n")
    for photo in made:
        path = root / "SegmentationClass" / f"{Path(photo.name).name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.array(list(COLOURS.values()), np.uint8)[photo.mask()]).save(path)


Writer = Callable[[Path, Sequence[Photo]], None]
WRITERS: dict[str, tuple[str, Writer, str]] = {
    "coco polygons": ("coco", coco, "images"),
    "coco counts": ("coco", lambda root, made: coco(root, made, rle="counts"), "images"),
    "coco text": ("coco", lambda root, made: coco(root, made, rle="text"), "images"),
    "cvat polygons": ("cvat", cvat, "images"),
    "cvat masks": ("cvat", lambda root, made: cvat(root, made, masks=True), "images"),
    "labelme beside": ("labelme", labelme, "photos"),
    "labelme apart": ("labelme", lambda root, made: labelme(root, made, folder="json"), "photos"),
    "label studio polygons": ("label_studio", label_studio, "images"),
    "label studio brush": ("label_studio", lambda root, made: label_studio(root, made, brush=True), ""),
    "supervisely polygons": ("supervisely", supervisely, "first/img"),
    "supervisely bitmaps": ("supervisely", lambda root, made: supervisely(root, made, bitmap=True), "first/img"),
    "yolo": ("yolo", yolo, "images/train"),
}
"""By what is written: the tool, who writes it, and the folder of the photos."""
