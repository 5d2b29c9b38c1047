"""What does stage one cost beyond the bare forward passes of its teacher? Decoding, encoding, writing, syncing and publishing.

python benchmarks/stage_one.py

Times are medians over rounds in which every arm has its turn (`mgd_stages.tools.bench`); each arm starts with an empty work folder.
Images a second of the whole stage, from reading the files to the published teacher cache. Not counted: loading the teacher (each
worker does load it, once), the check on labelled images before and the evaluation afterwards. The teacher has random weights.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mgd_pipeline.caches.build import build_shards, plan_cache, publish
from mgd_pipeline.data.images import read_image
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.networks.inference import to_input
from mgd_pipeline.networks.segmentation import build_network
from mgd_pipeline.networks.weights import save_weights
from mgd_pipeline.params import SmpTeacher
from mgd_pipeline.teachers.looks import dense_targets
from mgd_stages.cluster import Asked, build_on_workers, local_workers
from mgd_stages.projects.init import init_project
from mgd_stages.run.loaded_teacher import LoadedTeacher, load_teacher
from mgd_stages.run.project import Project, choose_device, open_project
from mgd_stages.run.teacher_batches import Batching, teacher_compute
from mgd_stages.run.teacher_cache import estimate_cache
from mgd_stages.stages.precompute_teachers import Elsewhere
from mgd_stages.stages.prepare_data import prepare_data
from mgd_stages.tools.bench import in_turns
from reader import Table

BATCH = 8
LARGE = [
    *("data.height=256", "data.width=256", "data.train=24", "data.val=1", "data.test=1", "data.partition=1/4"),
    *("teachers.wide.decoder=deeplabv3plus", "teachers.wide.encoder=resnet101", "teachers.wide.decoder_channels=256"),
]
BUILT_IN = ["data.train=512", "data.val=1", "data.test=1", "data.partition=1/4"]  # two shards: two workers have one each


def make_project(folder: Path, overrides: list[str]) -> Project:
    """A project of shapes whose teacher `wide` has random weights."""
    init_project("shapes", None, "1/4", folder)
    project = open_project(folder / "params.yaml", overrides)
    prepare_data(project)
    params = project.params.teachers["wide"]
    assert isinstance(params, SmpTeacher)
    network = build_network(params, len(read_manifest(project.manifest, project.base).classes), base=project.base)
    save_weights(project.teacher("wide"), network.model.state_dict(), {})
    return project


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
        return [read_image(project.base / manifest.root / row.image_path) for row in manifest.training]

    images = decoded()
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]

    def forward(network: nn.Module, order: torch.memory_format, precision: str, first: bool = False) -> Tensor:
        """Logits of the last batch, or of the first one."""
        logits = torch.empty(0)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            for batch in batches[: 1 if first else None]:
                inputs = torch.cat([to_input(image, teacher.normalisation, device) for image in batch])
                logits = network(inputs.contiguous(memory_format=order)).logits.float().cpu()
        return logits

    def targets() -> None:
        for batch in batches:
            dense_targets(teacher, batch, project.params.targets)

    def forward_of_files() -> None:
        decoded()
        forward(teacher.network, last, "float32")

    last, plain = torch.channels_last, torch.contiguous_format
    channels_first = deepcopy(teacher.network).to(memory_format=plain)  # pyright: ignore[reportCallIssue]
    ways = {
        "bare forward passes": partial(forward, teacher.network, last, "float32"),
        "in bfloat16": partial(forward, teacher.network, last, "bfloat16"),
        "channels first": partial(forward, channels_first, plain, "float32"),
    }
    arms: dict[str, Callable[[], object]] = {
        **ways,
        "images decoded first": forward_of_files,
        "targets, in memory": targets,
        "the stage": partial(build, loaded, device, None),
    }
    usual = ways["bare forward passes"](first=True)
    changes = {name: change(way(first=True), usual) for name, way in ways.items() if name != "bare forward passes"}
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


def stage_one_table(folder: Path, device: torch.device, quick: bool = False) -> Table:
    rows = []
    sizes = (
        {"built-in, 96 x 128": ([*BUILT_IN, "data.train=8"], 1, ())}
        if quick
        else {"built-in, 96 x 128": (BUILT_IN, 1, (1, 2)), "ResNet-101, 256 x 256": (LARGE, 2, ())}
    )
    for name, (overrides, rounds, workers) in sizes.items():
        project = make_project(folder / name.split(",")[0], overrides)
        rate_of, changes = rates(project, device, rounds, workers)
        limit = rate_of["bare forward passes"]
        rows += [(name, arm, f"{rate:,.1f}", f"{rate / limit:.2f}", changes.get(arm, "")) for arm, rate in rate_of.items()]
    notes = [
        "Goal: 0.95 of the bare forward passes (float32, channels last). The CPU cores that run the network also decode "
        "the PNG files, so the row `images decoded first` is the limit. Workers load the teacher for each run.",
        "The column `targets` compares teachers with random weights, whose classes are close to each other.",
    ]
    head = ("teacher", "arm", "images/s", "of the bare forward passes", "targets")
    return Table(f"Stage one on {device}", head, rows, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; shows that it runs, not how fast")
    parser.add_argument("--device", default="auto", help="cpu or cuda")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(stage_one_table(Path(folder), choose_device(arguments.device), arguments.quick).markdown(), flush=True)


if __name__ == "__main__":
    main()
