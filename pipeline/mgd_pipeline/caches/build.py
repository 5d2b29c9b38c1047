"""Builds a target cache shard by shard, safe to kill and safe to run several times at once; published whole.

    <work>/shards/00003-<hash of its images>/   one whole shard: a file for each array, and receipt.json. Never modified.
    <work>/stage-...                            a shard being written, or a store being put together, by one process
    <work>/images.parquet                       the rows of the last published generation

A shard is written in a folder of its own, synced, and renamed to its place: of several builders of one shard exactly one
wins, with all arrays and the receipt that has their hashes, so a store never mixes what two builders computed. When all shards
are there, their files are linked into a new store, the index and the commit are added, and the store is renamed to its
output. Whoever is killed loses the shard in hand, and the one before if the disk had not finished it.

Shards stay in the work folder after that, as further names of the published files: when images are added, and DVC has
removed the old output, only the new ones are computed. Rows never move; new images start a new shard, old ones stay as they
are, byte for byte.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from mgd_pipeline.caches.format import (
    ARRAYS,
    COMMIT,
    FORMAT,
    INDEX,
    INDEX_SCHEMA,
    Layout,
    array_metadata,
    group_metadata,
    sealed,
    shard_name,
)
from mgd_pipeline.caches.reader import Index, TargetCache, is_foreign, open_cache, read_commit, read_index
from mgd_pipeline.caches.shards import BuildImage, Compute, Shard, adopt, fill_shard, finish_shard, finished, read_receipt
from mgd_pipeline.data.manifest import ImageKey
from mgd_pipeline.durable import (
    link_or_copy,
    private_name,
    publish_folder,
    replace_file,
    sync_folders,
    write_synced,
)
from mgd_pipeline.errors import CacheError
from mgd_pipeline.tables import parquet_bytes


@dataclass(frozen=True)
class Base:
    """The last published generation: its rows, its number, and the store itself where it is still at the output."""

    index: Index
    generation: int
    cache: TargetCache | None


@dataclass(frozen=True)
class Plan:
    """What a store shall become: all of its shards, and which of them are to be computed first."""

    work: Path
    output: Path
    provenance: dict[str, Any]
    layout: Layout
    images: Mapping[ImageKey, BuildImage]
    shards: Sequence[Shard]
    todo: Sequence[Shard]
    """In an order of this process's own: several builders then rarely meet at one shard."""
    generation: int

    def missing(self) -> list[Shard]:
        """The shards that nobody has finished until now."""
        # The folder is listed anew: a network file system may deny for a minute a name that it was asked for too early.
        there = set(os.listdir(self.work / "shards"))
        return [shard for shard in self.shards if shard.name not in there]


def build_store(
    work: Path,
    output: Path,
    provenance: dict[str, Any],
    layout: Layout,
    images: Sequence[BuildImage],
    compute: Compute,
    made_by: Mapping[str, Any],
    *,
    retry_skipped: bool = True,
) -> int:
    """Brings `output` to a store with targets of all images, computing only what no earlier run has; returns how many it computed.

    `work` is a folder for stores of this provenance and layout only, on the file system of `output`; other processes may
    build in it at the same time. `made_by` (device, batch size, threads ...) is noted with each shard and is no part of the
    identity. Images that an earlier run skipped are tried again where `retry_skipped`. Raises what `compute` raises, OSError,
    and NonFiniteError naming the image where a teacher said NaN or infinity; all finished shards stay.
    """
    plan = plan_store(work, output, provenance, layout, images, retry_skipped=retry_skipped)
    if plan is None:
        return 0
    computed = build_shards(plan, plan.todo, compute, made_by)
    publish(plan)
    return computed


def plan_store(
    work: Path,
    output: Path,
    provenance: dict[str, Any],
    layout: Layout,
    images: Sequence[BuildImage],
    *,
    retry_skipped: bool = True,
) -> Plan | None:
    """What `build_store` has to do; None where the store at `output` has all images already."""
    base = find_base(work, output, provenance, layout)
    wanted = {image.key: image for image in images}
    if base is not None and base.cache is not None and not _new(base, wanted, retry_skipped):
        return None
    (work / "shards").mkdir(parents=True, exist_ok=True)
    shards = plan_shards(base, wanted, layout.rows_per_shard, retry_skipped=retry_skipped)
    if base is not None and base.cache is not None:
        for shard in shards:
            adopt(work, shard, output, base.cache)
    todo = [shard for shard in shards if not finished(work, shard)]
    if any(key not in wanted for shard in todo for key in shard.keys):
        # Rows of images that are gone cannot be made again, so the old numbering cannot be kept.
        base = None
        shards = plan_shards(None, wanted, layout.rows_per_shard, retry_skipped=retry_skipped)
        todo = [shard for shard in shards if not finished(work, shard)]
    random.Random(private_name("order")).shuffle(todo)
    grown = base is None or any(shard.number * layout.rows_per_shard > base.index.rows[-1] for shard in shards)
    generation = (base.generation if base else 0) + grown
    return Plan(work, output, provenance, layout, wanted, shards, todo, generation)


def build_shards(
    plan: Plan,
    todo: Sequence[Shard],
    compute: Compute,
    made_by: Mapping[str, Any],
    advance: Callable[[int], None] = lambda done: None,
) -> int:
    """Builds these shards of a plan, one after the other; returns how many images it computed, as others may build, too.

    `advance(done)` tells how many rows of `todo` are stored.
    """
    done = computed = 0
    with ThreadPoolExecutor(1) as disk:  # which finishes a shard while the teacher computes the next
        before, last = None, None
        for shard in todo:
            place = plan.work / "shards" / shard.name
            if not place.exists():
                images = [plan.images[key] for key in shard.keys]
                writer = fill_shard(plan.work, plan.layout, images, compute, partial(_plus, advance, done))
                before, last = last, disk.submit(finish_shard, writer, place, made_by)
                if before is not None:
                    before.result()
                computed += len(shard.keys)
            else:
                advance(done + len(shard.keys))
            done += len(shard.keys)
        if last is not None:
            last.result()
    return computed


def find_base(work: Path, output: Path, provenance: dict[str, Any], layout: Layout) -> Base | None:
    """The generation to go on from: the store at the output if it is one of these, else what the work folder knows of the last."""
    try:
        cache = open_cache(output)
        if cache.provenance == provenance and cache.layout == layout:
            return Base(cache.index, cache.generation, cache)
    except CacheError:  # nothing there, or nothing to go on from: it will be replaced
        if os.path.lexists(output) and is_foreign(output):
            raise CacheError(f"{output}: is not a target cache, and a store is to take its place; move it, or remove it") from None
    try:
        return Base(*read_index(work / INDEX), None)
    except CacheError:
        return None


def plan_shards(base: Base | None, images: Iterable[ImageKey], rows_per_shard: int, *, retry_skipped: bool) -> list[Shard]:
    """All shards of a store: those of `base` as they are, then new ones for the images that it lacks."""
    shards: dict[int, list[ImageKey]] = {}
    if base is not None:
        for row, key in zip(base.index.rows.tolist(), base.index.keys, strict=True):
            shards.setdefault(row // rows_per_shard, []).append(key)
    new = list(dict.fromkeys(images)) if base is None else _new(base, images, retry_skipped)
    begin = len(shards)
    for start in range(0, len(new), rows_per_shard):
        shards[begin + start // rows_per_shard] = new[start : start + rows_per_shard]
    return [Shard(number, tuple(keys)) for number, keys in shards.items()]


def _new(base: Base, images: Iterable[ImageKey], retry_skipped: bool) -> list[ImageKey]:
    known = base.index.place if retry_skipped else set(base.index.keys)
    return [key for key in dict.fromkeys(images) if key not in known]


def _plus(advance: Callable[[int], None], done: int, more: int) -> None:
    advance(done + more)


def publish(plan: Plan) -> None:
    """Links the finished shards into a store, adds index and commit, and renames it to the output, replacing a former one."""
    work, layout, shards = plan.work, plan.layout, plan.shards
    schema = INDEX_SCHEMA.with_metadata({"generation": str(plan.generation)})
    tables, shard_files, made = [schema.empty_table()], [], []
    for shard in shards:  # Python's rows of one shard at a time: a row takes 3 KB there, 120 bytes in a table
        receipt = read_receipt(work / "shards" / shard.name)
        if receipt is None:
            raise CacheError(f"shard {shard.name} has disappeared while the store was put together; run the same command again")
        rows = [
            {
                "row": shard.number * layout.rows_per_shard + i,
                "image_id": row["key"][0],
                "image_sha256": row["key"][1],
                "problem": row["problem"],
                **{f"{name}_crc32c": row["crc32c"].get(name, 0) for name in ARRAYS},
            }
            for i, row in enumerate(receipt["rows"])
        ]
        tables.append(pa.Table.from_pylist(rows, schema=schema))
        shard_files.append(receipt["files"])
        made.append({"rows": len(shard.keys), "made_by": receipt["made_by"]})
    table = pa.concat_tables(tables).combine_chunks()
    count = table["row"][-1].as_py() + 1 if len(table) else 0
    index = parquet_bytes(table, compression="none", use_dictionary=False, write_statistics=False)

    store = work / private_name("stage-store")
    os.mkdir(store)
    try:
        files: dict[str, dict[str, Any]] = {}

        def add(name: str, data: bytes) -> None:
            write_synced(store / name, data, 0o444)
            files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

        add("zarr.json", group_metadata(plan.provenance, layout))
        add(INDEX, index)
        for name in layout.records:
            os.mkdir(store / name)
            add(f"{name}/zarr.json", array_metadata(layout, name, count))
            for shard, entries in zip(shards, shard_files, strict=True):
                file = shard_name(layout, name, shard.number)
                os.makedirs((store / file).parent)
                link_or_copy(work / "shards" / shard.name / name, store / file)
                files[file] = entries[name]
        write_synced(
            store / COMMIT, sealed({"format": FORMAT, "generation": plan.generation, "files": files, "shards": made}), 0o444
        )
        sync_folders((store, *(path for path in store.rglob("*") if path.is_dir())))
        replace_file(work / INDEX, index)
        _rename_store(work, store, plan.output)
    finally:
        shutil.rmtree(store, ignore_errors=True)


def _rename_store(work: Path, store: Path, output: Path) -> None:
    """`output` holds nothing or a finished store at any moment; of two builders of the same store the first wins."""
    output.parent.mkdir(parents=True, exist_ok=True)
    commit = read_commit(store)
    while not publish_folder(store, output):
        aside = work / private_name("stage-replaced")
        with suppress(CacheError):  # a damaged one is replaced
            if open_cache(output).commit == commit:
                return
        try:
            # A folder cannot be renamed onto one that is not empty: the former store moves aside first.
            os.rename(output, aside)
        except FileNotFoundError:
            continue  # another builder has just moved it aside
        shutil.rmtree(aside)
