"""The sections of the report about what was made from what: images, teachers, teacher caches, students, and their identities."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from mgd_pipeline.caches.format import count_images
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.data.manifest import Manifest
from mgd_pipeline.errors import AccessError, CacheError
from mgd_pipeline.params import STUDENTS, SmpTeacher
from mgd_pipeline.words import counted, listed
from mgd_stages.reports.sections import identity_of, plain, steps_of
from mgd_stages.run.project import Project, manifest_hash
from mgd_stages.run.verdicts import LABELS

Caches = Mapping[str, TargetCache | str]
"""By teacher its cache, or why it cannot be described."""


def open_teacher_cache(project: Project, name: str) -> TargetCache | str:
    """A teacher's cache, or why it cannot be described."""
    try:
        return open_cache(project.targets(name))
    except (AccessError, CacheError) as error:
        return plain(project, error)


def measured_on(manifest: Manifest | str, split: str, images: int | None, caches: Caches) -> str:
    """Where mIoU was measured, as half a sentence: the split, on how many images, and who saw these in training.

    `images` is the number of images on which the students were measured, None if unknown. What a teacher from elsewhere was
    trained on is not known here.
    """
    if images is None and not isinstance(manifest, str):
        images = sum(row.mask_path is not None for row in manifest.split(split))
    where = f"the {split} split" if images is None else f"the {split} split ({counted(images, 'image')})"
    if isinstance(manifest, str):
        return where
    declared = sum(row.split == split for row in manifest.declared)
    if declared:
        return f"{where}, {declared} of which students saw without labels"
    foreign = [name for name, cache in caches.items() if _trained_on(cache) != manifest.partition_fingerprint]
    if not foreign:
        return f"{where}, which nothing was trained on"
    who = f"{'teacher' if len(foreign) == 1 else 'teachers'} {listed(foreign)}"
    return f"{where}, which no student was trained on; whether {who} learnt from them is not recorded"


def _trained_on(cache: TargetCache | str) -> object:
    """Fingerprint of the labelled images that a cache's teacher learnt from; None if unknown."""
    return None if isinstance(cache, str) else cache.provenance["teacher"].get("trained_on")


def origins(
    project: Project, manifest: Manifest | str, caches: Caches, students: dict[str, dict[str, Any]]
) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """What was made from what: (heading, [(thing, lines)]) in the order in which things were made."""
    params = project.params
    if isinstance(manifest, str):
        images = [manifest]
    else:
        share = params.data.partition if isinstance(params.data.partition, str) else "by id lists"
        images = [
            f"{len(manifest.labelled)} labelled, {len(manifest.unlabelled)} unlabelled (partition {share})",
            f"held out: {len(manifest.split('val'))} val, {len(manifest.split('test'))} test",
            counted(len(manifest.classes), "class", "classes"),
        ]
    teachers, targets, made = [], [], []
    for name, cache in caches.items():
        teacher, trained_on = params.teachers[name], _trained_on(cache)
        lines = [identity_of(teacher)]
        if name in params.train_teachers:
            here = isinstance(teacher, SmpTeacher)
            lines.append(f"trained here for {counted(steps_of(project, name), 'step')}" if here else "fetched as it was published")
        if name in params.heads:
            lines.append(f"trained here on the embeddings of {params.heads[name]}")
        if trained_on is None and not isinstance(cache, str):
            lines.append("what it was trained on is not recorded")
        elif trained_on is not None and not isinstance(manifest, str):
            same = trained_on == manifest.partition_fingerprint
            hears = name in params.train_teachers and params.training_of(name).uses_unlabelled and manifest.unlabelled
            more = " and the unlabelled images" if hears else ""
            lines.append(f"from the same labelled images{more}" if same else "from labelled images of another partition")
        teachers.append((f"teacher {name}", lines))
        if isinstance(cache, str):
            targets.append((f"targets of {name}", [cache]))
        else:
            # A cache behind heads holds the evaluation split, too.
            count = counted(count_images(cache.index.place), "image" if name in params.heads.values() else "training image")
            targets.append((f"targets of {name}", [count, cache.fingerprint[:12]]))
    for key, notes in students.items():
        built, labelled, used = notes.get("network", {}), notes.get("labelled_images"), notes.get("teachers", {})
        labels = "labelled images not recorded" if labelled is None else counted(labelled, "labelled image")
        lines = [f"{built.get('decoder')}, {built.get('encoder')}", f"{counted(steps_of(project, key), 'step')}, {labels}"]
        made.append((LABELS[key], [*lines, f"and the targets of {' and '.join(used)}" if used else "and nothing else"]))
    return [
        ("Images", [(params.data.dataset, images)]),
        ("Teachers", teachers),
        ("Stored targets", targets),
        ("Students", made or [("none", ["run mgd-pipeline train-student"])]),
    ]


def left_out(manifest: Manifest | str, caches: Caches) -> dict[str, list[str]]:
    """Ids of the images that each stage left out, by the name of the stage."""
    skipped = [] if isinstance(manifest, str) else [bad.image_id for bad in manifest.skipped]
    lacking = [
        key.image_id
        for cache in caches.values()
        if not isinstance(cache, str)
        for key, problem in zip(cache.index.keys, cache.index.problems, strict=True)
        if problem and key not in cache.index.place
    ]
    return {"prepare-data": sorted(skipped), "precompute-teachers": sorted(set(lacking))}


def storage(project: Project, caches: Caches) -> list[dict[str, Any]]:
    """Bytes of what was made; of the teacher caches also for each image."""
    rows = []
    for name, cache in caches.items():
        if not isinstance(cache, str):
            size, images = sum(file["size"] for file in cache.commit["files"].values()), count_images(cache.index.place)
            rows.append({"label": f"targets of {name}", "bytes": size, "images": images, "each": size / max(images, 1)})
    files = {f"teacher {name}": project.teacher(name) for name in caches} | {LABELS[key]: project.student(key) for key in STUDENTS}
    made = {label: path.stat().st_size for label, path in files.items() if path.is_file()}
    return rows + [{"label": label, "bytes": size, "images": None, "each": None} for label, size in made.items()]


def provenance(
    project: Project, manifest: Manifest | str, caches: Caches, students: dict[str, dict[str, Any]]
) -> list[tuple[str, str, str]]:
    """(thing, kind of identity, identity): what a colleague compares to know whether both have the same."""
    rows = []
    if not isinstance(manifest, str):
        rows.append(("manifest", "SHA-256 of its two files", manifest_hash(project)))
        rows.append(("partition", "SHA-256 of the labelled ids", manifest.partition_fingerprint))
    for name, cache in caches.items():
        if isinstance(cache, str):
            rows.append((f"targets of {name}", "not here", cache))
            continue
        makers = [
            ", ".join(f"{key} {value}" for key, value in sorted(shard["made_by"].items())) for shard in cache.commit["shards"]
        ]
        rows += [
            (f"teacher {name}", "SHA-256 of its weights", str(cache.provenance["teacher"].get("weights_sha256"))),
            (f"targets of {name}", f"fingerprint, generation {cache.generation}", cache.fingerprint),
            (f"targets of {name}", "made by", "; ".join(sorted(set(makers)))),
        ]
    for key, notes in students.items():
        rows.append((LABELS[key], "SHA-256 of the file", hashlib.sha256(project.student(key).read_bytes()).hexdigest()))
        for name, (fingerprint, generation) in notes.get("teachers", {}).items():
            cache = caches.get(name, "")
            here = not isinstance(cache, str) and [cache.fingerprint, cache.generation] == [fingerprint, generation]
            state = "the teacher cache that is here" if here else "not the teacher cache that is here now"
            rows.append((LABELS[key], f"trained from targets of {name}", f"{fingerprint}, generation {generation}: {state}"))
    return rows
