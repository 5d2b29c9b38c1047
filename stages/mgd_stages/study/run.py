"""`mgd-pipeline study`: many runs over shared teachers and teacher caches. Called again, it continues.

The runs and what they need of each other are a dask graph of tasks; each task has its own process.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dask.base import compute
from dask.callbacks import Callback
from dask.delayed import delayed

from mgd_pipeline.errors import MGDError, ParamsError
from mgd_pipeline.params import Params
from mgd_pipeline.words import counted, listed, verb
from mgd_stages.run.class_tables import read_numbers
from mgd_stages.run.machine import Machine, require_writable
from mgd_stages.run.processes import Failure, Workers, attempt, task_threads
from mgd_stages.run.progress import console, progress, write_json
from mgd_stages.run.project import Project, choose_device, open_project
from mgd_stages.study.matrix import Matrix, Run, earlier_runs, projects_and_runs, run_names, write_projects

OnError = Literal["stop", "skip"]


def study(
    config: Path, overrides: Sequence[str], output: Path, matrix: Matrix, workers: Workers, on_error: OnError = "stop"
) -> tuple[list[Run], list[str]]:
    """Runs what is missing of the matrix. Returns all finished runs below `output`, the runs of the matrix first, and the failures.

    `on_error`: whether images that cannot be read stop prepare-data and precompute-teachers, or are left out.
    Raises ParamsError, before anything is written, for parameters that do not fit and for a folder that holds other parameters;
    MGDError, before any network is trained, for a data set that `prepare_data` refuses.
    """
    below = output.resolve()
    projects, runs = projects_and_runs(config, overrides, below, matrix)
    _check_live(projects, runs)
    earlier_runs(below, projects, runs)
    require_writable([below, *projects], [below / name for name in ("results.parquet", "table.md", "plot.png")])
    write_projects(projects, runs)
    missing = [run for run in runs if not run.finished]
    console.print(f"study: {counted(len(runs), 'run')}, {len(runs) - len(missing)} of them finished already -> {output}")
    failures = _compute(missing, projects, workers, on_error) if missing else []
    if earlier := earlier_runs(below, projects, runs):
        are = verb(len(earlier), "run of an earlier call is", "runs of earlier calls are")
        console.print(f"study: {len(earlier)} {are} in the results, too: {listed(run_names(run.key for run in earlier))}")
    finished = [*(run for run in runs if run.finished), *earlier]
    shares, names = [run.partition for run in finished], [run.variant.name for run in finished]
    finished.sort(key=lambda run: (shares.index(run.partition), names.index(run.variant.name), run.seed))
    return finished, list(dict.fromkeys(failure.reason for failure in failures if failure))


def _compute(runs: list[Run], projects: dict[Path, Params], workers: Workers, on_error: OnError) -> list[Failure | None]:
    """Computes the runs and the stages that they need. Returns for each run what went wrong, or None.

    Every data set is prepared before the first training begins. Raises MGDError with what `prepare_data` refuses.
    """
    tasks: dict[str, Any] = {}

    def task(folder: Path, name: str, work: Callable[..., None], *needs: Any) -> Any:
        """One node of the graph; a stage of a project is one task, however many runs need it."""
        key = f"{name} {folder}"
        if key not in tasks:
            call = partial(work, folder / "params.yaml", workers.devices[len(tasks) % len(workers.devices)])
            log = folder / f"{name}.log"
            tasks[key] = delayed(attempt, pure=False)(call, log, workers.threads, *needs, dask_key_name=key)
        return tasks[key]

    prepared = [task(folder, "prepare-data", partial(_prepare, on_error)) for folder in dict.fromkeys(run.shared for run in runs)]
    results = []
    for run in runs:
        params, needs = projects[run.folder], []

        def precomputed(name: str, run: Run = run, params: Params = params) -> Any:
            trained = []
            if name in params.heads:
                base = precomputed(params.heads[name])
                trained = [task(run.caching, f"train-teacher-{name}", partial(_train_teacher, name), base)]
            elif name in params.train_teachers:
                trained = [task(run.shared, f"train-teacher-{name}", partial(_train_teacher, name))]
            return task(run.caching, f"precompute-teachers-{name}", partial(_precompute, name, on_error), *trained)

        needs += [precomputed(name) for name in ([] if run.variant.supervised_only else params.losses.used_teachers)]
        results.append(task(run.folder, "run", partial(learn, run.variant.supervised_only, run.variant.live), *needs))

    by_key = {f"run {run.folder}": run for run in runs}
    with progress("study", len(runs), "run") as advance:
        finished = itertools.count(1)

        # Without a terminal only these lines say that a long study is alive.
        def before(key: str, *_: object) -> None:
            name, folder = key.split(" ", 1)
            console.print(f"study: {name} begins; its output: {Path(folder) / name}.log")

        def after(key: str, result: object, *_: object) -> None:
            name, folder = key.split(" ", 1)
            console.print(f"study: {name} of {folder} {'failed' if result else 'is done'}")
            if (run := by_key.get(key)) is not None:
                advance(next(finished), f"{run.partition} {run.variant.name}, seed {run.seed}{': failed' if result else ''}")

        with task_threads(workers.jobs) as pool, Callback(pretask=before, posttask=after):
            at_once = partial(compute, scheduler="threads", pool=pool, optimize_graph=False)
            if failures := [failure.reason for failure in at_once(*prepared) if failure]:
                raise MGDError("\n".join(failures))
            return list(at_once(*results))


# What a task does; a stage whose result is there is not called again. The stages import torch, so they are imported late.


def _prepare(on_error: OnError, config: Path, device: str) -> None:
    from mgd_stages.stages.prepare_data import prepare_data

    project = open_project(config)
    if not (project.manifest / "partition.parquet").exists():
        prepare_data(project, on_error)


def _train_teacher(name: str, config: Path, device: str) -> None:
    from mgd_stages.stages.train_teacher import train_teacher

    project = open_project(config)
    if not project.teacher(name).exists():
        train_teacher(project, name, Machine(choose_device(device)))


def _precompute(name: str, on_error: OnError, config: Path, device: str) -> None:
    from mgd_stages.stages.precompute_teachers import precompute_teachers

    project = open_project(config)
    if not (project.results / f"teachers/{name}.json").exists():
        precompute_teachers(project, name, device=choose_device(device), on_error=on_error)


def learn(supervised_only: bool, live: bool, config: Path, device: str) -> None:
    """Trains and evaluates one student; run.json says what it cost, its seconds those of this call, and is written last."""
    from mgd_stages.stages.evaluate import evaluate
    from mgd_stages.stages.train_student import train_student

    began, project, chosen = time.monotonic(), open_project(config), choose_device(device)
    name = "supervised" if supervised_only else "distilled"
    if not project.student(name).exists():
        provider = _live_teachers(project, chosen) if live else None
        train_student(project, Machine(chosen), supervised_only=supervised_only, live=provider)
    evaluate(project, device=chosen)
    speed = read_numbers(project.results / f"train-student-{name}/speed.json") or {}
    write_json(project.results / "run.json", {**speed, "student": name, "seconds": time.monotonic() - began})


def _check_live(projects: dict[Path, Params], runs: list[Run]) -> None:
    """Raises ParamsError for a teacher that would have to run beside the student and cannot."""
    from mgd_pipeline.training.live import runs_live

    for run in (run for run in runs if run.variant.live):
        params = projects[run.folder]
        if measured := params.losses.measured:
            raise ParamsError(
                f"--variant {run.variant.name}: losses.{measured} is measured on teacher caches, which a live run does not read: "
                "leave this variant out"
            )
        for name in params.losses.used_teachers:
            if not runs_live(params.teachers[name]):
                raise ParamsError(
                    f"--variant {run.variant.name}: teacher {name} cannot run live; only teachers with decoder deeplabv3plus, fpn "
                    "or upernet can, without class_map and short_side: leave this variant out"
                )


def _live_teachers(project: Project, device: Any) -> Any:
    from mgd_pipeline.data.manifest import read_manifest
    from mgd_pipeline.training.live import live_targets
    from mgd_stages.run.loaded_teacher import load_teacher

    manifest = read_manifest(project.manifest, project.base)
    names = project.params.losses.used_teachers
    return partial(live_targets, {name: load_teacher(project, name, manifest, device).teacher for name in names})
