"""Caches in anybody's training loop: an image's targets by its id and under any affine map, the plain data set, the examples."""

from __future__ import annotations

import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from caches import LAYOUT, PROVENANCE, build, image, images
from conftest import TINY
from mgd_pipeline import open_cache
from mgd_pipeline.caches.encoding import encode_logits
from mgd_pipeline.caches.format import Layout
from mgd_pipeline.caches.image_targets import ImageTargets, cell_matrix
from mgd_pipeline.caches.reader import CachedTargets
from mgd_pipeline.data.manifest import ImageKey, write_manifest
from mgd_pipeline.errors import CacheIncomplete, DataError, MGDError, ParamsError, ProvenanceMismatch, StaleTarget
from mgd_pipeline.params import ImportedTeacher, TargetsParams
from mgd_pipeline.teachers.kinds import build_teacher
from mgd_pipeline.teachers.looks import dense_targets
from mgd_pipeline.training import DistillationDataset
from mgd_pipeline.training.batches import ReadTargets, make_source, valid_views, view_targets
from mgd_pipeline.views import ViewParams, draw_view, view_matrix
from mgd_stages.run.project import Project, open_project
from mgd_stages.stages.precompute_teachers import precompute_teachers

EXAMPLES = Path(__file__).parents[1] / "examples"
IDENTITY = [[1, 0, 0], [0, 1, 0]]


def records(size: tuple[int, int], layout: Layout, seed: int, ramp: bool = False) -> dict[str, np.ndarray]:
    """One image's records on a cache's canvas; of a ramp each cell holds its own y and x in source pixels."""
    rng, frame = np.random.default_rng(seed), [-(-side // 32) * 32 for side in size]
    cells, regions = [side // layout.stride for side in frame], [-(-side // layout.region_stride) for side in size]
    logits, features = (rng.normal(size=(2, *shape)).astype(np.float32) for shape in (cells, regions))
    if ramp:
        logits = np.stack(np.meshgrid(*(np.linspace(0, f - 1, c) for f, c in zip(frame, cells, strict=True)), indexing="ij"))
        features = (np.indices(regions) + 0.5) * layout.region_stride - 0.5
    encoded = encode_logits(logits.astype(np.float32), layout.encoding)  # pyright: ignore[reportArgumentType]
    canvas = {name: rng.integers(0, 99, shape).astype(dtype) for name, (shape, dtype) in layout.records.items()}
    canvas["logits"][:, : cells[0], : cells[1]] = encoded.values
    canvas["region_embeddings"][:, : regions[0], : regions[1]] = features
    return {
        **canvas,
        "logits_affine": np.array([encoded.offset, encoded.scale], np.float32),
        "extents": np.array([*size, *frame], np.int32),
    }


def as_training_sees(stored: dict[str, np.ndarray], layout: Layout, view: ViewParams, mirrored: bool = False) -> Any:
    """Logits, features and validity of a view, by the code of train-student."""
    cached = CachedTargets(*(stored[name][None] for name in ("logits", "logits_affine", "region_embeddings", "extents")))
    row: Any = SimpleNamespace(image_path="x.png")
    pixels = torch.zeros(1, 3, view.height, view.width, dtype=torch.uint8)
    source = make_source([row], [view], pixels, None, {"t": ReadTargets(cached, layout, mirrored)}, torch.zeros(1, 6))
    return *(values[0] for values in view_targets(source, "t")), valid_views(source)[0]


layouts = st.builds(
    lambda stride, region_stride, encoding: Layout(2, 2, 192, 160, stride, region_stride, encoding, 4),
    st.sampled_from([2, 4, 8, 16]),
    st.sampled_from([4, 8, 16]),
    st.sampled_from(["uint8", "float16"]),
)
drawn = st.builds(
    lambda h, w, seed, crop: draw_view(np.random.default_rng(seed), (h, w), crop, [0.5, 0.75, 1.0, 1.5, 2.0], flip=0.5),
    st.sampled_from([1, 2, 31, 33, 75, 150, 192]),
    st.sampled_from([1, 3, 32, 67, 90, 160]),
    st.integers(0, 2**32),
    st.sampled_from([(64, 64), (96, 64), (32, 128), (4, 4)]),
)


@settings(max_examples=200, deadline=None)
@given(view=drawn, layout=layouts, seed=st.integers(0, 99), ramp=st.booleans(), mirrored=st.booleans())
def test_sampling_is_what_training_sees_of_every_view_that_it_draws(
    view: ViewParams, layout: Layout, seed: int, ramp: bool, mirrored: bool
) -> None:
    size, crop = (view.height, view.width), (view.crop_height, view.crop_width)
    stored, of_mirror = records(size, layout, seed, ramp), records(size, layout, seed + 100)
    mirror = ImageTargets.decode(of_mirror, layout) if mirrored else None
    targets, matrix = ImageTargets.decode(stored, layout, mirror), view_matrix(view)
    seen = of_mirror if mirrored and view.flip else stored
    logits, features, valid = as_training_sees(seen, layout, view, mirrored)
    sampled, inside = targets.sample(torch.from_numpy(matrix).requires_grad_(), crop)
    assert torch.equal(inside, valid) and sampled.dtype == torch.float32 and not sampled.requires_grad
    assert (sampled - logits).abs().max() <= 1e-5 * max(1, float(logits.abs().max()))
    cells = (crop[0] // 4, crop[1] // 4)
    sampled = targets.sample_features(cell_matrix(matrix, crop, cells, align_corners=True), cells).values
    assert (sampled - features).abs().max() <= 1e-5 * max(1, float(features.abs().max()))


@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(st.integers(40, 150), st.integers(40, 150)),
    linear=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    shift=st.tuples(st.floats(-50, 200), st.floats(-50, 200)),
    stride=st.sampled_from([2, 4, 8]),
)
def test_a_ramp_comes_back_through_any_affine_map(
    size: tuple[int, int], linear: list[float], shift: tuple[float, float], stride: int
) -> None:
    layout = Layout(2, 2, 160, 160, stride, 4, "float16", 4)
    targets = ImageTargets.decode(records(size, layout, 0, ramp=True), layout)
    matrix = np.array([[*linear[:2], shift[0]], [*linear[2:], shift[1]]])
    y_view, x_view = np.indices((24, 32))
    x, y = (row[0] * x_view + row[1] * y_view + row[2] for row in matrix)
    within = (y > -0.5) & (y < size[0] - 0.5) & (x > -0.5) & (x < size[1] - 0.5)
    for sampled, first in ((targets.sample(matrix, (24, 32)), 0.0), (targets.sample_features(matrix, (24, 32)), 1.5)):
        assert np.array_equal(sampled.inside.numpy(), within)
        for place, side, values in zip((y, x), size, sampled.values.numpy(), strict=True):
            # Outside, the nearest pixel of the image or the outermost cell, and never what else lies on the canvas.
            last = -(-side // 4) * 4 - 2.5 if first else side - 1
            assert np.abs(values - np.clip(np.clip(place, 0, side - 1), first, last)).max() < 0.1


def test_matrices_of_the_file_as_it_is_and_of_the_working_size_agree() -> None:
    """`source` is for images that data.long_side made smaller: the same place, in pixels of either size."""
    layout, file = Layout(2, 2, 96, 96, 4, 16, "float16", 4), (150, 225)
    targets = ImageTargets.decode(records((60, 90), layout, 0, ramp=True), layout)
    whole = targets.at_pixels(file)
    expected = (np.arange(file[0]) + 0.5) * 60 / 150 - 0.5
    assert whole.shape == (2, *file) and np.abs(whole[0, :, 7].numpy() - expected.clip(0, 59)).max() < 0.05
    part, inside = targets.sample([[1, 0, 200], [0, 1, 100]], (20, 40), source=file)
    assert torch.allclose(part[:, :, :25], whole[:, 100:120, 200:], atol=1e-3)
    assert inside[:, :25].all() and not inside[:, 25:].any()


def test_cells_that_are_areas_lie_where_torch_interpolates_them() -> None:
    """The centres of a feature map's cells, in pixels of the view; of aligned corners the test above says it."""
    rows = torch.arange(24.0).view(1, 1, 24, 1).expand(1, 1, 24, 32)
    for h, w in ((6, 8), (5, 7)):
        expected = torch.nn.functional.interpolate(rows, (h, w), mode="bilinear")[0, 0, :, 0]
        matrix = cell_matrix(IDENTITY, (24, 32), (h, w), align_corners=False)
        assert np.allclose(matrix[1, 1] * np.arange(h) + matrix[1, 2], expected, atol=1e-5) and matrix[1, 0] == 0
    assert cell_matrix(IDENTITY, (24, 32), (1, 1), align_corners=True)[:, 2].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("matrix", "shape", "said"),
    [
        (np.eye(3), (4, 4), r"matrix: has the shape \(3, 3\); write \(2, 3\)"),
        ([[1, 0, float("nan")], [0, 1, 0]], (4, 4), "matrix: .*nan.* is not finite"),
        ([[1e300, 0, 0], [0, 1, 0]], (4, 4), r"matrix: .*1e\+300.* far beyond any image"),
        (IDENTITY, (0, 4), r"shape: \(0, 4\) is not a height and a width in pixels"),
        (IDENTITY, (4.0, 4), r"shape: \(4.0, 4\) is not"),
        (IDENTITY, 4, "shape: 4 is not"),
        ([[1, 0, 0], [0, 1]], (4, 4), r"matrix: \[\[1, 0, 0\], \[0, 1\]\] is not a matrix of numbers"),
    ],
)
def test_a_matrix_or_shape_that_means_nothing_is_one_clear_error(matrix: Any, shape: Any, said: str) -> None:
    layout = Layout(2, 2, 96, 96, 4, 16, "uint8", 4)
    targets = ImageTargets.decode(records((60, 90), layout, 0), layout)
    for sample in (targets.sample, targets.sample_features):
        with pytest.raises(ParamsError, match=f"^{said}"):
            sample(matrix, shape)


def test_an_id_gives_what_the_cache_has_of_that_image(tmp_path: Path) -> None:
    cache = open_cache(build(tmp_path, images(6)))
    assert list(cache) == [f"image {i}" for i in range(6)] and "image 3" in cache and "image 7" not in cache
    for i in range(6):
        key, size, frame = image(i)
        targets, row = cache[key.image_id], cache.row(key)
        assert (targets.size, targets.frame, targets.mirrored) == (size, frame, None)
        offset, scale = cache.record("logits_affine", row)
        stored = cache.record("logits", row)[:, : frame[0] // 4, : frame[1] // 4] * scale + offset
        assert np.abs(targets.logits.numpy() - stored).max() < 1e-5 and targets.logits.dtype == torch.float32
        regions = cache.record("region_embeddings", row)[:, : -(-size[0] // 16), : -(-size[1] // 16)]
        assert np.array_equal(targets.features.numpy(), regions.astype(np.float32))
        assert np.array_equal(targets.descriptor.numpy(), cache.record("global_descriptors", row))
        assert torch.equal(targets.at_pixels(), targets.sample(IDENTITY, size).values)
        assert torch.equal(cache[key].logits, targets.logits), "its key says the same"


def test_targets_outlive_their_cache_and_both_travel_to_other_processes(tmp_path: Path) -> None:
    cache = open_cache(build(tmp_path, images(3)))
    before = cache["image 1"]
    travelled = pickle.loads(pickle.dumps(cache))
    cache.close()
    for targets in (before, pickle.loads(pickle.dumps(before)), cache["image 1"], travelled["image 1"]):
        assert torch.equal(targets.at_pixels(), before.at_pixels())
    data = pickle.dumps(cache)
    build(tmp_path / "other", images(3), provenance={**PROVENANCE, "classes": ["c"]}).rename(tmp_path / "new.zarr")
    (tmp_path / "t.zarr").rename(tmp_path / "old.zarr")
    (tmp_path / "new.zarr").rename(tmp_path / "t.zarr")
    with pytest.raises(ProvenanceMismatch, match=r"t\.zarr: has been replaced by another cache"):
        pickle.loads(data)


def test_an_id_that_is_unknown_or_ambiguous_is_one_clear_error(tmp_path: Path) -> None:
    cache = open_cache(build(tmp_path, [*images(4), image(2, "new"), image("bad 1"), image("train/seq1/000123")]))
    for wanted, error, said in (
        ("image 3.png", CacheIncomplete, "has no image 'image 3.png'; the nearest id is 'image 3'"),
        ("seq1/000123", CacheIncomplete, "has no image 'seq1/000123'; the nearest id is 'image train/seq1/000123'"),
        ("image bad 1", CacheIncomplete, "has no targets for image 'image bad 1', it was skipped"),
        (
            "image 2",
            StaleTarget,
            r"image 'image 2' is ambiguous, the cache has 2 files of it \(SHA-256 sha2\.\.\., sha2new\.\.\.\)",
        ),
        (ImageKey("image 1", "another"), StaleTarget, "image 'image 1' has changed since its targets were made"),
        (3, ParamsError, "3 is not the id of an image"),
    ):
        with pytest.raises(error, match=rf"^\S*t\.zarr: {said}") as caught:
            cache[wanted]  # pyright: ignore[reportArgumentType]
        assert "\n" not in str(caught.value)
    assert list(cache).count("image 2") == 1
    for content in ("", "new"):
        key = image(2, content).key
        assert np.array_equal(cache[key].descriptor.numpy(), cache.record("global_descriptors", cache.row(key)))


def test_ids_of_one_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(build(tmp_path, images(3)))
    monkeypatch.setattr("mgd_pipeline.caches.index.hash", lambda value: 1, raising=False)
    assert {i: cache[f"image {i}"].size for i in range(3)} == {i: image(i).size for i in range(3)}
    with pytest.raises(CacheIncomplete, match="has no image 'image 9'"):
        cache["image 9"]


@pytest.mark.parametrize("missing", ["classes", "features"])
def test_a_teacher_without_classes_or_without_features_has_none_of_them(tmp_path: Path, missing: str) -> None:
    layout = replace(LAYOUT, **{missing: 0})
    targets = open_cache(build(tmp_path, images(2), layout=layout))["image 1"]
    assert targets.sample(IDENTITY, (7, 9)).values.shape == (layout.classes, 7, 9)
    assert targets.sample_features(IDENTITY, (7, 9)).values.shape == (layout.features, 7, 9)
    assert targets.at_pixels().shape == (layout.classes, *targets.size) and targets.descriptor.shape == (layout.classes,)


@pytest.mark.parametrize("mirrored", [False, True])
def test_an_item_is_what_training_sees_of_the_image_in_the_same_view(project: Project, mirrored: bool) -> None:
    """Mirrored views get what a teacher said of the mirror image, where its cache has that."""
    overrides = [*TINY, "losses.pixel_teachers=[wide]", "losses.region=0", "losses.image=0", f"targets.mirrored={mirrored}"]
    if mirrored:
        precompute_teachers(open_project(project.base / "params.yaml", overrides), "wide", device=torch.device("cpu"), batch_size=8)
    data, cache, flipped = DistillationDataset(project.base, overrides=overrides), open_cache(project.targets("wide")), 0
    assert len(data) == len(data.manifest.training) and set(data.caches) == {"wide"}
    for index, row in enumerate(data.rows):
        item, rng, params = data[index], np.random.default_rng([data.seed, 0, index]), data.params.views
        view = draw_view(rng, data.manifest.size(row), (32, 32), params.scales, params.flip)
        flipped += view.flip
        assert item["image_id"] == row.image_id and item["labelled"] == (row in data.manifest.labelled)
        assert item["image"].shape == (3, 32, 32) and (item["image"][:, ~item["inside"]] == 0).all()
        assert (item["label"] == 255).all() != item["labelled"] and item["label"].dtype == torch.int64
        assert data.manifest.image(row).shape[:2] == (view.height, view.width)
        targets, seen = cache[ImageKey(row.image_id, row.image_sha256)], item["targets"]["wide"]
        expected, inside = targets.sample(view_matrix(view), (32, 32))
        assert (seen["logits"] - expected).abs().max() < 1e-5 and torch.equal(item["inside"], inside)
        cells = cell_matrix(view_matrix(view), (32, 32), (8, 8), align_corners=True)
        assert (seen["features"] - targets.sample_features(cells, (8, 8)).values).abs().max() < 1e-5
        assert (targets.mirrored is not None) == mirrored
    assert 0 < flipped < len(data)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_views_depend_on_seed_epoch_and_index_in_workers_that_stay_too(finished_project: Path, start: str) -> None:
    data = DistillationDataset(finished_project, subset="labelled", overrides=TINY)
    data[0]  # the caches of this process are open when workers begin
    loader = DataLoader(data, batch_size=3, num_workers=1, persistent_workers=True, multiprocessing_context=start)

    def images(source: Any, epoch: int) -> torch.Tensor:
        data.set_epoch(epoch)
        batches = list(source)
        assert len(batches) == 2 and batches[0]["image"].shape == (3, 3, 32, 32) and batches[0]["labelled"].all()
        return torch.cat([batch[name].flatten() for batch in batches for name in ("image", "label")])

    first, second = images(loader, 0), images(loader, 1)
    here = DataLoader(data, batch_size=3)
    assert not torch.equal(first, second) and torch.equal(images(here, 1), second) and torch.equal(images(here, 0), first)
    copied = pickle.loads(pickle.dumps(data))
    data.set_epoch(1)
    assert torch.equal(copied[2]["image"].flatten(), first[2 * 3 * 32 * 32 :][: 3 * 32 * 32]) and copied._epoch.is_shared()
    other = DistillationDataset(finished_project, subset="labelled", seed=7, overrides=TINY)
    assert not torch.equal(other[0]["image"], copied[0]["image"])


def test_what_is_missing_or_leaks_is_said_before_the_first_item(project: Project, tmp_path: Path) -> None:
    def refused(error: type[MGDError], said: str, *overrides: str, **options: Any) -> None:
        with pytest.raises(error, match=said):
            DistillationDataset(**{"folder": project.base, "overrides": [*TINY, *overrides], **options})

    refused(ProvenanceMismatch, "stride", "targets.stride=8")
    refused(ParamsError, "subset: 'val' must be", subset="val")
    refused(ParamsError, rf"^{tmp_path}: is not the folder of a project, it has no params\.yaml; name a folder", folder=tmp_path)
    refused(CacheIncomplete, r"elsewhere\.zarr: does not exist", caches={"wide": project.base / "elsewhere.zarr"})
    refused(CacheIncomplete, "has no targets for image", caches={"mine": build(tmp_path, images(2))})
    assert not DistillationDataset(project.base, overrides=TINY, caches={})[0]["targets"]
    data = DistillationDataset(project.base, overrides=TINY)
    with pytest.raises(ParamsError, match="epoch: -1"):
        data.set_epoch(-1)
    with pytest.raises(IndexError):
        data[len(data)]
    path = data.manifest.image_file(data.rows[1])
    path.unlink()  # it may be a link to bytes that other projects have, too
    path.write_bytes(data.manifest.image_file(data.rows[2]).read_bytes())
    with pytest.raises(DataError, match="has changed since"):
        data[1]
    # --- these labels are of another partition than the one that the teachers learned from
    manifest = replace(data.manifest, subsets={**data.manifest.subsets, data.manifest.unlabelled[0].image_id: "labelled"})
    write_manifest(manifest, project.manifest)
    refused(ProvenanceMismatch, "another partition .*losses.other_partition to true")
    assert DistillationDataset(project.base, overrides=[*TINY, "losses.other_partition=true"])[0]["targets"]


def test_the_examples_matrix_is_what_torchvision_does_to_an_image() -> None:
    """A picture whose pixels say their own x and y goes through the example's augmentation: the matrix says the same."""
    own_loop = run_path(str(EXAMPLES / "own_loop.py"))
    ramp = torch.from_numpy(np.indices((80, 120), np.float32))
    mirrored = 0
    for seed in range(20):
        torch.manual_seed(seed)
        view, matrix = own_loop["random_view"](torch.cat([ramp, torch.ones(1, 80, 120)]))
        y_view, x_view = np.indices(own_loop["CROP"])
        x, y = (row[0] * x_view + row[1] * y_view + row[2] for row in matrix.numpy())
        whole = view[2].numpy() > 0.9999  # nothing of the border's fill value is mixed in
        whole[[0, 1, -1, -2]] = whole[:, [0, 1, -1, -2]] = False  # there resized_crop repeats the edge of its box
        assert whole.mean() > 0.5
        assert np.abs(view[0].numpy() - y)[whole].max() < 0.02 and np.abs(view[1].numpy() - x)[whole].max() < 0.02
        mirrored += float(torch.linalg.det(matrix[:, :2])) < 0
    assert 0 < mirrored < 20


def test_the_page_says_what_runs(finished_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (EXAMPLES.parent / "docs/own-loop.md").read_text(encoding="utf-8")
    monkeypatch.chdir(finished_project)
    overrides = [*TINY, "views.crop=[32,64]"]
    said = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    names: dict[str, Any] = {}
    exec(said.replace('["views.crop=[32,64]"]', repr(overrides)), names)
    targets, batch = names["targets"], names["batch"]
    assert names["logits"].shape == (9, 6, 9) and names["features"].shape == (16, 6, 9) and names["inside"].all()
    assert targets.at_pixels().shape == (9, 48, 72) and targets.descriptor.shape == (9,)
    assert batch["targets"]["wide"]["features"].shape == (4, 16, 8, 16) and batch["label"].shape == (4, 32, 64)


def test_the_example_of_an_own_loop_learns(finished_project: Path) -> None:
    torch.manual_seed(0)
    losses = list(run_path(str(EXAMPLES / "own_loop.py"))["train"](finished_project, 12, workers=0))
    assert len(losses) == 12 and np.isfinite(losses).all() and np.mean(losses[-3:]) < np.mean(losses[:3])


@pytest.mark.filterwarnings("default")  # Lightning has warnings of its own, which change with its versions
def test_the_example_for_lightning_trains(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="lightning is no dependency: the example runs where it is installed")
    seen: list[int] = []
    real = DistillationDataset.set_epoch
    monkeypatch.setattr(DistillationDataset, "set_epoch", lambda self, epoch: (seen.append(epoch), real(self, epoch)))
    main = run_path(str(EXAMPLES / "lightning_student.py"))["main"]
    main(project.base, 2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert seen == [0, 1]


def test_the_example_of_an_own_teacher_makes_targets(tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "own_teacher.py", tmp_path)
    classes = ("sky", "sea", "sand")
    torch.save(run_path(str(EXAMPLES / "own_teacher.py"))["Segmenter"](len(classes), 8).state_dict(), tmp_path / "ours.pth")
    params = ImportedTeacher.model_validate({"import": "own_teacher:build_teacher", "options": {"width": 8}, "weights": "ours.pth"})
    teacher = build_teacher("own", params, classes, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    (targets,) = dense_targets(teacher, [pixels], TargetsParams())
    assert targets.logits.shape == (3, 16, 16) and targets.region_embeddings.shape == (8, 3, 4)
