"""What does a training step cost with cached targets, beside its limit and live teachers? How much memory does the loader hold?

python benchmarks/steps.py

Times are medians over rounds in which every arm has its turn (`mgd_stages.tools.bench`). Teachers have random weights: the
values of targets do not matter here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from common import Setting, Table, in_child, memory, print_tables, random_project
from mgd_pipeline.data.manifest import ImageRow, Manifest, read_manifest
from mgd_pipeline.data.shapes import CLASSES, PALETTE
from mgd_pipeline.params import CutMixParams, OptimisationParams, ViewsParams
from mgd_pipeline.training import dataset as dataset_module
from mgd_pipeline.training.dataset import TrainingSet
from mgd_pipeline.training.loading import load_batches
from mgd_stages.run.project import Project, choose_device, open_project
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.tools.bench import measure_steps, saving_lines, training_set
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
STUDENTS = {"ResNet-18": "student.network.encoder=resnet18", "MobileNetV2": "student.network.encoder=mobilenet_v2"}
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
    print_tables(__doc__, loader_table, steps_table)
