"""Masks of annotated images as indexed PNGs."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mgd_pipeline.data.images import IGNORE
from mgd_pipeline.data.index import Colour
from mgd_pipeline.durable import replace_file

_VOID = (224, 224, 192)
"""PASCAL VOC's colour of no class."""


def mask_png(mask: np.ndarray, palette: Sequence[Colour]) -> bytes:
    """A PNG whose pixel values are the (H, W) uint8 class ids, 255 for no class, with the colours of the classes."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    colours[IGNORE] = _VOID
    picture = Image.fromarray(mask)
    picture.putpalette(colours.tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def store_mask(path: Path, data: bytes) -> None:
    """Writes a file unless it holds these bytes already, so that DVC need not read it again."""
    if not path.is_file() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)


def remove_masks(folder: Path, keep: Collection[Path]) -> None:
    """Removes the PNGs of a folder that belong to no image any more; `keep` is relative to the folder."""
    for path in sorted(folder.rglob("*.png")):
        if path.relative_to(folder) not in keep:
            path.unlink()
