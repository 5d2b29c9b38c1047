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
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.networks.encoders import normalisation
from mgd_pipeline.networks.normalisation import Normalisation
from mgd_pipeline.networks.segmentation import SegmentationNetwork, build_branches, check_network, run_branches
from mgd_pipeline.networks.weights import save_weights, size_of_state
from mgd_pipeline.params import NetworkParams, SmpTeacher, TeacherTrainingParams
from mgd_pipeline.teachers.fetching import fetch_teacher
from mgd_pipeline.teachers.probing import no_sizes
from mgd_pipeline.training.batches import Batch, mixed_valid, mixed_views, view_images, view_labels
from mgd_pipeline.training.checkpoint import TrainingCheckpoint
from mgd_pipeline.training.dataset import TrainingSet
from mgd_stages.run.loaded_teacher import probed_sizes, seen_unlabelled
from mgd_stages.run.loop import Training, train
from mgd_stages.run.machine import Machine, require_room, require_writable
from mgd_stages.run.outputs import check_outputs, image_cache
from mgd_stages.run.progress import MetricsLog, console
from mgd_stages.run.project import Project, check_teacher, key_of, manifest_hash
from mgd_stages.run.ranks import ranks_of_torchrun
from mgd_stages.run.sinks import open_sink
from mgd_stages.run.unfinished import other_input, settings_note


def train_teacher(project: Project, name: str, machine: Machine) -> None:
    """Trains `params.teachers[name]` on the partition and writes its weights, safetensors with their origin noted.

    A teacher that is published with weights (torchvision, transformers, timm) is fetched instead.
    """
    check_teacher(project, name)
    if ranks_of_torchrun()[1] > 1:
        raise ParamsError("train-teacher runs in one process; call it without torchrun")
    params = project.params
    if name not in params.train_teachers:
        raise ParamsError(
            f"teacher {name!r} is not in train_teachers; its finished weights are expected at {params.teachers[name].weights}"
        )
    known = names_of(params.data)
    teacher, optimisation, run = params.teachers[name], params.training_of(name), f"train-teacher-{name}"
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
    frozen, classes = optimisation.frozen_encoder, len(manifest.classes)
    branches = torch.nn.ModuleList(build_branches(teacher, classes, count, base=project.base, frozen_encoder=frozen))
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
    count = len(batch.labelled.rows)
    ohem = None if optimisation.ohem is None else Ohem(optimisation.ohem.threshold, optimisation.ohem.min_kept)
    autocast = torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=optimisation.precision == "bfloat16")

    def logits(images: torch.Tensor) -> list[torch.Tensor]:
        """Of each branch."""
        with autocast:
            return run_branches([*branches], images.contiguous(memory_format=torch.channels_last))

    if batch.unlabelled is None:
        supervised = torch.stack([supervised_loss(output, labels, ohem=ohem) for output in logits(inputs)])
        return supervised.sum(), inputs.new_zeros(())
    valid = mixed_valid(batch)
    plain = [view_images(source, normalise, 0) for source in batch.mixed]
    strong = [view_images(source, normalise, jitter) for source in batch.mixed]
    with torch.no_grad():
        # Logits of the unmixed views are mixed, then argmax: as MGD, not the logits of the mixed image.
        guides = [mixed_views(batch, seen.chunk(len(plain))) for seen in logits(torch.cat(plain))]
    inputs = torch.cat([inputs, mixed_views(batch, strong)])
    outputs = logits(inputs)
    supervised = [supervised_loss(output[:count], labels, ohem=ohem) for output in outputs]
    pairs = zip(outputs, reversed(guides), strict=True)
    cross = [pixel_consistency_loss(output[count:], guide, valid=valid) for output, guide in pairs]
    return torch.stack(supervised).sum(), torch.stack(cross).sum()
