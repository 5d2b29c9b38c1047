"""What is checked when a teacher cache is opened: nothing is decoded and no shard is opened before all of it has passed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from mgd_pipeline.caches.commit import REBUILD, read_commit, read_committed
from mgd_pipeline.caches.encoding import TARGETS_VERSION
from mgd_pipeline.caches.format import COMMIT, INDEX, RECORD_BYTES, Layout, array_metadata, group_metadata, shard_name
from mgd_pipeline.caches.index import Index, parse_index
from mgd_pipeline.caches.provenance import applying, in_names_of
from mgd_pipeline.caches.remote import Place, RemotePath, place_of
from mgd_pipeline.data.classes import compare_names
from mgd_pipeline.errors import CacheError, ProvenanceMismatch


@dataclass(frozen=True)
class Contents:
    """A finished cache; everything except its shards has been checked."""

    path: Place
    provenance: dict[str, Any]
    layout: Layout
    index: Index
    commit: dict[str, Any]


def check_contents(path: str | Place, expected: dict[str, Any]) -> Contents:
    """Checks everything that `open_cache` promises, in the order of docs/design/target-cache.md."""
    place = place_of(path)
    commit = read_commit(place)
    if isinstance(place, RemotePath):  # nothing lists it: an object of another size is an error when it is first read
        place.know_sizes({name: entry["size"] for name, entry in commit["files"].items()})
    small = read_committed(place, commit)
    provenance, layout = _parse_group(place / "zarr.json", small.get("zarr.json", b""), commit["format"])
    difference = provenance_difference(provenance, in_names_of(provenance, applying(provenance, expected)))
    if (version := provenance.get("targets_version")) != TARGETS_VERSION:
        difference.insert(0, f"targets_version: the cache has {version}, this code {TARGETS_VERSION}")
    if difference:
        raise ProvenanceMismatch(
            f"{place}: was made from something else: {'; '.join(difference)}. Run `mgd-pipeline precompute-teachers` again, "
            "or go back to the parameters that made it"
        )
    index, _ = parse_index(place / INDEX, small.get(INDEX, b""), layout.arrays)
    pa.default_memory_pool().release_unused()  # decoding took nearly as much again
    rows = int(index.rows[-1]) + 1 if len(index) else 0
    if rows > len(commit["files"]) * layout.rows_per_shard:
        raise CacheError(f"{place / INDEX}: has a row {rows - 1}, more than there are shards for; {REBUILD}")
    for name in layout.records:
        if small.get(f"{name}/zarr.json") != array_metadata(layout, name, rows, commit["format"]):
            raise CacheError(f"{place / name / 'zarr.json'}: is not the metadata of this cache's {name}; {REBUILD}")
    if len(commit["shards"]) != len(index.stored(layout.rows_per_shard)):
        raise CacheError(f"{place / COMMIT}: has notes of {len(commit['shards'])} shards, and the index other ones; {REBUILD}")
    for shard, records in enumerate(index.stored(layout.rows_per_shard)):
        for name in layout.records:
            file = shard_name(layout, name, shard)
            if commit["files"].get(file, {}).get("size") not in layout.shard_sizes(name, int(records)):
                raise CacheError(f"{place / file}: is not committed with the size of its {records} records; {REBUILD}")
    return Contents(place, provenance, layout, index, commit)


def provenance_difference(provenance: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> list[str]:
    """One text for each field of `expected` that differs in `provenance`, with both values."""
    lines: list[str] = []
    for key, value in expected.items():
        have = provenance.get(key)
        if (key, prefix) == ("classes", "") and have and value and len(have) == len(value) and have != value:
            lines.append(f"classes: {compare_names('the cache', have, list(value)).fault}")
        elif isinstance(value, dict) and isinstance(have, dict):
            lines += provenance_difference(have, value, f"{prefix}{key}.")
        elif have != value:
            lines.append(f"{prefix}{key}: the cache has {have!r}, the parameters say {value!r}")
    return lines


def _is_provenance(provenance: object) -> bool:
    """Whether a provenance has the parts that tools read without a further look."""
    if not isinstance(provenance, dict) or not isinstance(provenance.get("teacher"), dict):
        return False
    classes, preprocessing = provenance.get("classes", []), provenance.get("preprocessing", {})
    return isinstance(classes, list) and all(isinstance(name, str) for name in classes) and isinstance(preprocessing, dict)


def _parse_group(path: Place, data: bytes, version: int) -> tuple[dict[str, Any], Layout]:
    """Provenance and layout from a cache's zarr.json, which must be byte for byte what mgd-pipeline writes for them."""
    wrong = CacheError(f"{path}: is not the metadata of a teacher cache of format {version}; {REBUILD}")
    try:
        mgd = json.loads(data)["attributes"]["mgd"]
        provenance, layout = mgd["provenance"], Layout(**mgd["layout"])
        if data != group_metadata(provenance, layout, version):
            raise wrong
    except (ValueError, RecursionError, KeyError, TypeError):
        raise wrong from None
    words = ("encoding", "region_encoding", "compression")
    numbers = [value for key, value in asdict(layout).items() if key not in words]
    if 0 in (layout.classes, layout.features) and layout.classes != layout.features:
        numbers.remove(0)  # a teacher without one of them; not without both
    if not _is_provenance(provenance) or layout.compression not in ("none", "zstd"):
        raise wrong
    if not all(word in ("uint8", "float16") for word in (layout.encoding, layout.region_encoding)):
        raise wrong
    if not all(type(number) is int and 0 < number < 2**31 for number in numbers) or layout.rows_per_shard > 2**16:
        raise wrong
    if max(layout.height, layout.width) > 2**20 or max(layout.bytes_of(name) for name in layout.records) > RECORD_BYTES:
        raise CacheError(f"{path}: a record would take more than 1 GiB; this is not an mgd-pipeline cache")
    return provenance, layout
