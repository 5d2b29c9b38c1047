"""Pictures of masks over images, with a legend, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mgd_pipeline.durable import replace_file
from mgd_pipeline.images import IGNORE

_VOID = (224, 224, 192)
"""As PASCAL VOC paints it; black may be a class."""
_MASK = "mgd-pipeline: predicted mask"


def blend(image: np.ndarray, mask: np.ndarray, palette: Sequence[Sequence[int]], opacity: float = 0.6) -> np.ndarray:
    """(H, W, 3) uint8 image under the (H, W) mask's colours."""
    colours = _colours(palette).astype(np.float32)
    return (image * (1 - opacity) + colours[mask] * opacity).round().astype(np.uint8)


def png_of_mask(mask: np.ndarray, palette: Sequence[Sequence[int]]) -> bytes:
    """A PNG whose pixel values are the (H, W) uint8 class ids and whose palette shows them in the classes' colours."""
    picture = Image.fromarray(mask)
    picture.putpalette(_colours(palette).tobytes())
    note = PngInfo()
    note.add_text("Software", _MASK)
    return _png(picture, note)


def is_png_of_mask(path: Path) -> bool:
    """Whether a file was made by `png_of_mask`, which says so in it; read from its header."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.info.get("Software") == _MASK
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for files that are none, or damaged
        return False


def png_of_image(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB as PNG."""
    return _png(Image.fromarray(image))


def _png(picture: Image.Image, note: PngInfo | None = None) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=note)
    return buffer.getvalue()


def _colours(palette: Sequence[Sequence[int]]) -> np.ndarray:
    """(256, 3) uint8: a colour for each value that a mask can hold."""
    colours = np.full((256, 3), _VOID, np.uint8)
    colours[: len(palette)] = np.asarray(palette, np.uint8)
    return colours


def save_overlay(
    path: Path,
    image: np.ndarray,
    masks: dict[str, np.ndarray],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    *,
    title: str,
) -> None:
    """One row of panels: the image, then each mask over it; the legend names the classes that occur."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = {"image": image, **{name: blend(image, mask, palette) for name, mask in masks.items()}}
    height, width = image.shape[:2]
    panel_width = 3.6
    figure = Figure(figsize=(panel_width * len(panels), panel_width * height / width + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for place, (name, pixels) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place)
        axes.imshow(pixels, interpolation="nearest")
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
    present = sorted({int(value) for mask in masks.values() for value in np.unique(mask)})
    legend = {value: (palette[value], classes[value]) if value != IGNORE else (_VOID, "void") for value in present}
    handles = [Patch(color="#{:02x}{:02x}{:02x}".format(*colour), label=label) for colour, label in legend.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8, frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    replace_file(path, buffer.getvalue())
