"""What would `student.logit_adjustment` give finished students? Shifts their logits and measures on `evaluation.split`.

python docs/experiments/logit_shift.py runs/camvid
python docs/experiments/logit_shift.py runs/sixteenth/1-16/runs/*/0 --shift 0 0.3 0.6

The option changes only the bias of the last layer after training, so nothing is trained here. mIoU in %. A shift that is chosen
here was chosen on these images. Measure it with another seed or on another split.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.params import STUDENTS
from mgd_pipeline.students.student import load_student
from mgd_pipeline.training.priors import adjust_logits, labelled_pixels
from mgd_stages.run.held_out import evaluate_network
from mgd_stages.run.project import open_project


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("projects", nargs="+", type=Path, help="folders of params.yaml, with finished students")
    parser.add_argument("--shift", nargs="+", type=float, default=[0.0, 0.15, 0.3, 0.45, 0.6], help="values of the option")
    arguments = parser.parse_args()

    lines = ["| student | " + " | ".join(f"{shift:g}" for shift in arguments.shift) + " |"]
    lines.append("|---" * (len(arguments.shift) + 1) + "|")
    for folder in arguments.projects:
        project = open_project(folder / "params.yaml")
        manifest = read_manifest(project.manifest, project.base)
        pixels_K = labelled_pixels(manifest)
        had = project.params.student.logit_adjustment
        for name in STUDENTS:
            if not project.student(name).exists():
                continue
            student = load_student(project.student(name))
            scores = []
            for shift in arguments.shift:
                network = copy.deepcopy(student.network)
                adjust_logits(network, pixels_K, shift - had)
                scores.append(evaluate_network(project, manifest, network, student.normalisation, f"{name} {shift:g}").miou)
            lines.append(f"| {folder} {name} | " + " | ".join(f"{100 * miou:.1f}" for miou in scores) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
