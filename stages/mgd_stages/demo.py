"""`mgd-pipeline demo`: all stages on the built-in data set, one after the other, without DVC."""

from __future__ import annotations

from pathlib import Path

import torch

from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params_file import override_params
from mgd_stages.projects.init import init_project
from mgd_stages.projects.presets import preset, render_params
from mgd_stages.run.machine import Machine
from mgd_stages.run.progress import console
from mgd_stages.run.project import open_project
from mgd_stages.whole.run import run_project

_SHORT = ["data.train=160", "data.test=32", "data.val=8", "teacher_training.steps=60", "student.steps=100"]
"""A run to look at, not to judge by: everything works, nothing is trained to the end."""


def demo(output: Path, *, full: bool, seed: int, overrides: list[str], device: torch.device) -> None:
    """Makes a project in `output` and runs it; called again, it continues.

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
    run_project(project, Machine(device))
    console.print(f"the whole project: {output.resolve()}")
