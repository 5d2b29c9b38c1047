"""PASCAL VOC 2012, with or without SBD's masks."""

from __future__ import annotations

from pathlib import Path

from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.data.index import (
    Colour,
    DatasetIndex,
    Note,
    Sample,
    lookup_of,
    require_folder,
    sorted_unique,
    unread_mask,
    unread_note,
)
from mgd_pipeline.data.listing import list_files, readable, require_no_link, unread
from mgd_pipeline.data.partition import path_parts, read_entries
from mgd_pipeline.errors import DataError

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable"),
    *("dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_MASKS = ("SegmentationClass", "SegmentationClassAug")
Names = dict[str, tuple[str, str | None]]
"""By image name: where it is named, and the folder of its mask, if the place says it."""


def voc_palette(count: int) -> tuple[Colour, ...]:
    """The first `count` colours of the VOC colour map: the bits of an index, spread over the high bits of R, G and B."""
    return tuple(
        tuple(sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3))  # pyright: ignore
        for index in range(count)
    )


def index_voc(root: Path) -> DatasetIndex:
    """PASCAL VOC 2012: `root` is VOCdevkit/VOC2012 or a folder that contains it.

    With SegmentationClassAug (SBD's masks), train is ImageSets/Segmentation/trainaug.txt or else every mask there that is not in
    val, 10,582 images; without it, train.txt, 1,464. Val is val.txt with SegmentationClass, 1,449. There is no test split.
    """
    layout = "JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/{train,val}.txt"
    require_folder(root, layout, "/path/to/VOCdevkit/VOC2012")
    inside = next((p for p in ("", "VOC2012", "VOCdevkit/VOC2012") if (root / p / "JPEGImages").is_dir()), None)
    if inside is None:
        raise DataError(f"{root}: no JPEGImages/ here or in VOCdevkit/VOC2012/; expected {layout}")
    top = Path(inside)
    for folder in ("SegmentationClass", "ImageSets/Segmentation"):
        require_folder(root / top / folder, layout, f"/path/to/VOCdevkit/VOC2012/{folder}")
    lists, masks = top / "ImageSets/Segmentation", "SegmentationClass"
    val = _listed_names(root, lists / "val.txt")
    train_masks = "SegmentationClassAug" if (root / top / "SegmentationClassAug").is_dir() else masks
    if train_masks == masks:
        train = _listed_names(root, lists / "train.txt")
    elif (root / lists / "trainaug.txt").is_file():
        train = _listed_names(root, lists / "trainaug.txt")
    else:
        train = _names_of_masks(root / top / train_masks, root / top / "JPEGImages", val)
    samples, notes = [], [*unread_note(unread(list_files(root / top / "JPEGImages")))]
    for split, names, folder in (("train", train, train_masks), ("val", val, masks)):
        other = [origin for origin, named in names.values() if named not in (None, folder)]
        if other and train_masks != masks:
            fact = f"{other[0]} names a mask in another folder than {folder}, but all masks of {split} are read from {folder}"
            notes.append(Note(fact, f"move {train_masks} away for the masks of SegmentationClass"))
        for name, (origin, _) in names.items():
            image, mask = top / "JPEGImages" / f"{name}.jpg", top / folder / f"{name}.png"
            for path in (image, mask):
                if not (root / path).is_file():
                    require_no_link(root / path)
                    raise DataError(
                        f"{root / path}: no such file, but {split} has {name} ({origin}); complete the copy of the data set"
                    )
            samples.append(Sample(name, image, mask, split))
    palette, lookup = voc_palette(len(VOC_CLASSES)), lookup_of(len(VOC_CLASSES), IGNORE)
    return DatasetIndex(sorted_unique(samples), VOC_CLASSES, palette, lookup, tuple(notes))


def _listed_names(root: Path, path: Path) -> Names:
    names: Names = {}
    for entry in read_entries(root / path, "complete the copy of the data set"):
        name, place = path_parts(entry.image)[-1], f"{root / path}, line {entry.line}"
        if name in names:
            raise DataError(f"{place}: {name!r} stands twice; keep one line of each")
        *folders, mask = path_parts(entry.mask) if entry.mask else (name,)
        if mask != name or (folders and folders[-1] not in _MASKS):
            raise DataError(
                f"{place}: {entry.mask!r} is no mask of {name!r}; write {' or '.join(_MASKS)}/{name}.png, or the image alone"
            )
        names[name] = f"line {entry.line} of {path.name}", folders[-1] if folders else None
    return names


def _names_of_masks(masks: Path, images: Path, held_out: Names) -> Names:
    """The names of all masks in a folder, without val. Raises DataError for a mask in a format that is not read."""
    files = list_files(masks)
    names = {path.stem: path.name for path in readable(files)}
    for path in files:
        name = path.name.split(".")[0]
        if name not in names and (images / f"{name}.jpg").is_file():
            raise unread_mask(path, images / f"{name}.jpg", 0)
    return {name: (f"{masks.name}/{file}", None) for name, file in names.items() if name not in held_out}
