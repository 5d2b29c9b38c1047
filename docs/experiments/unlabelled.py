"""Did the targets arrive? Measures students and cached targets on unlabelled training images that have masks.

python docs/experiments/unlabelled.py runs/camvid
python docs/experiments/unlabelled.py runs/camvid short=runs/other/data/students/supervised/student.safetensors

Nothing was trained on these masks. The distilled student has seen the images and the teachers' targets for them. A student that
gains here and not on val has learnt its targets; val shows something else. IoU in %, at the size of the masks.
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
from mgd_pipeline.data.manifest import ImageRow, Manifest, read_manifest
from mgd_pipeline.distillation import mean_of_probabilities
from mgd_pipeline.metrics import class_iou, confusion_matrix, mean_iou
from mgd_pipeline.networks.inference import predict_logits, resize_logits
from mgd_pipeline.params import STUDENTS
from mgd_pipeline.students.student import load_student
from mgd_stages.run.project import open_project

Scores = Callable[[ImageRow], torch.Tensor]
"""(K, H, W) of an image at its working size"""


def scores_of_student(path: Path, manifest: Manifest) -> Scores:
    student = load_student(path)
    return lambda row: predict_logits(student.network, manifest.image(row), student.normalisation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path, help="folder of params.yaml, with finished targets and students")
    parser.add_argument("students", nargs="*", metavar="NAME=PATH", help="students from elsewhere, beside the project's own")
    arguments = parser.parse_args()
    project = open_project(arguments.project / "params.yaml")
    manifest = read_manifest(project.manifest, project.base)
    rows = [row for row in manifest.unlabelled if row.mask_path is not None]
    if not rows:
        sys.exit(f"{project.manifest}: no unlabelled image has a mask")

    paths = {name: project.student(name) for name in STUDENTS if project.student(name).exists()}
    for text in arguments.students:
        name, equals, path = text.partition("=")
        if not equals:
            parser.error(f"{text}: write NAME=PATH")
        paths[name] = Path(path)
    networks = {name: scores_of_student(path, manifest) for name, path in paths.items()}
    caches = {name: open_cache(project.targets(name)) for name in project.params.losses.pixel_teachers}
    for name, cache in caches.items():
        networks[f"targets of {name}"] = lambda row, cache=cache: stored_scores(cache, row.image_id)
    networks["mean of the targets"] = lambda row: mean_of_probabilities(
        [stored_scores(cache, row.image_id)[None] for cache in caches.values()]
    )[0]

    print(f"{len(rows)} unlabelled images of {arguments.project}\n")
    print("| | mIoU | " + " | ".join(manifest.classes) + " |")
    print("|---" * (len(manifest.classes) + 2) + "|")
    for name, scores in networks.items():
        total = np.zeros((len(manifest.classes),) * 2, np.int64)
        for row in rows:
            truth = manifest.mask(row)
            logits = resize_logits(scores(row), (truth.shape[0], truth.shape[1]))
            total += confusion_matrix(truth, logits.max(0).indices.numpy(), len(manifest.classes))
        print(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in (mean_iou(total), *class_iou(total))) + " |")


if __name__ == "__main__":
    main()
