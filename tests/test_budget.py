"""`mgd-pipeline init --hours`: networks and steps for a machine and a time."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mgd_pipeline.errors import DataError, MemoryShortage, ParamsError
from mgd_pipeline.networks import encoders
from mgd_pipeline.params_file import load_params
from mgd_stages.cli import app
from mgd_stages.projects.init import init_project
from mgd_stages.projects.machines import CPU, CPU_192, SMALL_GPU
from mgd_stages.projects.presets import preset
from mgd_stages.run.machine import Machine
from mgd_stages.whole import budget
from mgd_stages.whole.budget import MOST_STEPS, STUDENT_STEPS, Costs, Work, choose, within
from test_init import folder_tree

CPU_HERE = Machine(torch.device("cpu"))
WORK = Work(training=400, held_out=50)
MEASURED = [
    Costs(scale, factor * 0.8, factor * 0.5, factor * 0.1, factor * 0.2)
    for scale, factor in ((CPU_192, 1), (CPU, 2.2), (SMALL_GPU, 30))
]
"""At least 0.6, 1.3 and 18 hours."""


@pytest.mark.parametrize(
    ("hours", "name", "steps"),
    [(0.61, "cpu-192", 2000), (1.0, "cpu-192", 3300), (1.34, "cpu", 2000), (6.0, "cpu", 9200), (20.0, "small-gpu", 2200)],
)
def test_the_largest_networks_that_learn_in_time(hours: float, name: str, steps: int) -> None:
    costs, chosen = choose(MEASURED, hours, WORK)
    assert (costs.scale.name, chosen) == (name, steps)


def test_more_hours_never_give_less_and_never_take_longer_than_they_are() -> None:
    """Scale first, then steps; nothing useful is left over: another hundred steps would not fit."""
    made = [(MEASURED.index(costs), steps) for costs, steps in (choose(MEASURED, 0.61 + i / 7, WORK) for i in range(800))]
    assert made == sorted(made) and {scale for scale, _ in made} == {0, 1, 2}
    for i, (scale, steps) in enumerate(made):
        assert STUDENT_STEPS <= steps <= MOST_STEPS and MEASURED[scale].hours(WORK, steps) <= 0.61 + i / 7
        assert steps == MOST_STEPS or MEASURED[scale].hours(WORK, steps + 100) > 0.61 + i / 7
    assert choose(MEASURED[:1], 500, WORK)[1] == MOST_STEPS


def test_all_work_counts() -> None:
    """With the share of time that is kept for what is not measured."""
    spent = 1000 * 0.8 + 2000 * 0.5 + 400 * 0.1 + 50 * 0.2
    assert MEASURED[0].hours(WORK) == pytest.approx(spent / 3600 / 0.85)
    assert sum(MEASURED[0].stages(WORK, 2000).values()) == pytest.approx(spent)


def test_too_few_hours_are_refused_with_the_least() -> None:
    with pytest.raises(ParamsError, match=r"--hours 0\.2: too few .* take 0\.7 hours on this machine; give these, or .* --quick"):
        choose(MEASURED, 0.2, WORK)
    choose(MEASURED, 0.7, WORK)


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "inf"])
def test_impossible_hours(tmp_path: Path, hours: str) -> None:
    result = CliRunner().invoke(app, ["init", "--root", "gone", "--output", str(tmp_path / "new"), "--hours", hours])
    assert result.exit_code == 2 and "write a number of hours above 0, such as 2 or 0.5" in result.stderr
    result = CliRunner().invoke(app, ["init", "--output", str(tmp_path / "new"), "--device", "cpu"])
    assert result.exit_code == 2 and "--device cpu: init computes nothing without --hours" in result.stderr
    assert not (tmp_path / "new").exists()


TOY = {"decoder": "fpn", "encoder": "tu-test_resnet", "decoder_channels": 32}
TINY = replace(CPU_192, name="tiny", wide=TOY, deep=TOY, network=TOY, crop=32, long_side=64, batch=2)


def test_a_measurement_runs_all_stages_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(encoders, "resolve_encoder_weights", lambda *_, **__: None)
    measured: list[Costs] = []
    monkeypatch.setattr(budget, "choose", lambda costs, *_: (measured.extend(costs), (costs[0], 2000))[1])
    source = folder_tree(tmp_path / "photos", ("train", "val"))
    (source / "images/train/train0.png").write_bytes(b"damaged")  # prepare-data will name it
    said = init_project("folder", source, None, tmp_path / "project", sized=within(1, CPU_HERE, [TINY]))
    (costs,) = measured
    assert all(value > 0 for value in (costs.teacher_step, costs.student_step, costs.image, costs.held_out))
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "project"}
    params = load_params(tmp_path / "project/params.yaml")
    assert (params.student.steps, params.teacher_training.steps, params.data.partition) == (2000, 1000, "1/1")
    assert params.data.root == "data/raw/folder" and params.views.crop == [32, 32]
    assert params.student.network.encoder == "tu-test_resnet" and params.student.network.encoder_weights == "none"
    assert any(line.startswith("ImageNet weights of ") for line in said) and any(
        line.startswith("--hours 1: tiny") for line in said
    )


@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_photos_that_need_a_word_in_params_are_measured(mode: str, tmp_path: Path) -> None:
    """There is no params.yaml yet in which data.background_colour and data.value_range could stand."""
    source = folder_tree(tmp_path / "photos", ("train", "val"))
    for path in source.glob("images/*/*"):
        Image.new(mode, (8, 6)).save(path)
    budget._few_photos(preset("folder", str(source), "1/1", {"classes": ["a", "b", "c"]}), tmp_path / "few", 2)
    assert len([*(tmp_path / "few/images").glob("*/*")]) == 6


def test_photos_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    source = folder_tree(tmp_path / "photos", ("train", "val"))
    for path in (source / "images/train").iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"--hours: no photo could be measured: .*train"):
        init_project("folder", source, None, tmp_path / "project", sized=within(1, CPU_HERE, [TINY]))
    assert not (tmp_path / "project").exists()


@pytest.mark.parametrize(
    ("hours", "costs", "tried", "chosen"),
    [
        (0.7, [MEASURED[0]], 1, "cpu-192"),  # its least hours and half of them are too much
        (6.0, [*MEASURED[:2], None], 3, "cpu"),
        (50.0, MEASURED, 3, "small-gpu"),
        (50.0, [*MEASURED[:2], MemoryShortage("full")], 3, "cpu"),
    ],
)
def test_larger_networks_are_measured_while_they_may_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: float, costs: list[Costs | Exception | None], tried: int, chosen: str
) -> None:
    answers = itertools.chain(costs)
    asked: list[str] = []

    def measure(_: object, scale: budget.Scale, *__: object) -> Costs | None:
        asked.append(scale.name)
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(budget, "measure", measure)
    source = folder_tree(tmp_path / "photos", ("train", "val"))
    sized = within(hours, CPU_HERE, [CPU_192, CPU, SMALL_GPU])
    said = init_project("folder", source, None, tmp_path / "project", sized=sized)
    assert len(asked) == tried and any(line.startswith(f"--hours {hours:g}: {chosen}:") for line in said)
