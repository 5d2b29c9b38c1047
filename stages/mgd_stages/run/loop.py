"""The loop of teacher and student training: resumable to the bit, stopped at step boundaries, on one device or several.

A step is a pure function of (weights, seed, step, rank): batches and random numbers depend on nothing else, so a run that was
killed and resumed is the run that was never killed. The device is never waited for but at every tenth step, when the losses
of the last ten are looked at.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mgd_pipeline.data.manifest import Manifest
from mgd_pipeline.errors import DataError, MemoryShortage, NonFiniteError, OutputError, ParamsError, Stopped, shell_command
from mgd_pipeline.params import OptimisationParams
from mgd_pipeline.training.batches import Batch
from mgd_pipeline.training.checkpoint import Stateful, TrainingCheckpoint, Unfinished
from mgd_pipeline.training.dataset import TrainingSet
from mgd_pipeline.training.loading import load_batches, loader_error
from mgd_pipeline.training.optimisation import build_average, build_optimizer, build_schedule, update_average
from mgd_stages.run.machine import nearest, require_writable
from mgd_stages.run.progress import MetricsLog, console, progress, write_json
from mgd_stages.run.project import Project, short_of_memory

_STEPS_PER_LOOK = 10
_CHECKPOINT_SHARE = 1 / 30
"""Of the time; small networks are saved often, large ones rarely."""
_WAITING_SHARE = 0.1
_NO_PLACE = re.compile("[^\n]*(No space left|quota exceeded|Permission denied|Read-only file system|cannot create)[^\n]*")
"""What compilers and torch say of a folder that they cannot write to."""
_OTHERS = 3
_SHOWN = 6
"""Settings of another training that are named, at most."""

LossOf = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]
"""The weighted loss of a step, and its terms by name: the same names at every step."""


class _Look(NamedTuple):
    """What is remembered of a step until it is looked at; the values are still on the device."""

    step: int
    images: list[str]
    values: Tensor
    """loss, then the terms"""


def train(
    title: str,
    dataset: TrainingSet,
    loss_of: LossOf,
    *,
    trained: nn.Module,
    averaged: nn.Module,
    settings: OptimisationParams,
    checkpoint: TrainingCheckpoint,
    log: MetricsLog,
    device: torch.device,
    num_workers: int,
    resume: bool,
    advice: str,
) -> nn.Module:
    """Trains `trained`; returns the moving average of its part `averaged`, or that part itself where there is no average.

    Goes on from the last checkpoint if `resume`. Raises NonFiniteError with the term, the images and `advice`; Stopped after
    SIGTERM and KeyboardInterrupt after Ctrl-C, both at the end of a step and with a checkpoint; LoaderError; MemoryShortage.
    """
    optimizer = build_optimizer(trained, settings)
    schedule = build_schedule(optimizer, settings)
    average = build_average(averaged, settings)
    parts: dict[str, Stateful] = {"trained": trained, "optimizer": optimizer, "schedule": schedule}
    if average is not None:
        parts["average"] = average
    main = dataset.rank == 0
    start = 0
    if resume and (found := checkpoint.restore(parts)) is not None:
        start, logged = found
        log.restore(logged)
        console.print(f"{title}: goes on at step {start}")
    elif main:
        _say_what_is_kept(title, checkpoint, resume)
    if main:
        for run in checkpoint.tidy():
            console.print(f"{title}: only the three unfinished trainings with the most steps are kept; deleted: {_told(run)}")

    trained.train()
    pending: list[_Look] = []
    saved, cost = time.monotonic(), 0.0
    pace = _Pace(settings.labelled_batch + settings.unlabelled_batch, device)
    note = ""
    try:
        with (
            progress(title, settings.steps, "steps", done=start) as advance,
            _stop_signals() as stopped,
            closing(load_batches(dataset, start, num_workers, dataset.seed, device)) as batches,
        ):
            while (batch := pace.wait(batches)) is not None:
                torch.manual_seed(_seed(dataset.seed, batch.step, dataset.rank))  # dropout
                loss, terms = loss_of(batch)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                if average is not None:
                    update_average(average, averaged, settings.ema, batch.step)
                done = batch.step + 1
                pace.step()
                pending.append(_Look(batch.step, _image_ids(batch), torch.stack([loss, *terms.values()]).detach()))
                # Ranks look at the same steps, so that they stop together.
                look = done % _STEPS_PER_LOOK == 0 or done == settings.steps
                if look or (stopped and dataset.ranks == 1):
                    _check(title, ["loss", *terms], pending, advice)
                    last = pending[-1].values
                    pending.clear()
                    if look:
                        means = dict(zip(["loss", *terms], _mean_over_ranks(last, dataset.ranks), strict=True))
                        log.log(done, means)
                        note = f"loss {means['loss']:.3f}, {pace.since_last_look()}"
                    due = cost <= (time.monotonic() - saved) * _CHECKPOINT_SHARE
                    stop = _any_rank(bool(stopped), device, dataset.ranks)
                    if main and done < settings.steps and (due or stop):
                        began = time.monotonic()
                        _save(title, checkpoint, done, parts, log)
                        saved = time.monotonic()
                        cost = saved - began
                    if stop and done < settings.steps:
                        if signal.SIGINT in stopped:
                            raise KeyboardInterrupt
                        again = "the same command" if resume else "the same command without --no-resume"
                        raise Stopped(f"{title}: stopped by SIGTERM after step {done}; {again} goes on from there")
                advance(done, note)
    except RuntimeError as error:
        if (found := loader_error(error)) is not None:
            raise found from None
        if short_of_memory(error):
            raise MemoryShortage(
                f"{title}: {device} is out of memory with {settings.labelled_batch} + {settings.unlabelled_batch} images a step; "
                "lower views.crop, labelled_batch or unlabelled_batch, or take precision: bfloat16"
            ) from None
        raise
    if main:
        write_json(log.folder.parent / "speed.json", pace.report())
        pace.warn(title, num_workers)
    return averaged if average is None else average


def _seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]) >> 1


def _image_ids(batch: Batch) -> list[str]:
    return list(dict.fromkeys(row.image_id for source in batch.sources for row in source.rows))


def _check(title: str, names: list[str], pending: list[_Look], advice: str) -> None:
    """One wait for the device: were the losses of the last steps finite?"""
    for look, values in zip(pending, torch.stack([look.values for look in pending]).tolist(), strict=True):
        if math.isfinite(values[0]):
            continue
        bad = [f"{name} = {value}" for name, value in zip(names[1:], values[1:], strict=True) if not math.isfinite(value)]
        raise NonFiniteError(
            f"{title}: not finite at step {look.step}: {', '.join(bad) or 'the weighted sum'}; images "
            f"{', '.join(look.images)}; {advice}"
        )


def _save(title: str, checkpoint: TrainingCheckpoint, done: int, parts: dict[str, Stateful], log: MetricsLog) -> None:
    try:
        checkpoint.save(done, parts, log.rows)
    except OSError as error:
        # The run itself is sound, and the checkpoint before this one too.
        kept = checkpoint.unfinished()
        others = f"; {sum(run.size for run in kept) / 1e6:,.1f} MB there are unfinished trainings of other settings" if kept else ""
        console.print(f"{title}: no checkpoint at step {done}: {error.strerror}; make room below {checkpoint.folder}{others}")


# --- what is kept of unfinished trainings -----------------------------------------------------------------------------


def of_machine(device: torch.device, ranks: int, made_from: str, stores: list[str]) -> dict[str, Any]:
    """What decides a training's result besides the parameters, by the names that `_remedy` knows."""
    return {"device": device.type, "processes": ranks, "data/manifest": made_from[:12], "data/targets": [s[:12] for s in stores]}


def _say_what_is_kept(title: str, checkpoint: TrainingCheckpoint, resume: bool) -> None:
    """That a training begins anew, where anything is kept of an unfinished one; and how to go on with that."""
    if not resume and (kept := checkpoint.set_aside()) is not None:
        step = int(kept.stem.rpartition("-")[2])
        back = shlex.join(["mv", str(kept), str(kept.with_name(kept.name.replace("set-aside-", "checkpoint-", 1)))])
        console.print(
            f"{title}: begins at step 0 (--no-resume); the state of step {step} of an earlier run is kept: after `{back}` the same "
            "command without --no-resume goes on from there"
        )
    for run in checkpoint.unfinished()[:_OTHERS]:
        give_up = f"{shell_command('rm', checkpoint.folder)}/*-{_key(run)}*"
        console.print(
            f"{title}: begins at step 0. Kept: an unfinished training of other settings, {_told(run)}; "
            f"{_differences(run, checkpoint.settings or {})}; `{give_up}` gives it up"
        )


def _told(run: Unfinished) -> str:
    total = "" if run.steps is None else f" of {run.steps}"
    return f"step {run.step}{total}, saved {time.strftime('%Y-%m-%d %H:%M', time.localtime(run.saved))}"


def _differences(run: Unfinished, now: Mapping[str, Any]) -> str:
    """In what another training differs from this one, and the command that goes on with it."""
    if run.settings is None:
        return "its settings were not noted; the command and the params.yaml that began it go on with it"
    then, now = run.settings, json.loads(json.dumps(now, allow_nan=False))
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if not names:
        return "it was begun by another version; that version goes on with it"
    shown = [f"{name} is {_short(then.get(name))} there, {_short(now.get(name))} here" for name in names[:_SHOWN]]
    more = [f"{len(names) - _SHOWN} more differ"] if len(names) > _SHOWN else []
    remedies = dict.fromkeys(_remedy(name, then[name]) for name in names if name in then)
    return f"{', '.join([*shown, *more])}; the same command goes on with it {', '.join(remedies)}"


def _key(run: Unfinished) -> str:
    return run.note.stem.removeprefix("checkpoint-")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _remedy(name: str, then: Any) -> str:
    if name == "device":
        return f"with --device {then}"
    if name == "processes":
        return "without torchrun" if then == 1 else f"under torchrun with {then} processes"
    if name.startswith("data/"):
        return f"with the {name} of that time"
    return f"with --set {shlex.quote(f'{name}={json.dumps(then, ensure_ascii=False, allow_nan=False)}')}"


def check_outputs(project: Project, run: str, weights: Path) -> None:
    """Raises OutputError, before the first step, where a training could not write its weights, its numbers or its states."""
    results = project.results / run
    require_writable([results, results / "plots", project.work(run)], [weights, results / "speed.json", results / "metrics.json"])


def image_cache(project: Project, manifest: Manifest, *, unlabelled: bool) -> Path:
    """The folder of this machine's decoded images, after its size was compared with the disk; DataError if it is too large."""
    folder = project.work("images")
    require_writable([folder])
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(row, 4) for row in manifest.labelled] + [(row, 3) for row in manifest.unlabelled if unlabelled]
    needed = sum(math.prod(manifest.size(row)) * channels for row, channels in rows)
    kept = sum(path.stat().st_size for path in folder.glob("*/*"))
    free = shutil.disk_usage(folder).free
    console.print(
        f"decoded images: at most {needed / 1e6:,.0f} MB in {folder} ({kept / 1e6:,.0f} MB there, {free / 1e9:,.1f} GB free)"
    )
    if needed > free + kept:
        raise DataError(
            f"{folder}: decoded images need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "make room, or train without --cache-images"
        )
    return folder


# --- signals ----------------------------------------------------------------------------------------------------------


@contextmanager
def _stop_signals() -> Iterator[set[int]]:
    """The signals that asked for an end so far; a second Ctrl-C ends at once. Those that this process was started to ignore
    stay ignored, as Ctrl-C is by what a script started in the background."""
    received: set[int] = set()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def remember(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.add(number)

    heard = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, remember) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- several devices (torchrun) ---------------------------------------------------------------------------------------


def ranks_of_torchrun() -> tuple[int, int]:
    """(rank, ranks) as torchrun tells them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group(device: torch.device, ranks: int) -> Iterator[None]:
    """Joins the other processes of torchrun, where there are any."""
    if ranks == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def check_ranks(settings: OptimisationParams, ranks: int) -> None:
    """Raises ParamsError where a step's images cannot be shared out evenly."""
    for name, images in (("labelled_batch", settings.labelled_batch), ("unlabelled_batch", settings.unlabelled_batch)):
        if images % ranks or images < 2 * ranks:
            raise ParamsError(f"student.{name} is {images}: must be a multiple of the {ranks} processes, two images each at least")


def check_compiler(device: torch.device) -> None:
    """Compiles one line, so that a machine without a compiler says so before a training has begun.

    Raises ParamsError; OutputError where the compiler has no place to write to.
    """
    zeros = torch.zeros(8, device=device)  # not below: a device that fails here has no lack of compilers
    try:
        torch.compile(torch.exp)(zeros)
    except OSError as error:
        raise OutputError(f"--compile: {error.filename}: {error.strerror}; {_compiles_into()}") from None
    except RuntimeError as error:  # torch's own wear private names
        if (found := _NO_PLACE.search(str(error))) is not None:
            raise OutputError(f"--compile: the compiler cannot write: {' '.join(found[0].split())}; {_compiles_into()}") from None
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise ParamsError(f"--compile: no compiler for {device}: {reason}; install one, or leave --compile out") from None


def _compiles_into() -> str:
    """Where compilers write, with the room there, and how to change that."""
    temporary = Path(os.environ.get("TMPDIR", tempfile.gettempdir()))
    kept = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir()))
    free = [
        f"{place} ({name}) has {shutil.disk_usage(nearest(place)).free / 1e6:,.1f} MB free"
        for name, place in (("TMPDIR", temporary), ("TORCHINDUCTOR_CACHE_DIR", kept))
    ]
    return f"{', '.join(free)}; make room there, or name other folders by TMPDIR and TORCHINDUCTOR_CACHE_DIR"


def on_ranks(network: nn.Module, device: torch.device, ranks: int, *, compiled: bool) -> Callable[[Tensor], Any]:
    """The network's forward pass with gradients averaged over the ranks; BatchNorm over all of them on GPUs."""
    if ranks > 1 and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if compiled:
        network.compile()
    return network if ranks == 1 else DistributedDataParallel(network)


def _mean_over_ranks(values: Tensor, ranks: int) -> list[float]:
    if ranks > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= ranks
    return values.tolist()


def _any_rank(flag: bool, device: torch.device, ranks: int) -> bool:
    if ranks == 1:
        return flag
    found = torch.tensor(float(flag), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


# --- speed ------------------------------------------------------------------------------------------------------------


class _Pace:
    """How fast a training is and what it waits for. The first step, with everything that starts there, does not count."""

    def __init__(self, images: int, device: torch.device) -> None:
        self.images, self.device = images, device
        self.steps, self.waited, self.began = -1, 0.0, time.monotonic()
        self.last = (self.steps, self.waited, self.began)

    def wait(self, batches: Iterator[Batch]) -> Batch | None:
        before = time.monotonic()
        batch = next(batches, None)
        self.waited += time.monotonic() - before
        return batch

    def step(self) -> None:
        self.steps += 1
        if self.steps == 0:
            self.waited, self.began = 0.0, time.monotonic()
            self.last = (0, 0.0, self.began)

    def since_last_look(self) -> str:
        steps, waited, began = self.last
        self.last = (self.steps, self.waited, time.monotonic())
        if self.steps <= steps:
            return f"{self.memory() / 1e9:.1f} GB"
        seconds = max(self.last[2] - began, 1e-9)
        share = (self.waited - waited) / seconds
        each = seconds / (self.steps - steps)
        speed = f"{1000 * each:.0f} ms a step, {self.images / each:.1f} images/s"
        return f"{speed}, {share:.0%} waiting for data, {self.memory() / 1e9:.1f} GB"

    def memory(self) -> int:
        """Peak bytes: of the GPU where there is one, else of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # macOS counts bytes, Linux kilobytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    @property
    def waiting_share(self) -> float:
        return self.waited / max(time.monotonic() - self.began, 1e-9) if self.steps > 0 else 0.0

    def report(self) -> dict[str, float | str | None]:
        seconds = (time.monotonic() - self.began) / self.steps if self.steps > 0 else None
        return {
            "device": str(self.device),
            "seconds_per_step": seconds and round(seconds, 6),
            "images_per_second": seconds and round(self.images / seconds, 2),
            "waiting_for_data": round(self.waiting_share, 4),
            "peak_memory_mb": round(self.memory() / 1e6),
        }

    def warn(self, title: str, num_workers: int) -> None:
        if self.waiting_share > _WAITING_SHARE:
            console.print(
                f"{title}: {self.waiting_share:.0%} of the time went into waiting for data; raise --num-workers (it was "
                f"{num_workers}, this machine has {os.cpu_count()} cores)"
            )
