"""Stage one on several processes: one Dask task builds one whole shard. Imported only where --workers or --scheduler asks for it.

Workers (`run.worker`) open the project themselves, load the teacher once, and write shards into its work folder. The scheduler
sees keys of images and numbers, never targets. If a worker dies, another one gets its shard. The command line's process waits, and
publishes the teacher cache.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mgd_pipeline.durable import private_name
from mgd_pipeline.errors import ClusterError, ParamsError
from mgd_pipeline.words import counted
from mgd_stages.run.machine import cores
from mgd_stages.run.progress import console
from mgd_stages.run.project import Project
from mgd_stages.run.worker import version

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
    from mgd_stages.run.teacher_batches import OnError

Workers = Any
"""A `distributed.Client`. Its own type says that every call may be a coroutine, which is true in asynchronous programs only."""

_CERTIFICATES = ("ca-file", "client.cert", "client.key")
_PACKAGES = ("numpy", "zarr", "torch")
"""Libraries that compute and store targets. This program's own sources are compared on the worker itself."""
_CONNECT_SECONDS = 5.0
_WORKER_SECONDS = 60.0
"""How long a cluster may be without any worker: a worker that died takes a few seconds to come back."""


@contextmanager
def local_workers(workers: str, threads: int) -> Iterator[Workers]:
    """Workers on this machine, reachable from this machine only: a number of processes, or `gpus`, one for each visible GPU.

    `threads` is the number of threads of each process; 0 shares the cores among the processes.
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
    """The workers of a running Dask cluster, by the address of its scheduler."""
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
    """Certificates of Dask's own configuration. Raises ClusterError if the address needs certificates and there are none."""
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


@dataclass(frozen=True)
class Asked:
    """How each worker runs the teacher."""

    device: str
    """auto, cpu or cuda: each worker chooses its own"""
    batch_size: int
    on_error: OnError
    threads: int
    """0 leaves torch's own choice"""


def build_on_workers(
    client: Workers,
    asked: Asked,
    project: Project,
    name: str,
    plan: Plan,
    todo: Sequence[Shard],
    advance: Callable[[int, str], None],
) -> int:
    """Has the workers build these shards of a plan; returns how many images they computed.

    The first error ends the run: waiting shards are cancelled, finished shards stay. Raises the error of the worker; ClusterError
    if workers do not fit, die over one shard again and again, or are gone.
    """
    if not todo:
        return 0
    # Only whoever sees the same disk sees this folder; `cache gc` removes it, should this process be killed.
    sign = plan.work / private_name("stage-cluster")
    job = {
        "project": str(project.base),
        "params": project.params.model_dump(mode="json"),
        "teacher": name,
        **asdict(asked),
        "work": str(plan.work),
        "sign": str(sign),
        "layout": asdict(plan.layout),
        "provenance": plan.provenance,
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
                where = client.scheduler.address
                raise ClusterError(f"{where}: no worker for {_WORKER_SECONDS:.0f} s; start some, see the page Cluster")
            time.sleep(0.2)
    except OSError:
        raise _gone(client) from None
    return there


def check_present(client: Workers) -> None:
    """Raises ClusterError for a present worker that cannot compute. Workers that come later are asked when they come."""
    try:
        present = client.nthreads()
    except OSError:
        raise _gone(client) from None
    if present:
        _require_versions(client, warn=False)


def _require_versions(client: Workers, warn: bool = True) -> None:
    """Raises ClusterError for a worker with another Python: such a worker dies when a function is sent to it, as if it lacked
    memory. Workers answer this question without unpacking a function."""
    try:
        versions = client.get_versions(packages=list(_PACKAGES))
    except OSError:
        raise _gone(client) from None
    here = versions["client"]["packages"]
    for address, answer in versions["workers"].items():
        there = answer["packages"]
        if there["python"].split(".")[:2] != here["python"].split(".")[:2]:
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
        if other and warn:
            console.print(f"warning: worker {address} has {', '.join(other)}; the last bits of targets may differ")


def _plain(version: str) -> str:
    """Without what names a build: '2.11.0+cu128' -> '2.11.0', '3.12.1.final.0' -> '3.12.1'"""
    return ".".join(version.partition("+")[0].split(".")[:3])


def _gone(client: Workers) -> ClusterError:
    where = client.scheduler.address if client.scheduler else "Dask"
    return ClusterError(f"{where}: the Dask scheduler does not answer any more; finished shards stay, the same command goes on")


def _finished(client: Workers, running: dict[Future, Shard]) -> set[Future]:
    """The finished shards, after a second at most: meanwhile workers may have come or gone."""
    try:
        return wait(list(running), timeout=1, return_when="FIRST_COMPLETED").done  # pyright: ignore[reportAttributeAccessIssue]
    except TimeoutError:
        return set()
    except CancelledError:
        raise _gone(client) from None


def _result(client: Workers, future: Future, shard: Shard) -> int:
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
    """An error of a worker, with its meaning if the worker lacks this program."""
    if isinstance(problem, (ImportError, AttributeError)):
        return ClusterError(f"{address}: has no mgd-pipeline {version()} ({problem}); install there what this command runs")
    return problem


def _sender() -> Callable[..., Any]:
    """Calls a function of `run.worker` on a worker. A function within a function is sent as code, so that the scheduler need not
    have mgd-pipeline, and a worker without mgd-pipeline can be named."""

    def on_worker(function: str, *arguments: Any) -> Any:
        from importlib import import_module

        return getattr(import_module("mgd_stages.run.worker"), function)(*arguments)

    return on_worker
