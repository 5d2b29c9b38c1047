"""Finding images and masks in each folder layout, and naming what is missing; test_bad_inputs has more that is refused."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgd_pipeline.data.cityscapes import CITYSCAPES, index_cityscapes
from mgd_pipeline.data.datasets import index_dataset, names_of
from mgd_pipeline.data.folders import index_folder, scan_mask_values
from mgd_pipeline.data.index import DatasetIndex
from mgd_pipeline.data.listing import matches, what_dvc_cannot_read
from mgd_pipeline.data.shapes import CLASSES, write_shapes
from mgd_pipeline.data.voc import index_voc, voc_palette
from mgd_pipeline.errors import DataError
from mgd_pipeline.params import CityscapesData, FolderData, ShapesData, VocData
from test_manifest import folder_params

NAMES = ("2007_000032", "2007_000033", "2007_000039", "2008_000008", "2009_000001")
"""Of VOC; the first three have masks of VOC's own, the second one is val."""


def touch(root: Path, *names: str, text: str = "") -> Path:
    """Files below a folder; returns the last one."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root / names[-1]


def ids(index: DatasetIndex, split: str) -> list[str]:
    return [sample.image_id for sample in index.samples if sample.split == split]


def texts(index: DatasetIndex) -> list[str]:
    return [note.text for note in index.notes]


def make_voc(top: Path, aug: bool = False) -> Path:
    touch(top, *(f"JPEGImages/{name}.jpg" for name in NAMES), *(f"SegmentationClass/{name}.png" for name in NAMES[:3]))
    if aug:
        touch(top, *(f"SegmentationClassAug/{name}.png" for name in NAMES))
    touch(top, "ImageSets/Segmentation/train.txt", text="2007_000039\n2007_000032\n")
    touch(top, "ImageSets/Segmentation/val.txt", text="2007_000033\n")
    return top


@pytest.mark.parametrize("inside", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_without_aug(tmp_path: Path, inside: str) -> None:
    make_voc(tmp_path / inside)
    index = index_voc(tmp_path)
    assert [ids(index, split) for split in ("train", "val", "test")] == [["2007_000032", "2007_000039"], ["2007_000033"], []]
    assert index.samples[0].image == Path(inside) / "JPEGImages/2007_000032.jpg"
    assert index.samples[0].mask == Path(inside) / "SegmentationClass/2007_000032.png"
    assert len(index.classes) == len(index.palette) == 21
    assert index.lookup[:21] == tuple(range(21)) and index.lookup[255] == 255 and set(index.lookup[21:255]) == {-1}


def test_voc_with_aug_trains_on_all_masks_but_val_and_passes_over_none(tmp_path: Path) -> None:
    index = index_voc(make_voc(tmp_path, aug=True))
    assert ids(index, "train") == [name for name in NAMES if name != "2007_000033"]
    masks = {sample.image_id: str(sample.mask) for sample in index.samples}
    assert masks["2007_000032"] == "SegmentationClassAug/2007_000032.png"
    assert masks["2007_000033"] == "SegmentationClass/2007_000033.png", "val keeps VOC's own masks"
    touch(tmp_path, "JPEGImages/scan.gif", "SegmentationClassAug/README")
    assert texts(index_voc(tmp_path)) == ["1 picture is left out, such as scan.gif: .gif is not read"]
    (tmp_path / "SegmentationClassAug/2008_000008.png").rename(tmp_path / "SegmentationClassAug/2008_000008.mat")
    with pytest.raises(DataError, match=r"8\.mat: would be the mask of 2008_000008\.jpg, but the format \.mat is not read"):
        index_voc(tmp_path)


def test_voc_palette_is_the_published_one() -> None:
    known = {1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    palette = voc_palette(254)
    assert {index: palette[index] for index in known} == known and len(set(palette)) == 254


@pytest.mark.parametrize("name", ["train.txt", "val.txt", "trainaug.txt"])
@pytest.mark.parametrize(
    "line", ["{0}", "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png ", "JPEGImages/{0}.jpg\tSegmentationClass/{0}.png\r"]
)
def test_vocs_own_lists_in_every_form(tmp_path: Path, name: str, line: str) -> None:
    make_voc(tmp_path, aug=name == "trainaug.txt")
    names = {"train.txt": ["2007_000039", "2007_000032"], "val.txt": ["2007_000033"], "trainaug.txt": ["2009_000001"]}[name]
    touch(tmp_path, f"ImageSets/Segmentation/{name}", text="\ufeff" + "\n".join(line.format(name) for name in names))
    index = index_voc(tmp_path)
    assert ids(index, "val" if name == "val.txt" else "train") == sorted(names)
    assert [note.text.partition(" names a mask")[0] for note in index.notes] == [f"line 1 of {name}"] * (
        name == "trainaug.txt" and "SegmentationClass/" in line
    )


@pytest.mark.parametrize(
    ("gone", "text", "words"),
    [
        ("JPEGImages/2007_000039.jpg", "2007_000039", r"2007_000039\.jpg: no such file, but train has 2007_000039 \(line 1 of tr"),
        ("ImageSets/Segmentation/val.txt", "2007_000039", r"val\.txt: no such list of ids; complete the copy"),
        ("JPEGImages", "2007_000039", "no JPEGImages/ here or in VOCdevkit/VOC2012/"),
        ("", "2007_000039\n\n2007_000032 -1\n", r"-1\.jpg: no such file, but train has 2007_000032 -1 \(line 3 of train\.txt\)"),
        ("", "2007_000039\nJPEGImages/2007_000039.jpg\n", r"train\.txt, line 2: '2007_000039' stands twice; keep one line"),
        ("", "2007_000039.jpg 2007_000032.png\n", "line 1: '2007_000032.png' is no mask of '2007_000039'; write Segm"),
        ("", "2007_000039.jpg other/2007_000039.png\n", "line 1: 'other/2007_000039.png' is no mask of '2007_000039'; write Segm"),
    ],
)
def test_voc_that_is_incomplete_names_the_file_or_line(tmp_path: Path, gone: str, text: str, words: str) -> None:
    touch(make_voc(tmp_path), "ImageSets/Segmentation/train.txt", text=text)
    if gone:
        (tmp_path / gone).rename(tmp_path / "gone")
    with pytest.raises(DataError, match=words):
        index_voc(tmp_path)


@pytest.fixture
def city(tmp_path: Path) -> Path:
    for place in ("train/aachen/aachen_000000", "train/aachen/aachen_000001", "train/bochum/bochum_000000", "val/bonn/bonn_000000"):
        touch(tmp_path, f"leftImg8bit/{place}_000019_leftImg8bit.png")
        touch(tmp_path, *(f"gtFine/{place}_000019_gtFine_{kind}.png" for kind in ("labelIds", "color")))
    touch(tmp_path, "leftImg8bit/test/rome/rome_000000_000019_leftImg8bit.png")
    return tmp_path


AACHEN = "gtFine/train/aachen/aachen_000001_000019_gtFine_"


def test_cityscapes(city: Path) -> None:
    index = index_cityscapes(city)
    assert ids(index, "train") == ["aachen_000000_000019", "aachen_000001_000019", "bochum_000000_000019"]
    assert ids(index, "val") == ["bonn_000000_000019"] and index.notes == ()
    assert index.samples[1].mask == Path(f"{AACHEN}labelIds.png")
    assert len(index.classes) == len(index.palette) == 19 and index.classes[13] == "car"
    assert [index.lookup[label] for label in (7, 8, 26, 33)] == [0, 1, 13, 18]
    assert {index.lookup[label] for label in (0, 6, 9, 18, 29, 30, 255)} == {255} and set(index.lookup[34:255]) == {-1}
    assert [index.lookup[label] for _, label, _ in CITYSCAPES] == list(range(19))


def test_cityscapes_without_a_mask(city: Path) -> None:
    mask = city / f"{AACHEN}labelIds.png"
    for suffix in ("labelIds.tif", "labelTrainIds.png"):
        other = mask.rename(city / f"{AACHEN}{suffix}")
        with pytest.raises(DataError, match=rf"_gtFine_{suffix}: is not read, and {mask.name} is missing"):
            index_cityscapes(city)
        other.rename(mask)
    mask.unlink()
    assert [sample.image_id for sample in index_cityscapes(city).samples if not sample.mask] == ["aachen_000001_000019"]
    touch(city, "leftImg8bit/train/aachen/aachen_000002_000019_leftImg8bit.jpg")
    (city / "leftImg8bit/train/bochum/bochum_000000_000019_leftImg8bit.png").unlink()
    counts = "1 train image counts as unlabelled, such as aachen_000001_000019_gtFine_color.png"
    assert texts(index_cityscapes(city)) == [
        "1 picture is left out, such as aachen_000002_000019_leftImg8bit.jpg: not called <city>_*_leftImg8bit.png",
        f"{counts}: annotated, but without *_gtFine_labelIds.png",
        "1 mask belongs to no image, such as bochum_000000_000019_gtFine_labelIds.png: no such file below leftImg8bit/",
    ]
    mask.symlink_to("gone.png")
    assert all(sample.mask for sample in index_cityscapes(city).samples), "a lost mask is no unlabelled image"
    (city / "gtFine/val/bonn/bonn_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(DataError, match=r"bonn_000000_000019_gtFine_labelIds\.png: no mask for val image"):
        index_cityscapes(city)


class Own:
    """A data set in one of the two layouts of your own images; paths are written without the folder of the split."""

    def __init__(self, root: Path, layout: dict[str, Any], split: str = "") -> None:
        self.root, self.params, self.split = root, folder_params(**layout), split

    def path(self, name: str) -> Path:
        kind, _, rest = name.partition("/")
        return self.root / kind / self.split / rest

    def add(self, *names: str) -> Path:
        return touch(self.root, *(str(self.path(name).relative_to(self.root)) for name in names))

    def index(self) -> DatasetIndex:
        return index_folder(self.root, self.params)

    def refused(self, words: str) -> None:
        with pytest.raises(DataError, match=words):
            self.index()


@pytest.fixture(params=["splits", "globs"])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Own:
    globs = {"images": "images/**/*", "masks": "masks/**/*", "val_fraction": 0.0, "test_fraction": 0.0}
    return Own(tmp_path / "data", {}, "train") if request.param == "splits" else Own(tmp_path / "data", globs)


def test_folder(tmp_path: Path) -> None:
    """Three splits, subfolders, every suffix, an umlaut, an image without a mask, and files that are no images."""
    names = ("train/a.jpg", "train/sub/a.PNG", "train/Größe 1.jpeg", "train/unlabelled.webp", "val/v.png", "test/t.bmp")
    touch(tmp_path, *(f"images/{name}" for name in names), "images/train/._a.jpg", "images/train/notes.txt")
    touch(tmp_path, *(f"masks/{Path(name).with_suffix('.png')}" for name in names if "unlabelled" not in name))
    index = index_folder(tmp_path, folder_params())
    assert ids(index, "train") == ["Größe 1", "a", "sub/a", "unlabelled"]
    assert (ids(index, "val"), ids(index, "test")) == (["v"], ["t"])
    by_id = {sample.image_id: sample for sample in index.samples}
    assert by_id["sub/a"].image == Path("images/train/sub/a.PNG") and by_id["sub/a"].mask == Path("masks/train/sub/a.png")
    assert by_id["unlabelled"].mask is None and by_id["Größe 1"].mask == Path("masks/train/Größe 1.png")
    for ignore, lookup in ((255, (0, 1, *[-1] * 253, 255)), (0, (255, 1, *[-1] * 254)), (9, (0, 1, *[-1] * 7, 255, *[-1] * 246))):
        assert index_folder(tmp_path, folder_params(ignore=ignore)).lookup == lookup
    for kind in ("masks", "images"):
        place = tmp_path / kind / "val"
        shutil.rmtree(place)
        place.symlink_to("gone")
        with pytest.raises(DataError, match=rf"{kind}/val: is a link to gone, which does not exist"):
            index_folder(tmp_path, folder_params())
        place.unlink()
        place.touch()
        with pytest.raises(DataError, match=rf"{kind}/val: is a file, not a folder"):
            index_folder(tmp_path, folder_params())


def test_names_match_in_either_unicode_form(own: Own) -> None:
    own.add("images/Tu\u0308r.jpg", "masks/T\u00fcr.png")
    (sample,) = own.index().samples
    assert sample.image_id == "T\u00fcr"
    assert sample.mask is not None and (own.root / sample.image).is_file() and (own.root / sample.mask).is_file()


@pytest.mark.parametrize("linked", ["images", "masks", "both", "root"])
def test_links_to_folders_are_followed_and_links_to_nothing_refused(own: Own, linked: str) -> None:
    own.add("images/own/a.png", "masks/own/a.png", "images/site2/deep/b.png", "masks/site2/deep/b.png")
    kinds = {"both": ("images", "masks"), "root": ()}.get(linked, (linked,))
    for number, folder in enumerate([own.path(f"{kind}/site2") for kind in kinds] or [own.root]):
        elsewhere = folder.rename(own.root.with_name(f"elsewhere{number}"))
        folder.symlink_to(elsewhere)
    assert ids(own.index(), "train") == ["own/a", "site2/deep/b"] and all(sample.mask for sample in own.index().samples)
    for kind in ("images", "masks"):
        lost = own.path(f"{kind}/again")
        lost.symlink_to("gone")
        own.refused("again: is a link to gone, which does not exist; restore what it links to")
        lost.rename(lost.with_name(".#again"))
    assert len(own.index().samples) == 2, "hidden files are no part of the data set"


@pytest.mark.parametrize("name", ["b.JXL", "b.npy", "b", "b.png_", "b.PNG.bak", "b.nii.gz"])
def test_no_mask_is_passed_over(own: Own, name: str) -> None:
    own.add("images/a.jpg", "masks/a.png", "images/b.jpg", "images/c.jpg", "masks/Thumbs.db", "masks/._b.tif")
    assert [sample.image_id for sample in own.index().samples if sample.mask] == ["a"] and own.index().notes == ()
    mask = own.add(f"masks/{name}")
    own.refused(rf"/{name}: would be the mask of b\.jpg, but .* is not read; save the mask as PNG")
    mask.rename(mask.with_name("lonely.gif"))
    own.refused(r"lonely\.gif: no image 'lonely' in .*images")
    own.add("images/lonely.JP2")
    own.refused(r"lonely\.gif: no image 'lonely' in .*; save lonely\.JP2, which is not read, as PNG or JPEG")


def test_what_is_left_out_is_said(own: Own) -> None:
    """Notes stay on one line. Files of file managers are not told of; macOS calls the picture of a folder Icon with a CR."""
    own.add("images/a.jpg", "masks/a.png", "images/b.jxl", "images/c.JP2", "masks/Icon\r", "masks/Thumbs.db")
    own.add("masks/a\nb.txt", "masks/b_mask.npy")
    assert texts(own.index()) == [
        "2 pictures are left out, such as b.jxl: .JP2, .jxl is not read",
        "2 files among the masks are left out, such as 'a\\nb.txt': no mask in a format that is read",
    ]


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".Trash-1000/files", "@eaDir/a.jpg", "__MACOSX", "$RECYCLE.BIN"])
def test_what_lies_in_hidden_folders_is_no_image(own: Own, hidden: str) -> None:
    """Notebooks, desktops and file servers keep copies, deleted files and thumbnails between the images."""
    own.add("images/a.jpg", "masks/a.png", f"images/{hidden}/b.jpg", f"masks/{hidden}/c.png")
    assert [sample.image_id for sample in own.index().samples] == ["a"] and not own.index().notes


@pytest.mark.parametrize(("folder", "other"), [("images/train", "images/Train"), ("leftImg8bit/val", "leftImg8bit/VAL")])
def test_a_folder_in_other_capitals_is_named(tmp_path: Path, folder: str, other: str) -> None:
    """Windows and macOS do not tell them apart."""
    touch(tmp_path, "images/train/a.jpg", "masks/train/a.png", "leftImg8bit/train/x/x_0_leftImg8bit.png", "leftImg8bit/val/x.png")
    (tmp_path / folder).rename(tmp_path / other)
    index = index_cityscapes if "Img8bit" in folder else lambda root: index_folder(root, folder_params())
    remedy = f"rename it: mv {tmp_path / other} {tmp_path / folder}"
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / other}: must be called {Path(folder).name}; {remedy}")):
        index(tmp_path)


def test_masks_that_the_glob_does_not_match_are_said(tmp_path: Path) -> None:
    touch(tmp_path, "photos/s/a.jpg", "photos/s/b.jpg", "labels/s/a.png", "labels/s/b.gif", "labels/s/c.gif")
    (note,) = index_folder(tmp_path, folder_params(images="photos/**/*.jpg", masks="labels/**/*.png")).notes
    assert note.text.startswith("1 picture is not a mask, such as b.gif: called like an image without a mask, but ")
    assert note.text.endswith("labels/**/*.png does not match") and note.remedy == "correct data.masks, or remove them"


@pytest.mark.parametrize(
    ("pattern", "path", "match"),
    [
        ("*.jpg", "a.jpg", True),
        ("*.jpg", "s/a.jpg", False),
        ("**/*.jpg", "a.jpg", True),
        ("**/*.jpg", "s/t/a.jpg", True),
        ("s?/**/[ab].png", "s1/t/a.png", True),
        ("**", "s/a.png", True),
        ("**/t/**/*.png", "s/u/a.png", False),
        ("**.png", "a.png", True),
    ],
)
def test_globs(pattern: str, path: str, match: bool) -> None:
    assert matches(path.split("/"), pattern.split("/")) == match


def test_what_dvc_cannot_read_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "data", "images/train/a.jpg")
    (tmp_path / "linked").symlink_to("data")
    assert what_dvc_cannot_read(tmp_path / "linked") == []
    for number, name in enumerate((".hidden", "images/.#lock", "notes", "images/train/x.png")):
        (tmp_path / "data" / name).symlink_to("gone" if number else ".hidden")
    os.mkfifo(tmp_path / "data/pipe")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/.hidden").symlink_to("gone")
    (tmp_path / "data/images/train/more").symlink_to(tmp_path / "elsewhere")
    said = [str(error).replace(f"{tmp_path}/linked/", "") for error in what_dvc_cannot_read(tmp_path / "linked")]
    link = "is a link that leads to no file, and DVC reads every file; restore what it links to, or remove the link"
    names = (".hidden", "images/.#lock", "images/train/x.png", "notes")
    assert said[:4] == [f"{name}: {link}" for name in names]
    assert said[4] == "pipe: is a pipe, socket or device, and DVC reads every file; remove it from the data set"
    assert said[5].startswith("images/train/more: is a link to a folder, and `dvc repro` does not notice changes behind it; after")
    assert str(what_dvc_cannot_read(tmp_path / "linked", 2)[2]).endswith("3 more files that DVC cannot read; mend them likewise")


def make_globs(root: Path, count: int) -> FolderData:
    for i in range(count):
        touch(root, f"photos/s{i % 3}/{i:03d}.jpg", *([f"labels/png/s{i % 3}/{i:03d}.png"] if i % 4 else []))
    return folder_params(images="photos/**/*.jpg", masks="labels/png/**/*.png", val_fraction=0.2, test_fraction=0.3)


def test_globs_match_below_their_fixed_part_and_draw_splits(tmp_path: Path) -> None:
    params = make_globs(tmp_path, 5)
    for share, train in ((0.01, 3), (0.0, 5)):
        index = index_folder(tmp_path, params.model_copy(update={"val_fraction": share, "test_fraction": share}))
        assert len(ids(index, "train")) == train and len(ids(index, "val")) == len(ids(index, "test")) == (share > 0)
    make_globs(tmp_path, 100)
    before = {sample.image_id: sample.split for sample in index_folder(tmp_path, params).samples}
    make_globs(tmp_path, 200)
    index = index_folder(tmp_path, params)
    after = {sample.image_id: sample.split for sample in index.samples}
    assert len(after) == 200 and {image_id: after[image_id] for image_id in before} == before, "further images move no other"
    assert all(sample.mask for sample in index.samples if sample.split != "train")
    assert sum(sample.mask is None for sample in index.samples) == 50
    assert index.samples[1].image_id == "s0/003" and index.samples[1].mask == Path("labels/png/s0/003.png")
    assert 18 <= len(ids(index, "val")) <= 42, "near 20 % of the 150 with a mask"
    assert 30 <= len(ids(index, "test")) <= 60, "near 30 % of the 150 with a mask"
    assert index_folder(tmp_path, params) == index
    assert ids(index_folder(tmp_path, params.model_copy(update={"partition_seed": 1})), "val") != ids(index, "val")


def test_shapes_index_is_what_was_asked_for(tmp_path: Path) -> None:
    params = ShapesData(dataset="shapes", root="shapes", partition="1/2", height=32, width=32, train=3, val=1, test=1)
    with pytest.raises(DataError, match=r"train_00000\.png: this scene is missing; run `mgd-pipeline prepare-data`"):
        index_dataset(params, tmp_path)
    write_shapes(params, tmp_path / "shapes")
    index = index_dataset(params, tmp_path)
    assert ids(index, "train") == ["train_00000", "train_00001", "train_00002"] and index.classes == CLASSES
    fewer = index_dataset(params.model_copy(update={"train": 2}), tmp_path)
    assert ids(fewer, "train") == ["train_00000", "train_00001"], "scenes of an earlier rendering take no part"


def test_scan_mask_values(tmp_path: Path) -> None:
    for number in range(230):
        path = touch(tmp_path, f"images/train/{number:03d}.jpg", f"masks/train/{number:03d}.png")
        Image.fromarray(np.array([[0, 7], [255, 200 if number == 229 else 0]], np.uint8)).save(path)
    touch(tmp_path, "masks/coloured/000.png")  # in no split, so no mask of this data set

    def values() -> list[int]:
        return scan_mask_values(tmp_path, index_folder(tmp_path, folder_params()))

    assert values() == [0, 7, 255], "200 of the 230, evenly spread, without the last"
    for number in range(60):
        (tmp_path / f"masks/train/{number:03d}.png").unlink()
    assert values() == [0, 7, 200, 255]
    shutil.rmtree(tmp_path / "masks")
    with pytest.raises(DataError, match=r"masks: no mask found; expected masks/<split>/"):
        values()


def test_names_are_known_without_the_data_set(tmp_path: Path, city: Path) -> None:
    """DVC fetches a manifest for a training without classes.json."""
    make_voc(tmp_path / "voc", aug=False)
    write_shapes(
        shapes := ShapesData(dataset="shapes", root="shapes", partition="1/1", train=1, val=1, test=1), tmp_path / "shapes"
    )
    of_city = CityscapesData(dataset="cityscapes", root=str(city), partition="1/1")
    for params in (shapes, VocData(dataset="voc", root="voc", partition="1/1"), of_city):
        index = index_dataset(params, tmp_path)
        assert names_of(params) == (index.classes, index.palette)
