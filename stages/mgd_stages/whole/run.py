"""`mgd-pipeline run`: the stages of a project in their order, in one process. Called again, it continues."""

from __future__ import annotations

import time
from collections.abc import Collection

from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import SmpTeacher
from mgd_stages.projects.dvc_file import Stage
from mgd_stages.reports.page import report
from mgd_stages.run.loaded_teacher import require_weights
from mgd_stages.run.machine import Machine, require_writable
from mgd_stages.run.progress import console, duration
from mgd_stages.run.project import Project
from mgd_stages.run.ranks import ranks_of_torchrun
from mgd_stages.run.teacher_batches import OnError
from mgd_stages.stages.compare_teachers import compare_teachers
from mgd_stages.stages.evaluate import evaluate
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.prepare_data import prepare_data
from mgd_stages.stages.train_student import train_student
from mgd_stages.stages.train_teacher import train_teacher
from mgd_stages.whole.by_dvc import adopt_from_dvc
from mgd_stages.whole.estimate import say_estimate
from mgd_stages.whole.records import Records, shown


def run_project(project: Project, machine: Machine, on_error: OnError = "stop") -> None:
    """Runs every stage that is not up to date, as `Records` knows it; says first how long they will take.

    `on_error` is what prepare-data and precompute-teachers do with images that cannot be used. Raises what the stages raise: the
    next call goes on with the stage that failed.
    """
    if ranks_of_torchrun()[1] > 1:
        raise ParamsError("run: runs in one process; call it without torchrun, or `mgd-pipeline train-student` under torchrun")
    require_writable([project.base / ".mgd/run"])
    for name in project.params.teachers:
        if name not in (*project.params.train_teachers, *project.params.heads):  # known now, and not after hours of other stages
            require_weights(project, name)
    began, records, ran = time.monotonic(), Records(project), set[str]()
    adopt_from_dvc(project, records)

    def run_if_outdated(stage: Stage) -> None:
        if (reason := records.outdated(stage)) is None:
            console.print(f"{shown(stage.name)}: up to date")
            return
        console.print(f"{shown(stage.name)}: runs, because {reason}")
        stage_began = time.monotonic()
        with records.noting(stage):
            _run(project, stage.name, machine, on_error, ran)
        ran.add(stage.name)
        console.print(f"{shown(stage.name)}: took {duration(time.monotonic() - stage_began)}")

    # Time is measured when the images are known and published teachers are there.
    first = [stage for stage in records.stages.values() if stage.name == "prepare-data" or _is_fetched(project, stage)]
    for stage in first:
        run_if_outdated(stage)
    if waiting := records.waiting():
        say_estimate(project, waiting, machine)
    for stage in records.stages.values():
        if stage not in first:
            run_if_outdated(stage)
    console.print(f"run: all {len(records.stages)} stages are up to date, after {duration(time.monotonic() - began)}")


def _is_fetched(project: Project, stage: Stage) -> bool:
    """Whether a stage fetches a published teacher."""
    kind, _, name = stage.name.partition("@")
    return kind == "train-teacher" and not isinstance(project.params.teachers[name], SmpTeacher)


def _run(project: Project, stage: str, machine: Machine, on_error: OnError, ran: Collection[str]) -> None:
    """`ran`: the stages that this call has run before."""
    match stage.partition("@"):
        case "prepare-data", _, _:
            prepare_data(project, on_error)
        case "train-teacher" | "train-head", _, teacher:
            train_teacher(project, teacher, machine)
        case "precompute-teachers", _, teacher:
            precompute_teachers(project, teacher, device=machine.device, on_error=on_error)
        case "compare-teachers", _, _:
            compare_teachers(project)
        case "train-student", _, _:
            train_student(project, machine, warned="compare-teachers" in ran)
        case "train-student-supervised", _, _:
            train_student(project, machine, supervised_only=True)
        case "evaluate", _, _:
            evaluate(project, device=machine.device)
        case "report", _, _:
            report(project)
