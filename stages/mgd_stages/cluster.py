"""Stage one on several processes: one Dask task builds one whole shard. Imported only where --workers or --scheduler asks for it.

Workers open the project themselves, load the teacher once, and write shards into its work folder; the scheduler sees keys of
images and numbers, never targets. A shard whose worker died is given to another. The command line's process waits, and
publishes the store. What stands below the ruled line runs on workers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mgd_pipeline
import mgd_stages
from mgd_pipeline.durable import private_name
from mgd_pipeline.errors import ClusterError, ParamsError
from mgd_pipeline.words import counted
from mgd_stages.run.machine import cores
from mgd_stages.run.progress import console
from mgd_stages.run.project import Project, choose_device

try:
    from dask import config
    from distributed import CancelledError, Client, Future, KilledWorker, Nanny, Scheduler, Security, SpecCluster, wait
    from distributed.utils import silence_logging_cmgr
    from distributed.versions import VersionMismatchWarning
except ModuleNotFoundError as error:
    raise ClusterError(f"--workers and --scheduler need Dask ({error}): pip install 'mgd-pipeline[cluster]'") from None

if TYPE_CHECKING:
    from mgd_pipeline.caches.build import Plan
    from mgd_pipeline.caches.shards import Shard

Workers = Any
"""A `distributed.Client`, whose type says of every call that it may be a coroutine, which is so in asynchronous programs alone."""

_CERTIFICATES = ("ca-file", "client.cert", "client.key")
_PACKAGES = ("numpy", "zarr", "torch")
"""What computes and stores targets, beside this program, whose sources are compared on the worker itself."""
_CONNECT_SECONDS = 5.0
_WORKER_SECONDS = 60.0
"""So long may a cluster be without any worker: one that died takes a few seconds to come back."""


@contextmanager
def local_workers(workers: str, threads: int) -> Iterator[Workers]:
    """Workers on this machine, reachable from this machine alone: so many processes, or `gpus`, one for each visible GPU.

    `threads` are those of each process; 0 shares the cores among them.
    """
    pinned = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in _gpus()] if workers == "gpus" else [{}] * int(workers)
    # Dask gives workers one thread for arithmetic unless told otherwise.
    each = str(threads or max(1, cores() // len(pinned)))
    spec = {
        number: {
            "cls": Nanny,
            "options": {
                "host": "127.0.0.1",
                "nthreads": 1,
                "memory_limit": 0,
                "silence_logs": logging.CRITICAL,
                # Ctrl-C reaches all processes of a terminal; this one ends the others.
                "preload": ["import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"],
                "env": {"OMP_NUM_THREADS": each, "MKL_NUM_THREADS": each, **device},
            },
        }
        for number, device in enumerate(pinned)
    }
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"}}
    with (
        SpecCluster(workers=spec, scheduler=scheduler, silence_logs=logging.CRITICAL) as cluster,  # pyright: ignore[reportArgumentType]
        Client(cluster) as client,
    ):
        processes = f"{counted(len(pinned), 'worker process', 'worker processes')} of {counted(int(each), 'thread')}"
        console.print(f"{processes}{', a GPU each' if workers == 'gpus' else ''}")
        yield client


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise ParamsError("--workers gpus: torch sees no CUDA device here; write a number of processes, such as --workers 2")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in visible.split(",")][:count] if visible else [str(number) for number in range(count)]


@contextmanager
def workers_of(scheduler: str) -> Iterator[Workers]:
    """The workers of a Dask cluster that somebody has started, by its scheduler's address."""
    security = _security(scheduler)
    # A page of tracebacks where one line will do; and a table of versions, of which `_require_versions` says what matters.
    with silence_logging_cmgr(logging.CRITICAL), warnings.catch_warnings():
        warnings.simplefilter("ignore", VersionMismatchWarning)
        try:
            client = Client(scheduler, timeout=_CONNECT_SECONDS, security=security)
        except (OSError, ValueError, ImportError, RuntimeError, TypeError) as error:  # TypeError: Dask's stub of ucx, without ucxx
            reason = " ".join(f"{error}: {error.__cause__}".split()) if isinstance(error.__cause__, OSError) else error
            raise ClusterError(
                f"--scheduler {scheduler}: no Dask scheduler answers there ({reason}); see the page Cluster"
            ) from None
        with client:
            yield client


def _security(scheduler: str) -> Security:
    """Certificates, where Dask's own configuration names some. Raises ClusterError where an address needs them and has none."""
    security, configured = Security(), {key: config.get(f"distributed.comm.tls.{key}", None) for key in _CERTIFICATES}
    named = ", ".join(f"{key} {path}" for key, path in configured.items() if path)
    try:
        context = security.get_connection_args("client").get("ssl_context")
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise ClusterError(
            f"--scheduler {scheduler}: the certificates of Dask's configuration ({named}) cannot be used ({error}); "
            "see the page Cluster"
        ) from None
    if context is None and scheduler.startswith(("tls://", "wss://")):
        raise ClusterError(
            f"--scheduler {scheduler}: needs certificates, and Dask's configuration names {f'only {named}' if named else 'none'}; "
            "set DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ..._TLS__CLIENT__CERT and ..._TLS__CLIENT__KEY, see the page Cluster"
        )
    return security


def build_on_workers(
    client: Workers,
    project: Project,
    name: str,
    plan: Plan,
    todo: Sequence[Shard],
    advance: Callable[[int, str], None],
    *,
    device: str,
    batch_size: int,
    on_error: str,
    threads: int,
) -> int:
    """Has the workers build these shards of a plan; returns how many images they computed.

    The first error ends it: what waits is cancelled, what is finished stays. Raises what went wrong on a worker, and
    ClusterError where workers do not fit, die over one shard again and again, or are gone.
    """
    if not todo:
        return 0
    from mgd_pipeline.caches.format import fingerprint

    # Only whoever sees the same disk sees this folder; `cache gc` removes it, should this process be killed.
    sign = plan.work / private_name("stage-cluster")
    job = {
        "project": str(project.base),
        "params": project.params.model_dump(mode="json"),
        "teacher": name,
        "device": device,
        "batch_size": batch_size,
        "on_error": on_error,
        "threads": threads,
        "work": str(plan.work),
        "sign": str(sign),
        "layout": asdict(plan.layout),
        "fingerprint": fingerprint(plan.provenance),
        "version": version(),
    }
    os.mkdir(sign)
    try:
        return _build(client, json.dumps(job, allow_nan=False), todo, advance)
    finally:
        os.rmdir(sign)


def _build(client: Workers, job: str, todo: Sequence[Shard], advance: Callable[[int, str], None]) -> int:
    on_worker = _sender()
    known = _workers(client)
    _require_versions(client)
    for address, problem in client.run(on_worker, "check", job, on_error="return").items():
        if problem is not None and not isinstance(problem, OSError):  # one that has just died
            raise _explained(problem, f"worker {address}")

    # As many shards are under way as there are workers: so it is known over which one a worker died, and none waits behind another.
    waiting = list(reversed(todo))
    running: dict[Future, Shard] = {}
    computed = done = 0
    began = time.monotonic()
    try:
        while waiting or running:
            there = _workers(client)
            if there - known:
                _require_versions(client)
            known = there
            for _ in range(min(len(waiting), len(there) - len(running))):
                shard = waiting.pop()
                # A new name for each run: a task of the same name would not be done again. The scheduler unpacks it: plain data.
                name, keys = private_name(f"shard-{shard.number:05d}"), [tuple(key) for key in shard.keys]
                running[client.submit(on_worker, "build", job, shard.number, keys, key=name, pure=False)] = shard
            for future in _finished(client, running):
                shard = running.pop(future)
                computed += _result(client, future, shard)
                done += len(shard.keys)
                advance(done, f"{computed / (time.monotonic() - began):.1f} images/s")
    finally:
        if client.status == "running":
            with suppress(OSError):  # of a scheduler that has just gone; the error that is on its way says so
                client.cancel(list(running), force=True)
                client.run(on_worker, "release", on_error="ignore")
    return computed


def _workers(client: Workers) -> set[str]:
    """The addresses of all workers, once there is one."""
    until = time.monotonic() + _WORKER_SECONDS
    try:
        while not (there := set(client.nthreads())):
            if time.monotonic() > until:
                raise ClusterError(f"{_address(client)}: no worker for {_WORKER_SECONDS:.0f} s; start some, see the page Cluster")
            time.sleep(0.2)
    except OSError:
        raise _gone(client) from None
    return there


def _require_versions(client: Workers) -> None:
    """Raises ClusterError for a worker of another Python: whatever function is sent to it, it dies over that, and looks as if its
    memory had run out. Workers answer this question without unpacking anything that only one Python can unpack."""
    try:
        found = client.get_versions(packages=list(_PACKAGES))
    except OSError:
        raise _gone(client) from None
    here = found["client"]["packages"]
    for address, answer in found["workers"].items():
        there = answer["packages"]
        if _release(there["python"]) != _release(here["python"]):
            raise ClusterError(
                f"worker {address}: runs Python {_plain(there['python'])}, this command {_plain(here['python'])}, and Dask cannot "
                "send code from one to the other; start workers and command from environments of one Python (see the page Cluster)"
            )
        if lacking := [name for name in _PACKAGES if there.get(name) is None]:
            raise ClusterError(
                f"worker {address}: lacks {' and '.join(lacking)}, so mgd-pipeline does not work there; install there what this "
                f"command runs, mgd-pipeline {version()}"
            )
        other = [f"{name} {there[name]} (here {here[name]})" for name in _PACKAGES if _plain(there[name]) != _plain(here[name])]
        if other:
            console.print(f"warning: worker {address} has {', '.join(other)}; the last bits of targets may differ")


def _release(python: str) -> list[str]:
    """'3.12.1.final.0' -> ['3', '12']"""
    return python.split(".")[:2]


def _plain(version: str) -> str:
    """Without what names a build: '2.11.0+cu128' -> '2.11.0', '3.12.1.final.0' -> '3.12.1'"""
    return ".".join(version.partition("+")[0].split(".")[:3])


def _gone(client: Workers) -> ClusterError:
    where = _address(client)
    return ClusterError(f"{where}: the Dask scheduler does not answer any more; finished shards stay, the same command goes on")


def _address(client: Workers) -> str:
    return client.scheduler.address if client.scheduler else "Dask"


def _finished(client: Workers, running: dict[Future, Shard]) -> set[Future]:
    """Those that are finished; none where none is within a second, for workers may have come or gone meanwhile."""
    try:
        return wait(list(running), timeout=1, return_when="FIRST_COMPLETED").done  # pyright: ignore[reportAttributeAccessIssue]
    except TimeoutError:
        return set()
    except CancelledError:
        raise _gone(client) from None


def _result(client: Workers, future: Future, shard: Shard) -> int:
    """How many images were computed for a shard."""
    try:
        return future.result()
    except CancelledError:
        raise _gone(client) from None
    except KilledWorker as error:
        _require_versions(client)
        raise ClusterError(
            f"shard {shard.number}, images {shard.keys[0].image_id} to {shard.keys[-1].image_id}: {error.allowed_failures + 1} "
            f"workers died over it, so it is not tried again; most likely they ran out of memory: lower --batch-size, or "
            f"see why with --shards {shard.number}:{shard.number + 1}, which computes it without workers"
        ) from None
    except (ImportError, AttributeError) as error:
        raise _explained(error, "a worker") from error


def _explained(problem: BaseException, address: str) -> BaseException:
    """An error of a worker; where it lacks this module, what that means."""
    if isinstance(problem, (ImportError, AttributeError)):
        return ClusterError(f"{address}: has no mgd-pipeline {version()} ({problem}); install there what this command runs")
    return problem


def _sender() -> Callable[..., Any]:
    """Calls a function of this module on a worker. As a function within a function it is sent as code, so that the scheduler
    need not have mgd-pipeline, and a worker that does not have it can be named."""

    def on_worker(function: str, *arguments: Any) -> Any:
        from importlib import import_module

        return getattr(import_module("mgd_stages.cluster"), function)(*arguments)

    return on_worker


# --- on a worker ------------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_opened: dict[str, Callable[[Any], int]] = {}
"""The one job that this process works for: what builds a shard of it."""


def version() -> str:
    """What is installed here: the version, and a hash of the sources, which tells two checkouts of one version apart."""
    digest = hashlib.sha256()
    for package in (mgd_pipeline, mgd_stages):
        top = Path(package.__path__[0])
        for path in sorted(top.rglob("*.py")):
            digest.update(path.relative_to(top).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{metadata.version('mgd-pipeline')} (source {digest.hexdigest()[:8]})"


def check(job: str) -> None:
    """Raises ClusterError where this worker does not fit the command that asks."""
    told = json.loads(job)
    if (here := version()) != told["version"]:
        raise ClusterError(f"{_me()} runs mgd-pipeline {here}, this command {told['version']}: install one, restart the workers")
    if not os.path.isdir(told["sign"]):
        raise ClusterError(f"{_me()} does not see {told['work']}: workers need a disk in common, and the project at the same path")


def build(job: str, number: int, keys: Sequence[tuple[str, str]]) -> int:
    """Builds one shard; returns how many images it computed. One at a time, however many threads this worker has."""
    from mgd_pipeline.caches.format import ImageKey
    from mgd_pipeline.caches.shards import Shard

    with _lock:
        if job not in _opened:
            check(job)
            release()  # before another teacher takes its place in the device's memory
            _opened[job] = _open(json.loads(job))
        return _opened[job](Shard(number, tuple(ImageKey(*key) for key in keys)))


def _open(told: dict[str, Any]) -> Callable[[Shard], int]:
    """Loads the teacher; what it returns builds shards."""
    import torch

    from mgd_pipeline.caches.format import Layout, fingerprint
    from mgd_pipeline.caches.shards import build_shard
    from mgd_pipeline.data.manifest import read_manifest
    from mgd_pipeline.params_file import parse_params
    from mgd_stages.precompute_teachers import load_teacher, machine, named_errors, store_images, teacher_compute

    if told["threads"]:
        torch.set_num_threads(told["threads"])
    project, name, batch_size = Project(Path(told["project"]), parse_params(told["params"])), told["teacher"], told["batch_size"]
    try:
        device = choose_device(told["device"])
    except ParamsError as error:
        raise ClusterError(f"{_me()}: {error}") from None
    manifest = read_manifest(project.manifest, project.base)
    with named_errors(name, device, batch_size):
        teacher, provenance = load_teacher(project, name, manifest, device)
    if fingerprint(provenance) != told["fingerprint"]:
        raise ClusterError(f"{_me()}: {project.teacher(name)} is another teacher there, or was replaced; run the command again")
    images = {image.key: image for image in store_images(manifest, project.params.targets)}
    compute = teacher_compute(project, name, manifest, teacher, device, batch_size, told["on_error"])
    work, layout, made_by = Path(told["work"]), Layout(**told["layout"]), machine(device, batch_size)

    def build(shard: Shard) -> int:
        with named_errors(name, device, batch_size):
            return build_shard(work, layout, shard, images, compute, made_by)

    return build


def release() -> None:
    """Gives the teacher's memory back; the worker may be somebody else's next."""
    if _opened:
        import torch

        _opened.clear()
        torch.cuda.empty_cache()


def _me() -> str:
    return f"worker {os.getpid()} on {socket.gethostname()}"
