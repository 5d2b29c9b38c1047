"""Builds the manifest: reads every image and mask once, and names what cannot be trained on before anything starts.

What is measured on is not trained on: a train image with the bytes of a val or test image cannot be used. Only a list of unlabelled
images may name images of val and test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mgd_pipeline.data.datasets import index_dataset
from mgd_pipeline.data.images import (
    AS_STORED,
    ORIENTATIONS,
    SWAPPING,
    Decoding,
    PhotoRules,
    orientation_of,
    read_drawn_mask,
    read_photo,
    sha256_of,
    verify_checksums,
)
from mgd_pipeline.data.index import Colour, DatasetIndex, Sample
from mgd_pipeline.data.labels.convert import mask_png, remove_masks, store_mask
from mgd_pipeline.data.manifest import ImageRow, Manifest, Skipped
from mgd_pipeline.data.partition import partition_images
from mgd_pipeline.data.voc import voc_palette
from mgd_pipeline.errors import DataError
from mgd_pipeline.params import CityscapesData, FolderData, ShapesData, VocData

_LEAVE_OUT = "with `mgd-pipeline prepare-data --on-error skip`"


@dataclass(frozen=True)
class Seen:
    """An image and its mask, read in full."""

    row: ImageRow
    decodings: dict[str, Decoding]
    """How image and mask are decoded, by path."""
    orientations: dict[str, int]
    """EXIF orientation, 2 to 8, of image and mask, if it is not applied, by path."""
    pixels: np.ndarray | None
    """Pixels of the mask by train id, (256,) int64; None without a mask."""


@dataclass(frozen=True)
class Places:
    """Where the files of a data set are, and how they are read."""

    images: Path
    masks: Path
    lookup: np.ndarray
    """(256,) integers, as `read_mask` takes it."""
    rules: PhotoRules
    draws: Mapping[str, Callable[[], np.ndarray]]
    """Draws masks that are not files, by image_id."""
    palette: tuple[Colour, ...]
    """Of the masks that are written: not the data set's, so that another colour in pictures makes no other mask."""
    write: bool
    """Whether drawn masks are written below `masks`."""


def build_manifest(
    params: ShapesData | VocData | CityscapesData | FolderData,
    base: Path,
    progress: Callable[[int, int], None] | None = None,
    on_error: Literal["stop", "skip"] = "stop",
) -> Manifest:
    """Lists, reads, checks and hashes the data set at base / params.root, and partitions it.

    `progress(done, total)` is called after each image. Masks of an annotation tool are written below
    base / index.masks on the way. Raises DataError with one line for each of the first ten bad files. With
    `on_error="skip"` an image that cannot be used, or whose mask cannot be used, gets no row and stands in `Manifest.skipped`. The
    partition is drawn before, so every further image keeps its subset. A bad mask excludes its image from the unlabelled images
    too: which images there are must not depend on the partition, and a mask that does not fit is often the mask of another image.
    Raises DataError all the same where a split or subset would lose its last image.
    """
    index = index_dataset(params, base)
    subsets = partition_images(params, index.samples, base)  # first, so that a mistake in it shows at once
    root = base / params.root
    places = places_of(params, base, index, write=True)
    seen: dict[str, Seen] = {}
    skipped: list[Skipped] = []
    with ThreadPoolExecutor(2) as pool:
        outcomes = pool.map(lambda sample: check_sample(places, sample), index.samples)
        for done, (sample, outcome) in enumerate(zip(index.samples, outcomes, strict=True), start=1):
            if isinstance(outcome, Skipped):
                skipped.append(outcome)
            else:
                seen[sample.image_id] = outcome
            if progress:
                progress(done, len(index.samples))
    skipped += twins_of_held_out({image_id: one.row for image_id, one in seen.items()}, subsets)
    skipped.sort(key=lambda bad: bad.image_id)
    if skipped and on_error == "stop":
        lines = [f"{root / bad.path}: {bad.reason}" for bad in skipped[:10]]
        if len(skipped) > 10:
            lines.append(f"... and {len(skipped) - 10} more files that cannot be used")
        if not lines[-1].endswith(_LEAVE_OUT):
            lines[-1] += f"; or leave {'it' if len(skipped) == 1 else 'them'} out {_LEAVE_OUT}"
        raise DataError("\n".join(lines))
    _require_some_left(root, index.samples, subsets, skipped)
    if index.masks is not None:
        remove_masks(base / index.masks, {sample.mask for sample in index.samples if sample.mask})
    for bad in skipped:
        seen.pop(bad.image_id, None)  # a twin of a held-out image was read all the same
    return Manifest(
        base=base,
        root=Path(params.root),
        long_side=params.long_side,
        classes=index.classes,
        palette=index.palette,
        lookup=index.lookup,
        rows={image_id: one.row for image_id, one in seen.items()},
        subsets={image_id: subset for image_id, subset in subsets.items() if image_id in seen},
        skipped=tuple(skipped),
        orientations={path: value for one in seen.values() for path, value in one.orientations.items()},
        decodings={path: value for one in seen.values() for path, value in one.decodings.items() if value != AS_STORED},
        masks=index.masks,
        pixels={i: one.pixels[: len(index.classes)] for i, one in seen.items() if one.pixels is not None},
    )


def places_of(
    params: ShapesData | VocData | CityscapesData | FolderData, base: Path, index: DatasetIndex, *, write: bool
) -> Places:
    root = base / params.root
    masks = root if index.masks is None else base / index.masks
    palette = voc_palette(len(index.classes))
    return Places(root, masks, np.array(index.lookup, np.int16), photo_rules(params), index.drawn, palette, write)


def photo_rules(params: ShapesData | VocData | CityscapesData | FolderData) -> PhotoRules:
    """What the parameters say of photos; only data sets of one's own have a choice."""
    if not isinstance(params, FolderData):
        return PhotoRules()
    background, values = params.background_colour, params.value_range
    return PhotoRules(
        params.exif_orientation == "applied",
        None if background is None else (background[0], background[1], background[2]),
        None if values is None else (values[0], values[1]),
    )


def check_sample(places: Places, sample: Sample) -> Seen | Skipped:
    """Reads image and mask in full. Returns what is wrong instead of raising it, so that all bad files are named at once."""
    path, shown = places.images / sample.image, sample.image.as_posix()
    decodings: dict[str, Decoding] = {}
    orientations: dict[str, int] = {}
    mask, pixels, mask_sha256 = None, None, None
    try:
        image, decodings[shown] = read_photo(path, places.rules)
        if not places.rules.apply_orientation:
            orientations[shown] = orientation_of(path)
        verify_checksums(path)
        draw = places.draws.get(sample.image_id)
        if draw is not None and sample.mask:
            mask = draw()
            data = mask_png(mask, places.palette)
            mask_sha256 = hashlib.sha256(data).hexdigest()
            if places.write:
                store_mask(places.masks / sample.mask, data)
        elif sample.mask:
            path, shown = places.masks / sample.mask, sample.mask.as_posix()
            mask, orientation = read_drawn_mask(path, places.lookup, apply_orientation=places.rules.apply_orientation)
            decodings[shown] = Decoding(orientation)
            if not places.rules.apply_orientation:
                orientations[shown] = orientation_of(path)
            verify_checksums(path)
            mask_sha256 = sha256_of(path)
        if mask is not None:
            if mask.shape != image.shape[:2]:
                orientation = orientation_of(places.images / sample.image)
                raise DataError(_other_size(path, mask, sample.image, image, orientation, places.rules))
            pixels = np.bincount(mask.ravel(), minlength=256)
        row = ImageRow(
            image_id=sample.image_id,
            image_path=sample.image.as_posix(),
            image_sha256=sha256_of(places.images / sample.image),
            height=image.shape[0],
            width=image.shape[1],
            mask_path=sample.mask.as_posix() if sample.mask else None,
            mask_sha256=mask_sha256,
            split=sample.split,
        )
        return Seen(row, decodings, {path: value for path, value in orientations.items() if value in ORIENTATIONS}, pixels)
    except DataError as error:
        return Skipped(sample.image_id, shown, str(error).removeprefix(f"{path}: ").removeprefix(f"{places.images}/"))


def _other_size(path: Path, mask: np.ndarray, image_name: Path, image: np.ndarray, orientation: int, rules: PhotoRules) -> str:
    """`orientation`: the EXIF orientation of the image's file, applied or not."""
    sizes = (
        f"{path}: mask of {mask.shape[1]} x {mask.shape[0]} pixels, but its image {image_name.as_posix()} has "
        f"{image.shape[1]} x {image.shape[0]}"
    )
    if orientation not in SWAPPING or mask.shape != image.shape[1::-1]:
        return f"{sizes}; export both at one size"
    shown = ORIENTATIONS[orientation]
    if rules.apply_orientation:
        return (
            f"{sizes} as viewers show it, {shown}: the mask was drawn on the photo as it is stored; set data.exif_orientation to "
            "ignored if all masks were, or draw this one again"
        )
    return f"{sizes}: the mask was drawn on the photo as viewers show it, {shown}; set data.exif_orientation to applied"


def twins_of_held_out(rows: Mapping[str, ImageRow], subsets: Mapping[str, str]) -> list[Skipped]:
    """Training images with the bytes of a val or test image that no list declares unlabelled, under whatever name."""
    held_out: dict[str, list[ImageRow]] = {}
    for row in rows.values():
        if row.split != "train":
            held_out.setdefault(row.image_sha256, []).append(row)
    leaks = []
    for row in rows.values():
        twins = held_out.get(row.image_sha256, []) if row.split == "train" or row.image_id in subsets else []
        if row.split != "train":  # it is declared, so it trains; undeclared copies must not
            twins = [twin for twin in twins if twin.image_id not in subsets]
        if twins:
            reason = (
                f"is byte for byte the {twins[0].split} image {twins[0].image_path}, so training would see it; remove one of the "
                f"two, or leave this one out {_LEAVE_OUT}"
            )
            leaks.append(Skipped(row.image_id, row.image_path, reason))
    return leaks


def _require_some_left(root: Path, samples: list[Sample], subsets: dict[str, str], skipped: list[Skipped]) -> None:
    """Raises DataError where all images of a split or subset are skipped."""
    reasons = {bad.image_id: f"{root / bad.path}: {bad.reason}" for bad in skipped}
    groups = [(sample.image_id, sample.split) for sample in samples]
    for name in dict.fromkeys(name for _, name in [*groups, *subsets.items()]):
        ids = [image_id for image_id, group in [*groups, *subsets.items()] if group == name]
        if all(image_id in reasons for image_id in ids):
            none = f"none of the {len(ids)} {name} images can be used" if len(ids) > 1 else f"the only {name} image cannot be used"
            raise DataError(f"{reasons[ids[0]]} ({none}, so --on-error skip does not help)")
