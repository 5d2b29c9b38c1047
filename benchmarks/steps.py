"""What does a training step cost with cached targets, beside its limit and live teachers? How much memory does the loader hold?

python benchmarks/steps.py

Times are medians over rounds in which every arm has its turn (`mgd_stages.tools.bench`). Teachers have random weights: the
values of targets do not matter here.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from mgd_pipeline.data.manifest import ImageRow, Manifest, read_manifest
from mgd_pipeline.data.shapes import CLASSES, PALETTE
from mgd_pipeline.networks.segmentation import build_network
from mgd_pipeline.networks.weights import save_weights
from mgd_pipeline.params import CutMixParams, OptimisationParams, SmpTeacher, ViewsParams
from mgd_pipeline.training import dataset as dataset_module
from mgd_pipeline.training.dataset import TrainingSet
from mgd_pipeline.training.loading import load_batches
from mgd_stages.projects.init import init_project
from mgd_stages.run.project import Project, choose_device, open_project
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.prepare_data import prepare_data
from mgd_stages.tools.bench import Steps, measure_steps, saving_lines, training_set
from reader import LAYOUTS, Table, build, in_child, memory

BUILT_IN = ["data.train=64", "data.val=1", "data.test=1", "data.partition=1/4"]
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


def make_project(folder: Path, overrides: list[str], device: torch.device) -> Project:
    """A project of shapes whose teachers have random weights and whose targets are computed."""
    init_project("shapes", None, "1/4", folder)
    project = open_project(folder / "params.yaml", overrides)
    prepare_data(project)
    for name, teacher in project.params.teachers.items():
        assert isinstance(teacher, SmpTeacher)
        network = build_network(teacher, len(read_manifest(project.manifest, project.base).classes), base=project.base)
        save_weights(project.teacher(name), network.model.state_dict(), {})
        precompute_teachers(project, name, device=device, batch_size=4)
    return project


def measured(project: Project, device: torch.device, **options: int) -> tuple[Steps, list[str]]:
    manifest = read_manifest(project.manifest, project.base)
    dataset = training_set(project, manifest)
    measures = measure_steps(project, manifest, dataset, device=device, **options)  # type: ignore[arg-type]
    size = dataset.optimisation.labelled_batch + dataset.optimisation.unlabelled_batch
    return measures, saving_lines(measures, 10_000, size)


def steps_table(folder: Path, device: torch.device, quick: bool = False) -> Table:
    """The built-in sizes, and MGD's networks at 512 x 512."""
    rows, notes = [], []
    small = [*BUILT_IN, "views.crop=[32,32]"] if quick else BUILT_IN
    projects = {"built-in": (make_project(folder / "small", small, device), 1 if quick else 24, 1 if quick else 4)}
    if not quick:
        large = make_project(folder / "large", MGD, device)
        for name, override in STUDENTS.items():
            projects[f"{name}, 512 x 512"] = (open_project(large.base / "params.yaml", [*MGD, override]), 2, 1)
    for name, (project, rounds, steps) in projects.items():
        measures, lines = measured(project, device, num_workers=0, rounds=rounds, steps=steps)
        assert measures.live is not None and measures.build is not None
        rows.append(
            (
                name,
                *(
                    f"{seconds * 1e3:,.0f}"
                    for seconds in (measures.labels, measures.prepared, measures.memory, measures.cached, measures.live)
                ),
                f"{measures.cached / measures.memory:.2f}",
                f"{measures.cached / measures.prepared:.2f}",
                f"{measures.live / measures.cached:.2f}",
                f"{measures.live / measures.prepared:.2f}",
            )
        )
        notes.append(f"{name}: {'; '.join(lines[1:])}.")
    header = (
        *("student", "no targets, ms", "finished batches, ms", "inputs in memory, ms", "cached, ms", "live teachers, ms"),
        *("cached / in memory (goal 1.05)", "cached / finished", "live / cached", "live / finished, the ceiling"),
    )
    notes.append(
        "Inputs in memory: images, labels and targets are decoded; views are drawn and batches made as with teacher caches. "
        "Finished batches: four batches of views drawn before take turns. An epoch has 10,000 images."
    )
    return Table(f"Training steps on {device}", header, rows, notes)


def loader_in_child(folder: Path, count: int, steps: int) -> dict[str, float]:
    """Memory that a loader of `count` images takes beyond its batches, after some steps."""
    from PIL import Image

    layout, side = LAYOUTS["smallest"], LAYOUTS["smallest"].height
    Image.new("RGB", (side, side)).save(folder / "image.png")
    Image.new("L", (side, side)).save(folder / "mask.png")
    path = build(folder / f"l{count}", layout, count)
    dataset_module.check_unchanged = lambda *_: None  # all rows are the same image
    before = memory("VmRSS")
    rows = {
        f"train/{i:09d}": ImageRow(f"train/{i:09d}", "image.png", f"{i:064x}", side, side, "mask.png", f"{i:064x}", "train")
        for i in range(count)
    }
    subsets = {image_id: "labelled" if i % 16 == 0 else "unlabelled" for i, image_id in enumerate(rows)}
    manifest = Manifest(Path(), None, CLASSES, PALETTE, tuple(range(256)), rows, subsets, base=folder)
    listed = memory("VmRSS")
    settings: Any = {"steps": steps, "labelled_batch": 8, "unlabelled_batch": 8, "learning_rate": 0.1}
    views: Any = {"crop": [side, side]}
    dataset = TrainingSet(manifest, ViewsParams(**views), CutMixParams(), OptimisationParams(**settings), 0, caches={"t": path})
    dataset.check_rows()
    for _ in load_batches(dataset, 0, 0, 0, torch.device("cpu")):
        pass
    return {"manifest": listed - before, "loader": memory("VmHWM") - listed}


def loader_table(folder: Path, quick: bool = False) -> Table:
    rows = []
    for count in (300, 600) if quick else (10**3, 10**5):
        measures = in_child(loader_in_child, folder, count, 5 if quick else 300)
        rows.append((f"{count:,}", f"{measures['manifest']:.0f}", f"{measures['loader']:.0f}"))
    notes = ["Peak of one process after 300 steps of 16 images. Decoded images take at most 512 MB of it. Goal: 1 GiB."]
    return Table("Memory of the loader", ("images", "manifest, MB", "loader, MB"), rows, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; shows that it runs, not how fast")
    parser.add_argument("--device", default="auto", help="cpu or cuda")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for table in (
            steps_table(Path(folder), choose_device(arguments.device), arguments.quick),
            loader_table(Path(folder), arguments.quick),
        ):
            print(table.markdown(), flush=True)


if __name__ == "__main__":
    main()
