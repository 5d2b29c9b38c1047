"""`train-student --cache-from`: where the teacher caches are, the folder of their copies, and what an epoch reads."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mgd_pipeline.caches.copies import ShardFolder, copies_folder
from mgd_pipeline.caches.remote import Traffic, counter, is_url
from mgd_pipeline.errors import DataError, ParamsError
from mgd_pipeline.training.batches import Batch
from mgd_pipeline.training.dataset import TrainingSet
from mgd_pipeline.training.shard_order import WINDOW, ShardReading
from mgd_pipeline.words import counted, size_text
from mgd_stages.run.machine import nearest, require_writable
from mgd_stages.run.progress import MetricsLog, console
from mgd_stages.run.project import Project
from mgd_stages.run.ranks import mean_over_ranks

_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class CacheFrom:
    """The options of the command."""

    places: Sequence[str]
    """A URL or a folder below which <teacher>.zarr lie, and TEACHER=URL for single ones"""
    folder: Path | None = None
    """For copies of shards; `copies_folder()` if left out"""
    size: int = 20 * 10**9
    """Bytes that the copies may take"""

    @property
    def reading(self) -> ShardReading:
        return ShardReading(self.folder or copies_folder(), self.size, WINDOW)


def parse_size(text: str) -> int:
    """'20GB' to bytes. Raises ParamsError."""
    if (parts := re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]B)", text)) is None or not float(parts[1]):
        raise ParamsError(f"--cache-size {text}: write a number and kB, MB, GB or TB, such as 20GB")
    return int(float(parts[1]) * _UNITS[parts[2]])


def places_of(project: Project, teachers: Sequence[str], places: Sequence[str]) -> dict[str, str | Path]:
    """Where the cache of each of these teachers is. Raises ParamsError for an unknown teacher, and for two places of one."""
    single: dict[str, str] = {}
    bases = []
    for place in places:
        name, equals, rest = place.partition("=")
        of_teacher = bool(equals and re.fullmatch(r"[\w-]+", name))
        if not (rest if of_teacher else place):
            raise ParamsError(f"--cache-from {place!r}: names no place; write a URL or a folder, or TEACHER=URL")
        if not of_teacher:
            bases.append(place.rstrip("/"))
        elif name not in project.params.teachers:
            raise ParamsError(
                f"--cache-from {place}: {name} is not a teacher of params.yaml; it has {', '.join(project.params.teachers)}"
            )
        elif name in single:
            raise ParamsError(f"--cache-from {place}: {name} has two places; give one")
        else:
            single[name] = rest.rstrip("/") or "/"
    if len(bases) > 1:
        raise ParamsError(
            f"--cache-from {bases[0]} --cache-from {bases[1]}: give one place of all teachers, and TEACHER=URL for others"
        )

    def where_is(name: str) -> str | Path:
        where = single.get(name) or (f"{bases[0]}/{name}.zarr" if bases else "")
        return where if is_url(where) else Path(where) if where else project.targets(name)

    return {name: where_is(name) for name in teachers}


def require_copies(dataset: TrainingSet) -> None:
    """Says what the copies take. Raises ParamsError if the limit, DataError if the disk is too small; OutputError.

    Then brings the records of the labelled images.
    """
    shardwise, reading = dataset.shardwise, dataset.by_shards
    if shardwise is None or reading is None or not shardwise.copied:
        return
    needed, whole = shardwise.needed(), shardwise.order.epoch_bytes()
    of_labelled = sum(cache.bytes_of_rows() for cache in shardwise.copied)
    if needed > reading.limit:
        raise ParamsError(
            f"--cache-size {size_text(reading.limit)}: two windows of shards and the labelled images need {size_text(needed)}; "
            "give at least that, or copy the caches to a disk and train from there"
        )
    require_writable([reading.folder])
    reading.folder.mkdir(parents=True, exist_ok=True)
    used, free = ShardFolder(reading.folder, reading.limit).used(), shutil.disk_usage(nearest(reading.folder)).free
    if needed > free + used:
        raise DataError(
            f"{reading.folder}: copies of shards need {size_text(needed)}, {size_text(free + used)} are free or held by copies; "
            "make room, or name another --cache-folder"
        )
    if dataset.rank == 0:
        console.print(
            f"teacher caches at URLs: an epoch reads {size_text(whole)} of shards, labelled images {size_text(of_labelled)}; "
            f"{reading.folder} keeps up to {size_text(reading.limit)} ({size_text(needed)} needed, {size_text(used)} there)"
        )
    for cache in shardwise.copied:
        cache.fetch_rows()


def network_log(dataset: TrainingSet, log: MetricsLog, device: torch.device) -> NetworkLog | None:
    """Counts what a training reads by shards; says what this process has read before the first step, which belongs to no epoch."""
    if dataset.shardwise is None or not dataset.shardwise.copied:
        return None
    counts = NetworkLog(dataset, log, device)
    counts.say("before the first step", counter.take())
    return counts


@dataclass
class NetworkLog:
    """Counts what all processes of a training read over the network, epoch by epoch, and says it.

    What is read ahead counts for the epoch in which it is read. An epoch that was interrupted counts from its last start.
    """

    dataset: TrainingSet
    log: MetricsLog
    device: torch.device
    epoch: int = -1
    sum: Traffic = field(default_factory=Traffic)

    def note(self, batch: Batch) -> None:
        epoch = batch.step * self.dataset.optimisation.unlabelled_batch // len(self.dataset.manifest.for_consistency)
        if epoch != self.epoch:
            self.end(batch.step)
            self.epoch = epoch
        self.sum = self.sum + batch.fetched + counter.take()

    def end(self, step: int) -> None:
        """Logs the epoch that ends before a step."""
        if self.epoch >= 0:
            ranks = self.dataset.ranks
            means = mean_over_ranks(torch.tensor(self.sum, dtype=torch.float64, device=self.device), ranks)
            self.sum = Traffic(*(round(mean * ranks) for mean in means))
            self.log.log(step, {"cache_requests": self.sum.requests, "cache_megabytes": self.sum.bytes / 1e6})
            self.say(f"epoch {self.epoch}", self.sum)
        self.sum = Traffic()

    def say(self, when: str, read: Traffic) -> None:
        if self.dataset.rank == 0:
            console.print(f"teacher caches, {when}: {counted(read.requests, 'request')}, {size_text(read.bytes)}")

    def report(self) -> dict[str, object]:
        """For metrics.json: sums over the epochs, and each epoch."""
        requests, megabytes = (
            [value for _, value in self.log.rows.get(name, [])] for name in ("cache_requests", "cache_megabytes")
        )
        epochs = [{"requests": int(number), "megabytes": round(size, 3)} for number, size in zip(requests, megabytes, strict=True)]
        return {"cache_requests": int(sum(requests)), "cache_megabytes": round(sum(megabytes), 3), "cache_epochs": epochs}
