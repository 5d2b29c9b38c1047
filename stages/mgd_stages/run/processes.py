"""Tasks in processes of their own, as `study` and `search` run them: one task a process, with its output in a file."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path

from mgd_pipeline.errors import MGDError, Stopped
from mgd_stages.run.machine import explain

PRELOADED = [f"mgd_stages.stages.{stage}" for stage in ("train_teacher", "precompute_teachers", "train_student", "evaluate")]
_NAME = "mgd-pipeline task"
_CHANGING = threading.Lock()
"""Held where processes begin or are asked how they ended: the start of one asks all of them."""
_INTERRUPTED = threading.Event()
"""After Ctrl-C no process begins."""


@dataclass(frozen=True)
class Workers:
    """The processes of a study or a search."""

    jobs: int
    """How many run at a time."""
    devices: Sequence[str]
    """Tasks take turns on these."""
    threads: int
    """Of torch, in each process."""


@dataclass(frozen=True)
class Failure:
    """Why a task has no result."""

    reason: str
    """One line, which begins with the file of the task's output."""
    killed: bool = False
    """Whether the system ended the process without a word, as it does where memory runs out."""


@contextmanager
def task_threads(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that call `attempt`, each of which waits for one process at a time. Ctrl-C ends the processes, too."""
    _INTERRUPTED.clear()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield pool
        except KeyboardInterrupt:
            # Not every Ctrl-C reaches the processes: `kill -INT` of the command alone does not.
            with _CHANGING:
                _INTERRUPTED.set()
                for process in multiprocessing.active_children():
                    if process.name == _NAME:
                        process.terminate()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def attempt(work: Callable[[], object], log: Path, threads: int, *needs: Failure | None) -> Failure | None:
    """Does one task in a process of its own, so that its peak of memory is the task's own, with its output in `log`. Returns what
    went wrong, here or in a task that it needs, else None.

    The process ends with this one. Raises what the task raises that is no MGDError, Stopped after SIGTERM among it, and MGDError if
    the process was ended otherwise than by SIGKILL.
    """
    for failure in needs:
        if failure:
            return failure
    # The server imports torch once, before its forks have threads or CUDA.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_answer, args=(sender, partial(_do, work, log, threads)), name=_NAME)
    with receiver:
        with _CHANGING, sender:
            if _INTERRUPTED.is_set():
                raise KeyboardInterrupt
            process.start()
        answers = list[Failure | BaseException | None]()
        wait([receiver, process.sentinel])
        if receiver.poll():
            with suppress(EOFError):  # it ended without an answer
                answers.append(receiver.recv())
        wait([process.sentinel])
    with _CHANGING:
        process.join()
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
        return answer
    if process.exitcode == -signal.SIGKILL:
        why = "the system ended the process (SIGKILL), most likely because memory ran out"
        return Failure(f"{log}: {why}; take fewer --jobs, or smaller batches", killed=True)
    raise MGDError(f"{log}: the process was ended from outside (exit code {process.exitcode}); the same command continues")


def _answer(sender: Connection, task: Callable[[], Failure | None]) -> None:
    """Does a task, and sends what it returns or raises to the process that waits."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = task()
    except BaseException as error:  # the other process raises it
        error.add_note(traceback.format_exc())
        answer = error
    sender.send(answer)


def _end_with_parent() -> None:
    """Ends this process with its parent, so that no process of a killed command writes beside the next call."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(work: Callable[[], object], log: Path, threads: int) -> Failure | None:
    import torch

    torch.set_num_threads(threads)
    with open(log, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            work()
        except Stopped:
            raise
        except MGDError as error:
            return Failure(f"{log}: {error}")
        except (OSError, RuntimeError, MemoryError) as error:
            if (line := explain(error)) is None and not isinstance(error, OSError):
                raise
            return Failure(f"{log}: {line or error}")
    return None
