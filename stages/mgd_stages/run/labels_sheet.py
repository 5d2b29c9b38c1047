"""Labelled photos that `init` and `doctor` look at: the sheet data/results/labels.png, and whether masks lie on their photos."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mgd_pipeline.data.alignment import better_turn, contrast_at_edges
from mgd_pipeline.data.build import places_of
from mgd_pipeline.data.images import ORIENTATIONS, read_drawn_mask, read_photo, resize_image, scaled_size
from mgd_pipeline.data.index import DatasetIndex, Note
from mgd_pipeline.errors import DataError
from mgd_pipeline.pictures.contact_sheet import Labelled, save_contact_sheet
from mgd_stages.run.data_notes import DataParams

SHEET = Path("data/results/labels.png")
_PHOTOS = 12
_LONG_SIDE = 512
"""Of photos whose edges are looked at."""
_FITS = 1.1
"""Contrast at the edges of a mask over the mean contrast; CamVid's masks have 1.4 to 4.7, masks of other photos about 1."""


def labelled_photos(base: Path, data: DataParams, index: DatasetIndex) -> Iterator[Labelled]:
    """Up to 12 labelled photos, spread evenly over all of them, without photos that cannot be used: prepare-data names them."""
    samples = [sample for sample in index.samples if sample.mask is not None]
    places = places_of(data, base, index, write=False)
    for place in np.unique(np.linspace(0, len(samples) - 1, min(_PHOTOS, len(samples))).astype(int)) if samples else ():
        sample = samples[place]
        try:
            image = read_photo(places.images / sample.image, places.rules)[0]
            draw = places.draws.get(sample.image_id)
            path = places.masks / str(sample.mask)
            mask = draw() if draw else read_drawn_mask(path, places.lookup, apply_orientation=places.rules.apply_orientation)[0]
        except DataError:
            continue
        if mask.shape == image.shape[:2]:
            yield Labelled(sample.image_id, image, mask)


def save_labels_sheet(base: Path, data: DataParams, index: DatasetIndex) -> Path | None:
    """Writes the sheet of labelled photos and returns its path; None where no photo with its mask can be read."""
    photos = list(labelled_photos(base, data, index))
    if not photos:
        return None
    masks = sum(sample.mask is not None for sample in index.samples)
    title = f"{len(photos)} of {masks} labelled photos: does each mask lie on its photo, in the right colours?"
    save_contact_sheet(base / SHEET, photos, index.classes, index.palette, title=title)
    return base / SHEET


def misaligned(base: Path, data: DataParams, index: DatasetIndex) -> list[Note]:
    """A note where the edges of masks do not lie on edges of their photos, but would if the masks were turned, or not at all."""
    pairs = []
    for photo in labelled_photos(base, data, index):
        height, width = photo.mask.shape
        size = scaled_size(height, width, _LONG_SIDE)
        rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, (height, width), strict=True))
        pairs.append((resize_image(photo.image, *size), photo.mask[rows[:, None], columns]))
    if turn := better_turn(pairs):
        orientation, better, looked_at = turn
        fault = f"{better} of {looked_at} masks fit their photos better if they are {ORIENTATIONS[orientation]}"
        return [Note(fault, f"look at {SHEET}; masks and photos may have been exported with different EXIF turns")]
    contrasts = [contrast_at_edges(*pair) for pair in pairs]
    contrasts = [contrast for contrast in contrasts if np.isfinite(contrast)]
    if len(contrasts) >= 4 and np.median(contrasts) < _FITS:
        fault = f"the edges of the masks do not lie on edges of their photos (contrast {np.median(contrasts):.2f} of the mean)"
        return [Note(fault, f"look at {SHEET}; masks may belong to other photos, or be shifted")]
    return []
