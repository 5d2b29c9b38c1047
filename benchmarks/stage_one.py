"""What does stage one cost beyond the bare forward passes of its teacher? Decoding, encoding, writing, syncing and publishing.

python benchmarks/stage_one.py

Times are medians over rounds in which every arm has its turn (`mgd_stages.tools.bench`); each arm starts with an empty work folder.
Images a second of the whole stage, from reading the files to the published teacher cache. Not counted: loading the teacher (each
worker does load it, once), the check on labelled images before and the evaluation afterwards. The teacher has random weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from common import Setting, Table, print_tables, random_project
from mgd_pipeline.caches.build import build_shards, plan_cache, publish
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.networks.inference import to_input
from mgd_pipeline.teachers.looks import dense_targets
from mgd_stages.cluster import Asked, build_on_workers, local_workers
from mgd_stages.run.loaded_teacher import LoadedTeacher, load_teacher
from mgd_stages.run.project import Project, choose_device
from mgd_stages.run.teacher_batches import Batching, teacher_compute
from mgd_stages.run.teacher_cache import estimate_cache
from mgd_stages.stages.precompute_teachers import Elsewhere
from mgd_stages.tools.bench import in_turns

BATCH = 8
LARGE = [
    *("data.height=256", "data.width=256", "data.train=24", "data.val=1", "data.test=1", "data.partition=1/4"),
    *("teachers.wide.decoder=deeplabv3plus", "teachers.wide.encoder=resnet101", "teachers.wide.decoder_channels=256"),
]
BUILT_IN = ["data.train=512", "data.val=1", "data.test=1", "data.partition=1/4"]  # two shards: two workers have one each


def build(loaded: LoadedTeacher, device: torch.device, elsewhere: Elsewhere | None) -> None:
    """The stage, from image files to the published teacher cache."""
    project = loaded.project
    for made in (project.base / ".mgd", project.targets("wide")):
        shutil.rmtree(made, ignore_errors=True)
    estimate = estimate_cache(project, "wide", loaded.manifest, loaded.provenance, loaded.channels)
    plan = plan_cache(estimate.work, estimate.output, loaded.provenance, estimate.layout, estimate.images)
    assert plan is not None
    if elsewhere is not None:
        elsewhere(project, "wide", plan, plan.todo, lambda done, note: None)
    else:
        batching = Batching(device, BATCH)
        build_shards(plan, plan.todo, teacher_compute(loaded, batching), batching.made_by())
    publish(plan)


def rates(project: Project, device: torch.device, rounds: int, workers: tuple[int, ...]) -> tuple[dict[str, float], dict[str, str]]:
    """Images a second of each arm, and what some do to the targets."""
    manifest = read_manifest(project.manifest, project.base)
    loaded = load_teacher(project, "wide", manifest, device)
    teacher = loaded.teacher

    def decoded() -> list[np.ndarray]:
        return [manifest.image(row) for row in manifest.training]

    images = decoded()
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]

    def forward(network: nn.Module, order: torch.memory_format, bfloat16: bool = False, first: bool = False) -> Tensor:
        """Logits of the last batch, or of the first one."""
        logits = torch.empty(0)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            for batch in batches[: 1 if first else None]:
                inputs = torch.cat([to_input(image, teacher.normalisation, device) for image in batch])
                logits = network(inputs.contiguous(memory_format=order)).logits.float().cpu()
        return logits

    last, plain = torch.channels_last, torch.contiguous_format
    bare = partial(forward, teacher.network, last)
    ways = {
        "in bfloat16": partial(bare, bfloat16=True),
        "channels first": partial(forward, deepcopy(teacher.network).to(memory_format=plain), plain),  # pyright: ignore
    }
    arms: dict[str, Callable[[], object]] = {
        "bare forward passes": bare,
        **ways,
        "images decoded first": lambda: (decoded(), bare()),
        "targets, in memory": lambda: [dense_targets(teacher, batch, project.params.targets) for batch in batches],
        "the stage": partial(build, loaded, device, None),
    }
    changes = {name: change(way(first=True), bare(first=True)) for name, way in ways.items()}
    with ExitStack() as stack:
        for count in workers:
            threads = max(1, torch.get_num_threads() // max(workers))
            client = stack.enter_context(local_workers(str(count), threads))
            elsewhere = partial(build_on_workers, client, Asked(device.type, BATCH, "stop", threads))
            name = f"the stage, --workers {count} --threads {threads}"
            arms[name] = partial(build, loaded, device, elsewhere)
        return {name: len(images) / seconds for name, seconds in in_turns(arms, rounds).items()}, changes


def change(other: Tensor, usual: Tensor) -> str:
    """What another way of computing logits (B, K, h, w) does to the targets; an encoding's step is 1/255 of an image's range."""
    low, high = usual.flatten(1).aminmax(dim=1)
    steps = (other - usual).abs().flatten(1).amax(1) / ((high - low) / 255)
    same = (other.argmax(1) == usual.argmax(1)).float().mean()
    return f"{100 * float(same):.2f} % same class, largest change {float(steps.max()):.2g} uint8 steps"


def stage_one_table(setting: Setting) -> list[Table]:
    device, rows = choose_device(setting.device), []
    sizes: dict[str, tuple[list[str], int, tuple[int, ...]]] = {
        "built-in, 96 x 128": (BUILT_IN, 1, (1, 2)),
        "ResNet-101, 256 x 256": (LARGE, 2, ()),
    }
    if setting.quick:
        sizes = {"tiny, 96 x 128": ([*BUILT_IN, "data.train=8", "teachers.wide.encoder=tu-test_resnet"], 1, ())}
    for name, (overrides, rounds, workers) in sizes.items():
        project = random_project(setting.folder / name.split(",")[0], overrides, ["wide"])
        rate_of, changes = rates(project, device, rounds, workers)
        limit = rate_of["bare forward passes"]
        rows += [(name, arm, f"{rate:,.1f}", f"{rate / limit:.2f}", changes.get(arm, "")) for arm, rate in rate_of.items()]
    notes = [
        "Goal: 0.95 of the bare forward passes (float32, channels last). The CPU cores that run the network also decode "
        "the PNG files, so the row `images decoded first` is the limit. Workers load the teacher for each run.",
        "The column `targets` compares teachers with random weights, whose classes are close to each other.",
    ]
    head = ("teacher", "arm", "images/s", "of the bare forward passes", "targets")
    return [Table(f"Stage one on {device}", head, rows, notes)]


if __name__ == "__main__":
    print_tables(__doc__, stage_one_table)
