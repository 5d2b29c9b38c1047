"""The training loop: killed runs are the runs that were never killed, signals, workers, ranks, and no waiting for the device."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing import resource_sharer
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import mgd_stages.run.ranks as ranks_module
import mgd_stages.stages.train_student as stage
import mgd_stages.stages.train_teacher as teachers
from conftest import TINY, Counted, training_set
from mgd_pipeline.data import manifest as manifests
from mgd_pipeline.data.manifest import read_manifest, write_manifest
from mgd_pipeline.data.shapes import CLASSES
from mgd_pipeline.errors import DataError, LoaderError, MemoryShortage, NonFiniteError, OutputError, ParamsError
from mgd_pipeline.networks.segmentation import build_network
from mgd_pipeline.networks.weights import read_state_dict
from mgd_pipeline.params import NetworkParams
from mgd_pipeline.students.student import load_student
from mgd_pipeline.training import loading, shared_memory
from mgd_pipeline.training.batches import Batch, cached_targets
from mgd_pipeline.training.checkpoint import TrainingCheckpoint, Unfinished
from mgd_pipeline.training.dataset import TrainingSet
from mgd_pipeline.training.features import with_projections
from mgd_pipeline.training.knowledge import knowledge_of
from mgd_pipeline.training.loading import load_batches
from mgd_pipeline.training.optimisation import StepLoss, build_average, build_optimizer, build_schedule, update_average
from mgd_pipeline.training.simulated_int8 import last_tenth
from mgd_pipeline.training.terms import step_terms, total_loss
from mgd_stages.cli import app
from mgd_stages.run.loop import _seed
from mgd_stages.run.machine import Machine, check_compiler
from mgd_stages.run.project import Project, open_project
from mgd_stages.run.ranks import on_ranks
from mgd_stages.run.unfinished import _differences
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.train_student import train_student

CPU = torch.device("cpu")
WITHOUT_BACKGROUND = json.dumps({name: [k] if k else [] for k, name in enumerate(CLASSES)})
FEATURE = ["losses.feature=1", "losses.feature_teachers=[wide, deep]"]
LONGER = [*TINY, "student.steps=60", "student.ema=0.9"]


@pytest.fixture
def longer(project: Project) -> Project:
    """The project with a student that is worth interrupting."""
    return open_project(project.base / "params.yaml", LONGER)


@pytest.fixture(scope="module")
def undisturbed(finished_project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of the run that nothing interrupts."""
    copy = shutil.copytree(finished_project, tmp_path_factory.mktemp("undisturbed") / "project", symlinks=True)
    project = open_project(copy / "params.yaml", LONGER)
    distil(project)
    return results(project)


def distil(project: Project, **changes: Any) -> None:
    train_student(project, Machine(CPU, **changes))


def results(project: Project) -> dict[str, bytes]:
    """The student, and every logged number."""
    folder = project.results / "train-student-distilled"
    files = [project.student("distilled"), folder / "metrics.json", *sorted(folder.glob("plots/*"))]
    return {path.name: path.read_bytes() for path in files}


def work_of(project: Project) -> Path:
    return project.work("train-student-distilled")


def saved_steps(project: Project) -> list[int]:
    return sorted(int(path.stem.rsplit("-", 1)[1]) for path in work_of(project).glob("checkpoint-*.pt"))


def in_steps(patched: pytest.MonkeyPatch, act: Callable[[Batch, dict[str, torch.Tensor]], object]) -> None:
    """`act` gets the batch and the terms of every step."""
    whole = stage.step_terms

    def step_terms(forward: Any, batch: Batch, *others: Any) -> dict[str, torch.Tensor]:
        terms = whole(forward, batch, *others)
        act(batch, terms)
        return terms

    patched.setattr(stage, "step_terms", step_terms)


def train_in_child(config: str) -> None:
    torch.set_num_threads(1)
    distil(open_project(Path(config), LONGER))


def test_killed_at_random_moments_the_run_is_the_undisturbed_one(
    longer: Project, undisturbed: dict[str, bytes], counted: Counted
) -> None:
    context: Any = multiprocessing.get_context("forkserver")  # its processes begin with everything imported: several kills a second
    context.set_forkserver_preload(["mgd_stages.stages.train_student", "test_training_loop"])

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


@pytest.mark.parametrize("name", ["quantised", "quantised-supervised"])
def test_a_fine_tuning_for_int8_goes_on_to_the_bit(longer: Project, name: str) -> None:
    """From the finished student, a tenth of the steps; the result is an ordinary student that keeps the statistics of BatchNorm."""
    finished, twin = ("supervised", True) if "-" in name else ("distilled", False)

    def tune(**changes: Any) -> bytes:
        train_student(longer, Machine(CPU, **changes), quantised=True, supervised_only=twin)
        return longer.student(name).read_bytes()

    given = longer.student(finished).read_bytes()
    undisturbed = tune()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are started with it ignored
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        in_steps(patched, lambda batch, _: batch.step == 2 and os.kill(os.getpid(), signal.SIGINT))
        tune(resume=False)
    signal.signal(signal.SIGINT, before)
    assert [path.name[-6:] for path in longer.work(f"train-student-{name}").glob("checkpoint-*.pt")] == ["003.pt"]
    longer.student(name).unlink()
    assert tune() == undisturbed and longer.student(finished).read_bytes() == given
    start, tuned = load_student(longer.student(finished)), load_student(longer.student(name))
    sha256 = hashlib.sha256(given).hexdigest()
    said = {"student": f"data/students/{finished}/student.safetensors", "sha256": sha256, "steps": 6}
    assert tuned.metadata == {**start.metadata, "int8_fine_tuning": said}
    for key, value in start.network.state_dict().items():
        same = torch.equal(value, tuned.network.state_dict()[key])
        assert same == ("running" in key or "num_batches" in key), key


def test_a_fine_tuning_for_int8_is_the_last_tenth_of_the_training(longer: Project) -> None:
    feature = open_project(longer.base / "params.yaml", [*LONGER, *FEATURE, "student.learning_rate=0.02", "student.poly_power=2"])
    student, losses = last_tenth(feature.params).student, last_tenth(feature.params).losses
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    schedule = build_schedule(optimizer, feature.params.student)
    for _ in range(54):
        optimizer.step()
        schedule.step()
    assert student.steps == 6 and student.learning_rate == pytest.approx(schedule.get_last_lr()[0], rel=1e-6) == 0.02 * 0.1**2
    assert losses.feature == 0 and losses.region == feature.params.losses.region > 0


def test_a_fine_tuning_without_a_student_or_of_another_one_is_refused(longer: Project) -> None:
    other = open_project(longer.base / "params.yaml", [*LONGER, "student.network.decoder_channels=24"])
    with pytest.raises(ParamsError, match=r"decoder_channels: is 24, but .*student\.safetensors was trained with 16; set it to 16"):
        train_student(other, Machine(CPU), quantised=True)
    longer.student("supervised").unlink()
    with pytest.raises(DataError, match=r"no such file, .*run `mgd-pipeline train-student --supervised-only` first"):
        train_student(longer, Machine(CPU), quantised=True, supervised_only=True)


@pytest.mark.parametrize("way", ["bfloat16", "compiled"])
def test_a_fine_tuning_for_int8_in_bfloat16_and_compiled(longer: Project, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Close to the plain one, or the same with the eager backend."""
    train_student(longer, Machine(CPU), quantised=True)
    plain, whole = longer.student("quantised").read_bytes(), torch.nn.Module.compile
    state = read_state_dict(longer.student("quantised"))
    if way == "compiled":
        monkeypatch.setattr(torch.nn.Module, "compile", lambda network: whole(network, backend="eager"))
        train_student(longer, Machine(CPU, compiled=True), quantised=True)
        assert longer.student("quantised").read_bytes() == plain
        return
    half = open_project(longer.base / "params.yaml", [*LONGER, "student.precision=bfloat16"])
    train_student(half, Machine(CPU), quantised=True)
    assert longer.student("quantised").read_bytes() != plain
    for key, value in read_state_dict(longer.student("quantised")).items():
        torch.testing.assert_close(value, state[key], rtol=0.05, atol=0.02)


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


def test_a_device_that_is_too_small_is_one_line(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    in_steps(monkeypatch, too_large)
    with pytest.raises(MemoryShortage, match=r"distilled: cpu is out of memory with \d+ \+ \d+ images a step; lower views\.crop"):
        distil(project)


NO_MEMORY = r"no shared memory.*--num-workers 0.*docker run --shm-size"


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ("an image is gone", DataError, "the image is gone"),
        ("a bug", TypeError, "'NoneType' object is not callable"),
        ("the loss", NonFiniteError, "not finite at step 0"),
        ("dies", LoaderError, r"died: .*\(pid"),
        ("dies while it hands over", LoaderError, r"died: .*\(pid"),
        ("hangs", LoaderError, r"no batch within 4 s: .*Process-\d+ \(pid \d+\)"),
        ("no room", LoaderError, r"the batches under way need.*--num-workers 0.*docker run --shm-size"),
        ("not writable", LoaderError, r"No such file or directory.*--num-workers 0.*docker run --shm-size"),
        ("no room in the worker", LoaderError, NO_MEMORY),
        ("bus error", LoaderError, NO_MEMORY),
    ],
)
def test_what_goes_wrong_with_workers_is_named_and_no_process_is_left(
    project: Project, monkeypatch: pytest.MonkeyPatch, fault: str, error: type[Exception], said: str
) -> None:
    """Also while somebody holds on to the error: Python waits for them at its end, and they ignore the signal that it sends."""
    parent, whole = os.getpid(), TrainingSet.__getitem__

    def fated(self: TrainingSet, step: int) -> Batch:
        if os.getpid() != parent and step == 3:
            if fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return whole(self, step)

    def handed_over(ticket: object) -> object:
        (worker,) = multiprocessing.active_children()
        threading.Timer(0.2, os.kill, (worker.pid, signal.SIGKILL)).start()  # torch learns of it after us
        raise ConnectionResetError(104, "Connection reset by peer")

    def full(*_: object) -> Any:
        if fault == "bus error":
            os.kill(os.getpid(), signal.SIGBUS)
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    def gone(*_: object) -> Any:
        raise DataError("the image is gone")

    sharer = resource_sharer._resource_sharer  # pyright: ignore[reportAttributeAccessIssue]
    patches: dict[str, tuple[Any, str, Any]] = {
        "an image is gone": (manifests, "read_image", gone),
        "a bug": (TrainingSet, "_mine", None),
        "the loss": (stage, "step_loss", lambda terms, _: StepLoss(torch.tensor(float("nan"), requires_grad=True), terms)),
        "dies": (TrainingSet, "__getitem__", fated),
        "dies while it hands over": (sharer, "get_connection", handed_over),
        "hangs": (TrainingSet, "__getitem__", fated),
        "no room": (shared_memory, "free_shared_memory", lambda: 1000),
        "not writable": (shared_memory, "SHARED", project.base / "none"),
        "no room in the worker": (torch.UntypedStorage, "_new_shared", full),
        "bus error": (torch.UntypedStorage, "_new_shared", full),
    }
    monkeypatch.setattr(*patches[fault])
    monkeypatch.setattr(loading, "_WORKER_SECONDS", 4.0 if fault == "hangs" else 60.0)
    with pytest.raises(error, match=said) as held:
        distil(project, num_workers=1)
    assert held.value.__traceback__ is not None and not multiprocessing.active_children()
    assert ("Out of memory is the usual reason" in str(held.value)) == fault.startswith("dies")
    if fault == "no room":
        distil(project, num_workers=0)  # which needs none


def test_waiting_for_data_is_measured_and_said(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speed = project.results / "train-student-distilled/speed.json"
    before, whole = json.loads(speed.read_text()), TrainingSet.__getitem__
    assert before["images_per_second"] > 0 and 0 <= before["waiting_for_data"] < 1 and before["peak_memory_mb"] > 100
    monkeypatch.setattr(TrainingSet, "__getitem__", lambda self, step: (time.sleep(1), whole(self, step))[1])
    distil(project)
    assert json.loads(speed.read_text())["waiting_for_data"] > max(0.3, before["waiting_for_data"])
    out = capsys.readouterr().out
    assert "of the time went into waiting for data; raise --num-workers (it was 0," in out
    images = project.params.student.labelled_batch + project.params.student.unlabelled_batch
    shown = re.findall(r"(\d+) ms a step, ([\d.]+) images/s", out)
    assert shown
    for milliseconds, rate in shown:
        assert float(milliseconds) >= 1000, "each step waited for a second"
        assert float(milliseconds) / 1000 * float(rate) == pytest.approx(images, rel=0.02)


class Waits(TorchDispatchMode):
    """Counts what a GPU would be waited for: numbers read from it, shapes that depend on values, copies from pageable memory.

    The device is torch's `meta`, which has no values: reading one is an error of its own.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device = device
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, tensors = str(func), [value for value in args if isinstance(value, torch.Tensor)]
        indices = args[1] if name.startswith("aten.index") and isinstance(args[1], list) else []
        out = func(*args, **(kwargs or {}))
        reads = any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default"))
        masked = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        on_device = any(tensor.device.type == self.device for tensor in tensors)
        arrives = isinstance(out, torch.Tensor) and out.is_meta and any(not tensor.is_meta for tensor in tensors)
        if arrives or (on_device and (reads or masked)):
            self.waits.append(name)
        return out


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["student.ohem={threshold: 0.7, min_kept: 500}"],
        ["losses.confidence=0.5"],
        ["losses.pixel_distance=kl", "losses.pixel_weights=[agreement, edges, correct, balance]", "losses.channel=1"],
        ["losses.pixel_distance=dist", "losses.region_distance=kl", "losses.image_distance=presence"],
        ["losses.pixel_distance=binary", "losses.pixel_choice=by-class", "losses.pixel_weights=[margin]"],
        ["losses.pixel_distance=cauchy-schwarz", "losses.pixel_choice=ensemble"],
        ["losses.pixel_distance=ttm"],
        ["losses.pixel_distance=kl", f"teachers.wide.class_map={WITHOUT_BACKGROUND}"],
        FEATURE,
    ],
)
def test_a_step_waits_for_nothing(project: Project, monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> None:
    params = open_project(project.base / "params.yaml", [*TINY, *overrides]).params
    device = torch.device("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta device
    network = build_network(params.student.network, 9).to(device)
    average = build_average(network, params.student.model_copy(update={"ema": 0.9}))
    assert average is not None
    dataset = training_set(project)
    knowledge = knowledge_of(params, dataset.manifest, dataset.open_caches(), device)
    trained = with_projections(network, knowledge.features, params.targets.region_stride)
    optimizer, targets = build_optimizer(trained, params.student), partial(cached_targets, losses=params.losses)
    batches = load_batches(dataset, 0, 0, 0, device)
    for batch in (next(batches), next(batches)):  # constants are copied to the device by the first step, and kept
        with Waits() as waits:
            terms = step_terms(trained, batch, targets, params, knowledge)
            total_loss(terms, params.losses).backward()
            optimizer.step()
            update_average(average, network, 0.9, 3)
    assert waits.waits == []


def test_waits_would_be_noticed() -> None:
    values = torch.arange(4.0)
    with Waits("cpu") as waits:
        float(values.sum())
        bool(values.sum() > 0)
        values[values > 2]
        torch.nonzero(values)
        values.to("meta")
    assert len(waits.waits) == 5


def test_without_a_compiler_one_line_says_so(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the tests that compile: torch looks for a compiler once in a process."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    done = CliRunner().invoke(app, ["train-student", "--compile", "--config", str(project.base / "params.yaml")])
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.exit_code == 2 and "--compile: no compiler for cpu" in line
    assert "No working C++ compiler" in line and "leave --compile out" in line


def test_bfloat16_terms_are_those_of_float32_within_its_precision(project: Project) -> None:
    """8 bits of mantissa: forward passes differ by some 1 %, losses are computed in float32 from there."""
    dataset, terms = training_set(project), {}
    batch = dataset[0]
    for precision in ("float32", "bfloat16"):
        params = open_project(project.base / "params.yaml", [*TINY, *FEATURE, f"student.precision={precision}"]).params
        knowledge = knowledge_of(params, dataset.manifest, dataset.open_caches(), CPU)
        torch.manual_seed(0)
        trained = with_projections(build_network(params.student.network, 9), knowledge.features, 16)
        torch.manual_seed(0)
        terms[precision] = step_terms(trained, batch, partial(cached_targets, losses=params.losses), params, knowledge)
    assert all(value.dtype == torch.float32 for value in terms["bfloat16"].values())
    for name, value in terms["float32"].items():
        assert terms["bfloat16"][name].item() == pytest.approx(value.item(), rel=0.03, abs=2e-3), name
    assert any(terms["bfloat16"][name].item() != value.item() for name, value in terms["float32"].items())


@pytest.mark.parametrize("heard", [[], FEATURE], ids=["", "feature"])
def test_a_compiled_network_trains_to_the_same_file_format(
    project: Project, monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    """With the eager backend: what is tested is our use of it, not the compiler."""
    project = open_project(project.base / "params.yaml", [*TINY, *heard])
    if heard:
        distil(project)
    plain, whole, compiled = project.student("distilled").read_bytes(), torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(whole(network, backend="eager")))
    distil(project, compiled=True)
    assert len(compiled) == 1 and project.student("distilled").read_bytes() == plain


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CppCompileError: C++ compile error\n\nOutput:\nerror writing to /t/cc.s: No space left on device\n"),
        RuntimeError("PermissionError: [Errno 13] Permission denied: '/t/torchinductor'\n\nSet TORCHDYNAMO_VERBOSE=1"),
        OSError(30, "Read-only file system", "/t/torchinductor"),
    ],
)
def test_a_full_temporary_folder_is_no_missing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception) -> None:
    def compiled(_: object) -> None:
        raise error

    monkeypatch.setattr(torch, "compile", lambda _: compiled)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(OutputError, match=r"^--compile: .*/t/.*make room there, or name other folders by TMPDIR") as caught:
        check_compiler(CPU)
    assert f"{tmp_path} (TMPDIR) has" in str(caught.value) and "no compiler" not in str(caught.value)


BATCH_OF_FOUR = [*TINY, "student.labelled_batch=4", "student.unlabelled_batch=4"]


def of_ranks(project: Project, ranks: int) -> list[TrainingSet]:
    four = open_project(project.base / "params.yaml", BATCH_OF_FOUR)
    return [replace(training_set(four), rank=rank, ranks=ranks) for rank in range(ranks)]


def test_ranks_share_the_batch_of_one(project: Project) -> None:
    (whole,) = of_ranks(project, 1)
    for ranks in (2, 4):
        for rank, part in enumerate(of_ranks(project, ranks)):
            for step in range(3):
                batch, share = whole[step], part[step]
                for all_of_it, mine in zip(batch.sources, share.sources, strict=True):
                    assert mine.rows == all_of_it.rows[rank::ranks] and mine.views == all_of_it.views[rank::ranks]
                    assert torch.equal(mine.jitter, all_of_it.jitter[rank::ranks])
                assert batch.cutmix is not None and share.cutmix is not None and len(batch.sources) == 3
                assert torch.equal(share.cutmix, batch.cutmix[rank::ranks])


@pytest.mark.parametrize(("heard", "steps"), [([], 1), (FEATURE, 2)], ids=["", "feature"])
def test_torchrun_trains_on_two_processes(project: Project, heard: list[str], steps: int) -> None:
    """gloo on the CPU: one writer, metrics averaged over the ranks, the same student again; gradients are averaged over the ranks,
    also of the projections of the feature term."""
    settings = [*BATCH_OF_FOUR, *heard, f"student.steps={steps}", "student.optimizer=sgd", "student.learning_rate=0.05"]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mgd_stages.cli"),
        *("train-student", "--device", "cpu", "--no-resume", "--config", str(project.base / "params.yaml")),
        *(part for override in settings for part in ("--set", override)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("student distilled ->") == 1
    logged = (project.results / "train-student-distilled/plots/loss.tsv").read_text().splitlines()[1]

    params, parts = open_project(project.base / "params.yaml", settings).params, of_ranks(project, 2)
    knowledge = knowledge_of(params, parts[0].manifest, parts[0].open_caches(), CPU)
    torch.manual_seed(params.seed)
    trained = with_projections(build_network(params.student.network, 9), knowledge.features, params.targets.region_stride)
    optimizer, losses = build_optimizer(trained, params.student), []
    schedule = build_schedule(optimizer, params.student)
    for step in range(steps):
        losses = []
        for rank, part in enumerate(parts):
            torch.manual_seed(_seed(params.seed, step, rank))
            targets = partial(cached_targets, losses=params.losses)
            loss = total_loss(step_terms(trained, part[step], targets, params, knowledge), params.losses)
            (loss / 2).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert losses[0] != losses[1]
    assert float(logged.split("\t")[1]) == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_batchnorm_of_several_gpus_keeps_its_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's BatchNorm has an activation inside, which torch's own conversion drops without a word."""
    monkeypatch.setattr(ranks_module, "DistributedDataParallel", lambda network: network)
    network = build_network(NetworkParams(encoder="tu-test_efficientnet", decoder_channels=16), 4, initialise=False).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = network(pixels).logits
        synchronised: Any = on_ranks(network, torch.device("cuda"), 2, compiled=False)
        assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in synchronised.modules())
        assert torch.equal(synchronised(pixels).logits, expected)


def test_two_backward_passes_are_refused_where_they_would_be_wrong(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    dot = ["student.optimizer=sgd", "student.distillation_momentum=0.075", "student.labelled_batch=4", "student.unlabelled_batch=4"]
    two_momenta = open_project(project.base / "params.yaml", [*TINY, *dot])
    with pytest.raises(ParamsError, match=r"student\.distillation_momentum: .*leave --compile out"):
        distil(two_momenta, compiled=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ParamsError, match=r"student\.distillation_momentum: .*call the command without torchrun"):
        distil(two_momenta)


def test_batches_that_cannot_be_shared_out_are_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ParamsError, match=r"student\.labelled_batch is 2: must be a multiple of the 2 processes, two images each"):
        distil(project)
