"""Trainings of the student that tests run, interrupt and compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mgd_stages.stages.train_student as stage
from conftest import LONGER
from mgd_pipeline.training.batches import Batch
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project, open_project
from mgd_stages.stages.train_student import train_student

CPU = torch.device("cpu")
FEATURE = ["losses.feature=1", "losses.feature_teachers=[wide, deep]"]


def distil(project: Project, **changes: Any) -> None:
    train_student(project, Machine(CPU, **changes))


def results(project: Project) -> dict[str, bytes]:
    """The student, and every logged number."""
    folder = project.results / "train-student-distilled"
    files = [project.student("distilled"), folder / "metrics.json", *sorted(folder.glob("plots/*"))]
    return {path.name: path.read_bytes() for path in files}


def in_steps(patched: pytest.MonkeyPatch, act: Callable[[Batch, dict[str, torch.Tensor]], object]) -> None:
    """`act` gets the batch and the terms of every step."""
    whole = stage.step_terms

    def step_terms(forward: Any, batch: Batch, *others: Any) -> dict[str, torch.Tensor]:
        terms = whole(forward, batch, *others)
        act(batch, terms)
        return terms

    patched.setattr(stage, "step_terms", step_terms)


def train_in_child(config: str) -> None:
    torch.set_num_threads(1)
    distil(open_project(Path(config), LONGER))
