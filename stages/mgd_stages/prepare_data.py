"""Stage 1, prepare-data: one row an image in the manifest, and which of them are labelled."""

from __future__ import annotations

import warnings
from typing import Literal

from mgd_pipeline.datasets import unread_pictures
from mgd_pipeline.errors import DataError
from mgd_pipeline.manifest import Manifest, build_manifest, write_manifest
from mgd_pipeline.params import FolderData, ShapesData
from mgd_pipeline.shapes import write_shapes
from mgd_stages.progress import console, progress
from mgd_stages.project import Project, networks_of, seen_sizes

_FEW = 10
"""With fewer images than this to measure on, a warning: one scene more or less is worth points of mIoU."""


def check_networks(project: Project, manifest: Manifest | None = None) -> None:
    """Raises ParamsError for a network of the parameters that cannot be built, or that cannot see its training views and, with a
    manifest, the images: what a training would stumble over, after the teachers."""
    from mgd_pipeline.networks import check_network

    for key, network in networks_of(project.params).items():
        check_network(key, network, seen_sizes(project.params, key, manifest))


def prepare_data(project: Project, on_error: Literal["stop", "skip"] = "stop") -> None:
    """Renders the built-in data set if it is asked for, reads every image and mask once, and writes data/manifest/.

    Networks of the parameters that cannot be built, or cannot see these images, are refused before anything is written.
    With `on_error="skip"` images that cannot be used are left out, printed, and recorded in the manifest with the reason.
    """
    check_networks(project)
    data = project.params.data
    if isinstance(data, ShapesData):
        with progress("prepare-data: render", data.train + data.val + data.test, "scenes") as advance:
            write_shapes(data, project.base / data.root, lambda done, total: advance(done, ""))
    with progress("prepare-data: check and hash", 100, "% of the images") as advance, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # what it warns of and matters, such as size, is an error of ours
        manifest = build_manifest(data, project.base, lambda done, total: advance(done * 100 // total, f"{total} images"), on_error)
    split = project.params.evaluation.split
    if not manifest.split(split):  # precompute-teachers would find it out after its work
        raise DataError(f"evaluation.split: {split} has no images; choose the other split, or add images and masks to it")
    check_networks(project, manifest)
    write_manifest(manifest, project.manifest)
    unread = unread_pictures(project.base / data.root, data) if isinstance(data, FolderData) else []
    if unread:
        suffixes = ", ".join(sorted({path.suffix for path in unread}))
        console.print(
            f"warning: {len(unread)} pictures are left out, such as {unread[0].name}: {suffixes} is not read; "
            "save them as PNG or JPEG and run prepare-data again"
        )
    counts = {name: len(manifest.split(name)) for name in ("train", "val", "test")}
    for bad in manifest.skipped:
        console.print(f"skipped {bad.image_id}: {bad.path}: {bad.reason}")
    if manifest.skipped:
        total = len(manifest.rows) + len(manifest.skipped)
        console.print(f"left out {len(manifest.skipped)} of {total} images; {project.manifest / 'images.parquet'} records them")
    for name in ("val", "test"):
        declared = [row.image_id for row in manifest.declared if row.split == name]
        if declared:
            console.print(
                f"warning: {len(declared)} of the {counts[name]} {name} images train as unlabelled, such as {declared[0]!r}: "
                f"data.partition.unlabelled names them; say so beside every result on {name}"
            )
    if counts[split] < _FEW:
        drawn = isinstance(data, FolderData) and data.masks is not None
        remedy = f"raise data.{split}_fraction or give masks to more images" if drawn else "give it more images and masks"
        images = "1 image" if counts[split] == 1 else f"{counts[split]} images"
        console.print(f"warning: networks will be compared on {images} ({split}), which says little; {remedy}")
    console.print(
        f"{data.dataset}: {counts['train']} train images ({len(manifest.labelled)} labelled, {len(manifest.unlabelled)} "
        f"unlabelled), {counts['val']} val, {counts['test']} test, {len(manifest.classes)} classes -> {project.manifest}"
    )
