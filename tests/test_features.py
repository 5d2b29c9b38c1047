"""The feature term: teachers' embeddings at cells of their own stride, their statistics, and projections that are trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from caches import LAYOUT, as_format_2, build, compute_with, image, images, targets_of
from conftest import TINY, training_set
from mgd_pipeline.caches import statistics
from mgd_pipeline.caches.format import COMMIT, sealed
from mgd_pipeline.caches.reader import CachedTargets, open_cache
from mgd_pipeline.caches.statistics import FeatureStatistics, compute_statistics, stored_statistics, training_keys
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.networks.segmentation import build_network
from mgd_pipeline.networks.weights import read_state_dict
from mgd_pipeline.params import LossesParams
from mgd_pipeline.params_file import parse_params
from mgd_pipeline.training.batches import (
    Batch,
    ReadTargets,
    Source,
    StepTargets,
    cached_targets,
    make_source,
    view_regions,
)
from mgd_pipeline.training.features import ProjectedStudent, mean_features, with_projections
from mgd_pipeline.training.knowledge import Knowledge, knowledge_of
from mgd_pipeline.training.terms import feature_terms, step_terms
from mgd_pipeline.views import ViewParams, draw_view, source_positions
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project, open_project
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.train_student import train_student
from mgd_stages.stages.train_teacher import train_teacher

CPU = torch.device("cpu")
ONLY_FEATURE = LossesParams.model_validate({"pixel": 0, "region": 0, "image": 0, "feature": 1, "feature_teachers": ["t"]})
FEATURE = [*TINY, "losses.feature=1", "losses.feature_teachers=[wide, deep]"]


def direct(keys: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of what the teacher of `caches` says, without any cache."""
    cells = np.concatenate([targets_of(key).region_embeddings.reshape(LAYOUT.features, -1).astype(np.float64) for key in keys], 1)
    return cells.mean(1), cells.std(1)


def require_same(one: FeatureStatistics | None, other: FeatureStatistics) -> None:
    assert one is not None and np.array_equal(one.mean, other.mean) and np.array_equal(one.std, other.std)


def test_a_cache_keeps_the_statistics_of_its_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one pass over the finished cache, to the bit; other images, and caches without any, get theirs by such a pass."""
    keys = [one.key for one in images(11)]
    cache = open_cache(build(tmp_path, [*images(11), image("bad 1")]))
    stored = stored_statistics(cache, keys[::-1])
    require_same(stored, compute_statistics(cache, keys))
    assert stored is not None and stored.mean.dtype == np.float64
    for value, expected in zip(stored, direct(keys), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-12)
    monkeypatch.setattr(statistics, "_MOST", 4)  # of many images, some are read
    np.testing.assert_allclose(compute_statistics(cache, keys).mean, direct([keys[i] for i in (0, 2, 5, 8)])[0], rtol=1e-12)
    monkeypatch.undo()
    assert stored_statistics(cache, keys[1:]) is None, "of other images"
    np.testing.assert_allclose(compute_statistics(cache, keys[1:]).mean, direct(keys[1:])[0], rtol=1e-12)

    # --- the cache grows: statistics of all images, with rows where they were
    cache = open_cache(build(tmp_path, images(13)))
    assert stored_statistics(cache, keys) is None
    require_same(
        stored_statistics(cache, [one.key for one in images(13)]), compute_statistics(cache, [one.key for one in images(13)])
    )

    # --- as version 0.1.0 wrote it
    path, before = as_format_2(cache.path), compute_statistics(cache, keys)  # type: ignore[arg-type]
    commit = json.loads((path / COMMIT).read_bytes())
    (path / COMMIT).write_bytes(sealed({key: value for key, value in commit.items() if key not in ("self", "feature_statistics")}))
    old = open_cache(path)
    assert stored_statistics(old, keys) is None
    require_same(compute_statistics(old, keys), before)


def test_a_teacher_without_embeddings_has_no_statistics(tmp_path: Path) -> None:
    layout = replace(LAYOUT, features=0)
    cache = open_cache(build(tmp_path, images(3), layout=layout, compute=compute_with(layout)))
    assert "feature_statistics" not in cache.commit


def test_only_training_images_count_and_heads_give_no_embeddings(project: Project) -> None:
    """A teacher with a head caches val, too."""
    head = {"head": "linear", "of": "wide", "weights": "data/targets/h.safetensors", "steps": 1}
    headed = open_project(project.base / "params.yaml", [*TINY, f"teachers.h={json.dumps(head)}"])
    precompute_teachers(headed, "wide", device=CPU, batch_size=8)
    manifest, cache = read_manifest(headed.manifest, headed.base), open_cache(headed.targets("wide"))
    keys = training_keys(manifest, mirrored=False)
    assert len(cache.index) > len(keys)
    require_same(stored_statistics(cache, keys), compute_statistics(cache, keys))

    train_teacher(headed, "h", Machine(CPU))
    precompute_teachers(headed, "h", device=CPU, batch_size=8)
    raw = headed.params.model_dump()
    raw["losses"] |= {"feature": 1.0, "feature_teachers": ["h"]}
    with pytest.raises(
        ParamsError, match=r"losses\.feature_teachers: teacher h gives no embeddings; name another one, or set the weight"
    ):
        train_student(replace(headed, params=parse_params(raw)), Machine(CPU, resume=False))


# --- sampling


def ramp_source(
    sizes: list[tuple[int, int]], views: list[ViewParams], region_stride: int, mirrored: bool, offset: float = 0
) -> Source:
    """A teacher whose embeddings are the row and the column of the source pixel at the middle of their cell."""
    layout = replace(LAYOUT, features=2, height=128, width=128, region_stride=region_stride)
    regions = np.zeros((len(sizes), *layout.records["region_embeddings"][0]), np.float16)
    for i, ((_, width), view) in enumerate(zip(sizes, views, strict=True)):
        y, x = ((np.arange(count) + 0.5) * region_stride - 0.5 for count in regions.shape[2:])
        regions[i, 0], regions[i, 1] = y[:, None], width - 1 - x if mirrored and view.flip else x
    extents = np.array([(*size, 128, 128) for size in sizes], np.int32)
    cached = CachedTargets(
        layout.nothing("logits", 0).reshape(len(sizes), 0, 1, 1), np.ones((len(sizes), 2), np.float32), regions, extents
    )
    rows: list[Any] = [SimpleNamespace(image_path=f"{i}.png") for i in range(len(sizes))]
    pixels = torch.zeros(len(sizes), 3, 128, 128, dtype=torch.uint8)
    return make_source(rows, views, pixels, None, {"t": ReadTargets(cached, layout, mirrored)}, torch.zeros(len(sizes), 6))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("region_stride", [4, 8, 16])
def test_a_ramp_comes_back_where_the_students_means_lie(region_stride: int, mirrored: bool) -> None:
    """A student whose features are the coordinates of their cells has the teacher's embeddings, averaged to the teacher's cells."""
    rng, tested = np.random.default_rng(region_stride), 0
    sizes = [(127, 101), (96, 128), (128, 128), (70, 90)]
    for _ in range(5):
        views = [
            draw_view(rng, size, (64, 96), [0.5, 0.75, 1.0, 1.5, 2.0], flip) for size, flip in zip(sizes, (0, 1, 0, 1), strict=True)
        ]
        source = ramp_source(sizes, views, region_stride, mirrored)
        seen = view_regions(source, "t")
        cells = source_positions(views, (16, 24))
        y, x = (torch.from_numpy(values).float() for values in (cells.y, cells.x))
        student = torch.stack([y[:, :, None].expand(-1, -1, 24), x[:, None].expand(-1, 16, -1)], 1)
        means = mean_features(student, region_stride)
        assert seen.shape == means.shape == (4, 2, 64 // region_stride, 96 // region_stride)
        for i, size in enumerate(sizes):
            for axis, (inside, values) in enumerate(((cells.inside_y[i], y[i]), (cells.inside_x[i], x[i]))):
                # At least half a cell from the edge of the image, the stored grid has both neighbours.
                half, together = region_stride / 2, region_stride // 4
                inner = (
                    inside & (values.numpy() >= half) & (values.numpy() <= size[axis] // region_stride * region_stride - 1 - half)
                )
                whole = torch.from_numpy(inner.reshape(-1, together).all(1))
                got, expected = (grid[i, axis].amax(1 - axis) for grid in (seen, means))
                assert torch.allclose(got[whole], expected[whole], atol=0.02)
                tested += int(whole.sum())
    assert tested > 800 / region_stride


def test_a_mixed_cell_is_mixed_by_the_share_of_the_mask() -> None:
    """As the mean of pixels that are mixed one by one."""
    views = [draw_view(np.random.default_rng(i), (128, 128), (64, 64), [1.0], 0.0) for i in range(2)]
    sources = [ramp_source([(128, 128)] * 2, views, 16, mirrored=False) for _ in range(2)]
    for source, value in zip(sources, (2.0, 10.0), strict=True):
        source.targets["t"].region_embeddings.fill_(value)
    mask = torch.from_numpy(np.random.default_rng(0).random((2, 64, 64)) < 0.3)
    batch = Batch(0, sources[0], sources[0], sources[1], mask)
    losses = ONLY_FEATURE
    targets = cached_targets(batch, losses)["t"]
    assert targets.mixed_regions is not None and targets.mixed_features.shape[1] == 0, "at the student's cells nobody reads them"
    pixels = torch.where(mask, 10.0, 2.0).view(2, 1, 4, 16, 4, 16).mean((3, 5)).expand(-1, 2, -1, -1)
    assert torch.allclose(targets.mixed_regions, pixels, atol=1e-4)


def test_the_term_by_hand() -> None:
    """Two views, two channels, 2 x 2 cells; padding and constant channels."""
    valid = torch.ones(1, 32, 32, dtype=torch.bool)
    padded = valid.clone()
    padded[0, :, 31] = False  # the right cells are not whole
    regions = torch.tensor([[[[1.0, 5.0], [3.0, 9.0]], [[7.0, 7.0], [7.0, 7.0]]]])
    targets = {"t": StepTargets(*[torch.empty(0)] * 4, labelled_regions=regions, mixed_regions=regions)}
    statistics = torch.tensor([1.0, 7.0]), torch.tensor([2.0, 0.0])
    losses = ONLY_FEATURE
    terms = feature_terms({"t": torch.zeros(2, 2, 2, 2)}, targets, (padded, valid), losses, Knowledge(features={"t": statistics}))
    # Standardised: 0, 2 / 1, 4 and zeros; the mean over channels is half of the squares.
    assert terms["feature_labelled_t"].item() == pytest.approx((0 + 1) / 2 / 2)
    assert terms["feature_unlabelled_t"].item() == pytest.approx((0 + 4 + 1 + 16) / 2 / 4)
    only = losses.model_copy(update={"images": ["unlabelled"]})
    assert list(
        feature_terms({"t": torch.zeros(2, 2, 2, 2)}, targets, (padded, valid), only, Knowledge(features={"t": statistics}))
    ) == ["feature_unlabelled_t"]


# --- training


def learner_of(project: Project) -> tuple[ProjectedStudent, Batch, Knowledge]:
    dataset, params = training_set(project), project.params
    knowledge = knowledge_of(params, dataset.manifest, dataset.open_caches(), CPU)
    torch.manual_seed(params.seed)
    learner = with_projections(build_network(params.student.network, 9), knowledge.features, params.targets.region_stride)
    assert isinstance(learner, ProjectedStudent)
    return learner, dataset[0], knowledge


def test_the_projections_learn_and_the_network_learns_through_them(finished_project: Path) -> None:
    project = open_project(finished_project / "params.yaml", [*FEATURE, "losses.pixel=0", "losses.region=0", "losses.image=0"])
    learner, batch, knowledge = learner_of(project)
    terms = step_terms(learner, batch, lambda one: cached_targets(one, project.params.losses), project.params, knowledge)
    kinds = [f"feature_{images}_{name}" for name in ("wide", "deep") for images in ("labelled", "unlabelled")]
    assert list(terms) == ["supervised", *kinds]
    torch.stack([terms[kind] for kind in kinds]).sum().backward()
    assert all(parameter.grad is not None for parameter in learner.projections.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in learner.network.model.encoder.parameters())
    for name, (mean, std) in knowledge.features.items():
        stored = [*stored_embeddings(project, name)]
        assert torch.allclose(mean, torch.cat(stored, 1).mean(1).float(), atol=1e-4)
        assert torch.allclose(std, torch.cat(stored, 1).std(1, correction=0).float(), atol=1e-4)


def stored_embeddings(project: Project, name: str) -> list[Tensor]:
    """(D, cells) float64 of each training image."""
    cache, manifest = open_cache(project.targets(name)), read_manifest(project.manifest, project.base)
    return [cache[row.image_id].features.flatten(1).double() for row in manifest.training]


def test_a_student_is_trained_and_its_file_has_no_projection(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """Old caches, too; a teacher need not name classes, and the weight 0 is the student of the other terms, to the byte."""
    before = project.student("distilled").read_bytes()
    train_student(open_project(project.base / "params.yaml", [*FEATURE, "losses.feature=0"]), Machine(CPU, resume=False))
    assert project.student("distilled").read_bytes() == before
    featured = open_project(project.base / "params.yaml", [*FEATURE, "student.ema=0.9"])
    capsys.readouterr()
    train_student(featured, Machine(CPU, resume=False))
    with_statistics = project.student("distilled").read_bytes()
    assert "computed now" not in capsys.readouterr().out and with_statistics != before
    states = [read_state_dict(project.student(name)) for name in ("distilled", "supervised")]
    assert states[0].keys() == states[1].keys()
    written = {path.stem for path in (project.results / "train-student-distilled/plots").iterdir()}
    assert {"feature_labelled_wide", "feature_unlabelled_deep"} <= written

    commit = json.loads((project.targets("wide") / COMMIT).read_bytes())
    (project.targets("wide") / COMMIT).chmod(0o644)
    (project.targets("wide") / COMMIT).write_bytes(
        sealed({key: value for key, value in commit.items() if key not in ("self", "feature_statistics")})
    )
    train_student(featured, Machine(CPU, resume=False))
    out = capsys.readouterr().out
    assert out.count("teacher wide: its cache keeps no mean and deviation of its embeddings") == 1 == out.count("computed now")
    assert project.student("distilled").read_bytes() == with_statistics


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["losses.feature=1"], r"losses: feature_teachers: is empty, and the feature term needs a teacher; name one"),
        (
            ["losses.feature_teachers=[wid]"],
            r"losses\.feature_teachers=\[wid\]: 'wid' is not among teachers: wide, deep; nearest is 'wide'",
        ),
        (["losses.feature_teachers=[wide, wide]"], r"losses\.feature_teachers=\[wide, wide\]: 'wide' stands twice"),
    ],
)
def test_feature_teachers_that_cannot_be_are_named(finished_project: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ParamsError, match=said):
        open_project(finished_project / "params.yaml", [*TINY, *overrides])


def test_what_live_teachers_do_not_have(finished_project: Path) -> None:
    params = open_project(finished_project / "params.yaml", [*TINY, "losses.feature_teachers=[wide]"]).params
    losses = open_project(finished_project / "params.yaml", [*FEATURE, "losses.pixel_choice=by-class"]).params.losses
    assert params.losses.measured is None and losses.measured == "feature_teachers"
