"""Stage 3, precompute-teachers: each frozen teacher sees each training image once; its targets go into a Zarr store."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from mgd_pipeline.cache import (
    SHARD_BYTES,
    ImageKey,
    begin_store,
    fingerprint,
    open_cache,
    plan_layout,
    publish_store,
    shard_done,
    write_shard,
)
from mgd_pipeline.checkpoint import read_metadata
from mgd_pipeline.errors import CacheError, NonFiniteError, WeightsError
from mgd_pipeline.images import read_image
from mgd_pipeline.manifest import Manifest, read_manifest
from mgd_pipeline.networks import load_network, normalisation, output_grid, sha256_of_state
from mgd_pipeline.provenance import expected_provenance, teacher_provenance
from mgd_pipeline.targets import TeacherTargets
from mgd_pipeline.teachers import dense_targets
from mgd_stages.evaluate import evaluate_network
from mgd_stages.progress import console, progress, write_json
from mgd_stages.project import Project, check_teacher, key_of


def precompute_teachers(project: Project, name: str, *, device: torch.device, batch_size: int) -> None:
    """Runs one teacher over all labelled and unlabelled training images, then evaluates it on the evaluation split.

    A killed run goes on at the first shard that it had not finished. Writes data/targets/<name>.zarr and
    data/results/teachers/<name>.json.
    """
    check_teacher(project, name)
    params = project.params
    teacher = params.teachers[name]
    manifest = read_manifest(project.manifest, project.base)
    path = project.teacher(name)
    if not path.is_file():
        hint = f"run `mgd-pipeline train-teacher --teacher {name}`" if name in params.train_teachers else "put it there"
        raise WeightsError(f"teachers.{name}.weights: {path}: no such file; {hint}")
    network = load_network(teacher, len(manifest.classes), path).to(device).eval()
    metadata = read_metadata(path)
    classes = metadata.get("classes", list(manifest.classes))
    if classes != list(manifest.classes):
        raise WeightsError(f"{path}: was trained for the classes {', '.join(classes)}; the data set has others")

    expected = expected_provenance(teacher, params.targets, manifest.classes, manifest.long_side)
    provenance = teacher_provenance(expected, sha256_of_state(network.model.state_dict()), metadata.get("trained_on"))
    _build(project, name, manifest, network, provenance, device, batch_size)

    metrics = evaluate_network(project, manifest, network, normalisation(teacher.encoder), f"precompute-teachers {name}: evaluate")
    write_json(project.results / f"teachers/{name}.json", metrics.summary(manifest.classes))
    console.print(f"teacher {name}: {metrics.miou * 100:.1f} mIoU on {params.evaluation.split}")


def _build(
    project: Project,
    name: str,
    manifest: Manifest,
    network: torch.nn.Module,
    provenance: dict[str, object],
    device: torch.device,
    batch_size: int,
) -> Path:
    rows = manifest.training
    keys = [ImageKey(row.image_id, row.image_sha256) for row in rows]
    output = project.targets(name)
    if _finished(output, provenance, keys):
        console.print(f"targets of {name} are finished already -> {output}")
        return output
    options = project.params.targets
    sizes = [manifest.size(row) for row in rows]
    frames = output_grid(sizes).frames
    layout = plan_layout(
        rows=len(rows),
        classes=len(manifest.classes),
        features=project.params.teachers[name].decoder_channels,
        height=int(frames[:, 0].max()),
        width=int(frames[:, 1].max()),
        stride=options.stride,
        region_stride=options.region_stride,
        encoding=options.logits,
        shard_bytes=SHARD_BYTES,
    )
    console.print(
        f"teacher {name}: {len(rows)} images, {len(layout.shards())} shards, "
        f"{layout.rows * layout.record_bytes / 1e6:.0f} MB of targets"
    )
    work = project.work(f"targets-{fingerprint(provenance)[:16]}-{key_of(keys)[:16]}")
    begin_store(work, provenance, layout)
    root = project.base / manifest.root
    normalise = normalisation(project.params.teachers[name].encoder)
    with progress(f"precompute-teachers {name}", len(rows), "images") as advance:
        for shard, places in enumerate(layout.shards()):
            if not shard_done(work, shard):
                targets: list[TeacherTargets] = []
                # Batches hold images of one size and never cross shards.
                for size, group in groupby(places, key=lambda place: sizes[place]):
                    same = list(group)
                    for start in range(0, len(same), batch_size):
                        batch = [rows[place] for place in same[start : start + batch_size]]
                        images = [read_image(root / row.image_path, manifest.long_side) for row in batch]
                        for row, image in zip(batch, images, strict=True):
                            if image.shape[:2] != size:
                                raise WeightsError(f"{row.image_path}: has changed size; run `mgd-pipeline prepare-data`")
                        targets += dense_targets(network, images, normalise, options)  # pyright: ignore[reportArgumentType]
                        advance(places.start + len(targets), "")
                extents = np.array([(*sizes[place], *frames[place]) for place in places], np.int32)
                try:
                    write_shard(work, layout, shard, keys[places.start : places.stop], targets, extents)
                except NonFiniteError as error:
                    raise NonFiniteError(f"teacher {name}: {error}; use other weights or precision") from None
            advance(places.stop, "")
    publish_store(work, layout, output, keys)
    console.print(f"targets of {name} -> {output}")
    return output


def _finished(output: Path, provenance: dict[str, object], keys: list[ImageKey]) -> bool:
    """Whether the output is already the store that would be made: the same provenance, the same images in the same order."""
    try:
        cache = open_cache(output)
        return cache.provenance == provenance and [cache.row(key) for key in keys] == list(range(cache.layout.rows))
    except CacheError:
        return False
