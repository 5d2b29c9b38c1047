"""Cityscapes with fine annotations."""

from __future__ import annotations

import os
from pathlib import Path

from mgd_pipeline.data.images import IGNORE, SUFFIXES
from mgd_pipeline.data.index import LEFT_OUT, DatasetIndex, Sample, note_of, require_folder, sorted_unique
from mgd_pipeline.data.listing import UNREAD_SUFFIXES, check_name, list_files
from mgd_pipeline.errors import DataError

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


def index_cityscapes(root: Path) -> DatasetIndex:
    """Cityscapes with fine annotations: splits train and val (the test split's labels are dummies), 19 classes.

    Masks are the *_labelIds.png files. A train image without one is unlabelled; a val image without one is an error.
    """
    layout = "leftImg8bit/{train,val}/<city>/ and gtFine/{train,val}/<city>/"
    require_folder(root, layout, "/path/to/cityscapes")
    samples, others, drawn, lonely = [], [], [], []
    for split in ("train", "val"):
        folder = root / "leftImg8bit" / split
        require_folder(folder, layout, f"/path/to/cityscapes/leftImg8bit/{split}")
        annotations: dict[tuple[str, str], list[Path]] = {}  # by city and image
        for path in list_files(root / "gtFine" / split):
            name, mark, _ = path.name.partition("_gtFine_")
            if mark:
                annotations.setdefault((path.parent.name, name), []).append(path)
        for path in list_files(folder):
            if not path.name.endswith("_leftImg8bit.png"):
                if path.suffix.lower() in (*SUFFIXES, *UNREAD_SUFFIXES):
                    others.append(path)
                continue
            check_name(path)
            name = path.name.removesuffix("_leftImg8bit.png")
            drawings = annotations.pop((path.parent.name, name), [])
            mask = Path("gtFine", split, path.parent.name, f"{name}_gtFine_labelIds.png")
            if not os.path.lexists(root / mask):  # a dangling link is a mask that cannot be read, not "unlabelled"
                if split == "val":
                    raise DataError(f"{root / mask}: no mask for val image {name}; unpack gtFine_trainvaltest.zip into {root}")
                if other := next((path for path in drawings if "_gtFine_label" in path.name), None):
                    raise DataError(f"{other}: is not read, and {mask.name} is missing; complete the copy, or remove the file")
                drawn += drawings[:1]
                mask = None
            samples.append(Sample(name, path.relative_to(root), mask, split))
        lonely += [path for paths in annotations.values() for path in paths if path.name.endswith("_gtFine_labelIds.png")]
    if not any(sample.split == "train" for sample in samples):
        raise DataError(f"{root / 'leftImg8bit/train'}: no image called <city>_*_leftImg8bit.png; expected {layout}")
    known = {label: train_id for train_id, (_, label, _) in enumerate(CITYSCAPES)}
    # 34 label ids; licence plates (-1) were stored as 255.
    lookup = tuple(known.get(value, IGNORE if value < 34 or value == 255 else -1) for value in range(256))
    classes, _, palette = zip(*CITYSCAPES, strict=True)
    unlabelled = "train image counts as unlabelled", "train images count as unlabelled"
    of_none = "mask belongs to no image", "masks belong to no image"
    notes = (
        *note_of(others, LEFT_OUT, "not called <city>_*_leftImg8bit.png", "save them as PNG under such a name"),
        *note_of(drawn, unlabelled, "annotated, but without *_gtFine_labelIds.png", "complete the copy"),
        *note_of(lonely, of_none, "no such file below leftImg8bit/", "complete the copy of the data set"),
    )
    return DatasetIndex(sorted_unique(samples), classes, palette, lookup, notes)
