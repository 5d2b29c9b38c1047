"""Teacher caches at URLs: the rows of the same cache in a folder, or the same errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typer.testing import CliRunner

from caches import PROVENANCE, build, file_bytes, image, images, require_right
from mgd_pipeline.caches import remote
from mgd_pipeline.caches.format import ARRAYS
from mgd_pipeline.caches.reader import TargetCache, open_cache
from mgd_pipeline.caches.verify import Checked, verify_cache
from mgd_pipeline.errors import AccessError, CacheError, CacheIncomplete, LoaderError, MGDError, ParamsError, ProvenanceMismatch
from mgd_pipeline.words import size_text
from mgd_stages.cli import app
from object_server import SECRET, Fault, ObjectServer, dropping, failing, serving, waiting

pytest.importorskip("obstore", reason="caches at URLs are read where the extra remote is")

SHARD = "logits/c/1/0/0/0"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    """A server of a cache of 11 images. Failed requests are repeated at once."""
    build(tmp_path, images(11))
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0))
    with serving(tmp_path) as state:
        yield state


@pytest.fixture(params=["s3", "gs", "az", "http"])
def stored(request: pytest.FixtureRequest, server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A cache of 11 images, and a URL of it."""
    return server.folder / "t.zarr", server.url(request.param, "t.zarr", monkeypatch)


def test_a_url_reads_as_the_folder_does(stored: tuple[Path, str]) -> None:
    path, url = stored
    local, away = open_cache(path), open_cache(url, PROVENANCE)
    rows = [away.row(wanted.key) for wanted in images(11)]
    for row in (*rows[:2], *rows[-2:]):
        assert all(local.record(name, row).tobytes() == away.record(name, row).tobytes() for name in ARRAYS)
    for order in (rows, rows[::-1], rows[3:4], [5, 5], []):
        for mine, theirs in zip(local.read(order), away.read(order), strict=True):
            assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
    require_right(away, image(3).key)
    away.close()
    with pytest.raises(CacheIncomplete, match="row 11 has no targets"):
        away.read([0, 11])
    with pytest.raises(ProvenanceMismatch, match=r"teacher\.encoder: the cache has 'resnet18'"):
        open_cache(url, {"teacher": {"encoder": "resnet50"}})


def flipped(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("commit.json", None, "t.zarr: does not exist, or is not finished"),
        ("commit.json", flipped, "commit.json: damaged"),
        ("images.parquet", flipped, "images.parquet: differs from what was committed"),
        ("images.parquet", None, "images.parquet: cannot be read"),
        ("zarr.json", lambda data: data + b" ", "zarr.json: has .* bytes, not"),
        (SHARD, None, f"{SHARD}: cannot be read: is missing"),
        (SHARD, lambda data: data[:-1], f"{SHARD}: has .* bytes, not"),
        (SHARD, lambda data: data[:9], f"{SHARD}: is shorter than it was committed"),
        (SHARD, flipped, f"{SHARD}: logits of row 4 .* is damaged"),
        (SHARD, lambda data: data[:-1] + b"?", f"{SHARD}: the shard's index is damaged"),
    ],
)
def test_damage_is_an_error(
    server: ObjectServer,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: Callable[[bytes], bytes] | None,
    message: str,
) -> None:
    put(server.folder / "t.zarr" / name, None if change is None else change((server.folder / "t.zarr" / name).read_bytes()))
    with pytest.raises(CacheError, match=message):
        open_cache(server.url("s3", "t.zarr", monkeypatch)).read([0, 4])


def put(file: Path, data: bytes | None) -> None:
    file.unlink()
    if data is not None:
        file.write_bytes(data)


def test_what_is_replaced_later_is_an_error(stored: tuple[Path, str]) -> None:
    """A URL leads to another object at any time, so checksums are compared each time."""
    path, url = stored
    cache = open_cache(url)
    cache.read([4, 5])
    put(path / SHARD, (path / "logits/c/0/0/0/0").read_bytes())
    with pytest.raises(CacheError, match=r"row 4 .* belongs to another place"):
        cache.read([4, 5])
    put(path / SHARD, None)
    with pytest.raises(CacheError, match=f"{SHARD}: cannot be read"):
        cache.read([4, 5])


@pytest.mark.parametrize("fault", [failing(500, 2), failing(503, 2), failing(429, 2), dropping(2), dropping(2, after=0.5)])
def test_failures_that_pass_change_nothing(server: ObjectServer, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    server.faults.append(fault)
    require_right(open_cache(server.url("s3", "t.zarr", monkeypatch)), image(3).key)


def test_a_server_that_is_slow_is_asked_again(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_SECONDS", 0.2)
    server.faults.append(waiting(0.6, 1, "images.parquet"))
    require_right(open_cache(server.url("s3", "t.zarr", monkeypatch)), image(3).key)
    assert server.count("images.parquet") == 2


@pytest.mark.parametrize(
    ("kind", "fault", "reason", "calls"),
    [
        ("s3", failing(500, 99), "cannot be read now (the server answers 500 Internal Server Error)", 3),
        ("az", dropping(99), "cannot be read now (HTTP error: error sending request)", 3),
        ("gs", dropping(99, after=0.5), "cannot be read now (HTTP error", 3),
        ("http", failing(403, 99), "you may not read it (the server answers 403 Forbidden)", 1),
        ("s3", failing(403, 99), "you may not read it (the server answers 403 Forbidden)", 1),
        ("az", failing(403, 99), "you may not read it (the server answers 403 Forbidden)", 1),
        ("gs", failing(400, 99), "cannot be read now (the server answers 400 Bad Request)", 1),
    ],
)
def test_failures_that_stay_are_an_error_with_url_and_reason(
    server: ObjectServer, monkeypatch: pytest.MonkeyPatch, kind: str, fault: Fault, reason: str, calls: int
) -> None:
    url = server.url(kind, "t.zarr", monkeypatch)
    cache = open_cache(url)
    server.faults.append(fault)
    before = server.count(SHARD)
    with pytest.raises(AccessError) as raised:
        cache.record("logits", 4)
    assert str(raised.value).startswith(f"{url}/{SHARD}: {reason}")
    assert SECRET not in str(raised.value) and server.count(SHARD) - before == calls


def test_no_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_WAITS", (0.0,))
    with pytest.raises(AccessError, match=r"http://127\.0\.0\.1:9/t\.zarr/commit\.json: cannot be read now"):
        open_cache("http://127.0.0.1:9/t.zarr")


def test_a_server_without_ranges_gives_no_single_images(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.ranges = False
    cache = open_cache(server.url("http", "t.zarr", monkeypatch))
    with pytest.raises(CacheError, match=r"the server gives whole files only.*--cache-from"):
        cache.read([0])


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("nowhere://bucket/t.zarr", CacheError, "nowhere://bucket/t.zarr: is not a URL of a teacher cache"),
        ("s3://", CacheError, "is not a URL of a teacher cache"),
        (f"https://anna:{SECRET}@lab.example/t.zarr", ParamsError, "https://lab.example/t.zarr: the URL holds more than a place"),
        (f"https://lab.example/t.zarr?sig={SECRET}", ParamsError, "https://lab.example/t.zarr: the URL holds more than a place"),
    ],
)
def test_urls_that_are_refused(url: str, error: type[MGDError], message: str) -> None:
    """Without a request, and without a word of the key."""
    with pytest.raises(error) as raised:
        open_cache(url)
    assert message in str(raised.value) and SECRET not in str(raised.value)


def test_a_url_of_a_file_is_a_folder(tmp_path: Path) -> None:
    require_right(open_cache(build(tmp_path, images(3)).as_uri()), image(2).key)


def test_how_many_requests_are_made(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/design/scale.md reckons with these."""
    remote.counter.take()
    cache = open_cache(server.url("s3", "t.zarr", monkeypatch))
    assert server.count() == 9, "the commit and its size, the group, the index of rows, five arrays"
    cache.read([0])
    assert server.count() == 9 + 8, "in four arrays the index of the shard and the record"
    cache.read([1, 2, 3])
    assert server.count() == 9 + 8 + 12, "the records"
    assert remote.counter.take() == (29, sum(size for _, size in server.sent))


def test_a_real_protocol(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto answers as S3 does, with its errors."""
    import obstore
    from obstore.store import from_url

    keys = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1", "ENDPOINT_URL": s3_server}
    for name, value in {**{f"AWS_{name}": value for name, value in keys.items()}, "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    path, url = build(tmp_path, images(11)), f"s3://lab/{tmp_path.name}/t.zarr"
    bucket = from_url(url, client_options={"allow_http": True})
    for name, data in file_bytes(path).items():
        obstore.put(bucket, name, data)
    require_right(open_cache(url, PROVENANCE), image(3).key)
    with pytest.raises(CacheIncomplete, match=r"s3://lab/nothing\.zarr: does not exist, or is not finished"):
        open_cache("s3://lab/nothing.zarr")


# --- the tools


def checked(path: Path | str, share: float) -> tuple[list[str], Checked]:
    """The lines of `verify_cache` without the cache's place, and what was checked."""
    lines: list[str] = []
    done = verify_cache(path, share, lines.append)
    return [line.removeprefix(f"{path}/") for line in lines], done


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_verify_sees_at_a_url_what_it_sees_in_a_folder(stored: tuple[Path, str], server: ObjectServer, share: float) -> None:
    path, url = stored
    lines, done = checked(url, share)
    assert not lines and done == checked(path, share)[1] and done.files == done.hashed + (0 if share == 1 else 15)
    sent = [(name, size) for name, size in server.sent if "/c/" in name and size]
    if share == 0:
        assert not sent, "sizes cost no bytes"
    if share == 1:
        assert len(sent) == len({name for name, _ in sent}) == 15, "each shard is read once"


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        (SHARD, None),
        (SHARD, lambda data: data[:-1]),
        (SHARD, flipped),
        (SHARD, lambda data: data[:-1] + b"?"),
        ("extents/c/0/0", lambda data: data + b"?"),
        ("images.parquet", flipped),
        ("logits/zarr.json", None),
    ],
)
def test_verify_names_at_a_url_what_is_damaged(
    server: ObjectServer, monkeypatch: pytest.MonkeyPatch, share: float, name: str, change: Callable[[bytes], bytes] | None
) -> None:
    url = server.url("s3", "t.zarr", monkeypatch)
    put(server.folder / "t.zarr" / name, None if change is None else change((server.folder / "t.zarr" / name).read_bytes()))
    lines, _ = checked(url, share)
    local = {line.split(": ")[0] for line in checked(server.folder / "t.zarr", share)[0]} - {"no record was checked"}
    assert local == {line.split(": ")[0] for line in lines} - {"no record was checked"} and local in (set(), {name})
    if change is flipped and "/c/" in name and share == 1:
        assert [line.split(" (")[0] for line in lines] == [
            f"{name}: differs from what was committed", f"{name}: logits of row 4"
        ]  # fmt: skip
    assert len(lines) == len(set(lines)), "a damaged index is named once"


def test_the_commands_take_urls(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["cache", *arguments])
        assert done.exit_code == code, done.output
        return done.output

    monkeypatch.chdir(server.folder)
    url = server.url("http", "t.zarr", monkeypatch)
    size = size_text(sum(map(len, file_bytes(Path("t.zarr")).values())))
    assert f"{url}, {size}\n" in call("info", url) and f"{url}  " in (listed := call("list", url)) and size in listed
    assert "the same teacher, the same images, the same targets" in call("diff", url, "t.zarr")
    server.calls.clear()
    server.sent.clear()
    (facts,) = json.loads(call("verify", url, "--full", "--json"))
    assert (facts["requests"], facts["bytes_read"]) == (len(server.calls), sum(size for _, size in server.sent))
    assert facts["records"] == 55 and "no damage found" in call("verify", url) and "requests, " in call("verify", url, "--quick")
    server.ranges = False
    assert f"error: {url}: the server gives whole files only, and a sample needs parts; call with --full" in call(
        "verify", url, code=7
    )
    assert "checksums of 55 records compared" in call("verify", "--full", url)
    server.faults.append(failing(500, 99, "/c/"))
    assert call("verify", "--full", url, code=7).count("cannot be read now (the server answers 500") == 10, "then it gives up"
    server.faults[:] = [failing(403, 99, "extents/c/1")]
    assert f"{url}/extents/c/1/0: you may not read it" in call("verify", "--full", url, code=7)
    (server.folder / "t.zarr/commit.json").unlink()
    assert "does not exist, or is not finished" in call("verify", url, code=4)
    assert "cannot be read: CacheIncomplete; `mgd-pipeline cache verify http" in call("list", url)
    assert SECRET not in call("info", url.replace("//", f"//anna:{SECRET}@"), code=2)


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


def test_workers_read_a_cache_that_another_process_opened(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = server.url("s3", "t.zarr", monkeypatch)
    here, expected = Logits(open_cache(url)), Logits(open_cache(server.folder / "t.zarr"))
    assert torch.equal(here[0], expected[0]), "its connections are open"
    for workers in (1, 0):
        (seen,) = DataLoader(here, 2, num_workers=workers, multiprocessing_context="spawn" if workers else None)
        assert torch.equal(seen, torch.stack([expected[0], expected[1]]))


def test_a_forked_process_says_that_it_cannot_read(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for ever."""
    here = Logits(open_cache(server.url("s3", "t.zarr", monkeypatch)))
    with pytest.raises(LoaderError, match='multiprocessing_context="spawn"'):
        next(iter(DataLoader(here, 2, num_workers=1, multiprocessing_context="fork")))
