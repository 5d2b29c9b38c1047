"""Stage 3, precompute-teachers: each frozen teacher sees each training image once; its targets go into a Zarr store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mgd_pipeline.cache import open_cache
from mgd_pipeline.cache_build import BuildImage, Skipped, build_store, find_base
from mgd_pipeline.cache_format import ImageKey, Layout, fingerprint, plan_layout
from mgd_pipeline.errors import CacheError, DataError, NonFiniteError, WeightsError
from mgd_pipeline.images import check_unchanged, read_image
from mgd_pipeline.manifest import ImageRow, Manifest, read_manifest
from mgd_pipeline.networks import output_grid
from mgd_pipeline.provenance import expected_provenance
from mgd_pipeline.targets import TeacherTargets
from mgd_pipeline.teacher_networks import build_teacher, stored_channels
from mgd_pipeline.teachers import Teacher, dense_targets, teacher_provenance
from mgd_pipeline.weights import read_metadata, sha256_of_state
from mgd_stages.progress import console, progress
from mgd_stages.project import Project, check_teacher
from mgd_stages.teacher_quality import check_teacher_sees, evaluate_teacher

OnError = Literal["stop", "skip"]
MORE_SPACE = (
    "free some (`mgd-pipeline cache gc` lists what old stores left), or store less: "
    "targets.stride 8 takes a quarter, targets.region_stride 16 a sixteenth of 4"
)
"""What to do where targets do not fit the disk."""


def precompute_teachers(
    project: Project, name: str, *, device: torch.device, batch_size: int, on_error: OnError = "stop", min_miou: float = 0.0
) -> None:
    """Runs one teacher over all labelled and unlabelled training images, then evaluates it on the evaluation split.

    A killed run loses the shard in hand, and only images that no earlier run has stored are computed. Several processes may run
    this at the same time. `on_error` skip leaves out images that cannot be read, and the store says so. A teacher that seems to
    get a wrong input, to have its classes in another order, or less than `min_miou` (0 to 1) on a few labelled images is refused
    before anything is computed. Writes data/targets/<name>.zarr and data/results/teachers/<name>.json.
    """
    manifest = read_manifest(project.manifest, project.base)
    teacher, provenance = load_teacher(project, name, manifest, device)
    _build(project, name, manifest, teacher, provenance, device, batch_size, on_error, min_miou)
    evaluate_teacher(project, name, manifest, teacher)


def load_teacher(project: Project, name: str, manifest: Manifest, device: torch.device) -> tuple[Teacher, dict[str, Any]]:
    """A teacher of params.yaml in eval mode on the device, and the provenance of the targets that it would make now."""
    check_teacher(project, name)
    params = project.params
    teacher = params.teachers[name]
    path = project.teacher(name)
    if not path.is_file():
        hint = f"run `mgd-pipeline train-teacher --teacher {name}`" if name in params.train_teachers else "put it there"
        raise WeightsError(f"teachers.{name}.weights: {path}: no such file; {hint}")
    network = build_teacher(name, teacher, manifest.classes, project.base)
    network.network.to(device)
    expected = expected_provenance(teacher, params.targets, manifest.classes, manifest.long_side)
    weights = sha256_of_state(network.network.state_dict())
    return network, teacher_provenance(expected, network, weights, read_metadata(path).get("trained_on"))


@dataclass(frozen=True)
class StoreEstimate:
    """What a build would make now."""

    images: list[BuildImage]
    """All labelled and unlabelled training images, one size after the other: they fill whole batches."""
    layout: Layout
    work: Path
    new: int
    """How many of the images no earlier run has stored."""

    @property
    def new_bytes(self) -> int:
        return self.new * self.layout.record_bytes


def estimate_store(
    project: Project, name: str, manifest: Manifest, provenance: dict[str, Any], channels: tuple[int, int]
) -> StoreEstimate:
    """Images, layout and size of a teacher's store, before anything is computed or written; `channels` as `stored_channels`."""
    rows = manifest.training
    sizes = [manifest.size(row) for row in rows]
    frames = [(int(height), int(width)) for height, width in output_grid(sizes).frames]
    images = [
        BuildImage(ImageKey(row.image_id, row.image_sha256), size, frame)
        for row, size, frame in zip(rows, sizes, frames, strict=True)
    ]
    images.sort(key=lambda image: image.size)  # the manifest's order within a size
    output, family = project.targets(name), project.work(f"targets-{fingerprint(provenance)[:16]}")
    layout = _layout(project, channels, frames, family, output, provenance)
    work = family / f"{layout.height}x{layout.width}"
    base = find_base(work, output, provenance, layout)
    known = set() if base is None else set(base.index.place)
    return StoreEstimate(images, layout, work, sum(image.key not in known for image in images))


def _build(
    project: Project,
    name: str,
    manifest: Manifest,
    teacher: Teacher,
    provenance: dict[str, Any],
    device: torch.device,
    batch_size: int,
    on_error: OnError,
    min_miou: float,
) -> None:
    options = project.params.targets
    rows = {ImageKey(row.image_id, row.image_sha256): row for row in manifest.training}
    plan = estimate_store(project, name, manifest, provenance, stored_channels(name, teacher))
    images, layout, work, output = plan.images, plan.layout, plan.work, project.targets(name)
    root = project.base / manifest.root

    def compute(keys: Sequence[ImageKey]) -> Iterator[TeacherTargets | Skipped]:
        for batch in _batches([rows[key] for key in keys], root, manifest, batch_size, on_error):
            if isinstance(batch, Skipped):
                yield batch
            else:
                yield from dense_targets(teacher, batch, options)

    _check_space(plan)
    if plan.new and layout.classes:
        check_teacher_sees(project, name, manifest, teacher, min_miou)
    made_by = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    try:
        with progress(f"precompute-teachers {name}", len(images), "images") as advance:
            computed = build_store(
                work,
                output,
                provenance,
                layout,
                images,
                compute,
                made_by,
                retry_skipped=on_error == "stop",
                advance=lambda done: advance(min(done, len(images)), ""),
            )
    except NonFiniteError as error:
        raise NonFiniteError(f"teacher {name}: {error}; use other weights or precision") from None
    cache = open_cache(output)
    skipped = [key.image_id for key in rows if key not in cache.index.place]
    for image_id in skipped:
        console.print(f"skipped: {cache.index.problems[cache.index.by_id[image_id]]}")
    made = f"{computed} of {len(images)} images computed" if computed else "all images were there already"
    console.print(f"targets of {name}: {made}{f', {len(skipped)} skipped' if skipped else ''} -> {output}")


def _batches(
    rows: list[ImageRow], root: Path, manifest: Manifest, batch_size: int, on_error: OnError
) -> Iterator[list[Any] | Skipped]:
    """Images of one size together, at most `batch_size` of them, in the order of the rows."""
    batch: list[Any] = []
    for row in rows:
        try:
            check_unchanged(root / row.image_path, row.image_sha256)
            image = read_image(root / row.image_path, manifest.long_side)
        except DataError as error:
            if on_error == "stop":
                raise
            if batch:
                yield batch
                batch = []
            yield Skipped(str(error))
            continue
        if batch and (len(batch) == batch_size or batch[0].shape != image.shape):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch


def _layout(
    project: Project,
    channels: tuple[int, int],
    frames: list[tuple[int, int]],
    family: Path,
    output: Path,
    provenance: dict[str, Any],
) -> Layout:
    """The layout of the store that is there, or that was, if all images fit its canvas: then it can grow; else a new one."""
    options = project.params.targets
    height, width = (max(frame[axis] for frame in frames) for axis in (0, 1))
    canvases = [tuple(int(side) for side in folder.name.split("x")) for folder in sorted(family.glob("*x*"))]
    try:
        cache = open_cache(output)
        if cache.provenance == provenance:
            canvases.insert(0, (cache.layout.height, cache.layout.width))
    except CacheError:
        pass  # nothing there that could grow
    roomy = next(((h, w) for h, w in canvases if h >= height and w >= width), (height, width))
    return plan_layout(
        classes=channels[0],
        features=channels[1],
        height=roomy[0],
        width=roomy[1],
        stride=options.stride,
        region_stride=options.region_stride,
        encoding=options.logits,
    )


def _check_space(plan: StoreEstimate) -> None:
    """Says how large the targets become, and raises CacheError where that does not fit the disk."""
    if not plan.new:
        return
    needed = plan.new_bytes
    plan.work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(plan.work).free
    console.print(f"{plan.new} images, {needed / 1e6:,.0f} MB of targets ({free / 1e9:,.1f} GB free)")
    if needed > free:
        raise CacheError(f"{plan.work}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; {MORE_SPACE}")
