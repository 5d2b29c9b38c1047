"""Reads the annotation files of a data set, whichever tool wrote them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from mgd_pipeline.data.labels.coco import is_coco, read_coco
from mgd_pipeline.data.labels.cvat import read_cvat
from mgd_pipeline.data.labels.files import ImageFiles, read_json
from mgd_pipeline.data.labels.label_studio import is_label_studio, read_label_studio
from mgd_pipeline.data.labels.labelme import is_labelme, read_labelme
from mgd_pipeline.data.labels.regions import Labels
from mgd_pipeline.data.labels.supervisely import is_supervisely, read_supervisely
from mgd_pipeline.data.labels.yolo import label_files, names_file, read_yolo
from mgd_pipeline.data.listing import matches
from mgd_pipeline.errors import DataError

Tool = Literal["coco", "cvat", "label_studio", "labelme", "supervisely", "yolo"]
TOOLS: dict[Tool, str] = {
    "coco": "COCO JSON",
    "cvat": "CVAT XML",
    "label_studio": "Label Studio JSON",
    "labelme": "LabelMe JSON",
    "supervisely": "Supervisely project",
    "yolo": "YOLO text files",
}
"""Value of data.labels, and how a person calls it."""


def read_labels(files: ImageFiles, tool: Tool, annotations: str | None = None) -> Labels:
    """The labels of a data set. `annotations` is a glob of the files to read; with None all files of the tool's format are read.

    Raises DataError where there is none, and for a file that cannot be read.
    """
    if tool == "yolo":
        return read_yolo(files)
    sources = sources_of(files, tool, annotations)
    if not sources:
        which = f"no file matches data.annotations {annotations!r}" if annotations else f"no {TOOLS[tool]}"
        raise DataError(f"{files.root}: {which}; copy the export below this folder, or correct data.labels")
    match tool:
        case "coco":
            return read_coco(files, sources)
        case "cvat":
            return read_cvat(files, sources)
        case "label_studio":
            return read_label_studio(files, sources)
        case "labelme":
            return read_labelme(files, sources)
        case "supervisely":
            return read_supervisely(files, sources[0])


def sources_of(files: ImageFiles, tool: Tool, annotations: str | None = None) -> list[Path]:
    """The annotation files of a tool, relative to the root; of Supervisely meta.json alone."""
    if annotations is not None:
        return [path for path in files.files if matches(path.parts, Path(annotations).parts)]
    match tool:
        case "coco":
            return _of_content(files, is_coco)
        case "label_studio":
            return _of_content(files, is_label_studio)
        case "labelme":
            return _of_content(files, is_labelme)
        case "supervisely":
            return [path for path in files.with_suffix(".json") if path.name == "meta.json" and _is(files, path, is_supervisely)]
        case "cvat":
            return [path for path in files.with_suffix(".xml") if _is_cvat(files.root / path)]
        case "yolo":
            return sorted(label_files(files).values()) if names_file(files) else []


def tools_of(files: ImageFiles) -> dict[Tool, int]:
    """How many annotation files each tool has below the root; tools without files are left out."""
    counts: dict[Tool, int] = {tool: len(sources_of(files, tool)) for tool in TOOLS}
    return {tool: count for tool, count in counts.items() if count}


def _of_content(files: ImageFiles, test: Callable[[Any], bool]) -> list[Path]:
    return [path for path in files.with_suffix(".json") if _is(files, path, test)]


def _is(files: ImageFiles, path: Path, test: Callable[[Any], bool]) -> bool:
    try:
        return test(read_json(files.root / path))
    except DataError:  # a JSON file that nobody named may be anything
        return False


def _is_cvat(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return b"<annotations" in file.read(400)
    except OSError:
        return False
