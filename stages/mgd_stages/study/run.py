"""`mgd-pipeline study`: many runs over shared teachers and teacher caches. Called again, it continues."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mgd_pipeline.words import counted, listed, verb
from mgd_stages.run.machine import require_writable
from mgd_stages.run.progress import console
from mgd_stages.study.matrix import Matrix, Run, earlier_runs, projects_and_runs, run_names, write_projects
from mgd_stages.study.tasks import Workers, compute_runs


def study(config: Path, overrides: Sequence[str], output: Path, matrix: Matrix, workers: Workers) -> tuple[list[Run], list[str]]:
    """Runs what is missing of the matrix. Returns all finished runs below `output`, the runs of the matrix first, and the failures.

    Raises ParamsError, before anything is written, for parameters that do not fit and for a folder that holds other parameters;
    MGDError, before any network is trained, for a data set that `prepare_data` refuses.
    """
    below = output.resolve()
    projects, runs = projects_and_runs(config, overrides, below, matrix)
    earlier_runs(below, projects, runs)
    require_writable([below, *projects], [below / name for name in ("results.parquet", "table.md", "plot.png")])
    write_projects(projects, runs)
    missing = [run for run in runs if not run.finished]
    already = len(runs) - len(missing)
    console.print(f"study: {counted(len(runs), 'run')}, {already} of them finished already -> {output}")
    failures = [failure for failure in compute_runs(missing, projects, workers) if failure]
    earlier = earlier_runs(below, projects, runs)
    if earlier:
        are = verb(len(earlier), "run of an earlier call is", "runs of earlier calls are")
        console.print(f"study: {len(earlier)} {are} in the results, too: {listed(run_names(run.key for run in earlier))}")
    finished = [*(run for run in runs if run.finished), *earlier]
    shares = list(dict.fromkeys(run.partition for run in finished))
    names = list(dict.fromkeys(run.variant.name for run in finished))
    finished.sort(key=lambda run: (shares.index(run.partition), names.index(run.variant.name), run.seed))
    return finished, list(dict.fromkeys(failures))
