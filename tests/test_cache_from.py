"""Training from teacher caches at URLs: the order of shards, copies of shards in a local folder, and the same student."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from caches import LAYOUT, PROVENANCE, build, image, images, require_right, spoil
from conftest import TINY, training_set
from mgd_pipeline.caches import format as cache_format
from mgd_pipeline.caches import remote
from mgd_pipeline.caches.copies import CopiedCache, ShardFolder
from mgd_pipeline.caches.format import mirrored_key, sealed
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.caches.remote import RemoteFile
from mgd_pipeline.errors import AccessError, CacheError, ParamsError, ProvenanceMismatch
from mgd_pipeline.training.batches import Batch
from mgd_pipeline.training.dataset import TrainingSet
from mgd_pipeline.training.loading import load_batches
from mgd_pipeline.training.shard_order import WINDOW, ShardOrder, ShardReading
from mgd_stages.cli import app
from mgd_stages.doctor.targets import disk
from mgd_stages.run.cache_from import CacheFrom, parse_size, places_of
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project, open_project
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.train_student import train_student
from object_server import Call, Fault, ObjectServer, dropping, failing, serving, waiting

pytest.importorskip("obstore", reason="caches at URLs are read where the extra remote is")

CPU = torch.device("cpu")
LARGE = 10**9
SMALL = [
    *TINY,
    "targets.logits=log-probability",
    "targets.region_embeddings=uint8",
    "targets.compression=zstd",
    "losses.image_distance=log-probability",
]


# --- the order


def order_of(*caches: TargetCache, count: int) -> ShardOrder:
    """Of images(count), without a project."""
    manifest = cast("Any", SimpleNamespace(key=lambda key: key))
    return ShardOrder({str(i): cache for i, cache in enumerate(caches)}, manifest, cast("Any", [one.key for one in images(count)]))


def test_an_epoch_is_a_shuffle_of_windows_of_shards(tmp_path: Path) -> None:
    cache = open_cache(build(tmp_path, images(110)))
    order, shards = order_of(cache, count=110), np.array([cache.row(one.key) // 4 for one in images(110)])
    windows = order.windows(np.random.default_rng(0))
    of_window = [set(shards[windows == number]) for number in range(windows.max() + 1)]
    assert [len(one) for one in of_window] == [7, 7, 7, 7], "28 shards, at most 8 in a window, and none much smaller"
    assert len(set.union(*of_window)) == 28, "each shard lies in one window"
    assert WINDOW == 8 and not np.array_equal(windows, order.windows(np.random.default_rng(1)))
    assert set(order_of(cache, count=32).windows(np.random.default_rng(0))) == {0}, "8 shards are shuffled as a whole"


def test_the_shards_of_the_cache_with_the_most_images_in_a_shard_are_shuffled(tmp_path: Path) -> None:
    small = open_cache(build(tmp_path / "a", images(100)))
    large = open_cache(build(tmp_path / "b", images(100), layout=replace(LAYOUT, rows_per_shard=16)))
    rng = np.random.default_rng
    for caches in ([small, large], [large, small], [large]):
        assert np.array_equal(order_of(*caches, count=100).windows(rng(0)), order_of(large, count=100).windows(rng(0)))
    assert order_of(small, large, count=100).names != order_of(small, count=100).names


# --- copies of shards


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    """A server whose failed requests are repeated at once."""
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0))
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as state:
        yield state


@pytest.fixture
def copied(server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CopiedCache:
    """A cache of 40 images in 10 shards at a URL, read from copies."""
    build(server.folder, images(40))
    cache = open_cache(server.url("s3", "t.zarr", monkeypatch))
    server.calls.clear()
    return CopiedCache(cache.contents, ShardFolder(tmp_path / "copies", LARGE))


def names(folder: ShardFolder) -> set[str]:
    return {path.name for path in folder.folder.glob("??/*")}


def again(cache: CopiedCache, rows: Sequence[int] | None = None, limit: int = LARGE) -> CopiedCache:
    """As another process that uses the same folder."""
    return CopiedCache(cache.contents, ShardFolder(cache.folder.folder, limit), rows)


def test_shards_are_brought_once_whole_and_kept(copied: CopiedCache, server: ObjectServer) -> None:
    for one in images(40):
        require_right(copied, one.key)
    files = copied.files_of(range(10))
    assert names(copied.folder) >= {file.sha256 for file in files}
    shards = {entry["sha256"] for name, entry in copied.commit["files"].items() if "/c/" in name}
    assert server.count() == len(shards) == 47, "equal ones once"
    for one in images(40):
        require_right(again(copied), one.key)
    assert server.count() == 47


def test_of_labelled_images_only_the_records_are_brought_and_kept(
    copied: CopiedCache, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgd_pipeline.caches.copies._GAP", 100)
    some = again(copied, [1, 2, 5, 39])
    some.fetch_rows()
    read, calls = sum(size for _, size in server.sent[-server.count() :]), server.count()
    whole = open_cache(server.folder / "t.zarr")
    for row in (1, 2, 5, 39):
        assert all(np.array_equal(*pair) for pair in zip(some.read([row]), whole.read([row]), strict=True))
    assert server.count() == calls and read < copied.layout.record_bytes * 6
    more = again(copied, [1, 3])
    more.fetch_rows()
    more.read([1, 3])
    assert server.count("logits/c/0") == 3, "the index, two records that lie together; then one more"
    with pytest.raises(CacheError, match=r"logits of row 0 .*is damaged"):
        some.read([0])


def test_what_was_used_longest_ago_goes_first(copied: CopiedCache, server: ObjectServer) -> None:
    files = [copied.files_of([number])[0] for number in range(4)]
    room = 3 * 4096 * -(-files[0].size // 4096)
    folder = ShardFolder(copied.folder.folder, room)
    for file in files[:3]:
        folder.fetch(file)
    assert folder.touch(files[0].sha256)
    with open(folder.fetch_now(files[1]), "rb") as held:
        for number in (2, 0):
            folder.touch(files[number].sha256)
        folder.fetch(files[3])
        assert names(folder) == {files[number].sha256 for number in (0, 2, 3)} and folder.used() <= room
        assert len(held.read()) == files[1].size, "who has it open reads on"


def test_threads_that_want_one_shard_bring_it_once(copied: CopiedCache, server: ObjectServer) -> None:
    file = copied.files_of([0])[0]
    server.faults.append(waiting(0.2, 1))
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(ShardFolder(copied.folder.folder, LARGE).fetch, file) for _ in range(5)]
        while not server.calls:
            pass
        assert copied.folder.fetch(file, wait=False) is None, "somebody else brings it"
        assert len({other.result() for other in others}) == 1
    assert server.count() == 1 and names(copied.folder) == {file.sha256}


def test_what_a_killed_process_left_is_written_again(copied: CopiedCache) -> None:
    file = copied.files_of([0])[0]
    part = (copied.folder.folder / file.sha256[:2] / file.sha256).with_suffix(".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"?" * 2 * file.size)
    assert copied.folder.fetch_now(file).stat().st_size == file.size and names(copied.folder) == {file.sha256}


@pytest.mark.parametrize("fault", [failing(500, 2), failing(503, 1), dropping(2), dropping(2, after=0.5)])
def test_failures_that_pass_change_no_copy(copied: CopiedCache, server: ObjectServer, fault: Fault) -> None:
    server.faults.append(fault)
    require_right(copied, image(7).key)
    some = again(copied, [7])
    require_right(some, image(7).key)


def test_a_shard_that_stays_away_is_an_error(copied: CopiedCache, server: ObjectServer) -> None:
    file = copied.files_of([0])[0]
    server.faults.append(failing(503, 9))
    with pytest.raises(AccessError, match=r"s3://lab/t\.zarr/logits/c/0/0/0/0: cannot be read now \(the server answers 503"):
        copied.read([0])
    server.faults.clear()
    assert not names(copied.folder)
    (server.folder / "t.zarr/logits/c/0/0/0/0").unlink()
    with pytest.raises(CacheError, match=r"s3://lab/t\.zarr/logits/c/0/0/0/0: cannot be read: is missing"):
        copied.folder.fetch(file)


@pytest.mark.parametrize("rows", [None, [0, 1, 2, 3]])
@pytest.mark.parametrize("damage", ["other shard", "one bit", "another size"])
def test_a_shard_that_was_replaced_is_an_error_and_no_copy(
    copied: CopiedCache, server: ObjectServer, rows: list[int] | None, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgd_pipeline.caches.copies._GAP", 100)
    shard, other = (server.folder / f"t.zarr/logits/c/{number}/0/0/0" for number in (0, 1))
    if damage == "one bit":
        spoil(shard, 100)
    else:
        shard.unlink()
        shard.write_bytes(other.read_bytes() + b"?" * (damage == "another size"))
    reader = again(copied, rows)
    with pytest.raises(CacheError, match=r"^s3://lab/t\.zarr/logits/c/0/0/0/0: "):
        reader.read([0])
    assert copied.files_of([0])[0].sha256 not in names(copied.folder)


def test_a_replacement_between_two_requests_is_seen(
    copied: CopiedCache, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index of a shard is of one version of the object, its records of the next version."""
    monkeypatch.setattr("mgd_pipeline.caches.copies._GAP", 100)
    shard, other = (server.folder / f"t.zarr/logits/c/{number}/0/0/0" for number in (0, 1))

    def replace(call: Call) -> bool:
        if call.name.endswith("logits/c/0/0/0/0") and call.number == 1:
            shard.unlink()
            shutil.copy(other, shard)
            call.whole = shard.read_bytes()
        return False

    server.faults.append(replace)
    with pytest.raises(CacheError, match=r"logits of row 0 .* belongs to another place"):
        again(copied, [0]).read([0])


def test_a_copy_that_is_damaged_or_removed_is_brought_again(copied: CopiedCache, server: ObjectServer) -> None:
    copied.read([0])
    file = copied.files_of([0])[0]
    spoil(copied.folder.fetch_now(file), 100)
    require_right(again(copied), image(0).key)
    assert server.count("logits/c/0") == 2
    for damage in ("damaged", "removed"):
        some = again(copied, [0])
        some.fetch_rows()
        for path in copied.folder.folder.glob("??/*"):
            spoil(path) if damage == "damaged" else path.unlink()
        require_right(some, image(0).key)


def test_a_copy_that_others_remove_is_brought_again(copied: CopiedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """With less room than several trainings need, this happens at any time."""
    left, fetch = [5], ShardFolder.fetch

    def fetch_and_lose(folder: ShardFolder, file: RemoteFile, **options: Any) -> Path | None:
        place = fetch(folder, file, **options)
        if left[0] and place is not None:
            left[0] -= 1
            place.unlink()
        return place

    monkeypatch.setattr(ShardFolder, "fetch", fetch_and_lose)
    require_right(copied, image(0).key)
    assert not left[0]


def test_a_nearly_full_disk(copied: CopiedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that nobody uses make room before the disk is full, and what is written in parts is written whole."""
    monkeypatch.setattr("mgd_pipeline.caches.copies._GAP", 100)
    write, pwrite, usage = os.write, os.pwrite, shutil.disk_usage
    files = [copied.files_of([number])[0] for number in (0, 1)]
    copied.folder.fetch(files[0])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=files[1].size - 1))
    copied.folder.fetch(files[1])
    assert names(copied.folder) == {files[1].sha256}
    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:100]))
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, place: pwrite(descriptor, data[:100], place))
    require_right(again(copied, [0]), image(0).key)


def test_what_is_no_copy_stays(copied: CopiedCache) -> None:
    folder = ShardFolder(copied.folder.folder, 4096)
    own = [folder.folder / "ab/thesis.odt", folder.folder / "ab/thesis.part"]
    own[0].parent.mkdir(parents=True)
    for file in own:
        file.write_bytes(bytes(10**5))
    folder.fetch(copied.files_of([0])[0])
    folder.fetch(copied.files_of([1])[0])
    assert all(file.exists() for file in own) and len(names(folder)) == 3


READER = """
import random, sys
from pathlib import Path
import numpy as np
from mgd_pipeline.caches import copies
from mgd_pipeline.caches.copies import Ahead, CopiedCache, ShardFolder
from mgd_pipeline.caches.reader import open_cache
local, url, folder, limit, seed = sys.argv[1:]
rng, copies._GAP = random.Random(int(seed)), 1000
folder, local, away = ShardFolder(Path(folder), int(limit)), open_cache(local), open_cache(url)
ahead, some = Ahead(folder), rng.sample(range(40), 4)
whole, labelled = CopiedCache(away.contents, folder), CopiedCache(away.contents, folder, some)
for _ in range(30):
    shards = rng.sample(range(10), 2)
    ahead.want(whole.files_of(shards))
    for cache, rows in ((whole, [4 * shard + rng.randrange(4) for shard in shards]), (labelled, some)):
        assert all(np.array_equal(*pair) for pair in zip(cache.read(rows), local.read(rows), strict=True))
    whole.close()
    labelled.close()
ahead.close()
"""


def test_trainings_that_share_a_folder_without_room_for_both(copied: CopiedCache, server: ObjectServer) -> None:
    """A third one is killed while it brings a shard. What it leaves is removed first."""
    folder, path = copied.folder.folder, server.folder / "t.zarr"
    limit = 4 * copied.shard_bytes(0)

    def start(seed: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", READER, *map(str, (path, copied.path, folder, limit, seed))])

    server.faults.append(dropping(10**6, "/c/", after=0.5))
    killed = start(0)
    while not list(folder.glob("??/*.part")):
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    server.faults.clear()
    readers = [start(1), start(2)]
    assert [reader.wait() for reader in readers] == [0, 0]
    # Records of labelled images may have been written by both at once.
    assert ShardFolder(folder, limit).used() <= limit + 8 * 4096 and not list(folder.glob("??/*.part"))


# --- training


@pytest.fixture(scope="module")
def sharded(finished_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished project whose caches are small and have several shards: of 2 images, and of 4."""
    copy = tmp_path_factory.mktemp("sharded") / "project"
    shutil.copytree(finished_project, copy, symlinks=True)
    project = open_project(copy / "params.yaml", SMALL)
    with pytest.MonkeyPatch.context() as patch:
        for name, rows in (("wide", 2), ("deep", 4)):
            shutil.rmtree(project.targets(name))
            shutil.rmtree(project.work(""), ignore_errors=True)
            patch.setattr(cache_format, "SHARD_ROWS", rows)
            precompute_teachers(project, name, device=CPU, batch_size=4)
    return copy


@pytest.fixture
def project(sharded: Path, server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project whose caches lie elsewhere. A window has one shard of four images."""
    monkeypatch.setattr("mgd_stages.run.cache_from.WINDOW", 1)
    monkeypatch.setattr("mgd_pipeline.caches.copies._GAP", 1000)
    shutil.copytree(sharded, tmp_path / "project", symlinks=True)
    (tmp_path / "project/data/targets").rename(server.folder / "targets")
    return open_project(tmp_path / "project/params.yaml", [*SMALL, "student.steps=30"])


def reading(project: Project, folder: Path, place: str | Path, limit: int = LARGE, **changes: Any) -> TrainingSet:
    dataset = training_set(project)
    caches = {name: f"{place}/{name}.zarr" for name in dataset.caches}
    return replace(dataset, caches=caches, by_shards=ShardReading(folder, limit, window=1), **changes)


def same(one: Batch, other: Batch) -> bool:
    pairs = [
        (a, b)
        for mine, theirs in zip(one.sources, other.sources, strict=True)
        for a, b in [(mine.images, theirs.images), *zip(flat(mine), flat(theirs), strict=True)]
    ]
    return [s.rows for s in one.sources] == [s.rows for s in other.sources] and all(torch.equal(a, b) for a, b in pairs)


def flat(source: Any) -> list[torch.Tensor]:
    return [tensor for targets in source.targets.values() for tensor in targets[:3]]


def test_batches_from_a_bucket_are_those_from_a_folder(
    project: Project, server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("s3", "targets", monkeypatch)
    local = reading(project, tmp_path / "none", server.folder / "targets")
    away = reading(project, tmp_path / "copies", url)
    for step in range(30):
        if step == 15:
            shutil.rmtree(tmp_path / "copies")  # anybody may
        assert same(local[step], away[step])
    assert [thread for thread in threading.enumerate() if thread.name == "read-ahead"]
    batches = load_batches(away, 29, 0, 0, CPU)
    assert same(next(batches), local[29])
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]
    assert not (tmp_path / "none").exists()
    count, batch = len(local.manifest.for_consistency), local.optimisation.unlabelled_batch
    ids = [row.image_id for step in range(count // batch * 2) for row in local[step].mixed[0].rows]
    assert len(set(ids[:count])) == count == len(set(ids[count:])) and ids[:count] != ids[count:], "each image once an epoch"
    deep = open_cache(server.folder / "targets/deep.zarr")
    shards = [deep.row(local.manifest.key(local.manifest.rows[image_id])) // 4 for image_id in ids[:count]]
    assert len(list(groupby(shards))) == len(set(shards)) > 3, "one shard at a time"
    halves = [[reading(project, tmp_path / "copies", url, rank=rank, ranks=2)[step] for rank in (0, 1)] for step in (0, 7)]
    for step, parts in zip((0, 7), halves, strict=True):
        rows = [row for pair in zip(*(part.mixed[0].rows for part in parts), strict=True) for row in pair]
        assert rows == local[step].mixed[0].rows


def test_workers_read_ahead_and_give_the_same_batches(
    project: Project, server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = reading(project, tmp_path / "none", server.folder / "targets")
    away = reading(project, tmp_path / "copies", server.url("s3", "targets", monkeypatch))
    remote.counter.take()
    seen = list(load_batches(away, 3, 2, 0, CPU))
    assert [batch.step for batch in seen] == list(range(3, 30))
    counted = sum((batch.fetched for batch in seen), remote.counter.take())
    assert counted == (server.count(), sum(size for _, size in server.sent))
    assert all(same(batch, local[batch.step]) for batch in seen)


def train(project: Project, place: str | Path, folder: Path, size: int = LARGE, workers: int = 0) -> bytes:
    places = CacheFrom([str(place)], folder, size)
    train_student(project, Machine(CPU, num_workers=workers), cache_from=places)
    return project.student("distilled").read_bytes()


def test_a_student_from_a_faulty_bucket_is_the_one_from_a_folder(
    project: Project, server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a limit below the size of the caches, and in between with no answers at all: the same command continues."""
    local = train(project, server.folder / "targets", tmp_path / "none")
    assert "teacher caches" not in capsys.readouterr().out and not (tmp_path / "none").exists()
    project.student("distilled").unlink()
    url, copies = server.url("s3", "targets", monkeypatch), tmp_path / "copies"
    with pytest.raises(ParamsError, match=r"--cache-size .*: two windows of shards and the labelled images need \d+"):
        train(project, url, copies, 10**4)
    away = reading(project, copies, url)
    assert away.shardwise is not None
    size = away.shardwise.needed()
    begun, down = project.work("train-student-distilled"), failing(500, 10**6, "region_embeddings/c/")
    server.faults[:] = [failing(503, 1), lambda call: any(begun.glob("checkpoint-*.pt")) and down(call)]
    with pytest.raises(AccessError, match=r"s3://lab/targets/\w+\.zarr/region_embeddings/c/\d+/0/0/0: cannot be read now"):
        train(project, url, copies, size)
    cut: set[str] = set()
    half = dropping(10**6, after=0.5)
    server.faults[:] = [lambda call: call.name not in cut and not cut.add(call.name) and half(call)]
    capsys.readouterr()
    assert train(project, url, copies, size) == local
    said = capsys.readouterr().out
    assert "goes on at step" in said and "teacher caches, before the first step: " in said and "teacher caches, epoch 3: " in said
    assert ShardFolder(copies, size).used() <= size


def test_processes_of_torchrun_learn_the_same_from_a_bucket(
    project: Project, server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any number of workers. Of what both read one line tells."""
    url, settings = server.url("s3", "targets", monkeypatch), [*SMALL, "student.labelled_batch=4", "student.unlabelled_batch=4"]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mgd_stages.cli"),
        *("train-student", "--device", "cpu", "--config", str(project.base / "params.yaml"), "--cache-folder", str(tmp_path / "c")),
        *(part for override in [*settings, "student.steps=6"] for part in ("--set", override)),
    ]
    students = []
    for place, workers in ((url, 1), (server.folder / "targets", 0)):
        options = ["--cache-from", str(place), "--num-workers", str(workers)]
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("teacher caches, epoch 0: ") == (place == url)
        students.append(project.student("distilled").read_bytes())
        project.student("distilled").unlink()
    assert students[0] == students[1]


def test_a_web_server_without_parts_of_files_is_enough(
    project: Project, server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.ranges = False
    local = reading(project, tmp_path / "none", server.folder / "targets")
    away = reading(project, tmp_path / "copies", server.url("http", "targets", monkeypatch))
    assert all(same(local[step], away[step]) for step in (0, 9, 18))


def test_a_cache_that_is_replaced_during_a_training_is_not_read(
    project: Project, server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another order would come of it in the processes that open it later."""
    away = reading(project, tmp_path / "copies", server.url("s3", "targets", monkeypatch))
    assert away[0].step == 0
    later = pickle.loads(pickle.dumps(away))
    for name in ("wide", "deep"):
        commit = server.folder / f"targets/{name}.zarr/commit.json"
        content = json.loads(commit.read_bytes())
        del content["self"]
        commit.unlink()
        commit.write_bytes(sealed({**content, "generation": 2}))
    with pytest.raises(ProvenanceMismatch, match=r"has been replaced by another cache while it was in use"):
        later[0]


def test_mirrored_views_read_ahead_what_they_show(tmp_path: Path, server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mirror image of an image may lie in another shard."""
    wanted = [one for i in range(12) for one in (image(i), image(i)._replace(key=mirrored_key(image(i).key)))]
    build(server.folder, [*wanted[::2], *wanted[1::2]], provenance={**PROVENANCE, "preprocessing": {"mirrored": True}})
    cache = open_cache(server.url("s3", "t.zarr", monkeypatch))
    order = order_of(CopiedCache(cache.contents, ShardFolder(tmp_path, LARGE)), count=12)
    assert len({file.sha256 for file in order.files(np.array([0]))}) >= 2 and order.epoch_bytes() <= order.needed()


@pytest.mark.parametrize("text", ["20", "GB", "0GB", "-1GB", "20 gb", "1e3GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ParamsError, match=re.escape(f"--cache-size {text}: write a number and kB, MB, GB or TB")):
        parse_size(text)


def test_sizes() -> None:
    assert [parse_size(text) for text in ("20GB", "1.5 TB", "300MB", "1kB")] == [20 * 10**9, 1500 * 10**9, 300 * 10**6, 1000]


def test_where_caches_are(finished_project: Path) -> None:
    project = open_project(finished_project / "params.yaml", TINY)

    def where(*places: str) -> list[str]:
        return [str(place) for place in places_of(project, ["wide", "deep"], places).values()]

    assert where("s3://lab/a/") == ["s3://lab/a/wide.zarr", "s3://lab/a/deep.zarr"]
    assert where("deep=http://x/d.zarr", "/disk") == ["/disk/wide.zarr", "http://x/d.zarr"]
    assert where("wide=gs://lab/w.zarr") == ["gs://lab/w.zarr", str(project.targets("deep"))]
    assert where("/runs/lr=") == ["/runs/lr=/wide.zarr", "/runs/lr=/deep.zarr"]
    for places, message in (
        (("s3://a", "s3://b"), "give one place of all teachers"),
        (("wide=s3://a", "wide=s3://b"), "wide has two places"),
        (("s3://a", "wide="), "--cache-from 'wide=': names no place"),
        (("",), "--cache-from '': names no place"),
        (("broad=s3://a",), "broad is not a teacher of params.yaml; it has wide, deep"),
    ):
        with pytest.raises(ParamsError, match=message):
            where(*places)


def test_the_command_refuses_what_contradicts_itself(finished_project: Path, tmp_path: Path) -> None:
    def call(*options: str) -> str:
        done = CliRunner().invoke(app, ["train-student", "--config", str(finished_project / "params.yaml"), *sets, *options])
        assert done.exit_code == 2
        return done.output

    sets = [word for one in TINY for word in ("--set", one)]
    assert "--cache-from --supervised-only: a training without teachers" in call("--cache-from", "s3://lab", "--supervised-only")
    assert "--cache-size much: write a number" in call("--cache-from", "s3://lab", "--cache-size", "much")


def test_doctor_says_how_much_copies_take(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    place = tmp_path / "home/mgd-pipeline/shards/ab" / ("ab" * 32)
    place.parent.mkdir(parents=True)
    place.write_bytes(bytes(8192))
    (line,) = [check.found for check in disk(project, None, {}, 1.0) if "copies" in check.found]
    assert line.startswith("8.2 kB of copies of teacher caches at URLs") and str(tmp_path / "home/mgd-pipeline/shards") in line
