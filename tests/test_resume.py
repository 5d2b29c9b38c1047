"""Interrupted trainings: killed runs are the runs that were never killed, signals, and what is kept."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import mgd_stages.stages.train_teacher as teachers
from conftest import LONGER, TINY, Counted
from mgd_pipeline.data.manifest import read_manifest, write_manifest
from mgd_pipeline.errors import NonFiniteError
from mgd_pipeline.networks.weights import read_state_dict
from mgd_pipeline.training.batches import Batch
from mgd_pipeline.training.checkpoint import TrainingCheckpoint, Unfinished
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project, open_project
from mgd_stages.run.unfinished import _differences
from mgd_stages.stages.precompute_teachers import precompute_teachers
from student_runs import CPU, FEATURE, distil, in_steps, results, train_in_child


@pytest.fixture(scope="module")
def undisturbed(finished_project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of the run that nothing interrupts."""
    copy = shutil.copytree(finished_project, tmp_path_factory.mktemp("undisturbed") / "project", symlinks=True)
    project = open_project(copy / "params.yaml", LONGER)
    distil(project)
    return results(project)


def work_of(project: Project) -> Path:
    return project.work("train-student-distilled")


def saved_steps(project: Project) -> list[int]:
    return sorted(int(path.stem.rsplit("-", 1)[1]) for path in work_of(project).glob("checkpoint-*.pt"))


def test_killed_at_random_moments_the_run_is_the_undisturbed_one(
    longer: Project, undisturbed: dict[str, bytes], counted: Counted
) -> None:
    context: Any = multiprocessing.get_context("forkserver")  # its processes begin with everything imported: several kills a second
    context.set_forkserver_preload(["mgd_stages.stages.train_student", "student_runs"])

    def begin() -> BaseProcess:
        process = context.Process(target=train_in_child, args=(str(longer.base / "params.yaml"),))
        process.start()
        return process

    first = context.Process(target=int)  # waits for the imports
    first.start()
    first.join()
    began, process = time.monotonic(), begin()
    process.join()
    duration = time.monotonic() - began
    assert process.exitcode == 0 and results(longer) == undisturbed
    rng = np.random.default_rng(5)
    kills, resumed, runs, wanted = 0, 0, 0, counted.of(20, 100)
    while kills < wanted:
        longer.student("distilled").unlink()
        while not longer.student("distilled").exists():
            resumed += bool(saved_steps(longer))
            process = begin()
            process.join(rng.uniform(0.2, 1.0) * duration if kills < wanted else None)
            if process.is_alive():
                process.kill()
                process.join()
                kills += 1
        runs += 1
        assert results(longer) == undisturbed
    assert resumed >= wanted // 4, "most kills fell before the first checkpoint: the proof is empty"
    counted.say(f"training: {kills} SIGKILLs in {runs} runs, {resumed} starts from a checkpoint, 0 differences")


def interrupt_at(project: Project, step: int, **changes: Any) -> None:
    """Trains until Ctrl-C comes during a step: the state after that step is saved."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are started with it ignored
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        in_steps(patched, lambda batch, _: batch.step == step and os.kill(os.getpid(), signal.SIGINT))
        distil(project, **changes)
    assert step + 1 in saved_steps(project)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler, "the handlers are as before"


def test_ctrl_c_saves_the_step_it_came_in_and_a_resume_that_forgets_something_is_noticed(
    longer: Project, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """The naive variants: each alone changes the result, so the proof above would fail."""
    interrupt_at(longer, 7)
    interrupt_at(longer, 31)
    kept, whole = shutil.copytree(work_of(longer), tmp_path / "kept"), TrainingCheckpoint.restore
    for forgotten in ("nothing", "optimizer", "schedule", "average"):
        shutil.copytree(kept, work_of(longer), dirs_exist_ok=True)

        def restore(self: TrainingCheckpoint, parts: Any, forgotten: str = forgotten) -> Any:
            return whole(self, {name: part for name, part in parts.items() if name != forgotten})

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(TrainingCheckpoint, "restore", restore)
            distil(longer)
        assert (results(longer) == undisturbed) == (forgotten == "nothing"), forgotten


@pytest.mark.parametrize(
    "heard",
    [
        *([f"losses.pixel_distance={name}"] for name in ("kl", "dist", "cauchy-schwarz", "ttm", "binary")),
        ["losses.channel=3.0"],
        ["losses.region_distance=kl"],
        ["losses.region_teacher=[wide, deep]"],
        ["losses.image_distance=presence"],
        ["losses.pixel_choice=by-class"],
        *([f"losses.pixel_weights=[{name}]"] for name in ("agreement", "correct", "margin", "edges", "balance")),
        [*FEATURE, "student.ema=0.9"],
        [*FEATURE, "student.optimizer=sgd", "student.learning_rate=0.01", "student.distillation_momentum=0.075"],
    ],
    ids=lambda heard: heard[-1],
)
def test_a_run_of_each_way_to_hear_teachers_goes_on_to_the_bit(project: Project, heard: list[str]) -> None:
    hearing = open_project(project.base / "params.yaml", [*TINY, "student.steps=6", *heard])
    distil(hearing)
    undisturbed = results(hearing)
    hearing.student("distilled").unlink()
    interrupt_at(hearing, 2)
    distil(hearing)
    assert results(hearing) == undisturbed


def test_a_run_started_with_ctrl_c_ignored_ignores_it(monkeypatch: pytest.MonkeyPatch, project: Project) -> None:
    """So that Ctrl-C in the terminal leaves alone what a script has put in the background."""
    heard: list[None] = []
    in_steps(monkeypatch, lambda *_: heard.append(os.kill(os.getpid(), signal.SIGINT)))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        distil(project)
    finally:
        assert signal.signal(signal.SIGINT, before) is signal.SIG_IGN
    assert len(heard) == project.params.student.steps


def test_sigterm_saves_and_exits_75(project: Project) -> None:
    """As SLURM and Kubernetes end a job: a signal to all its processes, the workers too; the command's exit code and message."""
    overrides = [part for override in [*TINY, "student.steps=2000"] for part in ("--set", override)]
    config = ("--config", str(project.base / "params.yaml"))
    process = subprocess.Popen(
        [sys.executable, "-m", "mgd_stages.cli", "train-student", "--num-workers", "1", *config, *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    while not saved_steps(project):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    newest = saved_steps(project)[-1]
    assert process.returncode == 75
    assert said == f"error: train-student distilled: stopped by SIGTERM after step {newest}; the same command goes on from there\n"


def test_other_settings_keep_the_unfinished_run_and_say_how_to_go_on(
    longer: Project, undisturbed: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """What once cost a night: one call with another number of steps, and the first command began at 0 again."""
    work = work_of(longer)
    interrupt_at(longer, 31)
    kept = sorted(work.iterdir())
    capsys.readouterr()
    distil(open_project(longer.base / "params.yaml", [*LONGER, "student.steps=20", "student.learning_rate=0.5"]))
    out = capsys.readouterr().out
    assert out.count("begins at step 0") == 1 and "1 unfinished training of other settings" in out
    for said in (
        *("kept: step 32 of 60, saved 20", "student.steps is 60 there, 20 here", "gives it up", str(work), "continues it;"),
        "the same command with --set student.steps=60, with --set student.learning_rate=0.0",
    ):
        assert said in out
    assert sorted(work.iterdir()) == kept
    # --- a run of the same settings that shall not go on with it does not lose it, either
    interrupt_at(longer, 33)
    capsys.readouterr()
    distil(longer)
    assert "goes on at step 34" in capsys.readouterr().out and results(longer) == undisturbed and not list(work.iterdir())


def without_a_photo(project: Project) -> None:
    """One unlabelled image fewer, as prepare-data would write it."""
    manifest = read_manifest(project.manifest, project.base)
    gone = manifest.unlabelled[-1].image_id
    write_manifest(replace(manifest, subsets={i: subset for i, subset in manifest.subsets.items() if i != gone}), project.manifest)


def test_other_photos_begin_an_unfinished_teacher_again_and_keep_a_finished_one(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a training on some photos and half of it on others would be neither."""
    keeping = open_project(project.base / "params.yaml", [*TINY, "retrain_teachers=new-labels"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are started with it ignored
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(teachers, "consistency_weight", lambda *_: os.kill(os.getpid(), signal.SIGINT) or 1.0)
        teachers.train_teacher(keeping, "wide", Machine(CPU))
    signal.signal(signal.SIGINT, before)
    without_a_photo(project)
    teachers.train_teacher(keeping, "wide", Machine(CPU))
    said = capsys.readouterr().out
    assert "begins at step 0. Kept: 1 unfinished training" in said and "with the data/manifest of that time continues it" in said
    again = keeping.teacher("wide").read_bytes()
    shutil.rmtree(keeping.work("train-teacher-wide"))
    teachers.train_teacher(keeping, "wide", Machine(CPU))
    assert keeping.teacher("wide").read_bytes() == again

    def kept() -> list[str]:
        capsys.readouterr()
        precompute_teachers(keeping, "wide", device=CPU)
        return [line for line in capsys.readouterr().out.splitlines() if "is kept" in line]

    assert kept() == []
    without_a_photo(project)
    (line,) = kept()
    assert "(17 then, 16 now); `mgd-pipeline train-teacher --teacher wide` trains it again" in line
    teachers.train_teacher(project, "wide", Machine(CPU))
    without_a_photo(project)
    assert kept() == [], "a teacher that is trained again anyway has the bytes that it always had"


def test_a_frozen_encoder_is_the_published_one_though_its_training_is_interrupted(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DPT on a ViT; the finished file has the whole moving average, and stage one takes it."""
    published = timm.create_model("test_vit", pretrained=False).state_dict()
    save_file(published, project.base / "vit.safetensors")
    network = ["teachers.wide.decoder=dpt", "teachers.wide.encoder=tu-test_vit", "teachers.wide.encoder_weights=vit.safetensors"]
    settings = ["teachers.wide.frozen_encoder=true", "teacher_training.steps=2"]
    frozen = open_project(project.base / "params.yaml", [*TINY, *network, *settings])
    teachers.train_teacher(frozen, "wide", Machine(CPU))
    once = frozen.teacher("wide").read_bytes()
    frozen.teacher("wide").unlink()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are started with it ignored
    weight = teachers.consistency_weight
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(teachers, "consistency_weight", lambda *which: os.kill(os.getpid(), signal.SIGINT) or weight(*which))
        teachers.train_teacher(frozen, "wide", Machine(CPU))
    signal.signal(signal.SIGINT, before)
    teachers.train_teacher(frozen, "wide", Machine(CPU))
    assert frozen.teacher("wide").read_bytes() == once
    state = read_state_dict(frozen.teacher("wide"))
    assert all(torch.equal(state[f"encoder.model.{key}"], value) for key, value in published.items())
    precompute_teachers(frozen, "wide", device=CPU)
    assert (frozen.results / "teachers/wide.json").is_file()


def test_no_resume_sets_the_earlier_state_aside(longer: Project, capsys: pytest.CaptureFixture[str]) -> None:
    work = work_of(longer)
    interrupt_at(longer, 31)
    capsys.readouterr()
    interrupt_at(longer, 7, resume=False)
    out = capsys.readouterr().out
    assert "begins at step 0 (--no-resume); the state of step 32 of an earlier run is kept: after `mv " in out
    assert saved_steps(longer) == [8] and len(list(work.glob("set-aside-*-*32.pt"))) == 1
    os.rename(*out.partition("after `mv ")[2].partition("`")[0].split())
    distil(longer)
    assert "goes on at step 32" in capsys.readouterr().out and not list(work.iterdir())


def test_what_the_processes_and_the_machine_were_is_told() -> None:
    then = {"device": "cuda", "processes": 2, "data/manifest": "a", "data/targets": ["b"], "views.crop": [32, 32], "gone": 1}
    now = {"device": "cpu", "processes": 1, "data/manifest": "c", "data/targets": [], "views.crop": (32, 32), "new": 1}
    run = Unfinished((), Path("checkpoint-key.json"), 10, 20, 0.0, then)
    said = _differences(run, now)
    assert "with --device cuda, under torchrun with 2 processes, with the data/manifest of that time" in said
    assert "views.crop" not in said and "gone is 1 there, unknown here" in said
    assert "data/targets of that time, in the version that began it continues it" in said
    # --- a setting that is new in this version, and sections that are null on one side
    of = partial(replace, run)
    ohem = {"student.ohem.threshold": 0.7, "student.ohem.min_kept": 9}
    for before, after, told in (
        ({}, {"new": 1}, "new is unknown there, 1 here; the same command in the version that began it continues it"),
        (
            {"student.ohem": None},
            ohem,
            "min_kept is null there, 9 here; the same command with --set student.ohem=null continues it",
        ),
        (ohem, {"student.ohem": None}, """--set 'student.ohem={"threshold": 0.7, "min_kept": 9}' continues it"""),
    ):
        assert told in _differences(of(settings={"seed": 0, **before}), {"seed": 0, **after})
    assert "were not noted" in _differences(replace(run, settings=None), now)
    assert "another version" in _differences(run, then)


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(
    longer: Project, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mgd_pipeline.training.checkpoint.replace_file", full)
    distil(longer)
    assert results(longer) == undisturbed
    assert "no checkpoint at step 10: No space left on device; make room below" in capsys.readouterr().out


def test_a_term_that_is_not_finite_is_named_with_its_step_and_images(longer: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    images: list[str] = []

    def poison(batch: Batch, terms: dict[str, torch.Tensor]) -> None:
        if batch.step == 13:
            images.extend(row.image_id for row in batch.labelled.rows)
            terms["region"] = terms["region"] * float("nan")

    in_steps(monkeypatch, poison)
    with pytest.raises(NonFiniteError, match=r"not finite at step 13: region = nan; images train_") as caught:
        distil(longer)
    assert all(image in str(caught.value) for image in images)
    assert saved_steps(longer) and saved_steps(longer)[-1] <= 13, "what came after is not kept"
