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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgd_pipeline.access import is_there
from mgd_pipeline.data import shapes
from mgd_pipeline.data.id_lists import read_entries
from mgd_pipeline.data.images import IGNORE, SUFFIXES, read_raw_mask
from mgd_pipeline.data.listing import UNREAD_SUFFIXES, check_name, list_files, matches, printed, readable, unread
from mgd_pipeline.errors import DataError, shell_command
from mgd_pipeline.params import CityscapesData, FolderData, ShapesData, VocData

Colour = tuple[int, int, int]
SPLITS = ("train", "val", "test")
_OF_FILE_MANAGERS = ("thumbs.db", "desktop.ini", "icon\r")
"""Which Windows and macOS hide."""


@dataclass(frozen=True)
class Sample:
    image_id: str
    image: Path
    """Relative to the root of the data set, like `mask`."""
    mask: Path | None
    split: str
    """train, val or test."""


@dataclass(frozen=True)
class Note:
    """What the owner of a data set should know of it, though it can be used."""

    found: str
    remedy: str
    files: tuple[Path, ...] = ()
    """The files of which it tells, where they are left out."""

    def __str__(self) -> str:
        return f"{self.found}; {self.remedy}"


@dataclass(frozen=True)
class DatasetIndex:
    samples: list[Sample]
    """Sorted by image_id, which is unique."""
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    """RGB of each class, 0 to 255."""
    lookup: tuple[int, ...]
    """256 train ids, one for each stored mask value: 255 = ignore, -1 = not allowed."""
    notes: tuple[Note, ...] = ()
    """Files that are left out, above all."""


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
    lists, masks = top / "ImageSets/Segmentation", "SegmentationClass"
    val = _listed_names(root, lists / "val.txt")
    train_masks = "SegmentationClassAug" if (root / top / "SegmentationClassAug").is_dir() else masks
    if train_masks == masks:
        train = _listed_names(root, lists / "train.txt")
    elif (root / lists / "trainaug.txt").is_file():
        train = _listed_names(root, lists / "trainaug.txt")
    else:
        train = _names_of_masks(root / top / train_masks, root / top / "JPEGImages", val)
    samples = []
    for split, names, folder in (("train", train, train_masks), ("val", val, masks)):
        for name, origin in names.items():
            image, mask = top / "JPEGImages" / f"{name}.jpg", top / folder / f"{name}.png"
            for path in (image, mask):
                if not (root / path).is_file():
                    _require_no_link(root / path)
                    raise DataError(
                        f"{root / path}: no such file, but {split} has {name} ({origin}); complete the copy of the data set"
                    )
            samples.append(Sample(name, image, mask, split))
    notes = _unread_note(unread(list_files(root / top / "JPEGImages")))
    palette, lookup = voc_palette(len(VOC_CLASSES)), _lookup(len(VOC_CLASSES), IGNORE)
    return DatasetIndex(_sorted_unique(samples), VOC_CLASSES, palette, lookup, notes)


def _listed_names(root: Path, path: Path) -> dict[str, str]:
    """The names in a list of VOC's own, each with the place where it stands."""
    names: dict[str, str] = {}
    for entry in read_entries(root / path, "complete the copy of the data set"):
        name = entry.path[-1]
        if name in names:
            raise DataError(f"{root / path}, line {entry.line}: {name!r} stands twice; keep one line of each")
        names[name] = f"line {entry.line} of {path.name}"
    return names


def _names_of_masks(masks: Path, images: Path, held_out: Mapping[str, str]) -> dict[str, str]:
    """The names of all masks in a folder but those of val. A mask in a format that is not read is an error, not left out."""
    files = list_files(masks)
    names = {path.stem: path.name for path in readable(files)}
    for path in files:
        name = path.name.split(".")[0]
        if name not in names and (images / f"{name}.jpg").is_file():
            raise _unread_mask(path, images / f"{name}.jpg", 0)
    return {name: f"{masks.name}/{file}" for name, file in names.items() if name not in held_out}


def index_cityscapes(root: Path) -> DatasetIndex:
    """Cityscapes with fine annotations: splits train and val (the test split's labels are dummies), 19 classes.

    Masks are the *_labelIds.png files. A train image without one is unlabelled; a val image without one is an error.
    """
    layout = "leftImg8bit/{train,val}/<city>/ and gtFine/{train,val}/<city>/"
    _require_folder(root, layout, "/path/to/cityscapes")
    samples: list[Sample] = []
    others: list[Path] = []
    drawn: list[Path] = []
    lonely: list[Path] = []
    for split in ("train", "val"):
        folder = root / "leftImg8bit" / split
        _require_folder(folder, layout, f"/path/to/cityscapes/leftImg8bit/{split}")
        annotations = _annotations(root / "gtFine" / split)
        for path in list_files(folder):
            if not path.name.endswith("_leftImg8bit.png"):
                if path.suffix.lower() in (*SUFFIXES, *UNREAD_SUFFIXES):
                    others.append(path)
                continue
            check_name(path)
            name = path.name.removesuffix("_leftImg8bit.png")
            found = annotations.pop((path.parent.name, name), [])
            mask = Path("gtFine", split, path.parent.name, f"{name}_gtFine_labelIds.png")
            if not os.path.lexists(root / mask):  # a dangling link is a mask that cannot be read, not "unlabelled"
                if split == "val":
                    raise DataError(f"{root / mask}: no mask for val image {name}; unpack gtFine_trainvaltest.zip into {root}")
                if other := next((path for path in found if "_gtFine_label" in path.name), None):
                    raise DataError(f"{other}: is not read, and {mask.name} is missing; complete the copy, or remove the file")
                drawn += found[:1]
                mask = None
            samples.append(Sample(name, path.relative_to(root), mask, split))
        lonely += [path for paths in annotations.values() for path in paths if path.name.endswith("_gtFine_labelIds.png")]
    if not any(sample.split == "train" for sample in samples):
        raise DataError(f"{root / 'leftImg8bit/train'}: no image called <city>_*_leftImg8bit.png; expected {layout}")
    known = {label: train_id for train_id, (_, label, _) in enumerate(CITYSCAPES)}
    # 34 label ids; licence plates (-1) were stored as 255.
    lookup = tuple(known.get(value, IGNORE if value < 34 or value == 255 else -1) for value in range(256))
    classes, _, palette = zip(*CITYSCAPES, strict=True)
    notes = (
        *_note(
            others,
            "picture is left out",
            "pictures are left out",
            "not called <city>_*_leftImg8bit.png",
            "save them as PNG under such a name",
        ),
        *_note(
            drawn,
            "train image counts as unlabelled",
            "train images count as unlabelled",
            "annotated, but without *_gtFine_labelIds.png",
            "complete the copy",
        ),
        *_note(
            lonely,
            "mask belongs to no image",
            "masks belong to no image",
            "no such file below leftImg8bit/",
            "complete the copy of the data set",
        ),
    )
    return DatasetIndex(_sorted_unique(samples), classes, palette, lookup, notes)


def _annotations(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """The files below gtFine/<split> by city and image."""
    found: dict[tuple[str, str], list[Path]] = {}
    for path in list_files(folder):
        name, mark, _ = path.name.partition("_gtFine_")
        if mark:
            found.setdefault((path.parent.name, name), []).append(path)
    return found


def index_folder(root: Path, params: FolderData) -> DatasetIndex:
    """A data set of one's own: images/<split>/ and masks/<split>/ below root, or the two globs of params.

    The image_id is the path below images/<split>/, or below the glob's fixed part, without suffix; a mask has the same.
    Train images may lack a mask. With globs, images with a mask are drawn into val and test by a hash of their id, so that
    further images leave the others where they are; at least one goes to each split whose fraction is not 0. Of fewer than three
    the first goes to train and the second to val.
    """
    _require_folder(root, "images/<split>/ and masks/<split>/, or the globs images and masks in params.yaml", "/path/to/dataset")
    if params.images is None or params.masks is None:
        samples, notes = _split_folders(root)
    else:
        samples, notes = _split_globs(root, params.images, params.masks, params)
    count = len(params.classes)
    lookup = _lookup(count, params.ignore)
    return DatasetIndex(_sorted_unique(samples), tuple(params.classes), voc_palette(count), lookup, tuple(notes))


def scan_mask_values(root: Path, index: DatasetIndex) -> list[int]:
    """The values, sorted, that up to 200 masks of a data set hold (spread evenly over all of them), for a first params.yaml."""
    paths = sorted(root / sample.mask for sample in index.samples if sample.mask)
    if not paths:
        raise DataError(f"{root / 'masks'}: no mask found; expected masks/<split>/<id>.png")
    chosen = sorted({place * len(paths) // 200 for place in range(200)}) if len(paths) > 200 else range(len(paths))
    found = np.zeros(256, bool)
    for place in chosen:
        found[read_raw_mask(paths[place])] = True
    return np.flatnonzero(found).tolist()


@dataclass(frozen=True)
class _Place:
    """Where the images, or the masks, of a data set of one's own are expected, and what lies there."""

    shown: Path
    """What errors call it: a folder or a glob."""
    found: dict[str, Path]
    """By their path without suffix, NFC, with / between parts."""
    others: list[Path]
    """Files whose suffix is not that of an image which is read."""
    folder: Path
    """The ids are paths below it."""

    def id_of(self, path: Path) -> str:
        return unicodedata.normalize("NFC", path.relative_to(self.folder).with_suffix("").as_posix())

    def ids_of(self, path: Path) -> list[str]:
        """The ids that a file of any format may be meant for: without its last suffix, the last two (.png.bak), and so on."""
        folder, parts = path.relative_to(self.folder).parent, path.name.split(".")
        names = [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)] or [path.name]
        return [unicodedata.normalize("NFC", (folder / name).as_posix()) for name in names]


def _place(shown: Path, folder: Path, files: list[Path]) -> _Place:
    """Raises DataError for two images of one id, and for a link to nothing, which may have been a folder of images."""
    place = _Place(shown, {}, [path for path in files if path.suffix.lower() not in SUFFIXES], folder)
    for path in readable(files):
        image_id = place.id_of(path)
        if image_id in place.found:
            other = place.found[image_id]
            raise DataError(f"{path}: same name as {other} but for the suffix or Unicode form; remove or rename one")
        place.found[image_id] = path
    for path in place.others:
        _require_no_link(path)
    return place


def _split_folders(root: Path) -> tuple[list[Sample], list[Note]]:
    layout = "images/{train,val,test}/ and masks/{train,val,test}/"
    _require_folder(root / "images" / "train", layout, "/path/to/images")
    samples: list[Sample] = []
    pictures: list[Path] = []
    notes: list[Note] = []
    for split in SPLITS:
        images, masks = (_place(folder, folder, list_files(folder)) for folder in (root / "images" / split, root / "masks" / split))
        if split == "train" and not images.found:
            raise DataError(f"{root / 'images/train'}: no image found; readable suffixes are {', '.join(SUFFIXES)}")
        notes += _require_matches(images, masks)
        pictures += unread(images.others)
        for image_id, path in images.found.items():
            mask = masks.found.get(image_id)
            if mask is None and split != "train":
                raise DataError(
                    f"{path}: {split} image without a mask; expected masks/{split}/{image_id}.png below {root}, "
                    "or move the image to images/train"
                )
            samples.append(Sample(image_id, path.relative_to(root), mask and mask.relative_to(root), split))
    return samples, [*_unread_note(pictures), *notes]


def _split_globs(root: Path, images_glob: str, masks_glob: str, params: FolderData) -> tuple[list[Sample], list[Note]]:
    images, masks = (_globbed(root, pattern) for pattern in (images_glob, masks_glob))
    if not images.found:
        raise DataError(f"{root}: no image matches {images_glob!r}; readable suffixes are {', '.join(SUFFIXES)}")
    notes = [*_unread_note(unread(images.others)), *_require_matches(images, masks), *_unmatched_masks(images, masks)]
    # A hash, not a shuffle: the draw of one image does not depend on which others exist.
    key = {image_id: _fraction_of(f"{params.partition_seed}:{image_id}") for image_id in images.found if image_id in masks.found}
    order = sorted(key, key=lambda image_id: key[image_id])
    val_end, test_end = params.val_fraction, params.val_fraction + params.test_fraction
    val = [i for i in order if key[i] < val_end] or order[: params.val_fraction > 0]
    test = [i for i in order if val_end <= key[i] < test_end and i not in val]
    test = test or [i for i in order if i not in val][: params.test_fraction > 0]
    if order and len(val) + len(test) == len(order):  # labels that nothing trains on are worth nothing
        (test or val).pop()
        if not test and len(val) > 1 and params.test_fraction > 0:
            test = [val.pop()]
    held_out = {**dict.fromkeys(val, "val"), **dict.fromkeys(test, "test")}
    samples = [
        Sample(
            image_id,
            path.relative_to(root),
            masks.found[image_id].relative_to(root) if image_id in masks.found else None,
            held_out.get(image_id, "train"),
        )
        for image_id, path in images.found.items()
    ]
    return samples, notes


def _globbed(root: Path, pattern: str) -> _Place:
    parts = Path(pattern).parts
    if Path(pattern).is_absolute() or ".." in parts:
        raise DataError(f"{pattern}: a glob must stay below root, {root}; write it relative, such as photos/**/*.jpg")
    wild = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), max(0, len(parts) - 1))
    folder = root.joinpath(*parts[:wild])
    files = [path for path in list_files(folder) if matches(path.relative_to(folder).parts, parts[wild:])]
    return _place(root / pattern, folder, files)


def _unmatched_masks(images: _Place, masks: _Place) -> Iterator[Note]:
    """Pictures beside the masks that would be the mask of an image without one, if the glob of masks matched them."""
    known = {*images.found.values(), *masks.found.values(), *masks.others}
    files = [path for path in list_files(masks.folder) if path not in known]
    pictures = [path for path in files if path.suffix.lower() in (*SUFFIXES, *UNREAD_SUFFIXES)]
    lost = [path for path in pictures if (image_id := masks.id_of(path)) in images.found and image_id not in masks.found]
    why = f"called like an image without a mask, but {masks.shown} does not match"
    yield from _note(lost, "picture is not a mask", "pictures are not masks", why, "correct data.masks, or remove them")


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
    if not folder.is_dir() and (other := written_otherwise(folder)):
        raise DataError(f"{other}: must be called {folder.name}; rename it: {shell_command('mv', other, folder)}")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected {layout}; link it: {shell_command('ln', '-s', example, folder)}")


def written_otherwise(folder: Path) -> Path | None:
    """The folder beside it whose name differs in capitals alone, as Windows and macOS take for the same."""
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    return next((path for path in sorted(beside) if path.name.lower() == folder.name.lower() and path.is_dir()), None)


def _require_matches(images: _Place, masks: _Place) -> tuple[Note, ...]:
    """A mask that is not read, or has no image, or is named otherwise than its image: none may pass as "unlabelled".

    Returns a note of the files beside the masks that are none.
    """
    lacking = images.found.keys() - masks.found.keys()
    unread_masks = [(path, of) for path in masks.others if (of := next((i for i in masks.ids_of(path) if i in lacking), None))]
    if unread_masks:
        path, image_id = unread_masks[0]
        raise _unread_mask(path, images.found[image_id], len(unread_masks) - 1)
    if images.found and masks.found and not images.found.keys() & masks.found.keys():
        raise DataError(
            f"{images.shown}: no mask belongs to an image, such as mask {min(masks.found)!r} and image {min(images.found)!r}; "
            "give a mask its image's path and name, but for the suffix"
        )
    pictures = {**{masks.id_of(path): path for path in unread(masks.others)}, **masks.found}
    if lonely := sorted(pictures.keys() - images.found.keys()):
        path, more = pictures[lonely[0]], f" (and {len(lonely) - 1} more such masks)" if len(lonely) > 1 else ""
        unread_image = next((path for path in images.others if images.id_of(path) == lonely[0]), None)
        add = f"add the image ({', '.join(SUFFIXES)})"
        if unread_image:
            add = f"save {unread_image.name}, which is not read, as PNG or JPEG,"
        raise DataError(f"{path}: no image {lonely[0]!r} in {images.shown}{more}; {add} or remove the mask")
    left_out = [path for path in masks.others if path.name.lower() not in _OF_FILE_MANAGERS]
    one, many = "file among the masks is left out", "files among the masks are left out"
    return _note(left_out, one, many, "no mask in a format that is read", "remove them, or save what is a mask as PNG")


def _unread_mask(path: Path, image: Path, further: int) -> DataError:
    more = f" (and {further} more such files)" if further else ""
    kind = f"the format {path.suffix}" if path.suffix else "a file without suffix"
    return DataError(
        f"{path}: would be the mask of {image.name}, but {kind} is not read{more}; save the mask as PNG with one value a pixel, "
        "or move the file out of the masks"
    )


def _require_no_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{path}: is a link to {os.readlink(path)}, which does not exist; restore what it links to, or remove the link"
        )


def _unread_note(pictures: list[Path]) -> tuple[Note, ...]:
    suffixes = ", ".join(sorted({path.suffix for path in pictures}))
    return _note(pictures, "picture is left out", "pictures are left out", f"{suffixes} is not read", "save them as PNG or JPEG")


def _note(paths: list[Path], one: str, many: str, why: str, remedy: str) -> tuple[Note, ...]:
    if not paths:
        return ()
    what = one if len(paths) == 1 else many
    return (Note(f"{len(paths)} {what}, such as {printed(paths[0].name)}: {why}", remedy, tuple(paths)),)


def _sorted_unique(samples: list[Sample]) -> list[Sample]:
    ordered = sorted(samples, key=lambda sample: (sample.image_id, str(sample.image)))
    for one, other in itertools.pairwise(ordered):
        if one.image_id == other.image_id:
            raise DataError(
                f"{one.image} and {other.image}: both have the image_id {one.image_id!r}; rename one, or remove it from "
                f"{one.split if one.split == other.split else f'{one.split} or {other.split}'}"
            )
    return ordered
