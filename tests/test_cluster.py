"""Stage one on several processes, with real Dask workers that are killed, do not fit, or lack memory: the cache is the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from dask import config
from distributed.cli.dask_scheduler import main as dask_scheduler
from distributed.cli.dask_worker import main as dask_worker
from typer.testing import CliRunner

from caches import file_bytes
from conftest import TINY, as_folder
from mgd_pipeline.caches.format import plan_layout
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.data.shapes import CLASSES
from mgd_pipeline.errors import CacheError, ClusterError, MemoryShortage, ParamsError
from mgd_stages import cluster
from mgd_stages.cli import app
from mgd_stages.run import teacher_cache
from mgd_stages.run import worker as worker_module
from mgd_stages.run.project import Project, open_project, parse_shards
from mgd_stages.run.teacher_batches import Batching, named_errors
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.prepare_data import prepare_data

SHARD_BYTES = 4 * 9 * 16 * 24
"""Four images a shard, so that the 24 of the tiny project make six."""
SETS = [part for override in TINY for part in ("--set", override)]
REPOSITORY = Path(__file__).parents[1]

# Loaded by the workers (dask worker --preload, which loads it twice): does to them what files in a folder ask for.
PLANT = """
import os, signal, time
from pathlib import Path

from mgd_stages.run import worker

folder = Path(os.environ["PLANTS"])
worker.real_build = build = getattr(worker, "real_build", worker.build)


def planted(job, number, keys):
    if (folder / "die").exists() and number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    from mgd_stages.run import loaded_head, teacher_batches as stage

    if not hasattr(stage, "calls"):
        stage.calls, real, load = 0, stage.dense_targets, loaded_head.load_any

        def load_any(*arguments):
            path = folder / f"loads-{os.getpid()}"
            path.write_text(str(int(path.read_text()) + 1 if path.exists() else 1))
            return load(*arguments)

        def dense_targets(*arguments):
            if (folder / "shortage").exists():
                import torch

                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 1 GiB.")
            stage.calls += 1
            while (folder / "wait").exists() and stage.calls % 2 == 0:  # in mid-shard: batches of two, shards of four
                (folder / f"waits-{os.getpid()}").touch()
                time.sleep(0.01)
            return real(*arguments)

        stage.dense_targets, loaded_head.load_any = dense_targets, load_any
    return build(job, number, keys)


worker.build = planted
"""


WITHOUT_US = "import sys; sys.modules.update(mgd_pipeline=None, mgd_stages=None); from distributed.cli.dask_{} import main; main()"


@contextmanager
def dask(log: Path, *command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of Dask's own command line, ended by its number."""
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=file, stderr=file, cwd=log.parent, env={**os.environ, **environment}
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def until(true: Callable[[], Any], otherwise: str) -> Any:
    """The first value that is true, as soon as there is one."""
    for _ in range(6000):
        if value := true():
            return value
        time.sleep(0.01)
    raise AssertionError(otherwise)


@contextmanager
def scheduler(folder: Path, *more: str, **environment: str) -> Iterator[str]:
    """`dask scheduler`, where mgd-pipeline is not installed; its address."""
    options = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", "scheduler.json"]
    with dask(folder / "scheduler.log", "-c", WITHOUT_US.format("scheduler"), *options, *more, **environment):
        written = folder / "scheduler.json"
        until(lambda: written.exists() and written.read_text().endswith("}"), "no scheduler answers")
        yield json.loads(written.read_text())["address"]


def worker(folder: Path, address: str, name: str, *options: str, bare: bool = False, **environment: str) -> Any:
    """`dask worker`; `bare` where mgd-pipeline is not installed."""
    where = ["--host", "127.0.0.1", "--no-dashboard", "--local-directory", str(folder / "scratch"), "--name", name]
    start = ["-c", WITHOUT_US.format("worker")] if bare else ["-m", "distributed.cli.dask_worker"]
    line = [*start, address, "--nthreads", "1", "--memory-limit", "0", *where, *options]
    return dask(folder / f"{name}.log", *line, **environment)


@contextmanager
def lone_worker(folder: Path, address: str, name: str, *options: str, **more: Any) -> Iterator[None]:
    with worker(folder, address, name, "--no-nanny", *options, **more):
        with cluster.workers_of(address) as client:
            client.wait_for_workers(1, timeout=60)
        yield


@pytest.fixture(scope="module")
def plants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plants")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, plants: Path) -> Iterator[str]:
    """A cluster of two workers, as a user starts one."""
    folder = tmp_path_factory.mktemp("dask")
    (folder / "plant.py").write_text(PLANT)
    preload = ["--preload", str(folder / "plant.py")]
    with (
        scheduler(folder) as address,
        worker(folder, address, "a", *preload, PLANTS=str(plants)),
        worker(folder, address, "b", *preload, PLANTS=str(plants)),
    ):
        yield address


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line's process alone plans; workers are told."""
    monkeypatch.setattr(teacher_cache, "plan_layout", partial(plan_layout, shard_bytes=SHARD_BYTES))


@pytest.fixture(scope="module")
def expected(finished_project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The cache of an undisturbed run in one process, by plain command."""
    folder = tmp_path_factory.mktemp("expected") / "project"
    shutil.copytree(finished_project, folder, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "plan_layout", partial(plan_layout, shard_bytes=SHARD_BYTES))
        project = emptied(open_project(folder / "params.yaml", TINY))
        done = precompute(project)
    assert done.exit_code == 0, done.output
    assert len(open_cache(project.targets("wide")).commit["shards"]) == 6
    return file_bytes(project.targets("wide"))


def refused(project: Project, *options: str, code: int = 1) -> str:
    """The one line that the command ends with."""
    done = precompute(project, *options)
    assert (done.exit_code, done.stderr.count("\n")) == (code, 1) and done.stderr.startswith("error: "), done.output
    return done.stderr.removeprefix("error: ").removesuffix("\n")


def emptied(project: Project) -> Project:
    shutil.rmtree(project.targets("wide"))
    shutil.rmtree(project.base / ".mgd")
    return project


def precompute(project: Project, *options: str) -> Any:
    """The command as a user calls it, in this process."""
    line = ["--teacher", "wide", "--config", str(project.base / "params.yaml"), "--device", "cpu", "--threads", "1"]
    return CliRunner().invoke(app, ["precompute-teachers", *line, "--batch-size", "2", *SETS, *options])


def test_a_worker_killed_in_mid_shard_changes_nothing(
    project: Project, address: str, plants: Path, expected: dict[str, bytes], small_shards: None
) -> None:
    emptied(project)
    (plants / "wait").touch()

    def kill() -> int:
        pid = int(until(lambda: list(plants.glob("waits-*")), "no worker is in mid-shard")[0].name.removeprefix("waits-"))
        os.kill(pid, signal.SIGKILL)
        (plants / "wait").unlink()
        return pid

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill)
        done = precompute(project, "--scheduler", address)
    assert done.exit_code == 0, done.output
    assert file_bytes(project.targets("wide")) == expected
    left = [path.name for path in (project.base / ".mgd/work").glob("targets-*/*/stage-*")]
    assert len(left) == 1 and f"-{killed.result()}-" in left[0], "it died over a shard that it had begun"


def test_workers_of_this_machine_make_the_same_cache(project: Project, expected: dict[str, bytes], small_shards: None) -> None:
    done = precompute(emptied(project), "--workers", "2")
    assert done.exit_code == 0, done.output
    assert file_bytes(project.targets("wide")) == expected
    made = json.loads((project.results / "teachers/wide.json").read_text())
    assert 0 <= made["miou"] <= 1, "and the teacher was evaluated"


def test_jobs_of_an_array_share_out_the_shards(
    project: Project,
    expected: dict[str, bytes],
    small_shards: None,
    batches_seen: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without Dask; whoever finishes the last shard publishes, or a last call, which computes nothing."""
    for module in ("dask", "distributed", "mgd_stages.cluster"):
        monkeypatch.setitem(sys.modules, module, None)
    first = precompute(emptied(project), "--shards", "0::2")
    assert first.exit_code == 0 and sum(batches_seen) == 12, first.output
    assert "12 images computed; 3 of 6 shards are missing yet" in " ".join(first.stdout.split())
    assert not project.targets("wide").exists(), "nobody takes half a cache for a whole one"

    last = precompute(project, "--shards", "1::2")
    assert last.exit_code == 0 and sum(batches_seen) == 24, last.output
    assert file_bytes(project.targets("wide")) == expected

    shutil.rmtree(project.targets("wide"))  # as if both had believed that the other one was not done
    again = precompute(project)
    assert again.exit_code == 0 and "all images were there already" in again.output
    assert sum(batches_seen) == 24 and file_bytes(project.targets("wide")) == expected


def test_skipped_images_are_recorded_by_workers_too(project: Project, address: str, plants: Path, small_shards: None) -> None:
    """And each worker loads the teacher once."""
    manifest = read_manifest(project.manifest, project.base)
    row = manifest.unlabelled[2]
    (project.base / manifest.root / row.image_path).write_bytes(b"overwritten")
    assert re.fullmatch(f".*{row.image_id}.*has changed since.*", refused(emptied(project), "--scheduler", address))
    assert not project.targets("wide").exists()
    for path in plants.glob("loads-*"):
        path.unlink()
    skipped = precompute(project, "--scheduler", address, "--on-error", "skip")
    assert skipped.exit_code == 0 and "1 skipped" in skipped.output, skipped.output
    cache = open_cache(project.targets("wide"))
    assert len(cache.index.place) == 23 and "has changed since" in cache.index.problems[cache.index.by_id[row.image_id]]
    loads = [path.read_text() for path in plants.glob("loads-*")]
    assert 1 <= len(loads) <= 2 and set(loads) == {"1"}


def test_a_cache_that_lacks_shards_is_not_published(project: Project, small_shards: None) -> None:
    """Workers that say that they are done, and a disk that does not have it."""
    with pytest.raises(CacheError, match=r"shards/\d{5}-\w+: has disappeared again; run the same command once more"):
        precompute_teachers(emptied(project), "wide", device=torch.device("cpu"), batch_size=2, elsewhere=lambda *_: 24)
    assert not project.targets("wide").exists()


def test_memory_is_named_in_one_process_as_well() -> None:
    said = r"teacher deep: cuda:1 is out of memory with --batch-size 1; take smaller images"
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("[enforce fail] can't allocate memory")):
        with pytest.raises(MemoryShortage, match=said), named_errors("deep", Batching(torch.device("cuda:1"), 1)):
            raise error
    with pytest.raises(RuntimeError, match="shape"), named_errors("deep", Batching(torch.device("cpu"), 1)):
        raise RuntimeError("shape mismatch")


def test_a_teacher_out_of_memory_names_the_batch_size(project: Project, address: str, plants: Path, small_shards: None) -> None:
    (plants / "shortage").touch()
    said = refused(emptied(project), "--scheduler", address)
    (plants / "shortage").unlink()
    assert said == "teacher wide: cpu is out of memory with --batch-size 2; lower it, such as --batch-size 1"
    # The other worker may be in mid-shard; the command does not wait for it.
    until(lambda: not list((project.base / ".mgd/work").glob("targets-*/*/stage-*")), "something stays behind")


def test_a_shard_that_kills_its_workers_is_named(project: Project, address: str, plants: Path, small_shards: None) -> None:
    (plants / "die").touch()
    said = refused(emptied(project), "--scheduler", address)
    (plants / "die").unlink()
    manifest = read_manifest(project.manifest, project.base)
    keys = [image.key for image in teacher_cache.cached_images(project, "wide", manifest)][12:16]
    assert said.startswith(f"shard 3, images {keys[0].image_id} to {keys[-1].image_id}: 4 workers died over it")
    assert "lower --batch-size" in said and "--shards 3:4" in said
    alone = precompute(project, "--shards", "3:4")
    assert alone.exit_code == 0 and "4/4 images" in alone.output, "as the error says"


def test_a_scheduler_that_is_down_is_named(finished_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 0.5)
    for protocol in ("tcp", "ucx", "ucxx", "ws", "wss"):
        said = refused(open_project(finished_project / "params.yaml", TINY), "--scheduler", f"{protocol}://127.0.0.1:9")
        assert said.startswith(f"--scheduler {protocol}://127.0.0.1:9: ")
        assert protocol != "tcp" or "no Dask scheduler answers there" in said


OTHER_VERSIONS = """
import json, os
from pathlib import Path
from distributed import versions

versions.real = real = getattr(versions, "real", versions.get_package_info)  # it is loaded twice
versions.get_package_info = lambda packages: {**real(packages), **json.loads(Path(os.environ["PLANTED_VERSIONS"]).read_text())}
"""


def test_workers_that_do_not_fit_are_named(
    project: Project, small_shards: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None at all; one without mgd-pipeline, with another version of it, with other libraries, without the project's disk."""
    emptied(project)
    monkeypatch.setattr(cluster, "_WORKER_SECONDS", 0.5)
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 1.0)
    for package in ("pipeline", "stages"):
        shutil.copytree(REPOSITORY / package, tmp_path / "other" / package)
    with open(tmp_path / "other/pipeline/mgd_pipeline/caches/encoding.py", "a") as file:
        file.write("# another version\n")
    old = os.pathsep.join([str(tmp_path / "other/pipeline"), str(tmp_path / "other/stages")])
    (tmp_path / "plant.py").write_text(OTHER_VERSIONS)
    planted = tmp_path / "planted.json"
    planted.write_text("{}")

    with scheduler(tmp_path) as address:
        refuse = partial(refused, project, "--scheduler", address)
        assert f"{address}: no worker for 0 s; start some" in refuse()
        with lone_worker(tmp_path, address, "bare", bare=True):
            assert re.search(r"worker tcp://.*: has no mgd-pipeline .*mgd_stages.*; install there", refuse())
        with lone_worker(tmp_path, address, "old", PYTHONPATH=old):
            ours = re.escape(worker_module.version())
            assert re.search(rf"worker \d+ on .* runs mgd-pipeline .* \(source \w+\), this command {ours}: ", refuse())
        preload = ["--preload", str(tmp_path / "plant.py")]
        with lone_worker(tmp_path, address, "planted", *preload, PLANTED_VERSIONS=str(planted)):
            # Versions are compared before anything is sent: a function that another Python has packed ends its worker.
            with cluster.workers_of(address) as client:
                (where,) = client.nthreads()
            here = ".".join(map(str, sys.version_info[:3]))
            for changed, fault in (
                ({"python": "3.99.1.final.0"}, f"runs Python 3.99.1, this command {here}, and Dask cannot send code"),
                ({"zarr": None}, "lacks zarr, so mgd-pipeline does not work there; "),
            ):
                planted.write_text(json.dumps(changed))
                assert refuse().startswith(f"worker {where}: {fault}")
            same = f"{torch.__version__.partition('+')[0]}+other.build"
            planted.write_text(json.dumps({"numpy": "1.0.1", "torch": same}))
            done = precompute(project, "--scheduler", address)
            assert done.exit_code == 0, done.output
            warned = f"warning: worker {where} has numpy 1.0.1 (here {np.__version__}); the last bits of targets may differ"
            assert warned in " ".join(done.output.split())
        (tmp_path / "far").mkdir()
        with lone_worker(tmp_path / "far", address, "far"), cluster.workers_of(address) as client:
            monkeypatch.chdir(project.base.parent)  # a path that means another folder in a process that was started elsewhere
            far = Project(Path("/proc/self/cwd") / emptied(project).base.name, project.params)
            elsewhere = partial(cluster.build_on_workers, client, cluster.Asked("cpu", 2, "stop", 1))
            with pytest.raises(ClusterError, match=r"worker \d+ on .* does not see /proc/self/cwd/.*: workers need a disk"):
                precompute_teachers(far, "wide", device=torch.device("cpu"), batch_size=2, elsewhere=elsewhere)
    assert not list((project.base / ".mgd/work").glob("targets-*/*/stage-*"))


def certificates(folder: Path) -> dict[str, str]:
    """A new authority and one certificate for all roles, by the names of Dask's configuration."""
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {folder}/key -out {folder}/cert"
    subprocess.run(command.split(), check=True, capture_output=True)
    roles = ("scheduler", "worker", "client")
    return {"ca-file": f"{folder}/cert"} | {f"{role}.{what}": f"{folder}/{what}" for role in roles for what in ("cert", "key")}


def test_tls_takes_the_certificates_of_dasks_configuration(
    project: Project, small_shards: None, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied(project)
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 3.0)
    configured = certificates(tmp_path)
    names = {key: key.upper().replace(".", "__").replace("-", "_") for key in configured}
    environment = {f"DASK_DISTRIBUTED__COMM__TLS__{names[key]}": path for key, path in configured.items()}
    settings = {f"distributed.comm.tls.{key}": path for key, path in configured.items()}

    with (
        scheduler(tmp_path, "--protocol", "tls", **environment) as address,
        worker(tmp_path, address, "encrypted", "--no-nanny", bare=False, **environment),
    ):
        assert address.startswith("tls://")
        refuse = partial(refused, project, "--scheduler", address)
        (tmp_path / "stranger").mkdir()
        others = {f"distributed.comm.tls.{key}": path for key, path in certificates(tmp_path / "stranger").items()}
        for given, fault in (
            ({}, "needs certificates, and Dask's configuration names none; set DASK_"),
            ({"distributed.comm.tls.ca-file": configured["ca-file"]}, f"names only ca-file {configured['ca-file']}; set"),
            ({**settings, "distributed.comm.tls.client.cert": "/none/cert"}, "client.cert /none/cert, client.key"),
            (others, "no Dask scheduler answers there ("),
        ):
            with config.set(given):
                said = refuse()
            assert said.startswith(f"--scheduler {address}: ") and fault in said
        with config.set(settings):
            done = precompute(project, "--scheduler", address)
    assert done.exit_code == 0, done.output
    assert file_bytes(project.targets("wide")) == expected


def test_a_scheduler_that_goes_away_is_named(
    project: Project, small_shards: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied(project)
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 1.0)
    with scheduler(tmp_path) as address:
        with cluster.workers_of(address) as client:
            pid = client.run_on_scheduler(os.getpid)

        def kill() -> None:
            until(lambda: list((project.base / ".mgd/work").glob("targets-*/*/stage-cluster-*")), "the run has not begun")
            os.kill(pid, signal.SIGKILL)

        with ThreadPoolExecutor(1) as pool:
            killed = pool.submit(kill)
            said = refused(project, "--scheduler", address)
        killed.result()
    assert said == f"{address}: the Dask scheduler does not answer any more; finished shards stay, the same command goes on"
    assert not list((project.base / ".mgd/work").glob("targets-*/*/stage-*"))


def test_local_workers_are_pinned_and_reachable_from_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask's port runs whatever it is sent."""
    monkeypatch.setattr(cluster, "_gpus", lambda: ["1", "GPU-3f"])
    me = psutil.Process()
    others = me.children(recursive=True)
    with cluster.local_workers("gpus", threads=3) as client:
        seen = client.run(lambda: (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]))
        listening = {
            connection.laddr.ip
            for process in {me, *me.children(recursive=True)} - set(others)
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
    assert sorted(seen.values()) == [("1", "3"), ("GPU-3f", "3")]
    assert listening == {"127.0.0.1"}


def test_gpus_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ParamsError, match=r"--workers gpus: torch sees no CUDA device here; write a number"):
        cluster._gpus()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cluster._gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-3f")
    assert cluster._gpus() == ["5", "GPU-3f"]


NO_ADDRESSES = ["nonsense", "tcp://host", "tcp://:8786", "inproc://1.2.3.4/5/6", "http://host:8787", "host:port", ""]
ADDRESS = "write protocol, host and port of a Dask scheduler that runs, such as tcp"
WORKERS = "write a number of processes, or gpus for one on each GPU"
SLICE = "write a slice, such as 0::8 for every eighth shard, or 3:4 for one"


def test_a_worker_knows_the_teacher_after_a_renaming(project: Project) -> None:
    cache, renamed = open_cache(project.targets("wide")), as_folder(project, [name.upper() for name in CLASSES])
    prepare_data(renamed)
    told = {
        **{"project": str(renamed.base), "params": renamed.params.model_dump(mode="json"), "teacher": "wide", "threads": 0},
        **{"device": "cpu", "batch_size": 1, "on_error": "stop", "work": str(renamed.base), "layout": asdict(cache.layout)},
    }
    worker_module._open({**told, "provenance": cache.provenance})
    for other in ({"classes": [*CLASSES[::-1]]}, {"teacher": {**cache.provenance["teacher"], "weights_sha256": "0"}}):
        with pytest.raises(ClusterError, match=r"wide\.safetensors is another teacher there"):
            worker_module._open({**told, "provenance": cache.provenance | other})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *((["--scheduler", text], ADDRESS) for text in NO_ADDRESSES),
        *((["--workers", text], WORKERS) for text in ("0", "gpu")),
        *((["--shards", text], SLICE) for text in ("3", "0::0")),
        (["--workers", "2", "--scheduler", "tcp://h:1"], "choose one"),
        (["--workers", "gpus"], "--device cpu: choose one; CUDA_VISIBLE_DEVICES says which GPUs"),
    ],
)
def test_wrong_options_are_refused_before_anything(finished_project: Path, options: list[str], said: str) -> None:
    line = refused(open_project(finished_project / "params.yaml", TINY), *options, code=2)
    assert line.startswith(" ".join(options)) and said in line


def test_slices_are_pythons() -> None:
    numbers = list(range(20))
    for text in ("0::8", "7::8", "3:4", ":", "-4:", ":-18", "2:9:3", "::"):
        parts = [int(part) if part else None for part in text.split(":")]
        assert numbers[parse_shards(text)] == numbers[slice(*parts)]


def test_dask_is_an_extra(finished_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only workers need it: the job of an array, above, has none."""
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "mgd_stages.cluster")
    said = refused(open_project(finished_project / "params.yaml", TINY), "--workers", "2")
    assert re.match(r"--workers and --scheduler need Dask .*: pip install 'mgd-pipeline\[cluster\]'", said)


def test_every_dask_option_of_the_guide_exists() -> None:
    guide = (REPOSITORY / "docs/cluster.md").read_text()
    for command, main in (("scheduler", dask_scheduler), ("worker", dask_worker)):
        known = {name for option in main.params for name in (*option.opts, *option.secondary_opts)}
        named = re.findall(rf"dask {command}\b[^`&]*", guide)
        assert len(named) > 2 and set(re.findall(r"(?<![\w-])--[a-z-]+", " ".join(named))) <= known
