"""Stage 1, prepare-data: one row an image in the manifest, and which of them are labelled."""

from __future__ import annotations

from mgd_pipeline.manifest import build_manifest, write_manifest
from mgd_pipeline.params import ShapesData
from mgd_pipeline.shapes import write_shapes
from mgd_stages.progress import console, progress
from mgd_stages.project import Project


def prepare_data(project: Project) -> None:
    """Renders the built-in data set if it is asked for, reads every image and mask once, and writes data/manifest/."""
    data = project.params.data
    if isinstance(data, ShapesData):
        with progress("prepare-data: render", data.train + data.val + data.test, "scenes") as advance:
            write_shapes(data, project.base / data.root, lambda done, total: advance(done, ""))
    with progress("prepare-data: check and hash", 100, "% of the images") as advance:
        manifest = build_manifest(data, project.base, lambda done, total: advance(done * 100 // total, f"{total} images"))
    write_manifest(manifest, project.manifest)
    counts = {name: len(manifest.split(name)) for name in ("train", "val", "test")}
    console.print(
        f"{data.dataset}: {counts['train']} train images ({len(manifest.labelled)} labelled, {len(manifest.unlabelled)} "
        f"unlabelled), {counts['val']} val, {counts['test']} test, {len(manifest.classes)} classes -> {project.manifest}"
    )
