"""What `mgd-pipeline doctor` checks of the teacher caches: the weights that they need, and the disk space.

A teacher is refused here with the message that precompute-teachers would use. Whatever needs torch is imported late, so that
doctor can report that torch cannot be imported.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from mgd_pipeline.access import is_there
from mgd_pipeline.caches.copies import ShardFolder, copies_folder
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.data.manifest import Manifest
from mgd_pipeline.errors import shell_command
from mgd_pipeline.params import HeadTeacher, NetworkParams, SmpTeacher
from mgd_pipeline.words import counted, size_text
from mgd_stages.doctor.checks import Check, Checks, guarded, nearest, of_error
from mgd_stages.run.machine import unmovable, unwritable
from mgd_stages.run.project import Project, networks_of, output_folders, seen_sizes

Usable = tuple[dict[str, Any], tuple[int, int]]
"""For a teacher whose weights are there: provenance of its teacher cache, and the cache's numbers of classes and features."""


def weights(project: Project, manifest: Manifest | None, *, partition: bool) -> Checks[dict[str, Usable]]:
    """Weights of the student's encoder and of the teachers; returns what is known of each usable teacher.

    `partition` says whether `manifest` has the whole partition.
    """
    usable: dict[str, Usable] = {}
    fits = {}
    for key, network in networks_of(project.params).items():
        fits[key] = yield from guarded("weights", _network(project, key, network, manifest))
    if fits["student.network"]:
        yield from guarded("weights", _encoder(project, "student.network", project.params.student.network))
    for name in project.params.teachers:
        if not fits.get(f"teachers.{name}", True):
            continue  # its weights would only repeat the problem
        teacher = yield from guarded("weights", _teacher(project, name, manifest, partition))
        if teacher:
            usable[name] = teacher
    return usable


def _network(project: Project, key: str, network: NetworkParams, manifest: Manifest | None) -> Checks[bool]:
    """Nothing for a network that can be built and can see these images."""
    from mgd_pipeline.networks.segmentation import check_network

    check_network(key, network, seen_sizes(project.params, key, manifest))
    yield from ()
    return True


def _encoder(project: Project, key: str, network: NetworkParams) -> Checks[None]:
    from mgd_pipeline.networks.encoders import resolve_encoder_weights

    path = resolve_encoder_weights(network.encoder, network.encoder_weights, project.base, fetch=False)
    if path is not None:
        yield Check("weights", "ok", f"{key}: {network.encoder} starts from {path}")
    elif network.encoder_weights == "none":
        yield Check("weights", "ok", f"{key}: {network.encoder} starts from random weights")
    else:
        offline = bool(os.environ.get("HF_HUB_OFFLINE", "0").strip("0"))
        remedy = (
            "the training fetches them where the hub can be reached; elsewhere copy a connected machine's hub cache, or write the "
            "path of a file as encoder_weights"
        )
        fact = f"{key}: ImageNet weights of {network.encoder} are not on this machine"
        yield Check("weights", "problem" if offline else "warning", fact, remedy)


def _teacher(project: Project, name: str, manifest: Manifest | None, partition: bool) -> Checks[Usable | None]:
    import torch

    from mgd_pipeline.data.classes import check_classes_of
    from mgd_pipeline.data.datasets import names_of
    from mgd_pipeline.networks.weights import read_metadata, read_state_dict, require_access
    from mgd_pipeline.teachers.fetching import check_published
    from mgd_pipeline.teachers.probing import no_sizes
    from mgd_stages.run.loaded_head import load_any
    from mgd_stages.run.loaded_teacher import LoadedTeacher, other_size, probed_sizes

    params, path = project.params, project.teacher(name)
    teacher = params.teachers[name]
    make = shell_command("mgd-pipeline", "train-teacher", "--teacher", name)
    check_classes_of(f"teachers.{name}", teacher, names_of(params.data).classes)
    require_access(path)
    if isinstance(teacher, HeadTeacher) and not (is_there(path) and is_there(project.targets(teacher.of))):
        where = project.targets(teacher.of)
        fact = f"teachers.{name} is a head on the embeddings of {teacher.of}: `{make}` trains it when {where} is there"
        yield Check("weights", "ok", fact)
        return None
    if not is_there(path):
        if name not in params.train_teachers:
            remedy = f"put it there, or name {name} in train_teachers"
            yield Check("weights", "problem", f"teachers.{name}.weights: {path}: no such file", remedy)
            return None
        sizes = no_sizes if manifest is None else partial(probed_sizes, project, name, manifest)
        check_published(name, teacher, project.base, sizes)
        yield Check("weights", "ok", f"teachers.{name} is not trained yet: `{make}` makes {path}")
        if isinstance(teacher, SmpTeacher):
            yield from _encoder(project, f"teachers.{name}", teacher)
        return None
    if manifest is None:
        tensors, classes = len(read_state_dict(path)), read_metadata(path).get("classes")
        known = f"for the classes {', '.join(classes)}" if classes else "whose classes it does not say"
        yield Check("weights", "ok", f"teachers.{name}: {path} holds {tensors} tensors, {known}")
        return None
    loaded = load_any(project, name, manifest, torch.device("cpu"))
    trained_on = loaded.provenance["teacher"]["trained_on"]
    network = " with ".join(teacher.network_names)
    here = f"{path} fits {network} and the {counted(len(manifest.classes), 'class', 'classes')}"
    if partition and trained_on not in (None, manifest.partition_fingerprint) and not params.losses.other_partition:
        train = f"run `{make}`" if name in (*params.train_teachers, *params.heads) else "train it on this one"
        fact = f"teachers.{name}: {here}, but was trained on the labels of another partition"
        yield Check("weights", "problem", fact, f"{train}, or set losses.other_partition if that is what you study")
    else:
        yield Check("weights", "ok", f"teachers.{name}: {here}")
    if isinstance(loaded, LoadedTeacher) and (size := other_size(loaded)):
        yield Check("weights", "warning", f"teachers.{name} {size[0]}", size[1])
    return loaded.provenance, loaded.channels


def disk(project: Project, manifest: Manifest | None, usable: dict[str, Usable], scale: float) -> Checks[None]:
    """The size of what precompute-teachers still has to make; `scale` for a manifest of some images only."""
    work, data = project.base / ".mgd/work", project.base / "data"
    for problem in dict.fromkeys(problem for folder in output_folders(project) if (problem := unwritable(folder))):
        yield from of_error("disk", problem)
    places = {".mgd/work": work, "data": data, "data/targets": data / "targets"}
    free = {name: shutil.disk_usage(nearest(path)).free for name, path in places.items()}
    shown = f"{size_text(free['.mgd/work'])} are free in .mgd/work, {size_text(free['data'])} in data"
    if manifest is None or not manifest.training:
        yield Check("disk", "ok", f"{shown}; the size of the targets is known when the data set is there")
    else:
        yield from _to_make(project, manifest, usable, scale, min(free.values()), shown)
    copies = ShardFolder(copies_folder(), 0)
    if (used := copies.used()) > 0:
        fact = f"{size_text(used)} of copies of teacher caches at URLs (train-student --cache-from) in {copies.folder}"
        yield Check("disk", "ok", f"{fact}, which may be deleted")
    for name in project.params.teachers:
        if os.path.lexists(project.targets(name)):
            yield from guarded("disk", _cache(project.targets(name)))
    if unwritable(work) or unwritable(data / "targets"):
        return
    if apart := unmovable(work, data / "targets"):
        yield Check("disk", "problem", *apart)
    else:
        yield Check("disk", "ok", ".mgd/work and data/targets are on one file system")


def _to_make(project: Project, manifest: Manifest, usable: dict[str, Usable], scale: float, free: int, shown: str) -> Checks[None]:
    """Whether the targets that each teacher has to make fit; a teacher whose size only its weights can tell is left out."""
    from mgd_pipeline.caches.provenance import expected_provenance
    from mgd_stages.run.teacher_cache import MORE_SPACE, estimate_cache

    needed: dict[str, float] = {}
    for name, teacher in project.params.teachers.items():
        if name in usable:
            provenance, channels = usable[name]
        elif isinstance(teacher, SmpTeacher):
            # Without weights the cache has no identity yet: no cache that is there can be it, so all targets are to be made.
            provenance = expected_provenance(teacher, project.params.targets, manifest.classes, manifest.long_side)
            channels = len(manifest.classes), teacher.decoder_channels
        else:
            yield Check("disk", "ok", f"the size of the targets of {name} is known when its weights are there")
            continue
        needed[name] = estimate_cache(project, name, manifest, provenance, channels).new_bytes * scale
    total, about = sum(needed.values()), "about " if scale != 1 else ""
    each = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in needed.items())
    fact = f"targets to make: {about}{total / 1e6:,.1f} MB ({each}); {shown}"
    if total > free:
        yield Check("disk", "problem", fact, MORE_SPACE)
    else:
        yield Check("disk", "ok", fact if total else f"no targets are left to compute; {shown}")


def _cache(path: Path) -> Checks[None]:
    """Nothing for a teacher cache that can be opened; `mgd-pipeline cache verify` checks its content."""
    open_cache(path)
    yield from ()
