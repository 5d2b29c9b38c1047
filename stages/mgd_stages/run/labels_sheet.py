"""Labelled photos that `init` and `doctor` look at: the sheet data/results/labels.png, and whether masks lie on their photos."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from mgd_pipeline.data.alignment import CLEARLY, better_turn, contrast_at_edges, gain_of_turn
from mgd_pipeline.data.build import places_of
from mgd_pipeline.data.images import ORIENTATIONS, Decoding, read_drawn_mask, read_photo, resize_image, scaled_size
from mgd_pipeline.data.index import DatasetIndex, Note, Sample
from mgd_pipeline.data.manifest import ImageRow
from mgd_pipeline.errors import DataError
from mgd_pipeline.pictures.contact_sheet import Labelled, save_contact_sheet
from mgd_stages.run.data_notes import DataParams, fits_both_ways

SHEET = Path("data/results/labels.png")
_PHOTOS = 12
_TURNED = 40
"""Turned photos whose edges are looked at, at most."""
_STRANGE = 2.0, 3.0
"""Times that a mask among masks that fit must fit better if it is turned: as often as those fit better, within these limits."""
_LONG_SIDE = 512
"""Of photos whose edges are looked at."""
_FITS = 1.1
"""Contrast at the edges of a mask over the mean contrast; CamVid's masks have 1.4 to 4.7, masks of other photos about 1."""


def labelled_photos(base: Path, data: DataParams, index: DatasetIndex) -> Iterator[Labelled]:
    """Up to 12 labelled photos, spread evenly over all of them, without photos that cannot be used: prepare-data names them."""
    return _spread(base, data, index, [sample for sample in index.samples if sample.mask is not None], _PHOTOS)


def _spread(base: Path, data: DataParams, index: DatasetIndex, samples: list[Sample], most: int) -> Iterator[Labelled]:
    places = places_of(data, base, index, write=False)
    for place in np.unique(np.linspace(0, len(samples) - 1, min(most, len(samples))).astype(int)) if samples else ():
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
    pairs = [_small(photo) for photo in labelled_photos(base, data, index)]
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


def applied_turns(
    base: Path, data: DataParams, index: DatasetIndex, decodings: Mapping[str, Decoding], rows: Iterable[ImageRow]
) -> list[Note]:
    """A note about masks that may have been drawn on the stored pixels of a photo that is turned: the size of such a mask fits, and
    its edges do not say that it lies on the photo as viewers show it. `decodings`: by path, of images and masks.

    If the masks together fit the photos as shown, a mask is named only if it fits the stored pixels at least twice as well: masks
    of small objects gain by chance.
    """
    turns = {path: decoding.orientation for path, decoding in decodings.items() if decoding.orientation in ORIENTATIONS}
    risky = {row.image_id: row for row in rows if row.image_path in turns and fits_both_ways(row, turns)}
    samples = [sample for sample in index.samples if sample.image_id in risky]
    gains = {
        photo.name: gain_of_turn(*_small(photo), turns[risky[photo.name].image_path])
        for photo in _spread(base, data, index, samples, _TURNED)
    }
    together = float(np.median(list(gains.values()))) if gains else 1.0
    if together < 1 / CLEARLY:
        least = np.clip(1 / together, *_STRANGE)
        doubtful = [row for image_id, row in risky.items() if gains.get(image_id, 0.0) >= least]
    else:
        doubtful = [row for image_id, row in risky.items() if gains.get(image_id, 1.0) > 1 / CLEARLY]
    if not doubtful:
        return []
    first, alone = doubtful[0], len(doubtful) == 1
    photos = f"{len(doubtful)} photos are turned as viewers show them, and their masks"
    if alone:
        photos = "1 photo is turned as viewers show it, and its mask"
    how = f"{'fits' if alone else 'fit'} the stored pixels better"
    if 1 / CLEARLY <= together < CLEARLY:
        how = "would fit the stored pixels as well"
    fault = f"{photos} {how}, such as {first.mask_path} ({first.image_path} is {ORIENTATIONS[turns[first.image_path]]})"
    return [
        Note(fault, "look at the mask over its photo; if masks were drawn on stored pixels, set data.exif_orientation to ignored")
    ]


def _small(photo: Labelled) -> tuple[np.ndarray, np.ndarray]:
    """Image and mask at the size at which edges are looked at."""
    height, width = photo.mask.shape
    size = scaled_size(height, width, _LONG_SIDE)
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, (height, width), strict=True))
    return resize_image(photo.image, *size), photo.mask[rows[:, None], columns]
