"""Caches with the mirror image of each image: the targets of mirrored views, and how the teacher is measured on them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import TINY, teacher_of, training_set
from mgd_pipeline.caches.decoding import stored_logits
from mgd_pipeline.caches.format import count_images, mirrored_key
from mgd_pipeline.caches.reader import CachedTargets, TargetCache, open_cache
from mgd_pipeline.data.images import read_image
from mgd_pipeline.data.manifest import ImageKey, read_manifest
from mgd_pipeline.errors import CacheIncomplete, ParamsError
from mgd_pipeline.teachers.looks import dense_targets
from mgd_pipeline.training.batches import view_targets
from mgd_pipeline.views import source_positions
from mgd_stages.run.project import Project, open_project
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.tools.caches import recheck

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mirrored(finished_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The finished project, whose teacher `wide` has seen the mirror images as well; to read."""
    copy = shutil.copytree(finished_project, tmp_path_factory.mktemp("mirrored") / "project", symlinks=True)
    project = open_project(copy / "params.yaml", [*TINY, "targets.mirrored=true"])
    precompute_teachers(project, "wide", device=CPU, batch_size=8)
    return project


def test_each_image_and_its_mirror_image_have_a_row(mirrored: Project, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(mirrored.manifest, mirrored.base)
    teacher, cache = teacher_of(mirrored, "wide"), open_cache(mirrored.targets("wide"))
    assert len(cache.index.place) == 2 * len(manifest.training) == 2 * count_images(cache.index.place)
    for row in manifest.training[:4]:
        key = ImageKey(row.image_id, row.image_sha256)
        image = read_image(mirrored.base / manifest.root / row.image_path)
        mirror = np.ascontiguousarray(image[:, ::-1])
        seen = [dense_targets(teacher, [pixels], mirrored.params.targets)[0].logits for pixels in (image, mirror)]
        both = [cache.row(key), cache.row(mirrored_key(key))]
        stored = [stored_logits(cache, place)[0] for place in both]
        step = max(float(cache.record("logits_affine", place)[1]) for place in both)
        assert all(np.abs(ours - theirs).max() <= 0.51 * step for ours, theirs in zip(stored, seen, strict=True))
        assert np.abs(stored[1] - seen[0]).max() > 2 * step, "this teacher gives other values on the mirror image"
        assert np.abs(stored[1] - seen[0][..., ::-1]).max() > 2 * step, "and not the mirrored values"

    capsys.readouterr()
    recheck(mirrored, "wide", 1.0, "cpu", as_json=False)
    said = capsys.readouterr().out
    assert f"{2 * len(manifest.training)} of {2 * len(manifest.training)} images" in said


class Ramps:
    """A cache whose first channel holds each cell's column in the image (not in its mirror image), and the second channel whether
    the row is of the mirror image."""

    def __init__(self, cache: TargetCache) -> None:
        self.cache, self.layout, self.provenance, self.path = cache, cache.layout, cache.provenance, cache.path
        self.index, self.mirrored = cache.index, cache.mirrored
        self.row = cache.row

    def read(self, rows: Any) -> CachedTargets:
        real = self.cache.read(rows)
        logits, regions = real.logits.astype(np.float16), np.zeros_like(real.region_embeddings)
        for i, row in enumerate(rows):
            key = self.index.keys[list(self.index.rows).index(row)]
            mirror = key.image_id.endswith("?mirrored")
            width, frame = int(real.extents[i, 1]), int(real.extents[i, 3])
            x = np.linspace(0, frame - 1, frame // 4)
            logits[i, 0, :, : len(x)] = width - 1 - x if mirror else x
            logits[i, 1] = regions[i, 1] = mirror
            centres = np.arange(regions.shape[3]) * self.layout.region_stride + (self.layout.region_stride - 1) / 2
            regions[i, 0] = width - 1 - centres if mirror else centres
        affine = np.tile(np.array([[0, 1]], np.float32), (len(logits), 1))
        return CachedTargets(logits, affine, regions, real.extents)


@pytest.mark.parametrize("partner", ["same", "other"])
def test_mirrored_views_get_the_row_of_the_mirror_image(mirrored: Project, partner: Any) -> None:
    """Every view sees the image's own coordinates where its pixels come from, from the row that its drawing asks for."""
    dataset = replace(training_set(mirrored), caches={"wide": mirrored.targets("wide")})
    dataset.cutmix = dataset.cutmix.model_copy(update={"partner": partner})
    dataset.open_caches()["wide"] = Ramps(dataset.open_caches()["wide"])  # type: ignore[assignment]
    flips = []
    for step in range(dataset.optimisation.steps):
        assert len(dataset[step].sources) == 3
        for source in dataset[step].sources:
            seen = view_targets(source, "wide")
            where = source_positions(source.views)
            for i, view in enumerate(source.views):
                inside = where.inside_x[i]
                assert np.abs(seen.logits[i, 0, 3].numpy() - where.x[i])[inside].max() < 0.05
                for which in (seen.logits[i, 1], seen.features[i, 1]):
                    assert torch.allclose(which, torch.full_like(which, view.flip), atol=1e-4)
                cells = source_positions(source.views, (8, 8)).x[i]
                region = mirrored.params.targets.region_stride
                inner = (cells >= region) & (cells <= view.width - 1 - region)
                assert np.abs(seen.features[i, 0, 3].numpy() - cells)[inner].max(initial=0) < 0.05
                flips.append(view.flip)
    assert 0 < sum(flips) < len(flips)


def test_what_has_no_mirror_images_or_needs_none(finished_project: Path) -> None:
    project = open_project(finished_project / "params.yaml", TINY)
    dataset = replace(training_set(project), caches={"wide": project.targets("wide")})
    dataset.check_rows()
    dataset.open_caches()["wide"].provenance["preprocessing"]["mirrored"] = True
    with pytest.raises(CacheIncomplete, match=r"\?mirrored"):
        dataset.check_rows()

    with pytest.raises(ParamsError, match=r"targets: mirrored: tta\.flip makes both the same.*set one of them to false"):
        open_project(project.base / "params.yaml", [*TINY, "targets.mirrored=true", "targets.tta={scales: [1.0]}"])
    open_project(project.base / "params.yaml", [*TINY, "targets.mirrored=true", "targets.tta={scales: [1.0], flip: false}"])


def test_half_the_bits_are_used_and_told_of(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(project.manifest, project.base)
    full = open_cache(project.targets("wide"))
    miou = json.loads((project.results / "teachers/wide.json").read_text())["miou"]
    rows = [ImageKey(row.image_id, row.image_sha256) for row in manifest.training]
    before = [stored_logits(full, full.row(key))[0] for key in rows]
    steps = [float(full.record("logits_affine", full.row(key))[1]) for key in rows]
    half = open_project(project.base / "params.yaml", [*TINY, "targets.precision=bfloat16"])
    capsys.readouterr()
    precompute_teachers(half, "wide", device=CPU, batch_size=8)
    assert " in float32 (" in capsys.readouterr().out
    cache = open_cache(half.targets("wide"))
    assert cache.fingerprint != full.fingerprint
    after = [stored_logits(cache, cache.row(key))[0] for key in rows]
    changes = [np.abs(a - b).max() / step for a, b, step in zip(after, before, steps, strict=True)]
    # bfloat16 keeps 8 bits: more than an encoding's half step somewhere, never a tenth of the range.
    assert max(changes) > 1 and max(changes) < 25.5
    made = json.loads((half.results / "teachers/wide.json").read_text())
    assert made["miou_float32"] == miou and made["agreement_float32"] > 0.5
