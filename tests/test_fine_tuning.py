"""The fine-tuning for int8 as a training: interrupted, in bfloat16, compiled, and of another student."""

from __future__ import annotations

import hashlib
import os
import signal
from typing import Any

import pytest
import torch

from conftest import LONGER
from mgd_pipeline.errors import DataError, ParamsError
from mgd_pipeline.networks.weights import read_state_dict
from mgd_pipeline.students.student import load_student
from mgd_pipeline.training.optimisation import build_schedule
from mgd_pipeline.training.simulated_int8 import last_tenth
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project, open_project
from mgd_stages.stages.train_student import train_student
from student_runs import CPU, FEATURE, in_steps


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
