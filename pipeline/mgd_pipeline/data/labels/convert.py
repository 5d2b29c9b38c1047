"""Draws the masks of annotated images as indexed PNGs, once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.data.index import Colour
from mgd_pipeline.data.labels.regions import Drawing, draw
from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import DataError
from mgd_pipeline.pictures.overlays import png_of_mask as mask_png


def write_masks(
    masks: Mapping[str, Callable[[], np.ndarray]],
    folder: Path,
    palette: Sequence[Colour],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes folder/<image_id>.png for each image_id, and removes every other PNG of the folder.

    `masks` draws: each value returns (H, W) uint8 class ids, 255 for no class. The same labels give the same bytes, and a file
    that has them already is not written again, so that its time stays and DVC hashes nothing anew.
    """
    wanted = {folder / f"{image_id}.png" for image_id in masks}
    for path in folder.rglob("*.png"):
        if path not in wanted:
            path.unlink()

    def write(image_id: str) -> None:
        path, data = folder / f"{image_id}.png", mask_png(masks[image_id](), palette)
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, data)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for done, _ in enumerate(pool.map(write, masks), start=1):
            if progress:
                progress(done, len(masks))


def drawn(
    root: Path, drawing: Drawing, classes: Sequence[str], background: str | None, size: tuple[int, int], stored: tuple[int, int]
) -> np.ndarray:
    """(H, W) uint8 mask of an image of `size` (height, width) as it is trained on; `stored` is its size without its EXIF turn.

    A region's name that is no class is void. Raises DataError where the annotation file says another size.
    """
    if drawing.size not in (None, size):
        assert drawing.size is not None
        said = f"{root / drawing.source}: says {drawing.size[1]} x {drawing.size[0]} pixels of {drawing.image}"
        has = f"{said}, which has {size[1]} x {size[0]}"
        if drawing.size == stored:
            raise DataError(f"{has} once its EXIF orientation is applied; set data.exif_orientation to ignored, or export again")
        raise DataError(f"{has}; export the labels of this version of the photo")
    ids = {name: place for place, name in enumerate(classes)} | {
        region.name: IGNORE for region in drawing.regions if region.name not in classes
    }
    return draw(drawing.regions, ids, size, IGNORE if background is None else classes.index(background))
