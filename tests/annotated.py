"""Photos with labels as each annotation tool writes them, from one description, and the masks that they mean."""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from mgd_pipeline.data.labels.convert import mask_png

Colour = tuple[int, int, int]
LABELS: Mapping[str, Colour] = {"road": (128, 64, 128), "tree": (107, 142, 35), "car": (0, 0, 142)}
NAMES = tuple(LABELS)
COLOURS: Mapping[str, Colour] = {"background": (0, 0, 0), **LABELS}


@dataclass(frozen=True, eq=False)
class Shape:
    """A connected region of one class, without holes."""

    name: str
    left: int
    top: int
    inside: np.ndarray
    """(height, width) bool, no larger than the region."""

    def pixels(self, size: tuple[int, int]) -> np.ndarray:
        """The region in an image of this size, (H, W) bool."""
        pixels, (height, width) = np.zeros(size, bool), self.inside.shape
        pixels[self.top : self.top + height, self.left : self.left + width] = self.inside
        return pixels

    @property
    def points(self) -> list[list[float]]:
        """The corners of the outline, clockwise along the edges of pixels: as a polygon they mean the same pixels."""
        padded = np.pad(self.inside, 1)
        start = x, y = int(self.inside[0].argmax()), 0
        (dx, dy), corners = (1, 0), [(x, y)]
        while (x := x + dx, y := y + dy) != start:
            if not padded[y + (dx + dy + 1) // 2, x + (dx - dy + 1) // 2]:  # the pixel ahead on the right, which was inside
                dx, dy = -dy, dx
            elif padded[y + (dy - dx + 1) // 2, x + (dx + dy + 1) // 2]:  # the pixel ahead on the left
                dx, dy = dy, -dx
            else:
                continue
            corners.append((x, y))
        return [[float(self.left + x), float(self.top + y)] for x, y in corners]


@dataclass(frozen=True, eq=False)
class Photo:
    name: str
    """Path of the image without suffix."""
    size: tuple[int, int]
    """Height and width."""
    shapes: tuple[Shape, ...]
    """Each covers what lies before it. None without a label."""
    suffix: str = ".png"

    @property
    def file(self) -> Path:
        return Path(f"{self.name}{self.suffix}")

    def mask(self, names: Sequence[str] = tuple(COLOURS)) -> np.ndarray:
        mask = np.zeros(self.size, np.uint8)
        for shape in self.shapes:
            mask[shape.pixels(self.size)] = names.index(shape.name)
        return mask


def shapes_of(mask: np.ndarray, names: Sequence[str]) -> tuple[Shape, ...]:
    """Regions that give this mask of ids when they are drawn in their order: what fills a hole comes after what has the hole."""
    shapes, regions = list[Shape](), np.zeros(mask.shape, np.int32)
    for value in np.unique(mask):
        ndimage.label(mask == value, output=regions)
        for number, (rows, columns) in enumerate(ndimage.find_objects(regions), start=1):
            inside = ndimage.binary_fill_holes(regions[rows, columns] == number)
            shapes.append(Shape(names[int(value)], columns.start, rows.start, np.asarray(inside)))
    return tuple(sorted(shapes, key=lambda shape: -shape.inside.sum()))


def photos(count: int, size: tuple[int, int] = (48, 64), folder: str = "images", seed: int = 0) -> list[Photo]:
    """Photos of boxes that overlap; the first one has all classes."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        height, width = size
        shapes = []
        for name in rng.permutation(NAMES) if number else NAMES:
            left, top = int(rng.integers(0, width - 16)), int(rng.integers(0, height - 16))
            columns, rows = rng.integers(8, 16), rng.integers(8, 16)
            shapes.append(Shape(str(name), left, top, np.ones((rows, columns), bool)))
        made.append(Photo(f"{folder}/photo_{number:03}" if folder else f"photo_{number:03}", size, tuple(shapes)))
    return made


def write_image(root: Path, photo: Photo) -> None:
    """Noise over the colours of the classes, so that a network can learn it."""
    rng = np.random.default_rng(len(photo.name) + sum(map(ord, photo.name)))
    palette = np.array(list(COLOURS.values()), np.int16)
    pixels = np.clip(palette[photo.mask()] + rng.integers(-20, 20, (*photo.size, 3)), 0, 255).astype(np.uint8)
    path = root / photo.file
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def runs(pixels: np.ndarray) -> list[int]:
    """Lengths of runs of pixels outside and inside by turns."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], pixels.astype(int)]))).tolist()
    return np.diff([0, *edges, pixels.size]).tolist()


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def coco(
    root: Path,
    made: Sequence[Photo],
    file: str = "annotations/instances_default.json",
    rle: str = "",
    labels: Mapping[str, Colour] = LABELS,
) -> None:
    """`rle`: "" writes polygons, "counts" run lengths as numbers, "text" COCO's compressed ones."""
    from pycocotools import mask as tool

    images, annotations = [], []
    ids = {name: place for place, name in enumerate(labels, start=1)}
    for number, photo in enumerate(made):
        height, width = photo.size
        images.append({"id": number, "file_name": photo.file.name, "height": height, "width": width})
        for shape in photo.shapes:
            segmentation: Any = [[value for pair in shape.points for value in pair]]
            if rle == "text":
                packed: Any = tool.encode(np.asfortranarray(shape.pixels(photo.size), np.uint8))
                segmentation = {"size": packed["size"], "counts": packed["counts"].decode()}
            elif rle == "counts":
                segmentation = {"size": [height, width], "counts": runs(shape.pixels(photo.size).ravel(order="F"))}
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": ids[shape.name], "iscrowd": int(bool(rle))}
                | {"segmentation": segmentation, "bbox": [shape.left, shape.top, *shape.inside.shape[::-1]]}
            )
    categories = [{"id": number, "name": name, "supercategory": ""} for name, number in ids.items()]
    dump(root / file, {"images": images, "annotations": annotations, "categories": categories})


def labelme(root: Path, made: Sequence[Photo], folder: str = "") -> None:
    for photo in made:
        shapes = [{"label": shape.name, "points": shape.points, "shape_type": "polygon"} for shape in photo.shapes]
        place = root / folder / photo.file.with_suffix(".json").name if folder else root / photo.file.with_suffix(".json")
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": photo.file.name,
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


def label_studio(root: Path, made: Sequence[Photo], kind: str = "polygonlabels") -> None:
    tasks = []
    for number, photo in enumerate(made):
        height, width = photo.size
        results = []
        for shape in photo.shapes:
            base = {"original_width": width, "original_height": height, "image_rotation": 0, "from_name": "tag", "to_name": "image"}
            painted = np.zeros((*photo.size, 4), np.uint8)
            painted[shape.pixels(photo.size)] = (0, 0, 0, 255)
            value: dict[str, Any] = {kind: [shape.name]}
            if kind == "brushlabels":
                value |= {"format": "rle", "rle": pack(painted.ravel())}
            elif kind == "bitmasklabels":
                Image.fromarray(painted).save(data := io.BytesIO(), "PNG")
                value |= {"imageDataURL": f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"}
            else:
                value |= {"points": [[100 * x / width, 100 * y / height] for x, y in shape.points], "closed": True}
            results.append({**base, "type": kind, "value": value})
        address = f"/data/upload/1/{number:08x}-{photo.file.name}"
        tasks.append({"id": number, "annotations": [{"was_cancelled": False, "result": results}], "data": {"image": address}})
    dump(root / "project-1-at-2026-11-29.json", tasks)


def yolo(root: Path, made: Sequence[Photo], labels: Mapping[str, Colour] = LABELS) -> None:
    names = list(labels)
    (root / "data.yaml").write_text(f"path: .\ntrain: images\nval: images\nnames: {json.dumps(dict(enumerate(names)))}\n")
    for photo in made:
        height, width = photo.size
        lines = [
            " ".join([str(names.index(shape.name)), *(f"{v:.9g}" for x, y in shape.points for v in (x / width, y / height))])
            for shape in photo.shapes
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
        for shape in photo.shapes:
            if bitmap:
                data = io.BytesIO()
                Image.fromarray(shape.inside).save(data, "PNG")
                text = base64.b64encode(zlib.compress(data.getvalue())).decode()
                part = {"geometryType": "bitmap", "bitmap": {"origin": [shape.left, shape.top], "data": text}}
            else:
                part = {"geometryType": "polygon", "points": {"exterior": shape.points, "interior": []}}
            objects.append({"classTitle": shape.name, **part})
        image = photo.file
        size = {"height": photo.size[0], "width": photo.size[1]}
        dump(root / image.parent.parent / "ann" / f"{image.name}.json", {"size": size, "objects": objects})


def cvat(root: Path, made: Sequence[Photo], masks: bool = False, labels: Mapping[str, Colour] = LABELS) -> None:
    """Shapes stand in the file in reverse; z_order says how they lie."""
    listed = "".join(f"<label><name>{name}</name><color>#%02x%02x%02x</color></label>" % labels[name] for name in labels)
    images = []
    for number, photo in enumerate(made):
        shapes = []
        for order, shape in enumerate(photo.shapes):
            if masks:
                height, width = shape.inside.shape
                rle = ", ".join(map(str, runs(shape.inside.ravel())))
                size = f'left="{shape.left}" top="{shape.top}" width="{width}" height="{height}"'
                shapes.append(f'<mask label="{shape.name}" rle="{rle}" {size} z_order="{order}"/>')
            else:
                points = ";".join(f"{x:.2f},{y:.2f}" for x, y in shape.points)
                shapes.append(f'<polygon label="{shape.name}" points="{points}" z_order="{order}" occluded="0"/>')
        attributes = f'id="{number}" name="{photo.file.as_posix()}" width="{photo.size[1]}" height="{photo.size[0]}"'
        images.append(f"<image {attributes}>{''.join(shapes[::-1])}</image>")
    meta = f"<version>1.1</version><meta><task><labels>{listed}</labels></task></meta>"
    (root / "annotations.xml").write_text(f'<?xml version="1.0"?><annotations>{meta}{"".join(images)}</annotations>')


def colour_masks(root: Path, made: Sequence[Photo], labels: Mapping[str, Colour] = LABELS) -> None:
    """CVAT's "Segmentation mask 1.1"."""
    colours = {"background": (0, 0, 0), **labels}
    lines = [f"{name}:{','.join(map(str, colour))}::" for name, colour in colours.items()]
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + "\n".join(lines) + "\n")
    for photo in made:
        path = root / "SegmentationClass" / f"{Path(photo.name).name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.array(list(colours.values()), np.uint8)[photo.mask(list(colours))]).save(path)


def masks_of_ids(root: Path, made: Sequence[Photo], labels: Mapping[str, Colour] = LABELS) -> None:
    colours = {"background": (0, 0, 0), **labels}
    (root / "masks").mkdir()
    for photo in made:
        mask = mask_png(photo.mask(list(colours)), list(colours.values()))
        (root / "masks" / photo.file.with_suffix(".png").name).write_bytes(mask)
    (root / "classes.txt").write_text("\n".join(colours))


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
    "label studio brush": ("label_studio", lambda root, made: label_studio(root, made, "brushlabels"), ""),
    "label studio bitmask": ("label_studio", lambda root, made: label_studio(root, made, "bitmasklabels"), "images"),
    "supervisely polygons": ("supervisely", supervisely, "first/img"),
    "supervisely bitmaps": ("supervisely", lambda root, made: supervisely(root, made, bitmap=True), "first/img"),
    "yolo": ("yolo", yolo, "images/train"),
}
"""By what is written: the tool, who writes it, and the folder of the photos."""
