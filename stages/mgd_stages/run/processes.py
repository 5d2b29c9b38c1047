"""Tasks in processes of their own, as `study` and `search` run them: one task a process, with its output in a file."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from mgd_pipeline.errors import MGDError
from mgd_stages.run.machine import explain

PRELOADED = [f"mgd_stages.stages.{stage}" for stage in ("train_teacher", "precompute_teachers", "train_student", "evaluate")]


@dataclass(frozen=True)
class Workers:
    """The processes of a study or a search."""

    jobs: int
    """How many run at a time."""
    devices: Sequence[str]
    """Tasks take turns on these."""
    threads: int
    """Of torch, in each process."""


@contextmanager
def task_processes(command: str, jobs: int) -> Iterator[ProcessPoolExecutor]:
    """A pool in which each process does one task, so that its peak of memory is the task's own.

    Processes end with this one. Raises MGDError where the system ended a process.
    """
    # The server imports torch once, before its forks have threads or CUDA.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    try:
        with ProcessPoolExecutor(jobs, mp_context=processes, initializer=_end_with_parent, max_tasks_per_child=1) as pool:
            yield pool
    except BrokenProcessPool:
        raise MGDError(
            f"{command}: a process was ended from outside, most likely because memory ran out; run the same command to continue, "
            f"with fewer --jobs than {jobs} if there are several"
        ) from None


def _end_with_parent() -> None:
    """Ends this process with its parent, so that no process of a killed command writes beside the next call."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def attempt(work: Callable[[], None], log: Path, threads: int, *needs: str | None) -> str | None:
    """Does one task with its output in `log`. Returns what went wrong, here or in a task that it needs, else None."""
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
