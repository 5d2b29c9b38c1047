"""Building: whatever is killed, fails or runs beside, the cache is whole and right, or not there; growing keeps every byte."""

from __future__ import annotations

import errno
import hashlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from caches import (
    LAYOUT,
    as_format_2,
    build,
    computed,
    encoded_of,
    file_bytes,
    image,
    images,
    link_into_dvc,
    require_all_right,
    require_right,
    spoil,
    targets_of,
)
from conftest import Counted
from mgd_pipeline.caches import shards as cache_shards
from mgd_pipeline.caches.encoding import TeacherTargets
from mgd_pipeline.caches.format import ARRAYS, FORMAT, Layout, sealed
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.caches.shards import BuildImage, Skipped
from mgd_pipeline.caches.verify import cache_difference, verify_cache
from mgd_pipeline.data.manifest import ImageKey
from mgd_pipeline.durable import write_all
from mgd_pipeline.errors import CacheError, CacheIncomplete, ProvenanceMismatch

fork = multiprocessing.get_context("fork")
SHARD = "logits/c/1/0/0/0"


class Change(NamedTuple):
    """What happens to the folder of a cache of 11 images, in shards of four; what is asked for after it, and what is computed."""

    change: Callable[[Path], object]
    wanted: list[BuildImage]
    computed: Sequence[BuildImage] = ()


def lose_work_folder(folder: Path) -> None:
    link_into_dvc(folder / "t.zarr", folder)
    shutil.rmtree(folder / "work")


def lose_shard_of_gone_image(folder: Path) -> None:
    shutil.rmtree(folder / "work/shards")
    spoil(folder / "t.zarr" / SHARD)


NEW = [image("new"), *images(13)[11:]]
CHANGES = {
    "nothing": Change(lambda folder: None, images(11)),
    "new images": Change(lambda folder: None, [*NEW, *images(11)], NEW),
    "new images, and DVC has removed the cache": Change(lambda folder: shutil.rmtree(folder / "t.zarr"), [*NEW, *images(11)], NEW),
    "new images, and a copy from DVC without its work folder": Change(lose_work_folder, [*images(11), *NEW], NEW),
    "new images, and a cache of 0.1.0": Change(lambda folder: as_format_2(folder / "t.zarr"), [*images(11), *NEW], NEW),
    "an image has changed": Change(lambda folder: None, [*images(10), image(10, "changed")], [image(10, "changed")]),
    "images are gone": Change(lambda folder: None, images(6)),
    "a shard is lost in the cache alone": Change(lambda folder: (folder / "t.zarr" / SHARD).unlink(), images(11)),
    "damage": Change(lambda folder: [spoil(folder / "t.zarr" / name) for name in (SHARD, "zarr.json")], images(11), images(8)[4:]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_only_what_is_missing_is_computed_and_old_shards_stay(tmp_path: Path, layout: Layout, name: str) -> None:
    change, wanted, expected = CHANGES[name]
    path = build(tmp_path, images(11))
    before = file_bytes(path)
    change(tmp_path)
    assert sorted(computed(tmp_path, wanted)) == sorted(image.key for image in expected)
    cache, after = require_all_right(path, wanted), file_bytes(path)
    if new := [image.key for image in expected if image not in images(11)]:
        shards = {name: data for name, data in before.items() if "/c/" in name}
        assert shards.items() < after.items() and len([name for name in after if "/c/" in name]) == len(shards) + len(
            layout.records
        )
        assert sorted(map(cache.row, new)) == [*range(12, 12 + len(new))], "they begin a shard, and a changed image has a new row"
        assert (cache.commit["format"], cache.generation) == (FORMAT, 2)
        assert not any(file.is_symlink() for file in path.rglob("*"))
    else:
        assert after == before, "rows of images that are gone stay, too"


@pytest.mark.usefixtures("layout")
def test_rows_that_cannot_be_made_again_begin_a_new_numbering(tmp_path: Path) -> None:
    """A damaged shard holds an image that is gone: the rest is computed for a cache of the present images."""
    build(tmp_path, images(8))
    lose_shard_of_gone_image(tmp_path)
    wanted = [*images(7), image("new")]
    assert len(require_all_right(build(tmp_path, wanted), wanted).index) == 8


def test_a_cache_of_0_1_0_is_verified_and_formats_are_not_mixed(tmp_path: Path) -> None:
    """Format 2, which `CHANGES` has grow."""
    path = build(tmp_path, images(11))
    new = (path / "logits/zarr.json").read_bytes()
    as_format_2(path)
    control = b"".join(data for name, data in file_bytes(path).items() if name.endswith("zarr.json"))
    assert hashlib.sha256(control).hexdigest() == "162793cdba951d3fddd9c9e531ffb46cd361cdb51a37ac85682921957cf99679", "to the byte"
    assert verify_cache(path, 1.0, pytest.fail).records == 11 * len(ARRAYS)
    old = open_cache(shutil.copytree(path, tmp_path / "copy.zarr"))
    grown = open_cache(build(tmp_path, images(13)))
    verify_cache(path, 1.0, pytest.fail)
    assert grown.fingerprint == old.fingerprint and cache_difference(old, grown) == ["images: 2 only in B, such as 'image 11'"]

    commit = tmp_path / "copy.zarr/commit.json"
    for number, said in (
        (FORMAT + 1, "which a newer mgd-pipeline wrote; this one reads 2 to 3: install the newer one"),
        (1, "reads 2 to 3; remove"),
    ):
        commit.chmod(0o644)
        commit.write_bytes(sealed({**old.commit, "format": number}))
        with pytest.raises(ProvenanceMismatch, match=f"is of format {number}, .*{said}"):
            open_cache(commit.parent)
    commit.write_bytes(sealed(old.commit))
    (commit.parent / "logits/zarr.json").write_bytes(new)
    with pytest.raises(CacheError, match=r"logits/zarr\.json: (has|differs)"):
        open_cache(commit.parent)


@pytest.mark.usefixtures("layout")
def test_skipped_images_are_tried_again_unless_they_shall_be_left_out(tmp_path: Path) -> None:
    wanted = [*images(2), image("bad"), *images(5)[2:]]
    cache = require_all_right(build(tmp_path, wanted), images(5))
    with pytest.raises(CacheIncomplete, match=r"it was skipped: image bad.jpg: truncated; mend it"):
        cache.row(image("bad").key)
    assert computed(tmp_path, wanted, retry_skipped=False) == []
    assert computed(tmp_path, wanted) == [image("bad").key]


@pytest.mark.parametrize("piece", [1, 900, 5000])
def test_memory_is_that_of_one_image_and_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """The builder takes the next image only after the one before is written, up to the piece that is not full yet.

    Others may hold what was written, as the profiler of a Dask worker does: it keeps the frames of functions that have returned.
    """
    written: list[int] = []
    held: list[Any] = []

    def compute(keys: Sequence[ImageKey]) -> Iterator[TeacherTargets | Skipped]:
        for key in keys:
            stages = list((tmp_path / "work").glob("stage-shard*/logits"))
            written.append(stages[0].stat().st_size)
            yield targets_of(key)

    def write(descriptor: int, data: Any) -> None:
        held.append(data)
        write_all(descriptor, data)

    monkeypatch.setattr(cache_shards, "_WRITE", piece)
    monkeypatch.setattr(cache_shards, "write_all", write)
    path = build(tmp_path, images(4), compute=compute)
    record = LAYOUT.bytes_of("logits") + 4
    assert written == [i * record // piece * piece for i in range(4)] and len(held) > 4
    monkeypatch.undo()
    assert file_bytes(path) == file_bytes(build(tmp_path / "in one piece", images(4)))


def _builder(folder: Path, count: int, noise: float, pause: float) -> None:
    def compute(keys: Sequence[ImageKey]) -> Iterator[TeacherTargets | Skipped]:
        for key in keys:
            time.sleep(pause)
            yield encoded_of(key, noise=noise)

    build(folder, images(count), compute=compute)


def _spawn(folder: Path, count: int, noise: float = 0.0, pause: float = 0.0) -> Any:
    process = fork.Process(target=_builder, args=(folder, count, noise, pause))
    process.start()
    return process


@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("layout")
def test_killed_builders_leave_nothing_to_repair(tmp_path: Path, counted: Counted) -> None:
    """Two or three builders, SIGKILL at random moments, run again to the end: the cache of an undisturbed run, bit for bit."""
    rng = random.Random(0)
    reference = file_bytes(build(tmp_path / "reference", images(23)))
    kills, builds = 0, 0
    while kills < counted.of(20, 200):
        folder = tmp_path / str(builds)
        for _ in range(rng.randint(1, 4)):
            rivals = [_spawn(folder, 23, pause=0.004) for _ in range(rng.choice([2, 3]))]
            time.sleep(rng.uniform(0.0, 0.12))
            for rival in rivals:
                rival.kill()
            for rival in rivals:
                rival.join()
                assert rival.exitcode in (0, -signal.SIGKILL)
                kills += rival.exitcode == -signal.SIGKILL
            if (folder / "t.zarr").exists():
                open_cache(folder / "t.zarr")
        finisher = _spawn(folder, 23)
        finisher.join()
        assert finisher.exitcode == 0
        assert file_bytes(folder / "t.zarr") == reference
        builds += 1
    counted.say(f"{kills} SIGKILLs in {builds} builds: 0 differences, 0 repairs by hand")


@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("layout")
def test_rivals_whose_arithmetic_differs_make_one_valid_cache(tmp_path: Path, counted: Counted) -> None:
    noises = [0.0, 3e-7, 6e-7]
    runs, mixed = counted.of(10, 100), 0
    for run in range(runs):
        folder = tmp_path / str(run)
        rivals = [_spawn(folder, 23, noise, pause=0.01) for noise in noises]  # long enough to compete on busy cores
        for rival in rivals:
            rival.join()
        assert [rival.exitcode for rival in rivals] == [0, 0, 0]
        cache = require_all_right(folder / "t.zarr", images(23), noises)
        rows = {one.key: cache.row(one.key) for one in images(23)}
        mixed += len({cache.record("global_descriptors", row)[0] / targets_of(key)[2][0] for key, row in rows.items()}) > 1
    assert mixed, "otherwise nobody competed, and the test shows nothing"
    counted.say(f"{runs} builds by 3 builders that differ in the last bit ({mixed} with shards of several): 0 fail verification")


def _reader(folder: Path, seed: int, reads: int, results: Any) -> None:
    rng = np.random.default_rng(seed)
    right, typed, wanted = 0, 0, images(40)
    while right < reads:
        try:
            cache = open_cache(folder / "t.zarr")
            for _ in range(30):
                require_right(cache, wanted[rng.integers(len(wanted))].key)
                right += 1
            cache.close()
        except CacheError:
            typed += 1
            time.sleep(0.002)
    results.put((right, typed))


@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("layout")
def test_readers_beside_builders_growth_and_removal_see_right_rows_or_typed_errors(tmp_path: Path, counted: Counted) -> None:
    results = fork.Queue()
    readers = [fork.Process(target=_reader, args=(tmp_path, seed, counted.of(500, 5000), results)) for seed in range(2)]
    for reader in readers:
        reader.start()
    generations, count = 0, 3
    while any(reader.is_alive() for reader in readers):
        builder = _spawn(tmp_path, count, pause=0.0005)
        builder.join()
        assert builder.exitcode == 0
        generations += 1
        count += 5
        if count > 60:  # somebody cleans up under the readers
            shutil.rmtree(tmp_path / "t.zarr")
            shutil.rmtree(tmp_path / "work")
            count = 3
        time.sleep(0.05)
    for reader in readers:
        reader.join()
        assert reader.exitcode == 0, "a reader saw a wrong row, or an error of another type"
    right, typed = (sum(values) for values in zip(*(results.get(timeout=10) for _ in readers), strict=True))
    assert right >= 1000 and typed > 0 and generations > 3
    counted.say(f"readers beside {generations} generations, with removal: {right} right rows, {typed} typed errors, 0 wrong rows")


CALLS = ("open", "write", "fsync", "link", "rename", "replace", "mkdir")


class Fault:
    """Lets the n-th of one kind of system call fail, of the calls that touch the cache: with this error, or the process dies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str, nth: int, code: int | None) -> None:
        self.count = 0
        calls = itertools.count(1)  # some calls come from several threads
        original = getattr(os, call)

        def maybe(*args: Any, **kwargs: Any) -> Any:
            if call == "open" and not args[1] & os.O_CREAT:
                return original(*args, **kwargs)
            self.count = number = next(calls)
            if number == nth:
                if call == "write":
                    original(args[0], bytes(args[1])[: len(args[1]) // 2])  # half of it was written
                if code is None:
                    os._exit(9)
                raise OSError(code, os.strerror(code))
            return original(*args, **kwargs)

        monkeypatch.setattr(os, call, maybe)


def build_and_grow(folder: Path, call: str, nth: int, code: int | None) -> int:
    """With a fault; returns how many such calls there were."""
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, call, nth, code)
        try:
            build(folder, images(6))
            build(folder, images(9))
        except OSError as error:
            assert error.errno == code
        except CacheError:
            assert 0 < nth <= fault.count
        else:
            assert nth < 0 or call == "mkdir", "only a folder that is there already may fail to be made"
    return fault.count


def require_whole(folder: Path) -> None:
    """The output is a cache or nothing, and the next run completes it."""
    if (folder / "t.zarr").exists():
        require_all_right(folder / "t.zarr", images(6))
    require_all_right(build(folder, images(9)), images(9))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("call", CALLS)
def test_every_fault_point_of_building_and_growing(tmp_path: Path, call: str, layout: Layout, counted: Counted) -> None:
    """Each call of each kind fails once; short runs take turns with the errors, and try some points of small caches. Long runs try
    each error at each point."""
    errors = [errno.ENOSPC, errno.EIO, errno.EDQUOT]
    total, tried = build_and_grow(tmp_path / "counting", call, -1, None), 0
    assert total > 0
    for nth in range(1, total + 1, counted.of(1 if layout == LAYOUT else 7, 1)):
        for code in counted.of(errors[nth % 3 : nth % 3 + 1], errors):
            assert build_and_grow(tmp_path / f"{nth}-{code}", call, nth, code) >= nth
            require_whole(tmp_path / f"{nth}-{code}")
            tried += 1
    counted.say(f"{call}: {tried} faults at {total} points: 0 wrong reads, {tried} reruns completed")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("call", CALLS)
def test_dying_at_every_point_of_building_and_growing(tmp_path: Path, call: str, layout: Layout, counted: Counted) -> None:
    """As power cuts and OOM killers do: no clean-up code runs."""
    total = build_and_grow(tmp_path / "counting", call, -1, None)
    points = range(1, total + 1, counted.of(3 if layout == LAYOUT else 10, 1))
    for nth in points:
        if (pid := os.fork()) == 0:
            build_and_grow(tmp_path / str(nth), call, nth, None)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        require_whole(tmp_path / str(nth))
    counted.say(f"{call}: died at {len(points)} of {total} points: 0 wrong reads, {len(points)} reruns completed")
