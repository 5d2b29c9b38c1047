"""Labels of annotation tools: the pixels that each format means, and what cannot be read."""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

import annotated
from annotated import NAMES, WRITERS, photos, write_image
from mgd_pipeline.data.build import build_manifest
from mgd_pipeline.data.datasets import index_dataset
from mgd_pipeline.data.labels.colours import read_colour_mask, read_labelmap
from mgd_pipeline.data.labels.files import ImageFiles, split_of
from mgd_pipeline.data.labels.label_studio import unpack
from mgd_pipeline.data.labels.read import Tool, read_labels, tools_of
from mgd_pipeline.data.labels.regions import Region, draw, ellipse, pixels_of, rectangle
from mgd_pipeline.data.labels.yolo import names_file, read_names
from mgd_pipeline.data.manifest import read_manifest, write_manifest
from mgd_pipeline.errors import DataError
from mgd_pipeline.params import FolderData

IDS = {name: place for place, name in enumerate(NAMES, start=1)}
CLASSES = ["background", *NAMES]


def make(root: Path, kind: str, count: int = 3) -> tuple[Tool, list[annotated.Photo]]:
    tool, write, folder = WRITERS[kind]
    made = photos(count, folder=folder)
    for photo in made:
        write_image(root, photo)
    write(root, made)
    return tool, made  # pyright: ignore[reportReturnType]


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- what formats mean ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_every_tool_means_the_same_pixels(kind: str, tmp_path: Path) -> None:
    """Overlapping boxes on pixel edges, drawn as polygons, run lengths and bitmaps."""
    tool, made = make(tmp_path, kind)
    files = ImageFiles(tmp_path)
    assert tools_of(files) == {tool: 3 if tool in ("labelme", "yolo") else 1}
    labels = read_labels(files, tool)
    assert sorted(labels.names) == sorted(NAMES) and not labels.notes
    assert [str(drawing.image) for drawing in labels.drawings] == [f"{photo.name}.png" for photo in made]
    for photo, drawing in zip(made, labels.drawings, strict=True):
        assert drawing.size in (None, photo.size)
        assert np.array_equal(draw(drawing.regions, IDS, photo.size, 0), photo.mask())


def test_regions_cover_earlier_ones_have_holes_and_end_at_the_image() -> None:
    whole, hole = rectangle(0, 0, 10, 8), rectangle(6, 6, 2, 2)
    ring = pixels_of(Region("a", (whole,), (hole,)), (8, 10))
    assert not ring[2:6, 2:6].any() and ring.sum() == 80 - 16
    over = Region("b", bitmap=lambda: np.ones((6, 6), bool), corner=(-2, 5))
    mask = draw((Region("a", (whole,)), over, Region("unknown", (whole,))), {"a": 1, "b": 2}, (8, 10), 255)
    assert (mask[5:8, 0:4] == 2).all() and (mask == 2).sum() == 12 and (mask == 1).sum() == 68
    disc = pixels_of(Region("a", (ellipse(20, 20, 10, 5, 90),)), (40, 40))
    rows, columns = np.nonzero(disc)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (20, 10) and abs(disc.sum() - np.pi * 50) < 6


def test_polygons_far_beyond_the_image_are_drawn_as_polygons_that_end_near_it() -> None:
    """The rasteriser walks along edges pixel by pixel, and its numbers overflow at 2**31."""
    far = Region("a", ((5, 5, 5e8, 5, 5e8, 5e8, -5e8, 5e8, -5e8, 20),))
    near = Region("a", ((5, 5, 200, 5, 200, 200, -200, 200, -200, 5 + 15 * 205 / (5e8 + 5)),))
    assert np.array_equal(pixels_of(far, (30, 40)), pixels_of(near, (30, 40))) and pixels_of(far, (30, 40)).any()
    assert not pixels_of(Region("a", ((900, 900, 1e8, 900, 1e8, 1e8),)), (30, 40)).any()


def test_pixels_belong_to_a_polygon_that_holds_their_centres() -> None:
    """An independent rasteriser: the centre of a pixel is inside where a ray from it meets an odd number of edges."""
    rng, (height, width) = np.random.default_rng(0), (60, 80)
    xs, ys = np.arange(width)[None] + 0.5, np.arange(height)[:, None] + 0.5
    differing = area = 0
    for _ in range(20):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
        points = rng.uniform((10, 10), (70, 50)) + rng.uniform(5, 25, (12, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
        inside = np.zeros((height, width), bool)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
            inside ^= ((y0 <= ys) != (y1 <= ys)) & (xs < (x1 - x0) * (ys - y0) / (y1 - y0) + x0)
        drawn = pixels_of(Region("a", (tuple(points.ravel().tolist()),)), (height, width))
        differing, area = differing + int((drawn != inside).sum()), area + int(inside.sum())
    assert differing < 0.02 * area


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(1, 300)), max_size=30))
@settings(max_examples=50, deadline=None)
def test_brushes_survive_their_packing(runs: list[tuple[int, int]]) -> None:
    values = np.concatenate([np.empty(0, np.uint8), *(np.full(count, value, np.uint8) for value, count in runs)])
    packed = np.array(annotated.pack(values), np.uint8)
    assert np.array_equal(unpack(packed), values)
    if values.size > 1:
        with pytest.raises(ValueError, match=r"the data end too early|damaged head"):
            unpack(packed[:-2])


# --- how images are found ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "there", "near", "image"),
    [
        ("a.jpg", ["images/a.jpg"], "annotations", "images/a.jpg"),
        ("a.jpg", ["train/a.jpg", "valid/a.jpg"], "valid", "valid/a.jpg"),
        ("C:\\photos\\set\\a.jpg", ["set/a.jpg", "other/a.jpg"], "", "set/a.jpg"),
        ("../images/a.jpg", ["images/a.jpg"], "labels", "images/a.jpg"),
        ("b.jpg", ["a.jpg"], "", None),
        ("a_jpg.rf.0f3c.jpg", ["train/a_jpg.rf.0f3c.jpg"], "train", "train/a_jpg.rf.0f3c.jpg"),
        ("Ka\u0308fer.jpg", ["images/Käfer.jpg"], "", "images/Käfer.jpg"),
        ("K\u00e4fer.jpg", ["x/Ka\u0308fer.jpg"], "", "x/Ka\u0308fer.jpg"),
        ("IMG_1.jpg", ["x/IMG_1.JPG", "x/IMG_10.JPG"], "", "x/IMG_1.JPG"),
        ("../upload/3/0123abcd-a.jpg", ["x/a.jpg"], "", "x/a.jpg"),
        ("my%20photo.jpg", ["x/my photo.jpg"], "", "x/my photo.jpg"),
        ("https://photos.org/x/my%20photo.jpg?size=1", ["x/my photo.jpg", "y/my photo.jpg"], "", "x/my photo.jpg"),
        ("a%20b.jpg", ["a%20b.jpg", "a b.jpg"], "", "a%20b.jpg"),
        ("a.jpg", ["x/train2017/a.jpg", "x/val2017/a.jpg"], "", "x/val2017/a.jpg"),
    ],
)
def test_images_are_found_by_the_names_that_tools_write(
    name: str, there: list[str], near: str, image: str | None, tmp_path: Path
) -> None:
    for path in there:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert ImageFiles(tmp_path).named(name, Path(near), "x.json", "val") == (Path(image) if image else None)


@pytest.mark.parametrize(
    ("address", "photo"),
    [
        ("/data/local-files/?d=set/images/a+b%20c.png", "images/a+b c.png"),
        ("/data/local-files/?d=set/images/a%2Bb.png", "images/a+b.png"),
        ("/data/local-files/?d=C:%5Cset%5Cimages%5Ca.png", "images/a.png"),
        ("/data/local-files/?d=a#b&c.png", "images/a#b&c.png"),
        ("s3://bucket/images/a#b.png", "images/a#b.png"),
        ("/data/upload/1/0123abcd-Ka%CC%88fer_1.png", "images/K\u00e4fer 1.png"),
        ("/data/upload/1/0123abcd-a-b.png", "images/a-b.png"),
    ],
)
def test_addresses_of_label_studio_name_their_photos(address: str, photo: str, tmp_path: Path) -> None:
    """The photo b.png has the end of another one's name."""
    one = annotated.Photo("images/b", (48, 64), photos(1)[0].shapes)
    annotated.label_studio(tmp_path, [one])
    edit(next(tmp_path.glob(STUDIO)), lambda tasks: tasks[0]["data"].update(image=address))
    write_image(tmp_path, one)
    assert not read_labels(ImageFiles(tmp_path), "label_studio").drawings
    (tmp_path / photo).touch()
    assert [str(drawing.image) for drawing in read_labels(ImageFiles(tmp_path), "label_studio").drawings] == [photo]


@pytest.mark.parametrize("kind", ["yolo", "labelme beside"])
def test_labels_called_like_photos_of_macos_are_found(kind: str, tmp_path: Path) -> None:
    """macOS writes Ka\u0308fer for K\u00e4fer; LabelMe's imagePath is of another computer."""
    tool, write, folder = WRITERS[kind]
    one = annotated.Photo(f"{folder}/K\u00e4fer", (48, 64), photos(1)[0].shapes)
    write(tmp_path, [one])
    for path in tmp_path.rglob("*.json"):
        edit(path, lambda content: content.update(imagePath="other.png"))
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / folder / "Ka\u0308fer.png").touch()
    labels = read_labels(ImageFiles(tmp_path), tool)  # pyright: ignore[reportArgumentType]
    assert [drawing.image.name for drawing in labels.drawings] == ["Ka\u0308fer.png"] and not labels.notes


def test_an_ambiguous_image_is_refused(tmp_path: Path) -> None:
    for path in ("one/a.jpg", "two/a.jpg"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).touch()
    with pytest.raises(DataError, match=r"x\.json: names the image 'a\.jpg', and 2 images fit, such as one/a\.jpg and two/a\.jpg"):
        ImageFiles(tmp_path).named("a.jpg", Path("annotations"), "x.json")


def test_splits_are_read_from_folders_and_names() -> None:
    said = {"train/a.jpg": "train", "annotations/instances_val2017.json": "val", "Validation/a.jpg": "val", "test/b.jpg": "test"}
    said |= {"val/train_7.jpg": "val", "train/test drive/a.jpg": "train", "set/val_images/a.jpg": "val"}
    assert {name: split_of(name) for name in said} == said and split_of("photos/vale.jpg") is None


# --- what cannot be read ----------------------------------------------------------------------------------------------


def refuse(kind: str, words: str, change: Callable[[Path], object]) -> Any:
    return pytest.param(kind, words, change, id=f"{kind}: {words[:40]}")


def in_json(glob: str, change: Callable[[Any], Any]) -> Callable[[Path], object]:
    return lambda root: edit(sorted(root.glob(glob))[0], change)


COCO, CVAT, LABELME, STUDIO, ANN = "annotations/*.json", "annotations.xml", "photos/*.json", "*.json", "first/ann/*.json"


def segmentation(content: Any) -> Any:
    return content["annotations"][0]["segmentation"]


def result(content: Any) -> Any:
    return content[0]["annotations"][0]["result"][0]


def cut(value: dict[str, str]) -> None:
    value["imageDataURL"] = value["imageDataURL"][:-40]


not_finite = {"shape_type": "circle", "points": [[1e300, 5], [8, 5]]}


def other_path(content: Any) -> None:
    content["imagePath"] = "photo_002.png"


def in_text(glob: str, text: str, new: str | None = None) -> Callable[[Path], object]:
    """Writes a text into a file, or another one in its place there."""

    def change(root: Path) -> None:
        path = min(root.rglob(glob))
        path.write_text(text if new is None else path.read_text().replace(text, new))

    return change


@pytest.mark.parametrize(
    ("kind", "words", "change"),
    [
        refuse("coco polygons", r"is not JSON", in_text("*.json", "{")),
        refuse("coco polygons", r"two images have the id 0", in_json(COCO, lambda c: c["images"][1].update(id=0))),
        refuse("coco polygons", r"has the size None x 48", in_json(COCO, lambda c: c["images"][0].pop("width"))),
        refuse("coco polygons", r"category of an annotation is not listed", in_json(COCO, lambda c: c["categories"].pop())),
        refuse("coco polygons", r"image of an annotation is not listed", in_json(COCO, lambda c: c["images"].pop())),
        refuse("coco counts", r"run lengths do not add up", in_json(COCO, lambda c: segmentation(c)["counts"].pop())),
        refuse("coco text", r"a run-length mask of size", in_json(COCO, lambda c: segmentation(c).update(size=[9, 9]))),
        refuse("coco polygons", r"COCO panoptic file", in_json(COCO, lambda c: c["annotations"][0].update(segments_info=[]))),
        refuse("coco text", r"cannot be decoded", in_json(COCO, lambda c: segmentation(c).update(counts="ü"))),
        refuse("labelme beside", r"photo_000\.json: is not JSON", in_text("*.json", "")),
        refuse("labelme beside", r"its imagePath is photos/photo_002\.png", in_json(LABELME, other_path)),
        refuse("labelme beside", r"an annotation has the class ''", in_json(LABELME, lambda c: c["shapes"][0].update(label=""))),
        refuse("label studio brush", r"was turned in Label Studio", in_json(STUDIO, lambda c: result(c).update(image_rotation=90))),
        refuse("label studio brush", r"brush cannot be decoded", in_json(STUDIO, lambda c: result(c)["value"].update(rle=[1, 2]))),
        refuse("label studio bitmask", r"bitmask has no PNG", in_json(STUDIO, lambda c: result(c)["value"].pop("imageDataURL"))),
        refuse("label studio bitmask", r"bitmask cannot be decoded", in_json(STUDIO, lambda c: cut(result(c)["value"]))),
        refuse(
            "label studio bitmask", r"48 x 64 pixels, not 9 x 64", in_json(STUDIO, lambda c: result(c).update(original_height=9))
        ),
        refuse("yolo", r"data\.yaml: nc is 4, but there are 3 names", in_text("data.yaml", "names:", "nc: 4\nnames:")),
        refuse("yolo", r"data\.yaml: 'road' stands twice", in_text("data.yaml", "tree", "road")),
        refuse("yolo", r"class 9 has no name; there are 3 names; correct data\.yaml", in_text("photo*.txt", "9 0 0 1 0 1 1")),
        refuse("yolo", r"needs pairs of numbers from 0 to 1", in_text("photo*.txt", "1 0 0 64 0 64 48")),
        refuse("yolo", r"is not a class and numbers", in_text("photo*.txt", "road 0 0")),
        refuse("supervisely bitmaps", r"bitmap cannot", in_json(ANN, lambda c: c["objects"][0]["bitmap"].update(data=1))),
        refuse("supervisely polygons", r"json does not list", in_json(ANN, lambda c: c["objects"][0].update(classTitle=""))),
        refuse("cvat masks", r"run lengths of a mask do not fill", in_text(CVAT, 'rle="0, ', 'rle="1, ')),
        refuse("cvat polygons", r"is CVAT for video", in_text(CVAT, "<annotations><track/></annotations>")),
        refuse("cvat polygons", r"photo_000\.png: is not built as its tool writes it", in_text(CVAT, ' height="', ' high="')),
        refuse("cvat masks", r"is not built as its tool writes it", in_text(CVAT, 'left="', 'left="inf')),
        refuse("coco polygons", r"is not built as its tool", in_json(COCO, lambda c: c["annotations"][0].update(category_id=[]))),
        refuse("labelme beside", r"is not built as its tool", in_json(LABELME, lambda c: c["shapes"][0].update(not_finite))),
        refuse("label studio polygons", r"is not built as its tool", in_json(STUDIO, lambda c: result(c).update(value=1))),
        refuse("supervisely polygons", r"is not built as its tool", in_json(ANN, lambda c: c.pop("size"))),
        refuse("cvat polygons", r"cannot be read", in_text(CVAT, "<annotations><image>")),
    ],
)
def test_what_cannot_be_read_is_named_with_its_file(
    kind: str, words: str, change: Callable[[Path], object], tmp_path: Path
) -> None:
    tool, _ = make(tmp_path, kind)
    change(tmp_path)
    with pytest.raises(DataError, match=words) as caught:
        labels = read_labels(ImageFiles(tmp_path), tool, {"coco": COCO, "cvat": CVAT}.get(tool))
        for drawing in labels.drawings:  # bitmaps are decoded when they are drawn
            draw(drawing.regions, IDS, (48, 64), 0)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_has_no_area_or_no_image_is_told(tmp_path: Path) -> None:
    make(tmp_path, "coco polygons")

    def change(content: Any) -> None:
        first, second, third, *_ = content["annotations"]
        first["segmentation"], second["segmentation"], third["segmentation"] = [], [[1, 2, 3, 4]], [[float("nan")] * 8]
        content["images"].append({"id": 99, "file_name": "lost.png", "height": 4, "width": 4})

    edit(next(tmp_path.glob(COCO)), change)
    labels = read_labels(ImageFiles(tmp_path), "coco")
    said = [note.text for note in labels.notes]
    assert said[0].endswith("what has no area is left out: bounding box (1), polygon of fewer than three points (2)")
    assert said[1].startswith("1 image that annotations/instances_default.json names is not there, such as lost.png")


def test_labels_of_skeletons_and_points_are_no_classes(tmp_path: Path) -> None:
    make(tmp_path, "cvat polygons")
    parts = "<label><name>{}</name><color>#ff0000</color><type>{}</type></label>"
    in_text(CVAT, "<labels>", "<labels>" + parts.format("knee", "points") + parts.format("body", "skeleton"))(tmp_path)
    assert read_labels(ImageFiles(tmp_path), "cvat").names == NAMES


@pytest.mark.parametrize(("suffix", "orientation", "angle"), [(".jpg", 6, 90), (".png", 6, 90), (".png", 3, 180)])
def test_shares_of_a_turned_photo_are_of_its_turned_size(suffix: str, orientation: int, angle: int, tmp_path: Path) -> None:
    """YOLO's numbers are shares of the photo as it is shown, and a file's header has its sides exchanged. The mask of a PNG has the
    path of its photo, and is not turned again."""
    made = [replace(photo, suffix=suffix) for photo in photos(4)]
    for photo in made:
        write_image(tmp_path / "set", photo)
        path, turn = tmp_path / "set" / photo.file, Image.Exif()
        turn[0x112] = orientation
        Image.open(path).rotate(angle, expand=True).save(path, exif=turn)
    annotated.yolo(tmp_path / "set", made)
    manifest = build_manifest(params(labels="yolo", uncovered="background"), tmp_path)
    assert all(np.array_equal(manifest.mask(manifest.rows[photo.name]), photo.mask()) for photo in made)


@pytest.mark.parametrize(
    "text", ["\ufeff# of 2026\r\nroad\r\ntree\r\n\r\n", "road\ntree", "\ufeffnames: [road, tree]\r\nnc: 2\r\n"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
def test_names_files_are_read_as_editors_write_them(text: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / ("data.yaml" if "names" in text else "obj.names")
    path.write_bytes(("\ufeff" * (encoding != "utf-8" and text[0] != "\ufeff") + text).encode(encoding))
    assert names_file(ImageFiles(tmp_path)) == Path(path.name) and read_names(path) == {0: "road", 1: "tree"}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
@pytest.mark.parametrize(
    ("name", "text"), [("classes.txt", "gr\u00fcn"), ("data.yaml", "names: [gr\u00fcn]"), ("labelmap.txt", "gr\u00fcn:0,0,0::")]
)
def test_texts_of_another_encoding_are_named(name: str, text: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    assert name == "labelmap.txt" or names_file(ImageFiles(tmp_path)) == Path(name)
    with pytest.raises(DataError, match=rf"{name}: cannot be read \("):
        (read_labelmap if name == "labelmap.txt" else read_names)(path)


@pytest.mark.parametrize("lines", ["road\n\ntree\n", ""])
def test_names_of_yolo_keep_their_numbers(lines: str, tmp_path: Path) -> None:
    """An empty line left out would give each class behind it the name of another."""
    make(tmp_path, "yolo")
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "classes.txt").write_text(lines)
    with pytest.raises(DataError, match=r"classes\.txt, line 2: is empty|classes\.txt: holds no name"):
        read_labels(ImageFiles(tmp_path), "yolo")


def test_one_of_several_annotations_of_label_studio_counts(tmp_path: Path) -> None:
    """JSON-MIN has an entry for each annotation, here an empty one first."""
    _, made = make(tmp_path, "label studio polygons")
    file = next(tmp_path.glob(STUDIO))
    entries = []
    for task in json.loads(file.read_text()):
        values = [one | one.pop("value") for one in task["annotations"][0]["result"]]
        entries.append({"image": task["data"]["image"] + "?token=1", "annotation_id": task["id"], "tag": values})
    file.write_text(json.dumps([{**entries[0], "tag": []}, *entries]))
    labels = read_labels(ImageFiles(tmp_path), "label_studio")
    assert np.array_equal(draw(labels.drawings[0].regions, IDS, (48, 64), 0), made[0].mask())
    assert "1 image has several annotations, such as images/photo_000.png: the first one counts" in labels.notes[0].text


def test_bitmaps_of_supervisely_lie_at_their_top_left_corner_and_polygons_on_corners_of_pixels(tmp_path: Path) -> None:
    """Worked out by hand. Supervisely's bitmaps have a palette whose index 0 is transparent, whatever its colour."""
    picture, data = Image.fromarray(np.array([[1, 0, 1], [1, 1, 0]], np.uint8)), io.BytesIO()
    picture.putpalette([255, 255, 255, 0, 0, 0])
    picture.save(data, "PNG", transparency=0, bits=1)
    bitmap = {"origin": [4, 1], "data": base64.b64encode(zlib.compress(data.getvalue())).decode()}
    points = {"exterior": [[0, 2], [3, 2], [3, 4], [0, 4]], "interior": [[[1, 2], [2, 2], [2, 3], [1, 3]]]}
    tool, made = make(tmp_path, "supervisely polygons", 1)
    objects = [{"classTitle": "road", "geometryType": "bitmap", "bitmap": bitmap}]
    objects.append({"classTitle": "tree", "geometryType": "polygon", "points": points})
    edit(next(tmp_path.glob(ANN)), lambda content: content.update(objects=objects))
    mask = draw(read_labels(ImageFiles(tmp_path), tool).drawings[0].regions, IDS, made[0].size, 0)
    assert mask[:5, :8].tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 1, 0],
        [2, 0, 2, 0, 1, 1, 0, 0],
        [2, 2, 2, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_roboflows_project_is_no_class(tmp_path: Path) -> None:
    make(tmp_path, "coco polygons")

    def change(content: Any) -> None:
        for category in content["categories"]:
            category["supercategory"] = "streets"
        content["categories"].insert(0, {"id": 0, "name": "streets", "supercategory": "none"})

    edit(next(tmp_path.glob(COCO)), change)
    assert read_labels(ImageFiles(tmp_path), "coco").names == NAMES


# --- data sets --------------------------------------------------------------------------------------------------------


def params(**changes: Any) -> FolderData:
    return FolderData(**{"dataset": "folder", "root": "set", "partition": "1/1", "classes": CLASSES, "labels": "coco", **changes})


def test_a_data_set_of_annotations_becomes_masks(tmp_path: Path) -> None:
    """Photos that nobody drew on are unlabelled; masks of photos that are gone go; the same labels write nothing."""
    _, made = make(tmp_path / "set", "coco polygons", 5)
    edit(next((tmp_path / "set").glob(COCO)), lambda c: c.update(annotations=[a for a in c["annotations"] if a["image_id"] < 4]))
    write_image(tmp_path / "set", annotated.Photo("more/new", (48, 64), ()))
    (tmp_path / "data/labels/gone").mkdir(parents=True)
    (tmp_path / "data/labels/gone/old.png").touch()
    index = index_dataset(params(uncovered="background"), tmp_path)
    assert str(index.notes[0]).startswith("1 image without a region counts as unlabelled")
    manifest = build_manifest(params(uncovered="background"), tmp_path)
    assert {row.image_id for row in manifest.rows.values() if row.mask_path is None} == {"images/photo_004", "more/new"}
    for photo in made[:4]:
        assert np.array_equal(manifest.mask(manifest.rows[photo.name]), photo.mask())
    with Image.open(manifest.mask_file(manifest.rows[made[0].name])) as picture:
        assert picture.mode == "P"
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "data/labels").rglob("*.png")}
    assert len(files) == 4
    again = build_manifest(params(uncovered="background", empty="labelled"), tmp_path)
    assert again.rows["images/photo_004"].mask_path and not again.mask(again.rows["images/photo_004"]).any()
    assert {path: path.stat().st_mtime_ns for path in files} == files
    void = build_manifest(params(), tmp_path)
    assert set(np.unique(void.mask(void.rows[made[0].name]))) == {1, 2, 3, 255}


def test_names_join_classes_and_leave_some_out(tmp_path: Path) -> None:
    _, made = make(tmp_path / "set", "coco polygons")
    with pytest.raises(DataError, match=r"the classes 'tree' and 'car', which data\.classes lacks; add them"):
        index_dataset(params(classes=["background", "road"]), tmp_path)
    with pytest.raises(DataError, match=r"the class 'car', .* which class it means, such as \{car: Wagen\} \(null for none\)"):
        index_dataset(params(classes=["background", "road", "tree", "Wagen"], uncovered="background"), tmp_path)
    data = params(classes=["background", "ground"], names={"road": "ground", "tree": None, "car": "ground"}, uncovered="background")
    mask = build_manifest(data, tmp_path).mask(build_manifest(data, tmp_path).rows[made[0].name])
    assert np.array_equal(mask, np.array([0, 1, 255, 1], np.uint8)[made[0].mask()])
    (note,) = index_dataset(params(names={"Car": None}), tmp_path).notes
    assert note.text == "no annotation has the class 'Car' of data.names" and "there are 'road', 'tree' and 'car'" in note.remedy


@pytest.mark.parametrize(
    ("labels", "key", "value"),
    [
        ("masks", "names", {"car": "road"}),
        ("colours", "uncovered", "road"),
        ("coco", "values", [0, 1, 2, 9]),
        ("masks", "empty", "labelled"),
    ],
)
def test_keys_of_other_labels_are_refused(labels: str, key: str, value: object) -> None:
    """Nothing reads them: whoever joins classes of masks by data.names would not notice that they stay apart."""
    with pytest.raises(ValidationError, match=rf"{key}: is for labels that are .*, and has no effect on {labels}; leave it out"):
        params(labels=labels, colours=[[9 * number, 0, 0] for number in range(4)], **{key: value})


def test_data_names_shows_a_class_under_another_name(tmp_path: Path) -> None:
    """Ids, masks and images.parquet stay, whatever classes are called and in which colours they are shown; another order changes
    them."""
    make(tmp_path / "set", "coco polygons")
    write_manifest(build_manifest(params(uncovered="background"), tmp_path), tmp_path / "m")
    files = {path: path.read_bytes() for path in [*tmp_path.rglob("labels/**/*.png"), *tmp_path.glob("m/*.parquet")]}
    shown = {"classes": ["Rest", "tree", "road", "Wagen"], "names": {"road": "tree", "tree": "road", "car": "Wagen"}}
    renamed = build_manifest(params(uncovered="Rest", colours=[[9, 9, 9 * i] for i in range(4)], **shown), tmp_path)
    write_manifest(renamed, tmp_path / "m")
    assert len(files) == 5 and {path: path.read_bytes() for path in files} == files, "names may be exchanged"
    assert read_manifest(tmp_path / "m", tmp_path).classes == ("Rest", "tree", "road", "Wagen")
    reordered = params(uncovered="background", classes=["background", "tree", "road", "car"])
    write_manifest(build_manifest(reordered, tmp_path), tmp_path / "m")
    changed = {path for path, data in files.items() if path.read_bytes() != data}
    assert changed == {path for path in files if path.name != "partition.parquet"}


def test_a_photo_of_another_size_is_refused_by_name(tmp_path: Path) -> None:
    make(tmp_path / "set", "coco polygons", 6)
    edit(next((tmp_path / "set").glob(COCO)), lambda c: c["images"][1].update(height=99))
    with pytest.raises(
        DataError, match=r"photo_001\.png: annotations/inst\S+: says 64 x 99 pixels of images/photo_001\.png, which has 64 x 48"
    ):
        build_manifest(params(), tmp_path)
    assert len(build_manifest(params(), tmp_path, on_error="skip").rows) == 5


def test_masks_of_colours(tmp_path: Path) -> None:
    made = photos(3, folder="JPEGImages")
    for photo in made:
        write_image(tmp_path / "set", photo)
    annotated.colour_masks(tmp_path / "set", made)
    colours = read_labelmap(tmp_path / "set/labelmap.txt")
    assert colours == annotated.COLOURS
    listed = [list(colour) for colour in colours.values()]
    data = params(labels="colours", colours=listed, images="JPEGImages/*", masks="SegmentationClass/*")
    manifest = build_manifest(data, tmp_path)
    for photo in made:
        assert np.array_equal(manifest.mask(manifest.rows[Path(photo.name).name]), photo.mask())
    assert manifest.palette == tuple(annotated.COLOURS.values())
    path = tmp_path / "set/SegmentationClass/photo_000.png"
    pixels = np.array(Image.open(path))
    pixels[:2, :3], pixels[5, 5] = (1, 2, 3), (9, 9, 9)
    Image.fromarray(pixels).save(path)
    with pytest.raises(DataError, match=r"6 pixels have the colour \[1, 2, 3\] and 1 more colours, which no class has"):
        read_colour_mask(path, listed)
    assert (read_colour_mask(path, listed, [(1, 2, 3), (9, 9, 9)])[:2, :3] == 255).all()
