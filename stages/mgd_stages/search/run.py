"""`mgd-pipeline search`: trials over a project's teacher caches, then the winner against the project's own parameters.

Called again, it continues.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mgd_pipeline.data.manifest import read_manifest, write_manifest
from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import MemoryShortage, MGDError, NonFiniteError, ParamsError
from mgd_pipeline.params import Params
from mgd_pipeline.params_file import change_params
from mgd_pipeline.words import counted, listed, per_cent
from mgd_stages.projects.presets import render_params
from mgd_stages.run.class_tables import read_numbers
from mgd_stages.run.machine import require_writable
from mgd_stages.run.processes import Failure, Workers, attempt, task_threads
from mgd_stages.run.progress import console, duration, json_text, write_json
from mgd_stages.run.project import Project, choose_device, manifest_hash, open_project, short_of_memory
from mgd_stages.search.halving import (
    FINAL_SEEDS,
    Job,
    Trial,
    affordable,
    all_failed,
    begun_of,
    next_job,
    rungs_of,
    trainings,
    winner,
)
from mgd_stages.search.held_back import search_manifest
from mgd_stages.search.space import default_space, plain, read_space, render_space
from mgd_stages.search.trials import (
    STUDENTS,
    Objective,
    Search,
    failure_of,
    load_optuna,
    make_project,
    propose,
    read_trials,
    seconds_of,
    slot_names,
    student_teacher,
    write_failure,
)
from mgd_stages.study.matrix import anchored, link_folder
from mgd_stages.study.run import learn

_TEACHING = 2
"""Students that may become teachers."""


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    output: Path
    space: Path | None
    """None: space.yaml of the output folder, which is written if it is not there."""
    trials: int | None
    hours: float | None
    """Either this or `trials`; neither to write the space alone."""
    objective: Objective
    small_val: bool
    self_teach: bool


@dataclass(frozen=True)
class Outcome:
    """A finished search."""

    search: Search
    trials: list[Trial]
    best: Trial
    finals: list[int]
    """Numbers of the trials that were trained again: 0, which is the project's own parameters, and the winner."""
    seeds: list[int]
    held_back: list[str]
    """Ids of val that the search never saw; none where there is a test split."""
    failures: list[str]


def search(project: Project, asked: Asked, workers: Workers) -> Outcome | None:
    """Runs what is missing of a search, and of the comparison at its end; None where only the space was asked for.

    Raises ParamsError, before anything is written, for parameters, a space or an output folder that do not fit; a CacheError or a
    DataError for a project whose teacher caches or manifest are not finished; MGDError where the first trials all fail.
    """
    load_optuna()
    space, held_back = _begin(project, asked)
    if asked.trials is None and asked.hours is None:
        return None
    with task_threads(workers.jobs) as pool:
        trials = _try(space, asked, workers, pool)
        best = winner(trials, len(space.rungs))
        if best is None:
            failures = [trial.failure for trial in trials if trial.failure]
            raise MGDError(f"search: no trial was finished at full length; the last one failed: {failures[-1]}")
        finals = list(dict.fromkeys([0, best.number]))
        seeds = [space.base.seed + 1 + i for i in range(FINAL_SEEDS)]
        failures = _compare(space, [trials[number] for number in finals], seeds, workers, pool)
    write_best(project, space, best)
    return Outcome(space, trials, best, finals, seeds, held_back, failures)


def write_best(project: Project, search: Search, best: Trial) -> None:
    """best.yaml: the winner's parameters, complete, with the paths of the project's own params.yaml. The students that taught the
    winner are copied beside it, for trials are not kept for ever."""
    params, settings = project.params, search.changes(best.values)
    if students := best.values.get(STUDENTS):
        params = change_params(params, {f"teachers.{name}": _kept(project, search, name) for name in students}, "best.yaml")
        listened = settings.get("losses.pixel_teachers", project.params.losses.pixel_teachers)
        settings["losses.pixel_teachers"] = [*listened, *students]
    replace_file(search.folder / "best.yaml", render_params(change_params(params, settings, "best.yaml")).encode())


def _kept(project: Project, search: Search, name: str) -> dict[str, Any]:
    """The section of a teacher that was a student of this search, whose file is now beside best.yaml."""
    section, base = student_teacher(search, name), project.base.resolve()
    file = search.folder / f"teachers/{name}.safetensors"
    file.parent.mkdir(exist_ok=True)
    replace_file(file, Path(section["weights"]).read_bytes())
    return {**section, "weights": str(file.relative_to(base) if file.is_relative_to(base) else file)}


def _begin(project: Project, asked: Asked) -> tuple[Search, list[str]]:
    """Checks everything, then writes what all trials share. Returns the search and the ids that it holds back."""
    output = asked.output.resolve()
    manifest, held_back = search_manifest(read_manifest(project.manifest, project.base), asked.small_val)
    base = _trial_parameters(project)
    file = asked.space or output / "space.yaml"
    if asked.space is None and not file.exists():
        require_writable([output])
        replace_file(file, render_space(default_space(base)).encode())
        console.print(f"search: wrote {file}, which says what trials may change")
    space = read_space(file, base)
    search = Search(output, base, space, rungs_of(base.student.steps), asked.objective)
    fingerprints = _teacher_caches(project, search)
    told = {
        "parameters": hashlib.sha256(json_text(base.model_dump()).encode()).hexdigest(),
        "manifest": manifest_hash(project),
        "teacher caches": fingerprints,
        "space": plain(space),
        "objective": asked.objective,
        "steps": list(search.rungs),
        "held back": held_back,
        "self-teach": asked.self_teach,
    }
    if asked.trials is None and asked.hours is None:
        console.print(
            f"search: {file} can be edited until the first trial; say how long the search may take, by --trials or --hours"
        )
        return search, held_back
    note = output / "search.json"
    if (earlier := read_numbers(note)) is not None and (other := [key for key in told if earlier.get(key) != told[key]]):
        raise ParamsError(
            f"{note}: this folder holds a search with other {listed(other)}; choose another --output, or remove {output}"
        )
    require_writable([output], [output / name for name in ("best.yaml", "results.parquet", "search.html")])
    if earlier is None:
        replace_file(output / ".gitignore", b"/manifest/\n/targets/\n/trials/\n/final/\n/students/\n")
        write_manifest(manifest, output / "manifest")
        write_json(note, told)  # after the manifest: where it is, the manifest is whole
    (output / "targets").mkdir(exist_ok=True)
    for name in fingerprints:
        link_folder(project.targets(name).resolve(), output / f"targets/{name}.zarr")
    console.print(_what_is_measured(held_back))
    return search, held_back


def _what_is_measured(held_back: Sequence[str]) -> str:
    if not held_back:
        return "search: trials are compared on val; the test split is first seen in the final comparison"
    return f"search: there is no test split, so {counted(len(held_back), 'image')} of val are held back for the final comparison"


def _trial_parameters(project: Project) -> Params:
    base = anchored(project.params, project.base)
    settings = {"evaluation.split": "val", "evaluation.overlays": 1}  # pictures of hundreds of trials are for nobody
    return change_params(base, settings, str(project.base / "params.yaml"))


def _teacher_caches(project: Project, search: Search) -> dict[str, str]:
    """Fingerprints of the caches that some trial may read. Raises a CacheError for one that is not finished."""
    from mgd_pipeline.caches.reader import open_cache

    used = list(search.base.losses.used_teachers)
    for axis in search.space:
        for end in axis.choices or (axis.low, axis.high):
            settings = axis.settings(end)
            used += change_params(search.base, settings, "space").losses.used_teachers
            # Another axis may give a weight to the term of a teacher that is named here.
            named = [value for key, value in settings.items() if key.endswith(("_teacher", "_teachers"))]
            used += [name for value in named for name in ([value] if isinstance(value, str) else value)]
    return {name: open_cache(project.targets(name)).fingerprint for name in dict.fromkeys(used)}


def _planned(search: Search, asked: Asked, workers: Workers, trials: Sequence[Trial]) -> tuple[int, bool]:
    """How many trials there will be, and whether that is known; hours are counted in trials when the first training is measured.

    Raises MGDError if the hours are not enough for one trial.
    """
    if asked.trials is not None:
        return asked.trials, True
    assert asked.hours is not None
    seconds = seconds_of(search, trials)
    if seconds is None:
        return max(len(trials), workers.jobs), False
    begun = begun_of(trials, len(search.rungs))
    enough = affordable(3600 * asked.hours, seconds, workers.jobs, begun)
    if not enough and len(trials) <= workers.jobs:
        final = duration(2 * FINAL_SEEDS * seconds[-1] / workers.jobs)
        raise MGDError(f"--hours {asked.hours:g}: the final comparison alone takes about {final} here; give more hours")
    return max(len(trials), enough), True


def _say_plan(search: Search, count: int) -> None:
    lengths = zip(trainings(count, len(search.rungs)), search.rungs, strict=True)
    plan = ", ".join(f"{number} x {steps} steps" for number, steps in lengths)
    console.print(f"search: {counted(count, 'trial')} planned (about {plan}), then {2 * FINAL_SEEDS} trainings of full length")


def _try(search: Search, asked: Asked, workers: Workers, pool: Executor) -> list[Trial]:
    """Trains until nothing of the planned trials is left. Returns all trials."""
    running: dict[Future[Failure | None], tuple[Job, str]] = {}
    said = False
    while True:
        trials = read_trials(search)
        count, known = _planned(search, asked, workers, trials)
        if known and not said:
            _say_plan(search, count)
            said = True
        if why := all_failed(trials, count):
            raise MGDError(f"search: the first trials all fail: {why}; after a change remove {search.folder / 'trials'}")
        while len(running) < workers.jobs and (job := next_job(trials, count, len(search.rungs), _numbers(running))) is not None:
            if job.trial == len(trials):
                if asked.self_teach:
                    _let_teach(search, trials, workers, pool)
                values = propose(search, trials, slot_names(search.folder) if asked.self_teach else ())
                write_json(search.of_trial(job.trial) / "trial.json", values)
            folder, used = search.of_job(job), Counter(device for _, device in running.values())
            device = min(workers.devices, key=lambda name: used[name])
            if _prepared(search, job, folder):
                running[_train_in(pool, folder, device, workers)] = (job, device)
            trials = read_trials(search)
        if not running:
            if next_job(trials, _planned(search, asked, workers, trials)[0], len(search.rungs), ()) is None:
                return trials
            continue
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job, _ = running.pop(future)
            _record(future.result(), search.of_job(job))
            _say(search, job)


def _numbers(running: dict[Future[Failure | None], tuple[Job, str]]) -> set[int]:
    return {job.trial for job, _ in running.values()}


def _prepared(search: Search, job: Job, folder: Path) -> bool:
    """Makes the project of a training. False where its parameters contradict each other, which is then recorded."""
    values = read_numbers(search.of_trial(job.trial) / "trial.json") or {}
    try:
        params = search.parameters(values, search.rungs[job.rung], search.base.seed)
    except ParamsError as error:
        write_failure(folder, str(error))
        _say(search, job)
        return False
    make_project(search, folder, params)
    return True


def _train_in(pool: Executor, folder: Path, device: str, workers: Workers) -> Future[Failure | None]:
    return pool.submit(attempt, partial(_train, folder / "params.yaml", device), folder / "run.log", workers.threads)


def _train(config: Path, device: str) -> None:
    """Trains and evaluates one student. What is the fault of its settings is recorded; further errors stop the search."""
    try:
        learn(False, False, config, device)
    except (NonFiniteError, ParamsError, MemoryShortage) as error:
        write_failure(config.parent, str(error))
        print(error)
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or short_of_memory(error)):
            raise
        write_failure(config.parent, f"memory is too small: {error}")
        print(error)


def _record(failure: Failure | None, folder: Path) -> None:
    """Notes that a training was killed. Raises MGDError where a training ended for another reason that it did not note itself."""
    if failure is None:
        return
    if not failure.killed:
        raise MGDError(failure.reason)
    write_failure(folder, f"{failure.reason}; remove {folder}, and the same command tries this training again")


def _say(search: Search, job: Job) -> None:
    """Says how a training ended."""
    (trial,) = [trial for trial in read_trials(search) if trial.number == job.trial]
    what = f"search: trial {job.trial}, {counted(search.rungs[job.rung], 'step')}"
    if trial.failure is not None:
        console.print(f"{what}: failed: {trial.failure}")
    elif len(trial.scores) > job.rung:
        console.print(f"{what}: {per_cent(trial.scores[job.rung])} % on val")


def _compare(search: Search, trials: Sequence[Trial], seeds: Sequence[int], workers: Workers, pool: Executor) -> list[str]:
    """Trains the recipes again at full length with new seeds, and measures them on val and on test. Returns what failed."""
    waiting = []
    for seed in seeds:
        for trial in trials:
            folder = search.of_final(trial.number, seed)
            params = search.parameters(trial.values, search.rungs[-1], seed)
            make_project(search, folder, params)
            of_test = change_params(params, {"evaluation.split": "test"}, "search")
            make_project(search, folder / "test", of_test)
            for students in (folder / "data/students/distilled", folder / "test/data/students"):
                students.mkdir(parents=True, exist_ok=True)
            link_folder(folder / "data/students/distilled", folder / "test/data/students/distilled")
            if not (folder / "measured.json").exists() and failure_of(folder) is None:
                waiting.append(folder)
    if waiting:
        console.print(f"search: trains {counted(len(waiting), 'student')} of full length with new seeds for the final comparison")
    tasks = {}
    for i, folder in enumerate(waiting):
        work = partial(_train_and_test, folder / "params.yaml", workers.devices[i % len(workers.devices)])
        tasks[pool.submit(attempt, work, folder / "run.log", workers.threads)] = folder
    while tasks:
        for future in wait(tasks, return_when=FIRST_COMPLETED).done:
            folder = tasks.pop(future)
            _record(future.result(), folder)
            console.print(f"search: {folder.relative_to(search.folder)} {'failed' if failure_of(folder) else 'is done'}")
    folders = [search.of_final(trial.number, seed) for trial in trials for seed in seeds]
    return [f"{folder}: {why}" for folder in folders if (why := failure_of(folder)) is not None]


def _train_and_test(config: Path, device: str) -> None:
    from mgd_stages.stages.evaluate import evaluate

    _train(config, device)
    if failure_of(config.parent) is None:
        evaluate(open_project(config.parent / "test/params.yaml"), device=choose_device(device))
        write_json(config.parent / "measured.json", {"splits": ["val", "test"]})


def _let_teach(search: Search, trials: Sequence[Trial], workers: Workers, pool: Executor) -> None:
    """Makes a teacher of the best student of full length that is above their median and teaches nobody yet."""
    names = slot_names(search.folder)
    finished = [trial for trial in trials if len(trial.scores) == len(search.rungs)]
    if len(names) == _TEACHING or len(finished) < 2:
        return
    median = statistics.median(trial.scores[-1] for trial in finished)
    above = [trial for trial in finished if trial.scores[-1] > median and f"trial-{trial.number:04d}" not in names]
    if not above:
        return
    name = f"trial-{max(above, key=lambda trial: (trial.scores[-1], -trial.number)).number:04d}"
    folder = search.folder / "students" / name
    params = change_params(search.base, {f"teachers.{name}": student_teacher(search, name)}, "search")
    make_project(search, folder, params)
    work = partial(_cache, name, folder / "params.yaml", workers.devices[0])
    if (failure := pool.submit(attempt, work, folder / "run.log", workers.threads).result()) is not None:
        raise MGDError(failure.reason)
    write_json(search.folder / "students.json", {"students": [*names, name]})
    console.print(f"search: the student of {name} teaches from now on")


def _cache(name: str, config: Path, device: str) -> None:
    from mgd_stages.stages.precompute_teachers import precompute_teachers

    precompute_teachers(open_project(config), name, device=choose_device(device))


def name_of(number: int) -> str:
    """What tables call a trial of the final comparison."""
    return "own parameters" if number == 0 else f"trial {number}"
