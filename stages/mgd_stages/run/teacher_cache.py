"""What a teacher's cache shall hold, what of it an earlier run has stored, and how large the rest is."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mgd_pipeline.caches.build import find_base
from mgd_pipeline.caches.commit import CONTROL_BYTES
from mgd_pipeline.caches.format import COMMIT, INDEX, RECORD_BYTES, Layout, fingerprint, mirrored_key, plan_layout
from mgd_pipeline.caches.provenance import in_names_of
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.caches.shards import BuildImage
from mgd_pipeline.data.images import check_unchanged
from mgd_pipeline.data.manifest import ImageKey, ImageRow, Manifest
from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import CacheError, ParamsError
from mgd_pipeline.networks.segmentation import output_grid
from mgd_pipeline.params import TargetsParams
from mgd_pipeline.words import counted, size_text
from mgd_stages.run.loaded_teacher import LoadedTeacher
from mgd_stages.run.machine import require_movable, require_writable
from mgd_stages.run.progress import console
from mgd_stages.run.project import Project

MORE_SPACE = (
    "free some (`mgd-pipeline cache gc` lists what old caches left), or store less: "
    "targets.stride 8 takes a quarter, targets.region_stride 16 a sixteenth of 4"
)
"""What to do if targets do not fit the disk."""
_NOTE = "provenance.json"
"""In the folder of a cache's shards: the provenance that they were stored under."""


@dataclass(frozen=True)
class Shown:
    """What a teacher is shown for one row of its cache."""

    row: ImageRow
    mirrored: bool

    def pixels(self, loaded: LoadedTeacher) -> np.ndarray:
        """(H, W, 3) uint8. Raises DataError if the file has changed since prepare-data."""
        check_unchanged(loaded.manifest.image_file(self.row), self.row.image_sha256)
        image = loaded.image(self.row)
        return np.ascontiguousarray(image[:, ::-1]) if self.mirrored else image


def held_out_rows(project: Project, name: str, manifest: Manifest) -> list[ImageRow]:
    """The images outside of training whose embeddings a teacher's cache holds, too: the evaluation split, on which heads of this
    teacher are measured; none for a teacher without heads."""
    if name not in project.params.heads.values():
        return []
    rows = manifest.split(project.params.evaluation.split)
    return [row for row in rows if row.mask_path is not None and row.image_id not in manifest.subsets]


def shown_images(project: Project, name: str, manifest: Manifest) -> dict[ImageKey, Shown]:
    """What a teacher's cache shall hold: each training image and `held_out_rows`, each followed by its mirror image if the
    parameters ask for mirror images."""
    shown = {}
    for row in [*manifest.training, *held_out_rows(project, name, manifest)]:
        key = manifest.key(row)
        shown[key] = Shown(row, mirrored=False)
        if project.params.targets.mirrored:
            shown[mirrored_key(key)] = Shown(row, mirrored=True)
    return shown


def cached_images(project: Project, name: str, manifest: Manifest) -> list[BuildImage]:
    """`shown_images` with their sizes, sorted by size, so that batches are full; within a size in the manifest's order."""
    shown = shown_images(project, name, manifest)
    sizes = [manifest.size(image.row) for image in shown.values()]
    frames = [(int(height), int(width)) for height, width in output_grid(sizes).frames]
    images = [BuildImage(key, size, frame) for key, size, frame in zip(shown, sizes, frames, strict=True)]
    return sorted(images, key=lambda image: image.size)


@dataclass(frozen=True)
class CacheEstimate:
    """What a build of a teacher's cache would make now."""

    output: Path
    work: Path
    provenance: dict[str, Any]
    """That of the targets which are there, if classes were only renamed since."""
    images: list[BuildImage]
    """What `shown_images` names"""
    layout: Layout
    new: int
    """How many of the images no earlier run has stored"""
    outgrown: tuple[int, int] | None
    """Height and width, pixels, of the largest canvas of an earlier cache of this teacher, if an image does not fit it"""

    @property
    def new_bytes(self) -> int:
        return self.new * self.layout.record_bytes


def estimate_cache(
    project: Project, name: str, manifest: Manifest, provenance: dict[str, Any], channels: tuple[int, int]
) -> CacheEstimate:
    """Images, layout and size of a teacher's cache, before anything is computed or written; `channels` as of `LoadedTeacher`."""
    images = cached_images(project, name, manifest)
    output, cache = project.targets(name), None
    with suppress(CacheError):  # nothing is there that could grow
        cache = open_cache(output)
    provenance = _stored_under(project, cache, provenance)
    family = project.work(f"targets-{fingerprint(provenance)[:16]}")
    height, width = (max(image.frame[axis] for image in images) for axis in (0, 1))
    canvases = _canvases(family, cache, provenance)
    roomy = [canvas for canvas in canvases if canvas[0] >= height and canvas[1] >= width]
    layout = planned_layout(project.params.targets, channels, *(roomy[0] if roomy else (height, width)))
    require_fits(layout, len(images))
    work = family / f"{layout.height}x{layout.width}"
    base = find_base(work, output, provenance, layout)
    known = set() if base is None else set(base.index.place)
    new = sum(image.key not in known for image in images)
    return CacheEstimate(output, work, provenance, images, layout, new, max(canvases) if canvases and not roomy else None)


def _stored_under(project: Project, cache: TargetCache | None, provenance: dict[str, Any]) -> dict[str, Any]:
    """`provenance` with the names under which targets of this identity are there, in the cache or in the folders of shards, which
    stay when DVC removes the cache."""
    noted = [] if cache is None else [cache.provenance]
    for path in sorted(project.work("").glob(f"targets-*/{_NOTE}")):
        with suppress(OSError, ValueError):
            noted.append(json.loads(path.read_bytes()))
    return next((one for one in noted if isinstance(one, dict) and in_names_of(one, provenance) == one), provenance)


def note_names(estimate: CacheEstimate) -> None:
    """Notes the names under which shards are stored: after a renaming they are found again."""
    replace_file(estimate.work.parent / _NOTE, json.dumps(estimate.provenance, allow_nan=False).encode())


def _canvases(family: Path, cache: TargetCache | None, provenance: dict[str, Any]) -> list[tuple[int, int]]:
    """Height and width of the caches of this teacher that are there, or that were: they can grow."""
    canvases = [(int(height), int(width)) for height, width in (folder.name.split("x") for folder in sorted(family.glob("*x*")))]
    if cache is None or cache.provenance != provenance:
        return canvases
    return [(cache.layout.height, cache.layout.width), *canvases]


def planned_layout(options: TargetsParams, channels: tuple[int, int], height: int, width: int) -> Layout:
    """The layout for a teacher of so many classes and features, and a largest frame of so many pixels. Raises ParamsError for
    records that are larger than a reader takes."""
    layout = plan_layout(
        classes=channels[0],
        features=channels[1],
        height=height,
        width=width,
        stride=options.stride,
        region_stride=options.region_stride,
        encoding="uint8" if options.logits == "log-probability" else options.logits,
        region_encoding=options.region_embeddings,
        compression=options.compression,
    )
    largest = max(layout.records, key=layout.bytes_of)
    if (size := layout.bytes_of(largest)) > RECORD_BYTES:
        key = "region_stride" if largest == "region_embeddings" else "stride"
        raise ParamsError(
            f"targets.{key} = {getattr(layout, key)}: the {largest} of an image of {height}x{width} pixels would take "
            f"{size_text(size)}, and a teacher cache takes {size_text(RECORD_BYTES)} at most; raise targets.{key}, or lower "
            "data.long_side"
        )
    return layout


def require_fits(layout: Layout, rows: int) -> None:
    """Raises ParamsError for more rows than the index and the commit of a cache hold, which readers take up to a size only."""
    index, commit = index_bytes(rows), commit_bytes(layout, rows)
    if index > CONTROL_BYTES[INDEX] or commit > CONTROL_BYTES[COMMIT]:
        raise ParamsError(
            f"{rows:,} images of {layout.height}x{layout.width} pixels: more than a teacher cache holds, whose index has up to "
            f"{size_text(CONTROL_BYTES[INDEX])} and whose commit {size_text(CONTROL_BYTES[COMMIT])}; raise targets.stride, lower "
            "data.long_side, or take fewer images"
        )


def index_bytes(rows: int) -> int:
    """About what images.parquet takes."""
    return rows * 120


def commit_bytes(layout: Layout, rows: int) -> int:
    """About what commit.json takes: an entry for each file of a shard."""
    return -(-rows // layout.rows_per_shard) * len(layout.records) * 150


def require_place(project: Project, estimate: CacheEstimate) -> None:
    """Says how large the targets become. Raises OutputError if they cannot be written, CacheError if the disk is too small.

    A cache that is complete may lie where nobody may write.
    """
    if not estimate.new:
        return
    work = project.work(estimate.output.name).parent
    require_writable([estimate.output.parent, work])
    require_movable(work, estimate.output.parent)
    if estimate.outgrown is not None:
        height, width = estimate.outgrown
        console.print(
            f"{estimate.output}: has room for images up to {height} pixels high and {width} wide, and an image is larger: "
            "the targets of all images are computed again"
        )
    needed = estimate.new_bytes
    estimate.work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(estimate.work).free
    most = "" if estimate.layout.compression == "none" else "at most "
    console.print(f"{counted(estimate.new, 'image')}, {most}{size_text(needed)} of targets ({size_text(free)} free)")
    if needed > free:
        raise CacheError(f"{estimate.work}: {size_text(needed)} are needed, {size_text(free)} are free; {MORE_SPACE}")
