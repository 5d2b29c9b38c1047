"""The commit of a teacher cache: which files the cache has, and whether each file is what was committed.

Control files are commit.json, images.parquet and all zarr.json. Nothing in them is decoded here except the JSON of the commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from mgd_pipeline.access import access_error, is_absent, is_there, stand_in
from mgd_pipeline.caches.encoding import Fidelity
from mgd_pipeline.caches.format import AXES, COMMIT, FORMAT, INDEX, OLDEST_FORMAT, canonical
from mgd_pipeline.caches.remote import Place, RemotePath
from mgd_pipeline.errors import CacheError, CacheIncomplete, ProvenanceMismatch

RECEIPT = "receipt.json"
"""The control file of a shard in the work folder."""
REBUILD = "restore the cache (`dvc checkout --force`), or remove it and run `mgd-pipeline precompute-teachers`"
"""The remedy for every damage."""
CONTROL_BYTES = {"zarr.json": 2**20, COMMIT: 2**26, INDEX: 2**31, RECEIPT: 2**26}
"""The largest size of each control file that is read."""
_TOP = {COMMIT, INDEX, "zarr.json", *AXES}
"""The names at the top of a cache."""
_COMMITTED = re.compile(rf"zarr\.json|{re.escape(INDEX)}|({'|'.join(AXES)})/(zarr\.json|c/[0-9]+(/0){{1,3}})")
"""The names of committed files. Files of other names are read by nobody, and would be read whole to compare their hashes."""
_OF_DVC = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")


def read_commit(path: Place) -> dict[str, Any]:
    """commit.json of a cache. Its own hash, its format and the types of its fields have been checked."""
    if not _exists(path / COMMIT):
        raise CacheIncomplete(f"{path}: {_without_commit(path)}")
    commit = read_sealed(path / COMMIT)
    if commit is None:
        what = stand_in(read_control(path / COMMIT)[:64] or b"?")
        raise CacheError(f"{path / COMMIT}: {what or f'damaged; {REBUILD}'}")
    version = commit.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise ProvenanceMismatch(
            f"{path}: is of format {version}, which a newer mgd-pipeline wrote; this one reads {OLDEST_FORMAT} to {FORMAT}: "
            "install the newer one"
        )
    if not isinstance(version, int) or version < OLDEST_FORMAT:
        raise ProvenanceMismatch(
            f"{path}: is of format {version}, this program reads {OLDEST_FORMAT} to {FORMAT}; remove it and run "
            "`mgd-pipeline precompute-teachers`"
        )
    types = {"files": dict, "generation": int, "shards": list}
    if (
        not all(isinstance(commit.get(key), kind) for key, kind in types.items())
        or not all(map(_is_entry, commit["files"].values()))
        or not all(map(_is_note, commit["shards"]))
    ):
        raise CacheError(f"{path / COMMIT}: is not the commit of a teacher cache; {REBUILD}")
    return commit


def _is_entry(entry: object) -> bool:
    """Whether this is what a commit has of a file."""
    return isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)


def _is_note(note: object) -> bool:
    """Whether this is what a commit has of a shard."""
    if not isinstance(note, dict) or not isinstance(note.get("rows"), int) or not isinstance(note.get("made_by"), dict):
        return False
    sums = note.get("fidelity", Fidelity()._asdict())
    if not isinstance(sums, dict) or sums.keys() != {*Fidelity._fields}:
        return False
    # A divergence of nearly nothing may be rounded below 0.
    return all(isinstance(value, int | float) and -(key == "kl") * 2**63 <= value < 2**63 for key, value in sums.items())


def read_committed(path: Place, commit: dict[str, Any]) -> dict[str, bytes]:
    """The content of every committed file that is not a shard.

    Raises CacheError for a file that is missing, lies outside the cache or has another size, and for content with another
    hash. Parse these bytes and do not read the files again: another cache may have taken the place of this one.
    """
    root, contents = os.path.realpath(str(path)), {}
    for name, entry in commit["files"].items():
        problem = file_problem(path, root, name, entry["size"])
        if problem is None and "/c/" not in name:
            contents[name] = read_control(path / name)
            problem = "differs from what was committed" if hashlib.sha256(contents[name]).hexdigest() != entry["sha256"] else None
        if problem is not None:
            raise CacheError(f"{path / name}: {problem}; {REBUILD}")
    return contents


def file_problem(path: Place, root: str, name: str, size: int) -> str | None:
    """What is wrong with a committed file; None if nothing. The file is not opened. `root` is the cache's real path."""
    if _COMMITTED.fullmatch(name) is None:
        return "is no name of a file in a cache"
    try:
        status = (path / name).stat()
    except OSError as error:
        if is_absent(error):
            return "is missing"
        raise access_error(path / name, error) from None
    if not stat.S_ISREG(status.st_mode):
        return "is not a file"
    # DVC may link each file to its own cache (cache.type symlink). Any other link out of the cache is a mistake or a trick.
    if isinstance(path, Path):
        real = os.path.realpath(path / name)
        if os.path.commonpath([real, root]) != root and not (_OF_DVC.search(real) and (path / name).is_symlink()):
            return f"is a link out of the cache, to {real}"
    return f"has {status.st_size} bytes, not {size}" if status.st_size != size else None


def read_sealed(path: Place) -> dict[str, Any] | None:
    """The content of a control file without its own hash; None if the file is damaged."""
    try:
        content = json.loads(read_control(path))
        body = {key: value for key, value in content.items() if key != "self"}
        return body if content.get("self") == hashlib.sha256(canonical(body)).hexdigest() else None
    except (ValueError, RecursionError, AttributeError):
        return None


def read_control(path: Place) -> bytes:
    """A whole control file. Raises CacheError if it is missing, not a file, or larger than such a file may be."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > CONTROL_BYTES.get(path.name, 0):
            raise CacheError(f"{path}: is not a control file of a teacher cache ({status.st_size} bytes); {REBUILD}")
        return path.read_bytes()
    except OSError as error:
        if is_absent(error):
            raise CacheError(f"{path}: cannot be read: {error.strerror}; {REBUILD}") from None
        raise access_error(path, error) from None


def is_foreign(path: Path) -> bool:
    """Whether a path holds something else than a cache or a part of one: a file, or a folder with other content."""
    names = _names_in(path)
    return bool(names - _TOP) or ("zarr.json" in names and b'"mgd"' not in read_control(path / "zarr.json"))


def _without_commit(path: Place) -> str:
    """What a path without commit.json is, and what to do."""
    if isinstance(path, RemotePath):
        return "does not exist, or is not finished: it has no commit.json, which is copied last; see whether the URL is right"
    if not _exists(path):
        return "does not exist; run `mgd-pipeline precompute-teachers`"
    if is_foreign(path) or not _names_in(path):
        return "is not a teacher cache; name a teacher cache, or a folder of them such as data/targets"
    return "is not finished; run `mgd-pipeline precompute-teachers`"


def _exists(path: Place) -> bool:
    return is_there(path) if isinstance(path, Path) else path.exists()


def _names_in(path: Path) -> set[str]:
    """Names in a folder without hidden files; "." for a path that is not a folder."""
    try:
        names = os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return {"."}
    except OSError as error:
        raise access_error(path, error) from None
    return {name for name in names if not name.startswith(".")}
