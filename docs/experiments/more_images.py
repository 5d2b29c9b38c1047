"""Do more unlabelled images make a better student? One project of rendered scenes grows; its labels and teachers stay the same.

python docs/experiments/more_images.py PROJECT OUTPUT --train 480 1440 4800 --seeds 0 1 2

PROJECT is a project of the built-in data set with finished teachers. Its labelled images stay labelled. For each size the targets
of the new images are computed, and the student is trained with each seed. mIoU in % on val and test. Called again, it continues.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch

from mgd_pipeline.data.manifest import read_manifest
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import open_project
from mgd_stages.stages.evaluate import evaluate
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.prepare_data import prepare_data
from mgd_stages.stages.train_student import train_student

CPU = torch.device("cpu")


def begin(source: Path, folder: Path) -> None:
    """The growing project: parameters, teachers, and the list of labelled images of another project."""
    if (folder / "labelled.txt").exists():
        return
    (folder / "data/teachers").mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "params.yaml", folder)
    for weights in (source / "data/teachers").glob("*.safetensors"):
        shutil.copy(weights, folder / "data/teachers")
    labelled = read_manifest(source / "data/manifest", source).labelled
    (folder / "labelled.txt").write_text("".join(f"{row.image_id}\n" for row in labelled))


def grown(folder: Path, count: int) -> float:
    """Prepares the images and computes the targets that are missing; returns the CPU seconds of the targets."""
    project = open_project(folder / "params.yaml", settings_of(count))
    prepare_data(project)
    began = time.process_time()
    for name in project.params.teachers:
        precompute_teachers(project, name, device=CPU)
    return time.process_time() - began


def settings_of(count: int) -> list[str]:
    return [f"data.train={count}", "data.partition={labelled: labelled.txt}", "train_teachers=[]"]


def measured(folder: Path, count: int, seed: int) -> dict[str, float]:
    """mIoU in % by split of the student of a seed."""
    settings, values = [*settings_of(count), f"seed={seed}"], {}
    project = open_project(folder / "params.yaml", settings)
    train_student(project, Machine(CPU))
    for split in ("val", "test"):
        evaluate(open_project(folder / "params.yaml", [*settings, f"evaluation.split={split}"]), device=CPU)
        values[split] = 100 * json.loads((project.results / "evaluation/metrics.json").read_text())["distilled"]["miou"]
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--train", type=int, nargs="+", default=[480, 1440, 4800])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    begin(given.project.resolve(), given.output.resolve())
    results = given.output / "miou.json"
    done: dict[str, dict[str, float]] = json.loads(results.read_text()) if results.exists() else {}
    for count in given.train:
        missing = [seed for seed in given.seeds if f"{count} {seed}" not in done]
        if missing:
            print(f"{count} training images: targets took {grown(given.output.resolve(), count):.0f} s", flush=True)
        for seed in missing:
            done[f"{count} {seed}"] = measured(given.output.resolve(), count, seed)
            results.write_text(json.dumps(done))
        for split in ("val", "test"):
            each = [done[f"{count} {seed}"][split] for seed in given.seeds]
            shown = ", ".join(f"{value:.1f}" for value in each)
            print(f"{count} training images, {split}: mean {sum(each) / len(each):.1f} ({shown})", flush=True)


if __name__ == "__main__":
    main()
