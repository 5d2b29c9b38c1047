"""Finding images and masks in each folder layout, and naming what is missing or ambiguous."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgd_pipeline.data.datasets import (
    CITYSCAPES,
    DatasetIndex,
    index_cityscapes,
    index_dataset,
    index_folder,
    index_voc,
    scan_mask_values,
    voc_palette,
)
from mgd_pipeline.data.listing import matches, what_dvc_cannot_read
from mgd_pipeline.data.shapes import CLASSES, write_shapes
from mgd_pipeline.errors import DataError
from mgd_pipeline.params import FolderData, ShapesData, VocData

CAMVID = Path(__file__).parents[2] / "shared" / "datasets" / "camvid"


def touch(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def folder_params(**changes: Any) -> FolderData:
    return FolderData(**{"dataset": "folder", "root": "unused", "partition": "1/2", "classes": ["a", "b"], **changes})


def ids(index: DatasetIndex, split: str) -> list[str]:
    return [sample.image_id for sample in index.samples if sample.split == split]


def make_voc(top: Path) -> Path:
    for name in ("2007_000032", "2007_000033", "2007_000039", "2008_000008", "2009_000001"):
        touch(top / f"JPEGImages/{name}.jpg")
    for name in ("2007_000032", "2007_000033", "2007_000039"):
        touch(top / f"SegmentationClass/{name}.png")
    touch(top / "ImageSets/Segmentation/train.txt", "2007_000039\n2007_000032\n")
    touch(top / "ImageSets/Segmentation/val.txt", "2007_000033\n")
    return top


def add_aug(top: Path) -> None:
    for name in ("2007_000032", "2007_000033", "2007_000039", "2008_000008", "2009_000001"):
        touch(top / f"SegmentationClassAug/{name}.png")


@pytest.mark.parametrize("inside", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_without_aug(tmp_path: Path, inside: str) -> None:
    make_voc(tmp_path / inside)
    index = index_voc(tmp_path)
    assert ids(index, "train") == ["2007_000032", "2007_000039"]
    assert ids(index, "val") == ["2007_000033"]
    assert ids(index, "test") == []
    assert index.samples[0].image == Path(inside) / "JPEGImages/2007_000032.jpg"
    assert index.samples[0].mask == Path(inside) / "SegmentationClass/2007_000032.png"
    assert len(index.classes) == len(index.palette) == 21
    assert index.lookup[:21] == tuple(range(21)) and index.lookup[255] == 255 and set(index.lookup[21:255]) == {-1}


def test_voc_with_aug_trains_on_all_masks_but_val(tmp_path: Path) -> None:
    add_aug(make_voc(tmp_path))
    index = index_voc(tmp_path)
    assert ids(index, "train") == ["2007_000032", "2007_000039", "2008_000008", "2009_000001"]
    masks = {sample.image_id: str(sample.mask) for sample in index.samples}
    assert masks["2007_000032"] == "SegmentationClassAug/2007_000032.png"
    assert masks["2007_000033"] == "SegmentationClass/2007_000033.png", "val keeps VOC's own masks"
    touch(tmp_path / "ImageSets/Segmentation/trainaug.txt", "2008_000008\n")
    assert ids(index_voc(tmp_path), "train") == ["2008_000008"]


def test_voc_that_is_incomplete_names_the_file(tmp_path: Path) -> None:
    make_voc(tmp_path)
    (tmp_path / "JPEGImages/2007_000039.jpg").unlink()
    with pytest.raises(DataError, match=r"2007_000039\.jpg: no such file, but train has 2007_000039"):
        index_voc(tmp_path)
    (tmp_path / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(DataError, match=r"val\.txt: no such list of ids; complete the copy"):
        index_voc(tmp_path)
    with pytest.raises(DataError, match=r"no JPEGImages/ here or in VOCdevkit/VOC2012/"):
        index_voc(tmp_path / "JPEGImages")


def test_voc_palette_is_the_published_one() -> None:
    known = {1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    palette = voc_palette(254)
    assert {index: palette[index] for index in known} == known
    assert len(set(palette)) == 254


@pytest.mark.parametrize("name", ["train.txt", "val.txt", "trainaug.txt"])
@pytest.mark.parametrize(
    "write",
    [
        lambda names: "\ufeff" + "\r\n".join(names),
        lambda names: "".join(f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png \n" for name in names),
        lambda names: "".join(f"JPEGImages/{name}.jpg\tSegmentationClass/{name}.png\r\n" for name in names),
        lambda names: "\n\n".join(f"  {name}  " for name in names).encode("utf-16"),
    ],
)
def test_vocs_own_lists_in_every_form(tmp_path: Path, name: str, write: Callable[[list[str]], str | bytes]) -> None:
    add_aug(make_voc(tmp_path)) if name == "trainaug.txt" else make_voc(tmp_path)
    names = {"train.txt": ["2007_000039", "2007_000032"], "val.txt": ["2007_000033"], "trainaug.txt": ["2009_000001"]}[name]
    text = write(names)
    (tmp_path / "ImageSets/Segmentation" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert ids(index_voc(tmp_path), "val" if name == "val.txt" else "train") == sorted(names)


def test_vocs_own_lists_name_the_line(tmp_path: Path) -> None:
    make_voc(tmp_path)
    train = tmp_path / "ImageSets/Segmentation/train.txt"
    train.write_text("2007_000039\n\n2007_000032 -1\n")
    with pytest.raises(
        DataError, match=r"2007_000032 -1\.jpg: no such file, but train has 2007_000032 -1 \(line 3 of train\.txt\)"
    ):
        index_voc(tmp_path)
    train.write_text("2007_000039\nJPEGImages/2007_000039.jpg\n")
    with pytest.raises(DataError, match=r"train\.txt, line 2: '2007_000039' stands twice; keep one line"):
        index_voc(tmp_path)
    train.write_text("\n")
    with pytest.raises(DataError, match=r"train\.txt: holds no id"):
        index_voc(tmp_path)


def test_voc_passes_over_no_mask(tmp_path: Path) -> None:
    add_aug(make_voc(tmp_path))
    touch(tmp_path / "JPEGImages/scan.tif")
    touch(tmp_path / "SegmentationClassAug/README")
    (note,) = index_voc(tmp_path).notes
    assert note.found == "1 picture is left out, such as scan.tif: .tif is not read"
    (tmp_path / "SegmentationClassAug/2008_000008.png").rename(tmp_path / "SegmentationClassAug/2008_000008.mat")
    with pytest.raises(
        DataError, match=r"2008_000008\.mat: would be the mask of 2008_000008\.jpg, but the format \.mat is not read"
    ):
        index_voc(tmp_path)


def make_cityscapes(root: Path) -> Path:
    for split, city, frame in (("train", "aachen", 0), ("train", "aachen", 1), ("train", "bochum", 0), ("val", "lindau", 0)):
        name = f"{city}_{frame:06d}_000019"
        touch(root / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png")
        touch(root / f"gtFine/{split}/{city}/{name}_gtFine_labelIds.png")
        touch(root / f"gtFine/{split}/{city}/{name}_gtFine_color.png")
    touch(root / "leftImg8bit/test/bonn/bonn_000000_000019_leftImg8bit.png")
    return root


def test_cityscapes(tmp_path: Path) -> None:
    index = index_cityscapes(make_cityscapes(tmp_path))
    assert ids(index, "train") == ["aachen_000000_000019", "aachen_000001_000019", "bochum_000000_000019"]
    assert ids(index, "val") == ["lindau_000000_000019"]
    assert index.samples[0].mask == Path("gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png")
    assert len(index.classes) == len(index.palette) == 19 and index.classes[13] == "car"
    assert [index.lookup[label] for label in (7, 8, 26, 33)] == [0, 1, 13, 18]
    assert {index.lookup[label] for label in (0, 6, 9, 18, 29, 30, 255)} == {255}
    assert set(index.lookup[34:255]) == {-1}
    assert [index.lookup[label] for _, label, _ in CITYSCAPES] == list(range(19))


def test_cityscapes_without_a_mask(tmp_path: Path) -> None:
    make_cityscapes(tmp_path)
    (tmp_path / "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png").unlink()
    index = index_cityscapes(tmp_path)
    assert [sample.image_id for sample in index.samples if sample.mask is None] == ["aachen_000001_000019"]
    (tmp_path / "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png").symlink_to("gone.png")
    assert all(sample.mask for sample in index_cityscapes(tmp_path).samples), "a lost mask is no unlabelled image"
    (tmp_path / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(DataError, match=r"lindau_000000_000019_gtFine_labelIds\.png: no mask for val image"):
        index_cityscapes(tmp_path)


@pytest.mark.parametrize("suffix", ["labelIds.tif", "labelTrainIds.png"])
def test_cityscapes_passes_over_no_mask(tmp_path: Path, suffix: str) -> None:
    make_cityscapes(tmp_path)
    assert index_cityscapes(tmp_path).notes == ()
    stem = tmp_path / "gtFine/train/aachen/aachen_000001_000019_gtFine_"
    Path(f"{stem}labelIds.png").rename(f"{stem}{suffix}")
    with pytest.raises(
        DataError, match=rf"_gtFine_{suffix}: is not read, and aachen_000001_000019_gtFine_labelIds\.png is missing"
    ):
        index_cityscapes(tmp_path)


def test_cityscapes_says_what_it_leaves_out(tmp_path: Path) -> None:
    make_cityscapes(tmp_path)
    touch(tmp_path / "leftImg8bit/train/aachen/aachen_000002_000019_leftImg8bit.jpg")
    (tmp_path / "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png").unlink()
    (tmp_path / "leftImg8bit/train/bochum/bochum_000000_000019_leftImg8bit.png").unlink()
    assert [note.found for note in index_cityscapes(tmp_path).notes] == [
        "1 picture is left out, such as aachen_000002_000019_leftImg8bit.jpg: not called <city>_*_leftImg8bit.png",
        "1 train image counts as unlabelled, such as aachen_000001_000019_gtFine_color.png: "
        "annotated, but without *_gtFine_labelIds.png",
        "1 mask belongs to no image, such as bochum_000000_000019_gtFine_labelIds.png: no such file below leftImg8bit/",
    ]


def make_folder(root: Path) -> Path:
    for name in ("train/a.jpg", "train/sub/a.PNG", "train/Größe 1.jpeg", "train/unlabelled.webp", "val/v.png", "test/t.bmp"):
        touch(root / "images" / name)
    for name in ("train/a.png", "train/sub/a.png", "train/Größe 1.png", "val/v.png", "test/t.png"):
        touch(root / "masks" / name)
    touch(root / "images/train/._a.jpg")
    touch(root / "images/train/notes.txt")
    return root


def test_folder(tmp_path: Path) -> None:
    index = index_folder(make_folder(tmp_path), folder_params())
    assert ids(index, "train") == ["Größe 1", "a", "sub/a", "unlabelled"]
    assert (ids(index, "val"), ids(index, "test")) == (["v"], ["t"])
    by_id = {sample.image_id: sample for sample in index.samples}
    assert by_id["sub/a"].image == Path("images/train/sub/a.PNG") and by_id["sub/a"].mask == Path("masks/train/sub/a.png")
    assert by_id["unlabelled"].mask is None
    assert by_id["Größe 1"].mask is not None and (tmp_path / by_id["Größe 1"].mask).is_file()
    assert index.lookup == (0, 1, *[-1] * 253, 255)


def test_folder_ignore_value(tmp_path: Path) -> None:
    make_folder(tmp_path)
    assert index_folder(tmp_path, folder_params(ignore=0)).lookup == (255, 1, *[-1] * 254)
    assert index_folder(tmp_path, folder_params(ignore=9)).lookup[:10] == (0, 1, -1, -1, -1, -1, -1, -1, -1, 255)


def test_folder_matches_names_in_either_unicode_form(tmp_path: Path) -> None:
    composed, split = unicodedata.normalize("NFC", "Tür"), unicodedata.normalize("NFD", "Tür")
    assert composed != split
    touch(tmp_path / "images/train" / f"{split}.jpg")
    touch(tmp_path / "masks/train" / f"{composed}.png")
    (sample,) = index_folder(tmp_path, folder_params()).samples
    assert sample.image_id == composed
    assert sample.mask is not None and (tmp_path / sample.image).is_file() and (tmp_path / sample.mask).is_file()


def test_folder_follows_links(tmp_path: Path) -> None:
    make_folder(tmp_path / "elsewhere")
    (tmp_path / "raw").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/images/train/more").symlink_to(tmp_path / "elsewhere/images/train/sub")
    assert "more/a" in ids(index_folder(tmp_path / "raw", folder_params()), "train")


FLAT = {"images": "images/**/*", "masks": "masks/**/*", "val_fraction": 0.0, "test_fraction": 0.0}


@pytest.mark.parametrize("layout", [{}, FLAT])
@pytest.mark.parametrize("linked", ["images", "masks", "both"])
def test_links_to_folders_are_followed_in_every_layout(tmp_path: Path, layout: dict[str, Any], linked: str) -> None:
    train = "" if layout else "train/"
    for kind in ("images", "masks"):
        touch(tmp_path / f"data/{kind}/{train}own/a.png")
        elsewhere = tmp_path / f"elsewhere/{kind}" if linked in (kind, "both") else tmp_path / f"data/{kind}/{train}site2"
        touch(elsewhere / "deep/b.png")
        if linked in (kind, "both"):
            (tmp_path / f"data/{kind}/{train}site2").symlink_to(elsewhere)
    index = index_folder(tmp_path / "data", folder_params(**layout))
    assert ids(index, "train") == ["own/a", "site2/deep/b"] and all(sample.mask for sample in index.samples)


@pytest.mark.parametrize("layout", [{}, FLAT])
@pytest.mark.parametrize("kind", ["images", "masks"])
def test_links_without_an_end_or_to_nothing_are_refused_in_every_layout(tmp_path: Path, layout: dict[str, Any], kind: str) -> None:
    train = "" if layout else "train/"
    for folder in ("images", "masks"):
        touch(tmp_path / f"{folder}/{train}a.png")
    link = tmp_path / f"{kind}/{train}again"
    link.symlink_to("..")
    with pytest.raises(DataError, match="again: is a link to a folder that contains it, so it has no end; remove the link"):
        index_folder(tmp_path, folder_params(**layout))
    link.unlink()
    link.symlink_to("gone")
    with pytest.raises(DataError, match="again: is a link to gone, which does not exist; restore what it links to"):
        index_folder(tmp_path, folder_params(**layout))
    link.rename(link.with_name(".#again"))
    assert ids(index_folder(tmp_path, folder_params(**layout)), "train") == ["a"], "hidden files are no part of the data set"


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_split_folder_that_is_no_folder(tmp_path: Path, kind: str) -> None:
    make_folder(tmp_path)
    folder = tmp_path / kind / "val"
    shutil.rmtree(folder)
    folder.symlink_to("gone")
    with pytest.raises(DataError, match=rf"{kind}/val: is a link to gone, which does not exist"):
        index_folder(tmp_path, folder_params())
    folder.unlink()
    folder.touch()
    with pytest.raises(DataError, match=rf"{kind}/val: is a file, not a folder"):
        index_folder(tmp_path, folder_params())


@pytest.mark.parametrize("layout", [{}, FLAT])
@pytest.mark.parametrize("name", ["b.tif", "b.TIFF", "b.gif", "b.npy", "b.mat", "b.json", "b", "b.png_", "b.PNG.bak", "b.nii.gz"])
def test_no_mask_is_passed_over(tmp_path: Path, layout: dict[str, Any], name: str) -> None:
    train = "" if layout else "train/"
    for path in ("images/a.jpg", "masks/a.png", "images/b.jpg", "images/c.jpg"):
        touch(tmp_path / path.replace("/", f"/{train}"))
    for path in (f"masks/{train}Thumbs.db", f"masks/{train}._b.tif"):
        touch(tmp_path / path)
    index = index_folder(tmp_path, folder_params(**layout))
    assert [sample.image_id for sample in index.samples if sample.mask] == ["a"] and index.notes == ()
    mask = touch(tmp_path / f"masks/{train}{name}")
    with pytest.raises(
        DataError, match=rf"masks/{train}{name}: would be the mask of b\.jpg, but .* is not read; save the mask as PNG"
    ):
        index_folder(tmp_path, folder_params(**layout))
    mask.rename(mask.with_name("lonely.gif"))
    with pytest.raises(DataError, match=r"lonely\.gif: no image 'lonely' in .*images"):
        index_folder(tmp_path, folder_params(**layout))
    touch(tmp_path / f"images/{train}lonely.HEIC")
    with pytest.raises(
        DataError, match=r"lonely\.gif: no image 'lonely' in .*; save lonely\.HEIC, which is not read, as PNG or JPEG"
    ):
        index_folder(tmp_path, folder_params(**layout))


@pytest.mark.parametrize("layout", [{}, FLAT])
def test_what_is_left_out_is_said(tmp_path: Path, layout: dict[str, Any]) -> None:
    train = "" if layout else "train/"
    for path in ("images/a.jpg", "masks/a.png", "masks/a.tif", "masks/b_mask.npy", "images/b.jfif", "images/c.HEIC"):
        touch(tmp_path / path.replace("/", f"/{train}"))
    assert [note.found for note in index_folder(tmp_path, folder_params(**layout)).notes] == [
        "2 pictures are left out, such as b.jfif: .HEIC, .jfif is not read",
        "2 files among the masks are left out, such as a.tif: no mask in a format that is read",
    ]


@pytest.mark.parametrize("layout", [{}, FLAT])
@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".Trash-1000/files", "@eaDir/a.jpg", "__MACOSX", "$RECYCLE.BIN"])
def test_what_lies_in_hidden_folders_is_no_image(tmp_path: Path, layout: dict[str, Any], hidden: str) -> None:
    """Notebooks, desktops and file servers keep copies, deleted files and thumbnails between the images."""
    train = "" if layout else "train/"
    for path in ("images/a.jpg", "masks/a.png", f"images/{hidden}/b.jpg", f"masks/{hidden}/c.png"):
        touch(tmp_path / path.replace("/", f"/{train}", 1))
    index = index_folder(tmp_path, folder_params(**layout))
    assert [sample.image_id for sample in index.samples] == ["a"] and not index.notes


def test_notes_stay_on_one_line_and_file_managers_files_are_none(tmp_path: Path) -> None:
    """macOS calls the picture of a folder Icon with a carriage return."""
    for name in ("images/train/a.jpg", "masks/train/a.png", "masks/train/Icon\r", "masks/train/Thumbs.db", "masks/train/a\nb.txt"):
        touch(tmp_path / name)
    (note,) = index_folder(tmp_path, folder_params()).notes
    assert note.found.startswith("1 file among the masks is left out, such as 'a\\nb.txt':")


@pytest.mark.parametrize(("folder", "other"), [("images/train", "images/Train"), ("leftImg8bit/val", "leftImg8bit/VAL")])
def test_a_folder_in_other_capitals_is_named(tmp_path: Path, folder: str, other: str) -> None:
    """Windows and macOS do not tell them apart."""
    for path in ("images/train/a.jpg", "masks/train/a.png", "leftImg8bit/train/x/x_0_leftImg8bit.png", "leftImg8bit/val/x.png"):
        touch(tmp_path / path)
    (tmp_path / folder).rename(tmp_path / other)
    index = index_cityscapes if "Img8bit" in folder else lambda root: index_folder(root, folder_params())
    with pytest.raises(DataError) as caught:
        index(tmp_path)
    remedy = f"rename it: mv {tmp_path / other} {tmp_path / folder}"
    assert str(caught.value) == f"{tmp_path / other}: must be called {Path(folder).name}; {remedy}"


def test_masks_that_the_glob_does_not_match_are_said(tmp_path: Path) -> None:
    for path in ("photos/s/a.jpg", "photos/s/b.jpg", "labels/s/a.png", "labels/s/b.gif", "labels/s/c.gif"):
        touch(tmp_path / path)
    (note,) = index_folder(tmp_path, folder_params(images="photos/**/*.jpg", masks="labels/**/*.png")).notes
    assert note.found.startswith("1 picture is not a mask, such as b.gif: called like an image without a mask, but ")
    assert note.found.endswith("labels/**/*.png does not match") and note.remedy == "correct data.masks, or remove them"


@pytest.mark.parametrize(
    ("pattern", "path", "match"),
    [
        ("*.jpg", "a.jpg", True),
        ("*.jpg", "s/a.jpg", False),
        ("**/*.jpg", "a.jpg", True),
        ("**/*.jpg", "s/t/a.jpg", True),
        ("**/*.jpg", "s/t/a.JPG", False),
        ("s?/**/[ab].png", "s1/t/a.png", True),
        ("s?/**/[ab].png", "s1/c.png", False),
        ("**", "s/a.png", True),
        ("**/t/**/*.png", "s/t/a.png", True),
        ("**/t/**/*.png", "s/u/a.png", False),
        ("**.png", "a.png", True),
    ],
)
def test_globs(pattern: str, path: str, match: bool) -> None:
    assert matches(path.split("/"), pattern.split("/")) == match


def test_what_dvc_cannot_read_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "data")
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
    assert said[:5] == [
        f".hidden: {link}",
        f"images/.#lock: {link}",
        f"images/train/x.png: {link}",
        f"notes: {link}",
        "pipe: is a pipe, socket or device, and DVC reads every file; remove it from the data set",
    ]
    assert said[5].startswith("images/train/more: is a link to a folder, and `dvc repro` does not notice changes behind it; after")
    assert [str(error) for error in what_dvc_cannot_read(tmp_path / "linked", 2)][2].endswith(
        "linked: 3 more files that DVC cannot read; mend them likewise"
    )


@pytest.mark.parametrize(
    ("add", "remove", "words"),
    [
        ("images/train/a.webp", None, r"a\.webp: same name as .*a\.jpg"),
        ("masks/train/a.bmp", None, r"a\.png: same name as .*a\.bmp"),
        ("images/val/a.png", None, r"both have the image_id 'a'.*train or val"),
        (None, "masks/val/v.png", r"v\.png: val image without a mask; expected masks/val/v\.png"),
        (None, "masks/test/t.png", r"t\.bmp: test image without a mask"),
    ],
)
def test_folder_that_is_ambiguous_or_incomplete(tmp_path: Path, add: str | None, remove: str | None, words: str) -> None:
    make_folder(tmp_path)
    if add:
        touch(tmp_path / add)
        if add == "images/val/a.png":
            touch(tmp_path / "masks/val/a.png")
    if remove:
        (tmp_path / remove).unlink()
    with pytest.raises(DataError, match=words):
        index_folder(tmp_path, folder_params())


def test_folder_without_images_or_with_masks_of_other_names(tmp_path: Path) -> None:
    (tmp_path / "images/train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"images/train: no image found; readable suffixes are \.jpg"):
        index_folder(tmp_path, folder_params())
    touch(tmp_path / "images/train/a.jpg")
    touch(tmp_path / "masks/train/a_mask.png")
    with pytest.raises(DataError, match="no mask belongs to an image, such as mask 'a_mask' and image 'a'"):
        index_folder(tmp_path, folder_params())


def test_missing_root_says_what_to_link(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        index_dataset(VocData(dataset="voc", root="data/raw/voc", partition="1/8"), tmp_path)
    root = tmp_path / "data/raw/voc"
    assert str(caught.value).startswith(f"{root}: no such folder; expected JPEGImages/")
    assert str(caught.value).endswith(f"ln -s /path/to/VOCdevkit/VOC2012 {root}")
    root.parent.mkdir(parents=True)
    root.symlink_to(tmp_path / "moved")
    with pytest.raises(DataError, match=r"voc: is a link to .*moved, which does not exist; link it again: ln -sfn"):
        index_dataset(VocData(dataset="voc", root="data/raw/voc", partition="1/8"), tmp_path)


def test_file_names_must_be_utf8(tmp_path: Path) -> None:
    make_folder(tmp_path)
    try:
        Path(os.fsdecode(os.fsencode(tmp_path / "images/train/") + b"/caf\xe9.png")).touch()
    except OSError:
        pytest.skip("this file system refuses such names itself")
    with pytest.raises(DataError, match=r"caf\\udce9\.png': the file name is not UTF-8; rename it") as caught:
        index_folder(tmp_path, folder_params())
    str(caught.value).encode("utf-8")  # the message itself can be printed


def make_globs(root: Path, count: int) -> FolderData:
    for i in range(count):
        touch(root / f"photos/s{i % 3}/{i:03d}.jpg")
        if i % 4:
            touch(root / f"labels/png/s{i % 3}/{i:03d}.png")
    return folder_params(images="photos/**/*.jpg", masks="labels/png/**/*.png", val_fraction=0.2, test_fraction=0.3)


def test_globs_match_below_their_fixed_part_and_draw_splits(tmp_path: Path) -> None:
    params = make_globs(tmp_path, 200)
    index = index_folder(tmp_path, params)
    assert len(index.samples) == 200
    assert all(sample.mask for sample in index.samples if sample.split != "train")
    assert sum(sample.mask is None for sample in index.samples) == 50
    assert index.samples[1].image_id == "s0/003" and index.samples[1].mask == Path("labels/png/s0/003.png")
    assert 18 <= len(ids(index, "val")) <= 42, "near 20 % of the 150 with a mask"
    assert 30 <= len(ids(index, "test")) <= 60, "near 30 % of the 150 with a mask"
    assert index_folder(tmp_path, params) == index
    assert ids(index_folder(tmp_path, params.model_copy(update={"partition_seed": 1})), "val") != ids(index, "val")


def test_further_images_leave_the_splits_of_the_others(tmp_path: Path) -> None:
    before = {sample.image_id: sample.split for sample in index_folder(tmp_path, make_globs(tmp_path, 100)).samples}
    after = {sample.image_id: sample.split for sample in index_folder(tmp_path, make_globs(tmp_path, 200)).samples}
    assert {image_id: after[image_id] for image_id in before} == before


def test_few_images_still_fill_each_split(tmp_path: Path) -> None:
    params = make_globs(tmp_path, 5).model_copy(update={"val_fraction": 0.01, "test_fraction": 0.01})
    index = index_folder(tmp_path, params)
    assert len(ids(index, "val")) == len(ids(index, "test")) == 1
    none = index_folder(tmp_path, params.model_copy(update={"val_fraction": 0.0, "test_fraction": 0.0}))
    assert len(ids(none, "train")) == 5


def test_globs_that_match_nothing_or_leave_the_root(tmp_path: Path) -> None:
    make_globs(tmp_path, 4)
    with pytest.raises(DataError, match=r"no image matches 'photos/\*\.jpg'"):
        index_folder(tmp_path, folder_params(images="photos/*.jpg", masks="labels/**/*.png"))
    with pytest.raises(DataError, match="no mask belongs to an image"):
        index_folder(tmp_path, folder_params(images="photos/**/*.jpg", masks="labels/**/*.png"))
    with pytest.raises(DataError, match=r"\.\./photos/\*\.jpg: a glob must stay below root"):
        index_folder(tmp_path, folder_params(images="../photos/*.jpg", masks="labels/**/*.png"))


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
        path = tmp_path / f"masks/train/{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.array([[0, 7], [255, 200 if number == 229 else 0]], np.uint8)).save(path)
        touch(tmp_path / f"images/train/{number:03d}.jpg")
    touch(tmp_path / "masks/coloured/000.png")  # in no split, so no mask of this data set

    def found() -> list[int]:
        return scan_mask_values(tmp_path, index_folder(tmp_path, folder_params()))

    assert found() == [0, 7, 255], "200 of the 230, evenly spread, without the last"
    for number in range(60):
        (tmp_path / f"masks/train/{number:03d}.png").unlink()
    assert found() == [0, 7, 200, 255]
    shutil.rmtree(tmp_path / "masks")
    with pytest.raises(DataError, match=r"masks: no mask found; expected masks/<split>/"):
        found()


def test_camvid() -> None:
    if not CAMVID.is_dir():
        pytest.skip("the CamVid copy in ../shared is not here")
    index = index_folder(CAMVID, folder_params(classes=[str(i) for i in range(11)]))
    assert (len(ids(index, "train")), len(ids(index, "val")), len(ids(index, "test"))) == (367, 101, 0)
    assert all(sample.mask for sample in index.samples)
