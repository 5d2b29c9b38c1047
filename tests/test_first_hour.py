"""From a folder or ZIP archive as a person has it to masks of class ids: init and prepare-data, in every layout."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import annotated
import first_hour
from annotated import COLOURS, NAMES, WRITERS, Photo, photos, write_image
from conftest import TINY
from mgd_pipeline.data.build import build_manifest
from mgd_pipeline.data.manifest import Manifest
from mgd_stages.cli import app
from mgd_stages.run.project import open_project

ALL = ("background", *NAMES)
Build = Callable[[Path], Sequence[Photo]]


def init(root: Path, *options: str) -> tuple[Path, str]:
    """The folder of the project, and what init said in one line."""
    base = root.with_name("project")
    arguments = ["init", "--root", str(root), "--output", str(base), "--quick", *options]
    return base, " ".join(CliRunner().invoke(app, arguments).output.split())


def prepared(root: Path, *options: str) -> tuple[Manifest, str]:
    base, said = init(root, *options)
    assert (base / "params.yaml").is_file(), said
    return build_manifest(open_project(base / "params.yaml").params.data, base), said  # prepare-data without its look at networks


def check(manifest: Manifest, made: Sequence[Photo], means: Sequence[int] = (0, 1, 2, 3)) -> None:
    """`means`: the id of background, road, tree and car."""
    rows = {row.image_path.rpartition(".")[0]: row for row in manifest.rows.values()}
    for photo in made:
        assert np.array_equal(manifest.mask(rows[photo.name]), np.array(means, np.uint8)[photo.mask()]), photo.name


def zipped(root: Path) -> Path:
    archive = root.with_name("export.zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(root.rglob("*")):
            file.write(path, path.relative_to(root))
    return archive


def tool(kind: str, count: int = 8) -> Build:
    _, write, folder = WRITERS[kind]

    def build(root: Path) -> Sequence[Photo]:
        made = photos(count, folder=folder)
        for photo in made:
            write_image(root, photo)
        write(root, made)
        return made

    return build


def texts(said: str) -> set[str]:
    """Lines without their numbers, paths and classes."""
    return {re.sub(r"\d+|\S+/(?=\S)|(?<=^classes: ).*", "", line) for line in said.splitlines()}


def test_the_first_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `python tests/first_hour.py` plays, with few steps on tiny photos. Six folders become data sets; the photos of the phone
    go as far as the report, at which a browser looks where there is one."""

    def typed(folder: Path, _: str, *arguments: str) -> str:
        monkeypatch.chdir(folder)
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        return done.output

    photos = first_hour.rendered(12, 9, (48, 72))
    whole = ["run", *(part for setting in TINY if not setting.startswith("data.") for part in ("--set", setting))]
    for name in first_hour.FOLDERS:
        took = first_hour.play(name, photos, tmp_path, typed, whole if name == "phone" else ["prepare-data"])
    assert [*took][:3] == ["init", "prepare-data", "train-teacher"] and [*took][-2:] == ["report", "together"] and len(took) == 10
    guide = (Path(__file__).parents[1] / "docs/guide.md").read_text(encoding="utf-8").replace("my-project", "cvat-project")
    shown = re.search(r"^wrote params.yaml.*?(?=^```)", guide, re.MULTILINE | re.DOTALL)
    assert shown is not None and texts(shown[0]) <= texts(said := (tmp_path / "cvat.txt").read_text(encoding="utf-8"))
    assert "which says little; raise data.val_fraction or give masks to more images\ncvat-project: " in said
    if shutil.which(first_hour.BROWSER):
        first_hour.look_at(tmp_path / "phone-project/data/results/report.html", tmp_path / "report.png")


@pytest.mark.parametrize("kind", sorted(WRITERS.keys() - {"cvat polygons", "coco counts", "labelme beside", "yolo"}))
def test_other_exports_of_annotation_tools_become_masks(kind: str, tmp_path: Path) -> None:
    made = tool(kind)(tmp_path / "set")
    manifest, said = prepared(zipped(tmp_path / "set") if "polygons" in kind else tmp_path / "set")
    check(manifest, made, [manifest.classes.index(name) for name in ALL])
    assert "24 regions on 8 of 8 images" in said and "car (8)" in said and "pixels outside of all regions become" in said
    assert Path(f"{tmp_path}/project/data/results/labels.png").is_file()


def roboflow(root: Path) -> Sequence[Photo]:
    """A folder for each split with its photos and their file; the first category is the name of the project."""
    every = []
    for split in ("train", "valid", "test"):
        made = [replace(one, name=f"{split}/IMG_{i}_jpg.rf.00ff") for i, one in enumerate(photos(4, seed=ord(split[1])))]
        for photo in made:
            write_image(root, photo)
        annotated.coco(root, made, file=f"{split}/_annotations.coco.json")
        every += made
    return every


def splits_of_files(root: Path) -> Sequence[Photo]:
    made = photos(8)
    for photo in made:
        write_image(root, photo)
    annotated.coco(root, made[:5], file="annotations/instances_train.json")
    annotated.coco(root, made[5:], file="annotations/instances_val2017.json")
    return made


def yolo(root: Path) -> Sequence[Photo]:
    """Names as a list in a file of another name, and a photo in valid/ that is called train."""
    made = [replace(one, name=f"images/{'valid' if i > 4 else 'train'}/train_{i}") for i, one in enumerate(photos(8))]
    for photo in made:
        write_image(root, photo)
    annotated.yolo(root, made)
    (root / "data.yaml").unlink()
    (root / "street-seg.yaml").write_text(f"train: ../train/images\nval: ../valid/images\nnc: 3\nnames: {json.dumps(NAMES)}\n")
    return made


@pytest.mark.parametrize("build", [roboflow, splits_of_files, yolo])
def test_splits_that_an_export_has_are_kept(build: Build, tmp_path: Path) -> None:
    made = build(tmp_path / "set")
    manifest, said = prepared(tmp_path / "set")
    check(manifest, made)
    assert "splits are read from the names" in said
    held_out = {"roboflow": {"valid", "test"}, "yolo": {"images/valid"}}.get(build.__name__, set())
    for row in manifest.rows.values():
        split = "val" if Path(row.image_path).parent.name == "valid" else "test" if "test/" in row.image_path else "train"
        if held_out or row.image_path < "images/photo_005":
            assert row.split == split
        else:
            assert row.split == "val"


# --- masks ------------------------------------------------------------------------------------------------------------


def masks(images: str, folder: str, write: Callable[[np.ndarray], Image.Image] = Image.fromarray) -> Build:
    """Images and masks by templates of their paths with {i} and {split}."""

    def build(root: Path) -> Sequence[Photo]:
        made = []
        for i, one in enumerate(photos(8)):
            split = ("train", "val", "test")[max(0, i - 5)]
            path, mask = Path(images.format(i=i, split=split)), root / folder.format(i=i, split=split)
            made.append(replace(one, name=path.with_suffix("").as_posix(), suffix=path.suffix))
            write_image(root, made[-1])
            mask.parent.mkdir(parents=True, exist_ok=True)
            write(one.mask()).save(mask)
        return made

    return build


@pytest.mark.parametrize(
    ("images", "folder", "splits"),
    [
        ("images/{i}.jpg", "masks/{i}.tif", False),
        ("images/Käfer am Bach/Straße {i}.JPG", "masks/Käfer am Bach/Straße {i}.png", False),
        ("Fotos/Tag 1/{i}.jpg", "masks/Tag 1/{i}.png", False),
        ("images/{split}/{i}.jpg", "annotations/{split}/{i}.png", True),
        ("{split}/images/{i}.jpg", "{split}/masks/{i}.png", True),
        ("{split}/{i}.png", "{split}annot/{i}.png", True),
        ("701_StillsRaw_full/{i}.png", "LabeledApproved_full/{i}_L.png", False),
        ("images/{i}.jpg", "masks/{i}_mask.png", False),
        ("{i}.jpg", "{i}.png", False),
        ("JPEGImages/{i}.jpg", "SegmentationClassPNG/{i}.png", False),
    ],
)
def test_folders_of_masks_are_paired(images: str, folder: str, splits: bool, tmp_path: Path) -> None:
    made = masks(images, folder)(tmp_path / "set")
    (tmp_path / "set/classes.txt").write_text("\n".join(ALL))
    manifest, _ = prepared(tmp_path / "set")
    check(manifest, made)
    assert manifest.classes == ALL
    if splits:
        rows = sorted(manifest.rows.values(), key=lambda row: Path(row.image_path).stem)
        assert [row.split for row in rows[5:]] == ["train", "val", "test"]


def levels(*values: int, mode: str = "L") -> Callable[[np.ndarray], Image.Image]:
    return lambda mask: Image.fromarray(np.array(values, np.uint8)[mask]).convert(mode)


def palette_of_each_picture(mask: np.ndarray) -> Image.Image:
    """As programs write it that number the colours of each picture anew; here photos without a car number them otherwise."""
    used = sorted(np.unique(mask).tolist(), reverse=bool(mask[0, 0] == mask[-1, -1] and mask.sum() % 2))
    picture = Image.fromarray(np.array([used.index(value) if value in used else 0 for value in range(4)], np.uint8)[mask])
    colours = list(COLOURS.values())
    picture.putpalette([part for value in used for part in colours[value]])
    return picture


@pytest.mark.parametrize(
    ("write", "classes", "means"),
    [
        (levels(0, 1, 2, 3, mode="I;16"), 4, (0, 1, 2, 3)),
        (levels(0, 1, 2, 3, mode="I"), 4, (0, 1, 2, 3)),
        (levels(0, 1, 2, 3, mode="RGB"), 4, (0, 1, 2, 3)),
        (levels(0, 1, 2, 3, mode="RGBA"), 4, (0, 1, 2, 3)),
        (levels(0, 255, 255, 255), 2, (0, 1, 1, 1)),
        (levels(0, 255, 255, 255, mode="RGB"), 2, (0, 1, 1, 1)),
        (levels(0, 75, 150, 150), 3, (0, 1, 2, 2)),
        (levels(0, 128, 255, 255), 3, (0, 1, 2, 2)),
        (levels(0, 85, 170, 255), 4, (0, 1, 2, 3)),
        (levels(0, 100, 200, 255), 3, (0, 1, 2, 255)),
        (levels(0, 1, 2, 255, mode="RGB"), 3, (0, 1, 2, 255)),
        (palette_of_each_picture, 4, (0, 3, 2, 1)),
    ],
)
def test_values_of_masks_become_ids(
    write: Callable[[np.ndarray], Image.Image], classes: int, means: Sequence[int], tmp_path: Path
) -> None:
    own_palette = write is palette_of_each_picture
    made = masks("images/{i}.png", "masks/{i}.png" if own_palette else "masks/{i}.tif", write)(tmp_path / "set")
    manifest, _ = prepared(tmp_path / "set")
    check(manifest, made, means)
    assert len({*manifest.palette}) == len(manifest.classes) == classes
    assert manifest.palette[1] == (COLOURS["car"] if own_palette else (128, 0, 0))  # never a grey that pictures could not show


def test_cvat_masks_come_as_an_archive_with_their_names_and_colours(tmp_path: Path) -> None:
    made = photos(6, folder="JPEGImages")
    (tmp_path / "set").mkdir()
    annotated.colour_masks(tmp_path / "set", made)
    shutil.copytree(tmp_path / "set/SegmentationClass", tmp_path / "set/SegmentationObject")  # instances, which are no photos
    _, said = init(zipped(tmp_path / "set"))
    assert re.search(r"--root \S+/export\.zip: has labelmap\.txt and masks, but not their photos; export with 'Save images'", said)
    assert not (tmp_path / "project").exists()
    for photo in made:
        write_image(tmp_path / "set", photo)
    manifest, said = prepared(zipped(tmp_path / "set"))
    check(manifest, made)
    assert manifest.classes == ALL and manifest.palette == tuple(COLOURS.values()) and "not used" not in said


def voc(root: Path, **lists: str) -> Sequence[Photo]:
    """`lists`: the numbers of the photos in each list."""
    made = photos(6, folder="JPEGImages")
    for photo in made:
        write_image(root, photo)
    annotated.colour_masks(root, made)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for name, numbers in lists.items():
        lines = [f"photo_{number:03}\n" for number in map(int, numbers.split())]
        (root / f"ImageSets/Segmentation/{name}").with_suffix(".TXT" if name.isupper() else ".txt").write_text("".join(lines))
    return made


@pytest.mark.parametrize(
    ("lists", "splits"),
    [
        ({"train": "0 1 2", "val": "3 4", "test": "5", "trainval": "0 1 2 3 4"}, "train train train val val test"),
        ({"TRAIN": "0 1 2 3 4", "Validation": "5"}, "train train train train train val"),
        ({"train": "0 1 2 3 4", "test": "5", "val": ""}, "train train train train train test"),
        ({"val": "1", "test": "2"}, "train val test train train train"),
        ({"default": "0 1 2 3 4 5"}, None),
        ({"train": "0 1 2 3 4 5", "default": "0"}, None),
        ({"val": "1 2"}, None),
    ],
)
def test_lists_of_voc_layouts_become_splits(lists: dict[str, str], splits: str | None, tmp_path: Path) -> None:
    check_of = voc(tmp_path / "set", **lists)
    manifest, said = prepared(tmp_path / "set")
    check(manifest, check_of)
    assert ("splits are read from ImageSets/Segmentation/" in said, "is drawn for validation" in said) == (bool(splits), not splits)
    assert (".txt: not used, because there is no list of another split" in said) == (set(lists) in ({"train", "default"}, {"val"}))
    if splits:
        assert [manifest.rows[image_id].split for image_id in sorted(manifest.rows)] == splits.split()


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        (
            {"train": "0 1 2 3 4", "val": "4 5"},
            r"val\.txt: 'photo_004' is in ImageSets/Segmentation/train\.txt too; remove it from one",
        ),
        ({"train": "0 1 2 3 9", "val": "4 5"}, r"train\.txt, line 5: no image has the id or path 'photo_009'"),
        (
            {"train": "0 1 2", "val": "5"},
            r"'photo_003' has a mask and stands in no list of ImageSets/Segmentation \(and 1 more\); add",
        ),
        (
            {"train": "0 1 2 3", "val": "4 5", "gone": ""},
            r"val\.txt: the val image 'photo_005' has no mask; add the mask or remove",
        ),
    ],
)
def test_lists_that_do_not_fit_the_images_are_refused(lists: dict[str, str], words: str, tmp_path: Path) -> None:
    voc(tmp_path / "set", **lists)
    if "gone" in lists:
        (tmp_path / "set/SegmentationClass/photo_005.png").unlink()
    _, said = init(tmp_path / "set")
    assert re.search(words, said), said


# --- names ------------------------------------------------------------------------------------------------------------


def test_classes_come_in_the_order_that_the_user_gives(tmp_path: Path) -> None:
    made = tool("coco polygons")(tmp_path / "set")
    (tmp_path / "names.txt").write_text("nothing\ncar, truck\ntree\nroad\n")
    _, said = init(tmp_path / "set", "--classes", str(tmp_path / "names.txt"))
    assert "--classes: lacks 'car', which the annotations have" in said
    file = tmp_path / "set/annotations/instances_default.json"
    file.write_text(file.read_text().replace('"car"', '"car, truck "'))
    manifest, said = prepared(tmp_path / "set", "--classes", str(tmp_path / "names.txt"))
    assert manifest.classes == ("nothing", "car, truck", "tree", "road") and "become the class nothing" in said
    check(manifest, made, (0, 3, 2, 1))


def test_pixels_outside_of_all_regions_may_have_no_class(tmp_path: Path) -> None:
    made = tool("coco polygons")(tmp_path / "set")
    manifest, said = prepared(tmp_path / "set", "--classes", "car,road,tree")
    check(manifest, made, (255, 1, 2, 0))
    assert "pixels outside of all regions have no class" in said


def test_names_of_no_class_are_void(tmp_path: Path) -> None:
    made = tool("labelme beside")(tmp_path / "set")
    for path in (tmp_path / "set").rglob("*.json"):
        path.write_text(path.read_text().replace('"tree"', '"__ignore__"'))
    manifest, said = prepared(tmp_path / "set")
    assert manifest.classes == ("background", "car", "road") and "__ignore__: no class, because of the name" in said
    check(manifest, made, (0, 2, 255, 1))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("labels.txt", "__ignore__\nbackground\nroad\ntree\ncar\n"),
        ("classes.txt", "\ufeff# of 2026\r\nbackground\r\nroad\r\ntree\r\ncar\r\n\r\n"),
        ("data.yaml", "nc: 4\nnames: {0: background, 1: road, 2: tree, 3: car}\n"),
        ("_classes.csv", "Pixel Value, Class\n0, background\n1, road\n3, car\n2, tree\n"),
    ],
)
def test_names_of_values_come_from_files_of_tools(file: str, text: str, tmp_path: Path) -> None:
    made = masks("{i}.jpg", "{i}_mask.png")(tmp_path / "set")
    (tmp_path / "set" / file).write_text(text)
    manifest, said = prepared(tmp_path / "set")
    assert manifest.classes == ALL and f"{file}, background, road, tree, car" in said
    check(manifest, made)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("road,tree,road", "--classes road,tree,road: 'road' stands twice; give each class a name of its own"),
        ("road,,car", "--classes road,,car: a name is empty; name all classes"),
        ("a\nb\nb\n", "names.txt: 'b' stands twice; give each class a name of its own"),
        ("a\n\nb\n", "names.txt, line 2: is empty; write the name of a class there, or remove the line"),
        ("# only this\n", "names.txt: holds no name; write a name a line"),
        ("a\nb\n", "--classes: 2 names, but the masks hold the class id 3; name all classes"),
    ],
)
def test_names_that_cannot_be_are_named(given: str, said: str, tmp_path: Path) -> None:
    masks("{i}.jpg", "{i}_mask.png")(tmp_path / "set")
    (tmp_path / "names.txt").write_text(given)
    assert said in init(tmp_path / "set", "--classes", str(tmp_path / "names.txt") if "\n" in given else given)[1]


def test_names_for_ids_from_one_begin_at_one(tmp_path: Path) -> None:
    made = masks("images/{i}.jpg", "masks/{i}.png", levels(1, 2, 3, 4))(tmp_path / "set")
    manifest, said = prepared(tmp_path / "set", "--classes", ",".join(ALL))
    assert manifest.classes == ALL and "the first class is 1 (data.values)" in said
    check(manifest, made)


# --- what cannot be read ----------------------------------------------------------------------------------------------


def without_photos(root: Path) -> None:
    annotated.coco(root, photos(3))


def damaged(root: Path) -> None:
    tool("coco polygons")(root)
    next(root.rglob("*.json")).write_text('{"images": [')


def boxes(root: Path) -> None:
    tool("yolo")(root)
    for path in root.rglob("labels/**/*.txt"):
        path.write_text("0 0.5 0.5 0.1 0.1\n")


def without_names(root: Path) -> None:
    tool("yolo")(root)
    (root / "data.yaml").unlink()


def many_classes(root: Path) -> None:
    tool("coco polygons")(root)
    file = next(root.rglob("*.json"))
    content = json.loads(file.read_text())
    content["categories"] += [{"id": number, "name": f"thing {number}"} for number in range(100, 400)]
    file.write_text(json.dumps(content))


def png_of_label_studio(root: Path) -> None:
    masks("images/{i}.jpg", "masks/task-{i}-annotation-1-by-1-tag-road-0.png")(root)


def smooth(root: Path, known: bool = True) -> None:
    """Colours half way between neighbours, as smooth edges have them."""
    made = photos(8, folder="JPEGImages")
    for photo in made:
        write_image(root, photo)
    annotated.colour_masks(root, made)
    for path in (root / "SegmentationClass").iterdir():
        pixels = np.array(Image.open(path))
        pixels[:20, 1:] = (pixels[:20, 1:].astype(int) + pixels[:20, :-1]) // 2
        Image.fromarray(pixels).save(path)
    if not known:
        (root / "labelmap.txt").unlink()


def other_suffix(root: Path) -> None:
    tool("coco polygons")(root)
    for path in (root / "images").iterdir():
        path.rename(path.with_suffix(".jpg"))


def capitals(root: Path) -> None:
    masks("images/IMG_{i}.JPG", "masks/IMG_{i}.png")(root)
    (root / "masks/IMG_1.png").rename(root / "masks/img_1.png")


def two_of_a_name(root: Path) -> None:
    masks("images/{i}.jpg", "masks/{i}.png")(root)
    Image.new("RGB", (64, 48)).save(root / "images/0.png")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (without_photos, r"holds no photo beside its COCO JSON; put the photos into \S+/set, too; readable"),
        (damaged, r"has 8 images and no labels, but annotations/instances_default\.json is damaged"),
        (boxes, r"YOLO text files without a region of any photo; labels/: what has no area is left out: bounding box \(8\)"),
        (without_names, r"no data\.yaml \(names: \[\.\.\.\]\) or classes\.txt \(a name a line\); add it"),
        (many_classes, r"COCO JSON of 304 classes, 3 of them with a region; a data set has at most 254: name the classes"),
        (
            png_of_label_studio,
            r"Label Studio's PNG export do not name their photos; in Label Studio choose Export, JSON, and put that",
        ),
        (
            smooth,
            r"4 colours of 172 pixels, such as \[0, 0, 71\], are not in labelmap\.txt; add a line for each class",
        ),
        (other_suffix, r"8 images that annotations\S+ names are not there, such as photo_000\.png.* called images/photo_000\.jpg"),
        (capitals, r"no image 'img_1' in \S+; give it the capitals of IMG_1\.JPG, or remove the mask"),
        (two_of_a_name, r"images/0\.png: same name as \S+images/0\.jpg but for the suffix or Unicode form; remove or rename one"),
    ],
)
def test_what_cannot_be_read_is_named_by_init(build: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    build(tmp_path / "set")
    _, said = init(tmp_path / "set")
    assert re.search(words, said), said
    assert not (tmp_path / "project/params.yaml").exists()


def test_an_archive_is_named_as_it_was_given(tmp_path: Path) -> None:
    without_photos(tmp_path / "bare")
    archive = zipped(tmp_path / "bare")
    _, said = init(archive)
    assert f"--root {archive}: holds no photo beside its COCO JSON; put the photos into {archive}, too" in said
    masks("images/{i}.jpg", "masks/{i}.png")(tmp_path / "set")
    Image.new("RGB", (64, 48)).save(tmp_path / "set/other.png")
    _, said = init(zipped(tmp_path / "set"))
    assert f"1 of the 17 pictures below {archive} is not used" in said and "/.export.zip" not in said


def test_smooth_edges_and_masks_beside_json_are_no_classes_and_no_photos(tmp_path: Path) -> None:
    smooth(tmp_path / "set", known=False)
    _, said = init(tmp_path / "set")
    assert re.search(
        r"warning: \d of the colours, with \d+ pixels, lie between two other colours, such as \[0, 0, 71\]: smooth", said
    )
    made = tool("label studio brush")(tmp_path / "other/set")
    Image.new("L", (64, 48)).save(tmp_path / "other/set/task-1-annotation-2-by-3-tag-road-0.png")
    manifest, said = prepared(tmp_path / "other/set")
    assert len(manifest.rows) == len(made) and "1 of the 9 pictures" in said and "not used, such as task-1-" in said


def test_a_photo_that_is_missing_is_told_of(tmp_path: Path) -> None:
    made = tool("cvat polygons")(tmp_path / "set")
    (tmp_path / f"set/{made[0].name}.png").unlink()
    manifest, said = prepared(tmp_path / "set")
    check(manifest, made[1:])
    assert "1 image that annotations.xml names is not there, such as photo_000.png: their labels are left out" in said
