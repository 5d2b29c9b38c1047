"""Which way of training a teacher gives the best teacher in the same time?

python docs/experiments/semi_supervised.py cost PROJECT OUTPUT
python docs/experiments/semi_supervised.py train PROJECT OUTPUT --steps cps=1000 mean-teacher=2000 --seeds 0 1 2

PROJECT has a params.yaml, and prepare-data has run there. `cost` prints the CPU seconds of a step of each method. `train` trains
the teacher once for each method and seed, and prints its mIoU in % on val, and on test if there is one. Called again, it continues.
A method is written as supervised, cps or mean-teacher; cps-0.9 has a threshold of 0.9.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from mgd_pipeline.data.datasets import names_of
from mgd_pipeline.data.manifest import read_manifest
from mgd_stages.run.loaded_teacher import load_teacher
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project, open_project
from mgd_stages.run.teacher_quality import evaluate_teacher
from mgd_stages.stages.train_teacher import train_teacher

CPU = torch.device("cpu")
METHODS = ("supervised", "cps", "mean-teacher")


def project_of(source: Path, folder: Path, settings: list[str]) -> Project:
    """A project in `folder` with the images of another project."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name in ("manifest", "raw", "labels"):
        if (source / "data" / name).exists() and not (folder / "data" / name).exists():
            (folder / "data" / name).symlink_to((source / "data" / name).resolve())
    (folder / "params.yaml").write_bytes((source / "params.yaml").read_bytes())
    return open_project(folder / "params.yaml", settings)


def settings_of(method: str, steps: int, seed: int) -> list[str]:
    name, _, threshold = method.rpartition("-") if method[-1].isdigit() else (method, "", "0")
    keys = {"method": name, "confidence": threshold, "steps": str(steps)}
    return [f"seed={seed}", *(f"teacher_training.{key}={value}" for key, value in keys.items())]


def cost(source: Path, output: Path, teacher: str) -> None:
    """CPU seconds of a step, the least of three rounds, each of 20 steps more against 20 steps less."""
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for repetition in range(3):
        for method in METHODS:
            took = []
            for steps in (20, 40):
                folder = output / f"cost/{method}-{steps}-{repetition}"
                project = project_of(source, folder, settings_of(method, steps, 0))
                began = time.process_time()
                train_teacher(project, teacher, Machine(CPU, resume=False))
                took.append(time.process_time() - began)
            seconds[method].append((took[1] - took[0]) / 20)
    for method, measured in seconds.items():
        print(f"{method}: {min(measured):.4f} s a step ({', '.join(f'{value:.4f}' for value in measured)})")


def measured(source: Path, folder: Path, method: str, steps: int, seed: int, teacher: str) -> dict[str, float]:
    """mIoU in % by split; trains the teacher if it is not there yet."""
    settings = settings_of(method, steps, seed)
    project = project_of(source, folder, settings)
    if not project.teacher(teacher).exists():
        began = time.process_time()
        train_teacher(project, teacher, Machine(CPU))
        (folder / "seconds.json").write_text(json.dumps(time.process_time() - began))
    if not (folder / "miou.json").exists():
        values = {}
        manifest = read_manifest(project.manifest, project.base, names_of(project.params.data))
        for split in ("val", "test"):
            if manifest.split(split):
                chosen = open_project(folder / "params.yaml", [*settings, f"evaluation.split={split}"])
                evaluate_teacher(load_teacher(chosen, teacher, manifest, CPU))
                values[split] = 100 * json.loads((project.results / f"teachers/{teacher}.json").read_text())["miou"]
        (folder / "miou.json").write_text(json.dumps(values))
    return json.loads((folder / "miou.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "train"])
    parser.add_argument("project", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--teacher", default="wide")
    parser.add_argument("--steps", nargs="+", default=[], metavar="METHOD=STEPS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    source, output = given.project.resolve(), given.output.resolve()
    if given.what == "cost":
        cost(source, output, given.teacher)
        return
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in given.seeds:
        for text in given.steps:
            method, _, steps = text.partition("=")
            folder = output / f"{given.teacher}-{method}-{steps}-{seed}"
            values = measured(source, folder, method, int(steps), seed, given.teacher)
            rows.setdefault(f"{method}, {steps} steps", []).append(values)
            shown = ", ".join(f"{split} {value:.1f}" for split, value in values.items())
            print(f"{given.teacher}, {method}, {steps} steps, seed {seed}: {shown}", flush=True)
    for name, values in rows.items():
        for split in values[0]:
            each = [value[split] for value in values]
            print(f"{name}, {split}: mean {sum(each) / len(each):.1f} ({', '.join(f'{value:.1f}' for value in each)})")


if __name__ == "__main__":
    main()
