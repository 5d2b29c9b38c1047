"""Data sets whose labels are converted: files of an annotation tool, or masks of colours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from mgd_pipeline.data.folders import Shown, pair_globs, palette_of, shown_by_masks, with_splits
from mgd_pipeline.data.images import IGNORE, shown_size
from mgd_pipeline.data.index import DatasetIndex, Note, lookup_of, note_of, require_folder, sorted_unique
from mgd_pipeline.data.labels.colours import colours_in, read_colour_mask
from mgd_pipeline.data.labels.files import ImageFiles
from mgd_pipeline.data.labels.label_studio import PNG_EXPORT
from mgd_pipeline.data.labels.read import TOOLS, Tool, read_labels
from mgd_pipeline.data.labels.regions import Drawing, draw
from mgd_pipeline.data.layouts import Pairing
from mgd_pipeline.errors import DataError
from mgd_pipeline.params import FolderData
from mgd_pipeline.words import listed, verb

CONVERTED = Path("data/labels")
"""Where prepare-data writes the masks that it draws, relative to the folder of params.yaml: <image_id>.png."""
_NO_PHOTOS = (
    *("masks", "segmentationclass", "segmentationobject", "annotations", "ann", "labels"),
    *("masks_machine", "masks_human", "masks_instances"),  # Supervisely's renderings
)
"""Folders of pictures that are no photos, in lower case, unless data.images names them."""


def converts(params: BaseModel) -> bool:
    """Whether prepare-data draws masks for these parameters of a data set."""
    return isinstance(params, FolderData) and params.labels != "masks"


def index_colours(root: Path, params: FolderData) -> DatasetIndex:
    """Images with masks of colours, paired by the two globs."""
    require_folder(root, "the images and masks that params.yaml names", "/path/to/dataset")
    labelled, notes = pair_globs(root, params)
    draws: dict[str, Callable[[], np.ndarray]] = {}
    for image_id, _, mask in labelled:
        if mask is not None:
            draws[image_id] = partial(read_colour_mask, root / mask, params.colours or [], params.ignore_colours)
    shown = shown_by_masks(root, labelled, colours_in, {tuple(colour) for colour in params.ignore_colours})
    return _index(root, labelled, draws, notes, params, shown)


def index_annotated(root: Path, params: FolderData) -> DatasetIndex:
    """Images with the labels of an annotation tool. The id of an image is its path below the root, or below the fixed part of
    data.images, without suffix.

    Raises DataError where a class of the annotations is neither in data.classes nor in data.names, and where nothing is labelled.
    """
    require_folder(root, "photos and the export of an annotation tool", "/path/to/dataset")
    files = ImageFiles(root)
    tool: Tool = params.labels  # pyright: ignore[reportAssignmentType] - not masks, not colours
    labels = read_labels(files, tool, params.annotations)
    known = {*params.classes, *params.names}
    used = dict.fromkeys(region.name for drawing in labels.drawings for region in drawing.regions)
    if foreign := [name for name in used if name not in known]:
        free = [name for name in params.classes if name not in {*used, *params.names.values(), params.uncovered}]
        such = f", such as {{{foreign[0]}: {free[0]}}}" if free else ""  # the new name, if the user has renamed a class
        it, means = ("it", "it means") if len(foreign) == 1 else ("them", "they mean")
        raise DataError(
            f"{root}: the annotations have the {verb(len(foreign), 'class', 'classes')} {listed(list(map(repr, foreign)))}, which "
            f"data.classes lacks; add {it} there, or say in data.names which class {means}{such} (null for none)"
        )
    strange = [name for name in params.names if name not in {*used, *labels.names}]
    pairing = Pairing(params.images or "**")
    by_image = {drawing.image: drawing for drawing in labels.drawings}
    labelled: list[tuple[str, Path, Path | None]] = []
    draws: dict[str, Callable[[], np.ndarray]] = {}
    shows: dict[str, frozenset[str | None]] = {}
    sources: dict[str, Path] = {}
    empty: list[Path] = []
    for image in files.images:
        image_id = pairing.image_id(image)
        drawing = by_image.get(image)
        no_photo = PNG_EXPORT.fullmatch(image.name) or any(part.lower() in _NO_PHOTOS for part in image.parts[:-1])
        if image_id is None or (params.images is None and drawing is None and no_photo):
            continue
        if drawing is not None and not drawing.regions and params.empty == "unlabelled":
            empty.append(root / image)
            drawing = None
        if drawing is not None:
            draws[image_id] = partial(_drawn, root, drawing, params)
            # What covers the rest of most images is no class to look for.
            meant = {params.names.get(region.name, region.name) for region in drawing.regions}
            shows[image_id] = frozenset(meant - {None, params.uncovered})
            sources[image_id] = drawing.source
        labelled.append((image_id, image, None))
    if not draws:
        raise DataError(f"{root}: no image has a label of {TOOLS[tool]}; correct data.images and data.labels")
    what = "image without a region counts as unlabelled", "images without a region count as unlabelled"
    remedy = "set data.empty to labelled if they show nothing but data.uncovered"
    notes = [*labels.notes, *note_of(empty, what, "nobody drew on it", remedy)]
    if strange:
        said = f"no annotation has the class {listed([repr(name) for name in strange])} of data.names"
        notes.append(Note(said, f"correct the name; there are {listed([repr(name) for name in used])}"))
    return _index(root, labelled, draws, notes, params, shows.__getitem__, sources)


def _index(
    root: Path,
    labelled: list[tuple[str, Path, Path | None]],
    draws: dict[str, Callable[[], np.ndarray]],
    notes: list[Note],
    params: FolderData,
    shown: Shown,
    sources: Mapping[str, Path] = {},
) -> DatasetIndex:
    masked = [(image_id, image, Path(f"{image_id}.png") if image_id in draws else None) for image_id, image, _ in labelled]
    classes = tuple(params.classes)
    samples = sorted_unique(with_splits(root, masked, params, shown, sources))
    return DatasetIndex(samples, classes, palette_of(params), lookup_of(len(classes), IGNORE), tuple(notes), CONVERTED, draws)


def _drawn(root: Path, drawing: Drawing, params: FolderData) -> np.ndarray:
    """(H, W) uint8 mask of a photo as it is trained on. Raises DataError where the annotation file says another size."""
    path, applied = root / drawing.image, params.exif_orientation == "applied"
    size = shown_size(path, apply_orientation=applied)
    if drawing.size is not None and drawing.size != size:
        said = f"{root / drawing.source}: says {drawing.size[1]} x {drawing.size[0]} pixels of {drawing.image}"
        has = f"{said}, which has {size[1]} x {size[0]}"
        if drawing.size == shown_size(path, apply_orientation=not applied):
            other = "ignored" if applied else "applied"
            raise DataError(f"{has} with data.exif_orientation: {params.exif_orientation}; set it to {other}")
        raise DataError(f"{has}; export the labels of this version of the photo")
    place = {name: number for number, name in enumerate(params.classes)}
    # What data.names says of a name counts, also where a class has that name: names may be exchanged.
    ids = place | {name: IGNORE if of is None else place[of] for name, of in params.names.items()}
    return draw(drawing.regions, ids, size, IGNORE if params.uncovered is None else place[params.uncovered])
