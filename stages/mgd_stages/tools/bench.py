"""`mgd-pipeline bench`: the cost of reading, loading and teaching with this project's data, on this machine.

All times are medians over rounds in which every arm has its turn, so that other work of the machine affects all arms alike.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import zarr
from rich.table import Table

from mgd_pipeline.caches.format import shard_path
from mgd_pipeline.caches.provenance import expected_provenance
from mgd_pipeline.caches.reader import CachedTargets, TargetCache
from mgd_pipeline.caches.shard_reader import ShardReader
from mgd_pipeline.data.manifest import Manifest, read_manifest
from mgd_pipeline.networks.segmentation import build_network
from mgd_pipeline.teachers.looks import dense_targets
from mgd_pipeline.teachers.teacher import read_for
from mgd_pipeline.training.batches import Batch, TargetProvider, cached_targets
from mgd_pipeline.training.dataset import TrainingSet
from mgd_pipeline.training.features import with_projections
from mgd_pipeline.training.knowledge import knowledge_of
from mgd_pipeline.training.live import live_targets, runs_live
from mgd_pipeline.training.loading import load_batches
from mgd_pipeline.training.optimisation import backward, build_optimizer
from mgd_pipeline.training.terms import step_loss, step_terms
from mgd_pipeline.words import counted
from mgd_stages.run.loaded_teacher import load_teacher
from mgd_stages.run.machine import require_writable
from mgd_stages.run.progress import console, write_json
from mgd_stages.run.project import Project

_RECORDS, _SLOW_RECORDS = 256, 16
"""Images that each reader, and zarr-python, reads in a round."""


@dataclass(frozen=True)
class Reading:
    """Microseconds to read what training needs of one image, in random order, from the page cache."""

    kilobytes: float
    raw: float
    """`os.preadv` of the same bytes into existing buffers: the limit"""
    ours: float
    first: float
    """ours, when every record is read for the first time and its checksum verified"""
    zarr: float
    """zarr-python's own indexing"""


@dataclass(frozen=True)
class Steps:
    """Seconds of one training step."""

    labels: float
    """the student with the supervised loss, without targets: the floor"""
    prepared: float
    """distillation with finished batches in memory: the limit of any loader"""
    memory: float
    """distillation with images, labels and targets in memory, from which views and batches are made: the limit of any cache"""
    cached: float
    """distillation as train-student does it"""
    live: float | None
    """as `prepared`, but teachers run on every view; None without the teachers' weights"""
    build: float | None
    """for the targets of one image by all teachers, once"""


def bench(project: Project, *, device: torch.device, num_workers: int, rounds: int, steps: int) -> None:
    """Measures, prints tables and writes data/results/bench.json. Needs teacher caches; the live arm needs teachers' weights."""
    manifest = read_manifest(project.manifest, project.base)
    require_writable(files=[project.results / "bench.json"])
    dataset = training_set(project, manifest)
    reading = {}
    for name, cache in dataset.open_caches().items():
        times = reading[name] = measure_reading(cache, rounds)
        _show(
            f"targets of {name}: {times.kilobytes:.0f} KB an image, read at random from the page cache",
            ("reader", "us an image", "of the limit"),
            {"preadv, the limit": times.raw, "ours": times.ours, "ours, first read": times.first, "zarr-python": times.zarr},
            lambda value, limit=times.raw: (f"{value:.1f}", f"{limit / value:.0%}"),
        )
    measured = measure_steps(project, manifest, dataset, device=device, num_workers=num_workers, rounds=rounds, steps=steps)
    size = dataset.optimisation.labelled_batch + dataset.optimisation.unlabelled_batch
    _show(
        f"training steps of {counted(size, 'image')}, {project.params.student.network.encoder} on {device}",
        ("step", "ms", "of inputs in memory"),
        {
            "labels only, no targets": measured.labels,
            "finished batches in memory, the limit": measured.prepared,
            "inputs in memory": measured.memory,
            "cached targets": measured.cached,
            "live teachers": measured.live,
        },
        lambda value: (f"{value * 1e3:.1f}", f"{value / measured.memory:.2f} x"),
    )
    for line in saving_lines(measured, len(manifest.training), size):
        console.print(line)
    content = {"reading": {name: vars(times) for name, times in reading.items()}, "steps": vars(measured)}
    write_json(project.results / "bench.json", content)


def _show(title: str, header: tuple[str, ...], rows: dict[str, float | None], texts: Callable[[float], tuple[str, str]]) -> None:
    table = Table(*header)
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, *texts(value))
    console.print(title)
    console.print(table)


def training_set(project: Project, manifest: Manifest) -> TrainingSet:
    """What train-student reads, with the targets of all teachers, without an end."""
    params = project.params
    return TrainingSet(
        manifest,
        params.views,
        params.cutmix,
        params.student.model_copy(update={"steps": 2**31}),
        params.seed,
        caches={name: project.targets(name) for name in params.losses.used_teachers},
        expected={
            name: expected_provenance(params.teachers[name], params.targets, manifest.classes, manifest.long_side)
            for name in params.losses.used_teachers
        },
    )


HELD_STEPS = 8
"""Of a training whose inputs are all in memory."""


class _HeldTargets(TargetCache):
    """A teacher cache that keeps each record in memory once it was read."""

    def __init__(self, cache: TargetCache) -> None:
        super().__init__(cache.contents)
        self._held: dict[int, CachedTargets] = {}

    def read(self, rows: Sequence[int] | np.ndarray) -> CachedTargets:
        for row in rows:
            if row not in self._held:
                self._held[row] = super().read([row])
        return CachedTargets(*map(np.concatenate, zip(*(self._held[row] for row in rows), strict=True)))


class HeldTrainingSet(TrainingSet):
    """Repeats the first steps of a training; after the first round images, labels and targets are in memory."""

    def open_caches(self) -> dict[str, TargetCache]:
        for name, cache in super().open_caches().items():
            if not isinstance(cache, _HeldTargets):
                self._open[name] = _HeldTargets(cache)
        return self._open

    def __getitem__(self, step: int) -> Batch:
        return super().__getitem__(step % HELD_STEPS)


def measure_reading(cache: TargetCache, rounds: int) -> Reading:
    rng, layout, path = np.random.default_rng(0), cache.layout, Path(str(cache.path))
    rows = rng.choice(cache.index.rows[cache.index.has_targets], _RECORDS)
    names = [name for name in layout.records if name != "global_descriptors"]  # which training does not read
    sizes = {name: layout.bytes_of(name) for name in names}
    buffers = {name: memoryview(bytearray(layout.stored_sizes(name)[-1])) for name in names}
    places = [divmod(row, layout.rows_per_shard) for row in rows.tolist()]
    arrays = [zarr.open_array(path / name, mode="r") for name in names]

    def ours() -> None:
        for start in range(0, _RECORDS, 8):
            cache.read(rows[start : start + 8])

    def plain() -> None:
        for row in rows[:_SLOW_RECORDS].tolist():
            for array in arrays:
                array[row]

    with ExitStack() as stack:
        files, records = {}, {}
        for name, shard in {(name, shard) for name in names for shard, _ in places}:
            file = shard_path(path, layout, name, shard)
            files[name, shard] = os.open(file, os.O_RDONLY)
            stack.callback(os.close, files[name, shard])
            records[name, shard] = ShardReader(file, layout.rows_per_shard, layout.stored_sizes(name), None).known

        def raw() -> None:
            for shard, slot in places:
                for name in names:
                    record = records[name, shard]
                    os.preadv(files[name, shard], [buffers[name][: record.sizes[slot]]], record.offsets[slot])

        began = time.perf_counter()
        ours()
        first = time.perf_counter() - began
        times = in_turns({"raw": raw, "ours": ours, "zarr": plain}, rounds)
    return Reading(
        kilobytes=sum(sizes.values()) / 1e3,
        raw=times["raw"] / _RECORDS * 1e6,
        ours=times["ours"] / _RECORDS * 1e6,
        first=first / len(set(places)) * 1e6,
        zarr=times["zarr"] / _SLOW_RECORDS * 1e6,
    )


def in_turns(arms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each arm; one round, in which everything gets warm, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            began = time.perf_counter()
            arm()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_steps(
    project: Project, manifest: Manifest, dataset: TrainingSet, *, device: torch.device, num_workers: int, rounds: int, steps: int
) -> Steps:
    """`steps` of each arm a round."""
    params = project.params
    torch.manual_seed(params.seed)
    network = build_network(params.student.network, len(manifest.classes), base=project.base).to(device)
    network = network.to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    knowledge = knowledge_of(params, manifest, dataset.open_caches(), device)
    trained = with_projections(network, knowledge.features, params.targets.region_stride)
    optimizer = build_optimizer(trained, params.student)
    stream = load_batches(dataset, 0, num_workers, params.seed, device)
    prepared = cycle([next(stream) for _ in range(4)])
    in_memory = HeldTrainingSet(**{field.name: getattr(dataset, field.name) for field in fields(dataset)})
    for step in range(HELD_STEPS):
        in_memory[step]
    held = load_batches(in_memory, 0, num_workers, params.seed, device)

    def run(batches: Iterator[Batch], targets: TargetProvider | None) -> None:
        for _ in range(steps):
            loss = step_loss(step_terms(trained, next(batches), targets, params, knowledge), params)
            optimizer.zero_grad(set_to_none=True)
            backward(loss, optimizer)
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    cached = partial(cached_targets, losses=params.losses)
    arms = {
        "labels": partial(run, prepared, None),
        "prepared": partial(run, prepared, cached),
        "memory": partial(run, held, cached),
        "cached": partial(run, stream, cached),
    }
    build = None
    # Heads have no network that sees images.
    if all(project.teacher(name).is_file() and name not in params.heads for name in params.losses.used_teachers):
        teachers = {name: load_teacher(project, name, manifest, device).teacher for name in params.losses.used_teachers}
        if not params.losses.measured and all(runs_live(params.teachers[name]) for name in teachers):
            arms["live"] = partial(run, prepared, partial(live_targets, teachers))
        first = manifest.training[0]
        alike = [row for row in manifest.training[:8] if (row.height, row.width) == (first.height, first.width)]

        def once() -> None:
            for teacher in teachers.values():
                images = [read_for(teacher, manifest.image_file(row), manifest.long_side, manifest.decoding(row)) for row in alike]
                dense_targets(teacher, images, params.targets, manifest.long_side)

        build = in_turns({"build": once}, 1)["build"] / len(alike)
    times = {name: seconds / steps for name, seconds in in_turns(arms, rounds).items()}
    return Steps(times["labels"], times["prepared"], times["memory"], times["cached"], times.get("live"), build)


def saving_lines(times: Steps, images: int, batch: int, epochs: int = 50) -> list[str]:
    """What the teacher caches save against live teachers, with the arithmetic; empty without a live arm."""
    if times.live is None or times.build is None:
        return []
    steps = images / batch
    building, saved = images * times.build, steps * (times.live - times.cached)
    lines = [
        f"an epoch of {counted(images, 'image')}: {steps * times.cached:.1f} s cached, {steps * times.live:.1f} s live; "
        f"{times.live / times.cached:.2f} x as fast, at most {times.live / times.prepared:.2f} x"
    ]
    if saved <= 0:
        return [*lines, "live teachers are no slower here"]
    lines.append(f"the teacher caches cost {building:.1f} s once and have paid for themselves after {building / saved:.2f} epochs")
    for students in (1, 5, 20):
        cached = building + students * epochs * steps * times.cached
        gain = students * epochs * steps * times.live / cached
        lines.append(f"{counted(students, 'student')} of {epochs} epochs: {gain:.2f} x")
    return lines
