"""Did the targets arrive? Students and stored targets on the unlabelled training images, where these have masks after all.

python benchmarks/unlabelled.py runs/camvid
python benchmarks/unlabelled.py runs/camvid short=runs/other/data/students/supervised/student.safetensors

Nothing was trained on these masks; the distilled student has seen the images and what the teachers say of them. Where it gains
here and not on val, it has learnt what it was taught, and val is made of something else. IoU in %, at the size of the masks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mgd_pipeline.caches.decoding import stored_scores
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.data.images import read_image
from mgd_pipeline.data.manifest import ImageRow, Manifest, read_manifest
from mgd_pipeline.distillation.losses import mean_of_probabilities
from mgd_pipeline.metrics import class_iou, confusion_matrix, mean_iou
from mgd_pipeline.networks.inference import predict_logits, resize_logits
from mgd_pipeline.params import STUDENTS
from mgd_pipeline.students.student import load_student
from mgd_stages.run.project import Project, open_project

Scores = Callable[[ImageRow], torch.Tensor]
"""(K, H, W) of an image at its working size"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path, help="folder of params.yaml, with finished targets and students")
    parser.add_argument("students", nargs="*", metavar="NAME=PATH", help="students from elsewhere, beside the project's own")
    arguments = parser.parse_args()
    project, manifest, rows = open_unlabelled(arguments.project)

    paths = {name: project.student(name) for name in STUDENTS if project.student(name).exists()}
    for text in arguments.students:
        name, equals, path = text.partition("=")
        if not equals:
            parser.error(f"{text}: write NAME=PATH")
        paths[name] = Path(path)
    networks: dict[str, Scores] = {
        name: _scores_of_student(path, project.base / manifest.root, manifest.long_side) for name, path in paths.items()
    }
    stores = {name: open_cache(project.targets(name)) for name in project.params.losses.pixel_teachers}
    for name, store in stores.items():
        networks[f"targets of {name}"] = lambda row, store=store: stored_scores(store, row.image_id)
    networks["mean of the targets"] = lambda row: mean_of_probabilities(
        [stored_scores(store, row.image_id)[None] for store in stores.values()]
    )[0]

    print(f"{len(rows)} unlabelled images of {arguments.project}\n")
    print("| | mIoU | " + " | ".join(manifest.classes) + " |")
    print("|---" * (len(manifest.classes) + 2) + "|")
    for name, scores in networks.items():
        total = np.zeros((len(manifest.classes),) * 2, np.int64)
        for row in rows:
            truth = manifest.mask(row)
            found = resize_logits(scores(row), (truth.shape[0], truth.shape[1]))
            total += confusion_matrix(truth, found.max(0).indices.numpy(), len(manifest.classes))
        values = [mean_iou(total), *class_iou(total)]
        print(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |")


def open_unlabelled(folder: Path) -> tuple[Project, Manifest, list[ImageRow]]:
    """A project, its manifest and its unlabelled images that have masks; ends the program where there are none."""
    project = open_project(folder / "params.yaml")
    manifest = read_manifest(project.manifest, project.base)
    rows = [row for row in manifest.unlabelled if row.mask_path is not None]
    if not rows:
        sys.exit(f"{project.manifest}: no unlabelled image has a mask")
    return project, manifest, rows


def _scores_of_student(path: Path, root: Path, long_side: int | None) -> Scores:
    student = load_student(path)
    return lambda row: predict_logits(student.network, read_image(root / row.image_path, long_side), student.normalisation)


if __name__ == "__main__":
    main()
