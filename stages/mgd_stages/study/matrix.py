"""`mgd-pipeline study`: a matrix of partitions, seeds and variants over shared teachers and stores, resumable after a kill.

    <output>/
      1-16/                     a project for each partition: manifest, teachers, targets
        stores/<options>/       the same teachers' targets, stored otherwise
        runs/<variant>/<seed>/  a project for each run, whose manifest, teachers and targets are links
      results.parquet  table.md  plot.png

Every run is an ordinary project: its params.yaml says what it was, and each stage can be called in it by hand.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dask.base import compute
from dask.callbacks import Callback
from dask.delayed import delayed

from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import MGDError, ParamsError
from mgd_pipeline.params import Params, ShapesData
from mgd_pipeline.params_file import load_params, override_params, parse_params
from mgd_pipeline.words import counted, listed, verb
from mgd_stages.projects.presets import render_params
from mgd_stages.run.class_tables import read_numbers
from mgd_stages.run.machine import Machine, explain, require_writable
from mgd_stages.run.progress import console, progress, write_json
from mgd_stages.run.project import Project, open_project
from mgd_stages.study.variants import Variant

OnError = Literal["stop", "skip"]
_SHARED = ("raw", "manifest", "teachers")
_PRELOADED = [f"mgd_stages.{stage}" for stage in ("train_teacher", "precompute_teachers", "train_student", "evaluate")]


@dataclass(frozen=True)
class Run:
    """One student of the study."""

    partition: str
    variant: Variant
    seed: int
    folder: Path
    shared: Path
    """The project of its partition."""
    store: Path
    """The project whose targets it reads."""

    @property
    def key(self) -> tuple[str, str, int]:
        """Partition, variant and seed: no two runs of a study have the same."""
        return self.partition, self.variant.name, self.seed

    @property
    def done(self) -> Path:
        return self.folder / "data/results/run.json"

    @property
    def finished(self) -> bool:
        """Whether what `study_results` reads is there; where a part of it was removed, the run is evaluated again."""
        evaluation = self.folder / "data/results/evaluation"
        return self.done.exists() and all((evaluation / name).exists() for name in ("metrics.json", "class_iou.tsv"))


def study(
    config: Path,
    overrides: Sequence[str],
    output: Path,
    *,
    partitions: Sequence[str],
    seeds: int,
    variants: Sequence[Variant],
    jobs: int,
    devices: Sequence[str],
    threads: int,
    on_error: OnError = "stop",
) -> tuple[list[Run], list[str]]:
    """Runs what is missing of the matrix, `jobs` processes at a time; returns all finished runs below `output`, the matrix's own
    first, and what went wrong in others.

    `on_error` is that of `prepare_data` and `precompute_teachers`. Raises ParamsError, before anything is written, for parameters
    that do not fit and for a folder that holds other ones; MGDError, before any network is trained, for a data set that
    `prepare_data` refuses.
    """
    below = output.resolve()
    projects, runs = _matrix(config, list(overrides), below, partitions, seeds, variants)
    _earlier_runs(below, projects, runs)
    require_writable([below, *projects], [below / name for name in ("results.parquet", "table.md", "plot.png")])
    _write_projects(projects, runs)
    missing = [run for run in runs if not run.finished]
    already = len(runs) - len(missing)
    console.print(f"study: {counted(len(runs), 'run')}, {already} of them finished already -> {output}")
    failures = [failure for failure in _compute(missing, projects, jobs, devices, threads, on_error) if failure]
    earlier = _earlier_runs(below, projects, runs)
    if earlier:
        are = verb(len(earlier), "run of an earlier call is", "runs of earlier calls are")
        console.print(f"study: {len(earlier)} {are} in the results, too: {listed(run_names(run.key for run in earlier))}")
    finished = [*(run for run in runs if run.finished), *earlier]
    shares = list(dict.fromkeys(run.partition for run in finished))
    names = list(dict.fromkeys(run.variant.name for run in finished))
    finished.sort(key=lambda run: (shares.index(run.partition), names.index(run.variant.name), run.seed))
    return finished, list(dict.fromkeys(failures))


# --- what there is to do ----------------------------------------------------------------------------------------------


def _matrix(
    config: Path, overrides: list[str], output: Path, partitions: Sequence[str], seeds: int, variants: Sequence[Variant]
) -> tuple[dict[Path, Params], list[Run]]:
    """The parameters of every project of the study, by its folder, and the runs among them."""
    projects: dict[Path, Params] = {}
    runs = []
    for share in dict.fromkeys(partitions):
        base = load_params(config, [*overrides, f"data.partition={share}"])
        base = _anchored(base, config.resolve().parent)
        shared = output / share.replace("/", "-")
        projects[shared] = base
        for variant in variants:
            store, stored = shared, override_params(base, list(variant.store))
            if stored.targets != base.targets:
                name = re.sub(r"[^a-z0-9.]+", "-", " ".join(variant.store).replace("targets.", "").lower()).strip("-")
                store = shared / "stores" / name
                projects[store] = stored
            for seed in range(base.seed, base.seed + seeds):
                folder = shared / "runs" / variant.name / str(seed)
                projects[folder] = override_params(base, [*variant.overrides, f"seed={seed}"])
                runs.append(Run(share, variant, seed, folder, shared, store))
    for folder, params in projects.items():
        path = folder / "params.yaml"
        if path.exists() and load_params(path) != params:
            raise ParamsError(f"{path}: holds other parameters than this study; choose another folder, or remove {folder}")
    return projects, runs


def _earlier_runs(output: Path, projects: dict[Path, Params], runs: list[Run]) -> list[Run]:
    """The finished runs below `output` that the matrix `runs` does not have, by partition, variant and seed.

    Raises ParamsError for one of other settings: one table never mixes them.
    """
    asked, found = {run.folder for run in runs}, []
    base = projects[runs[0].shared]
    # Of each variant what one run of it has but for partition and seed; a run of the matrix says it first.
    settings = {run.variant.name: (_settings(projects[run.folder]), run.folder) for run in reversed(runs)}
    for path in output.glob("*/runs/*/*/params.yaml"):
        folder, shared, name = path.parent, path.parents[3], path.parents[1].name
        params = load_params(path)
        partition, done = str(params.data.partition), folder / "data/results/run.json"
        if folder in asked or not done.exists():
            continue
        student = (read_numbers(done) or {}).get("student", "distilled")
        if not (folder / "data/students" / student).exists():  # 0.1.0 did not say which student it is
            student = "supervised"
        store = (folder / "data/targets").resolve().parent.parent
        run = Run(partition, Variant(name, supervised_only=student == "supervised"), params.seed, folder, shared, store)
        if not run.finished:
            continue
        of_partition = load_params(shared / "params.yaml")
        if _settings(of_partition) != _settings(base) or of_partition.seed != base.seed:
            raise ParamsError(
                f"{shared / 'params.yaml'}: holds other parameters than this study, and one table would mix their runs; choose "
                f"another folder, or move {shared} away"
            )
        same, other = settings.setdefault(name, (_settings(params), folder))
        if _settings(params) != same:
            raise ParamsError(
                f"{path}: the variant {name} has other parameters than in {other}, and one table would mix their runs; give the "
                f"variant another name, or move {folder} away"
            )
        found.append(run)
    return sorted(found, key=lambda run: (run.partition, run.variant.name, run.seed))


def _settings(params: Params) -> dict[str, Any]:
    """What the runs of one variant have in common: everything but partition and seed."""
    raw = params.model_dump()
    raw["data"]["partition"], raw["seed"] = None, None
    return raw


def run_names(runs: Iterable[tuple[str, str, int]]) -> list[str]:
    """'1/8 distilled (seeds 0 and 1)' for each partition and variant of (partition, variant, seed)."""
    seeds: dict[str, list[str]] = {}
    for partition, variant, seed in runs:
        seeds.setdefault(f"{partition} {variant}", []).append(str(seed))
    return [f"{name} ({verb(len(found), 'seed', 'seeds')} {listed(found)})" for name, found in seeds.items()]


def _anchored(params: Params, base: Path) -> Params:
    """Paths of what the study reads but does not make, made absolute: its projects lie elsewhere."""
    raw = params.model_dump()
    if not isinstance(params.data, ShapesData):
        raw["data"]["root"] = str(base / params.data.root)
    for name, teacher in raw["teachers"].items():
        trained = name in params.train_teachers
        teacher["weights"] = f"data/teachers/{name}.safetensors" if trained else str(base / teacher["weights"])
    for section in (*raw["teachers"].values(), raw["student"]["network"]):
        for key in ("encoder_weights", "transformers"):  # where these are paths, and not names on a hub
            if key in section and (base / section[key]).exists():
                section[key] = str(base / section[key])
    return parse_params(raw)


def _write_projects(projects: dict[Path, Params], runs: list[Run]) -> None:
    for folder, params in projects.items():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        path = folder / "params.yaml"
        if not path.exists():
            replace_file(path, render_params(params).encode())
    for run in runs:
        for name in _SHARED:
            _link(run.shared / "data" / name, run.folder / "data" / name)
            if run.store != run.shared:
                _link(run.shared / "data" / name, run.store / "data" / name)
        _link(run.store / "data/targets", run.folder / "data/targets")


def _link(target: Path, link: Path) -> None:
    with suppress(FileExistsError):  # made by an earlier call, or by one that runs beside this one
        link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    if not link.is_symlink():
        raise ParamsError(
            f"{link}: must be a link to {target}, and is none, as in a copy that followed links (`cp -a` and `rsync -a` keep "
            "them); move it away"
        )


# --- doing it ---------------------------------------------------------------------------------------------------------


def _compute(
    runs: list[Run], projects: dict[Path, Params], jobs: int, devices: Sequence[str], threads: int, on_error: OnError
) -> list[str | None]:
    """Stages and runs as tasks, each in a process of its own; what went wrong, or None, for each run.

    Every data set is prepared before the first training begins: MGDError says what `prepare_data` refuses.
    """
    if not runs:
        return []
    tasks: dict[tuple[Path, str], Any] = {}
    count = 0

    def task(folder: Path, name: str, work: Callable[..., None], *needs: Any) -> Any:
        """One node of the graph; the same stage of the same project is one task, whoever needs it."""
        nonlocal count
        if (folder, name) not in tasks:
            device = devices[count % len(devices)]
            count += 1
            call = partial(work, folder / "params.yaml", device)
            tasks[folder, name] = delayed(_attempt, pure=False)(
                call, folder / f"{name}.log", threads, *needs, dask_key_name=f"{name} {folder}"
            )
        return tasks[folder, name]

    prepared = [task(folder, "prepare-data", partial(_prepare, on_error)) for folder in dict.fromkeys(run.shared for run in runs)]
    results = []
    for run in runs:
        params = projects[run.folder]
        heard = [] if run.variant.supervised_only else params.losses.used_teachers
        needs = []
        for name in heard:
            trained = []
            if name in params.train_teachers:
                trained = [task(run.shared, f"train-teacher-{name}", partial(_train_teacher, name))]
            needs.append(task(run.store, f"precompute-teachers-{name}", partial(_precompute, name, on_error), *trained))
        work = partial(_learn, run.variant.supervised_only, run.variant.live)
        results.append(task(run.folder, "run", work, *needs))

    by_key = {f"run {run.folder}": run for run in runs}
    with progress("study", len(runs), "run") as advance:
        finished = 0

        # Without a terminal these lines are all that tells that a study of hours is alive.
        def before(key: str, *_: object) -> None:
            name, folder = key.split(" ", 1)
            console.print(f"study: {name} begins; its output: {Path(folder) / name}.log")

        def after(key: str, result: object, *_: object) -> None:
            nonlocal finished
            name, folder = key.split(" ", 1)
            console.print(f"study: {name} of {folder} {'failed' if result else 'is done'}")
            if (run := by_key.get(key)) is not None:
                finished += 1
                advance(finished, f"{run.partition} {run.variant.name}, seed {run.seed}{': failed' if result else ''}")

        # The server imports torch once, and what it forks has no threads and no CUDA yet.
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(_PRELOADED)
        pool = ProcessPoolExecutor(
            jobs,
            mp_context=processes,
            initializer=_end_with_parent,
            max_tasks_per_child=1,  # so that peak memory is that of one task
        )
        try:
            with pool, Callback(pretask=before, posttask=after):
                at_once = partial(compute, scheduler="processes", pool=pool, chunksize=1, optimize_graph=False)
                if failures := [failure for failure in at_once(*prepared) if failure]:
                    raise MGDError("\n".join(failures))
                return list(at_once(*results))
        except BrokenProcessPool:
            raise MGDError(
                f"study: a process was ended from outside, most likely for want of memory; the same command goes on, "
                f"with fewer --jobs than {jobs} if there are more than one"
            ) from None


def _end_with_parent() -> None:
    """A killed study leaves no process behind that would write beside its successor."""
    study = multiprocessing.parent_process()
    assert study is not None

    def watch() -> None:
        study.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _attempt(work: Callable[[], None], log: Path, threads: int, *needs: str | None) -> str | None:
    """Does one task, its output in `log`. Returns what went wrong, here or in a task that this one needs, else None."""
    import torch

    for failure in needs:
        if failure:
            return failure
    torch.set_num_threads(threads)
    with open(log, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            work()
        except MGDError as error:
            return f"{log}: {error}"
        except (OSError, RuntimeError, MemoryError) as error:
            if (line := explain(error)) is None and not isinstance(error, OSError):
                raise
            return f"{log}: {line or error}"
    return None


def _prepare(on_error: OnError, config: Path, device: str) -> None:
    from mgd_stages.prepare_data import prepare_data

    project = open_project(config)
    if not (project.manifest / "partition.parquet").exists():
        prepare_data(project, on_error)


def _train_teacher(name: str, config: Path, device: str) -> None:
    from mgd_stages.run.project import choose_device
    from mgd_stages.train_teacher import train_teacher

    project = open_project(config)
    if not project.teacher(name).exists():
        train_teacher(project, name, Machine(choose_device(device)))


def _precompute(name: str, on_error: OnError, config: Path, device: str) -> None:
    from mgd_stages.precompute_teachers import precompute_teachers
    from mgd_stages.run.project import choose_device

    project = open_project(config)
    if not (project.results / f"teachers/{name}.json").exists():
        precompute_teachers(project, name, device=choose_device(device), on_error=on_error)


def _learn(supervised_only: bool, live: bool, config: Path, device: str) -> None:
    """Trains and evaluates one student; run.json says what it cost, and is written last."""
    from mgd_stages.evaluate import evaluate
    from mgd_stages.run.project import choose_device
    from mgd_stages.train_student import train_student

    project, chosen = open_project(config), choose_device(device)
    name = "supervised" if supervised_only else "distilled"
    if not project.student(name).exists():
        provider = _live_teachers(project, chosen) if live else None
        train_student(project, Machine(chosen), supervised_only=supervised_only, live=provider)
    evaluate(project, device=chosen)
    speed = read_numbers(project.results / f"train-student-{name}/speed.json") or {}
    write_json(project.results / "run.json", {**speed, "student": name})


def _live_teachers(project: Project, device: Any) -> Any:
    from mgd_pipeline.data.manifest import read_manifest
    from mgd_pipeline.training.live import live_targets
    from mgd_stages.run.loaded_teacher import load_teacher

    manifest = read_manifest(project.manifest, project.base)
    names = project.params.losses.used_teachers
    return partial(live_targets, {name: load_teacher(project, name, manifest, device).teacher for name in names})
