"""Lists the images and masks of a data set on disk, whatever its layout."""

from __future__ import annotations

from pathlib import Path

from mgd_pipeline.data.annotated import index_annotated, index_colours
from mgd_pipeline.data.cityscapes import CITYSCAPES, index_cityscapes
from mgd_pipeline.data.classes import Names
from mgd_pipeline.data.folders import index_folder, palette_of
from mgd_pipeline.data.index import DatasetIndex
from mgd_pipeline.data.shapes import CLASSES, PALETTE, index_shapes
from mgd_pipeline.data.voc import VOC_CLASSES, index_voc, voc_palette
from mgd_pipeline.params import CityscapesData, FolderData, ShapesData, VocData


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
        case FolderData(labels="masks"):
            return index_folder(root, params)
        case FolderData(labels="colours"):
            return index_colours(root, params)
        case FolderData():
            return index_annotated(root, params)


def names_of(params: ShapesData | VocData | CityscapesData | FolderData) -> Names:
    """What the index of these parameters calls the classes, and their colours; the data set need not be here."""
    match params:
        case ShapesData():
            return Names(CLASSES, PALETTE)
        case VocData():
            return Names(VOC_CLASSES, voc_palette(len(VOC_CLASSES)))
        case CityscapesData():
            return Names(tuple(name for name, _, _ in CITYSCAPES), tuple(colour for _, _, colour in CITYSCAPES))
        case FolderData():
            return Names(tuple(params.classes), palette_of(params))
