"""The live provider: MGD's online targets, equal to the cached ones where the two must agree."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import TINY, region_means, teacher_of, training_set
from mgd_pipeline.distillation import pixel_consistency_loss, semantic_sensitive_loss
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params_file import parse_params
from mgd_pipeline.teachers.teacher import Teacher
from mgd_pipeline.training.batches import Batch, Source, cached_targets, mixed_valid, valid_views, with_views
from mgd_pipeline.training.live import live_targets, runs_live
from mgd_pipeline.views import ViewParams
from mgd_stages.projects.presets import preset
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project, open_project
from mgd_stages.stages.train_student import train_student
from mgd_stages.study.run import _check_live
from mgd_stages.study.variants import Variant


@pytest.fixture
def teachers(finished_project: Path) -> dict[str, Teacher]:
    project = open_project(finished_project / "params.yaml", TINY)
    return {name: teacher_of(project, name) for name in project.params.teachers}


@pytest.fixture(scope="module")
def mixed(finished_project: Path) -> Batch:
    """Whole images, un-augmented but for CutMix; padded below and to the right to 64 x 96 as stage one pads 48 x 72."""
    batch = training_set(open_project(finished_project / "params.yaml", TINY))[1]
    mask = torch.zeros(len(batch.labelled.rows), 64, 96, dtype=torch.bool)
    mask[:, 5:40, 11:50] = True

    def whole(source: Source | None) -> Source:
        assert source is not None
        views = [ViewParams(v.height, v.width, v.height, v.width, 0, 0, 64, 96) for v in source.views]
        return with_views(source, views, source.jitter)

    return Batch(1, whole(batch.labelled), whole(batch.unlabelled), whole(batch.partner), mask)


@pytest.mark.parametrize("cutmix", [False, True])
def test_on_whole_images_both_providers_give_the_same(mixed: Batch, teachers: dict[str, Teacher], cutmix: bool) -> None:
    """Within the encoding's tolerance: half a step of the uint8 logits, and 16-pixel means for the regions."""
    assert mixed.cutmix is not None and mixed.unlabelled is not None
    batch = mixed if cutmix else replace(mixed, cutmix=torch.zeros_like(mixed.cutmix))
    live, cached = live_targets(teachers, batch), cached_targets(batch)
    assert list(live) == list(cached) == list(teachers)
    inside, mixed_inside = valid_views(batch.labelled), mixed_valid(batch)
    for name, ours in live.items():
        theirs = cached[name]
        step = max(float(source.targets[name].affine[:, 1].max()) for source in batch.sources)
        for one, other, valid in (
            (ours.labelled_logits, theirs.labelled_logits, inside),
            (ours.unmixed_logits, theirs.unmixed_logits, mixed_inside),
        ):
            assert one.shape == other.shape
            assert ((one - other).abs().amax(1)[valid]).max() <= step / 2 + 1e-3 * one.abs().max()
            assert (one.argmax(1) == other.argmax(1))[valid].float().mean() > 0.97
        if cutmix:  # the live teacher sees the mixed picture: its logits are not the mixture of two predictions
            assert name != "wide" or (ours.mixed_logits - ours.unmixed_logits).abs().max() > 1e-2
        else:
            assert torch.allclose(ours.mixed_logits, ours.unmixed_logits, atol=1e-4)
            assert semantic_sensitive_loss(ours.mixed_logits, theirs.mixed_logits, valid=mixed_inside) < 9 * step / 2
            stored = mixed.unlabelled.targets[name].region_embeddings[..., :3, :5].float()
            means = region_means(ours.mixed_features, (48, 72))
            torch.testing.assert_close(means, stored, atol=2e-3 * float(means.abs().max()), rtol=2e-3)  # float16


def test_a_mask_of_the_whole_view_swaps_the_sources(mixed: Batch, teachers: dict[str, Teacher]) -> None:
    assert mixed.cutmix is not None
    everywhere = replace(mixed, cutmix=torch.ones_like(mixed.cutmix))
    swapped = replace(mixed, unlabelled=mixed.partner, partner=mixed.unlabelled, cutmix=torch.zeros_like(mixed.cutmix))
    for mine, theirs in zip(*(live_targets(teachers, batch)["wide"] for batch in (everywhere, swapped)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cutmix", [True, False])
def test_no_view_is_seen_twice(mixed: Batch, teachers: dict[str, Teacher], cutmix: bool) -> None:
    """A live step must not cost more than it has to, or comparisons of its time would be unfair."""
    batch = mixed if cutmix else replace(mixed, partner=None, cutmix=None)
    seen: list[torch.Tensor] = []
    teachers["wide"].network.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    live_targets({"wide": teachers["wide"]}, batch)
    (images,) = seen
    assert len(images) == sum(len(source.rows) for source in batch.sources) + (len(batch.labelled.rows) if cutmix else 0)
    assert len(images.flatten(1).unique(dim=0)) == len(images)


def test_live_targets_carry_no_gradient_and_leave_the_teacher_as_it_was(mixed: Batch, teachers: dict[str, Teacher]) -> None:
    before = {name: {k: v.clone() for k, v in teacher.network.state_dict().items()} for name, teacher in teachers.items()}
    targets = live_targets(teachers, mixed)
    student = torch.randn_like(targets["wide"].unmixed_logits).requires_grad_()
    pixel_consistency_loss(student, targets["wide"].unmixed_logits).backward()
    values = [value for named in targets.values() for value in named if value is not None]
    assert student.grad is not None and not any(value.requires_grad for value in values)
    for name, teacher in teachers.items():
        assert all(torch.equal(before[name][key], value) for key, value in teacher.network.state_dict().items())
        teacher.network.train()
    with pytest.raises(ValueError, match="teacher wide in eval mode"):
        live_targets(teachers, mixed)


def test_a_student_of_live_teachers_needs_no_teacher_cache(project: Project, teachers: dict[str, Teacher]) -> None:
    students = [project.student("distilled").read_bytes()]
    shutil.rmtree(project.base / "data/targets")
    for _ in range(2):
        train_student(project, Machine(torch.device("cpu"), resume=False), live=partial(live_targets, teachers))
        students.append(project.student("distilled").read_bytes())
    assert students[1] != students[0], "crops are not whole images: the targets differ"
    assert students[2] == students[1]


@pytest.mark.parametrize(
    ("changes", "live"),
    [({}, True), ({"decoder": "dpt"}, False), ({"short_side": 64}, False), ({"class_map": {"a": [0]}}, False)],
)
def test_a_study_refuses_teachers_that_cannot_run_live_before_anything_is_computed(changes: dict[str, Any], live: bool) -> None:
    raw = preset("shapes", "data/raw/shapes", "1/8").model_dump()
    raw["teachers"]["deep"] |= changes
    params = parse_params(raw)
    assert runs_live(params.teachers["deep"]) == live
    run: Any = SimpleNamespace(folder=Path("x"), variant=Variant("live", live=True))
    said = r"--variant live: teacher deep cannot run live; only teachers with decoder deeplabv3plus, fpn or upernet can"
    with nullcontext() if live else pytest.raises(ParamsError, match=said):
        _check_live({run.folder: params}, [run])


@pytest.mark.parametrize("heard", ["pixel_choice: by-class", "pixel_weights: margin"])
def test_a_study_refuses_live_teachers_where_caches_are_measured(heard: str) -> None:
    key, value = heard.split(": ")
    raw = preset("shapes", "data/raw/shapes", "1/8").model_dump()
    raw["losses"][key] = [value] if key == "pixel_weights" else value
    run: Any = SimpleNamespace(folder=Path("x"), variant=Variant("live", live=True))
    said = rf"--variant live: losses\.{heard} is measured on teacher caches, which a live run does not read: leave this variant out"
    with pytest.raises(ParamsError, match=said):
        _check_live({run.folder: parse_params(raw)}, [run])
