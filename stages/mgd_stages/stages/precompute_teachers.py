"""Stage 3, precompute-teachers: each frozen teacher sees each training image once; its targets go into its teacher cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mgd_pipeline.caches.build import Plan, build_shards, plan_cache, publish
from mgd_pipeline.caches.fidelity import what_is_kept
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.caches.shards import Shard
from mgd_pipeline.caches.statistics import training_keys
from mgd_pipeline.data.datasets import names_of
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.errors import CacheError
from mgd_pipeline.networks.weights import choice_of_state_dict
from mgd_pipeline.words import counted, verb
from mgd_stages.run.loaded_head import Loaded, LoadedHead, load_any
from mgd_stages.run.loaded_teacher import other_size, say_kept, say_unrecorded_input
from mgd_stages.run.machine import require_writable
from mgd_stages.run.progress import console, progress, say_renamed
from mgd_stages.run.project import Project
from mgd_stages.run.teacher_batches import Batching, OnError, named_errors, teacher_compute
from mgd_stages.run.teacher_cache import CacheEstimate, estimate_cache, note_names, require_place
from mgd_stages.run.teacher_check import check_teacher_sees
from mgd_stages.run.teacher_quality import evaluate_teacher, quality_files

Elsewhere = Callable[[Project, str, Plan, Sequence[Shard], Callable[[int, str], None]], int]
"""Has shards of a teacher's cache built by other processes (`cluster`); returns how many images they computed."""


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
    """Runs one teacher over all labelled and unlabelled training images, then measures it on the evaluation split. A head runs over
    the cached embeddings of its teacher instead, for which that cache holds the evaluation split, too.

    A killed run loses one shard at most: images that an earlier run has stored are not computed again. Several processes may run
    this at the same time, each all of it or its own `shards`; the process that finishes the last shard publishes the cache.
    `batch_size` 0 takes what the memory allows. `on_error` skip leaves out images that cannot be read, and the cache records them.
    A teacher that seems to get a wrong input, to name its classes in another order, or to reach less than `min_miou` (0 to 1) on a
    few labelled images is refused before anything is computed; with a `min_miou` also if its cache is there already. Writes
    data/targets/<name>.zarr and data/results/teachers/<name>.json.
    """
    manifest = read_manifest(project.manifest, project.base, names_of(project.params.data))
    require_writable(files=quality_files(project, name))

    # --- the frozen teacher; beside workers only its identity is needed here, and the device is left to the workers
    loaded = load_any(project, name, manifest, torch.device("cpu") if elsewhere else device)
    if not isinstance(loaded, LoadedHead):
        say_unrecorded_input(loaded)
        say_kept(loaded)
        if size := other_size(loaded):
            console.print(f"teacher {name} {size[0]}; {size[1]}")
    if loaded.labels is not None:
        say_renamed(f"teacher {name}", loaded.labels, manifest.classes)
    if (choice := choice_of_state_dict(project.teacher(name))) is not None:
        console.print(f"teacher {name}: {choice}")

    # --- what its cache lacks; refused if there is no room, or if the teacher is not what it seems to be
    estimate = estimate_cache(project, name, manifest, loaded.provenance, loaded.channels)
    require_place(project, estimate)
    if estimate.layout.classes and (estimate.new or min_miou):
        check_teacher_sees(loaded, min_miou)

    # --- the missing shards; there is no plan if the published cache has all images
    retry, computed = on_error == "stop", 0
    plan = plan_cache(estimate.work, estimate.output, estimate.provenance, estimate.layout, estimate.images, retry_skipped=retry)
    if plan is not None:
        note_names(estimate)
        computed = _compute(loaded, plan, Batching(device, batch_size, on_error), shards, elsewhere)
        if _lacks_shards(plan, name, shards, computed):
            return
        publish(plan, training_keys(manifest, mirrored=project.params.targets.mirrored))
    _say_what_is_there(loaded, estimate, computed)

    # --- how good the teacher is on held-out images
    (loaded.head if isinstance(loaded, LoadedHead) else loaded.teacher.network).to(device)
    evaluate_teacher(loaded)


def _compute(loaded: Loaded, plan: Plan, batching: Batching, chosen: slice, elsewhere: Elsewhere | None) -> int:
    """Computes the chosen shards that are missing, here or by other processes; returns how many images were computed."""
    name = loaded.name
    mine = {shard.number for shard in plan.shards[chosen]}
    todo = [shard for shard in plan.todo if shard.number in mine]
    total = sum(len(shard.keys) for shard in plan.shards if shard.number in mine)
    done = total - sum(len(shard.keys) for shard in todo)
    with progress(f"precompute-teachers {name}", total, "image", done) as advance:
        if elsewhere is not None:
            return elsewhere(loaded.project, name, plan, todo, lambda more, note: advance(done + more, note))
        with named_errors(name, batching):
            compute = teacher_compute(loaded, batching)
            return build_shards(plan, todo, compute, batching.made_by(), lambda more: advance(done + more, ""))


def _lacks_shards(plan: Plan, name: str, chosen: slice, computed: int) -> bool:
    """Whether shards are missing that other processes were asked for. Raises CacheError if nobody else was asked."""
    missing = plan.missing()
    if not missing:
        return False
    if len(plan.shards[chosen]) == len(plan.shards):
        raise CacheError(f"{plan.work}/shards/{missing[0].name}: has disappeared again; run the same command once more")
    console.print(
        f"targets of {name}: {counted(computed, 'image')} computed; {len(missing)} of {counted(len(plan.shards), 'shard')} "
        f"{verb(len(missing), 'is', 'are')} missing yet: "
        "whoever finishes the last one publishes the cache, or the same command without --shards"
    )
    return True


def _say_what_is_there(loaded: Loaded, estimate: CacheEstimate, computed: int) -> None:
    cache, images = open_cache(estimate.output), estimate.images
    index = cache.index
    skipped = [image.key.image_id for image in images if image.key not in index.place]
    for problem in dict.fromkeys(index.problems[index.by_id[image_id]] for image_id in skipped):
        console.print(f"skipped: {problem}")
    mirrored = " and mirror images" if loaded.project.params.targets.mirrored else ""
    kind = f"{verb(len(images), 'image', 'images')}{mirrored}"
    made = f"{computed} of {len(images)} {kind} computed" if computed else f"all images{mirrored} were there already"
    less = f", {len(skipped)} skipped" if skipped else ""
    console.print(f"targets of {loaded.name}: {made}{less} -> {estimate.output}")
    if (kept := what_is_kept(cache)) is not None:
        console.print(f"targets of {loaded.name}: {kept}")
