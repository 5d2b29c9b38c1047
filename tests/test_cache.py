"""The teacher cache: plain zarr-python is the oracle (more in `make test-newest`); what does not belong is an error, not a row."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from re import escape

import numpy as np
import pytest
import torch
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from caches import (
    ENCODED,
    PROVENANCE,
    SMALL,
    build,
    compute_with,
    image,
    images,
    place_of,
    require_all_right,
    require_right,
    spoil,
    targets_of,
)
from mgd_pipeline.caches import opening, reader, shard_reader
from mgd_pipeline.caches.encoding import TARGETS_VERSION, TeacherTargets, encode_logits, require_finite_float16
from mgd_pipeline.caches.fidelity import what_is_kept
from mgd_pipeline.caches.format import Layout, fingerprint
from mgd_pipeline.caches.levels import as_targets, level_step, log_probability_levels, region_levels
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.caches.shards import BuildImage
from mgd_pipeline.data.manifest import ImageKey
from mgd_pipeline.errors import CacheError, CacheIncomplete, NonFiniteError, ProvenanceMismatch
from mgd_pipeline.teachers.teacher import data_classes

pytestmark = pytest.mark.filterwarnings("ignore:Object at .* is not recognized as a component of a Zarr hierarchy")
READ = ("logits", "logits_affine", "region_embeddings", "extents", "region_affine")


@pytest.fixture
def path(tmp_path: Path, layout: Layout) -> Path:
    return build(tmp_path, images(11), layout=layout)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Canvases that hold the images of `caches`."""
    sides = draw(st.sampled_from([64, 96, 160])), draw(st.sampled_from([96, 128]))
    strides = draw(st.sampled_from([2, 4, 8, 16])), draw(st.sampled_from([4, 8, 16]))
    encoding, rows_per_shard = draw(st.sampled_from(["uint8", "float16"])), 2 ** draw(st.integers(0, 3))
    small = draw(st.sampled_from([("uint8", "zstd"), ("uint8", "none")])) if encoding == "uint8" and draw(st.booleans()) else ()
    return Layout(draw(st.integers(1, 5)), draw(st.integers(1, 3)), *sides, *strides, encoding, rows_per_shard, *small)


@settings(max_examples=10, deadline=None)
@given(layouts(), st.sets(st.integers(0, 12)), st.lists(st.sets(st.integers(0, 12), min_size=1), min_size=1, max_size=3), st.data())
def test_any_cache_reads_as_plain_zarr_reads_it(layout: Layout, bad: set[int], growth: list[set[int]], data: st.DataObject) -> None:
    """Of any layout, after any growth, with gaps and holes, in any order of rows, with few or many shards open at a time, none,
    some or all of which are read whole."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_reader, "_WHOLE", data.draw(st.sampled_from([0, 400, 2**14])))
        patch.setattr(reader, "_OPEN_SHARDS", data.draw(st.integers(1, 12)))
        for numbers in growth:
            wanted = [image(f"bad {i}" if i in bad else i) for i in sorted(numbers)]
            path = build(Path(folder), wanted, layout=layout, retry_skipped=False)
        cache, group = open_cache(path), zarr.open_group(path, mode="r")
        plain = {name: np.asarray(group[name]) for name in layout.records}
        stored = [cache.row(key) for key in cache.index.place]
        for row in {-1, 10**9, *range(len(plain["extents"]) + 2)} - {*stored}:
            with pytest.raises(CacheIncomplete, match=f"row {row} has no targets"):
                cache.read([*stored[:1], row])
        rows = data.draw(st.lists(st.sampled_from(stored), max_size=30)) if stored else []
        for name, values in zip(READ, cache.read(rows), strict=True):
            if name not in plain:
                assert name == "region_affine" and values.shape == (len(rows), 0, 2)
                continue
            assert values.dtype == plain[name].dtype and values.tobytes() == plain[name][rows].tobytes()
        assert all(cache.record(name, row).tobytes() == plain[name][row].tobytes() for row in rows for name in layout.records)
        for key in cache.index.place:
            require_right(cache, key)


def test_every_field_changes_the_fingerprint_and_is_named_with_both_values(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for field in ("targets_version", "teacher.encoder", "teacher.weights_sha256", "teacher.trained_on", "classes"):
        *outer, last = field.split(".")
        other = deepcopy(PROVENANCE)
        inner = other[outer[0]] if outer else other
        was, inner[last] = inner[last], "other"
        assert fingerprint(other) != fingerprint(PROVENANCE) == fingerprint(dict(reversed(PROVENANCE.items())))
        with pytest.raises(ProvenanceMismatch, match=escape(f": {field}: the cache has {was!r}, the parameters say 'other'. Run")):
            open_cache(path, other)
    monkeypatch.setattr(opening, "TARGETS_VERSION", TARGETS_VERSION + 1)
    with pytest.raises(ProvenanceMismatch, match="targets_version: the cache has 1, this code 2"):
        open_cache(path)


def test_a_cache_whose_classes_were_renamed_is_the_same_cache(tmp_path: Path) -> None:
    groups = {"a": ["road"], "b": [1, 2], "c": []}
    path = build(tmp_path, images(2), provenance={**PROVENANCE, "classes": ["a", "b", "c"], "class_map": groups})
    renamed = {"x": ["road"], "b": [1, 2], "C": []}
    for class_map in (renamed, groups):  # the parameters may still hold the old names
        assert open_cache(path, {"classes": ["x", "b", "C"], "class_map": class_map}).provenance["classes"] == ["a", "b", "c"]
    other = {"classes": ["x", "b", "C"], "class_map": {**renamed, "b": [1]}}
    for expected, words in (
        (other, r"class_map\.b: the cache has \[1, 2\], the parameters say \[1\]"),
        ({"classes": ["b", "a", "c"]}, "classes: the cache calls class 0 'a', which is class 1 of the project"),
        ({"classes": ["a", "b"]}, r"classes: the cache has \['a', 'b', 'c'\], the parameters say \['a', 'b'\]"),
    ):
        with pytest.raises(ProvenanceMismatch, match=words):
            open_cache(path, expected)


def test_a_class_map_of_the_names_before_a_renaming_is_none(tmp_path: Path) -> None:
    """Each class is the teacher's class of that number, and its logits stay the same bits."""
    path = build(tmp_path, images(2), provenance={**PROVENANCE, "classes": ["a", "b", "c"], "class_map": None})
    open_cache(path, {"classes": ["x", "b", "C"], "class_map": {"C": ["c"], "x": ["a"], "b": [1]}})
    with pytest.raises(ProvenanceMismatch, match="class_map: the cache has None"):
        open_cache(path, {"classes": ["x", "b", "C"], "class_map": {"C": ["c"], "x": ["b"], "b": ["a"]}})
    logits = torch.randn(2, 3, 50, 50, generator=torch.Generator().manual_seed(0)) * 30
    assert torch.equal(data_classes(logits, [[0], [1], [2]]), logits)


def test_a_record_is_verified_when_it_is_first_read(path: Path) -> None:
    """Once in a process: a committed cache never changes, and checking 300 KB again and again costs more than reading them."""
    cache, later = open_cache(path), open_cache(path)
    cache.read([1])
    file, offset, _ = place_of(path, "logits", 1)
    spoil(file, offset + 7)
    cache.read([1])
    with pytest.raises(CacheError, match=r"row 1 .*damaged"):
        later.read([1])


def test_a_process_keeps_few_files_open_and_closes_them(path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are read whole, once, and closed; of larger ones a few stay open."""
    before = set(os.listdir("/dev/fd"))
    small = open_cache(path)
    read = small.read(range(11))
    assert {*os.listdir("/dev/fd")} == before

    monkeypatch.setattr(reader, "_OPEN_SHARDS", 5)
    monkeypatch.setattr(shard_reader, "_WHOLE", 0)
    cache = open_cache(path)
    batches = [cache.read(list(order)) for order in (range(11), range(10, -1, -1))]
    assert np.array_equal(batches[0].logits, batches[1].logits[::-1])
    assert len({*os.listdir("/dev/fd")} - before) == 5
    cache.close()
    assert {*os.listdir("/dev/fd")} <= before
    assert np.array_equal(cache.read([5]).logits, batches[0].logits[5:6]), "reading opens it again"

    for name in layout.records:
        shutil.rmtree(path / name / "c")
    assert all(np.array_equal(*both) for both in zip(small.read(range(11)), read, strict=True))


@pytest.mark.usefixtures("layout")
def test_another_file_in_the_place_of_a_closed_shard_is_verified_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody replaces the cache while a reader that has verified its records has the shard closed."""
    monkeypatch.setattr(reader, "_OPEN_SHARDS", 1)
    cache = open_cache(build(tmp_path, images(11)))
    before = cache.read(list(range(11)))
    build(tmp_path / "other", images(11), compute=compute_with(noise=0.5))
    shard = "region_embeddings/c/1/0/0/0"
    (tmp_path / "t.zarr" / shard).unlink()
    shutil.copy(tmp_path / "other/t.zarr" / shard, tmp_path / "t.zarr" / shard)
    assert np.array_equal(cache.read([0, 8]).region_embeddings, before.region_embeddings[[0, 8]])
    with pytest.raises(CacheError, match=r"row 5 .* belongs to another place"):
        cache.read([5])


def test_damage_that_comes_after_opening_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that lost its end, even within a record, is an error and no signal (as a mapped file would be)."""
    monkeypatch.setattr(shard_reader, "_WHOLE", 0)
    cache = open_cache(path)
    cache.read([0])
    file, offset, size = place_of(path, "logits", 1)
    file.chmod(0o644)
    os.truncate(file, offset + size - 1)
    with pytest.raises(CacheError, match=r"row 1 .*the file ends before it"):
        cache.read([0, 1])


@pytest.mark.usefixtures("layout")
def test_non_finite_targets_are_never_stored(tmp_path: Path) -> None:
    for field, bad in (("logits", np.nan), ("region_embeddings", np.inf), ("global_descriptor", -np.inf)):

        def spoilt(keys: Sequence[ImageKey], field: str = field, bad: float = bad) -> Iterator[TeacherTargets]:
            for target in map(targets_of, keys):
                values = getattr(target, field).copy()
                values.flat[3] = bad
                yield target._replace(**{field: values})

        with pytest.raises(NonFiniteError, match=r"image 0: .*NaN"):
            build(tmp_path, images(1), compute=spoilt)
        assert not (tmp_path / "t.zarr").exists()
    require_all_right(build(tmp_path, images(1)), images(1))


@pytest.mark.parametrize("classes", [2, 11, 150])
def test_log_probabilities_keep_the_class_and_lie_within_their_levels(classes: int) -> None:
    logits = torch.randn(2, classes, 16, 24, generator=torch.Generator().manual_seed(classes)) * 4 + 30
    logits[:, 1, :4] = logits[:, 0, :4] + 0.001  # nearly as likely
    floor = ENCODED.floor_of(classes)
    step, said = level_step(floor, ENCODED.levels), logits.log_softmax(1)
    stored = log_probability_levels(logits, floor, ENCODED.levels)
    decoded = stored * step - floor
    assert torch.equal(decoded.argmax(1), logits.argmax(1)) and int(stored.max()) <= ENCODED.levels - 1
    assert ((decoded == decoded.amax(1, keepdim=True)).sum(1) == 1).all(), "no class shares the highest level"
    kept, error = said > 2 - floor + 1e-4, (decoded - said).abs()
    assert error[kept].max() <= 1.5 * step + 1e-4
    assert (stored[said < 2 - floor - 1e-4] == 0).all()
    assert (said.exp() * (said - decoded.log_softmax(1))).sum(1).mean() < 2e-3
    cut = log_probability_levels(logits / 100, 4.0, 64)  # with 150 classes no class lies above this floor
    assert torch.equal(cut.argmax(1), logits.argmax(1)) and int(cut.max()) <= 63


def test_embeddings_lie_within_half_a_level_and_constant_channels_are_exact() -> None:
    features = torch.randn(2, 7, 5, 6, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 7)[:, None, None]
    features[1, 2], features[1, 3] = 3.25, 0
    stored, affine = region_levels(features, 128)
    offset, scale = affine[..., None, None].unbind(2)
    error = (offset + scale * stored - features).abs()
    assert int(stored.max()) == 127 and (error <= scale * 0.5001).all()
    assert not error[1, 2:4].any()


@pytest.mark.parametrize("place", [0, 1], ids=["logits", "region embeddings"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_targets_that_cannot_be_encoded_name_their_image(tmp_path: Path, place: int, bad: float) -> None:
    """The encoding of a whole batch hides nothing, and the rest of the batch is encoded."""
    said = targets_of(image(0).key, SMALL)
    batch = [
        torch.from_numpy(np.stack([values] * 2)).float() for values in (said.logits, said.region_embeddings, said.global_descriptor)
    ]
    batch[place][1].view(-1)[5] = bad
    good, spoilt = as_targets(*batch, ENCODED)  # type: ignore[call-arg]
    assert good.logits.dtype == good.region_embeddings.dtype == np.uint8
    wanted = [image(0), image(3)]
    with pytest.raises(NonFiniteError, match=r"image 3: .*NaN"):
        build(tmp_path, wanted, layout=SMALL, compute=lambda keys: iter([good, spoilt]))


def test_what_is_kept_is_what_a_reader_of_all_cells_measures(tmp_path: Path) -> None:
    """Of smooth targets, which are like the teachers' and unlike noise."""
    layout = replace(SMALL, classes=11, height=512, width=512, region_stride=8)
    wanted = BuildImage(image(0).key, (512, 512), (512, 512))
    generator = torch.Generator().manual_seed(0)
    logits, features = (
        torch.nn.functional.interpolate(torch.randn(1, count, 9, 9, generator=generator) * 6, (side, side), mode="bicubic")
        for count, side in ((11, 128), (6, 64))
    )
    (made,) = as_targets(logits, features, logits.mean((2, 3)), ENCODED)
    cache = open_cache(build(tmp_path, [wanted], layout=layout, compute=lambda keys: iter([made])))
    kept, targets = what_is_kept(cache), cache["image 0"]
    assert kept is not None and kept.kl is not None and kept.cosine is not None
    said, stored = logits[0].log_softmax(0), targets.logits.log_softmax(0)
    assert kept.kl == pytest.approx(float((said.exp() * (said - stored)).sum(0).mean()), rel=0.1) and kept.kl < 2e-3
    unit = [torch.nn.functional.normalize(values.flatten(1), dim=0) for values in (features[0], targets.features)]
    error = (unit[0].T @ unit[0] - unit[1].T @ unit[1]).square().mean().sqrt()
    assert kept.cosine == pytest.approx(float(error), rel=0.25) and kept.same_class == 1
    size = sum(file.stat().st_size for file in tmp_path.glob("t.zarr/*/c/**/*") if file.is_file())
    assert kept.size == pytest.approx(size / (11 * 128**2 + 6 * 64**2 * 2 + 5 * 4 * 17), rel=0.01)
    assert what_is_kept(open_cache(build(tmp_path / "plain", images(2)))) is None


def test_float16_overflow_is_an_error_not_infinity() -> None:
    require_finite_float16(np.array([[[65504.0, -65504.0]]], np.float16), "region embeddings")
    with np.errstate(over="ignore"):
        beyond = np.array([[[70000.0, 1.0]]], np.float32).astype(np.float16)
    with pytest.raises(NonFiniteError, match="region embeddings: 1 of 2 values are NaN, infinite or beyond"):
        require_finite_float16(beyond, "region embeddings")
    with pytest.raises(TypeError, match="float32, must be float16"):
        require_finite_float16(beyond.astype(np.float32), "region embeddings")
    with pytest.raises(NonFiniteError, match="70000 is beyond"):
        encode_logits(np.array([[[70000.0]]], np.float32), "float16")
    encoded = encode_logits(np.array([[[70000.0, -70000.0]]], np.float32), "uint8")
    assert encoded.offset + encoded.scale * 255 == pytest.approx(70000)


@settings(max_examples=100, deadline=None)
@given(arrays.arrays(np.float32, (3, 4, 5), elements=st.floats(-1e4, 1e4, width=32)))
@example(np.full((3, 4, 5), 7.5, np.float32)).via("a constant map has no range")
def test_uint8_error_is_at_most_half_a_step(logits: np.ndarray) -> None:
    encoded = encode_logits(logits, "uint8")
    decoded = encoded.offset + encoded.scale * encoded.values.astype(np.float64)
    step = np.ptp(logits.astype(np.float64)) / 255
    assert np.abs(decoded - logits).max() <= step / 2 + 1e-5 * max(1.0, np.abs(logits).max())
