"""The training loop of teachers and students: resumable to the bit, stopped between two steps, on one device or several.

A step is a pure function of (weights, seed, step, rank): batches and random numbers depend on nothing else, so a run that was
killed and resumed gives the same bytes as a run that was never killed. The loop waits for the device at every tenth step only:
then it checks the losses of the last ten steps.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mgd_pipeline.errors import MemoryShortage, NonFiniteError, Stopped
from mgd_pipeline.training.batches import Batch
from mgd_pipeline.training.checkpoint import Stateful, TrainingCheckpoint
from mgd_pipeline.training.dataset import TrainingSet
from mgd_pipeline.training.loading import load_batches, loader_error
from mgd_pipeline.training.optimisation import StepLoss, backward, build_optimizer, build_schedule, update_average
from mgd_stages.run.cache_from import NetworkLog
from mgd_stages.run.machine import Machine
from mgd_stages.run.pace import Pace
from mgd_stages.run.progress import MetricsLog, console, progress, write_json
from mgd_stages.run.project import short_of_memory
from mgd_stages.run.ranks import any_rank, mean_over_ranks, share_buffers
from mgd_stages.run.signals import stop_signals
from mgd_stages.run.unfinished import say_what_is_kept, tidy

_STEPS_PER_LOOK = 10
_CHECKPOINT_SHARE = 1 / 30
"""Share of the time that checkpoints may take: small networks are saved often, large networks rarely."""

LossOf = Callable[[Batch], StepLoss]
"""The loss of a step, with terms of the same names at every step."""


@dataclass(frozen=True)
class Training:
    """What is trained, from what, and where its state and its numbers go."""

    title: str
    dataset: TrainingSet
    loss_of: LossOf
    trained: nn.Module
    result: nn.Module
    """The part of `trained` that is the result if there is no average"""
    average: nn.Module | None
    """A copy of `result` that becomes its moving average, see `build_average`; None if `ema` is 0"""
    checkpoint: TrainingCheckpoint
    log: MetricsLog
    advice: str
    """What to change if a loss is not finite"""
    network: NetworkLog | None = None
    """Counts what is read over the network, if anything is"""


def train(training: Training, machine: Machine) -> nn.Module:
    """Trains `training.trained`; returns `training.average`, or `training.result` without one.

    Continues from the last checkpoint if `machine.resume`. Raises NonFiniteError with the term, the images and the advice;
    Stopped after SIGTERM and KeyboardInterrupt after Ctrl-C, both between two steps and with a checkpoint; LoaderError;
    MemoryShortage.
    """
    title, dataset, log = training.title, training.dataset, training.log
    settings, device, main = dataset.optimisation, machine.device, dataset.rank == 0
    optimizer = build_optimizer(training.trained, settings)
    schedule = build_schedule(optimizer, settings)
    average = training.average
    parts: dict[str, Stateful] = {"trained": training.trained, "optimizer": optimizer, "schedule": schedule}
    if average is not None:
        parts["average"] = average
    start = _begin(training, parts, machine.resume)

    training.trained.train()
    looks, saves = _Looks(training), _Saves(training, parts)
    pace = Pace(settings.labelled_batch + settings.unlabelled_batch, device)
    note = ""
    with (
        _one_line_errors(training, device),
        progress(title, settings.steps, "step", done=start) as advance,
        stop_signals() as stopped,
        closing(load_batches(dataset, start, machine.num_workers, dataset.seed, device)) as batches,
    ):
        while (batch := pace.wait(batches)) is not None:
            torch.manual_seed(_seed(dataset.seed, batch.step, dataset.rank))  # dropout
            loss = training.loss_of(batch)
            optimizer.zero_grad(set_to_none=True)
            backward(loss, optimizer)
            optimizer.step()
            schedule.step()
            if average is not None:
                update_average(average, training.result, settings.ema, batch.step)
                share_buffers(average, dataset.ranks)  # it may label images, and the checkpoint has one of it for all ranks
            done = batch.step + 1
            pace.step()
            if training.network is not None:
                training.network.note(batch)
            looks.remember(batch, {"loss": loss.total, **loss.terms})
            # Ranks look at the same steps, so that they stop together.
            look = done % _STEPS_PER_LOOK == 0 or done == settings.steps
            if look or (stopped and dataset.ranks == 1):
                last = looks.check()
                if look:
                    means = dict(zip(["loss", *loss.terms], mean_over_ranks(last, dataset.ranks), strict=True))
                    log.log(done, means)
                    note = f"loss {means['loss']:.3f}, {pace.since_last_look()}"
                due = saves.due()
                stop = any_rank(bool(stopped), device, dataset.ranks)
                if main and done < settings.steps and (due or stop):
                    saves.save(done)
                if stop and done < settings.steps:
                    raise _stop(training, done, stopped, machine.resume)
            advance(done, note)
    if training.network is not None:
        training.network.end(settings.steps)
    if main:
        write_json(log.folder.parent / "speed.json", pace.report())
        pace.warn(title, machine.num_workers)
    return training.result if average is None else average


def _begin(training: Training, parts: dict[str, Stateful], resume: bool) -> int:
    """The first step to train: that of the checkpoint, whose state the parts and the log then have, or 0."""
    main, start = training.dataset.rank == 0, 0
    if resume and (restored := training.checkpoint.restore(parts)) is not None:
        start, logged = restored
        training.log.restore(logged)
        console.print(f"{training.title}: goes on at step {start}")
    elif main:
        say_what_is_kept(training.title, training.checkpoint, resume)
    if main:
        tidy(training.title, training.checkpoint)
    return start


def _seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]) >> 1


class _Look(NamedTuple):
    """What is remembered of a step until it is checked; the values are still on the device."""

    step: int
    images: list[str]
    values: Tensor
    """loss, then the terms"""


class _Looks:
    """The losses of the steps since the device was last waited for."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.names: list[str] = []
        self.pending: list[_Look] = []

    def remember(self, batch: Batch, values: dict[str, Tensor]) -> None:
        images = dict.fromkeys(row.image_id for source in batch.sources for row in source.rows)
        self.names = list(values)
        self.pending.append(_Look(batch.step, list(images), torch.stack(list(values.values())).detach()))

    def check(self) -> Tensor:
        """Waits for the device; returns the last step's values. Raises NonFiniteError for the first loss that is not finite."""
        for look, values in zip(self.pending, torch.stack([look.values for look in self.pending]).tolist(), strict=True):
            if math.isfinite(values[0]):
                continue
            terms = zip(self.names[1:], values[1:], strict=True)
            bad = [f"{name} = {value}" for name, value in terms if not math.isfinite(value)]
            raise NonFiniteError(
                f"{self.training.title}: not finite at step {look.step}: {', '.join(bad) or 'the weighted sum'}; images "
                f"{', '.join(look.images)}; {self.training.advice}"
            )
        last = self.pending[-1].values
        self.pending.clear()
        return last


class _Saves:
    """Checkpoints, as often as their share of the time allows."""

    def __init__(self, training: Training, parts: dict[str, Stateful]) -> None:
        self.training, self.parts = training, parts
        self.saved, self.cost = time.monotonic(), 0.0

    def due(self) -> bool:
        return self.cost <= (time.monotonic() - self.saved) * _CHECKPOINT_SHARE

    def save(self, done: int) -> None:
        checkpoint, began = self.training.checkpoint, time.monotonic()
        try:
            checkpoint.save(done, self.parts, self.training.log.rows)
        except OSError as error:
            # The run itself is sound, and the checkpoint before this one too.
            kept = sum(run.size for run in checkpoint.unfinished()) / 1e6
            others = f"; {kept:,.1f} MB there are unfinished trainings of other settings" if kept else ""
            room = f"make room below {checkpoint.folder}{others}"
            console.print(f"{self.training.title}: no checkpoint at step {done}: {error.strerror}; {room}")
        self.saved = time.monotonic()
        self.cost = self.saved - began


def _stop(training: Training, done: int, stopped: set[int], resume: bool) -> BaseException:
    if signal.SIGINT in stopped:
        return KeyboardInterrupt()
    again = "the same command" if resume else "the same command without --no-resume"
    return Stopped(f"{training.title}: stopped by SIGTERM after step {done}; {again} goes on from there")


@contextmanager
def _one_line_errors(training: Training, device: torch.device) -> Iterator[None]:
    """Workers that die and devices that are too small, as one line with the remedy."""
    settings = training.dataset.optimisation
    try:
        yield
    except RuntimeError as error:
        if (of_loader := loader_error(error)) is not None:
            raise of_loader from None
        if short_of_memory(error):
            raise MemoryShortage(
                f"{training.title}: {device} is out of memory with {settings.labelled_batch} + {settings.unlabelled_batch} images "
                "a step; lower views.crop, labelled_batch or unlabelled_batch, or take precision: bfloat16"
            ) from None
        raise
