"""Checks teacher caches for damage, file by file and record by record, and tells two caches apart.

A cache at a URL is checked in the same way: sizes by a request for each file, records of a sample by requests of their own, and all
records from a copy of one shard at a time.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mgd_pipeline.caches.commit import file_problem, read_commit, read_control
from mgd_pipeline.caches.copies import Arriving
from mgd_pipeline.caches.format import sha256_file, shard_name
from mgd_pipeline.caches.opening import Contents
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.caches.remote import ObjectMissing, Place, RangesRefused, RemotePath, place_of
from mgd_pipeline.durable import naming
from mgd_pipeline.errors import AccessError, CacheError

T = TypeVar("T")
R = TypeVar("R")

_REQUESTS = 32
"""Requests to a server at a time."""
_MEMORY = 2**28
"""Bytes that the records of these requests may take together."""
_ENOUGH = 10
"""Files that a server does not give. After so many nothing more is asked: each costs half a minute of repeated requests."""
_OTHER_BYTES = "differs from what was committed"


class Checked(NamedTuple):
    """What a verification looked at."""

    files: int
    hashed: int
    """Files that were read whole to compare their SHA-256."""
    records: int
    unread: tuple[str, ...] = ()
    """One line for each file that could not be read. Nothing is known of such a file."""


Report = Callable[[str], None]
Advance = Callable[[int, int], None]


def verify_cache(path: str | Place, share: float, report: Report, advance: Advance = lambda done, total: None) -> Checked:
    """Looks for damage and continues after the first; `report` gets one line for each file or record that is not as committed.

    Checks names and sizes of all files, the hashes of the small files, and the checksums of all records in `share` of the rows.
    A share of 1 also compares the SHA-256 of every file. `advance(done, total)` counts parts of the work. `path` may be a URL; then
    memory holds `_MEMORY` bytes of records at most, and a temporary folder one shard.

    Raises CacheIncomplete if there is no finished cache, CacheError if the commit or the index is damaged, AccessError if one of
    them may not be read, ProvenanceMismatch for another format or version.
    """
    place, said = place_of(path), set[str]()

    def once(line: str) -> None:  # a damaged index of a shard damages all of its records
        if line not in said:
            said.add(line)
            report(line)

    files = read_commit(place)["files"]
    if isinstance(place, RemotePath):
        place.know_sizes({name: entry["size"] for name, entry in files.items()})
    whole, unread = share >= 1, _Unread(isinstance(place, RemotePath))
    bad = list(_bad_files(place, files, whole, unread))
    for line in bad:
        once(line)
    small = sum("/c/" not in name for name in files)
    hashed = len(files) if whole and isinstance(place, Path) else small
    if unread.enough:
        return Checked(len(files), max(0, hashed - len(unread)), 0, tuple(unread))
    try:
        cache = open_cache(place)
    except AccessError as error:
        unread.add(error)
        return Checked(len(files), max(0, hashed - len(unread)), 0, tuple(unread))
    except CacheError as error:
        if not bad:
            raise
        once(f"no record was checked: {error}")
        return Checked(len(files), hashed - len(unread), 0, tuple(unread))
    if whole and isinstance(place, RemotePath):
        hashes, records = _check_copies(cache.contents, once, advance, unread)
        return Checked(len(files), small + hashes, records, tuple(unread))
    hashed -= len(unread) if whole else 0
    records = _check_records(cache, sampled_rows(cache, share), once, advance, unread)
    cache.close()
    return Checked(len(files), hashed, records, tuple(unread))


class _Unread(dict[str, None]):
    """Lines of what cannot be read, each once: all records of a closed shard have one line."""

    def __init__(self, of_server: bool) -> None:
        super().__init__()
        self._of_server = of_server

    def add(self, error: AccessError) -> None:
        self[str(error)] = None

    @property
    def enough(self) -> bool:
        return self._of_server and len(self) >= _ENOUGH


def _each(place: Place, work: Callable[[T], R], items: Iterable[T], threads: int = _REQUESTS) -> Iterator[tuple[T, R]]:
    """Each item and `work` of it, in order; several at a time where each is a request."""
    if not isinstance(place, RemotePath):
        yield from ((item, work(item)) for item in items)
        return
    left = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        while some := list(islice(left, threads)):
            yield from zip(some, pool.map(work, some), strict=True)


def _check_records(cache: TargetCache, rows: list[int], report: Report, advance: Advance, unread: _Unread) -> int:
    """Reads all records of these rows; returns how many could be read."""

    def problem(record: tuple[int, str]) -> CacheError | AccessError | None:
        try:
            cache.record(record[1], record[0])
        except (AccessError, CacheError) as error:
            return error
        return None

    names, records = list(cache.layout.records), 0
    threads = max(1, min(_REQUESTS, _MEMORY // cache.layout.record_bytes))
    for done, (_, error) in enumerate(_each(cache.path, problem, product(rows, names), threads), 1):
        if isinstance(error, RangesRefused):
            unread.add(AccessError(f"{cache.path}: the server gives whole files only, and a sample needs parts; call with --full"))
            break
        if isinstance(error, AccessError):
            unread.add(error)
            if unread.enough:
                break
            continue
        if error is not None:
            report(str(error))
        records += 1
        if done % len(names) == 0:
            advance(done // len(names), len(rows))
    return records


class _Copied(TargetCache):
    """A cache at a URL, read from copies of whole shards in a folder."""

    def __init__(self, contents: Contents, folder: Path) -> None:
        super().__init__(contents)
        self._folder = folder

    @property
    def _by_requests(self) -> bool:
        return False

    def _shard_place(self, name: str, number: int) -> Path:
        return self._folder / f"{name}-{number}"

    def bring(self, name: str, number: int) -> str | None:
        """Makes the copy of a shard; says what is wrong with it. Raises AccessError; CacheError if there is no such shard or it has
        another size."""
        file = shard_name(self.layout, name, number)
        place, copy = self.path / file, self._shard_place(name, number)
        assert isinstance(place, RemotePath)
        with naming(copy), open(copy, "wb", buffering=0) as into:
            arriving = Arriving(into.fileno(), threading.Event())
            place.copy_to(arriving.write, arriving.restart)
        sha256 = self.commit["files"][file]["sha256"]
        return None if arriving.digest.hexdigest() == sha256 else f"{place}: {_OTHER_BYTES}"

    def drop(self, name: str, number: int) -> None:
        """Removes the copy of a shard."""
        self.close()
        self._known.pop((name, number), None)
        self._shard_place(name, number).unlink()


def _check_copies(contents: Contents, report: Report, advance: Advance, unread: _Unread) -> tuple[int, int]:
    """Compares all shards of a cache at a URL, and all of their records; returns how many of both could be read."""
    hashes = records = 0
    with tempfile.TemporaryDirectory(prefix="mgd-verify-") as folder:
        cache = _Copied(contents, Path(folder))
        per_shard, rows = cache.layout.rows_per_shard, cache.index.rows
        shards = list(product(range(len(cache.index.stored(per_shard))), cache.layout.records))
        for done, (number, name) in enumerate(shards, 1):
            advance(done, len(shards))
            copy = cache._shard_place(name, number)
            try:
                problem = cache.bring(name, number)
            except AccessError as error:
                unread.add(error)
                if unread.enough:
                    break
                continue
            except CacheError as error:
                report(str(error))
                continue
            if problem is not None:
                report(problem)
            hashes += 1
            first, after = rows.searchsorted([number * per_shard, (number + 1) * per_shard])
            for position in range(first, after):
                if not cache.index.has_targets[position]:
                    continue
                try:
                    cache.record(name, int(rows[position]))
                except CacheError as error:  # the name of the copy means nothing to anybody
                    report(str(error).replace(str(copy), str(cache.path / shard_name(cache.layout, name, number))))
                records += 1
            cache.drop(name, number)
    return hashes, records


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


def _bad_files(path: Place, files: dict[str, dict], whole: bool, unread: _Unread) -> Iterator[str]:
    """A line for each file that is not as committed. Files that cannot be read go into `unread`. Shards at a URL are not read."""
    root = os.path.realpath(str(path))

    def problem(name: str) -> str | AccessError | None:
        size, sha256 = files[name]["size"], files[name]["sha256"]
        try:
            if (wrong := file_problem(path, root, name, size)) is not None:
                return wrong
            if isinstance(path, Path):
                return _OTHER_BYTES if (whole or "/c/" not in name) and sha256_file(path / name) != sha256 else None
            if whole and "/c/" in name:
                return None  # its copy is compared
            if (there := (path / name).size()) != size:
                return f"has {there} bytes, not {size}"
            return _OTHER_BYTES if "/c/" not in name and _hash_of(path / name) != sha256 else None
        except AccessError as error:
            return error
        except ObjectMissing:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror}"

    for name, wrong in _each(path, problem, files):
        if isinstance(wrong, AccessError):
            unread.add(wrong)
            if unread.enough:
                return
        elif wrong is not None:
            yield f"{path / name}: {wrong}"


def _hash_of(place: RemotePath) -> str:
    return hashlib.sha256(read_control(place)).hexdigest()
