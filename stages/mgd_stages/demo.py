"""`mgd-pipeline demo`: all stages on the built-in data set, one after the other, without DVC."""

from __future__ import annotations

from pathlib import Path

import torch

from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params_file import override_params
from mgd_stages.projects.init import init_project
from mgd_stages.projects.presets import preset, render_params
from mgd_stages.reports.page import report
from mgd_stages.run.machine import Machine
from mgd_stages.run.progress import console
from mgd_stages.run.project import open_project
from mgd_stages.stages.compare_teachers import compare_teachers
from mgd_stages.stages.evaluate import evaluate
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.prepare_data import prepare_data
from mgd_stages.stages.train_student import train_student
from mgd_stages.stages.train_teacher import train_teacher

_SHORT = ["data.train=160", "data.test=32", "data.val=8", "teacher_training.steps=60", "student.steps=100"]
"""A run to look at, not to judge by: everything works, nothing is trained to the end."""


def demo(output: Path, *, full: bool, seed: int, overrides: list[str], device: torch.device) -> None:
    """Makes a project in `output` and runs it; called again, unfinished stages go on and finished ones are kept.

    Raises ParamsError, before anything is written, for overrides that do not fit, and for a folder that holds a project
    with other parameters.
    """
    config = output / "params.yaml"
    default = preset("shapes", "data/raw/shapes", "1/16")
    params = override_params(default, [f"seed={seed}", *([] if full else _SHORT), *overrides])
    if not config.exists():
        init_project("shapes", None, "1/16", output)
        replace_file(config, render_params(params).encode())
    project = open_project(config)
    if project.params != params:
        raise ParamsError(f"{config}: holds other parameters than this demo; remove the folder, or choose another one")
    if not (project.manifest / "partition.parquet").exists():
        prepare_data(project)
    for name in project.params.train_teachers:
        if not project.teacher(name).exists():
            train_teacher(project, name, Machine(device))
    for name in project.params.teachers:
        if not (project.results / f"teachers/{name}.json").exists():
            precompute_teachers(project, name, device=device)
    if not (project.results / "compare-teachers/metrics.json").exists():
        compare_teachers(project)
    for name in ("supervised", "distilled"):
        if not project.student(name).exists():
            train_student(project, Machine(device), supervised_only=name == "supervised")
    evaluate(project, device=device)
    report(project)
    console.print(f"the whole project: {output.resolve()}")
