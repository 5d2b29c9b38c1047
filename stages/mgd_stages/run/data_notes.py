"""What the owner of a data set should be told, in the same words by `init`, `prepare-data` and `doctor`: nothing stops for it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mgd_pipeline.data.images import IGNORE, ORIENTATIONS, SUFFIXES, SWAPPING
from mgd_pipeline.data.index import DatasetIndex, Note, Sample
from mgd_pipeline.data.layouts import Pairing, is_rendering
from mgd_pipeline.data.listing import UNREAD_SUFFIXES, is_hidden, printed
from mgd_pipeline.data.manifest import ImageRow, Manifest
from mgd_pipeline.errors import DataError
from mgd_pipeline.params import CityscapesData, FolderData, IdLists, ShapesData, VocData
from mgd_pipeline.pictures.overlays import is_png_of_mask, is_predicted
from mgd_pipeline.words import counted, first_of, verb

DataParams = ShapesData | VocData | CityscapesData | FolderData
_FEW_LABELLED = 5
"""With fewer labelled images than this, which images they are decides the result."""
FEW_IMAGES = 10
"""With fewer images than this to measure on, a warning: one scene more or less is worth points of mIoU."""


def few_labelled(data: DataParams, samples: Iterable[Sample], labelled: int) -> list[Note]:
    """`labelled`: how many of the samples count as labelled."""
    if labelled >= _FEW_LABELLED:
        return []
    images = "1 image is" if labelled == 1 else f"{labelled} images are"
    if isinstance(data.partition, IdLists):
        fault, remedy = f"only {images} labelled, by {data.partition.labelled}", "name more images there"
    else:
        masks = Counter(sample.split for sample in samples if sample.mask is not None)
        shares = f"train has {masks['train']}, val {masks['val']}, test {masks['test']}"
        fault = f"only {images} labelled: data.partition is {data.partition}, and of the masks {shares}"
        larger = "1/1" if data.partition in ("1/2", "1/1") else "1/2"
        remedy = f"take a larger share, such as {larger}" if labelled < masks["train"] else "draw masks for more images"
    return [Note(fault, f"{remedy}, because so few labels say little")]


def absent_classes(classes: Sequence[str], pixels_K: np.ndarray, masks: int, labelled: int) -> list[Note]:
    """`pixels_K`: pixels of each class in `masks` of the `labelled` masks."""
    never = [name for name, count in zip(classes, pixels_K.tolist(), strict=False) if not count]
    if not never:
        return []
    noun = "the class" if len(never) == 1 else f"the {len(never)} classes"
    read = "" if masks == labelled else " that were read"
    fault = f"none of the {masks} labelled masks{read} holds {noun} {first_of(never)}"
    draw = f"label images with {verb(len(never), 'it', 'them')}, or draw other labelled images by data.partition_seed"
    return [Note(fault, "--full reads all of them" if masks < labelled else draw)]


def unmeasured_classes(data: DataParams, manifest: Manifest) -> list[Note]:
    """Of a data set of one's own, the classes of the labelled images that no mask of val, or of test, holds."""
    if not isinstance(data, FolderData) or not manifest.labelled:
        return []
    trained_K = np.sum([manifest.pixels[row.image_id] for row in manifest.labelled], axis=0)
    notes = []
    for split in ("val", "test"):
        masks = [manifest.pixels[row.image_id] for row in manifest.split(split)]
        lacked_K = (np.sum(masks, axis=0) == 0) & (trained_K > 0) if masks else np.zeros(0, bool)
        if names := [name for name, lacked in zip(manifest.classes, lacked_K.tolist(), strict=False) if lacked]:
            noun, it = verb(len(names), "the class", f"the {len(names)} classes"), verb(len(names), "it", "them")
            fault = (
                f"{split} ({counted(len(masks), 'mask')}) lacks {noun} {first_of(names)}, which labelled masks hold: a comparison "
                f"on {split} says nothing of {it}"
            )
            other = "draw other splits by data.partition_seed" if _draws(data) else f"move such images from train to {split}"
            notes.append(Note(fault, f"label more images with {it}, or {other}"))
    return notes


def few_to_compare_on(split: str, data: DataParams, images: int) -> list[Note]:
    """`images`: of the split to measure on; of none `require_images_of` tells."""
    if not 0 < images < FEW_IMAGES:
        return []
    remedy = (
        f"raise data.{split}_fraction or give masks to more images" if _draws(data) else f"add more images with masks to {split}"
    )
    fault = f"networks will be compared on {counted(images, 'image')} ({split}), which says little"
    return [Note(fault, remedy)]


def _draws(data: DataParams) -> bool:
    """Whether splits are drawn."""
    folders = isinstance(data, FolderData) and data.labels == "masks" and data.masks is None
    return isinstance(data, FolderData) and data.splits == "drawn" and not folders


def likely_mistakes(data: DataParams, classes: Sequence[str], pixels_K: np.ndarray, masks: int) -> list[Note]:
    """What sound files may say by mistake. `pixels_K`: pixels of each class, first of all, in `masks` labelled masks."""
    pixels_K = pixels_K[: len(classes)]
    held = [name for name, count in zip(classes, pixels_K.tolist(), strict=True) if count]
    if not isinstance(data, FolderData) or masks < 2 or not held:
        return []
    if len(held) == 1:
        fault = f"every pixel of the {masks} labelled masks is {held[0]}, or has no class"
        return [
            Note(fault, "a network learns nothing from one class: look at the masks, data.values, data.ignore and data.uncovered")
        ]
    if data.labels == "masks" and data.values is None and not pixels_K[0] and pixels_K[-1]:
        last = len(classes) - 1
        fault = f"the labelled masks hold the value {last}, the last class, and never 0, the class {classes[0]}"
        shown = f"[1, 2, ..., {last}]" if last > 3 else str(list(range(1, last + 1)))
        return [Note(fault, f"if your ids begin at 1, set data.values to {shown} and remove the first name of data.classes")]
    return []


def copies(training: Sequence[ImageRow]) -> list[Note]:
    """Of training images, those with the bytes of another: such an image counts twice, and may have two masks that differ."""
    first: dict[str, str] = {}
    firsts = [first.setdefault(row.image_sha256, row.image_path) for row in training]
    twice = [(row.image_path, of) for row, of in zip(training, firsts, strict=True) if of != row.image_path]
    if not twice:
        return []
    images = "1 training image is" if len(twice) == 1 else f"{len(twice)} training images are"
    fault = f"{images} byte for byte another training image, such as {twice[0][0]} and {twice[0][1]}"
    return [Note(fault, "remove the copies, each of which counts as an image of its own")]


def void_masks(rows: Iterable[ImageRow], pixels: Mapping[str, np.ndarray]) -> list[Note]:
    """`pixels`: pixels of each class, by image_id, of the masks that were read."""
    used = [row for row in rows if row.image_id in pixels]
    void = [row.mask_path for row in used if not pixels[row.image_id].any()]
    if not void:
        return []
    hold = verb(len(void), "holds", "hold")
    fault = f"{len(void)} of the {len(used)} labelled, val and test masks {hold} no class at all, such as {void[0]}"
    return [Note(fault, "draw classes into the mask" if len(void) == 1 else "draw classes into these masks")]


def drawn_by_networks(manifest: Manifest) -> list[Note]:
    """Masks of val and test that `label-images` or `predict` made and nobody has changed: they flatter that network."""
    notes = []
    for split in ("val", "test"):
        rows = [row for row in manifest.split(split) if row.mask_path is not None]
        if drawn := [row for row in rows if is_png_of_mask(manifest.mask_file(row))]:
            are = verb(len(drawn), "is", "are")
            fault = f"{len(drawn)} of the {len(rows)} {split} masks {are} as a network drew them, such as {drawn[0].mask_path}"
            notes.append(
                Note(fault, f"look at each of them and correct it, or mIoU on {split} says how far others agree with that network")
            )
    return notes


def orientations(noted: Mapping[str, int], rows: Iterable[ImageRow]) -> list[Note]:
    """`noted`: EXIF orientation, 2 to 8, by path, of images and masks, which nothing applies."""
    turned = [row for row in rows if row.image_path in noted]
    notes = []
    if turned:
        first = turned[0].image_path
        images = "1 image has" if len(turned) == 1 else f"{len(turned)} images have"
        fault = (
            f"{images} an EXIF orientation, such as {first} (viewers show it {ORIENTATIONS[noted[first]]}): the orientation is "
            "ignored, and masks must be drawn on the stored pixels"
        )
        remedy = "turn the photos for good before anybody draws on them (`exiftran -ai`, or `mogrify -auto-orient`)"
        if risky := [row for row in turned if fits_both_ways(row, noted)]:
            fit = "1 mask fits" if len(risky) == 1 else f"{len(risky)} masks fit"
            fault += f"; {fit} the photo turned or not, such as {risky[0].mask_path}: look at it over {risky[0].image_path}"
            remedy = "where the mask lies wrong, turn the photos for good (`exiftran -ai`, or `mogrify -auto-orient`)"
        notes.append(Note(fault, remedy))
    images_noted = {row.image_path for row in turned}
    masks = [path for path in noted if path not in images_noted]
    if masks:
        have = "1 mask has" if len(masks) == 1 else f"{len(masks)} masks have"
        shown = f"such as {masks[0]} (viewers show it {ORIENTATIONS[noted[masks[0]]]})"
        remedy = "look at the mask over its image, and save it without the note (`mogrify -strip`)"
        notes.append(Note(f"{have} an EXIF orientation, {shown}: the orientation is ignored", remedy))
    return notes


def fits_both_ways(row: ImageRow, noted: Mapping[str, int]) -> bool:
    """Whether a mask of the image's stored size may have been drawn on the photo as viewers show it.

    With a height other than the width the size tells. A mask with its image's own orientation is turned by viewers, too.
    """
    if row.mask_path is None or noted.get(row.mask_path) == noted[row.image_path]:
        return False
    return noted[row.image_path] not in SWAPPING or row.height == row.width


def unused_pictures(root: Path, data: DataParams, index: DatasetIndex) -> list[Note]:
    """Pictures below the root of a data set of one's own that are neither image nor mask of it, nor in a note of the index,
    nor made by `predict` and `label-images`."""
    if not isinstance(data, FolderData):
        return []
    known = {path for sample in index.samples for path in (sample.image, sample.mask) if path}
    known |= {path.relative_to(root) for note in index.notes for path in note.files}
    there = [
        (Path(top) / name).relative_to(root)
        for top, _, names in os.walk(root)
        for name in names
        if name.lower().endswith((*SUFFIXES, *UNREAD_SUFFIXES)) and not name.startswith(".")
    ]
    if data.labels == "colours" and data.images is not None:  # the masks of the index are drawn from these
        mask_id = Pairing(data.images, data.masks).mask_id
        known |= {path for path in there if mask_id(path) is not None}
    unused = sorted(path for path in there if path not in known and not is_rendering(path) and not is_predicted(root / path))
    if unused:  # a file behind a link to a folder is used under that name
        reached = {(root / path).resolve() for path in known}
        unused = [path for path in unused if (root / path).resolve() not in reached]
    hidden = [path for path in unused if any(map(is_hidden, path.parts[:-1]))]
    unused = [path for path in unused if not any(map(is_hidden, path.parts[:-1]))]
    notes = []
    if among := [path for path in hidden if not is_hidden(path.parts[0])]:  # beside images/ lie .git, .dvc and the like
        fault = f"pictures in hidden folders are not used, such as {printed(among[0].as_posix())}"
        notes.append(Note(fault, "remove the folder, or rename it where they are images of yours"))
    if not unused:
        return notes
    are, shown = verb(len(unused), "is", "are"), printed(unused[0].as_posix())
    fault = f"{len(unused)} of the {len(there)} pictures below {root} {are} not used, such as {shown}"
    remedy = "move them into images/ and masks/, below train, val or test, or write globs in params.yaml"
    if data.images is not None:
        remedy = f"data.images is {data.images} and data.masks {data.masks}: widen the globs, or move the pictures away"
    return [Note(fault, remedy), *notes]


def require_images_of(split: str, data: DataParams, samples: Sequence[Sample]) -> None:
    """Raises DataError where the split to measure on has no image."""
    if not any(sample.split == split for sample in samples):
        remedy = remedy_of_empty_split(data, sum(sample.mask is not None for sample in samples))
        raise DataError(f"evaluation.split: {split} has no images; {remedy}")


def remedy_of_empty_split(data: DataParams, masked: int) -> str:
    """What to do where the split to measure on has no images; `masked`: images with a mask, in all splits together."""
    if _draws(data) and masked < 3:
        have = "1 image has" if masked == 1 else f"{masked} images have"
        return f"only {have} a mask, and train takes the first, val the second, test the third: draw masks for more images"
    return "choose the other split, or add images and masks to it"


def are_grey_levels(values: Sequence[int]) -> bool:
    """Whether the stored values of masks, sorted, are grey levels: as ids each would make a class for every number below it."""
    levels = [value for value in values if value != IGNORE]
    known = sorted({0, *levels})
    gaps = np.diff(known)
    even = len(known) > 2 and gaps.min() >= 10 and gaps.max() - gaps.min() <= 1
    return bool(even or (known[-1] + 1 > 50 and len(levels) < (known[-1] + 1) / 4))


def missing_values(values: Sequence[int]) -> list[Note]:
    """Of stored values, sorted, that become classes: the numbers between them that no mask holds."""
    levels = [value for value in values if value != IGNORE]
    missing = sorted(set(range(max(levels) + 1)) - set(levels))
    if not missing:
        return []
    notes = []
    if missing[0] == 0:
        fault = "no mask holds the value 0, which is the first class"
        ids = (
            f"where your ids begin at 1, set data.values to {levels}"
            if len(levels) < 20
            else "where ids begin at 1, set data.values"
        )
        notes.append(Note(fault, f"{ids} and remove the first name; where 0 is background that no mask has, keep them"))
    if inner := [value for value in missing if value]:
        shown = ", ".join(map(str, inner[:10])) + (", ..." if len(inner) > 10 else "")
        held = f"the value {shown}, and it is" if len(inner) == 1 else f"the values {shown}, and each is"
        notes.append(Note(f"no mask holds {held} a class without a pixel", "give it a name, or number the classes anew"))
    return notes
