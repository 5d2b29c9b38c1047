"""Stage 4, train-student: the light student learns from labels and from the teacher caches, and is fine-tuned for int8 exports.

Neither the code nor the weights of the teachers are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mgd_pipeline.caches.provenance import expected_provenance
from mgd_pipeline.caches.reader import TargetCache
from mgd_pipeline.caches.statistics import stored_statistics, training_keys
from mgd_pipeline.data.datasets import names_of
from mgd_pipeline.data.manifest import Manifest, read_manifest, require_classes
from mgd_pipeline.data.partition import check_listening
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.networks.counting import parameter_count
from mgd_pipeline.networks.encoders import normalisation
from mgd_pipeline.networks.segmentation import SegmentationNetwork, build_network, check_network
from mgd_pipeline.networks.weights import save_weights, size_of_state
from mgd_pipeline.params import Params, StudentParams
from mgd_pipeline.training.batches import Batch, TargetProvider, cached_targets
from mgd_pipeline.training.checkpoint import TrainingCheckpoint
from mgd_pipeline.training.dataset import TrainingSet, refuse_hidden_labels
from mgd_pipeline.training.features import with_projections
from mgd_pipeline.training.knowledge import Knowledge, knowledge_of
from mgd_pipeline.training.optimisation import StepLoss, build_average, consistency_weight
from mgd_pipeline.training.priors import adjust_logits, labelled_pixels
from mgd_pipeline.training.semi_supervised import Forward, mean_teacher, settings
from mgd_pipeline.training.simulated_int8 import in_simulated_int8, last_tenth
from mgd_pipeline.training.terms import step_loss, step_terms
from mgd_stages.run.cache_from import CacheFrom, network_log, places_of, require_copies
from mgd_stages.run.finished_student import StartingStudent, starting_student
from mgd_stages.run.head_caches import refuse_stale_heads
from mgd_stages.run.loop import LossOf, Training, train
from mgd_stages.run.machine import Machine, require_room
from mgd_stages.run.outputs import check_outputs, image_cache
from mgd_stages.run.progress import MetricsLog, console, say_renamed, write_json
from mgd_stages.run.project import Project, key_of, manifest_hash
from mgd_stages.run.ranks import check_ranks, on_ranks, process_group, ranks_of_torchrun
from mgd_stages.run.sinks import open_sink
from mgd_stages.run.unfinished import other_input, settings_note
from mgd_stages.run.weak_teachers import weak_teachers


def train_student(
    project: Project,
    machine: Machine,
    *,
    supervised_only: bool = False,
    quantised: bool = False,
    live: TargetProvider | None = None,
    warned: bool = False,
    cache_from: CacheFrom | None = None,
) -> None:
    """Trains the student on the partition; with `supervised_only` without teachers, as `student.without_teachers` says.

    Targets come from the teacher caches; `live` is for studies that compare them with teachers that run on every view. `warned`:
    the user has just read what `weak_teachers` says. `cache_from`: read the caches there, shard by shard. `quantised`: fine-tune
    the finished student in simulated 8-bit arithmetic, as `last_tenth` says; with `supervised_only` the one without teachers.
    Writes data/students/<distilled | supervised | quantised | quantised-supervised>/student.safetensors and
    data/results/train-student-<...>/.
    """
    asked, finished = project, "supervised" if supervised_only else "distilled"
    name = {"distilled": "quantised", "supervised": "quantised-supervised"}[finished] if quantised else finished
    project = replace(asked, params=last_tenth(asked.params)) if quantised else asked
    params, student = project.params, project.params.student
    unlabelled = student.without_teachers.uses_unlabelled or not supervised_only
    run, (rank, ranks) = f"train-student-{name}", ranks_of_torchrun()
    console.quiet |= rank > 0

    # --- what cannot work is refused before the first step
    manifest = _checked_manifest(project, supervised_only)
    start = starting_student(asked, finished, manifest) if quantised else None
    check_ranks(student, ranks)
    _check_two_passes(student, ranks, compiled=machine.compiled, distils=not supervised_only)
    if rank == 0:
        check_outputs(project, run, project.student(name))
        if not (supervised_only or quantised or live or warned) and (line := weak_teachers(project, manifest)):
            console.print(line)

    # --- data: labelled and unlabelled images, and what the teachers say of them
    teachers = [] if supervised_only or live is not None else params.losses.used_teachers
    dataset = TrainingSet(
        manifest,
        params.views,
        params.cutmix,
        student,
        params.seed,
        caches=places_of(project, teachers, cache_from.places if cache_from else ()),
        with_unlabelled=unlabelled,
        expected={
            teacher: expected_provenance(params.teachers[teacher], params.targets, manifest.classes, manifest.long_side)
            for teacher in teachers
        },
        rank=rank,
        ranks=ranks,
        image_cache=image_cache(project, manifest, unlabelled=unlabelled) if machine.cache_images else None,
        by_shards=cache_from.reading if cache_from else None,
    )
    caches = _open_caches(project, dataset)
    knowledge = _knowledge(params, dataset, caches, machine) if caches or live else Knowledge()
    provider = live or (partial(cached_targets, losses=params.losses) if caches else None)

    # --- an interrupted run goes on from its checkpoint
    made_by = [*(cache.fingerprint for cache in caches.values()), *(dataset.shardwise.order.names if dataset.shardwise else ())]
    checkpoint = _checkpoint(asked, name, machine.device, ranks, made_by, start=start, live=live is not None)

    # --- training
    with process_group(machine.device, ranks), open_sink(machine.log_to if rank == 0 else None, project, run) as sink:
        log = MetricsLog(project.results / run, sink)
        torch.manual_seed(params.seed)
        network = start.network if start else build_network(student.network, len(manifest.classes), base=project.base)
        network.to(machine.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if rank == 0:
            require_room(project.student(name), size_of_state(network))
        computed = in_simulated_int8(network, params.views.crop) if start else network
        trained = with_projections(computed, knowledge.features, params.targets.region_stride)
        forward = on_ranks(trained, machine.device, ranks, compiled=machine.compiled)
        advice = "lower student.learning_rate or the weight of that term"
        average = build_average(network, student)
        loss_of = _loss(forward, provider, params, knowledge)
        if supervised_only and unlabelled and average is not None:
            loss_of = _loss_by_mean_teacher(forward, average, params, manifest, machine.device)
        reads = network_log(dataset, log, machine.device)
        training = Training(f"train-student {name}", dataset, loss_of, trained, network, average, checkpoint, log, advice, reads)
        result = train(training, machine)
    if rank > 0:
        return

    # --- result
    assert isinstance(result, SegmentationNetwork)
    log.write()
    numbers = {"steps": student.steps, "parameters": parameter_count(result), "loss": log.rows["loss"][-1][1]}
    write_json(project.results / run / "metrics.json", {**numbers, **(reads.report() if reads else {})})
    method = student.without_teachers.method if supervised_only and unlabelled else None
    _save(project, name, result, manifest, _origin(method, caches, start, student.steps))
    checkpoint.remove()
    console.print(f"student {name} -> {project.student(name)}")


def _checkpoint(
    project: Project,
    name: str,
    device: torch.device,
    ranks: int,
    made_by: Sequence[str],
    *,
    start: StartingStudent | None,
    live: bool,
) -> TrainingCheckpoint:
    """`made_by`: the fingerprints of the teacher caches."""
    params, student = project.params, project.params.student
    sections = {section: getattr(params, section).model_dump() for section in ("student", "views", "cutmix", "losses")}
    key = key_of(
        *(*sections.values(), params.seed, name, manifest_hash(project), made_by, live),
        *(device.type, ranks, *other_input(student.network.encoder), *([start.sha256] if start else [])),
    )
    note = settings_note(project, sections, device, ranks, made_by)
    steps = student.steps
    if start:
        note, steps = {**note, start.path: start.sha256[:12]}, last_tenth(params).student.steps
    return TrainingCheckpoint(project.work(f"train-student-{name}"), key, note, steps)


def _origin(method: str | None, caches: Mapping[str, TargetCache], start: StartingStudent | None, steps: int) -> dict[str, Any]:
    """What the metadata of a student say about its training."""
    return {
        **({} if method is None else {"method": method}),
        "teachers": {teacher: [cache.fingerprint, cache.generation] for teacher, cache in caches.items()},
        **({"int8_fine_tuning": {"student": start.path, "sha256": start.sha256, "steps": steps}} if start else {}),
    }


def _save(project: Project, name: str, network: SegmentationNetwork, manifest: Manifest, origin: dict[str, Any]) -> None:
    params, adjustment = project.params.student.network, project.params.student.logit_adjustment
    if adjustment:
        adjust_logits(network, labelled_pixels(manifest), adjustment)
    normalise = normalisation(params.encoder)
    save_weights(
        project.student(name),
        network.model.state_dict(),
        {
            "kind": "student",
            "network": params.model_copy(update={"encoder_weights": "none"}).model_dump(),
            "classes": list(manifest.classes),
            "palette": [list(colour) for colour in manifest.palette],
            "normalisation": [list(normalise.mean), list(normalise.std)],
            "long_side": manifest.long_side,
            "trained_on": manifest.partition_fingerprint,
            "labelled_images": len(manifest.labelled),
            **origin,
        },
    )


def _checked_manifest(project: Project, supervised_only: bool) -> Manifest:
    """Raises ParamsError for a student that cannot be built, and for losses that do not fit the images; says which do nothing."""
    params = project.params
    check_network("student.network", params.student.network, [(params.views.crop[0], params.views.crop[1])])
    manifest = read_manifest(project.manifest, project.base, names_of(params.data))
    require_classes(manifest, manifest.labelled, "the labelled images")
    if not supervised_only:
        check_listening(params.losses, manifest.subsets)
        for line in params.losses.in_vain:
            console.print(line)
    return manifest


def _knowledge(params: Params, dataset: TrainingSet, caches: Mapping[str, TargetCache], machine: Machine) -> Knowledge:
    manifest, shardwise = dataset.manifest, dataset.shardwise
    for name in params.losses.feature_teachers if params.losses.feature else ():
        if name in caches and stored_statistics(caches[name], training_keys(manifest, mirrored=caches[name].mirrored)) is None:
            console.print(
                f"teacher {name}: its cache keeps no mean and deviation of its embeddings over these training images; they are "
                "computed now"
            )
    knowledge = knowledge_of(params, manifest, caches, machine.device, labelled=shardwise.labelled if shardwise else caches)
    if knowledge.bounded:
        console.print(f"warning: {knowledge.bounded}")
    return knowledge


def _check_two_passes(student: StudentParams, ranks: int, *, compiled: bool, distils: bool) -> None:
    """Raises ParamsError where a step cannot have two backward passes."""
    if not (student.distillation_momentum and distils):
        return
    said = "student.distillation_momentum: has two backward passes for one forward pass, which"
    if ranks > 1:
        # The gradients of the second pass would not be averaged over the ranks, without a word.
        raise ParamsError(f"{said} processes of torchrun cannot share; set it to 0, or call the command without torchrun")
    if compiled:
        raise ParamsError(f"{said} a compiled network does not allow; set it to 0, or leave --compile out")


def _loss(forward: Callable[[torch.Tensor], Any], provider: TargetProvider | None, params: Params, knowledge: Knowledge) -> LossOf:
    def loss_of(batch: Batch) -> StepLoss:
        return step_loss(step_terms(forward, batch, provider, params, knowledge), params)

    return loss_of


def _loss_by_mean_teacher(
    forward: Forward, average: torch.nn.Module, params: Params, manifest: Manifest, device: torch.device
) -> LossOf:
    """Without teachers: the moving average of the student labels the unlabelled images."""
    student, average = params.student, average.eval()
    how = settings(student, normalisation(student.network.encoder), params.views.colour_jitter, manifest, device)

    def loss_of(batch: Batch) -> StepLoss:
        supervised, consistency = mean_teacher(forward, average, batch, how)
        weight = consistency_weight(student.without_teachers, batch.step, student.steps)
        return StepLoss(supervised + weight * consistency, {"supervised": supervised, "consistency": consistency})

    return loss_of


def _open_caches(project: Project, dataset: TrainingSet) -> dict[str, TargetCache]:
    """The teacher caches of a training. Raises a CacheError if a cache was made from something else, or lacks an image; ParamsError
    if a loss term needs what its teacher does not give."""
    losses, caches = project.params.losses, dataset.open_caches()
    for name, cache in caches.items():
        say_renamed(f"the teacher cache of {name}", cache.provenance["classes"], dataset.manifest.classes)
    dataset.check_rows()
    for key, name, what in losses.needed:
        if name in caches and not getattr(caches[name].layout, what):
            gives = "names no classes" if what == "classes" else "gives no embeddings"
            raise ParamsError(f"losses.{key}: teacher {name} {gives}; name another one, or set the weight of that term to 0")
    if not losses.other_partition:
        refuse_hidden_labels(caches.values(), dataset.manifest)
    refuse_stale_heads(project, caches)
    if dataset.shardwise is None:
        return caches
    require_copies(dataset)
    return dataset.shardwise.caches
