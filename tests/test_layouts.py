"""Which mask belongs to which image, in the folders that people make."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgd_pipeline.data.layouts import Pairing, pairing_of
from mgd_pipeline.errors import DataError

LAYOUTS = {
    "images/a.jpg masks/a.png": ("images/*", "masks/*"),
    "images/x/a.jpg images/b.jpg masks/x/a.png masks/b.png": ("images/**/*", "masks/**/*"),
    "train/images/a.jpg train/masks/a.png val/images/b.jpg val/masks/b.png": ("*/images/*", "*/masks/*"),
    "images/train/a.jpg annotations/train/a.png images/val/b.jpg annotations/val/b.png": ("images/*/*", "annotations/*/*"),
    "train/a.png trainannot/a.png val/b.png valannot/b.png": ("*/*", "*annot/*"),
    "train/a.png train_labels/a.png val/b.png val_labels/b.png": ("*/*", "*_labels/*"),
    "train_images/a.jpg train_masks/a.png val_images/b.jpg val_masks/b.png": ("*_images/*", "*_masks/*"),
    "a.jpg a_mask.png b.jpg b_mask.png": ("*", "*_mask.*"),
    "1_sat.jpg 1_mask.png 2_sat.jpg 2_mask.png": ("*_sat.*", "*_mask.*"),
    "a.jpg a.png b.jpg b.png": ("*.jpg", "*.png"),
    "0001TP_1.png 0001TP_1_L.png 0001TP_2.png 0001TP_2_L.png": ("*", "*_L.*"),
    "JPEGImages/a.jpg SegmentationClass/a.png": ("JPEGImages/*", "SegmentationClass/*"),
    "image_1.jpg mask_1.png": ("image_*.*", "mask_*.*"),
    "images/photo_1.jpg masks/photo_1.png images/2.jpg masks/2.png": ("images/*", "masks/*"),
    "images_train/a.jpg masks_train/a.png images_val/b.jpg masks_val/b.png": ("images_*/*", "masks_*/*"),
    "farm/images/a.jpg farm/masks/a.png": ("farm/images/*", "farm/masks/*"),
    "a.jpg b.JPG c.jpeg a.png b.PNG c.png": ("*", "*.[Pp][Nn][Gg]"),
    "a.jpg b.jpg a.PNG b.PNG": ("*.jpg", "*.PNG"),
    "Ka\u0308fer.jpg K\u00e4fer_mask.png": ("*", "*_mask.*"),
    "Ka\u0308fer.jpg K\u00e4fer.png": ("*.jpg", "*.png"),
    "Fa\u0308rm/images/a.jpg F\u00e4rm/masks/a.png": ("Fa\u0308rm/images/*", "F\u00e4rm/masks/*"),
}


@pytest.mark.parametrize("names", LAYOUTS)
def test_layouts_that_people_make(names: str) -> None:
    paths = [Path(name) for name in names.split()]
    pairing = pairing_of(paths)
    assert pairing is not None and pairing == Pairing(*LAYOUTS[names])
    images = {pairing.image_id(path): path for path in paths if pairing.image_id(path) is not None}
    masks = {pairing.mask_id(path): path for path in paths if pairing.mask_id(path) is not None}
    assert images.keys() == masks.keys() and len(images) == len(masks) == len(paths) // 2


def test_masks_that_are_called_in_several_ways_are_named() -> None:
    with pytest.raises(
        DataError, match=r"^a_mask\.png and b_Mask\.png: are masks that no pair of globs fits .*call all masks in one"
    ):
        pairing_of([Path(name) for name in ("a.jpg", "b.jpg", "a_mask.png", "b_Mask.png")])


@pytest.mark.parametrize("names", ["a.jpg b.jpg", "images/a.jpg masks/b.png"])
def test_folders_without_pairs(names: str) -> None:
    assert pairing_of([Path(name) for name in names.split()]) is None


@pytest.mark.parametrize(
    ("images", "masks", "path", "image_id"),
    [
        ("photos/**/*.jpg", "masks/**/*.png", "photos/x/cam/a.b.jpg", "x/cam/a.b"),
        ("photos/cam_*/img/*.jpg", "masks/cam_*/img/*.png", "photos/cam_1/img/a.jpg", "cam_1/img/a"),
        ("photos/cam_*/img/*.jpg", "photos/cam_*/seg/*.png", "photos/cam_1/img/a.jpg", "1/a"),
        ("*.jpg", "*_mask.png", "a_b.jpg", "a_b"),
        ("images/**", "masks/**", "images/x/a.tar.jpg", "x/a.tar"),
        ("images/[ab]*.jpg", "masks/[ab]*.png", "images/cc.jpg", None),
        ("*.jpg", "*_mask.[Pp][Nn][Gg]", "a_b.jpg", "a_b"),
        ("*", "*_mask.[Pp][Nn][Gg]", "a_mask.PNG", None),
    ],
)
def test_ids_are_below_the_fixed_part_or_what_the_wildcards_match(images: str, masks: str, path: str, image_id: str | None) -> None:
    assert Pairing(images, masks).image_id(Path(path)) == image_id
