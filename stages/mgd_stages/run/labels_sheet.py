"""The sheet of labelled photos that `init` and `prepare-data` write: data/results/labels.png."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mgd_pipeline.data.build import places_of
from mgd_pipeline.data.images import read_mask, read_photo
from mgd_pipeline.data.index import DatasetIndex
from mgd_pipeline.errors import DataError
from mgd_pipeline.pictures.contact_sheet import Labelled, save_contact_sheet
from mgd_stages.run.data_notes import DataParams

SHEET = Path("data/results/labels.png")
_PHOTOS = 12


def save_labels_sheet(base: Path, data: DataParams, index: DatasetIndex) -> Path | None:
    """Writes the sheet of up to 12 labelled photos, spread evenly over all of them, and returns its path; None where no photo with
    its mask can be read. Photos that cannot be used are left out: prepare-data names them."""
    samples = [sample for sample in index.samples if sample.mask is not None]
    places = places_of(data, base, index, write=False)
    photos: list[Labelled] = []
    for place in np.unique(np.linspace(0, len(samples) - 1, min(_PHOTOS, len(samples))).astype(int)) if samples else ():
        sample = samples[place]
        try:
            image = read_photo(places.images / sample.image, places.rules)[0]
            draw = places.draws.get(sample.image_id)
            mask = draw() if draw else read_mask(places.masks / str(sample.mask), places.lookup)
        except DataError:
            continue
        if mask.shape == image.shape[:2]:
            photos.append(Labelled(sample.image_id, image, mask))
    if not photos:
        return None
    title = f"{len(photos)} of {len(samples)} labelled photos: does each mask lie on its photo, in the right colours?"
    save_contact_sheet(base / SHEET, photos, index.classes, index.palette, title=title)
    return base / SHEET
