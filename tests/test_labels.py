"""Labels of annotation tools: the pixels that each format means, and what cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from annotated import NAMES, WRITERS, photos, write_image
from mgd_pipeline.data.labels.files import ImageFiles
from mgd_pipeline.data.labels.read import read_labels, tools_of
from mgd_pipeline.data.labels.regions import draw


@pytest.mark.parametrize("kind", WRITERS)
def test_every_tool_means_the_same_pixels(kind: str, tmp_path: Path) -> None:
    """Overlapping boxes on pixel edges, drawn as polygons, run lengths and bitmaps."""
    tool, write, folder = WRITERS[kind]
    made = photos(3, folder=folder)
    for photo in made:
        write_image(tmp_path, photo)
    write(tmp_path, made)
    files = ImageFiles(tmp_path)
    assert tools_of(files) == {tool: 3 if tool in ("labelme", "yolo") else 1}
    labels = read_labels(files, tool)  # pyright: ignore[reportArgumentType]
    assert sorted(labels.names) == sorted(NAMES) and not labels.notes
    assert [str(drawing.image) for drawing in labels.drawings] == [f"{photo.name}.png" for photo in made]
    ids = {name: place for place, name in enumerate(NAMES, start=1)}
    for photo, drawing in zip(made, labels.drawings, strict=True):
        assert drawing.size in (None, photo.size)
        assert np.array_equal(draw(drawing.regions, ids, photo.size, 0), photo.mask())
