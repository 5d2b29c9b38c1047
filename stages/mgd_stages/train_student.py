"""Stage 4, train-student: the light student learns from labels and from the cached targets of the teachers.

The teachers themselves are not here: neither their code nor their weights are touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from mgd_pipeline.caches.format import Layout
from mgd_pipeline.caches.provenance import expected_provenance
from mgd_pipeline.data.images import read_mask
from mgd_pipeline.data.manifest import Manifest, read_manifest, require_classes
from mgd_pipeline.data.partition import check_listening
from mgd_pipeline.distillation.losses import (
    Ohem,
    content_aware_loss,
    mean_of_probabilities,
    pixel_consistency_loss,
    semantic_sensitive_loss,
    supervised_loss,
)
from mgd_pipeline.errors import ParamsError, ProvenanceMismatch
from mgd_pipeline.networks.counting import parameter_count
from mgd_pipeline.networks.encoders import normalisation, unrecorded_normalisation
from mgd_pipeline.networks.segmentation import DenseOutputs, SegmentationNetwork, build_network, check_network, upsample
from mgd_pipeline.networks.weights import save_weights, size_of_state
from mgd_pipeline.params import LossesParams, Params
from mgd_pipeline.training.batches import (
    Batch,
    StepTargets,
    TargetProvider,
    cached_targets,
    mixed_valid,
    mixed_views,
    valid_views,
    view_images,
    view_labels,
)
from mgd_pipeline.training.checkpoint import TrainingCheckpoint
from mgd_pipeline.training.dataset import TrainingSet
from mgd_stages.run.loop import (
    check_outputs,
    check_ranks,
    image_cache,
    of_machine,
    on_ranks,
    process_group,
    ranks_of_torchrun,
    train,
)
from mgd_stages.run.machine import require_room
from mgd_stages.run.progress import MetricsLog, console, write_json
from mgd_stages.run.project import Project, key_of, manifest_hash, settings_of
from mgd_stages.run.sinks import SinkName, open_sink


def train_student(
    project: Project,
    *,
    supervised_only: bool,
    device: torch.device,
    num_workers: int,
    resume: bool,
    compiled: bool = False,
    cache_images: bool = False,
    live: TargetProvider | None = None,
    log_to: SinkName | None = None,
) -> None:
    """Trains the student on the partition; `supervised_only` leaves out everything but the labelled images.

    Targets come from the stores; `live` is for studies that compare them with teachers that run on every view.
    Writes data/students/<distilled | supervised>/student.safetensors and data/results/train-student-<...>/.
    """
    params, student = project.params, project.params.student
    name = "supervised" if supervised_only else "distilled"
    check_network("student.network", student.network, [(params.views.crop[0], params.views.crop[1])])
    manifest = read_manifest(project.manifest, project.base)
    require_classes(manifest, project.base, manifest.labelled, "the labelled images")

    if not supervised_only:
        check_listening(params.losses, manifest.subsets)

    # --- targets: open, and refuse what was made from something else
    rank, ranks = ranks_of_torchrun()
    check_ranks(student, ranks)
    console.quiet |= rank > 0
    folder = project.results / f"train-student-{name}"
    if rank == 0:
        check_outputs(project, f"train-student-{name}", project.student(name))
    used = [] if supervised_only or live is not None else params.losses.used_teachers
    dataset = TrainingSet(
        manifest,
        project.base,
        params.views,
        params.cutmix,
        student,
        params.seed,
        caches={teacher: project.targets(teacher) for teacher in used},
        with_unlabelled=not supervised_only,
        expected={
            teacher: expected_provenance(params.teachers[teacher], params.targets, manifest.classes, manifest.long_side)
            for teacher in used
        },
        rank=rank,
        ranks=ranks,
        image_cache=image_cache(project, manifest, unlabelled=not supervised_only) if cache_images else None,
    )
    caches = dataset.open_caches()
    dataset.check_rows()
    check_teachers_give(params, {name: cache.layout for name, cache in caches.items()})
    provider = live or (cached_targets if caches else None)
    for cache in caches.values():
        trained_on = cache.provenance["teacher"]["trained_on"]
        if trained_on not in (None, manifest.partition_fingerprint) and not params.losses.other_partition:
            raise ProvenanceMismatch(
                f"{cache.path}: its teacher was trained on the labels of another partition ({trained_on[:12]}..., here "
                f"{manifest.partition_fingerprint[:12]}...): they would leak into this experiment. "
                "Train the teacher on this partition, or set losses.other_partition to true if that is what you study"
            )

    # --- where an interrupted run goes on
    run = f"train-student-{name}"
    deciding = {"student": student, "views": params.views, "cutmix": params.cutmix, "losses": params.losses}
    sections = {section: found.model_dump() for section, found in deciding.items()}
    stores = [cache.fingerprint for cache in caches.values()]
    made_from, seed = manifest_hash(project), params.seed
    # What version 0.1.0 began with another input does not go on with this one.
    normalise = normalisation(student.network.encoder)
    other_input = [normalise] if normalise != unrecorded_normalisation(student.network.encoder) else []
    key = key_of(*sections.values(), seed, name, made_from, stores, live is not None, device.type, ranks, *other_input)
    settings = settings_of(**sections, seed=seed) | of_machine(device, ranks, made_from, stores)
    checkpoint = TrainingCheckpoint(project.work(run), key, settings, student.steps)
    with process_group(device, ranks), open_sink(log_to if rank == 0 else None, project, run) as sink:
        log = MetricsLog(folder, sink)

        # --- network
        torch.manual_seed(params.seed)
        network = build_network(student.network, len(manifest.classes), base=project.base).to(device)
        network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if rank == 0:
            require_room(project.student(name), size_of_state(network))
        forward = on_ranks(network, device, ranks, compiled=compiled)

        def loss_of(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            terms = step_terms(forward, batch, provider, params)
            return total_loss(terms, params.losses), terms

        # --- loop
        result = train(
            f"train-student {name}",
            dataset,
            loss_of,
            trained=network,
            averaged=network,
            settings=student,
            checkpoint=checkpoint,
            log=log,
            device=device,
            num_workers=num_workers,
            resume=resume,
            advice="lower student.learning_rate or the weight of that term",
        )
    if rank > 0:
        return

    # --- result
    assert isinstance(result, SegmentationNetwork)
    if student.logit_adjustment:
        adjust_logits(result, labelled_pixels(manifest, project.base), student.logit_adjustment)
    log.write()
    write_json(
        folder / "metrics.json",
        {"steps": student.steps, "parameters": parameter_count(result), "loss": log.rows["loss"][-1][1]},
    )
    save_weights(
        project.student(name),
        result.model.state_dict(),
        {
            "kind": "student",
            "network": student.network.model_copy(update={"encoder_weights": "none"}).model_dump(),
            "classes": list(manifest.classes),
            "palette": [list(colour) for colour in manifest.palette],
            "normalisation": [list(normalise.mean), list(normalise.std)],
            "long_side": manifest.long_side,
            "trained_on": manifest.partition_fingerprint,
            "labelled_images": len(manifest.labelled),
            "teachers": {teacher: [cache.fingerprint, cache.generation] for teacher, cache in caches.items()},
        },
    )
    checkpoint.remove()
    console.print(f"student {name} -> {project.student(name)}")


def step_terms(
    forward: Callable[[torch.Tensor], DenseOutputs],
    batch: Batch,
    provider: TargetProvider | None,
    params: Params,
) -> dict[str, torch.Tensor]:
    """The loss terms of one step, unweighted scalars by name; only `supervised` where the batch has no unlabelled images."""
    student, jitter, losses = params.student, params.views.colour_jitter, params.losses
    normalise = normalisation(student.network.encoder)
    ohem = None if student.ohem is None else Ohem(student.ohem.threshold, student.ohem.min_kept)

    inputs = view_images(batch.labelled, normalise, jitter)
    labels = view_labels(batch.labelled)
    count = len(batch.labelled.rows)
    if batch.unlabelled is not None:
        seen = [view_images(source, normalise, jitter) for source in batch.mixed]
        inputs = torch.cat([inputs, mixed_views(batch, seen)])
    size = (inputs.shape[-2], inputs.shape[-1])
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=student.precision == "bfloat16"):
        outputs = forward(inputs.contiguous(memory_format=torch.channels_last))
    logits = upsample(outputs.logits.float(), size)
    terms = {"supervised": supervised_loss(logits[:count], labels, ohem=ohem)}
    if batch.unlabelled is None or provider is None:
        return terms

    found, valid = provider(batch), mixed_valid(batch)
    for teacher, on_labelled, on_unlabelled in _pixel_targets(found, losses):
        for images, student_logits, teacher_logits, exists in (
            ("labelled", logits[:count], on_labelled, valid_views(batch.labelled)),
            ("unlabelled", logits[count:], on_unlabelled, valid),
        ):
            if images in losses.images:
                terms[f"pixel_{images}_{teacher}"] = pixel_consistency_loss(
                    student_logits,
                    teacher_logits,
                    valid=exists,
                    soft=losses.pixel_labels == "soft",
                    confidence=losses.confidence,
                )
    if "unlabelled" in losses.images:
        if losses.region:
            terms["region"] = content_aware_loss(outputs.features[count:], found[losses.region_teacher].mixed_features, valid=valid)
        if losses.image:
            terms["image"] = semantic_sensitive_loss(logits[count:], found[losses.image_teacher].mixed_logits, valid=valid)
    return terms


def _pixel_targets(found: Mapping[str, StepTargets], losses: LossesParams) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, logits on labelled and logits on unlabelled views of each pixel term."""
    if not losses.pixel:
        return []
    each = [(name, found[name].labelled_logits, found[name].unmixed_logits) for name in losses.pixel_teachers]
    if not losses.pixel_ensemble:
        return each
    _, labelled, unlabelled = zip(*each, strict=True)
    return [("ensemble", mean_of_probabilities(labelled), mean_of_probabilities(unlabelled))]


def check_teachers_give(params: Params, layouts: Mapping[str, Layout]) -> None:
    """Raises ParamsError for a term that listens to a teacher whose store, where there is one, has nothing for it."""
    losses = params.losses
    wanted = [("losses.pixel_teachers", name, "classes") for name in losses.pixel_teachers if losses.pixel]
    if "unlabelled" in losses.images:
        wanted += [("losses.region_teacher", losses.region_teacher, "features")] if losses.region else []
        wanted += [("losses.image_teacher", losses.image_teacher, "classes")] if losses.image else []
    for key, name, what in wanted:
        if name in layouts and not getattr(layouts[name], what):
            gives = "names no classes" if what == "classes" else "gives no embeddings"
            raise ParamsError(f"{key}: teacher {name} {gives}; name another one, or set the weight of that term to 0")


def labelled_pixels(manifest: Manifest, base: Path) -> np.ndarray:
    """How many pixels of the labelled images each class has, (K,) int64."""
    lookup, classes = np.array(manifest.lookup, np.int16), len(manifest.classes)
    masks = (read_mask(base / manifest.root / row.mask_path, lookup) for row in manifest.labelled if row.mask_path)
    return np.sum([np.bincount(mask.ravel(), minlength=256)[:classes] for mask in masks], 0)


def adjust_logits(network: SegmentationNetwork, pixels_K: np.ndarray, weight: float) -> None:
    """Takes weight * log(share of the pixels) off each class's logit, for good: it becomes part of the last layer's bias.

    Post-hoc logit adjustment (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, section 4.1). Of a class
    that no pixel has the share is not known; its logit stays as it is.
    """
    share_K = np.where(pixels_K, pixels_K / max(1, pixels_K.sum()), 1.0)
    bias = network.model.segmentation_head[0].bias
    with torch.no_grad():
        bias -= weight * torch.as_tensor(np.log(share_K), dtype=bias.dtype, device=bias.device)


def total_loss(terms: dict[str, torch.Tensor], losses: LossesParams) -> torch.Tensor:
    """supervised + pixel * (all pixel terms) + region * region + image * image."""
    weights = {"supervised": 1.0, "region": losses.region, "image": losses.image}
    return torch.stack([weights.get(term, losses.pixel) * value for term, value in terms.items()]).sum()
