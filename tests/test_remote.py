"""Teacher caches at URLs: the rows of the same cache in a folder, or the same errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fsspec.core import url_to_fs
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from caches import PROVENANCE, ask_s3, build, file_bytes, image, images, require_right
from mgd_pipeline.caches.format import ARRAYS
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.errors import CacheError, CacheIncomplete, ProvenanceMismatch

SHARD = "logits/c/1/0/0/0"


@pytest.fixture(params=["memory", "s3"])
def stored(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A cache of 11 images, and the URL of a copy."""
    path, url = build(tmp_path, images(11)), f"{request.param}://lab/{tmp_path.name}/t.zarr"
    if request.param == "s3":
        ask_s3(monkeypatch, request.getfixturevalue("s3_server"))
    filesystem, key = url_to_fs(url)
    for name, data in file_bytes(path).items():
        filesystem.makedirs(f"{key}/{Path(name).parent}", exist_ok=True)
        filesystem.pipe_file(f"{key}/{name}", data)
    return path, url


def test_a_url_reads_as_the_folder_does(stored: tuple[Path, str]) -> None:
    path, url = stored
    local, remote = open_cache(path), open_cache(url, PROVENANCE)
    rows = [remote.row(wanted.key) for wanted in images(11)]
    for row in (*rows[:2], *rows[-2:]):
        assert all(local.record(name, row).tobytes() == remote.record(name, row).tobytes() for name in ARRAYS)
    for order in (rows, rows[::-1], rows[3:4], [5, 5], []):
        for mine, theirs in zip(local.read(order), remote.read(order), strict=True):
            assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
    require_right(remote, image(3).key)
    remote.close()
    with pytest.raises(CacheIncomplete, match="row 11 has no targets"):
        remote.read([0, 11])
    with pytest.raises(ProvenanceMismatch, match=r"teacher\.encoder: the cache has 'resnet18'"):
        open_cache(url, {"teacher": {"encoder": "resnet50"}})


def flipped(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("commit.json", None, "t.zarr: is not finished"),
        ("commit.json", flipped, "commit.json: damaged"),
        ("images.parquet", flipped, "images.parquet: differs from what was committed"),
        ("zarr.json", lambda data: data + b" ", "zarr.json: has .* bytes, not"),
        (SHARD, None, f"{SHARD}: is missing"),
        (SHARD, lambda data: data[:-1], f"{SHARD}: has .* bytes, not"),
        (SHARD, flipped, f"{SHARD}: logits of row 4 .* is damaged"),
        (SHARD, lambda data: data[:-1] + b"?", f"{SHARD}: the shard's index is damaged"),
    ],
)
def test_damage_is_an_error(stored: tuple[Path, str], name: str, change: Callable[[bytes], bytes] | None, message: str) -> None:
    filesystem, key = url_to_fs(stored[1])
    if change is None:
        filesystem.rm_file(f"{key}/{name}")
    else:
        filesystem.pipe_file(f"{key}/{name}", change(filesystem.cat_file(f"{key}/{name}")))
    with pytest.raises(CacheError, match=message):
        open_cache(stored[1]).read([0, 4])


def test_what_is_replaced_later_is_an_error(stored: tuple[Path, str]) -> None:
    """A URL leads to another object at any time, so checksums are compared each time."""
    filesystem, key = url_to_fs(stored[1])
    cache = open_cache(stored[1])
    cache.read([4, 5])
    shards = [filesystem.cat_file(f"{key}/logits/c/{number}/0/0/0") for number in (0, 1)]
    filesystem.pipe_file(f"{key}/{SHARD}", shards[0])
    with pytest.raises(CacheError, match=r"row 4 .* belongs to another place"):
        cache.read([4, 5])
    filesystem.rm_file(f"{key}/{SHARD}")
    with pytest.raises(CacheError, match=f"{SHARD}: cannot be read"):
        cache.read([4, 5])


def test_what_is_no_cache_is_an_error() -> None:
    with pytest.raises(CacheIncomplete, match=r"memory://.*nothing\.zarr: does not exist"):
        open_cache("memory://nothing.zarr")
    with pytest.raises(CacheError, match="Protocol not known: nowhere"):
        open_cache("nowhere://bucket/t.zarr")


def test_how_many_requests_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/design/scale.md reckons with these."""
    path, url = build(tmp_path, images(11)), f"memory://{tmp_path.name}/t.zarr"
    filesystem, key = url_to_fs(url)
    filesystem.put(f"{path}/", key, recursive=True)
    calls: list[str] = []
    original = type(filesystem).cat_file
    monkeypatch.setattr(
        type(filesystem), "cat_file", lambda self, path, **limits: (calls.append(path), original(self, path, **limits))[1]
    )
    cache = open_cache(url)
    assert len(calls) == 8, "the commit, the group, the index of rows, five arrays"
    calls.clear()
    cache.read([0])
    assert len(calls) == 8, "in four arrays the index of the shard and the record"
    calls.clear()
    cache.read([1, 2, 3])
    assert len(calls) == 12, "the records"


def test_the_arithmetic_of_scale_md(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs/design/scale.md").read_text()
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out == page.split("```text\n")[1].split("```")[0]


class Logits(Dataset[Tensor]):
    def __init__(self, cache: TargetCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return self.cache[f"image {index}"].sample([[1, 0, 0], [0, 1, 0]], (4, 5)).values


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_a_cache_that_another_process_opened(stored: tuple[Path, str], start: str) -> None:
    store, url = stored
    if url.startswith("memory") and start == "spawn":
        pytest.skip("no other process has this memory")
    here, expected = Logits(open_cache(url)), Logits(open_cache(store))
    assert torch.equal(here[0], expected[0]), "its connections are open"
    for workers in (1, 0):
        (seen,) = DataLoader(here, 2, num_workers=workers, multiprocessing_context=start if workers else None)
        assert torch.equal(seen, torch.stack([expected[0], expected[1]]))
