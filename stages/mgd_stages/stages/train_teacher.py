"""Stage 2, train-teacher: cross pseudo supervision (CPS) with CutMix, one teacher at a time.

As in MGD: two branches of one architecture, with different initial decoders, teach each other on CutMixed unlabelled images; the
first branch is the teacher.
"""

from __future__ import annotations

from functools import partial

import torch

from mgd_pipeline.data.datasets import names_of
from mgd_pipeline.data.manifest import read_manifest, require_classes
from mgd_pipeline.distillation.losses import Ohem, pixel_consistency_loss, supervised_loss
from mgd_pipeline.durable import renew_folder, replace_file
from mgd_pipeline.errors import NonFiniteError, ParamsError
from mgd_pipeline.networks.encoders import normalisation
from mgd_pipeline.networks.normalisation import Normalisation
from mgd_pipeline.networks.segmentation import SegmentationNetwork, build_network, check_network, upsample
from mgd_pipeline.networks.weights import save_weights, size_of_state
from mgd_pipeline.params import HeadTeacher, NetworkParams, SmpTeacher, TeacherTrainingParams
from mgd_pipeline.teachers.fetching import fetch_teacher
from mgd_pipeline.teachers.probing import no_sizes
from mgd_pipeline.training.batches import Batch, mixed_valid, mixed_views, view_images, view_labels
from mgd_pipeline.training.checkpoint import TrainingCheckpoint
from mgd_pipeline.training.dataset import TrainingSet, refuse_hidden_labels
from mgd_pipeline.training.heads import HeadLosses, train_head
from mgd_stages.run.loaded_head import base_cache
from mgd_stages.run.loaded_teacher import probed_sizes, seen_unlabelled
from mgd_stages.run.loop import Training, train
from mgd_stages.run.machine import Machine, require_room, require_writable
from mgd_stages.run.outputs import check_outputs, image_cache
from mgd_stages.run.progress import MetricsLog, console, progress
from mgd_stages.run.project import Project, check_teacher, key_of, manifest_hash
from mgd_stages.run.ranks import ranks_of_torchrun
from mgd_stages.run.sinks import open_sink
from mgd_stages.run.unfinished import other_input, settings_note

_LOGGED = 10
"""Steps of a head between two values of its curves."""


def train_teacher(project: Project, name: str, machine: Machine) -> None:
    """Trains `params.teachers[name]` on the partition and writes its weights, safetensors with their origin noted.

    A teacher that is published with weights (torchvision, transformers, timm) is fetched instead. A head is trained on the cached
    embeddings of its teacher.
    """
    check_teacher(project, name)
    if ranks_of_torchrun()[1] > 1:
        raise ParamsError("train-teacher runs in one process; call it without torchrun")
    params = project.params
    if name in params.heads:
        return _train_head(project, name, machine)
    if name not in params.train_teachers:
        raise ParamsError(
            f"teacher {name!r} is not in train_teachers; its finished weights are expected at {params.teachers[name].weights}"
        )
    known = names_of(params.data)
    teacher, optimisation, run = params.teachers[name], params.teacher_training, f"train-teacher-{name}"
    if not isinstance(teacher, SmpTeacher):
        require_writable(files=[project.teacher(name)])
        sizes = no_sizes
        if (project.manifest / "images.parquet").is_file():  # prepare-data has seen the images already
            sizes = partial(probed_sizes, project, name, read_manifest(project.manifest, project.base, known))
        fetch_teacher(name, teacher, project.base, sizes)
        # The curves that DVC expects of every teacher: a table without rows, because DVC cannot plot an empty folder.
        renew_folder(project.results / run)
        replace_file(project.results / run / "plots/fetched.tsv", b"step\tfetched\n")
        console.print(f"teacher {name}, as it was published -> {project.teacher(name)}")
        return
    check_network(f"teachers.{name}", teacher, [(params.views.crop[0], params.views.crop[1])])
    manifest = read_manifest(project.manifest, project.base, known)
    require_classes(manifest, manifest.labelled, "the labelled images")
    check_outputs(project, run, project.teacher(name))

    # --- networks: two branches, one without CPS; the seed differs by teacher so that they do not share their randomness
    seed = int(key_of(params.seed, name)[:8], 16)
    torch.manual_seed(seed)
    count = 2 if optimisation.cps else 1
    branches = torch.nn.ModuleList([build_network(teacher, len(manifest.classes), base=project.base) for _ in range(count)])
    require_room(project.teacher(name), size_of_state(branches[0]))
    branches.to(machine.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    normalise = normalisation(teacher.encoder)

    # --- data
    unlabelled = optimisation.cps > 0
    dataset = TrainingSet(
        manifest,
        params.views,
        params.cutmix,
        optimisation,
        seed,
        with_unlabelled=unlabelled,
        image_cache=image_cache(project, manifest, unlabelled=unlabelled) if machine.cache_images else None,
    )

    # --- an interrupted run goes on from its checkpoint
    deciding = {f"teachers.{name}": teacher, "teacher_training": optimisation, "views": params.views, "cutmix": params.cutmix}
    sections = {section: values.model_dump() for section, values in deciding.items()}
    other = other_input(teacher.encoder)
    key = key_of(*sections.values(), seed, manifest_hash(project), machine.device.type, *other)
    settings = settings_note(project, sections, machine.device)
    checkpoint = TrainingCheckpoint(project.work(run), key, settings, optimisation.steps)

    # --- training
    def loss_of(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        supervised, cross = _losses(branches, batch, normalise, optimisation, params.views.colour_jitter)
        return supervised + cps_weight(optimisation, batch.step) * cross, {"supervised": supervised, "cross": cross}

    with open_sink(machine.log_to, project, run) as sink:
        log = MetricsLog(project.results / run, sink)
        advice = "lower teacher_training.learning_rate"
        training = Training(f"train-teacher {name}", dataset, loss_of, branches, branches[0], checkpoint, log, advice)
        network = train(training, machine)

    # --- result
    assert isinstance(network, SegmentationNetwork)
    log.write()
    save_weights(
        project.teacher(name),
        network.model.state_dict(),
        {
            "kind": "teacher",
            "network": teacher.model_dump(include=set(NetworkParams.model_fields)),
            "classes": list(manifest.classes),
            "trained_on": manifest.partition_fingerprint,
            "labelled_images": len(manifest.labelled),
            # Only if it is needed: other teachers keep the bytes, and so the caches, of version 0.1.0.
            **({"normalisation": [list(normalise.mean), list(normalise.std)]} if other else {}),
            **(seen_unlabelled(manifest) if unlabelled and params.retrain_teachers == "new-labels" else {}),
        },
    )
    checkpoint.remove()
    console.print(f"teacher {name} -> {project.teacher(name)}")


def _train_head(project: Project, name: str, machine: Machine) -> None:
    """Trains a head; neither the network behind its embeddings nor the weights of that network are read."""
    params, run = project.params, f"train-teacher-{name}"
    head = params.teachers[name]
    assert isinstance(head, HeadTeacher)
    manifest = read_manifest(project.manifest, project.base, names_of(params.data))
    require_classes(manifest, manifest.labelled, "the labelled images")
    check_outputs(project, run, project.teacher(name))
    cache = base_cache(project, name, manifest)
    if not params.losses.other_partition:
        refuse_hidden_labels([cache], manifest)
    renew_folder(project.results / run)
    seed = int(key_of(params.seed, name)[:8], 16)
    with open_sink(machine.log_to, project, run) as sink, progress(f"train-teacher {name}", head.steps, "step") as advance:
        log = MetricsLog(project.results / run, sink)

        def note(done: int, losses: HeadLosses) -> None:
            advance(done, f"loss {losses.labelled:.3f}")
            if done % _LOGGED == 0 or done == head.steps:
                values = {"labelled": losses.labelled, "unlabelled": losses.unlabelled}
                log.log(done, {key: value for key, value in values.items() if value is not None})

        try:
            network = train_head(head, cache, manifest, seed=seed, device=machine.device, advance=note)
        except NonFiniteError as error:
            raise NonFiniteError(f"teachers.{name}: {error}") from None
    log.write()
    # The teacher behind a head may know further labels (losses.other_partition); then the head knows both lists of labels.
    known = {manifest.partition_fingerprint, cache.provenance["teacher"].get("trained_on")} - {None}
    save_weights(
        project.teacher(name),
        network.state_dict(),
        {
            "kind": "head",
            "head": head.head,
            "classes": list(manifest.classes),
            "trained_on": known.pop() if len(known) == 1 else key_of(sorted(known)),
            "labelled_images": len(manifest.labelled),
            "of": head.of,
            # With the generation, so that the file changes whenever the cache does: DVC then makes the targets of new images.
            "cache": {"fingerprint": cache.fingerprint, "generation": cache.generation},
            **(seen_unlabelled(manifest) if head.self_training else {}),
        },
    )
    console.print(f"teacher {name}, a {head.head} head on the embeddings of {head.of} -> {project.teacher(name)}")


def cps_weight(params: TeacherTrainingParams, step: int) -> float:
    """The weight of the cross term at a step: a straight line from near 0 to `cps` over the first `cps_rampup` of the steps.

    The ramp is not MGD's; Temporal Ensembling (Laine and Aila, ICLR 2017) has one, a Gaussian. The first pseudo labels of
    networks without pre-trained weights are wrong, and a short run does not recover from them (figures in docs/log.md).
    """
    return params.cps * min(1.0, (step + 1) / max(1.0, params.cps_rampup * params.steps))


def _losses(
    branches: torch.nn.ModuleList, batch: Batch, normalise: Normalisation, optimisation: TeacherTrainingParams, jitter: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Supervised and cross terms of one step, each summed over the branches; the cross term is 0 without unlabelled images."""
    labels = view_labels(batch.labelled)
    inputs = view_images(batch.labelled, normalise, jitter)
    size, count = (inputs.shape[-2], inputs.shape[-1]), len(batch.labelled.rows)
    ohem = None if optimisation.ohem is None else Ohem(optimisation.ohem.threshold, optimisation.ohem.min_kept)
    autocast = torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=optimisation.precision == "bfloat16")

    def logits(branch: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        with autocast:
            outputs = branch(images.contiguous(memory_format=torch.channels_last))
        return upsample(outputs.logits.float(), size)

    if batch.unlabelled is None:
        supervised = torch.stack([supervised_loss(logits(branch, inputs), labels, ohem=ohem) for branch in branches])
        return supervised.sum(), inputs.new_zeros(())
    valid = mixed_valid(batch)
    plain = [view_images(source, normalise, 0) for source in batch.mixed]
    strong = [view_images(source, normalise, jitter) for source in batch.mixed]
    with torch.no_grad():
        # Logits of the unmixed views are mixed, then argmax: as MGD, not the logits of the mixed image.
        unmixed = [logits(branch, torch.cat(plain)).chunk(len(plain)) for branch in branches]
        guides = [mixed_views(batch, seen) for seen in unmixed]
    inputs = torch.cat([inputs, mixed_views(batch, strong)])
    outputs = [logits(branch, inputs) for branch in branches]
    supervised = [supervised_loss(output[:count], labels, ohem=ohem) for output in outputs]
    pairs = zip(outputs, reversed(guides), strict=True)
    cross = [pixel_consistency_loss(output[count:], guide, valid=valid) for output, guide in pairs]
    return torch.stack(supervised).sum(), torch.stack(cross).sum()
