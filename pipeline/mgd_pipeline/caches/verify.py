"""Checks teacher caches for damage, file by file and record by record, and tells two caches apart."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mgd_pipeline.caches.commit import file_problem, read_commit
from mgd_pipeline.caches.format import sha256_file
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.errors import AccessError, CacheError


class Checked(NamedTuple):
    """What a verification looked at."""

    files: int
    hashed: int
    """Files that were read whole to compare their SHA-256."""
    records: int
    unread: tuple[str, ...] = ()
    """One line for each file that could not be read. Nothing is known of such a file."""


def verify_cache(
    path: Path, share: float, report: Callable[[str], None], advance: Callable[[int, int], None] = lambda done, total: None
) -> Checked:
    """Looks for damage and continues after the first; `report` gets one line for each file or record that is not as committed.

    Checks names and sizes of all files, the hashes of the small files, and the checksums of all records in `share` of the rows.
    A share of 1 also compares the SHA-256 of every file. `advance(done, total)` counts rows. Raises CacheIncomplete if there is
    no finished cache, CacheError if the commit or the index is damaged, AccessError if one of them may not be read,
    ProvenanceMismatch for another format or version.
    """
    files = read_commit(path)["files"]
    unread: dict[str, None] = {}  # an ordered set: all records of a closed shard have one line
    bad = list(_bad_files(path, files, share >= 1, unread))
    for line in bad:
        report(line)
    hashed = len(files) if share >= 1 else sum("/c/" not in name for name in files)
    try:
        cache = open_cache(path)
    except AccessError as error:
        return Checked(len(files), hashed - len(unread), 0, tuple({**unread, str(error): None}))
    except CacheError as error:
        if not bad:
            raise
        report(f"no record was checked: {error}")
        return Checked(len(files), hashed - len(unread), 0, tuple(unread))
    records = 0
    rows = sampled_rows(cache, share)
    for done, row in enumerate(rows, 1):
        for name in cache.layout.records:
            try:
                cache.record(name, row)
            except AccessError as error:
                unread[str(error)] = None
                continue
            except CacheError as error:
                report(str(error))
            records += 1
        advance(done, len(rows))
    cache.close()
    return Checked(len(files), hashed - (len(unread) if share >= 1 else 0), records, tuple(unread))


def sampled_rows(cache: TargetCache, share: float) -> list[int]:
    """About `share` of the rows that have targets, at least one, drawn at random; for one cache the same rows each time."""
    rows = cache.index.rows[cache.index.has_targets].tolist()
    if share <= 0 or not rows:
        return []
    count = min(len(rows), max(1, round(share * len(rows))))
    rng = np.random.default_rng(int(cache.fingerprint, 16))
    return sorted(rows[i] for i in rng.choice(len(rows), count, replace=False))


def cache_difference(a: TargetCache, b: TargetCache) -> list[str]:
    """One line for each field and image in which two caches differ; none if they hold the same targets of the same images."""
    fields = [_flat({**cache.provenance, "layout": asdict(cache.layout)}) for cache in (a, b)]
    lines = [
        f"{field}: A has {fields[0].get(field)!r}, B {fields[1].get(field)!r}"
        for field in dict.fromkeys([*fields[0], *fields[1]])
        if fields[0].get(field) != fields[1].get(field)
    ]
    keys = [cache.index.place for cache in (a, b)]
    ids = [{key.image_id: key for key in place} for place in keys]
    for mine, theirs, name in ((0, 1, "A"), (1, 0, "B")):
        only = [image_id for image_id in ids[mine] if image_id not in ids[theirs]]
        if only:
            lines.append(f"images: {len(only)} only in {name}, such as {only[0]!r}")
    common = [image_id for image_id in ids[0] if image_id in ids[1]]
    changed = [image_id for image_id in common if ids[0][image_id] != ids[1][image_id]]
    if changed:
        lines.append(f"images: {len(changed)} with other contents, such as {changed[0]!r}")
    for name in (name for name in a.layout.arrays if name in b.layout.arrays):
        sums = [cache.index.checksums[name] for cache in (a, b)]
        same = [key for key in keys[0] if key in keys[1]]
        other = [key.image_id for key in same if sums[0][keys[0][key]] != sums[1][keys[1][key]]]
        if other:
            lines.append(f"{name}: {len(other)} of {len(same)} rows of the same images differ, such as that of {other[0]!r}")
    return lines


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of dictionaries as one, with dots between the keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _bad_files(path: Path, files: dict[str, dict], whole: bool, unread: dict[str, None]) -> Iterator[str]:
    """A line for each file that is not as committed. Files that cannot be read go into `unread`."""
    root = os.path.realpath(path)
    for name, entry in files.items():
        try:
            problem = file_problem(path, root, name, entry["size"])
            if problem is None and (whole or "/c/" not in name):
                problem = "differs from what was committed" if sha256_file(path / name) != entry["sha256"] else None
        except AccessError as error:
            unread[str(error)] = None
            continue
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        if problem is not None:
            yield f"{path / name}: {problem}"
