"""What do reading, building and growing a teacher cache cost, beside the physical limit and other formats? Markdown tables.

pip install '.[bench]' && python benchmarks/reader.py

Each reader is warm and runs in one process. Unless a table says otherwise, the page cache holds the files as their writer left
them. The readers take turns of about 20 milliseconds, and each figure is the median of the rounds, so other work on the machine
hits all readers alike. Compare within a table, never between two runs. The targets are random numbers; their values do not matter.
A peer that is not installed is left out, with a note.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mgd_pipeline.caches import reader as cache_module
from mgd_pipeline.caches.build import build_shards, plan_cache, publish
from mgd_pipeline.caches.encoding import TARGETS_VERSION, TeacherTargets, encode_logits, require_finite, require_finite_float16
from mgd_pipeline.caches.format import ARRAYS, Layout, array_metadata, plan_layout, shard_path
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.caches.shards import BuildImage
from mgd_pipeline.data.manifest import ImageKey
from peers import PEERS, Read

BATCH = 16
FEW = 256
READ = ("logits", "logits_affine", "region_embeddings", "extents")
"""What `TargetCache.read` returns of an image."""
LIMIT = "limit: os.preadv into a buffer"
LAYOUTS = {
    "smallest": plan_layout(2, 2, 32, 32, 4, 16, "uint8"),
    "CamVid": plan_layout(11, 112, 240, 176, 4, 16, "float16"),
    "VOC": plan_layout(21, 64, 512, 512, 4, 16, "uint8"),
}
"""The second has the 58 KB of logits that the peers are compared with."""


class Table(NamedTuple):
    """A Markdown table and the notes below it."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]

    def markdown(self) -> str:
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        return "\n".join([f"### {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines), "", "\n\n".join(self.notes), ""])


# --- caches -----------------------------------------------------------------------------------------------------------


def draw(layout: Layout) -> list[TeacherTargets]:
    """Random targets that fill the canvas, as stage one has them."""
    rng, names = np.random.default_rng(0), {"logits": np.float32, "region_embeddings": np.float16, "global_descriptors": np.float32}
    return [TeacherTargets(*(rng.normal(size=layout.records[n][0]).astype(names[n]) for n in names)) for _ in range(7)]


def build(folder: Path, layout: Layout, count: int) -> Path:
    """A cache of `count` images at folder/t.zarr. A few random targets take turns, so drawing them costs nothing."""
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


def zarr_reader(path: Path, layout: Layout) -> Read:
    """zarr-python's own indexing of our cache, a row at a time. Its `oindex` for lists of rows is even slower."""
    import zarr

    arrays: dict[str, Any] = {name: zarr.open_array(path / name, mode="r") for name in ARRAYS}

    def read(name: str, rows: list[int], into: np.ndarray) -> None:
        for i, row in enumerate(rows):
            into[i] = arrays[name][row]

    return read


def tensorstore_reader(path: Path, side_by_side: bool) -> Read:
    """tensorstore without its own cache, on our cache: a batch's reads one after the other, or all begun before the first ends."""
    import tensorstore

    def opened(name: str) -> Any:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
        return tensorstore.open(spec, read=True).result()

    arrays = {name: opened(name) for name in ARRAYS}

    def read(name: str, rows: list[int], into: np.ndarray) -> None:
        futures = (arrays[name][row].read() for row in rows)
        for i, future in enumerate(list(futures) if side_by_side else futures):
            into[i] = future.result()

    return read


# --- our cache, written by other libraries ----------------------------------------------------------------------------


def write_zarr(folder: Path, arrays: dict[str, np.ndarray], layout: Layout) -> None:
    """zarr-python at its best: whole shards, each written once, of exactly our arrays."""
    import zarr

    for name, values in arrays.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "zarr.json").write_bytes(array_metadata(layout, name, len(values)))
        array = zarr.open_array(folder / name, mode="r+").with_config({"write_empty_chunks": True})
        for start in range(0, len(values), layout.rows_per_shard):
            end = min(start + layout.rows_per_shard, len(values))
            array[start:end] = values[start:end]


def encode_and_write_zarr(folder: Path, layout: Layout, count: int) -> None:
    """The part of the work of `caches.build` that a user of zarr-python can have: encodes, gathers whole shards, writes, syncs."""
    drawn, frame = draw(layout), (layout.height, layout.width)
    encoded: dict[str, list[Any]] = {name: [] for name in ARRAYS}
    for i in range(count):
        targets = drawn[i % 7]
        logits = encode_logits(targets.logits, layout.encoding)  # pyright: ignore[reportArgumentType]
        require_finite(targets.global_descriptor, "global descriptor")
        encoded["logits"].append(logits.values)
        encoded["logits_affine"].append((logits.offset, logits.scale))
        require_finite_float16(targets.region_embeddings, "region embeddings")
        encoded["region_embeddings"].append(targets.region_embeddings)
        encoded["global_descriptors"].append(targets.global_descriptor)
        encoded["extents"].append((*frame, *frame))
    write_zarr(folder, {name: np.array(encoded[name], layout.records[name][1]) for name in ARRAYS}, layout)
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def write_tensorstore(folder: Path, arrays: dict[str, np.ndarray], layout: Layout) -> None:
    import tensorstore

    for name, values in arrays.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "zarr.json").write_bytes(array_metadata(layout, name, len(values)))
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / name)}}
        array: Any = tensorstore.open(spec, write=True).result()
        for start in range(0, len(values), layout.rows_per_shard):
            end = min(start + layout.rows_per_shard, len(values))
            array[start:end].write(values[start:end]).result()


# --- measuring --------------------------------------------------------------------------------------------------------


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


def reading(title: str, seconds: dict[str, float], size: int, ours: str, notes: list[str]) -> Table:
    """A table of readers, the first of which is the limit."""
    limit = next(iter(seconds.values()))
    rows = [
        (
            f"**{name}**" if name == ours else name,
            f"{time_ * 1e6:.1f}",
            f"{size / time_ / 1e9:.2f}",
            f"{limit / time_ * 100:.0f} %",
            f"{time_ / seconds[ours]:.2f}",
        )
        for name, time_ in seconds.items()
    ]
    return Table(title, ("Reader", "µs an image", "GB/s", "of the limit", "times ours"), rows, notes)


def forget(folder: Path) -> None:
    """Drops all files below a folder from the page cache; pages that some process has mapped would stay."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def written_peers(folder: Path, layout: Layout, arrays: dict[str, np.ndarray]) -> tuple[dict[str, Callable[[], Read]], list[str]]:
    """What opens each installed peer, and a note for each missing one."""
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


def strewn_table(folder: Path, quick: bool = False) -> Table:
    """Random images from a page cache that was filled by reading them in random order from the disk, as a first epoch does."""
    layout, count = LAYOUTS["CamVid"], 2 * BATCH if quick else 1024
    (folder / "strewn").mkdir()
    path = build(folder / "strewn", layout, count)
    openers, notes = written_peers(folder / "strewn", layout, arrays_of(open_cache(path)))
    forget(folder / "strewn")
    readers = {LIMIT: raw_reader(path, layout), "ours": our_reader(open_cache(path))}
    readers |= {name: opened() for name, opened in openers.items()}
    into = np.empty((BATCH, *layout.records["logits"][0]), layout.records["logits"][1])
    rng = np.random.default_rng(0)
    for name, read in readers.items():
        if name != LIMIT:  # which reads the files of ours
            for rows in rng.permutation(count).reshape(-1, BATCH).tolist():
                read("logits", rows, into)
    arms = {name: lambda rows, read=read: read("logits", rows, into) for name, read in readers.items()}
    size = layout.bytes_of("logits")
    notes.append(
        "Linux keeps pages that were read at random one by one. It keeps pages that were written or read in order in larger pieces."
    )
    seconds = seconds_an_image(arms, count, 2 if quick else 15)
    return reading(f"One array, pages read at random, {size:,} bytes an image, batches of {BATCH}", seconds, size, "ours", notes)


def reader_tables(folder: Path, quick: bool = False) -> list[Table]:
    """Random images from a warm page cache: one array beside its peers, whole records of three sizes."""
    tables, rounds = [], 2 if quick else 15
    for kind, layout in LAYOUTS.items():
        count = 2 * BATCH if quick else {"smallest": 4096, "CamVid": 1024, "VOC": 512}[kind]
        (folder / kind).mkdir()
        path = build(folder / kind, layout, count)
        cache, notes = open_cache(path), []
        readers: dict[str, Read] = {LIMIT: raw_reader(path, layout), "ours": our_reader(cache)}
        cache.read(cache.index.rows)
        buffers = {name: np.ones((BATCH, *shape), dtype) for name, (shape, dtype) in layout.records.items()}
        if kind == "CamVid":
            openers, notes = written_peers(folder / kind, layout, arrays_of(cache))
            readers |= {name: opened() for name, opened in openers.items()}
        readers["zarr-python, our teacher cache"] = zarr_reader(path, layout)
        try:
            readers["tensorstore without its own cache, our teacher cache"] = tensorstore_reader(path, side_by_side=False)
            readers["the same, a batch in parallel"] = tensorstore_reader(path, side_by_side=True)
        except ImportError as error:
            notes.append(f"tensorstore is left out: {error}.")

        def one(read: Read, buffers: dict[str, np.ndarray] = buffers) -> Callable[[list[int]], object]:
            return lambda rows: read("logits", rows, buffers["logits"])

        def whole(read: Read, buffers: dict[str, np.ndarray] = buffers) -> Callable[[list[int]], object]:
            return lambda rows: [read(name, rows, buffers[name]) for name in READ]

        if kind == "CamVid":
            size = layout.bytes_of("logits")
            seconds = seconds_an_image({name: one(read) for name, read in readers.items()}, count, rounds)
            title = f"One array, {size:,} bytes an image, batches of {BATCH} at random"
            tables.append(reading(title, seconds, size, "ours", notes))
            single = seconds_an_image(
                {
                    LIMIT: lambda rows, r=readers, b=buffers["logits"]: [r[LIMIT]("logits", [row], b) for row in rows],
                    "ours, `record`": lambda rows, c=cache: [c.record("logits", row) for row in rows],
                },
                count,
                rounds,
            )
            tables.append(reading("The same, one image a call", single, size, "ours, `record`", []))
        contenders = {name: whole(read) for name, read in readers.items()} | {"ours": cache.read}
        seconds = seconds_an_image(contenders, count, rounds)
        seconds["ours, first read in a process, with checksums"] = first_read(path, count, rounds)
        size = sum(layout.bytes_of(name) for name in READ)
        tables.append(reading(f"Whole records ({kind}), {size:,} bytes an image in four arrays", seconds, size, "ours", []))
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


def writer_table(folder: Path, quick: bool = False) -> Table:
    """Writing the five arrays of a teacher cache.

    Ours starts with stage one's logits in float32: it also encodes, checks for NaN, hashes, syncs and publishes. The other writers
    get finished bytes in memory and leave them in the page cache, unless their names say otherwise.
    """
    layout, count = replace(LAYOUTS["CamVid"], encoding="uint8"), 2 * BATCH if quick else 1024
    (folder / "writer").mkdir()
    arrays = arrays_of(open_cache(build(folder / "writer", layout, count)))
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
    for number in range(1 if quick else 5):
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
    seconds = {name: statistics.median(times[name]) for name in writers}
    rows = [
        (
            f"**{name}**" if name == ours else name,
            f"{count / time_:,.0f}",
            f"{size / time_ / 1e6:,.0f}",
            f"{seconds['limit: write to one file, fsync'] / time_ * 100:.0f} %",
            f"{time_ / seconds[ours]:.2f}",
        )
        for name, time_ in seconds.items()
    ]
    many = count * (2 if quick else 4)
    built = in_child(build_in_child, folder / "large", layout, many)
    notes.append(
        f"Building {many:,} images, {many * layout.record_bytes / 1e6:,.0f} MB, took {built['memory']:.0f} MB of additional "
        f"memory. A shard has {layout.shard_bytes('logits', layout.rows_per_shard) / 1e6:.0f} MB of logits."
    )
    header = ("Writer", "images/s", "MB/s", "of the limit", "times ours")
    return Table(f"Writing {count:,} images, {size / 1e6:,.0f} MB in five arrays", header, rows, notes)


# --- growth -----------------------------------------------------------------------------------------------------------


def in_child(function: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """Calls a function in a new process, so that memory is that of this call alone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def memory(field: str) -> float:
    """MB of memory that this process has now (VmRSS), or had at most (VmHWM; ru_maxrss would include the parent's)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


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
    return {
        "open": opened - start + first,
        "memory": held,
        "lookup": lookup,
        "read": read,
        "few": seconds_an_image({"ours": cache.read}, count, rounds)["ours"],
        "descriptors": descriptors,
    }


def growth_table(folder: Path, quick: bool = False) -> Table:
    """How the costs of an image grow with the number of images; the smallest records, so that everything but the bytes shows."""
    layout, rows = LAYOUTS["smallest"], []
    for count in (300, 600) if quick else (10**3, 10**4, 10**5):
        built = in_child(build_in_child, folder / f"g{count}", layout, count)
        path = folder / f"g{count}/t.zarr"
        read = in_child(read_in_child, path, count, 2 if quick else 15)
        sizes = [(path / name).stat().st_size for name in ("commit.json", "images.parquet")]
        rows.append(
            (
                f"{count:,}",
                f"{built['seconds'] / count * 1e6:.0f}",
                f"{built['memory']:.0f}",
                f"{sum(file.is_file() for file in path.rglob('*')):,}",
                f"{sizes[0] / 1e3:,.0f}",
                f"{sizes[1] / 1e3:,.0f}",
                f"{read['open'] * 1e3:.0f}",
                f"{read['memory']:.0f}",
                f"{read['lookup'] * 1e6:.1f}",
                f"{read['read'] * 1e6:.1f}",
                f"{read['descriptors']:.0f}",
                f"{read['few'] * 1e6:.1f}",
            )
        )
    header = (
        *("images", "build, µs an image", "build, MB", "files", "commit, KB", "index, KB", "open, ms", "open, MB"),
        *("look up, µs", "read, µs an image", "open files", f"read with {FEW} open files"),
    )
    shards = f"Records of {layout.record_bytes} bytes, {layout.rows_per_shard} a shard"
    limit = f"`ulimit -n` is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,}"
    share = f"A reader keeps a quarter of that many files open, {FEW} with the usual limit of 1,024."
    return Table("Growth", header, rows, [f"{shards}. Memory is counted without Python's own. {limit}. {share}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; shows that it runs, not how fast")
    parser.add_argument("--folder", type=Path, help="an empty folder to work in, on the disk to be measured (4 GB)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for table in reader_tables(Path(folder), arguments.quick):
            print(table.markdown(), flush=True)
        print(writer_table(Path(folder), arguments.quick).markdown(), flush=True)
        print(growth_table(Path(folder), arguments.quick).markdown(), flush=True)
        print(strewn_table(Path(folder), arguments.quick).markdown(), flush=True)


if __name__ == "__main__":
    main()
