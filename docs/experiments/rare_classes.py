"""Do the rare classes pay for distillation, and does losses.prior_adjustment give them back?

python docs/experiments/rare_classes.py PROJECT OUTPUT --tau 0 0.25 0.5 1.0 --seeds 0 1 2

PROJECT has a params.yaml, teacher caches and a prepared data set; nothing is written there. For each seed the student without
teachers is trained once, and the distilled student once for each tau of losses.prior_adjustment, all from the same caches. Printed
are mIoU and the mean IoU of the rare third of the classes (docs/training.md) in %, on val and on test as far as they have labels,
the mean and each seed, and the mean difference from the student without teachers. Called again, the experiment continues.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.errors import ParamsError, StaleTarget
from mgd_pipeline.networks.weights import read_metadata
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project, open_project
from mgd_stages.stages.evaluate import evaluate
from mgd_stages.stages.train_student import train_student

TWIN = "without teachers"
_OWN = ("students", "results")
"""What each run makes; it shares everything else below data/ with PROJECT."""


def link(target: Path, path: Path) -> None:
    """Makes `path` lead to `target`, unless something is there already."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target.resolve(), target_is_directory=target.is_dir())


def project_of(source: Path, folder: Path, settings: list[str]) -> Project:
    """A project in `folder` with the images and the teacher caches of another project."""
    params, wanted = folder / "params.yaml", (source / "params.yaml").read_bytes()
    if params.exists() and params.read_bytes() != wanted:
        raise ParamsError(f"{params}: {source / 'params.yaml'} has changed since this run; choose another OUTPUT")
    folder.mkdir(parents=True, exist_ok=True)
    params.write_bytes(wanted)
    for entry in (source / "data").iterdir():
        if entry.name not in _OWN:
            link(entry, folder / "data" / entry.name)
    project = open_project(params, settings)
    root = read_manifest(source / "data/manifest", source).root
    link(source / root, folder / root)
    return project


def refuse_stale(project: Project, name: str) -> None:
    """Raises StaleTarget for a student of an earlier call that learnt from other labels or other teacher caches."""
    learnt_from, manifest = read_metadata(project.student(name)), read_manifest(project.manifest, project.base)
    caches = {teacher: open_cache(project.targets(teacher)) for teacher in learnt_from["teachers"]}
    now = {teacher: [cache.fingerprint, cache.generation] for teacher, cache in caches.items()}
    if (learnt_from["trained_on"], learnt_from["teachers"]) != (manifest.partition_fingerprint, now):
        raise StaleTarget(f"{project.student(name)}: PROJECT has other labels or teacher caches now; choose another OUTPUT")


def measured(source: Path, folder: Path, seed: int, tau: float | None, device: torch.device) -> dict[str, Any]:
    """What `evaluate` measures of one student, by split; trains the student if it is not there yet. Without tau: the twin."""
    settings = [f"seed={seed}", f"losses.prior_adjustment={tau or 0}"]
    project, name = project_of(source, folder, settings), "supervised" if tau is None else "distilled"
    if not (folder / "measured.json").exists():
        if not project.student(name).exists():
            train_student(project, Machine(device), supervised_only=tau is None, warned=True)
        manifest, values = read_manifest(project.manifest, project.base), {}
        for split in ("val", "test"):
            if any(row.mask_path is not None for row in manifest.split(split)):
                evaluate(open_project(folder / "params.yaml", [*settings, f"evaluation.split={split}"]), device=device)
                values[split] = json.loads((project.results / "evaluation/metrics.json").read_text())[name]
        (folder / "measured.json").write_text(json.dumps(values))
    refuse_stale(project, name)
    return json.loads((folder / "measured.json").read_text())


def line(runs: Mapping[int, dict[str, Any]], twins: Mapping[int, dict[str, Any]], split: str) -> str:
    """Mean, each seed, and the difference from the twins, of both numbers."""
    parts = []
    for title, key in (("mIoU", "miou"), ("rare third", "rare_miou")):
        values = [100 * run[split][key] for run in runs.values()]
        gain = sum(values) / len(values) - sum(100 * twins[seed][split][key] for seed in runs) / len(runs)
        parts.append(f"{title} {sum(values) / len(values):.1f} ({', '.join(f'{v:.1f}' for v in values)}; {gain:+.1f})")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tau", type=float, nargs="+", default=[0.0, 0.25, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    source, output = given.project.resolve(), given.output.resolve()
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for seed in given.seeds:
        for tau in (None, *given.tau):
            name = TWIN if tau is None else f"tau {tau:g}"
            folder = output / f"{name.replace(' ', '-')}-{seed}"
            runs.setdefault(name, {})[seed] = measured(source, folder, seed, tau, given.device)
    for split, of_twin in runs[TWIN][given.seeds[0]].items():
        print(f"{split}, the rare third is {', '.join(of_twin['rare_classes'])}; mean (each seed; difference from {TWIN}):")
        for name, of_seeds in runs.items():
            print(f"  {name}: {line(of_seeds, runs[TWIN], split)}")


if __name__ == "__main__":
    main()
