"""Stage 1, prepare-data: one row an image in the manifest, and which of them are labelled."""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np

from mgd_pipeline.data.build import build_manifest
from mgd_pipeline.data.classes import CLASSES_FILE, check_classes_of
from mgd_pipeline.data.datasets import index_dataset, names_of
from mgd_pipeline.data.listing import what_dvc_cannot_read
from mgd_pipeline.data.manifest import LABELLED, Manifest, require_classes, write_manifest
from mgd_pipeline.data.partition import check_listening, partition_images
from mgd_pipeline.data.shapes import write_shapes
from mgd_pipeline.params import ShapesData
from mgd_pipeline.words import counted, verb
from mgd_stages.run.data_notes import (
    absent_classes,
    copies,
    drawn_by_networks,
    few_labelled,
    few_to_compare_on,
    likely_mistakes,
    orientations,
    require_images_of,
    unmeasured_classes,
    unused_pictures,
    void_masks,
)
from mgd_stages.run.labels_sheet import applied_turns
from mgd_stages.run.machine import require_writable
from mgd_stages.run.progress import console, progress
from mgd_stages.run.project import Project, networks_of, seen_sizes


def check_networks(project: Project, manifest: Manifest | None = None) -> None:
    """Raises ParamsError for a network that cannot be built, or cannot process its training views or a manifest's images."""
    from mgd_pipeline.networks.segmentation import check_network

    for key, network in networks_of(project.params).items():
        check_network(key, network, seen_sizes(project.params, key, manifest))


def prepare_data(project: Project, on_error: Literal["stop", "skip"] = "stop") -> None:
    """Renders the built-in data set if the parameters name it, reads every image and mask once, and writes data/manifest/.

    Networks of the parameters that cannot be built, or cannot process these images, are refused before anything is written, and so
    are a class_map and prompts of other classes than the data set's.
    With `on_error="skip"` images that cannot be used are left out, printed, and recorded in the manifest with the reason.
    """
    check_networks(project)
    data = project.params.data
    for name, teacher in project.params.teachers.items():
        check_classes_of(f"teachers.{name}", teacher, names_of(data).classes)
    require_writable(
        [project.base / data.root] if isinstance(data, ShapesData) else [],
        [project.manifest / name for name in ("images.parquet", "partition.parquet", LABELLED, CLASSES_FILE)],
    )
    if isinstance(data, ShapesData):
        with progress("prepare-data: render", data.train + data.val + data.test, "scene") as advance:
            write_shapes(data, project.base / data.root, lambda done, total: advance(done, ""))
    index = index_dataset(data, project.base)
    check_listening(project.params.losses, partition_images(data, index.samples, project.base))
    split = project.params.evaluation.split
    require_images_of(split, data, index.samples)
    for note in index.notes:
        console.print(f"warning: {note}")
    with progress("prepare-data: check and hash", len(index.samples), "image") as advance, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # what it warns of and matters, such as size, is an error of ours
        manifest = build_manifest(data, project.base, lambda done, total: advance(done, ""), on_error)
    # Images that were left out may be all of a split; precompute-teachers would find it out after its work.
    require_images_of(split, data, [sample for sample in index.samples if sample.image_id in manifest.rows])
    require_classes(manifest, manifest.labelled, "the labelled images")
    require_classes(manifest, manifest.split(split), f"the {split} images, on which networks are compared")
    check_networks(project, manifest)
    write_manifest(manifest, project.manifest)
    labelled, root = manifest.labelled, project.base / data.root
    of_class = np.sum([manifest.pixels[row.image_id] for row in labelled], axis=0)
    for note in [  # what is more often a mistake than meant, known when every file has been read
        *orientations(manifest.orientations, manifest.rows.values()),
        *applied_turns(project.base, data, index, manifest.decodings, manifest.rows.values()),
        *unused_pictures(root, data, index),
        *copies(manifest.training),
        *few_labelled(data, index.samples, len(labelled)),
        *void_masks([*labelled, *manifest.split("val"), *manifest.split("test")], manifest.pixels),
        *drawn_by_networks(manifest),
        *absent_classes(manifest.classes, of_class, len(labelled), len(labelled)),
        *unmeasured_classes(data, manifest),
        *likely_mistakes(data, manifest.classes, of_class, len(labelled)),
        *what_dvc_cannot_read(root),
    ]:
        console.print(f"warning: {note}")
    counts = {name: len(manifest.split(name)) for name in ("train", "val", "test")}
    for bad in manifest.skipped:
        console.print(f"skipped {bad.image_id}: {bad.path}: {bad.reason}")
    if manifest.skipped:
        total = counted(len(manifest.rows) + len(manifest.skipped), "image")
        console.print(f"left out {len(manifest.skipped)} of {total}; {project.manifest / 'images.parquet'} records which and why")
    for name in ("val", "test"):
        declared = [row.image_id for row in manifest.declared if row.split == name]
        if declared:
            console.print(
                f"warning: {len(declared)} of the {counts[name]} {name} images {verb(len(declared), 'trains', 'train')} as "
                f"unlabelled, such as {declared[0]!r}: data.partition.unlabelled names them; say so beside every result on {name}"
            )
    for note in few_to_compare_on(split, data, counts[split]):
        console.print(f"warning: {note}")
    if len(labelled) == 1 and not manifest.unlabelled:
        console.print("the one training image is labelled: it stands in as an unlabelled image, too")
    elif not manifest.unlabelled:
        console.print(f"all {len(labelled)} training images are labelled: they stand in as unlabelled images, too")
    console.print(
        f"{project.name}: {counted(counts['train'], 'train image')} ({len(labelled)} labelled, {len(manifest.unlabelled)} "
        f"unlabelled), {counts['val']} val, {counts['test']} test, "
        f"{counted(len(manifest.classes), 'class', 'classes')} -> {project.manifest}"
    )
