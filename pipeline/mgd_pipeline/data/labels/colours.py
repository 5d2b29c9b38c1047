"""Masks whose pixels have the colours of classes, as CVAT's "Segmentation mask 1.1" and many older data sets store them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mgd_pipeline.data.images import IGNORE, open_image
from mgd_pipeline.data.index import Colour
from mgd_pipeline.data.listing import read_text
from mgd_pipeline.errors import DataError


def read_labelmap(path: Path) -> dict[str, Colour]:
    """Names and colours of CVAT's labelmap.txt, `name:r,g,b:parts:actions` a line. Raises DataError for a line that is none."""
    colours: dict[str, Colour] = {}
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); export it again") from None
    for count, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, rest = line.strip().partition(":")
        try:
            red, green, blue = (int(word) for word in rest.split(":")[0].split(","))
            if not all(0 <= value <= 255 for value in (red, green, blue)):
                raise ValueError
        except ValueError:
            raise DataError(f"{path}, line {count}: {line[:60]!r} is not name:r,g,b; correct the line") from None
        if name in colours or (red, green, blue) in colours.values():
            raise DataError(f"{path}, line {count}: the name or the colour of {name!r} stands twice; give each class its own")
        colours[name] = (red, green, blue)
    return colours


def colours_in(path: Path) -> dict[Colour, int]:
    """The colours of a mask and how many pixels each has."""
    with open_image(path) as image:
        rgb = _rgb_of(image, path)
        counts: Any = rgb.getcolors(rgb.width * rgb.height)  # far faster than sorting the pixels
    return dict(sorted((colour, count) for count, colour in counts))


def read_colour_mask(path: Path, colours: Sequence[Sequence[int]], ignored: Sequence[Sequence[int]] = ()) -> np.ndarray:
    """(H, W) uint8: the place of each pixel's colour in `colours`, 255 for the colours in `ignored`.

    Colours are compared exactly: an edge that was smoothed, or a JPEG, has colours that mean nothing. Raises DataError for a colour
    that is not in the lists.
    """
    packed = _packed(path)
    known = {_pack(colour): place for place, colour in enumerate(colours)} | {_pack(colour): IGNORE for colour in ignored}
    keys = np.array(sorted(known), np.int64)
    place = np.minimum(np.searchsorted(keys, packed), len(keys) - 1)
    foreign = keys[place] != packed
    if foreign.any():
        values, counts = np.unique(packed[foreign], return_counts=True)
        worst = int(np.argmax(counts))
        further = f" and {len(values) - 1} more colours" if len(values) > 1 else ""
        raise DataError(
            f"{path}: {counts[worst]} pixels have the colour {list(_colour(int(values[worst])))}{further}, which no class has; add "
            "it to data.colours with a class, or to data.ignore_colours, or export the mask without smooth edges"
        )
    return np.array([known[key] for key in keys.tolist()], np.uint8)[place]


def _packed(path: Path) -> np.ndarray:
    """(H, W) int64: red, green and blue of each pixel as one number."""
    with open_image(path) as image:
        rgb = np.asarray(_rgb_of(image, path), np.int64)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def _rgb_of(image: Image.Image, path: Path) -> Image.Image:
    if image.format == "JPEG":
        raise DataError(f"{path}: a JPEG cannot hold a mask, its compression changes colours; export the mask as PNG")
    if image.mode in ("RGBA", "LA", "PA") and np.asarray(image.getchannel("A")).min() < 255:
        raise DataError(f"{path}: pixels of the mask are transparent; save it without transparency")
    return image.convert("RGB") if image.mode != "RGB" else image


def _pack(colour: Sequence[int]) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def _colour(packed: int) -> Colour:
    return packed >> 16, packed >> 8 & 255, packed & 255
