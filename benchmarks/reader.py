"""What do reading, building and growing a teacher cache cost, beside the physical limit and other formats? Markdown tables.

pip install '.[bench]' && python benchmarks/reader.py

Each reader is warm and runs in one process. Unless a table says otherwise, the page cache holds the files as their writer left
them. The readers take turns of about 20 milliseconds, and each figure is the median of the rounds, so other work on the machine
hits all readers alike. Compare within a table, never between two runs. The targets are random numbers; their values do not matter.
A peer that is not installed is left out, with a note.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common import Setting, Table, in_child, memory, print_tables
from mgd_pipeline.caches import reader as cache_module
from mgd_pipeline.caches.build import build_shards, plan_cache, publish
from mgd_pipeline.caches.encoding import TARGETS_VERSION, TeacherTargets, encode_logits, require_finite, require_finite_float16
from mgd_pipeline.caches.format import ARRAYS, Layout, plan_layout, shard_path
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.caches.shards import BuildImage
from mgd_pipeline.data.manifest import ImageKey
from peers import PEERS, Read, open_tensorstore, open_zarr, write_tensorstore, write_zarr

BATCH = 16
FEW = 256
READ = ("logits", "logits_affine", "region_embeddings", "extents")
"""What `TargetCache.read` returns of an image."""
LIMIT = "limit: os.preadv into a buffer"
SIZES = {
    "smallest": (plan_layout(2, 2, 32, 32, 4, 16, "uint8"), 4096),
    "CamVid": (plan_layout(11, 112, 240, 176, 4, 16, "float16"), 1024),
    "VOC": (plan_layout(21, 64, 512, 512, 4, 16, "uint8"), 512),
}
"""Layouts and numbers of images. The second has the 58 KB of logits that the peers are compared with."""
SMALLEST, CAMVID = SIZES["smallest"][0], SIZES["CamVid"][0]


def draw(layout: Layout) -> list[TeacherTargets]:
    """Random targets that fill the canvas, as stage one has them; few, which take turns, so that drawing them costs nothing."""
    rng, names = np.random.default_rng(0), {"logits": np.float32, "region_embeddings": np.float16, "global_descriptors": np.float32}
    return [TeacherTargets(*(rng.normal(size=layout.records[n][0]).astype(names[n]) for n in names)) for _ in range(7)]


def build(folder: Path, layout: Layout, count: int) -> Path:
    """A cache of `count` images at folder/t.zarr."""
    drawn, frame = draw(layout), (layout.height, layout.width)
    images = [BuildImage(ImageKey(f"train/{i:09d}", f"{i:064x}"), frame, frame) for i in range(count)]

    def compute(keys: Sequence[ImageKey]) -> Iterator[TeacherTargets]:
        return (drawn[int(key.image_id[-9:]) % 7] for key in keys)

    provenance = {"targets_version": TARGETS_VERSION, "teacher": {}, "classes": []}
    plan = plan_cache(folder / "work", folder / "t.zarr", provenance, layout, images)
    assert plan is not None, "a new folder"
    build_shards(plan, plan.todo, compute, {})
    publish(plan)
    return folder / "t.zarr"


def arrays_of(cache: TargetCache) -> dict[str, np.ndarray]:
    """Every array of a cache, whole."""
    return {name: np.stack([cache.record(name, row) for row in cache.index.rows.tolist()]) for name in ARRAYS}


def our_reader(cache: TargetCache) -> Read:
    """One array of a batch, as `TargetCache.read` reads each of its four."""
    return lambda name, rows, into: cache._gather(name, cache._places(rows))


def raw_reader(path: Path, layout: Layout) -> Read:
    """The limit: `os.preadv` of the same bytes of the same files into a buffer, at known places."""
    per_shard, files = layout.rows_per_shard, {}
    for name in ARRAYS:
        count = len(list((path / name / "c").iterdir()))
        files[name] = [os.open(shard_path(path, layout, name, shard), os.O_RDONLY) for shard in range(count)]
    sizes = {name: layout.bytes_of(name) for name in ARRAYS}

    def read(name: str, rows: list[int], into: np.ndarray) -> None:
        size, descriptors, buffer = sizes[name], files[name], into.reshape(-1).view(np.uint8).data
        for i, row in enumerate(rows):
            shard, slot = divmod(row, per_shard)
            os.preadv(descriptors[shard], (buffer[i * size : i * size + size],), slot * (size + 4))

    return read


def encode_and_write_zarr(folder: Path, layout: Layout, count: int) -> None:
    """The part of the work of `caches.build` that a user of zarr-python can have: encodes, gathers whole shards, writes, syncs."""
    drawn, frame = draw(layout), (layout.height, layout.width)
    encoded: dict[str, list[Any]] = {name: [] for name in ARRAYS}
    for i in range(count):
        targets = drawn[i % 7]
        logits = encode_logits(targets.logits, layout.encoding)  # pyright: ignore[reportArgumentType]
        require_finite(targets.global_descriptor, "global descriptor")
        require_finite_float16(targets.region_embeddings, "region embeddings")
        record = {
            "logits": logits.values,
            "logits_affine": (logits.offset, logits.scale),
            "region_embeddings": targets.region_embeddings,
            "global_descriptors": targets.global_descriptor,
            "extents": (*frame, *frame),
        }
        for name, values in record.items():
            encoded[name].append(values)
    write_zarr(folder, {name: np.array(encoded[name], layout.records[name][1]) for name in ARRAYS}, layout)
    sync(folder)


def sync(folder: Path, *, forget: bool = False) -> None:
    """Waits until all files are on the disk; `forget` drops them from the page cache, unless some process has mapped them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                if forget:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_an_image(contenders: dict[str, Callable[[list[int]], object]], count: int, rounds: int) -> dict[str, float]:
    """Median over rounds of turns. In a turn a reader reads batches of random rows for 20 ms, and at least one batch."""
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, read in contenders.items():
            batches = [rng.integers(count, size=BATCH).tolist() for _ in range(200)]
            read(batches[0])  # what the one before left in the processor's caches is no part of it
            start, done = time.perf_counter(), 0
            for rows in batches:
                read(rows)
                done += 1
                if time.perf_counter() - start > 0.02:
                    break
            times[name].append((time.perf_counter() - start) / done / BATCH)
    return {name: statistics.median(values) for name, values in times.items()}


def contest(
    title: str, columns: dict[str, Callable[[float], str]], seconds: dict[str, float], ours: str, notes: Sequence[str]
) -> Table:
    """A table of contenders, the first of which is the limit."""
    who, limit = "Reader" if "µs an image" in columns else "Writer", next(iter(seconds.values()))
    columns = {
        **columns,
        "of the limit": lambda time_: f"{limit / time_ * 100:.0f} %",
        "times ours": lambda time_: f"{time_ / seconds[ours]:.2f}",
    }
    rows = [
        (f"**{name}**" if name == ours else name, *(cell(time_) for cell in columns.values())) for name, time_ in seconds.items()
    ]
    return Table(title, (who, *columns), rows, notes)


def reading(title: str, seconds: dict[str, float], size: int, ours: str = "ours", notes: Sequence[str] = ()) -> Table:
    """A table of readers, from their seconds for an image of `size` bytes."""
    columns = {"µs an image": lambda time_: f"{time_ * 1e6:.1f}", "GB/s": lambda time_: f"{size / time_ / 1e9:.2f}"}
    return contest(title, columns, seconds, ours, notes)


def open_peers(folder: Path, layout: Layout, arrays: dict[str, np.ndarray]) -> tuple[dict[str, Callable[[], Read]], list[str]]:
    """Writes the arrays with each installed peer: what opens them, and a note for each missing one."""
    openers, notes = {}, []
    for number, (name, peer) in enumerate(PEERS.items()):
        (folder / str(number)).mkdir()
        try:
            peer.write(folder / str(number), arrays)
        except ImportError as error:
            notes.append(f"{name} is left out: {error}.")
            continue
        openers[name] = partial(peer.open, folder / str(number), layout)
    return openers, notes


def strewn_table(setting: Setting) -> list[Table]:
    """Random images from a page cache that was filled by reading them in random order from the disk, as a first epoch does."""
    layout, count = CAMVID, 2 * BATCH if setting.quick else 1024
    path = build(setting.folder, layout, count)
    openers, notes = open_peers(setting.folder, layout, arrays_of(open_cache(path)))
    sync(setting.folder, forget=True)
    readers = {LIMIT: raw_reader(path, layout), "ours": our_reader(open_cache(path))}
    readers |= {name: opened() for name, opened in openers.items()}
    into = np.empty((BATCH, *layout.records["logits"][0]), layout.records["logits"][1])
    arms = {name: lambda rows, read=read: read("logits", rows, into) for name, read in readers.items()}
    rng = np.random.default_rng(0)
    for name, arm in arms.items():
        if name != LIMIT:  # which reads the files of ours
            for rows in rng.permutation(count).reshape(-1, BATCH).tolist():
                arm(rows)
    notes.append(
        "Linux keeps pages that were read at random one by one. It keeps pages that were written or read in order in larger pieces."
    )
    title = f"One array, pages read at random, {layout.bytes_of('logits'):,} bytes an image, batches of {BATCH}"
    seconds = seconds_an_image(arms, count, 2 if setting.quick else 15)
    return [reading(title, seconds, layout.bytes_of("logits"), notes=notes)]


def reader_tables(setting: Setting) -> list[Table]:
    """Random images from a warm page cache: one array beside its peers, whole records of three sizes."""
    tables, rounds = [], 2 if setting.quick else 15
    for kind, (layout, images) in SIZES.items():
        count, folder = 2 * BATCH if setting.quick else images, setting.folder / kind
        folder.mkdir()
        path = build(folder, layout, count)
        cache, notes = open_cache(path), []
        readers: dict[str, Read] = {LIMIT: raw_reader(path, layout), "ours": our_reader(cache)}
        cache.read(cache.index.rows)
        buffers = {name: np.ones((BATCH, *shape), dtype) for name, (shape, dtype) in layout.records.items()}
        if kind == "CamVid":
            openers, notes = open_peers(folder, layout, arrays_of(cache))
            readers |= {name: opened() for name, opened in openers.items()}
        readers["zarr-python, our teacher cache"] = open_zarr(path)
        try:
            readers["tensorstore without its own cache, our teacher cache"] = open_tensorstore(path, side_by_side=False)
            readers["the same, a batch in parallel"] = open_tensorstore(path, side_by_side=True)
        except ImportError as error:
            notes.append(f"tensorstore is left out: {error}.")

        def arms(names: Sequence[str], readers: dict[str, Read] = readers, buffers: dict[str, np.ndarray] = buffers) -> Any:
            return {who: lambda rows, read=read: [read(n, rows, buffers[n]) for n in names] for who, read in readers.items()}

        if kind == "CamVid":
            size = layout.bytes_of("logits")
            title = f"One array, {size:,} bytes an image, batches of {BATCH} at random"
            tables.append(reading(title, seconds_an_image(arms(["logits"]), count, rounds), size, notes=notes))
            single = {
                LIMIT: lambda rows, read=readers[LIMIT], into=buffers["logits"]: [read("logits", [row], into) for row in rows],
                "ours, `record`": lambda rows, c=cache: [c.record("logits", row) for row in rows],
            }
            tables.append(reading("The same, one image a call", seconds_an_image(single, count, rounds), size, "ours, `record`"))
        seconds = seconds_an_image({**arms(READ), "ours": cache.read}, count, rounds)
        seconds["ours, first read in a process, with checksums"] = first_read(path, count, rounds)
        size = sum(layout.bytes_of(name) for name in READ)
        tables.append(reading(f"Whole records ({kind}), {size:,} bytes an image in four arrays", seconds, size))
    return tables


def first_read(path: Path, count: int, rounds: int) -> float:
    """Seconds an image: all rows once, in random order, from a cache just opened, which opens shards and compares checksums."""
    times, rng = [], np.random.default_rng(0)
    for _ in range(max(2, rounds // 3)):
        cache, rows = open_cache(path), rng.permutation(count).tolist()
        start = time.perf_counter()
        for i in range(0, count, BATCH):
            cache.read(rows[i : i + BATCH])
        times.append((time.perf_counter() - start) / count)
    return statistics.median(times)


def raw_write(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """The limit: every value written once, image by image, to one file, and that synced."""
    with open(folder / "raw", "wb", buffering=0) as file:
        for values in zip(*arrays.values(), strict=True):
            for value in values:
                file.write(value.data)
        os.fsync(file.fileno())


def writer_table(setting: Setting) -> list[Table]:
    """Writing the five arrays of a teacher cache.

    Ours starts with stage one's logits in float32: it also encodes, checks for NaN, hashes, syncs and publishes. The other writers
    get finished bytes in memory and leave them in the page cache, unless their names say otherwise.
    """
    folder, layout, count = setting.folder, replace(CAMVID, encoding="uint8"), 2 * BATCH if setting.quick else 1024
    arrays = arrays_of(open_cache(build(folder, layout, count)))
    size = sum(values.nbytes for values in arrays.values())
    ours = "ours, `caches.build`"
    writers: dict[str, Callable[[Path], object]] = {
        "limit: write to one file, fsync": lambda to: raw_write(to, arrays),
        ours: lambda to: build(to, layout, count),
        "zarr-python, whole shards, with encoding and syncing": lambda to: encode_and_write_zarr(to, layout, count),
        "zarr-python, whole shards": lambda to: write_zarr(to, arrays, layout),
        "tensorstore, whole shards": lambda to: write_tensorstore(to, arrays, layout),
    } | {name: lambda to, write=peer.write: write(to, arrays) for name, peer in PEERS.items()}
    times: dict[str, list[float]] = {name: [] for name in writers}
    notes = []
    for number in range(1 if setting.quick else 5):
        for name, write in list(writers.items()):
            place = folder / f"written{number}"
            place.mkdir()
            start = time.perf_counter()
            try:
                write(place)
                times[name].append(time.perf_counter() - start)
            except ImportError as error:
                notes.append(f"{name} is left out: {error}.")
                del writers[name]
            shutil.rmtree(place)
    many = count * (2 if setting.quick else 4)
    built = in_child(build_in_child, folder / "large", layout, many)
    notes.append(
        f"Building {many:,} images, {many * layout.record_bytes / 1e6:,.0f} MB, took {built['memory']:.0f} MB of additional "
        f"memory. A shard has {layout.shard_sizes('logits', layout.rows_per_shard)[0] / 1e6:.0f} MB of logits."
    )
    columns = {"images/s": lambda time_: f"{count / time_:,.0f}", "MB/s": lambda time_: f"{size / time_ / 1e6:,.0f}"}
    seconds = {name: statistics.median(times[name]) for name in writers}
    return [contest(f"Writing {count:,} images, {size / 1e6:,.0f} MB in five arrays", columns, seconds, ours, notes)]


def build_in_child(folder: Path, layout: Layout, count: int) -> dict[str, float]:
    folder.mkdir()
    before = memory("VmRSS")
    start = time.perf_counter()
    build(folder, layout, count)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory": memory("VmHWM") - before}


def read_in_child(path: Path, count: int, rounds: int) -> dict[str, float]:
    before, files = memory("VmRSS"), len(os.listdir("/dev/fd"))
    start = time.perf_counter()
    cache = open_cache(path)
    opened = time.perf_counter()
    keys = [cache.index.key(i) for i in np.random.default_rng(0).integers(count, size=1000).tolist()]
    looked = time.perf_counter()
    cache.row(keys[0])
    first = time.perf_counter() - looked
    looked = time.perf_counter()
    for key in keys:
        cache.row(key)
    lookup = (time.perf_counter() - looked) / len(keys)
    held = memory("VmRSS") - before
    for start_row in range(0, count, BATCH):
        cache.read(range(start_row, min(start_row + BATCH, count)))  # so that all are verified
    descriptors = len(os.listdir("/dev/fd")) - files
    read = seconds_an_image({"ours": cache.read}, count, rounds)["ours"]
    cache.close()
    cache_module._OPEN_SHARDS = FEW
    few = seconds_an_image({"ours": cache.read}, count, rounds)["ours"]
    return {"open": opened - start + first, "memory": held, "lookup": lookup, "read": read, "few": few, "descriptors": descriptors}


def growth_table(setting: Setting) -> list[Table]:
    """How the costs of an image grow with the number of images; the smallest records, so that everything but the bytes shows."""
    rows: list[dict[str, str]] = []
    for count in (600,) if setting.quick else (10**3, 10**4, 10**5):
        path = setting.folder / f"g{count}/t.zarr"
        built = in_child(build_in_child, path.parent, SMALLEST, count)
        read = in_child(read_in_child, path, count, 2 if setting.quick else 15)
        rows.append(
            {
                "images": f"{count:,}",
                "build, µs an image": f"{built['seconds'] / count * 1e6:.0f}",
                "build, MB": f"{built['memory']:.0f}",
                "files": f"{sum(file.is_file() for file in path.rglob('*')):,}",
                "commit, KB": f"{(path / 'commit.json').stat().st_size / 1e3:,.0f}",
                "index, KB": f"{(path / 'images.parquet').stat().st_size / 1e3:,.0f}",
                "open, ms": f"{read['open'] * 1e3:.0f}",
                "open, MB": f"{read['memory']:.0f}",
                "look up, µs": f"{read['lookup'] * 1e6:.1f}",
                "read, µs an image": f"{read['read'] * 1e6:.1f}",
                "open files": f"{read['descriptors']:.0f}",
                f"read with {FEW} open files": f"{read['few'] * 1e6:.1f}",
            }
        )
    note = (
        f"Records of {SMALLEST.record_bytes} bytes, {SMALLEST.rows_per_shard} a shard. Memory is counted without Python's own. "
        f"`ulimit -n` is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,}. "
        f"A reader keeps a quarter of that many files open, {FEW} with the usual limit of 1,024."
    )
    return [Table("Growth", tuple(rows[0]), [tuple(row.values()) for row in rows], [note])]


PARTS = (reader_tables, writer_table, growth_table, strewn_table)

if __name__ == "__main__":
    print_tables(__doc__, *PARTS)
