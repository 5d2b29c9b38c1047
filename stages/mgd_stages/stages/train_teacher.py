"""Stage 2, train-teacher: semi-supervised training with CutMix, one teacher at a time.

As in MGD, by cross pseudo supervision (CPS): two branches of one architecture, with different initial decoders, teach each other on
CutMixed unlabelled images; the first branch is the teacher. Or by mean-teacher: a network learns what its own moving average says.
"""

from __future__ import annotations

from functools import partial

import torch

from mgd_pipeline.data.classes import check_classes_of
from mgd_pipeline.data.datasets import names_of
from mgd_pipeline.data.manifest import read_manifest, require_classes
from mgd_pipeline.durable import renew_folder, replace_file
from mgd_pipeline.errors import NonFiniteError, ParamsError
from mgd_pipeline.networks.encoders import normalisation
from mgd_pipeline.networks.segmentation import SegmentationNetwork, build_branches, check_network
from mgd_pipeline.networks.weights import save_weights, size_of_state
from mgd_pipeline.params import HeadTeacher, NetworkParams, SmpTeacher, TeacherParams
from mgd_pipeline.teachers.fetching import fetch_teacher
from mgd_pipeline.teachers.probing import no_sizes
from mgd_pipeline.training.batches import Batch
from mgd_pipeline.training.checkpoint import TrainingCheckpoint
from mgd_pipeline.training.dataset import TrainingSet, refuse_hidden_labels
from mgd_pipeline.training.heads import HeadLosses, train_head
from mgd_pipeline.training.optimisation import StepLoss, build_average, consistency_weight
from mgd_pipeline.training.semi_supervised import cross_pseudo_supervision, mean_teacher, settings
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
    teacher, optimisation, run = params.teachers[name], params.training_of(name), f"train-teacher-{name}"
    check_classes_of(f"teachers.{name}", teacher, names_of(params.data).classes)
    if not isinstance(teacher, SmpTeacher):
        _fetch(project, name, teacher)
        return
    check_network(f"teachers.{name}", teacher, [(params.views.crop[0], params.views.crop[1])])
    manifest = read_manifest(project.manifest, project.base, names_of(params.data))
    require_classes(manifest, manifest.labelled, "the labelled images")
    check_outputs(project, run, project.teacher(name))

    # --- networks: two branches with CPS, else one; the seed differs by teacher so that they do not share their randomness
    seed = int(key_of(params.seed, name)[:8], 16)
    torch.manual_seed(seed)
    unlabelled = optimisation.uses_unlabelled
    count = 2 if optimisation.method == "cps" and unlabelled else 1
    frozen, classes = optimisation.frozen_encoder, len(manifest.classes)
    branches = torch.nn.ModuleList(build_branches(teacher, classes, count, base=project.base, frozen_encoder=frozen))
    require_room(project.teacher(name), size_of_state(branches[0]))
    branches.to(machine.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    average = build_average(branches[0], optimisation)
    normalise = normalisation(teacher.encoder)

    # --- data
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
    note = settings_note(project, sections, machine.device)
    checkpoint = TrainingCheckpoint(project.work(run), key, note, optimisation.steps)

    # --- training
    how = settings(optimisation, normalise, params.views.colour_jitter, manifest, machine.device)

    def loss_of(batch: Batch) -> StepLoss:
        if optimisation.method == "mean-teacher" and average is not None and unlabelled:
            term, (supervised, unsupervised) = "consistency", mean_teacher(branches[0], average.eval(), batch, how)
        else:
            term, (supervised, unsupervised) = "cross", cross_pseudo_supervision([*branches], batch, how)
        weight = consistency_weight(optimisation, batch.step, optimisation.steps)
        return StepLoss(
            supervised + weight * unsupervised, {"supervised": supervised} | ({term: unsupervised} if unlabelled else {})
        )

    with open_sink(machine.log_to, project, run) as sink:
        log = MetricsLog(project.results / run, sink)
        advice = "lower teacher_training.learning_rate"
        training = Training(f"train-teacher {name}", dataset, loss_of, branches, branches[0], average, checkpoint, log, advice)
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


def _fetch(project: Project, name: str, teacher: TeacherParams) -> None:
    require_writable(files=[project.teacher(name)])
    sizes = no_sizes
    if (project.manifest / "images.parquet").is_file():  # prepare-data has seen the images already
        manifest = read_manifest(project.manifest, project.base, names_of(project.params.data))
        sizes = partial(probed_sizes, project, name, manifest)
    fetch_teacher(name, teacher, project.base, sizes)
    # The curves that DVC expects of every teacher: a table without rows, because DVC cannot plot an empty folder.
    folder = project.results / f"train-teacher-{name}"
    renew_folder(folder)
    replace_file(folder / "plots/fetched.tsv", b"step\tfetched\n")
    console.print(f"teacher {name}, as it was published -> {project.teacher(name)}")


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
