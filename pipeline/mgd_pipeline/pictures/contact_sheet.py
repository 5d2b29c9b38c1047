"""Photos with their masks over them on one sheet: turned, shifted or exchanged masks are seen at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgd_pipeline.data.images import IGNORE, resize_image
from mgd_pipeline.durable import replace_file
from mgd_pipeline.pictures.drawing import add_legend, load_matplotlib, plain_style, png_of_figure
from mgd_pipeline.pictures.overlays import VOID, blend

_COLUMNS = 4
_WIDTH = 2.6
"""Of a photo on the sheet, inches."""
_SIDE = 480
"""Pixels of a photo's longer side on the sheet."""


@dataclass(frozen=True)
class Labelled:
    """A photo of the sheet."""

    name: str
    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    mask: np.ndarray
    """(H, W) uint8 class ids, 255 for no class."""


def save_contact_sheet(
    path: Path, photos: Sequence[Labelled], classes: Sequence[str], palette: Sequence[Sequence[int]], *, title: str
) -> None:
    """Writes a PNG of photos in rows of four, the masks half transparent over them; the legend names the classes that occur."""
    load_matplotlib()
    from matplotlib.figure import Figure

    rows = -(-len(photos) // _COLUMNS)
    columns = min(_COLUMNS, len(photos))
    small = [_small(photo) for photo in photos]
    heights = [
        max(photo.mask.shape[0] / photo.mask.shape[1] for photo in small[row * _COLUMNS :][:_COLUMNS]) for row in range(rows)
    ]
    present = sorted({int(value) for photo in small for value in np.unique(photo.mask)} - {IGNORE})
    void = any((photo.mask == IGNORE).any() for photo in small)
    with plain_style(
        [title, *(photo.name for photo in photos), *(classes[value] for value in present), "void class ?…"]
    ) as lettering:
        size = _WIDTH * columns, sum(min(_WIDTH * height, 2 * _WIDTH) + 0.3 for height in heights) + 0.9
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(lettering.line(title, 22 * columns), fontsize=10)
        for place, photo in enumerate(small):
            axes = figure.add_subplot(rows, columns, place + 1)
            axes.imshow(blend(photo.image, photo.mask, palette, 0.5), interpolation="nearest")
            axes.set_title(lettering.line(photo.name), fontsize=7)
            axes.set_axis_off()
        labels = [lettering.name(classes[value], f"class {value}") for value in present] + ["void"] * void
        add_legend(figure, [palette[value] for value in present] + [VOID] * void, labels)
        replace_file(path, png_of_figure(figure))


def _small(photo: Labelled) -> Labelled:
    height, width = photo.mask.shape
    scale = min(1.0, _SIDE / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, (height, width), strict=True))
    return Labelled(photo.name, resize_image(photo.image, *size), photo.mask[rows[:, None], columns])
