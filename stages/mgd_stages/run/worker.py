"""Stage one on one Dask worker: the project is opened and the teacher loaded once, then whole shards are built.

`cluster` sends the names of these functions and plain data. Nothing is imported at the top that a worker may lack.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mgd_pipeline
import mgd_stages
from mgd_pipeline.errors import ClusterError, ParamsError
from mgd_stages.run.project import Project, choose_device

if TYPE_CHECKING:
    from mgd_pipeline.caches.shards import Shard

_lock = threading.Lock()
_opened: dict[str, Callable[[Any], int]] = {}
"""The one job that this process works for: what builds a shard of it."""


def version() -> str:
    """The installed version and a hash of its sources, which tells two checkouts of one version apart."""
    digest = hashlib.sha256()
    for package in (mgd_pipeline, mgd_stages):
        top = Path(package.__path__[0])
        for path in sorted(top.rglob("*.py")):
            digest.update(path.relative_to(top).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{metadata.version('mgd-pipeline')} (source {digest.hexdigest()[:8]})"


def check(job: str) -> None:
    """Raises ClusterError if this worker does not fit the command."""
    told = json.loads(job)
    if (here := version()) != told["version"]:
        raise ClusterError(f"{_me()} runs mgd-pipeline {here}, this command {told['version']}: install one, restart the workers")
    if not os.path.isdir(told["sign"]):
        raise ClusterError(f"{_me()} does not see {told['work']}: workers need a disk in common, and the project at the same path")


def build(job: str, number: int, keys: Sequence[tuple[str, str]]) -> int:
    """Builds one shard; returns how many images it computed. One at a time, however many threads this worker has."""
    from mgd_pipeline.caches.shards import Shard
    from mgd_pipeline.data.manifest import ImageKey

    with _lock:
        if job not in _opened:
            check(job)
            release()  # before another teacher takes its place in the device's memory
            _opened[job] = _open(json.loads(job))
        return _opened[job](Shard(number, tuple(ImageKey(*key) for key in keys)))


def _open(told: dict[str, Any]) -> Callable[[Shard], int]:
    """Loads the teacher; returns the function that builds a shard."""
    import torch

    from mgd_pipeline.caches.format import Layout
    from mgd_pipeline.caches.provenance import in_names_of
    from mgd_pipeline.caches.shards import build_shard
    from mgd_pipeline.data.datasets import names_of
    from mgd_pipeline.data.manifest import read_manifest
    from mgd_pipeline.params_file import parse_params
    from mgd_stages.run.loaded_head import load_any
    from mgd_stages.run.teacher_batches import Batching, named_errors, teacher_compute
    from mgd_stages.run.teacher_cache import cached_images

    if told["threads"]:
        torch.set_num_threads(told["threads"])
    project, name = Project(Path(told["project"]), parse_params(told["params"])), told["teacher"]
    try:
        batching = Batching(choose_device(told["device"]), told["batch_size"], told["on_error"])
    except ParamsError as error:
        raise ClusterError(f"{_me()}: {error}") from None
    manifest = read_manifest(project.manifest, project.base, names_of(project.params.data))
    with named_errors(name, batching):
        loaded = load_any(project, name, manifest, batching.device)
    if in_names_of(told["provenance"], loaded.provenance) != told["provenance"]:
        raise ClusterError(f"{_me()}: {project.teacher(name)} is another teacher there, or was replaced; run the command again")
    images = {image.key: image for image in cached_images(project, name, manifest)}
    compute = teacher_compute(loaded, batching)
    work, layout, made_by = Path(told["work"]), Layout(**told["layout"]), batching.made_by()

    def build(shard: Shard) -> int:
        with named_errors(name, batching):
            return build_shard(work, layout, shard, images, compute, made_by)

    return build


def release() -> None:
    """Frees the teacher's memory; the worker may serve somebody else next."""
    if _opened:
        import torch

        _opened.clear()
        torch.cuda.empty_cache()


def _me() -> str:
    return f"worker {os.getpid()} on {socket.gethostname()}"
