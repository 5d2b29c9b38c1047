"""Pictures of masks over images, with a legend, as PNG."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.durable import replace_file
from mgd_pipeline.pictures.drawing import add_legend, load_matplotlib, plain_style, png_of_figure

VOID = (224, 224, 192)
"""PASCAL VOC's colour; black may be a class."""
_PANEL = 3.6
"""Width of a panel, inches."""
_MASK = "mgd-pipeline: predicted mask"
_PIXELS = "Pixels CRC32"
_OVERLAY = "mgd-pipeline: predicted mask over an image"


def blend(image: np.ndarray, mask: np.ndarray, palette: Sequence[Sequence[int]], opacity: float = 0.6) -> np.ndarray:
    """(H, W, 3) uint8 image under the (H, W) mask's colours."""
    colours = _colours(palette).astype(np.float32)
    return (image * (1 - opacity) + colours[mask] * opacity).round().astype(np.uint8)


def png_of_mask(mask: np.ndarray, palette: Sequence[Sequence[int]]) -> bytes:
    """A PNG whose pixel values are the (H, W) uint8 class ids and whose palette has the classes' colours."""
    picture = Image.fromarray(mask)
    picture.putpalette(_colours(palette).tobytes())
    return _png(picture, _MASK, {_PIXELS: _checksum(picture)})


def png_of_overlay(image: np.ndarray, mask: np.ndarray, palette: Sequence[Sequence[int]]) -> bytes:
    """A PNG of the (H, W, 3) uint8 image under the (H, W) mask's colours."""
    return _png(Image.fromarray(blend(image, mask, palette)), _OVERLAY)


def is_png_of_mask(path: Path) -> bool:
    """Whether `png_of_mask` made a file and nobody has changed its pixels since.

    Programs to draw with may keep the notes of a mask that a person corrects. Masks of earlier versions have no checksum.
    """
    if (notes := _notes(path)).get("Software") != _MASK:
        return False
    if _PIXELS not in notes:
        return True
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.mode == "P" and notes[_PIXELS] == _checksum(picture)
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for damaged files
        return False


def is_predicted(path: Path) -> bool:
    """Whether `mgd-pipeline predict` made a picture: a mask or an overlay. Overlays of 0.1.0 have no note; their mask has one."""
    if path.suffix.lower() != ".png":
        return False
    if _notes(path).get("Software") in (_MASK, _OVERLAY):
        return True
    places = (place for place in path.parents if place.name == "overlays")
    return any(is_png_of_mask(place.parent / "masks" / path.relative_to(place)) for place in places)


def _notes(path: Path) -> dict[Any, Any]:
    """The notes in the header of a PNG; none of another file."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return picture.info
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for damaged files and for other files
        return {}


def _checksum(picture: Image.Image) -> str:
    return f"{zlib.crc32(picture.tobytes()):08x}"


def _png(picture: Image.Image, software: str, notes: Mapping[str, str] = MappingProxyType({})) -> bytes:
    note = PngInfo()
    for key, text in {"Software": software, **notes}.items():
        note.add_text(key, text)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=note)
    return buffer.getvalue()


def _colours(palette: Sequence[Sequence[int]]) -> np.ndarray:
    """(256, 3) uint8: a colour for each value that a mask can hold."""
    colours = np.full((256, 3), VOID, np.uint8)
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
    """Writes one row of panels: the image, then each mask over it; the legend names the classes that occur.

    A class whose name no installed font can write appears by its id, "class 3".
    """
    load_matplotlib()
    from matplotlib.figure import Figure

    panels = {"image": image, **{name: blend(image, mask, palette) for name, mask in masks.items()}}
    height, width = image.shape[:2]
    present = sorted({int(value) for mask in masks.values() for value in np.unique(mask)} - {IGNORE})
    void = any((mask == IGNORE).any() for mask in masks.values())
    always = "class void 0123456789?…"  # letters of every picture
    with plain_style([*panels, title, *(classes[value] for value in present), always]) as lettering:
        tall = min(max(_PANEL * height / width, 0.5), 10.8)  # very flat and very tall images have limits
        figure = Figure(figsize=(_PANEL * len(panels), tall + 0.9), layout="constrained")
        figure.suptitle(lettering.line(title, 22 * len(panels)), fontsize=10)
        for place, (name, pixels) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(1, len(panels), place)
            axes.imshow(pixels, interpolation="nearest")
            axes.set_title(lettering.line(name), fontsize=9)
            axes.set_axis_off()
        colours = [palette[value] for value in present] + [VOID] * void
        labels = [lettering.name(classes[value], f"class {value}") for value in present] + ["void"] * void
        add_legend(figure, colours, labels)
        replace_file(path, png_of_figure(figure))
