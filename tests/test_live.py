"""The live provider: MGD's online targets, equal to the cached ones where the two must agree."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from conftest import region_means, teacher_of, training_set
from mgd_pipeline.distillation.losses import pixel_consistency_loss, semantic_sensitive_loss
from mgd_pipeline.teachers.teacher import Teacher
from mgd_pipeline.training.batches import Batch, Source, cached_targets, mixed_valid, valid_views, with_views
from mgd_pipeline.training.live import live_targets
from mgd_pipeline.views import ViewParams
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project
from mgd_stages.stages.train_student import train_student

CPU = torch.device("cpu")


def teachers_of(project: Project) -> dict[str, Teacher]:
    return {name: teacher_of(project, name) for name in project.params.teachers}


def whole(source: Source | None) -> Source:
    """The same images, whole and un-augmented; padded below and to the right to 64 x 96 as stage one pads 48 x 72."""
    assert source is not None
    views = [ViewParams(v.height, v.width, v.height, v.width, 0, 0, 64, 96) for v in source.views]
    return with_views(source, views, source.jitter)


def identity_batch(project: Project, cutmix: bool) -> Batch:
    batch = training_set(project)[1]
    mask = torch.zeros(len(batch.labelled.rows), 64, 96, dtype=torch.bool)
    if cutmix:
        mask[:, 5:40, 11:50] = True
    return Batch(1, whole(batch.labelled), whole(batch.unlabelled), whole(batch.partner), mask)


@pytest.mark.parametrize("cutmix", [False, True])
def test_on_whole_images_both_providers_give_the_same(project: Project, cutmix: bool) -> None:
    """Within the encoding's tolerance: half a step of the uint8 logits, and 16-pixel means for the regions."""
    batch = identity_batch(project, cutmix)
    teachers = teachers_of(project)
    live = live_targets(teachers, batch)
    cached = cached_targets(batch)
    assert list(live) == list(cached) == list(teachers)
    inside, mixed_inside = valid_views(batch.labelled), mixed_valid(batch)
    for name in teachers:
        ours, theirs = live[name], cached[name]
        sources = [source for source in (batch.labelled, batch.unlabelled, batch.partner) if source]
        step = max(float(source.targets[name].affine[:, 1].max()) for source in sources)
        for one, other, valid in (
            (ours.labelled_logits, theirs.labelled_logits, inside),
            (ours.unmixed_logits, theirs.unmixed_logits, mixed_inside),
        ):
            assert one.shape == other.shape
            assert ((one - other).abs().amax(1)[valid]).max() <= step / 2 + 1e-3 * one.abs().max()
            assert (one.argmax(1) == other.argmax(1))[valid].float().mean() > 0.97
        if not cutmix:  # with a seam the live teacher sees another image: there the two may differ
            assert torch.allclose(ours.mixed_logits, ours.unmixed_logits, atol=1e-4)
            assert semantic_sensitive_loss(ours.mixed_logits, theirs.mixed_logits, valid=mixed_inside) < 9 * step / 2
            assert batch.unlabelled is not None
            stored = batch.unlabelled.targets[name].region_embeddings[..., :3, :5].float()
            means = region_means(ours.mixed_features, (48, 72))
            torch.testing.assert_close(means, stored, atol=2e-3 * float(means.abs().max()), rtol=2e-3)  # float16


def test_the_mixed_image_is_seen_for_regions_and_image_terms(project: Project) -> None:
    """With a seam, the live teacher's mixed logits are those of the mixed picture, not the mixture of two predictions."""
    batch = identity_batch(project, cutmix=True)
    targets = live_targets(teachers_of(project), batch)["wide"]
    assert (targets.mixed_logits - targets.unmixed_logits).abs().max() > 1e-2
    assert batch.partner is not None and batch.cutmix is not None
    everywhere = replace(batch, cutmix=torch.ones_like(batch.cutmix))
    swapped = replace(batch, unlabelled=batch.partner, partner=batch.unlabelled, cutmix=torch.zeros_like(batch.cutmix))
    one, other = (live_targets(teachers_of(project), b)["wide"] for b in (everywhere, swapped))
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cutmix", [True, False])
def test_no_view_is_seen_twice(project: Project, cutmix: bool) -> None:
    """A live step must not cost more than it has to, or comparisons of its time would be unfair."""
    batch = identity_batch(project, cutmix=True)
    if not cutmix:
        batch = replace(batch, partner=None, cutmix=None)
    teacher, seen = teacher_of(project, "wide"), []
    teacher.network.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    live_targets({"wide": teacher}, batch)
    (images,) = seen
    assert len(images) == sum(len(source.rows) for source in batch.sources) + (len(batch.labelled.rows) if cutmix else 0)
    assert len(images.flatten(1).unique(dim=0)) == len(images)


def test_live_targets_carry_no_gradient_and_leave_the_teacher_as_it_was(project: Project) -> None:
    batch = identity_batch(project, cutmix=True)
    teachers = teachers_of(project)
    before = {name: {k: v.clone() for k, v in teacher.network.state_dict().items()} for name, teacher in teachers.items()}
    targets = live_targets(teachers, batch)
    student = torch.randn_like(targets["wide"].unmixed_logits).requires_grad_()
    pixel_consistency_loss(student, targets["wide"].unmixed_logits).backward()
    assert student.grad is not None and not any(value.requires_grad for named in targets.values() for value in named)
    for name, teacher in teachers.items():
        assert all(torch.equal(before[name][key], value) for key, value in teacher.network.state_dict().items())
        teacher.network.train()
    with pytest.raises(ValueError, match="teacher wide in eval mode"):
        live_targets(teachers, batch)


def test_a_student_of_live_teachers_needs_no_store(project: Project) -> None:
    cached = project.student("distilled").read_bytes()
    shutil.rmtree(project.base / "data/targets")
    provider = partial(live_targets, teachers_of(project))
    train_student(project, Machine(CPU, resume=False), live=provider)
    first = project.student("distilled").read_bytes()
    assert first != cached, "crops are not whole images: the targets differ"
    train_student(project, Machine(CPU, resume=False), live=provider)
    assert project.student("distilled").read_bytes() == first
