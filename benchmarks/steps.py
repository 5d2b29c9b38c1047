"""What does a training step cost with cached targets, beside its limit and live teachers? How much memory does the loader hold?

python benchmarks/steps.py

Times are medians over rounds in which every arm has its turn (`mgd_stages.tools.bench`). Teachers have random weights: the
values of targets do not matter here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from common import Setting, Table, in_child, memory, print_tables, random_project
from mgd_pipeline.data.manifest import ImageRow, Manifest, read_manifest
from mgd_pipeline.data.shapes import CLASSES, PALETTE
from mgd_pipeline.networks.segmentation import build_network
from mgd_pipeline.params import CutMixParams, OptimisationParams, ViewsParams
from mgd_pipeline.training import dataset as dataset_module
from mgd_pipeline.training.batches import cached_targets
from mgd_pipeline.training.dataset import TrainingSet
from mgd_pipeline.training.features import with_projections
from mgd_pipeline.training.knowledge import knowledge_of
from mgd_pipeline.training.loading import load_batches
from mgd_pipeline.training.optimisation import backward, build_optimizer
from mgd_pipeline.training.terms import step_loss, step_terms
from mgd_stages.run.project import Project, choose_device, open_project
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.tools.bench import in_turns, measure_steps, saving_lines, training_set
from reader import SMALLEST, build

BUILT_IN = ["data.train=64", "data.val=1", "data.test=1", "data.partition=1/4"]
TINY = [
    *("data.train=16", "data.val=1", "data.test=1", "data.partition=1/4", "views.crop=[32,32]"),
    *("teachers.wide.encoder=tu-test_resnet", "teachers.deep.encoder=tu-test_resnet"),
    *("student.network.encoder=tu-test_resnet", "student.labelled_batch=2", "student.unlabelled_batch=2"),
]
MGD = [
    *("data.height=512", "data.width=512", "data.train=4", "data.val=1", "data.test=1", "data.partition=1/4"),
    "views.crop=[512,512]",
    *("teachers.wide.decoder=deeplabv3plus", "teachers.wide.encoder=tu-wide_resnet50_2", "teachers.wide.decoder_channels=256"),
    *("teachers.deep.decoder=deeplabv3plus", "teachers.deep.encoder=resnet101", "teachers.deep.decoder_channels=256"),
    *("student.network.decoder=deeplabv3plus", "student.network.decoder_channels=256"),
    *("student.labelled_batch=2", "student.unlabelled_batch=2"),
]
RESNET = "student.network.encoder=resnet18"
PLAIN = ["targets.logits=uint8", "targets.region_embeddings=float16", "targets.compression=none"]
SMALL = ["targets.logits=log-probability", "targets.region_embeddings=uint8", "targets.compression=zstd"]
"""Both with the image term of log-probabilities."""
STUDENTS = {"ResNet-18": RESNET, "MobileNetV2": "student.network.encoder=mobilenet_v2"}
"""MGD's own networks, at VOC's size."""


def with_targets(folder: Path, overrides: list[str], device: torch.device) -> Project:
    """A project of shapes whose teachers have random weights and whose targets are computed."""
    project = random_project(folder, overrides, ("wide", "deep"))
    for name in project.params.teachers:
        precompute_teachers(project, name, device=device, batch_size=4)
    return project


def steps_table(setting: Setting) -> list[Table]:
    """The built-in sizes, and MGD's networks at 512 x 512."""
    rows, notes, device = [], [], choose_device(setting.device)
    if setting.quick:
        projects = {"tiny": (with_targets(setting.folder / "tiny", TINY, device), 1, 1)}
    else:
        projects = {"built-in": (with_targets(setting.folder / "small", BUILT_IN, device), 24, 4)}
        large = with_targets(setting.folder / "large", MGD, device)
        for name, override in STUDENTS.items():
            projects[f"{name}, 512 x 512"] = (open_project(large.base / "params.yaml", [*MGD, override]), 2, 1)
    for name, (project, rounds, steps) in projects.items():
        manifest = read_manifest(project.manifest, project.base)
        dataset = training_set(project, manifest)
        times = measure_steps(project, manifest, dataset, device=device, num_workers=0, rounds=rounds, steps=steps)
        assert times.live is not None and times.build is not None
        rows.append(
            {
                "student": name,
                "no targets, ms": f"{times.labels * 1e3:,.0f}",
                "finished batches, ms": f"{times.prepared * 1e3:,.0f}",
                "inputs in memory, ms": f"{times.memory * 1e3:,.0f}",
                "cached, ms": f"{times.cached * 1e3:,.0f}",
                "live teachers, ms": f"{times.live * 1e3:,.0f}",
                "cached / in memory (goal 1.05)": f"{times.cached / times.memory:.2f}",
                "cached / finished": f"{times.cached / times.prepared:.2f}",
                "live / cached": f"{times.live / times.cached:.2f}",
                "live / finished, the ceiling": f"{times.live / times.prepared:.2f}",
            }
        )
        size = dataset.optimisation.labelled_batch + dataset.optimisation.unlabelled_batch
        notes.append(f"{name}: {'; '.join(saving_lines(times, 10_000, size)[1:])}.")
    notes.append(
        "Inputs in memory: images, labels and targets are decoded; views are drawn and batches made as with teacher caches. "
        "Finished batches: four batches of views drawn before take turns. An epoch has 10,000 images."
    )
    return [Table(f"Training steps on {device}", tuple(rows[0]), [tuple(row.values()) for row in rows], notes)]


def small_caches_table(setting: Setting) -> list[Table]:
    """Steps with plain and with small teacher caches, which take turns; images and views are the same."""
    rows, device = [], choose_device(setting.device)
    kinds = {"tiny": (TINY, 1)} if setting.quick else {"built-in": (BUILT_IN, 24), "ResNet-18, 512 x 512": ([*MGD, RESNET], 3)}
    for kind, (overrides, rounds) in kinds.items():
        arms, sizes = {}, {}
        for name, encoding in {"plain": PLAIN, "small": SMALL}.items():
            project = with_targets(setting.folder / kind.split(",")[0] / name, [*overrides, *encoding], device)
            paths = [project.targets(teacher) for teacher in project.params.losses.used_teachers]
            sizes[name] = sum(file.stat().st_size for path in paths for file in path.rglob("*/c/**/*") if file.is_file())
            arms[name] = stepper(project, device)
        times = in_turns(arms, rounds)
        factors = (f"{values['small'] / values['plain']:.2f}" for values in (times, sizes))
        rows.append((kind, *(f"{times[name] * 1e3:,.0f}" for name in arms), *factors))
    note = (
        "Plain: uint8 logits, float16 embeddings. Small: log-probabilities and embeddings in uint8, zstd. Goal: 1.05 of the time."
    )
    sizes_note = "The teachers have random weights, so their targets compress less than those of trained teachers."
    head = ("student", "plain, ms", "small, ms", "small / plain", "bytes, small / plain")
    return [Table(f"Training steps with small caches on {device}", head, rows, [note, sizes_note])]


def stepper(project: Project, device: torch.device) -> Callable[[], None]:
    """What does the next step of a training with cached targets, from reading its batch on."""
    manifest, params = read_manifest(project.manifest, project.base), project.params
    dataset = training_set(project, manifest)
    torch.manual_seed(params.seed)
    network = build_network(params.student.network, len(manifest.classes), base=project.base).to(device).train()
    knowledge = knowledge_of(params, manifest, dataset.open_caches(), device)
    trained = with_projections(network, knowledge.features, params.targets.region_stride)
    optimizer = build_optimizer(trained, params.student)
    batches = load_batches(dataset, 0, 0, params.seed, device)
    targets = partial(cached_targets, losses=params.losses)

    def step() -> None:
        loss = step_loss(step_terms(trained, next(batches), targets, params, knowledge), params)
        optimizer.zero_grad(set_to_none=True)
        backward(loss, optimizer)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def loader_in_child(folder: Path, count: int, steps: int) -> dict[str, float]:
    """Memory that a loader of `count` images takes beyond its batches, after some steps."""
    side = SMALLEST.height
    folder.mkdir()
    Image.new("RGB", (side, side)).save(folder / "image.png")
    Image.new("L", (side, side)).save(folder / "mask.png")
    path = build(folder, SMALLEST, count)
    dataset_module.check_unchanged = lambda *_: None  # all rows are the same image
    before = memory("VmRSS")
    rows = {
        f"train/{i:09d}": ImageRow(f"train/{i:09d}", "image.png", f"{i:064x}", side, side, "mask.png", f"{i:064x}", "train")
        for i in range(count)
    }
    subsets = {image_id: "labelled" if i % 16 == 0 else "unlabelled" for i, image_id in enumerate(rows)}
    manifest = Manifest(Path(), None, CLASSES, PALETTE, tuple(range(256)), rows, subsets, base=folder)
    listed = memory("VmRSS")
    settings = OptimisationParams(steps=steps, labelled_batch=8, unlabelled_batch=8, learning_rate=0.1)
    dataset = TrainingSet(manifest, ViewsParams(crop=[side, side]), CutMixParams(), settings, 0, caches={"t": path})
    dataset.check_rows()
    for _ in load_batches(dataset, 0, 0, 0, torch.device("cpu")):
        pass
    return {"manifest": listed - before, "loader": memory("VmHWM") - listed}


def loader_table(setting: Setting) -> list[Table]:
    rows = []
    for count in (600,) if setting.quick else (10**3, 10**5):
        measures = in_child(loader_in_child, setting.folder / f"{count}", count, 5 if setting.quick else 300)
        rows.append((f"{count:,}", f"{measures['manifest']:.0f}", f"{measures['loader']:.0f}"))
    notes = ["Peak of one process after 300 steps of 16 images. Decoded images take at most 512 MB of it. Goal: 1 GiB."]
    return [Table("Memory of the loader", ("images", "manifest, MB", "loader, MB"), rows, notes)]


if __name__ == "__main__":
    print_tables(__doc__, loader_table, steps_table, small_caches_table)
