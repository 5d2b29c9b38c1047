"""Builds a teacher cache shard by shard, safe to kill and safe to run several times at once; published whole.

    <work>/shards/00003-<hash of its images>/   one whole shard: a file for each array, and receipt.json. Never modified.
    <work>/stage-...                            a shard being written, or a cache being put together, by one process
    <work>/images.parquet                       the rows of the last published generation

A shard is written in a folder of its own, synced, and renamed to its place. Of several builders of one shard exactly one wins,
with all arrays and the receipt that has their hashes: a cache never mixes the results of two builders. When all shards are there,
their files are linked into a new cache, the index and the commit are added, and the cache is renamed to its output. A builder
that is killed loses the current shard, and the shard before it if the disk had not finished it.

After that the shards stay in the work folder, as further names of the published files. When images are added, only the new images
are computed, even if DVC has removed the old output. Rows never move. New images start a new shard; old shards stay the same
bytes.
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
from pathlib import Path
from typing import Any

import pyarrow as pa

from mgd_pipeline.caches.commit import is_foreign, read_commit
from mgd_pipeline.caches.format import (
    COMMIT,
    FORMAT,
    INDEX,
    Layout,
    array_metadata,
    group_metadata,
    index_schema,
    sealed,
    shard_name,
)
from mgd_pipeline.caches.index import Index, parse_index, read_index
from mgd_pipeline.caches.opening import Contents
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.caches.shards import BuildImage, Compute, Shard, adopt, fill_shard, finish_shard, finished, read_receipt
from mgd_pipeline.caches.statistics import committed_statistics
from mgd_pipeline.data.manifest import ImageKey
from mgd_pipeline.durable import link_or_copy, private_name, publish_folder, replace_file, sync_folders, write_synced
from mgd_pipeline.errors import CacheError
from mgd_pipeline.tables import parquet_bytes


@dataclass(frozen=True)
class Base:
    """The last published generation: its rows, its number, and the cache itself if it is still at the output."""

    index: Index
    generation: int
    cache: TargetCache | None


@dataclass(frozen=True)
class Plan:
    """What a cache shall become: all of its shards, and which of them have to be computed."""

    work: Path
    output: Path
    provenance: dict[str, Any]
    layout: Layout
    images: Mapping[ImageKey, BuildImage]
    shards: Sequence[Shard]
    todo: Sequence[Shard]
    """In a random order of this process: several builders then rarely meet at one shard."""
    generation: int

    def missing(self) -> list[Shard]:
        """The shards that nobody has finished yet."""
        # The folder is listed: a network file system may deny for a minute a name that it was asked for too early.
        there = set(os.listdir(self.work / "shards"))
        return [shard for shard in self.shards if shard.name not in there]


def plan_cache(
    work: Path,
    output: Path,
    provenance: dict[str, Any],
    layout: Layout,
    images: Sequence[BuildImage],
    *,
    retry_skipped: bool = True,
) -> Plan | None:
    """What has to be done to make `output` a cache with targets of all images; None if it is one already.

    `build_shards`, then `publish` do it. `work` is a folder only for caches of this provenance and layout, on the file system of
    `output`; other processes may build in it at the same time. Earlier results in it are used again. With `retry_skipped`,
    images that an earlier run skipped are tried again.
    """
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
        # Rows of images that are gone cannot be made again: a new numbering begins.
        base, shards = None, plan_shards(None, wanted, layout.rows_per_shard, retry_skipped=retry_skipped)
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
    """Builds these shards of a plan one after the other; returns how many images this process computed.

    `made_by` (device, batch size, threads ...) is noted with each shard and is not part of the identity. `advance(done)` tells
    how many rows of `todo` are stored. Raises OSError, what `compute` raises, and NonFiniteError naming the image if a teacher
    said NaN or infinity; all finished shards stay.
    """
    done = computed = 0
    with ThreadPoolExecutor(1) as disk:  # it finishes a shard while the teacher computes the next
        before, last = None, None
        for shard in todo:
            place = plan.work / "shards" / shard.name
            if not place.exists():
                images = [plan.images[key] for key in shard.keys]
                writer = fill_shard(plan.work, plan.layout, images, compute, lambda rows, start=done: advance(start + rows))
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
    """The generation to continue: the cache at the output if it has this identity, else what the work folder knows of the last."""
    try:
        cache = open_cache(output)
        if cache.provenance == provenance and cache.layout == layout:
            return Base(cache.index, cache.generation, cache)
    except CacheError:  # nothing is there, or a cache that will be replaced
        if os.path.lexists(output) and is_foreign(output):
            raise CacheError(f"{output}: is not a teacher cache, and a cache is to take its place; move it, or remove it") from None
    try:
        return Base(*read_index(work / INDEX, layout.arrays), None)
    except CacheError:
        return None


def plan_shards(base: Base | None, images: Iterable[ImageKey], rows_per_shard: int, *, retry_skipped: bool) -> list[Shard]:
    """All shards of a cache: the shards of `base` unchanged, then new shards for the images that `base` lacks."""
    shards: dict[int, list[ImageKey]] = {}
    if base is not None:
        for row, key in zip(base.index.rows.tolist(), base.index.keys, strict=True):
            shards.setdefault(row // rows_per_shard, []).append(key)
    new, begin = _new(base, images, retry_skipped), len(shards)
    for start in range(0, len(new), rows_per_shard):
        shards[begin + start // rows_per_shard] = new[start : start + rows_per_shard]
    return [Shard(number, tuple(keys)) for number, keys in shards.items()]


def _new(base: Base | None, images: Iterable[ImageKey], retry_skipped: bool) -> list[ImageKey]:
    known = () if base is None else base.index.place if retry_skipped else set(base.index.keys)
    return [key for key in dict.fromkeys(images) if key not in known]


def publish(plan: Plan, training: Iterable[ImageKey] | None = None) -> None:
    """Links the finished shards into a cache, adds index and commit, and renames it to the output, replacing a former cache.

    The commit gets the statistics of the embeddings of the `training` images, by default of all images of the plan; they are read
    once for it.
    """
    work, layout = plan.work, plan.layout
    table, receipts = _read_receipts(plan)
    count = table["row"][-1].as_py() + 1 if len(table) else 0
    index = parquet_bytes(table, compression="none", use_dictionary=False, write_statistics=False)
    stage = work / private_name("stage-cache")
    os.mkdir(stage)
    try:
        files: dict[str, dict[str, Any]] = {}

        def add(name: str, data: bytes) -> None:
            write_synced(stage / name, data, 0o444)
            files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

        add("zarr.json", group_metadata(plan.provenance, layout))
        add(INDEX, index)
        for name in layout.records:
            os.mkdir(stage / name)
            add(f"{name}/zarr.json", array_metadata(layout, name, count))
            for shard, receipt in zip(plan.shards, receipts, strict=True):
                file = shard_name(layout, name, shard.number)
                os.makedirs((stage / file).parent)
                link_or_copy(work / "shards" / shard.name / name, stage / file)
                files[file] = receipt["files"][name]
        made = [
            {"rows": len(shard.keys), **{key: receipt[key] for key in ("made_by", "fidelity") if key in receipt}}
            for shard, receipt in zip(plan.shards, receipts, strict=True)
        ]
        commit: dict[str, Any] = {"format": FORMAT, "generation": plan.generation, "files": files, "shards": made}
        cache = TargetCache(Contents(stage, plan.provenance, layout, parse_index(stage / INDEX, index, layout.arrays)[0], commit))
        statistics = committed_statistics(cache, plan.images if training is None else training)
        cache.close()
        if statistics is not None:
            commit["feature_statistics"] = statistics
        write_synced(stage / COMMIT, sealed(commit), 0o444)
        sync_folders((stage, *(path for path in stage.rglob("*") if path.is_dir())))
        replace_file(work / INDEX, index)
        _rename(work, stage, plan.output)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _read_receipts(plan: Plan) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The index of all rows, and the rest of each shard's receipt."""
    schema = index_schema(plan.layout.arrays).with_metadata({"generation": str(plan.generation)})
    tables, receipts = [schema.empty_table()], []
    for shard in plan.shards:  # Python's rows of one shard at a time: a row takes 3 KB in Python, 120 bytes in a table
        receipt = read_receipt(plan.work / "shards" / shard.name)
        if receipt is None:
            raise CacheError(f"shard {shard.name} has disappeared while the cache was put together; run the same command again")
        rows = [
            {
                "row": row,
                "image_id": entry["key"][0],
                "image_sha256": entry["key"][1],
                "problem": entry["problem"],
                **{f"{name}_crc32c": entry["crc32c"].get(name, 0) for name in plan.layout.arrays},
            }
            for row, entry in enumerate(receipt.pop("rows"), shard.number * plan.layout.rows_per_shard)
        ]
        tables.append(pa.Table.from_pylist(rows, schema=schema))
        receipts.append(receipt)
    return pa.concat_tables(tables).combine_chunks(), receipts


def _rename(work: Path, stage: Path, output: Path) -> None:
    """`output` holds nothing or a finished cache at any moment; of two builders of the same cache the first wins."""
    output.parent.mkdir(parents=True, exist_ok=True)
    commit = read_commit(stage)
    while not publish_folder(stage, output):
        aside = work / private_name("stage-replaced")
        with suppress(CacheError):  # a damaged cache is replaced
            if open_cache(output).commit == commit:
                return
        try:
            # A folder cannot be renamed onto a folder that is not empty: the former cache moves aside first.
            os.rename(output, aside)
        except FileNotFoundError:
            continue  # another builder has just moved it aside
        shutil.rmtree(aside)
