"""Stage 3, precompute-teachers: each frozen teacher sees each training image once; its targets go into a Zarr store."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mgd_pipeline.access import is_there
from mgd_pipeline.ahead import ahead, iterate_ahead
from mgd_pipeline.caches.build import Plan, build_shards, find_base, plan_store, publish
from mgd_pipeline.caches.encoding import TeacherTargets
from mgd_pipeline.caches.format import ImageKey, Layout, fingerprint, mirrored_key, plan_layout
from mgd_pipeline.caches.provenance import expected_provenance
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.caches.shards import BuildImage, Compute, Shard, Skipped
from mgd_pipeline.data.images import check_unchanged
from mgd_pipeline.data.manifest import ImageRow, Manifest, read_manifest
from mgd_pipeline.errors import CacheError, DataError, MemoryShortage, NonFiniteError, WeightsError, shell_command
from mgd_pipeline.networks.segmentation import normalisation, output_grid, unrecorded_normalisation
from mgd_pipeline.networks.weights import read_metadata, require_access, sha256_of_state
from mgd_pipeline.params import ImportedTeacher, SmpTeacher, TargetsParams, TimmTeacher
from mgd_pipeline.teachers.kinds import build_teacher, check_sees, on_meta, stored_channels
from mgd_pipeline.teachers.teacher import Teacher, dense_targets, read_for, shown_sizes, teacher_provenance
from mgd_pipeline.words import counted, verb
from mgd_stages.compare_teachers import check_teacher_sees, evaluate_teacher
from mgd_stages.run.machine import cores, require_movable, require_writable
from mgd_stages.run.progress import console, progress
from mgd_stages.run.project import Project, check_teacher, few_sizes, short_of_memory

OnError = Literal["stop", "skip"]
MORE_SPACE = (
    "free some (`mgd-pipeline cache gc` lists what old stores left), or store less: "
    "targets.stride 8 takes a quarter, targets.region_stride 16 a sixteenth of 4"
)
"""What to do where targets do not fit the disk."""


_FIRST_BATCH = {"cpu": 8, "cuda": 64}
"""Images of the first forward pass where nobody says how many. On a CPU more of them are no faster."""
_ASIDE = ("cuda",)
"""Devices that go on while the targets of the batch before are encoded and written; a CPU would have to do both."""
_DECODERS = min(8, cores())
"""Threads that read and decode images while a batch is computed."""
Elsewhere = Callable[[Project, str, Plan, Sequence[Shard], Callable[[int, str], None]], int]
"""Has shards of a teacher's store built by other processes (`cluster`); returns how many images they computed."""


def precompute_teachers(
    project: Project,
    name: str,
    *,
    device: torch.device,
    batch_size: int = 0,
    on_error: OnError = "stop",
    min_miou: float = 0.0,
    shards: slice = slice(None),
    elsewhere: Elsewhere | None = None,
) -> None:
    """Runs one teacher over all labelled and unlabelled training images, then evaluates it on the evaluation split.

    A killed run loses the shard in hand, and only images that no earlier run has stored are computed. Several processes may run
    this at the same time, each all of it or its own `shards`; whoever finds all of them finished publishes the store.
    `on_error` skip leaves out images that cannot be read, and the store says so. A teacher that seems to get a wrong input, to
    have its classes in another order, or less than `min_miou` (0 to 1) on a few labelled images is refused before anything is
    computed; with a `min_miou` also a teacher whose store is there already, and the store stays. Writes data/targets/<name>.zarr
    and data/results/teachers/<name>.json.
    """
    manifest = read_manifest(project.manifest, project.base)
    results = project.results / "teachers"
    written = [results / f"{name}{end}" for end in (".json", "-confusion.csv", "-masks.parquet")]
    require_writable(files=written)
    # Beside workers this process needs the teacher for its identity alone, and leaves the device to them until they are done.
    teacher, provenance = load_teacher(project, name, manifest, torch.device("cpu") if elsewhere else device)
    _say_unrecorded_input(project, name)
    if _build(project, name, manifest, teacher, provenance, device, batch_size, on_error, min_miou, shards, elsewhere):
        teacher.network.to(device)
        evaluate_teacher(project, name, manifest, teacher)


def _say_unrecorded_input(project: Project, name: str) -> None:
    """Says with which input a network of the group's own is shown images, where version 0.1.0 showed them with another."""
    teacher = project.params.teachers[name]
    if not isinstance(teacher, SmpTeacher) or read_metadata(project.teacher(name)):
        return
    if normalisation(teacher.encoder) != unrecorded_normalisation(teacher.encoder):
        console.print(
            f"teacher {name}: {project.teacher(name)} does not say with which input it was trained; it is shown images as the "
            f"published weights of {teacher.encoder} were, not as ImageNet's ResNets"
        )


def load_teacher(project: Project, name: str, manifest: Manifest, device: torch.device) -> tuple[Teacher, dict[str, Any]]:
    """A teacher of params.yaml in eval mode on the device, and the provenance of the targets that it would make now."""
    check_teacher(project, name)
    params = project.params
    teacher = params.teachers[name]
    path = project.teacher(name)
    require_access(path)
    if not (is_there(path) and path.is_file()):
        train = shell_command("mgd-pipeline", "train-teacher", "--teacher", name)
        hint = f"run `{train}`" if name in params.train_teachers else "put it there"
        raise WeightsError(f"teachers.{name}.weights: {path}: no such file; {hint}")
    network = build_teacher(name, teacher, manifest.classes, project.base)
    if not isinstance(teacher, ImportedTeacher):
        sizes = probed_sizes(project, name, manifest, network.multiple)
        check_sees(name, lambda: on_meta(network.network), network.multiple, sizes)
    # As its input: convolutions are faster so, most of all in bfloat16, and differ in the last bits.
    network.network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    expected = expected_provenance(teacher, params.targets, manifest.classes, manifest.long_side)
    weights = sha256_of_state(network.network.state_dict())
    return network, teacher_provenance(expected, network, weights, read_metadata(path).get("trained_on"))


def probed_sizes(project: Project, name: str, manifest: Manifest, multiple: int) -> list[tuple[int, int]]:
    """Height and width of inputs that a teacher will be given if their sides must be multiples of so many pixels: of the smallest
    image, the largest, and one whose sides are odd multiples of 32 where there is one. Teachers that name classes are measured on
    whole images besides."""
    params = project.params
    rows = [*manifest.training, *manifest.split(params.evaluation.split)]
    images = few_sizes(manifest.size(row) for row in rows)
    teacher = params.teachers[name]
    looks = [params.targets] if isinstance(teacher, TimmTeacher) else [params.targets, TargetsParams()]
    return [size for options in looks for size in shown_sizes(images, teacher.short_side, multiple, options)]


@dataclass(frozen=True)
class StoreEstimate:
    """What a build would make now."""

    images: list[BuildImage]
    """All labelled and unlabelled training images, mirrored ones among them where the parameters ask for these."""
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
    images = store_images(manifest, project.params.targets)
    output, family = project.targets(name), project.work(f"targets-{fingerprint(provenance)[:16]}")
    layout = _layout(project, channels, [image.frame for image in images], family, output, provenance)
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
    chosen: slice,
    elsewhere: Elsewhere | None,
) -> bool:
    """Whether the store is there afterwards; it is not where shards are missing that others were asked for."""
    output = project.targets(name)
    estimate = estimate_store(project, name, manifest, provenance, stored_channels(name, teacher))
    images, layout = estimate.images, estimate.layout
    if estimate.new:  # a store that is complete may lie where nobody may write
        work = project.work(output.name).parent
        require_writable([output.parent, work])
        require_movable(work, output.parent)
    _check_space(estimate)
    if layout.classes and (estimate.new or min_miou):
        check_teacher_sees(project, name, manifest, teacher, min_miou)

    # --- the shards that are missing, here or by other processes
    computed = 0
    plan = plan_store(estimate.work, output, provenance, layout, images, retry_skipped=on_error == "stop")
    if plan is not None:
        mine = {shard.number for shard in plan.shards[chosen]}
        todo = [shard for shard in plan.todo if shard.number in mine]
        total = sum(len(shard.keys) for shard in plan.shards if shard.number in mine)
        done = total - sum(len(shard.keys) for shard in todo)
        with progress(f"precompute-teachers {name}", total, "images", done) as advance:
            if elsewhere is not None:
                computed = elsewhere(project, name, plan, todo, lambda more, note: advance(done + more, note))
            else:
                compute = teacher_compute(project, name, manifest, teacher, device, batch_size, on_error)
                with named_errors(name, device, batch_size):
                    computed = build_shards(plan, todo, compute, machine(device, batch_size), lambda more: advance(done + more, ""))
        if missing := plan.missing():
            if len(mine) == len(plan.shards):
                raise CacheError(f"{estimate.work}/shards/{missing[0].name}: has disappeared again; run the same command once more")
            console.print(
                f"targets of {name}: {counted(computed, 'image')} computed; {len(missing)} of {counted(len(plan.shards), 'shard')} "
                f"{verb(len(missing), 'is', 'are')} missing yet: "
                "whoever finishes the last one publishes the store, or the same command without --shards"
            )
            return False
        publish(plan)

    cache = open_cache(output)
    skipped = [image.key.image_id for image in images if image.key not in cache.index.place]
    for problem in dict.fromkeys(cache.index.problems[cache.index.by_id[image_id]] for image_id in skipped):
        console.print(f"skipped: {problem}")
    mirrored = " and mirror images" if project.params.targets.mirrored else ""
    kind = f"{verb(len(images), 'image', 'images')}{mirrored}"
    made = f"{computed} of {len(images)} {kind} computed" if computed else f"all images{mirrored} were there already"
    console.print(f"targets of {name}: {made}{f', {len(skipped)} skipped' if skipped else ''} -> {output}")
    return True


@dataclass(frozen=True)
class Shown:
    """What a teacher is shown for one row of a store."""

    row: ImageRow
    mirrored: bool

    def pixels(self, project: Project, manifest: Manifest, teacher: Teacher) -> np.ndarray:
        """(H, W, 3) uint8, see `read_for`. Raises DataError where the file is not what the manifest says."""
        path = project.base / manifest.root / self.row.image_path
        check_unchanged(path, self.row.image_sha256)
        image = read_for(teacher, path, manifest.long_side)
        return np.ascontiguousarray(image[:, ::-1]) if self.mirrored else image


def shown_images(manifest: Manifest, options: TargetsParams) -> dict[ImageKey, Shown]:
    """What a store shall hold: each training image, and behind it its mirror image where `options` ask for these."""
    shown = {}
    for row in manifest.training:
        key = ImageKey(row.image_id, row.image_sha256)
        shown[key] = Shown(row, mirrored=False)
        if options.mirrored:
            shown[mirrored_key(key)] = Shown(row, mirrored=True)
    return shown


def store_images(manifest: Manifest, options: TargetsParams) -> list[BuildImage]:
    """`shown_images` with their sizes. One size after the other fills whole batches; the manifest's order within a size."""
    shown = shown_images(manifest, options)
    sizes = [manifest.size(image.row) for image in shown.values()]
    frames = [(int(height), int(width)) for height, width in output_grid(sizes).frames]
    images = [BuildImage(key, size, frame) for key, size, frame in zip(shown, sizes, frames, strict=True)]
    return sorted(images, key=lambda image: image.size)


def teacher_compute(
    project: Project,
    name: str,
    manifest: Manifest,
    teacher: Teacher,
    device: torch.device,
    batch_size: int,
    on_error: OnError,
) -> Compute:
    """What fills shards with the targets of this teacher, which is on `device`; a `batch_size` of 0 is what its memory allows."""
    options = project.params.targets
    shown = shown_images(manifest, options)
    fitting = batch_size or _FIRST_BATCH[device.type]

    def targets_of(images: list[np.ndarray]) -> Iterator[TeacherTargets]:
        """Of images of one size; fewer at a time from then on where they do not fit the memory, and nobody has said how many."""
        nonlocal fitting
        while images:
            try:
                found = dense_targets(teacher, images[:fitting], options, manifest.long_side)
            except RuntimeError as error:
                if batch_size or fitting == 1 or not short_of_memory(error):
                    raise
                found = []
            if found:
                yield from found
                images = images[len(found) :]
            else:
                fitting = min(fitting, len(images)) // 2 or 1
                if device.type == "cuda":
                    torch.cuda.empty_cache()

    def read(image: Shown) -> np.ndarray | Skipped:
        try:
            return image.pixels(project, manifest, teacher)
        except DataError as error:
            if on_error == "stop":
                raise
            return Skipped(str(error))

    def targets(keys: Sequence[ImageKey]) -> Iterator[TeacherTargets | Skipped]:
        images = ahead((partial(read, shown[key]) for key in keys), _DECODERS, fitting)
        for batch in _batches(images, fitting):
            if isinstance(batch, Skipped):
                yield batch
            else:
                yield from targets_of(batch)

    def compute(keys: Sequence[ImageKey]) -> Iterator[TeacherTargets | Skipped]:
        return iterate_ahead(targets(keys), fitting) if device.type in _ASIDE else targets(keys)

    return compute


@contextmanager
def named_errors(name: str, device: torch.device, batch_size: int) -> Iterator[None]:
    """What goes wrong with a teacher while it computes, as one line that names it and the remedy."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"teacher {name}: {error}; use other weights or precision") from None
    except RuntimeError as error:
        if not short_of_memory(error):
            raise
        remedy = f"lower it, such as --batch-size {batch_size // 2}" if batch_size > 1 else "take smaller images or another device"
        raise MemoryShortage(f"teacher {name}: {device} is out of memory with --batch-size {batch_size or 1}; {remedy}") from None


def machine(device: torch.device, batch_size: int) -> dict[str, Any]:
    """What is noted with each shard of how it was made."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "batch_size": batch_size or f"up to {_FIRST_BATCH[device.type]}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _batches(images: Iterable[np.ndarray | Skipped], batch_size: int) -> Iterator[list[np.ndarray] | Skipped]:
    """Images of one size together, at most `batch_size` of them, in their order; skipped ones alone."""
    batch: list[np.ndarray] = []
    for image in images:
        if batch and (isinstance(image, Skipped) or len(batch) == batch_size or batch[0].shape != image.shape):
            yield batch
            batch = []
        if isinstance(image, Skipped):
            yield image
        else:
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


def _check_space(estimate: StoreEstimate) -> None:
    """Says how large the targets become, and raises CacheError where that does not fit the disk."""
    if not estimate.new:
        return
    needed = estimate.new_bytes
    estimate.work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(estimate.work).free
    console.print(f"{counted(estimate.new, 'image')}, {needed / 1e6:,.0f} MB of targets ({free / 1e9:,.1f} GB free)")
    if needed > free:
        raise CacheError(f"{estimate.work}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; {MORE_SPACE}")
