"""Damaged and hostile caches: a typed error or the identical bytes, never zeros, a neighbour's row, code or gigabytes."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from numcodecs.zstd import compress
from zarr.codecs import BytesCodec, ZstdCodec

from caches import LAYOUT, SMALL, build, file_bytes, images
from conftest import Counted
from mgd_pipeline.caches import shard_reader
from mgd_pipeline.caches import shards as cache_shards
from mgd_pipeline.caches.format import ARRAYS, COMMIT, INDEX, array_metadata, canonical, sealed
from mgd_pipeline.caches.frames import holds
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.errors import CacheError

pytestmark = pytest.mark.filterwarnings("ignore:Object at .* is not recognized as a component of a Zarr hierarchy")
ROWS, SHARD = 11, "logits/c/0/0/0/0"


@pytest.fixture(scope="module", params=[LAYOUT, SMALL], ids=["plain", "small"])
def original(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return build(tmp_path_factory.mktemp("original"), images(ROWS), layout=request.param)


def private_copy(original: Path, place: Path) -> Path:
    """A copy whose files may be changed."""
    for path in shutil.copytree(original, place).rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return place


@pytest.fixture
def cache(original: Path, tmp_path: Path) -> Path:
    return private_copy(original, tmp_path / "t.zarr")


def read_everything(path: Path) -> list[np.ndarray]:
    cache = open_cache(path)
    rows = [cache.row(image.key) for image in images(ROWS)]
    return [cache.record(name, row) for row in rows for name in cache.layout.records]


def is_noticed(cache: Path, truth: list[np.ndarray]) -> bool:
    """True for a typed error, False if every row is still right; anything else fails the test."""
    try:
        records = read_everything(cache)
    except CacheError:
        return True
    assert all(a.tobytes() == b.tobytes() for a, b in zip(records, truth, strict=True)), "silently wrong"
    return False


def is_shard(path: Path) -> bool:
    return "c" in path.parts[-6:-1]


def hole(file: Path, _: list[Path], rng: random.Random) -> None:
    """4 KiB that a power cut left zero."""
    data = bytearray(file.read_bytes())
    start = rng.randrange(len(data))
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    file.write_bytes(data)


def swapped(file: Path, others: list[Path], rng: random.Random) -> None:
    """Two whole, valid shards of one array in each other's place: only the index knows."""
    other = rng.choice([path for path in others if path != file and path.parts[-6:-4] == file.parts[-6:-4]] or [file])
    data = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(data)


def flipped(file: Path, _: list[Path], rng: random.Random) -> None:
    """One bit."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path, list[Path], random.Random], object]] = {
    "flipped": flipped,
    "truncated": lambda file, _, rng: os.truncate(file, rng.randrange(file.stat().st_size)),
    "empty": lambda file, *_: os.truncate(file, 0),
    "deleted": lambda file, *_: file.unlink(),
    "dangling": lambda file, *_: (file.unlink(), file.symlink_to(file.with_name("nowhere"))),
    "zeroed": lambda file, *_: file.write_bytes(bytes(file.stat().st_size)),
    "hole": hole,
    "swapped": swapped,
}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("damage", "kind"), [*((damage, "shards") for damage in DAMAGES), ("flipped", "control files"), ("truncated", "control files")]
)
@pytest.mark.parametrize("whole", [0, 2**14], ids=["in place", "whole"])
def test_damage_is_a_typed_error(
    cache: Path, damage: str, kind: str, whole: int, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records are read one by one from open files, as those of large shards are, or from small files that were read whole."""
    monkeypatch.setattr(shard_reader, "_WHOLE", whole)
    rng = random.Random(0)
    truth, before = read_everything(cache), file_bytes(cache)
    files = [path for path in sorted(cache.rglob("*")) if path.is_file() and is_shard(path) == (kind == "shards")]
    sizes = [path.stat().st_size if damage == "flipped" else 1 for path in files]
    times, noticed = counted.of(100, 1000) if damage == "flipped" else counted.of(9, 100), 0
    for _ in range(times):
        DAMAGES[damage](rng.choices(files, sizes)[0], files, rng)
        noticed += is_noticed(cache, truth)
        for name, data in before.items():
            if not (cache / name).is_file() or (cache / name).read_bytes() != data:
                (cache / name).unlink(missing_ok=True)
                (cache / name).write_bytes(data)
    # Nearly every byte is checked: only unused entries of an index may flip unnoticed.
    assert noticed >= (0.95 if damage == "flipped" else 0.51) * times
    counted.say(f"{times} {kind} {damage}: {noticed} typed errors, {times - noticed} without effect, 0 silent")


def test_links_within_the_cache_are_followed_and_links_out_of_it_refused(cache: Path, tmp_path: Path) -> None:
    """Links into a DVC cache are followed, too (`test_cache_build.py`)."""
    for number, what in enumerate((SHARD, "logits/c/0")):
        os.rename(cache / what, tmp_path / f"outside {number}")
        (cache / what).symlink_to(tmp_path / f"outside {number}")
        with pytest.raises(CacheError, match="is a link out of the cache"):
            open_cache(cache)
        (cache / what).unlink()
        os.rename(tmp_path / f"outside {number}", cache / what)
    (tmp_path / "other.zarr").symlink_to(cache)
    os.rename(cache / SHARD, cache / "logits/c/0/0/0/real")
    (cache / SHARD).symlink_to("real")
    read_everything(tmp_path / "other.zarr")


def write_commit(cache: Path, **changes: Any) -> None:
    commit = {**json.loads((cache / COMMIT).read_text()), **changes}
    commit.pop("self")
    (cache / COMMIT).write_bytes(sealed(commit))


def recommit(cache: Path) -> None:
    """Makes the commit fit whatever the files have become."""
    files = file_bytes(cache)
    files.pop(COMMIT)
    write_commit(cache, files={n: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()})


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def attack(cache: Path) -> None:
        content = json.loads((cache / name).read_text())
        change(content)
        (cache / name).write_bytes(canonical(content))
        recommit(cache)

    return attack


def layout_with(**changes: Any) -> Callable[[Path], None]:
    return edit("zarr.json", lambda group: group["attributes"]["mgd"]["layout"].update(changes))


def frame(content: int, *blocks: bytes, descriptor: int = 0x60) -> bytes:
    """A frame of Zstandard by hand, whose header says that it has this many bytes of content."""
    headers = [(len(block) << 3 | (number == len(blocks) - 1)).to_bytes(3, "little") for number, block in enumerate(blocks)]
    start = b"\x28\xb5\x2f\xfd" + bytes([descriptor]) + (content - 256).to_bytes(2, "little")
    return start + b"".join(map(bytes.__add__, headers, blocks))


SIZE = SMALL.bytes_of("logits")
ONES, RLE = bytes([1]) * SIZE, (2**17 << 3 | 2).to_bytes(3, "little") + b"1"
FRAMES = {
    "two frames": compress(ONES[:-9]) + compress(ONES[-9:]),
    "a frame and an empty frame": compress(ONES) + compress(b""),
    "a frame and a frame to skip": compress(ONES) + b"\x50\x2a\x4d\x18\x01\0\0\0x",
    "garbage behind a frame": compress(ONES) + b"garbage",
    "less content": compress(ONES[1:]),
    "more content": compress(ONES + b"1"),
    "a bomb": compress(bytes(2**23)),
    "a bomb that says it is a record": frame(SIZE) + RLE * 200 + b"\x01\0\0",
    "a frame that says too much": frame(SIZE, ONES[1:]),
    "a frame that says too little": frame(SIZE, ONES + b"1"),
    "a frame that does not say its content": compress(ONES)[:4] + b"\x00\x58" + compress(ONES)[7:],
    "a dictionary": frame(SIZE, b"1" + ONES, descriptor=0x61),
    "a checksum": frame(SIZE, ONES, descriptor=0x64) + bytes(4),
    "truncated": compress(ONES)[:-3],
    "no frame": b"1" * 50,
    "nothing": b"",
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_record_is_one_frame_of_its_content(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frames have right checksums in a cache that was built with them, as a hostile program would build it."""
    hostile = FRAMES[name]
    made = iter([compress, lambda data, level: hostile])
    monkeypatch.setattr(cache_shards, "compress", lambda data, level: (next(made) if len(data) == SIZE else compress)(data, level))
    cache = open_cache(build(tmp_path, images(2), layout=SMALL))
    assert cache.record("logits", 0).size == SIZE
    for read in (lambda: cache.record("logits", 1), lambda: cache.read([0, 1])):
        with pytest.raises(CacheError, match=r"logits of row 1 \(image 'image 1'\): is (not one frame|missing)"):
            read()


def test_frames_of_every_size_are_known() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 255, 256, 257, 65791, 65792, 2**17, 2**17 + 1, 300_000):
        for content in (bytes(size), rng.bytes(size), rng.integers(3, size=size, dtype=np.uint8).tobytes()):
            stored, layout = compress(content, 1), replace(SMALL, classes=1, height=4, width=4 * size)
            assert holds(stored, size) and len(stored) + 4 in layout.stored_sizes("logits")
            assert not any(holds(stored, other) for other in (size - 1, size + 1, size + 256))
            assert not any(holds(stored[:end], size) for end in {*range(9), len(stored) - 1})
            assert not holds(stored + b"0", size)


class Canary:
    """A pickle that leaves a file behind when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch canary",))


def zarr_v2(cache: Path) -> None:
    """This one ran code in zarr 3.1.6 with numcodecs before 0.16.6."""
    shutil.rmtree(cache / "logits")
    (cache / "logits").mkdir()
    meta = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": None, "order": "C", "compressor": None}
    meta["filters"] = [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 5}]
    (cache / "logits/.zarray").write_text(json.dumps(meta))
    (cache / "logits/0").write_bytes(pickle.dumps(Canary()))
    (cache / ".zgroup").write_text('{"zarr_format": 2}')
    recommit(cache)


def zstd_bomb(cache: Path) -> None:
    """4 KB that become 128 MiB, in a codec that mgd-pipeline does not write."""
    shutil.rmtree(cache / "logits")
    shape = (1, 2**27)
    array = zarr.create_array(
        cache / "logits", shape=shape, chunks=shape, dtype="uint8", serializer=BytesCodec(), compressors=[ZstdCodec()]
    )
    array[:] = np.ones(shape, np.uint8)
    recommit(cache)


def many_rows(cache: Path) -> None:
    table = pq.read_table(cache / INDEX)
    rows = table.set_column(0, table.schema.field("row"), pa.array([*range(ROWS - 1), 2**39], pa.int64()))
    pq.write_table(rows, cache / INDEX, compression="none", use_dictionary=False)
    recommit(cache)


def index_bomb(cache: Path) -> None:
    """A few kilobytes that become gigabytes of ids."""
    names = pq.read_table(cache / INDEX).column_names
    ids = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3000, np.int32)), pa.array(["x" * 1_000_000]))
    table = pa.table({name: ids if name == "image_id" else pa.array(np.zeros(3000)) for name in names})
    pq.write_table(table, cache / INDEX, compression="zstd")
    recommit(cache)


def deep_json(cache: Path) -> None:
    (cache / "zarr.json").write_text("[" * 100_000)
    recommit(cache)


def large_json(cache: Path) -> None:
    os.truncate(cache / "zarr.json", 2**36)  # sparse: reading it would take 64 GiB


def sparse_shard(cache: Path) -> None:
    """A record of a terabyte that takes no disk."""
    layout_with(height=2**20, width=2**20, classes=4, stride=1)(cache)
    for name in ARRAYS:
        (cache / name / "zarr.json").write_bytes(array_metadata(LAYOUT, name, ROWS))
    os.truncate(cache / SHARD, 2**42)
    files = json.loads((cache / COMMIT).read_text())["files"]
    write_commit(cache, files={**files, SHARD: {**files[SHARD], "size": 2**42}})


def outside(cache: Path) -> None:
    files = json.loads((cache / COMMIT).read_text())["files"]
    write_commit(cache, files={**files, "../../../../../../etc/hostname": {"size": 1, "sha256": ""}})


def other_names(cache: Path) -> None:
    """A file of two gigabytes that takes no disk, under a name of which the reader asks for the whole content."""
    (cache / "other").mkdir()
    with open(cache / "other" / INDEX, "wb") as file:
        file.truncate(2**31)
    write_commit(
        cache, files={**json.loads((cache / COMMIT).read_text())["files"], f"other/{INDEX}": {"size": 2**31, "sha256": ""}}
    )


def fifo(name: str) -> Callable[[Path], None]:
    return lambda cache: ((cache / name).unlink(), os.mkfifo(cache / name))[1]


HOSTILE: dict[str, Callable[[Path], object]] = {
    "zarr v2": zarr_v2,
    "codec pickle": edit("logits/zarr.json", lambda meta: meta.update(codecs=[{"name": "numcodecs.pickle", "configuration": {}}])),
    "object dtype": edit("logits/zarr.json", lambda meta: meta.update(data_type="object")),
    "object encoding": layout_with(encoding="object"),
    "absurd shape": layout_with(height=2**20, width=2**20, classes=2**30),
    "negative shape": layout_with(stride=-4),
    "absurd rows per shard": layout_with(rows_per_shard=2**30),
    "zstd bomb": zstd_bomb,
    "many rows": many_rows,
    "index bomb": index_bomb,
    "deep json": deep_json,
    "large json": large_json,
    "sparse shard": sparse_shard,
    "outside": outside,
    "other names": other_names,
    "fifo": fifo(SHARD),
    "fifo commit": fifo(COMMIT),
    "strange commit": lambda cache: write_commit(cache, generation={"a": [None]}, shards="x"),
    "strange notes": lambda cache: write_commit(cache, shards=[{"rows": 4, "made_by": {}, "fidelity": {"kl": "much"}}]),
}

OPEN = """
import sys
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.errors import CacheError
for path in sys.argv[1:]:
    try:
        cache = open_cache(path)
        for row in cache.index.rows:
            for name in cache.layout.records:
                cache.record(name, row)
        print("read", path)
    except CacheError as error:
        print("refused", path, error)
"""


@pytest.mark.timeout(120)
def test_hostile_caches_run_no_code_in_bounded_memory(original: Path, tmp_path: Path, counted: Counted) -> None:
    """Beside a cache that the tools of the attacks have left unchanged, which is read."""
    attacks = {"unchanged": edit("zarr.json", lambda group: None), **HOSTILE}
    for name, attack in attacks.items():
        attack(private_copy(original, tmp_path / name))
    done = subprocess.run(
        [sys.executable, "-c", OPEN, *attacks],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30)),
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "read unchanged" and len(said) == len(attacks)
    for name, line in zip(HOSTILE, said[1:], strict=True):
        assert line.startswith(f"refused {name} {name}"), line
    assert not list(tmp_path.rglob("canary"))
    counted.say(f"{len(HOSTILE)} hostile caches: 0 ran code, 0 took more than 2 GiB")
