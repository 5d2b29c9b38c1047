"""The processes of `mgd-pipeline benchmark-device`: one for each exported form and number of threads, so that its peak of
memory is its own."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgd_pipeline.data.images import resize_image
from mgd_pipeline.errors import MGDError, WeightsError
from mgd_pipeline.exports.coreml import NOT_RUN
from mgd_pipeline.exports.deployed import Run, Size, to_batch
from mgd_pipeline.exports.formats import Format
from mgd_pipeline.networks.inference import resize_logits
from mgd_pipeline.networks.segmentation import REFUSALS
from mgd_pipeline.students.student import load_student
from mgd_pipeline.words import counted
from mgd_stages.run.held_out import best_classes

FAULTS = (MGDError, OSError, ImportError, *REFUSALS)
"""What runtimes raise of files that they cannot load or run"""


@dataclass(frozen=True)
class Form:
    """A student in one runtime."""

    name: str
    format: Format | None
    """None: the student file itself, in torch"""
    path: Path
    sizes: tuple[Size, ...]
    """Heights and widths of the images that it is asked to run"""
    classes: int
    """Number of the student's classes"""

    @property
    def bytes(self) -> int:
        beside = [] if self.format is None else self.format.files_beside(self.path)
        return sum(_bytes(file) for file in [self.path, *beside])

    def load(self) -> Run:
        """What runs an image. It raises WeightsError where there are more or fewer classes than the student has."""
        run = self._loaded()

        def checked(images: Tensor) -> Tensor:
            logits = run(images)
            if logits.shape[1] != self.classes:
                many = counted(logits.shape[1], "class", "classes")
                raise WeightsError(f"has {many}, and the student has {self.classes}: it is another student's file")
            return logits

        return checked

    def _loaded(self) -> Run:
        if self.format is None:
            student = load_student(self.path)
            return torch.no_grad()(student.forward)
        if self.format.name == "coreml" and sys.platform != "darwin":
            raise WeightsError(NOT_RUN)  # an imitation has no speed
        return self.format.load(self.path)


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


@dataclass
class Arm:
    """A process that runs one form with one number of threads."""

    form: Form
    threads: int
    process: BaseProcess
    pipe: Connection
    seconds: dict[Size, list[float]] = field(default_factory=dict)
    """Of the sizes that it can run"""
    faults: dict[Size, str] = field(default_factory=dict)
    """Of the sizes that it cannot run"""
    whole: bool = False
    """Whether it takes images of any size"""

    def ask(self, question: str, *about: Any) -> tuple[Any, str | None]:
        """The answer of the process and None, or None and why there is no answer."""
        try:
            self.pipe.send((question, *about))
            return self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            return None, f"its process ended with code {self.process.exitcode}"


@contextmanager
def running(forms: Sequence[Form], threads: Sequence[int]) -> Iterator[list[Arm]]:
    """A process for each form and number of threads; they end with the block, at once if it is left by an error or Ctrl-C."""
    processes = multiprocessing.get_context("spawn")  # a fork may wait for ever for threads that only its parent has
    resource_tracker.ensure_running()  # the first process would start it, and it would let that process hear Ctrl-C
    arms: list[Arm] = []
    try:
        for form in forms:
            for count in threads:
                ours, theirs = processes.Pipe()
                process = processes.Process(target=_answer_questions, args=(theirs, form, count), daemon=True)
                with _without_ctrl_c():
                    process.start()
                theirs.close()
                arms.append(Arm(form, count, process, ours))
        yield arms
    except BaseException:
        for arm in arms:
            arm.process.kill()  # it may be loading for a minute, and has nothing to lose
        raise
    finally:
        for arm in arms:
            arm.pipe.close()
        for arm in arms:
            arm.process.join()


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes that start in the block never hear Ctrl-C; this one hears it after the block, and closes their pipes."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answer_questions(pipe: Connection, form: Form, threads: int) -> None:
    """Answers until the pipe is closed: (answer, None), or (None, why there is none)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what runtimes tell their developers
    torch.set_num_threads(threads)
    before, run = _memory(begin=True), None
    answers: dict[str, Callable[..., Any]] = {
        "time": _time,
        "mask": _mask,
        "memory": lambda run: _memory() - before,
        "notes": lambda run: form.format.read_notes(form.path) if form.format else {},
    }
    while True:
        try:
            question, *about = pipe.recv()
        except EOFError:
            return
        try:
            run = run or form.load()
            pipe.send((answers[question](run, *about), None))
        except FAULTS as error:
            pipe.send((None, next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)))


def _time(run: Run, size: Size) -> float:
    """Seconds for one image."""
    images = torch.randint(0, 256, (1, 3, *size), generator=torch.Generator().manual_seed(0)).float()
    began = time.perf_counter()
    run(images)
    return time.perf_counter() - began


def _mask(run: Run, image: np.ndarray, size: Size | None) -> np.ndarray:
    """(H, W) uint8 class ids of an (H, W, 3) uint8 image, which is seen at another size if one is given."""
    height, width = image.shape[:2]
    logits = run(to_batch(image if size is None else resize_image(image, *size)))[0]
    return best_classes(resize_logits(logits, (height, width)))


def _memory(begin: bool = False) -> int:
    """The most memory that this process has held, bytes; from here on if it is to `begin`, where the system can."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if begin:
        Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
