"""Finds the images and masks of a data set on disk: one flat list of samples, whatever the folder layout.

Nothing is opened here except lists of ids; the manifest reads and checks the files. Ids are NFC-normalised Unicode, so that a
mask written on one operating system is found for an image written on another; paths stay as the disk has them.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgd_pipeline import shapes
from mgd_pipeline.access import access_error, is_there, says_nothing
from mgd_pipeline.errors import DataError, shell_command
from mgd_pipeline.images import IGNORE, SUFFIXES, read_raw_mask
from mgd_pipeline.params import CityscapesData, FolderData, ShapesData, VocData

Colour = tuple[int, int, int]
SPLITS = ("train", "val", "test")
UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".tif", ".tiff", ".gif", ".jp2")
"""Of pictures in formats that are not read."""


@dataclass(frozen=True)
class Sample:
    image_id: str
    image: Path
    """Relative to the root of the data set, like `mask`."""
    mask: Path | None
    split: str
    """train, val or test."""


@dataclass(frozen=True)
class DatasetIndex:
    samples: list[Sample]
    """Sorted by image_id, which is unique."""
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    """RGB of each class, 0 to 255."""
    lookup: tuple[int, ...]
    """256 train ids, one for each stored mask value: 255 = ignore, -1 = not allowed."""


def voc_palette(count: int) -> tuple[Colour, ...]:
    """The first `count` colours of the VOC colour map: the bits of an index, spread over the high bits of R, G and B."""
    return tuple(
        tuple(sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3))  # pyright: ignore
        for index in range(count)
    )


VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable"),
    *("dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
CITYSCAPES = (  # class, label id in the *_labelIds.png files, colour
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)


def index_dataset(params: ShapesData | VocData | CityscapesData | FolderData, base: Path) -> DatasetIndex:
    """Lists the data set at base / params.root. Raises DataError where it is missing, incomplete or ambiguous."""
    root = base / params.root
    match params:
        case ShapesData():
            return index_shapes(root, params)
        case VocData():
            return index_voc(root)
        case CityscapesData():
            return index_cityscapes(root)
        case FolderData():
            return index_folder(root, params)


def index_shapes(root: Path, params: ShapesData) -> DatasetIndex:
    """The scenes that `write_shapes(params, root)` made; files of an earlier, larger rendering are left out."""
    samples = []
    for split, count in (("train", params.train), ("val", params.val), ("test", params.test)):
        for index in range(count):
            name = f"{shapes.scene_id(split, index)}.png"
            image, mask = Path("images", split, name), Path("masks", split, name)
            for path in (image, mask):
                if not (root / path).is_file():
                    raise DataError(f"{root / path}: this scene is missing; run `mgd-pipeline prepare-data`, which renders it")
            samples.append(Sample(shapes.scene_id(split, index), image, mask, split))
    return DatasetIndex(_sorted_unique(samples), shapes.CLASSES, shapes.PALETTE, _lookup(len(shapes.CLASSES), IGNORE))


def index_voc(root: Path) -> DatasetIndex:
    """PASCAL VOC 2012: `root` is VOCdevkit/VOC2012 or a folder that contains it.

    With SegmentationClassAug (SBD's masks), train is ImageSets/Segmentation/trainaug.txt or else every mask there that is not in
    val, 10,582 images; without it, train.txt, 1,464. Val is val.txt with SegmentationClass, 1,449. There is no test split.
    """
    layout = "JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/{train,val}.txt"
    _require_folder(root, layout, "/path/to/VOCdevkit/VOC2012")
    inside = next((p for p in ("", "VOC2012", "VOCdevkit/VOC2012") if (root / p / "JPEGImages").is_dir()), None)
    if inside is None:
        raise DataError(f"{root}: no JPEGImages/ here or in VOCdevkit/VOC2012/; expected {layout}")
    top = Path(inside)
    for folder in ("SegmentationClass", "ImageSets/Segmentation"):
        _require_folder(root / top / folder, layout, f"/path/to/VOCdevkit/VOC2012/{folder}")
    lists, masks = root / top / "ImageSets/Segmentation", "SegmentationClass"
    val = _lines(lists / "val.txt")
    train_masks = "SegmentationClassAug" if (root / top / "SegmentationClassAug").is_dir() else masks
    if train_masks == masks:
        train = _lines(lists / "train.txt")
    elif (lists / "trainaug.txt").is_file():
        train = _lines(lists / "trainaug.txt")
    else:
        held_out = set(val)
        train = [path.stem for path in image_files(root / top / train_masks) if path.stem not in held_out]
    samples = []
    for split, names, folder in (("train", train, train_masks), ("val", val, masks)):
        for name in names:
            image, mask = top / "JPEGImages" / f"{name}.jpg", top / folder / f"{name}.png"
            for path in (image, mask):
                if not (root / path).is_file():
                    raise DataError(f"{root / path}: no such file, but {split} has {name}; complete the copy of the data set")
            samples.append(Sample(name, image, mask, split))
    return DatasetIndex(_sorted_unique(samples), VOC_CLASSES, voc_palette(len(VOC_CLASSES)), _lookup(len(VOC_CLASSES), IGNORE))


def index_cityscapes(root: Path) -> DatasetIndex:
    """Cityscapes with fine annotations: splits train and val (the test split's labels are dummies), 19 classes.

    Masks are the *_labelIds.png files. A train image without one is unlabelled; a val image without one is an error.
    """
    layout = "leftImg8bit/{train,val}/<city>/ and gtFine/{train,val}/<city>/"
    _require_folder(root, layout, "/path/to/cityscapes")
    samples = []
    for split in ("train", "val"):
        folder = root / "leftImg8bit" / split
        _require_folder(folder, layout, f"/path/to/cityscapes/leftImg8bit/{split}")
        for path in image_files(folder):
            if not path.name.endswith("_leftImg8bit.png"):
                continue
            name = path.name.removesuffix("_leftImg8bit.png")
            mask = Path("gtFine", split, path.parent.name, f"{name}_gtFine_labelIds.png")
            if not os.path.lexists(root / mask):  # a dangling link is a mask that cannot be read, not "unlabelled"
                if split == "val":
                    raise DataError(f"{root / mask}: no mask for val image {name}; unpack gtFine_trainvaltest.zip into {root}")
                mask = None
            samples.append(Sample(name, path.relative_to(root), mask, split))
    if not any(sample.split == "train" for sample in samples):
        raise DataError(f"{root / 'leftImg8bit/train'}: no image called <city>_*_leftImg8bit.png; expected {layout}")
    known = {label: train_id for train_id, (_, label, _) in enumerate(CITYSCAPES)}
    # 34 label ids; licence plates (-1) were stored as 255.
    lookup = tuple(known.get(value, IGNORE if value < 34 or value == 255 else -1) for value in range(256))
    classes, _, palette = zip(*CITYSCAPES, strict=True)
    return DatasetIndex(_sorted_unique(samples), classes, palette, lookup)


def index_folder(root: Path, params: FolderData) -> DatasetIndex:
    """A data set of one's own: images/<split>/ and masks/<split>/ below root, or the two globs of params.

    The image_id is the path below images/<split>/, or below the glob's fixed part, without suffix; a mask has the same.
    Train images may lack a mask. With globs, images with a mask are drawn into val and test by a hash of their id, so that
    further images leave the others where they are; at least one goes to each split whose fraction is not 0.
    """
    _require_folder(root, "images/<split>/ and masks/<split>/, or the globs images and masks in params.yaml", "/path/to/dataset")
    if params.images is None or params.masks is None:
        samples = _split_folders(root)
    else:
        samples = _split_globs(root, params.images, params.masks, params)
    count = len(params.classes)
    return DatasetIndex(_sorted_unique(samples), tuple(params.classes), voc_palette(count), _lookup(count, params.ignore))


def unread_pictures(root: Path, params: FolderData) -> list[Path]:
    """Pictures among the images of a data set of one's own whose format is not read, sorted: their owner should know."""
    found = root.glob(params.images or "images/**/*")
    return sorted(path for path in found if path.suffix.lower() in UNREAD_SUFFIXES and not path.name.startswith("."))


def scan_mask_values(root: Path) -> list[int]:
    """The values, sorted, that up to 200 masks below root/masks hold (spread evenly over all of them), for a first params.yaml."""
    folder = root / "masks"
    _require_folder(folder, "masks/<split>/", "/path/to/dataset/masks")
    paths = image_files(folder)
    if not paths:
        raise DataError(f"{folder}: no mask found; expected masks/<split>/<id>.png")
    chosen = sorted({index * len(paths) // 200 for index in range(200)}) if len(paths) > 200 else range(len(paths))
    found = np.zeros(256, bool)
    for index in chosen:
        found[read_raw_mask(paths[index])] = True
    return np.flatnonzero(found).tolist()


def _split_folders(root: Path) -> list[Sample]:
    layout = "images/{train,val,test}/ and masks/{train,val,test}/"
    _require_folder(root / "images" / "train", layout, "/path/to/images")
    samples = []
    for split in SPLITS:
        images = _by_id(root / "images" / split, image_files(root / "images" / split))
        masks = _by_id(root / "masks" / split, image_files(root / "masks" / split))
        if split == "train" and not images:
            raise DataError(f"{root / 'images/train'}: no image found; readable suffixes are {', '.join(SUFFIXES)}")
        _require_matches(root / "images" / split, images, masks)
        for image_id, path in images.items():
            mask = masks.get(image_id)
            if mask is None and split != "train":
                raise DataError(
                    f"{path}: {split} image without a mask; expected masks/{split}/{image_id}.png below {root}, "
                    "or move the image to images/train"
                )
            samples.append(Sample(image_id, path.relative_to(root), mask and mask.relative_to(root), split))
    return samples


def _split_globs(root: Path, images_glob: str, masks_glob: str, params: FolderData) -> list[Sample]:
    images, masks = (_globbed(root, pattern) for pattern in (images_glob, masks_glob))
    if not images:
        raise DataError(f"{root}: no image matches {images_glob!r}; readable suffixes are {', '.join(SUFFIXES)}")
    _require_matches(root / images_glob, images, masks)
    # A hash, not a shuffle: the draw of one image does not depend on which others exist.
    key = {image_id: _fraction_of(f"{params.partition_seed}:{image_id}") for image_id in images if image_id in masks}
    order = sorted(key, key=lambda image_id: key[image_id])
    val_end, test_end = params.val_fraction, params.val_fraction + params.test_fraction
    val = [i for i in order if key[i] < val_end] or order[: params.val_fraction > 0]
    test = [i for i in order if val_end <= key[i] < test_end and i not in val]
    test = test or [i for i in order if i not in val][: params.test_fraction > 0]
    held_out = {**dict.fromkeys(val, "val"), **dict.fromkeys(test, "test")}
    return [
        Sample(
            image_id,
            path.relative_to(root),
            masks[image_id].relative_to(root) if image_id in masks else None,
            held_out.get(image_id, "train"),
        )
        for image_id, path in images.items()
    ]


def _globbed(root: Path, pattern: str) -> dict[str, Path]:
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise DataError(f"{pattern}: a glob must stay below root, {root}; write it relative, such as photos/**/*.jpg")
    parts = Path(pattern).parts
    wild = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), max(0, len(parts) - 1))
    return _by_id(root.joinpath(*parts[:wild]), _readable(root.glob(pattern)))


def _by_id(folder: Path, paths: list[Path]) -> dict[str, Path]:
    """Paths by their path below `folder` without suffix, with / between parts."""
    found: dict[str, Path] = {}
    for path in paths:
        image_id = unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())
        if image_id in found:
            raise DataError(f"{path}: same name as {found[image_id]} but for the suffix or Unicode form; remove or rename one")
        found[image_id] = path
    return found


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder, links followed; none where the folder does not exist.

    A folder called like an image is one of them, so that it is refused when it is read, and not passed over.
    """

    def stop(error: OSError) -> None:  # os.walk passes over what it may not list
        if says_nothing(error):
            raise DataError(str(access_error(error.filename, error)))
        raise DataError(f"{error.filename}: the folder cannot be listed ({error.strerror}); check its permissions")

    found: list[Path] = []
    for top, folders, names in os.walk(folder, onerror=stop, followlinks=True) if is_there(folder) else ():
        for link in (Path(top, name) for name in folders if Path(top, name).is_symlink()):
            if link.resolve() in {above.resolve() for above in link.parents}:
                raise DataError(f"{link}: is a link to a folder that contains it, so it has no end; remove the link")
        found += [Path(top, name) for name in (*folders, *names)]
    return _readable(found)


def _readable(paths: Iterable[Path]) -> list[Path]:
    """Those with the suffix of an image, sorted; hidden files (such as macOS's ._a.jpg) are left out."""
    kept = [path for path in paths if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    for path in kept:
        check_name(path)
    return sorted(kept)


def check_name(path: Path) -> None:
    """Raises DataError for a name that cannot be printed or written into a list of ids."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{str(path)!a}: the file name is not UTF-8; rename it (convmv -f latin1 -t utf8)") from None
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in str(path)):
        raise DataError(f"{str(path)!a}: a line break, tab or control character in the name cannot stand in id lists; rename it")


def _lines(path: Path) -> list[str]:
    """The ids in a list of VOC's own, one a line."""
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and says_nothing(error):
            raise DataError(str(access_error(path, error))) from None
        raise DataError(f"{path}: the list of ids cannot be read ({error}); complete the copy of the data set") from None


def _lookup(classes: int, ignore: int) -> tuple[int, ...]:
    """Stored value = train id, except `ignore`; every other value is not allowed."""
    return tuple(IGNORE if value == ignore else value if value < classes else -1 for value in range(256))


def _fraction_of(text: str) -> float:
    """A number in [0, 1) from the hash of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _require_folder(folder: Path, layout: str, example: str) -> None:
    there = is_there(folder)
    if folder.is_symlink() and not there:
        target = os.readlink(folder)
        again = shell_command("ln", "-sfn", example, folder)
        raise DataError(f"{folder}: is a link to {target}, which does not exist; link it again: {again}")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected {layout}; link it: {shell_command('ln', '-s', example, folder)}")


def _require_matches(images_at: Path, images: dict[str, Path], masks: dict[str, Path]) -> None:
    """A mask without its image is named otherwise, or its image was not found: neither may pass as "unlabelled"."""
    if images and masks and not images.keys() & masks.keys():
        raise DataError(
            f"{images_at}: no mask belongs to an image, such as mask {min(masks)!r} and image {min(images)!r}; "
            "give a mask its image's path and name, but for the suffix"
        )
    lonely = sorted(masks.keys() - images.keys())
    if lonely:
        more = f" (and {len(lonely) - 1} more such masks)" if len(lonely) > 1 else ""
        raise DataError(
            f"{masks[lonely[0]]}: no image {lonely[0]!r} in {images_at}{more}; add the image ({', '.join(SUFFIXES)}) "
            "or remove the mask"
        )


def _sorted_unique(samples: list[Sample]) -> list[Sample]:
    ordered = sorted(samples, key=lambda sample: (sample.image_id, str(sample.image)))
    for one, other in itertools.pairwise(ordered):
        if one.image_id == other.image_id:
            raise DataError(
                f"{one.image} and {other.image}: both have the image_id {one.image_id!r}; rename one, or remove it from "
                f"{one.split if one.split == other.split else f'{one.split} or {other.split}'}"
            )
    return ordered
