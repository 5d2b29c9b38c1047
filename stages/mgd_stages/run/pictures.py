"""Predicted masks of many images in one Parquet file, small enough to look at: the report shows them side by side.

A stage that predicts an image keeps its mask here, so that no network has to run again for a picture.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from mgd_pipeline.data.images import scaled_size
from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import DataError
from mgd_pipeline.pictures.overlays import png_of_mask
from mgd_pipeline.tables import open_parquet, parquet_bytes, read_parquet
from mgd_stages.run.class_tables import make_again

LONG_SIDE = 512
"""Pixels; larger masks are scaled down to it."""
_SCHEMA = pa.schema(
    [
        pa.field("network", pa.string(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("mask", pa.binary(), nullable=False),
    ]
)


class Predicted(NamedTuple):
    """What one network says of one image."""

    network: str
    """distilled, supervised, or the name of a teacher"""
    image_id: str
    score: float
    """mIoU of this image alone, or the share of cells on which teachers differ. 0 to 1; NaN if no pixel has a class"""
    mask: np.ndarray
    """(H, W) uint8 class ids, 255 = void, at most LONG_SIDE pixels"""


def to_look_at(pixels: np.ndarray) -> np.ndarray:
    """(H, W) class ids or (H, W, 3) colours, uint8, scaled down to LONG_SIDE; class ids are picked, never mixed."""
    height, width = scaled_size(pixels.shape[0], pixels.shape[1], LONG_SIDE)
    if (height, width) == pixels.shape[:2]:
        return pixels
    how = Image.Resampling.NEAREST if pixels.ndim == 2 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(pixels).resize((width, height), how))


def write_masks(path: Path, masks: Sequence[Predicted], palette: Sequence[Sequence[int]]) -> None:
    """Writes the masks as PNGs in the classes' colours, a row each; same content, same bytes."""
    rows = [{**one._asdict(), "mask": png_of_mask(one.mask, palette)} for one in masks]
    replace_file(path, parquet_bytes(pa.Table.from_pylist(rows, schema=_SCHEMA)))


def read_masks(path: Path) -> list[Predicted]:
    """What `write_masks` wrote; empty without the file. Raises DataError for a damaged file."""
    if not path.exists():
        return []
    try:
        rows = read_parquet(open_parquet(path.read_bytes())).select(_SCHEMA.names).to_pylist()
        return [Predicted(**{**row, "mask": np.asarray(Image.open(io.BytesIO(row["mask"])))}) for row in rows]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {make_again(path)}") from None


def count_images(path: Path) -> int | None:
    """How many images the masks belong to; None without the file. Raises DataError for a damaged file."""
    if not path.exists():
        return None
    try:
        return len(set(read_parquet(open_parquet(path.read_bytes()))["image_id"].to_pylist()))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {make_again(path)}") from None


def extremes(scores: Mapping[str, float], count: int, *, median: bool) -> dict[str, list[str]]:
    """Ids of the images to show, by group: worst, median if asked for, and best, at most `count` of each, in the order in which
    they are shown. No image is in two groups: with few images the groups are smaller, and a single image is in the group `only`.
    Images whose score is NaN are in no group."""
    ranked = [image_id for _, image_id in sorted((score, image_id) for image_id, score in scores.items() if score == score)]
    if len(ranked) == 1:
        return {"only": ranked[:count]}
    ends = min(count, (len(ranked) + 1) // 3 if median else len(ranked) // 2)
    between = min(count, len(ranked) - 2 * ends) if median else 0
    first = len(ranked) // 2 - between // 2
    groups = {"worst": ranked[:ends], "median": ranked[first : first + between], "best": ranked[::-1][:ends]}
    return {group: chosen for group, chosen in groups.items() if chosen}
