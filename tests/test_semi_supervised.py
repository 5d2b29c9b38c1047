"""Mean teacher: what the moving average is shown and says, and that an interrupted run is the undisturbed one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mgd_stages.stages.train_teacher as stage
from conftest import TINY, training_set
from mgd_pipeline.distillation import Ohem
from mgd_pipeline.errors import ParamsError
from mgd_pipeline.networks.normalisation import IMAGENET
from mgd_pipeline.networks.segmentation import DenseOutputs
from mgd_pipeline.networks.weights import read_state_dict
from mgd_pipeline.params import TeacherTrainingParams
from mgd_pipeline.training import semi_supervised
from mgd_pipeline.training.batches import Batch, mixed_valid, view_images, view_labels
from mgd_pipeline.training.semi_supervised import Settings, mean_teacher
from mgd_stages.reports.page import report
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project, open_project
from mgd_stages.stages.evaluate import evaluate
from mgd_stages.stages.train_student import train_student

CPU = torch.device("cpu")
BASE: dict[str, Any] = {"steps": 10, "labelled_batch": 2, "unlabelled_batch": 2, "learning_rate": 0.1, "ema": 0.9}
HOW = Settings(IMAGENET, jitter=0.5, bfloat16=False, ohem=None, confidence=0.0)


class _Brightness(nn.Module):
    """Three classes at full size: the scaled channels of its input. Notes what it was shown."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.shown: list[Tensor] = []

    def forward(self, images_B3HW: Tensor) -> DenseOutputs:
        self.shown.append(images_B3HW.detach().clone())
        return DenseOutputs(self.scale * images_B3HW, images_B3HW)


@pytest.fixture
def batch(project: Project) -> Batch:
    made = training_set(project)[0]
    assert made.cutmix is not None and 0 < made.cutmix.float().mean() < 1
    made.labelled.labels.remainder_(3)  # pyright: ignore[reportOptionalMemberAccess]
    return made


def test_the_average_labels_unmixed_views_without_jitter_and_the_network_learns_from_mixed_views_with_jitter(batch: Batch) -> None:
    network, average = _Brightness(1.0), _Brightness(4.0)
    supervised, consistency = mean_teacher(network, average, batch, HOW)
    (seen,), (learnt,) = average.shown, network.shown
    plain = [view_images(source, IMAGENET, 0) for source in batch.mixed]
    assert torch.equal(seen, torch.cat(plain))
    jittered = [view_images(source, IMAGENET, 0.5) for source in batch.mixed]
    mask = batch.cutmix[:, None]  # pyright: ignore[reportOptionalSubscript]
    mixed, labels = torch.where(mask, jittered[1], jittered[0]), torch.where(mask, plain[1], plain[0]).argmax(1)
    assert torch.equal(learnt[len(batch.labelled.rows) :], mixed)
    each = F.cross_entropy(mixed, labels, reduction="none")
    assert consistency.item() == pytest.approx(each[mixed_valid(batch)].mean().item(), rel=1e-5)
    first = view_images(batch.labelled, IMAGENET, 0.5)
    assert supervised.item() == pytest.approx(
        F.cross_entropy(first, view_labels(batch.labelled), ignore_index=255).item(), rel=1e-5
    )
    (supervised + consistency).backward()
    assert network.scale.grad is not None and average.scale.grad is None


def test_with_a_threshold_the_mean_is_over_all_valid_pixels_as_in_fixmatch(batch: Batch) -> None:
    network, average = _Brightness(1.0), _Brightness(1.0)
    plain = [view_images(source, IMAGENET, 0) for source in batch.mixed]
    labels = torch.where(batch.cutmix[:, None], plain[1], plain[0])  # pyright: ignore[reportOptionalSubscript]
    confidence = labels.softmax(1).amax(1)
    values = confidence[mixed_valid(batch)].unique()
    middle = len(values) // 2
    gap = int((values[middle + 1 : middle + 50] - values[middle : middle + 49]).argmax())  # no value lies at the threshold
    threshold = values[middle + gap : middle + gap + 2].mean().item()
    _, consistency = mean_teacher(network, average, batch, HOW._replace(confidence=threshold, ohem=Ohem()))
    each = F.cross_entropy(network.shown[0][len(batch.labelled.rows) :], labels.argmax(1), reduction="none")
    valid = mixed_valid(batch)
    counted = each[valid & (confidence >= threshold)]
    assert 0.3 < len(counted) / int(valid.sum()) < 0.7
    assert consistency.item() == pytest.approx(counted.sum().item() / int(valid.sum()), rel=1e-5)


@pytest.mark.parametrize("confidence", [0.0, 0.6])
def test_class_offsets_change_pseudo_labels_and_not_which_pixels_count(batch: Batch, confidence: float) -> None:
    network, average, offsets = _Brightness(1.0), _Brightness(1.0), torch.tensor([0.5, -1.5, 0.0])
    plain = [view_images(source, IMAGENET, 0) for source in batch.mixed]
    guide = torch.where(batch.cutmix[:, None], plain[1], plain[0])  # pyright: ignore[reportOptionalSubscript]
    labels = (guide - offsets[:, None, None]).argmax(1)
    assert (labels != guide.argmax(1)).any()
    how = HOW._replace(confidence=confidence, class_offsets=offsets)
    _, consistency = mean_teacher(network, average, batch, how)
    each = F.cross_entropy(network.shown[0][len(batch.labelled.rows) :], labels, reduction="none")
    valid = mixed_valid(batch)
    counted = each[valid & (guide.softmax(1).amax(1) >= confidence)]
    assert consistency.item() == pytest.approx(counted.sum().item() / int(valid.sum()), rel=1e-5)
    nothing, none = (mean_teacher(network, average, batch, how._replace(class_offsets=off))[1] for off in (torch.zeros(3), None))
    torch.testing.assert_close(nothing, none)


def test_the_shares_of_the_labelled_pixels_reach_the_pseudo_labels_of_every_method(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = semi_supervised._consistency, list[Tensor | None]()

    def noted(*tensors: Any) -> Tensor:
        seen.append(tensors[-1].class_offsets)
        return whole(*tensors)

    monkeypatch.setattr(semi_supervised, "_consistency", noted)
    manifest = stage.read_manifest(project.manifest, project.base)
    labelled = np.concatenate([manifest.mask(row).ravel() for row in manifest.labelled])
    shares = np.array([np.mean(labelled[labelled != 255] == k) for k in range(len(manifest.classes))])
    for method in ("cps", "mean-teacher"):
        teacher(project, f"teacher_training.method={method}", "teacher_training.prior_adjustment=0.5")
    settings = [f"student.without_teachers.{key}" for key in ("method=mean-teacher", "prior_adjustment=0.5")]
    alone = open_project(project.base / "params.yaml", [*TINY, *settings, "student.ema=0.9"])
    train_student(alone, Machine(CPU), supervised_only=True)
    assert len(seen) == 8 * 3 + alone.params.student.steps
    for offsets in seen:
        assert offsets is not None
        np.testing.assert_allclose(offsets.numpy(), 0.5 * np.log(shares), rtol=1e-5)


def teacher(project: Project, *settings: str) -> Path:
    chosen = open_project(
        project.base / "params.yaml", [*TINY, "teacher_training.method=mean-teacher", "teacher_training.steps=8", *settings]
    )
    stage.train_teacher(chosen, "wide", Machine(CPU))
    return chosen.teacher("wide")


def test_a_mean_teacher_stopped_at_any_step_goes_on_to_the_same_bytes(project: Project) -> None:
    """Its average is part of the loss: a resume that begins a new average would give other weights."""
    whole = teacher(project).read_bytes()
    supervised = teacher(project, "teacher_training.method=supervised").read_bytes()
    assert whole != supervised
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are started with it ignored
    for step in (2, 5):
        with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
            ramp = stage.consistency_weight

            def interrupted(params: Any, now: int, steps: int, step: int = step, ramp: Any = ramp) -> float:
                if now == step:
                    os.kill(os.getpid(), signal.SIGINT)
                return ramp(params, now, steps)

            patched.setattr(stage, "consistency_weight", interrupted)
            teacher(project)
    signal.signal(signal.SIGINT, before)
    assert teacher(project).read_bytes() == whole


def test_the_average_labels_in_eval_mode(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training mode its batch statistics would change with what it is shown, and its dropout would draw."""
    modes: list[bool] = []
    whole = semi_supervised._pseudo_labels

    def noted(guides: Any, *others: Any) -> list[Tensor]:
        modes.append(any(module.training for guide in guides for module in guide.modules()))
        return whole(guides, *others)

    monkeypatch.setattr(semi_supervised, "_pseudo_labels", noted)
    teacher(project)
    alone = "student.without_teachers.method=mean-teacher"
    train_student(open_project(project.base / "params.yaml", [*TINY, alone, "student.ema=0.9"]), Machine(CPU), supervised_only=True)
    assert len(modes) > 5 and not any(modes)


def test_a_student_by_mean_teacher_opens_no_cache_and_learns_from_unlabelled_images(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*TINY, "student.ema=0.9"]
    train_student(open_project(project.base / "params.yaml", settings), Machine(CPU), supervised_only=True)
    before = read_state_dict(project.student("supervised"))
    (project.base / "data/targets").rename(project.base / "data/elsewhere")
    alone = [*settings, "student.without_teachers.method=mean-teacher"]
    train_student(open_project(project.base / "params.yaml", alone), Machine(CPU), supervised_only=True)
    after = read_state_dict(project.student("supervised"))
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert (project.results / "train-student-supervised/plots/consistency.tsv").is_file()
    evaluate(project, device=CPU)
    report(project)
    assert "from mean-teacher without teachers" in capsys.readouterr().out
    page = (project.results / "report.html").read_text(encoding="utf-8")
    assert "deeplabv3plus, tu-test_efficientnet, mean-teacher" in page and "from mean-teacher without teachers" in page
    manifest = stage.read_manifest(project.manifest, project.base)
    manifest.image_file(manifest.unlabelled[0]).unlink()
    with pytest.raises(Exception, match=r"no such file"):
        train_student(open_project(project.base / "params.yaml", [*alone, "seed=1"]), Machine(CPU), supervised_only=True)


def test_mean_teacher_needs_an_average_and_old_names_still_say_what_they_said(project: Project) -> None:
    for key in ("teacher_training.", "student.without_teachers."):
        section = key.partition(".")[0]
        with pytest.raises(ParamsError, match=rf"{section}: ema: mean-teacher .* set ema"):
            open_project(project.base / "params.yaml", [f"{key}method=mean-teacher", f"{section}.ema=0"])
    old = TeacherTrainingParams.model_validate(BASE | {"cps": 0.0, "cps_rampup": 0.25})
    assert (old.method, old.consistency, old.consistency_rampup, old.uses_unlabelled) == ("cps", 0.0, 0.25, False)
    with pytest.raises(ParamsError, match=r"cps: is the former name of consistency; write only consistency"):
        open_project(project.base / "params.yaml", ["teacher_training.consistency=1.0", "teacher_training.cps=0.5"])


def test_the_study_gives_mean_teacher_the_seconds_of_the_distilled_student(project: Project) -> None:
    from mgd_stages.study.variants import named_variants

    params = project.params
    student = params.student.model_copy(update={"steps": 2000, "labelled_batch": 8, "unlabelled_batch": 8})
    params = params.model_copy(update={"student": student})
    variant = named_variants(params)["mean-teacher"]
    # 16 views learnt from, forward and backward: 48 forward passes. With CutMix, 16 views shown to the average: 64 in all.
    assert variant.supervised_only and "student.steps=1500" in variant.overrides
    without = params.model_copy(update={"cutmix": params.cutmix.model_copy(update={"boxes": 0})})
    assert f"student.steps={round(2000 * 48 / 56)}" in named_variants(without)["mean-teacher"].overrides
