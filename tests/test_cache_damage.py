"""Damaged and hostile stores: a typed error or the identical bytes, never zeros, a neighbour's row, code or gigabytes."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from zarr.codecs import BytesCodec, ZstdCodec

from caches import LAYOUT, build, file_bytes, images
from conftest import Counted
from mgd_pipeline.caches import reader as cache_module
from mgd_pipeline.caches.format import ARRAYS, COMMIT, INDEX, array_metadata, sealed, sha256_file
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.errors import CacheError

pytestmark = pytest.mark.filterwarnings("ignore:Object at .* is not recognized as a component of a Zarr hierarchy")
ROWS = 11


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("original"), images(ROWS))


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """A private copy whose files may be changed."""
    copy = tmp_path / "t.zarr"
    shutil.copytree(original, copy)
    for path in copy.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return copy


def read_everything(path: Path) -> list[np.ndarray]:
    cache = open_cache(path)
    try:
        rows = [cache.row(image.key) for image in images(ROWS)]
        return [cache.record(name, row) for row in rows for name in ARRAYS]
    finally:
        cache.close()


def is_noticed(store: Path, truth: list[np.ndarray]) -> bool:
    """True for a typed error, False where every row is still right; anything else fails the test."""
    try:
        found = read_everything(store)
    except CacheError:
        return True
    assert all(a.tobytes() == b.tobytes() for a, b in zip(found, truth, strict=True)), "silently wrong"
    return False


def is_shard(path: Path) -> bool:
    return "c" in path.parts[-6:-1]


# --- accidents ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0, 2**14], ids=["in place", "whole"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records read one by one from open files, as those of large shards are, or from small files that were read whole."""
    monkeypatch.setattr(cache_module, "_WHOLE", request.param)


@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("kind", ["shards", "control files"])
def test_random_bit_flips(store: Path, kind: str, counted: Counted) -> None:
    rng = np.random.default_rng(0)
    truth = read_everything(store)
    files = [path for path in sorted(store.rglob("*")) if path.is_file() and is_shard(path) == (kind == "shards")]
    sizes = np.array([path.stat().st_size for path in files])
    flips, noticed = counted.of(100, 1000), 0
    for _ in range(flips):
        path = files[rng.choice(len(files), p=sizes / sizes.sum())]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        noticed += is_noticed(store, truth)
        path.write_bytes(good)
    assert noticed >= 0.95 * flips, "nearly every byte is checked; only unused entries of an index may flip unnoticed"
    counted.say(f"{flips} bit flips in {kind}: {noticed} typed errors, {flips - noticed} harmless, 0 silent")


def test_without_checksums_flips_are_silent(tmp_path: Path) -> None:
    """The naive variant beside it: zarr's default compression notices few of them (reliability.md 2c: 635 of 1,000 silent)."""
    values = np.random.default_rng(0).normal(size=(4, 5, 16, 24)).astype(np.float16)
    array = zarr.create_array(tmp_path / "a", shape=values.shape, chunks=values.shape, dtype="float16")
    array[:] = values
    file = tmp_path / "a/c/0/0/0/0"
    good, rng, silent = file.read_bytes(), np.random.default_rng(0), 0
    for _ in range(50):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        file.write_bytes(bad)
        with contextlib.suppress(RuntimeError, ValueError):
            silent += not np.array_equal(np.asarray(zarr.open_array(tmp_path / "a", mode="r")), values)
    assert silent > 10


def truncated(file: Path, others: list[Path], rng: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])


def empty(file: Path, others: list[Path], rng: random.Random) -> None:
    file.write_bytes(b"")


def deleted(file: Path, others: list[Path], rng: random.Random) -> None:
    file.unlink()


def dangling(file: Path, others: list[Path], rng: random.Random) -> None:
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


def hole(file: Path, others: list[Path], rng: random.Random) -> None:
    """4 KiB that a power cut left zero."""
    data = bytearray(file.read_bytes())
    start = rng.randrange(len(data))
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    file.write_bytes(data)


def zeroed(file: Path, others: list[Path], rng: random.Random) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def swapped(file: Path, others: list[Path], rng: random.Random) -> None:
    """Two whole, valid shards of one array in each other's place: only the index knows."""
    other = rng.choice([path for path in others if path != file and path.parts[-6:-4] == file.parts[-6:-4]] or [file])
    data = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(data)


DAMAGES = [truncated, empty, deleted, dangling, hole, zeroed, swapped]


@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_shards(original: Path, store: Path, damage: Callable[..., None], counted: Counted) -> None:
    rng = random.Random(0)
    truth, whole = read_everything(store), file_bytes(store)
    files = [path for path in sorted(store.rglob("*")) if path.is_file() and is_shard(path)]
    times, noticed = counted.of(9, 100), 0
    for _ in range(times):
        damage(rng.choice(files), files, rng)
        noticed += is_noticed(store, truth)
        for name, data in whole.items():
            if not (store / name).is_file() or (store / name).read_bytes() != data:
                (store / name).unlink(missing_ok=True)
                (store / name).write_bytes(data)
    assert noticed > 0.5 * times
    counted.say(f"{times} shards {damage.__name__}: {noticed} typed errors, {times - noticed} without effect, 0 silent")


def test_plain_zarr_reads_fill_values_where_a_shard_is_missing(store: Path) -> None:
    """Why a commit and checksums are needed at all. Of floats, at least, the fill value is no number."""
    shutil.rmtree(store / "logits/c/0")
    shutil.rmtree(store / "logits_affine/c/0")
    group = zarr.open_group(store, mode="r")
    assert np.asarray(group["logits"])[0].max() == 0
    assert np.isnan(np.asarray(group["logits_affine"])[0]).all()


# --- links, read-only copies ----------------------------------------------------------------------------------------------


def test_links_into_a_dvc_cache_are_followed(store: Path, tmp_path: Path) -> None:
    truth = read_everything(store)
    for number, file in enumerate(sorted(path for path in store.rglob("*") if path.is_file())):
        place = tmp_path / f"cache/files/md5/{number:02x}/{number:030x}"
        place.parent.mkdir(parents=True)
        os.rename(file, place)
        file.symlink_to(place)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    assert not is_noticed(store, truth)
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["file", "folder"])
def test_other_links_out_of_the_store_are_refused(store: Path, tmp_path: Path, what: str) -> None:
    inside = store / ("logits/c/0/0/0/0" if what == "file" else "logits/c/0")
    outside = tmp_path / "outside"
    os.rename(inside, outside)
    inside.symlink_to(outside)
    with pytest.raises(CacheError, match="is a link out of the store"):
        open_cache(store)


def test_links_within_the_store_and_to_the_store_are_followed(store: Path, tmp_path: Path) -> None:
    (tmp_path / "other.zarr").symlink_to(store)
    os.rename(store / "logits/c/0/0/0/0", store / "logits/c/0/0/0/real")
    (store / "logits/c/0/0/0/0").symlink_to("real")
    read_everything(tmp_path / "other.zarr")


def test_a_read_only_store_is_read_and_not_touched(store: Path) -> None:
    """Running as root nothing binds, so times and bytes are compared as well."""
    for path in [store, *store.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in [store, *store.rglob("*")]}
    content = file_bytes(store)
    read_everything(store)
    assert before == {path: path.stat().st_mtime_ns for path in [store, *store.rglob("*")]}
    assert content == file_bytes(store)
    for path in [store, *store.rglob("*")]:
        path.chmod(0o755)


# --- hostile stores: whoever can write the files can make every hash fit ----------------------------------------------------


def recommit(store: Path, **changes: Any) -> None:
    """Makes the commit fit whatever the files have become."""
    commit = json.loads((store / COMMIT).read_text())
    files = {
        name: {"size": len(data), "sha256": sha256_file(store / name)} for name, data in file_bytes(store).items() if name != COMMIT
    }
    commit = {**commit, "files": files, **changes}
    commit.pop("self")
    (store / COMMIT).write_bytes(sealed(commit))


def edit(store: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((store / name).read_text())
    change(content)
    (store / name).write_text(json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False))
    recommit(store)


def layout_of(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda group: group["attributes"]["mgd"]["layout"].update(changes)


class Canary:
    """A pickle that leaves a file behind when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch canary",))


def zarr_v2(store: Path) -> None:
    """reliability.md 2(i): this one ran code in zarr 3.1.6 with numcodecs before 0.16.6."""
    shutil.rmtree(store / "logits")
    (store / "logits").mkdir()
    meta = {
        "zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": None, "order": "C", "compressor": None,
        "filters": [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 5}],
    }  # fmt: skip
    (store / "logits/.zarray").write_text(json.dumps(meta))
    (store / "logits/0").write_bytes(pickle.dumps(Canary()))
    (store / ".zgroup").write_text('{"zarr_format": 2}')
    recommit(store)


def codec_pickle(store: Path) -> None:
    edit(store, "logits/zarr.json", lambda meta: meta.update(codecs=[{"name": "numcodecs.pickle", "configuration": {}}]))


def object_dtype(store: Path) -> None:
    edit(store, "logits/zarr.json", lambda meta: meta.update(data_type="object"))


def object_encoding(store: Path) -> None:
    edit(store, "zarr.json", layout_of(encoding="object"))


def absurd_shape(store: Path) -> None:
    edit(store, "zarr.json", layout_of(height=2**20, width=2**20, classes=2**30))


def negative_shape(store: Path) -> None:
    edit(store, "zarr.json", layout_of(stride=-4))


def absurd_rows_per_shard(store: Path) -> None:
    edit(store, "zarr.json", layout_of(rows_per_shard=2**30))


def zstd_bomb(store: Path) -> None:
    """4 KB that become 128 MiB, in a codec that we do not write."""
    shutil.rmtree(store / "logits")
    array = zarr.create_array(
        store / "logits", shape=(1, 2**27), chunks=(1, 2**27), dtype="uint8", serializer=BytesCodec(), compressors=[ZstdCodec()]
    )
    array[:] = np.ones((1, 2**27), np.uint8)
    recommit(store)


def many_rows(store: Path) -> None:
    table = pq.read_table(store / INDEX)
    rows = table.set_column(0, table.schema.field("row"), pa.array([*range(ROWS - 1), 2**39], pa.int64()))
    pq.write_table(rows, store / INDEX, compression="none", use_dictionary=False)
    recommit(store)


def index_bomb(store: Path) -> None:
    """A few kilobytes that become gigabytes of ids."""
    table = pq.read_table(store / INDEX)
    ids = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3000, np.int32)), pa.array(["x" * 1_000_000]))
    pq.write_table(
        pa.table({name: ids if name == "image_id" else pa.array(np.zeros(3000)) for name in table.column_names}),
        store / INDEX, compression="zstd",
    )  # fmt: skip
    recommit(store)


def deep_json(store: Path) -> None:
    (store / "zarr.json").write_text("[" * 100_000)
    recommit(store)


def large_json(store: Path) -> None:
    with open(store / "zarr.json", "wb") as file:
        file.truncate(2**36)  # sparse: reading it would take 64 GiB


def sparse_shard(store: Path) -> None:
    """A record of a terabyte that takes no disk."""
    edit(store, "zarr.json", layout_of(height=2**20, width=2**20, classes=4, stride=1))
    for name in ARRAYS:
        (store / name / "zarr.json").write_bytes(array_metadata(LAYOUT, name, ROWS))
    os.truncate(store / "logits/c/0/0/0/0", 2**42)
    commit = json.loads((store / COMMIT).read_text())
    commit["files"]["logits/c/0/0/0/0"]["size"] = 2**42
    commit.pop("self")
    (store / COMMIT).write_bytes(sealed(commit))


def outside(store: Path) -> None:
    commit = json.loads((store / COMMIT).read_text())
    commit["files"]["../../../../../../etc/hostname"] = {"size": 1, "sha256": ""}
    commit.pop("self")
    (store / COMMIT).write_bytes(sealed(commit))


def fifo(store: Path) -> None:
    (store / "logits/c/0/0/0/0").unlink()
    os.mkfifo(store / "logits/c/0/0/0/0")


def fifo_commit(store: Path) -> None:
    (store / COMMIT).unlink()
    os.mkfifo(store / COMMIT)


def strange_commit(store: Path) -> None:
    recommit(store, generation={"a": [None]}, shards="x")


HOSTILE = [
    zarr_v2, codec_pickle, object_dtype, object_encoding, absurd_shape, negative_shape, absurd_rows_per_shard, zstd_bomb, many_rows,
    index_bomb, deep_json, large_json, sparse_shard, outside, fifo, fifo_commit, strange_commit,
]  # fmt: skip

OPEN = """
    import sys
    sys.path.insert(0, {tests!r})
    from mgd_pipeline.caches.reader import open_cache
    from mgd_pipeline.errors import CacheError
    try:
        cache = open_cache({store!r})
        for row in cache.index.rows:
            for name in cache.layout.records:
                cache.record(name, row)
    except CacheError as error:
        print("refused:", error)
"""


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack.__name__)
def test_hostile_stores_run_no_code_in_bounded_memory(store: Path, tmp_path: Path, attack: Callable[[Path], None]) -> None:
    attack(store)
    script = textwrap.dedent(OPEN).format(tests=str(Path(__file__).parent), store=str(store))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=limited,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused: "), done.stdout
    assert not list(tmp_path.rglob("canary"))


def test_the_hostile_stores_are_not_refused_by_accident(store: Path) -> None:
    """The tools of the attacks leave a store that nobody changed readable."""
    edit(store, "zarr.json", lambda group: None)
    read_everything(store)


def test_hostile_stores_counted(counted: Counted) -> None:
    assert len(HOSTILE) >= 12 and max(Counter(attack.__name__ for attack in HOSTILE).values()) == 1
    counted.say(f"{len(HOSTILE)} hostile stores: 0 ran code, 0 took more than 2 GiB")
