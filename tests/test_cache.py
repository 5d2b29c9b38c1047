"""The target cache: plain zarr-python is the oracle; damage is an error, never zeros or a neighbour's row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mgd_pipeline import cache as cache_module
from mgd_pipeline.cache import (
    ImageKey,
    Layout,
    begin_store,
    fingerprint,
    open_cache,
    plan_layout,
    provenance_difference,
    publish_store,
    shard_done,
    write_shard,
)
from mgd_pipeline.errors import CacheError, CacheIncomplete, NonFiniteError, ProvenanceMismatch, StaleTarget
from mgd_pipeline.targets import TARGETS_VERSION, TeacherTargets, encode_embeddings, encode_logits

PROVENANCE = {"targets_version": TARGETS_VERSION, "teacher": {"encoder": "resnet18", "weights_sha256": "ab"}, "classes": ["a", "b"]}
NAMES = ("logits", "logits_affine", "region_embeddings", "global_descriptors", "extents")


def make_targets(rng: np.random.Generator, layout: Layout, h: int, w: int) -> TeacherTargets:
    return TeacherTargets(
        (rng.normal(size=(layout.classes, h // 4, w // 4)) * 5).astype(np.float32),
        rng.normal(size=(layout.features, -(-h // 16), -(-w // 16))).astype(np.float32),
        rng.normal(size=layout.classes).astype(np.float32),
    )


def build(
    folder: Path, rows: int = 11, encoding: str = "uint8", per_shard: int = 4, seed: int = 0
) -> tuple[Path, list[TeacherTargets]]:
    """A finished store of images of two sizes; shards of `per_shard` rows."""
    layout = Layout(rows, 5, 6, 64, 96, 4, 16, encoding, per_shard)
    rng = np.random.default_rng(seed)
    extents = np.array([(60, 90, 64, 96) if i % 3 else (33, 64, 64, 64) for i in range(rows)], np.int32)
    targets = [make_targets(rng, layout, int(e[2]), int(e[3])) for e in extents]
    # Regions cover the image, not its padding.
    targets = [
        t._replace(region_embeddings=t.region_embeddings[:, : -(-e[0] // 16), : -(-e[1] // 16)])
        for t, e in zip(targets, extents, strict=True)
    ]
    keys = [ImageKey(f"image {i}", f"sha{i}") for i in range(rows)]
    begin_store(folder / "work", PROVENANCE, layout)
    for shard, places in enumerate(layout.shards()):
        part = slice(places.start, places.stop)
        write_shard(folder / "work", layout, shard, keys[part], targets[part], extents[part])
        assert shard_done(folder / "work", shard)
    publish_store(folder / "work", layout, folder / "t.zarr", keys)
    return folder / "t.zarr", targets


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path, _ = build(tmp_path)
    return path


@pytest.mark.parametrize("encoding", ["uint8", "float16"])
def test_our_reader_equals_plain_zarr_on_every_row(tmp_path: Path, encoding: str) -> None:
    path, _ = build(tmp_path, encoding=encoding)
    group = zarr.open_group(path, mode="r")
    plain = {name: np.asarray(group[name]) for name in NAMES}  # type: ignore[arg-type]
    cache = open_cache(path)
    rows = [7, 0, 10, 3, 3]
    batch = cache.read(rows)
    assert batch.logits.dtype == np.dtype(encoding)
    for name, values in zip(("logits", "logits_affine", "region_embeddings", "extents"), batch, strict=True):
        assert values.dtype == plain[name].dtype and np.array_equal(values, plain[name][rows])
    for row in range(11):
        assert np.array_equal(cache.global_descriptor(row), plain["global_descriptors"][row])


def test_stored_values_are_what_the_teacher_said(tmp_path: Path) -> None:
    path, targets = build(tmp_path)
    batch = open_cache(path).read(list(range(11)))
    for i, target in enumerate(targets):
        _, h, w = target.logits.shape
        decoded = batch.affine[i, 0] + batch.affine[i, 1] * batch.logits[i, :, :h, :w].astype(np.float32)
        assert np.abs(decoded - target.logits).max() <= np.ptp(target.logits) / 255 / 2 * 1.01
        _, r, c = target.region_embeddings.shape
        assert np.array_equal(batch.region_embeddings[i, :, :r, :c], target.region_embeddings.astype(np.float16))


def test_the_store_is_ordinary_zarr_v3_with_one_image_per_inner_chunk(store: Path) -> None:
    group = zarr.open(store, mode="r")
    assert isinstance(group, zarr.Group) and group.metadata.zarr_format == 3
    for name in NAMES:
        meta = json.loads((store / name / "zarr.json").read_text())
        sharding = meta["codecs"][0]
        assert [codec["name"] for codec in meta["codecs"]] == ["sharding_indexed"]
        assert sharding["configuration"]["chunk_shape"][0] == 1
        assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "crc32c"]
        assert sharding["configuration"]["index_location"] == "end"
        assert meta["chunk_grid"]["configuration"]["chunk_shape"][0] == 4, "the same images per shard in every array"
    assert group.attrs["mgd"]["provenance"] == PROVENANCE  # type: ignore[index]
    assert not list(store.rglob("*.partial"))


def test_the_same_targets_make_the_same_bytes(tmp_path: Path) -> None:
    first, _ = build(tmp_path / "a")
    second, _ = build(tmp_path / "b")
    contents = [{str(p.relative_to(s)): p.read_bytes() for p in s.rglob("*") if p.is_file()} for s in (first, second)]
    assert contents[0] == contents[1]


def test_shards_hold_a_power_of_two_of_images_within_the_bound() -> None:
    for rows, shard_bytes in ((1, 10**6), (5, 10**6), (1000, 10**6), (1000, 10)):
        layout = plan_layout(rows, 5, 6, 64, 96, 4, 16, "uint8", shard_bytes)
        count = layout.rows_per_shard
        assert count & (count - 1) == 0 and count < 2 * rows
        assert count == 1 or count * 5 * 16 * 24 <= shard_bytes
        assert [row for shard in layout.shards() for row in shard] == list(range(rows))


def test_fingerprint_changes_with_every_field() -> None:
    seen = {fingerprint(PROVENANCE)}
    for changed in (
        {**PROVENANCE, "targets_version": 99},
        {**PROVENANCE, "teacher": {"encoder": "resnet18", "weights_sha256": "ac"}},
        {**PROVENANCE, "classes": ["b", "a"]},
    ):
        seen.add(fingerprint(changed))
    assert len(seen) == 4
    assert fingerprint(dict(reversed(PROVENANCE.items()))) in seen, "the order of keys says nothing"


def test_differences_name_the_field_and_both_values(store: Path) -> None:
    expected = {"teacher": {"encoder": "resnet50"}, "classes": ["a", "b"]}
    difference = provenance_difference(PROVENANCE, expected)
    assert difference == ["teacher.encoder: the store has 'resnet18', the parameters say 'resnet50'"]
    with pytest.raises(ProvenanceMismatch, match=r"teacher\.encoder: the store has 'resnet18'"):
        open_cache(store, expected)


def test_another_code_version_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "TARGETS_VERSION", TARGETS_VERSION + 1)
    with pytest.raises(ProvenanceMismatch, match="targets_version"):
        open_cache(store)


def test_rows_belong_to_contents_not_to_places(store: Path) -> None:
    cache = open_cache(store)
    assert cache.row(ImageKey("image 7", "sha7")) == 7
    with pytest.raises(StaleTarget, match="image 7"):
        cache.row(ImageKey("image 7", "sha8"))
    with pytest.raises(CacheIncomplete, match="no targets for image 'other'"):
        cache.row(ImageKey("other", "sha7"))


def test_an_unfinished_store_is_not_a_store(store: Path) -> None:
    (store / "commit.json").unlink()
    with pytest.raises(CacheIncomplete, match="is not finished"):
        open_cache(store)
    with pytest.raises(CacheIncomplete, match="does not exist"):
        open_cache(store.with_name("nothing.zarr"))


def read_everything(path: Path) -> list[np.ndarray]:
    cache = open_cache(path)
    rows = [cache.row(ImageKey(f"image {i}", f"sha{i}")) for i in range(11)]
    return [*cache.read(rows), *(cache.global_descriptor(row) for row in rows)]


def test_random_bit_flips_are_errors_or_harmless(store: Path) -> None:
    """Any file of the store, any bit; plain zarr without checksums would pass most of them on (reliability.md 2c)."""
    rng = np.random.default_rng(0)
    truth = read_everything(store)
    files = [path for path in store.rglob("*") if path.is_file()]
    sizes = np.array([path.stat().st_size for path in files])
    errors = 0
    for _ in range(200):
        path = files[rng.choice(len(files), p=sizes / sizes.sum())] if rng.random() < 0.5 else files[rng.integers(len(files))]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        try:
            found = read_everything(store)
        except CacheError:
            errors += 1
        else:
            assert all(np.array_equal(a, b) for a, b in zip(found, truth, strict=True)), path
        path.write_bytes(good)
    assert errors > 190, "nearly every byte is checked; only unused ones may flip unnoticed"


@pytest.mark.parametrize("damage", ["deleted", "empty", "truncated", "dangling", "swapped", "hole"])
def test_damaged_shards_are_errors(store: Path, damage: str) -> None:
    first, second = store / "logits/c/0/0/0/0", store / "logits/c/1/0/0/0"
    data = first.read_bytes()
    if damage == "swapped":
        # Two whole, valid shards in each other's place: only the commit knows.
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
        with pytest.raises(CacheError, match="belongs to another place"):
            read_everything(store)
        return
    first.unlink()
    if damage == "empty":
        first.touch()
    elif damage == "truncated":
        first.write_bytes(data[: len(data) // 2])
    elif damage == "dangling":
        first.symlink_to(store / "nowhere")
    elif damage == "hole":
        first.write_bytes(data[:100] + bytes(300) + data[400:])
    with pytest.raises(CacheError, match="logits"):
        read_everything(store)


def test_plain_zarr_would_have_read_zeros(store: Path) -> None:
    """The naive reader beside ours: why a commit and checksums are needed at all."""
    (store / "logits/c/0/0/0/0").unlink()
    group = zarr.open_group(store, mode="r")
    assert np.asarray(group["logits"])[0].max() == 0  # type: ignore[index]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_targets_are_never_stored(tmp_path: Path, bad: float) -> None:
    layout = Layout(1, 5, 6, 64, 96, 4, 16, "uint8", 1)
    target = make_targets(np.random.default_rng(0), layout, 64, 96)
    begin_store(tmp_path / "work", PROVENANCE, layout)
    for field in ("logits", "region_embeddings", "global_descriptor"):
        spoilt = getattr(target, field).copy()
        spoilt.flat[3] = bad
        with pytest.raises(NonFiniteError, match="image holiday"):
            bad_target = target._replace(**{field: spoilt})
            write_shard(tmp_path / "work", layout, 0, [ImageKey("holiday", "")], [bad_target], np.zeros((1, 4), np.int32))
        assert not shard_done(tmp_path / "work", 0)


def test_float16_overflow_is_an_error_not_infinity() -> None:
    with pytest.raises(NonFiniteError, match="70000 is beyond"):
        encode_embeddings(np.array([[[70000.0]]], np.float32))
    with pytest.raises(NonFiniteError, match="70000 is beyond"):
        encode_logits(np.array([[[70000.0]]], np.float32), "float16")
    encoded = encode_logits(np.array([[[70000.0, -70000.0]]], np.float32), "uint8")
    assert encoded.offset + encoded.scale * 255 == pytest.approx(70000)


@settings(max_examples=100, deadline=None)
@given(arrays.arrays(np.float32, (3, 4, 5), elements=st.floats(-1e4, 1e4, width=32)))
def test_uint8_error_is_at_most_half_a_step(logits: np.ndarray) -> None:
    encoded = encode_logits(logits, "uint8")
    decoded = encoded.offset + encoded.scale * encoded.values.astype(np.float64)
    step = np.ptp(logits.astype(np.float64)) / 255
    assert np.abs(decoded - logits).max() <= step / 2 + 1e-5 * max(1.0, np.abs(logits).max())


def test_uint8_keeps_the_argmax_of_confident_logits() -> None:
    """method.md 2.6 (15): agreement of at least 99.5 % on logits that look like a trained teacher's."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 11, (60, 80))
    logits = rng.normal(0, 1.0, (11, 60, 80)).astype(np.float32)
    logits[labels, np.arange(60)[:, None], np.arange(80)[None]] += 6
    encoded = encode_logits(logits, "uint8")
    decoded = encoded.offset + encoded.scale * encoded.values.astype(np.float32)
    assert (decoded.argmax(0) == logits.argmax(0)).mean() >= 0.995


def test_a_constant_map_survives() -> None:
    encoded = encode_logits(np.full((2, 3, 3), 7.5, np.float32), "uint8")
    assert np.allclose(encoded.offset + encoded.scale * encoded.values, 7.5)


def test_publishing_replaces_a_former_store(tmp_path: Path) -> None:
    path, _ = build(tmp_path, seed=0)
    before = open_cache(path).read([0]).logits
    build(tmp_path, seed=1)
    assert not np.array_equal(open_cache(path).read([0]).logits, before)
    assert not (tmp_path / "work").exists()


def test_unfinished_work_of_the_same_key_is_found_again(tmp_path: Path) -> None:
    layout = Layout(3, 5, 6, 64, 96, 4, 16, "uint8", 4)
    begin_store(tmp_path / "work", PROVENANCE, layout)
    rng = np.random.default_rng(0)
    keys = [ImageKey(str(i), "") for i in range(3)]
    targets = [make_targets(rng, layout, 64, 96) for _ in range(3)]
    write_shard(tmp_path / "work", layout, 0, keys, targets, np.ones((3, 4), np.int32))
    begin_store(tmp_path / "work", PROVENANCE, layout)
    assert shard_done(tmp_path / "work", 0)
    shutil.rmtree(tmp_path / "work/store.zarr/logits/c")
    assert not shard_done(tmp_path / "work", 0), "a receipt without its files counts for nothing"
