"""Reads the annotation files of a data set, whichever tool wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mgd_pipeline.data.labels.coco import is_coco, read_coco
from mgd_pipeline.data.labels.cvat import read_cvat
from mgd_pipeline.data.labels.files import ImageFiles
from mgd_pipeline.data.labels.label_studio import is_label_studio, read_label_studio
from mgd_pipeline.data.labels.labelme import is_labelme, read_labelme
from mgd_pipeline.data.labels.regions import Labels
from mgd_pipeline.data.labels.supervisely import is_supervisely, read_supervisely
from mgd_pipeline.data.labels.yolo import is_yolo, label_files, read_yolo
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

_JSON = {"coco": is_coco, "label_studio": is_label_studio, "labelme": is_labelme, "supervisely": is_supervisely}
"""What the content of a JSON file says of its tool."""


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
            if len(sources) > 1:
                raise DataError(
                    f"{files.root}: holds {len(sources)} Supervisely projects, {sources[0]} and {sources[1]}; keep one there"
                )
            return read_supervisely(files, sources[0])


def sources_of(files: ImageFiles, tool: Tool, annotations: str | None = None) -> list[Path]:
    """The annotation files of a tool, relative to the root; of Supervisely meta.json alone."""
    if annotations is not None:
        return [path for path in files.files if matches(path.parts, Path(annotations).parts)]
    match tool:
        case "cvat":
            return [path for path in files.with_suffix(".xml") if _is_cvat(files.root / path)]
        case "yolo":
            return sorted(label_files(files).values()) if is_yolo(files) else []
    kinds = files.kinds_of_json(_JSON)
    sources = [path for path, kind in kinds.items() if kind == tool and (tool != "supervisely" or path.name == "meta.json")]
    # A damaged file is one of these files, as far as anybody knows: reading it names it.
    return sorted([*sources, *(path for path, kind in kinds.items() if not kind)]) if sources and tool != "supervisely" else sources


def tools_of(files: ImageFiles) -> dict[Tool, int]:
    """How many annotation files each tool has below the root; tools without files are left out."""
    counts: dict[Tool, int] = {tool: len(sources_of(files, tool)) for tool in TOOLS}
    return {tool: count for tool, count in counts.items() if count}


def _is_cvat(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return b"<annotations" in file.read(400)
    except OSError:
        return False
