"""`mgd-pipeline run`: what is up to date is skipped, what depends on a change is made again, and what was interrupted goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mgd_stages.whole.estimate as estimate
import mgd_stages.whole.run as whole
from caches import file_bytes
from conftest import TINY, as_folder
from mgd_pipeline.data.shapes import CLASSES
from mgd_pipeline.errors import DataError, MemoryShortage, ParamsError, ProvenanceMismatch, WeightsError
from mgd_pipeline.networks.weights import read_metadata, read_state_dict
from mgd_stages.cli import app
from mgd_stages.projects.init import init_project, stage_commands
from mgd_stages.run.class_tables import read_numbers
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project, key_of, open_project
from mgd_stages.stages.compare_teachers import compare_teachers
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.train_student import train_student
from mgd_stages.whole.estimate import say_estimate
from mgd_stages.whole.records import Records, shown
from mgd_stages.whole.run import run_project

CPU = Machine(torch.device("cpu"))
ALL = [
    *("prepare-data", "train-teacher@wide", "train-teacher@deep", "precompute-teachers@wide", "precompute-teachers@deep"),
    *("compare-teachers", "train-student", "train-student-supervised", "evaluate", "report"),
]
KEPT = [name for name in ALL if not name.startswith("train-teacher")]
STUDENTS = ["train-student", "train-student-supervised", "evaluate", "report"]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that run, in their order."""
    names: list[str] = []
    real = whole._run
    monkeypatch.setattr(whole, "_run", lambda project, stage, *others: (names.append(stage), real(project, stage, *others)))
    return names


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As `ran`, but stages other than prepare-data only write hashes of what they read to what they make."""
    names: list[str] = []
    real = whole._run

    def play(project: Project, name: str, *others: object) -> None:
        names.append(name)
        if name == "prepare-data":
            return real(project, name, *others)  # pyright: ignore[reportArgumentType]
        records = Records(project)
        stage = records.stages[name]
        read = {place: (project.base / place).read_bytes() for place in stage.dependencies if (project.base / place).is_file()}
        for place in stage.outputs:
            (project.base / place).parent.mkdir(parents=True, exist_ok=True)
            (project.base / place).write_text(key_of(read, records._settings(stage)))

    monkeypatch.setattr(whole, "_run", play)
    return names


@pytest.fixture
def photos(tmp_path: Path) -> Project:
    """A project of photos of one's own, half of them with masks."""
    for name in range(12):
        add_photo(tmp_path / "photos", str(name), labelled=name % 2 == 0)
    init_project("folder", tmp_path / "photos", "1/1", tmp_path / "project")
    return open_project(tmp_path / "project/params.yaml", [one for one in TINY if not one.startswith("data.")])


def add_photo(root: Path, name: str, *, labelled: bool, shift: int = 0) -> None:
    pixels = np.random.default_rng(int(name)).integers(0, 255, (40, 40, 3), np.uint8)
    for kind, array in (("images", pixels), ("masks", (pixels[..., 0] + shift) % 2)) if labelled else (("images", pixels),):
        (root / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(root / kind / f"{name}.png")


def again(project: Project, *overrides: str) -> Project:
    return open_project(project.base / "params.yaml", [*TINY, *overrides])


def test_the_stages_are_the_commands_in_their_order(project: Project) -> None:
    stages = Records(project).stages
    commands = [stage.command.removeprefix("mgd-pipeline ") for stage in stages.values()]
    assert list(stages) == ALL
    assert list(dict.fromkeys(command.split(" --teacher")[0] if "pre" in command else command for command in commands)) == (
        stage_commands(project.params)
    )


def test_everything_runs_once_and_an_interrupted_run_goes_on(
    photos: Project, played: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    play = whole._run

    def fails(project: Project, name: str, *others: object) -> None:
        if name == "compare-teachers":
            raise DataError("a full disk")
        play(project, name, *others)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(whole, "_run", fails)
    with pytest.raises(DataError, match="a full disk"):
        run_project(photos, CPU)
    assert played == ALL[:5]
    monkeypatch.setattr(whole, "_run", play)
    run_project(photos, CPU)
    assert played == ALL
    capsys.readouterr()
    run_project(photos, CPU)
    said = capsys.readouterr().out.splitlines()
    assert played == ALL and said[:-1] == [f"{shown(name)}: up to date" for name in ALL]


def _removed(project: Project) -> None:
    project.teacher("wide").unlink()


def _edited(project: Project) -> None:
    project.student("distilled").write_text("somebody else's")


def _touched(project: Project) -> None:
    os.utime(project.base / "data/raw/folder/images/0.png", ns=(1, 1))


def _damaged_record(project: Project) -> None:
    (project.base / ".mgd/run/evaluate.json").write_text("{")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda project: add_photo(project.base / "data/raw/folder", "20", labelled=True), ALL),
        (lambda project: add_photo(project.base / "data/raw/folder", "2", labelled=True, shift=1), ALL),
        (lambda project: add_photo(project.base / "data/raw/folder", "20", labelled=False), KEPT),
        (lambda project: (project.base / "data/raw/folder/images/1.png").unlink(), KEPT),
        (_touched, ["prepare-data"]),
        (_removed, ["train-teacher@wide"]),
        (_edited, ["train-student"]),
        (_damaged_record, ["evaluate"]),
    ],
    ids=[
        *("another labelled photo", "a changed mask", "another photo", "a removed photo", "a touched photo", "a removed output"),
        *("an output of somebody else", "a damaged record"),
    ],
)
def test_what_depends_on_a_change_runs_again_and_nothing_else(
    photos: Project, played: list[str], change: Callable[[Project], object], expected: list[str]
) -> None:
    """Stages after it do not, if a stage makes the same files again."""
    run_project(photos, CPU)
    played.clear()
    change(photos)
    run_project(photos, CPU)
    assert played == expected


def test_a_choice_of_what_teachers_are_trained_again_for(photos: Project, played: list[str]) -> None:
    """The choice itself trains none, in either direction; then it holds."""
    tiny = [one for one in TINY if not one.startswith("data.")]
    by_labels, by_images = (
        open_project(photos.base / "params.yaml", [*tiny, f"retrain_teachers=new-{of}"]) for of in ("labels", "images")
    )
    for project in (by_labels, by_images, by_labels):
        run_project(project, CPU)
    assert [name for name in played if "teacher@" in name] == ["train-teacher@wide", "train-teacher@deep"]
    add_photo(photos.base / "data/raw/folder", "20", labelled=False)
    run_project(by_labels, CPU)
    played.clear()
    run_project(by_images, CPU)
    assert played == [name for name in ALL[1:] if name != "train-student-supervised"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("student.steps=9", STUDENTS),
        ("losses.pixel=0.5", ["train-student", "evaluate", "report"]),
        ("teachers.wide.decoder_channels=8", [name for name in ALL[1:] if name not in ("train-teacher@deep", ALL[4], ALL[7])]),
        ("seed=5", ALL[1:]),
    ],
)
def test_a_changed_parameter_makes_its_stages_run_again(
    photos: Project, played: list[str], override: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_project(photos, CPU)
    played.clear()
    tiny = [one for one in TINY if not one.startswith("data.")]
    changed = open_project(photos.base / "params.yaml", [*tiny, override])
    waiting = Records(changed).waiting()
    run_project(changed, CPU)
    assert played == [name for name in ALL if name in expected] and waiting == set(played)
    assert f"{shown(played[0])}: runs, because {override.partition('=')[0]} changed" in capsys.readouterr().out


def test_a_parameter_that_takes_its_default_again_is_a_change(project: Project) -> None:
    """Defaults are not noted, so that a version with a further parameter changes nothing."""
    records = Records(again(project, "evaluation.overlays=3"))
    for name in ("evaluate", "report"):
        assert records.outdated(records.stages[name]) == "evaluation.overlays changed"


def test_real_stages_run_again_alone_and_commands_of_single_stages_count(project: Project, ran: list[str]) -> None:
    """The project is a copy in another folder, as after `mv`."""
    run_project(project, CPU)
    assert ran == []
    changed = again(project, "student.steps=5")
    config = ["--config", str(project.base / "params.yaml")]
    sets = [part for one in [*TINY, "student.steps=5"] for part in ("--set", one)]
    done = CliRunner().invoke(app, ["train-student", *config, *sets, "--device", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0
    run_project(changed, CPU)
    assert ran == STUDENTS[1:]
    (project.results / "teachers/wide.json").unlink()
    run_project(changed, CPU)
    assert ran == [*STUDENTS[1:], "precompute-teachers@wide"]
    assert CliRunner().invoke(app, ["run", *config, *sets, "--device", "cpu"]).exit_code == 0 and len(ran) == 4
    ran.clear()
    run_project(again(project, "student.steps=5", "teachers.deep.decoder_channels=64"), CPU)
    assert ran == ["train-teacher@deep", "precompute-teachers@deep", "compare-teachers", "train-student", "evaluate", "report"]


def test_half_of_a_stage_is_no_finished_stage(project: Project) -> None:
    """A command that computes some shards, and a report to another place."""
    records = file_bytes(project.base / ".mgd/run")
    config = ["--config", str(project.base / "params.yaml"), "--set", "targets.stride=8"]
    elsewhere = ["report", "--output", str(project.base / "page.html")]
    for half in (["precompute-teachers", "--device", "cpu", "--shards", "0:0"], elsewhere):
        assert CliRunner().invoke(app, [*half, *config], catch_exceptions=False).exit_code == 0
    assert file_bytes(project.base / ".mgd/run") == records


def test_files_that_dvc_links_are_the_same_and_are_replaced(project: Project, ran: list[str], tmp_path: Path) -> None:
    """DVC moves outputs into its cache and leaves links, of another time, to files that nobody may write."""
    for number, place in enumerate((project.student("distilled"), project.manifest / "images.parquet")):
        kept = tmp_path / f"cache-{number}"
        shutil.move(place, kept)
        os.utime(kept, ns=(1, 1))
        kept.chmod(0o444)
        place.symlink_to(kept)
    before = (tmp_path / "cache-0").read_bytes()
    run_project(project, CPU)
    assert ran == []
    run_project(again(project, "student.steps=5"), CPU)
    assert ran == STUDENTS
    assert not project.student("distilled").is_symlink() and (tmp_path / "cache-0").read_bytes() == before


RENAMED = [name.title() for name in CLASSES]
SWAPPED = [*CLASSES[:-2], CLASSES[-1], CLASSES[-2]]
COLOURS = "data.colours=" + str([[20 * number, 9, 9] for number, _ in enumerate(CLASSES)])
SAID = " calls class 0 'background', the project calls it 'Background'; class 1 'rectangle', the project calls it 'Rectangle'; "
SHOWING = ["prepare-data", "evaluate", "report"]


def test_renaming_and_recolouring_classes_trains_nothing(
    project: Project, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_project(as_folder(project, CLASSES), CPU)
    assert ran == SHOWING, "the same images and ids as in the built-in data set, in other colours"
    made = [project.base / name for name in ("data/targets", "data/teachers", "data/students/distilled", ".mgd/work")]
    before, best, page = [file_bytes(path) for path in made], project.best_student, project.results / "report.html"
    numbers, weights = read_numbers(project.results / "evaluation/metrics.json"), read_state_dict(best)
    assert "striped_disc" in page.read_text()
    ran.clear()
    capsys.readouterr()
    run_project(as_folder(project, RENAMED, COLOURS), CPU)
    assert ran == SHOWING
    assert f"student distilled{SAID}" in (said := capsys.readouterr().out) and "; 6 more are renamed" in said
    again = read_numbers(project.results / "evaluation/metrics.json")
    assert numbers is not None and again is not None and before == [file_bytes(path) for path in made]
    new_names = dict(zip(CLASSES, RENAMED, strict=True))
    for student in ("distilled", "supervised"):
        numbers[student]["rare_classes"] = [new_names[name] for name in numbers[student]["rare_classes"]]
    assert numbers == again
    assert read_metadata(project.student("distilled"))["classes"] == list(CLASSES)
    shown = read_metadata(best)
    assert shown["classes"] == RENAMED and shown["palette"][2] == [40, 9, 9]
    assert all(torch.equal(value, weights[name]) for name, value in read_state_dict(best).items())
    text = page.read_text()
    assert not [name for name in CLASSES if f">{name}<" in text] and "measured on other" not in text and "Striped_Disc" in text


def test_what_was_made_before_a_renaming_is_used(
    project: Project, ran: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if DVC has removed a teacher cache, and after a second renaming."""
    run_project(as_folder(project, RENAMED, COLOURS), CPU)
    before = file_bytes(project.targets("wide"))
    (project.results / "teachers/wide.json").unlink()
    shutil.rmtree(project.targets("wide"))
    ran.clear()
    capsys.readouterr()
    third = as_folder(project, [name.upper() for name in CLASSES], "student.steps=5")
    run_project(third, CPU)
    said = capsys.readouterr().out
    assert ran == ["prepare-data", "precompute-teachers@wide", *STUDENTS] and file_bytes(project.targets("wide")) == before
    assert "all images were there already" in said and "teacher wide calls class 0 'background', the project calls" in said
    assert "the teacher cache of deep calls class 0 'background', the project calls it 'BACKGROUND'" in said
    assert read_metadata(project.student("distilled"))["classes"][1] == "RECTANGLE"
    compare_teachers(third)
    assert "of deep calls class 0" in capsys.readouterr().out


def test_reordered_classes_are_refused_where_nothing_trains_again(project: Project, ran: list[str]) -> None:
    """Masks hold ids: another order of the names gives each id another meaning, and no file shows it."""
    swapped = as_folder(project, SWAPPED)
    moved = "class 7 'star', which is class 8 of the project"
    with pytest.raises(
        DataError, match=f"student.safetensors: the student calls {moved}; write data.classes in the student's order"
    ):
        run_project(swapped, CPU)
    assert ran == ["prepare-data", "evaluate"]
    with pytest.raises(ParamsError, match=f"teachers.wide: the teacher calls {moved}; write data.classes in the teacher's order"):
        precompute_teachers(swapped, "wide", device=CPU.device)
    with pytest.raises(ProvenanceMismatch, match=f"wide.zarr: was made from something else: classes: the cache calls {moved}"):
        train_student(swapped, CPU)
    with pytest.raises(ProvenanceMismatch, match=moved):
        compare_teachers(swapped)


def test_reordered_ids_train_again(project: Project, ran: list[str]) -> None:
    values = [*range(len(CLASSES) - 2), len(CLASSES) - 1, len(CLASSES) - 2]
    with pytest.raises(DataError, match="which is class 8"):
        run_project(as_folder(project, SWAPPED), CPU)
    ran.clear()
    run_project(as_folder(project, SWAPPED, f"data.values={values}"), CPU)
    assert ran == ALL


def test_another_name_in_a_class_map_computes_no_target(project: Project, ran: list[str]) -> None:
    def mapped(names: Sequence[str]) -> str:
        return "teachers.wide.class_map=" + json.dumps({name: [number] for number, name in enumerate(names)})

    run_project(as_folder(project, CLASSES, "train_teachers=[deep]", mapped(CLASSES)), CPU)
    before = file_bytes(project.targets("wide"))
    ran.clear()
    shutil.rmtree(project.targets("wide"))
    run_project(as_folder(project, RENAMED, "train_teachers=[deep]", mapped(RENAMED)), CPU)
    assert ran == ["prepare-data", "precompute-teachers@wide", "compare-teachers", "evaluate", "report"]
    assert file_bytes(project.targets("wide")) == before


def test_a_class_map_of_old_names_is_refused_at_once(project: Project) -> None:
    mapped = "teachers.wide.class_map={" + ", ".join(f"{name}: {name}" for name in CLASSES) + "}"
    with pytest.raises(
        ParamsError, match=r"teachers\.wide\.class_map: 'background' is no class of the data set; nearest is 'Background'"
    ):
        run_project(as_folder(project, RENAMED, mapped), CPU)


def test_weights_that_nobody_trains_are_missed_at_once(photos: Project, played: list[str]) -> None:
    tiny = [one for one in TINY if not one.startswith("data.")]
    with pytest.raises(WeightsError, match=r"teachers\.deep\.weights: .*no such file; put it there"):
        run_project(open_project(photos.base / "params.yaml", [*tiny, "train_teachers=[wide]"]), CPU)
    assert played == []


def test_the_estimate_names_each_waiting_stage_and_leaves_no_trace(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    def estimated(*overrides: str) -> list[str]:
        longer = again(project, *overrides)
        say_estimate(longer, Records(longer).waiting(), CPU)
        return [line.split(":")[0].strip() for line in capsys.readouterr().out.splitlines()]

    before = file_bytes(project.base)
    assert estimated() == [] and estimated("student.steps=49") == []
    measured = [shown(name) for name in ALL[1:-1] if name != "compare-teachers"]
    assert estimated("student.steps=60", "teacher_training.steps=60") == ["estimate", *measured, "together"]
    assert estimated("student.steps=60") == ["estimate", *map(shown, STUDENTS[:-1]), "together"]
    assert file_bytes(project.base) == before and not project.work("rehearsal").exists()


def test_what_a_rehearsal_may_say(project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Too little memory ends the run before hours of work; anything else is left to the stage itself."""
    longer = again(project, "student.steps=60")

    def fails(error: Exception) -> Callable[..., None]:
        def train(*_: object, **__: object) -> None:
            raise error

        return train

    monkeypatch.setattr(estimate, "train_student", fails(DataError("no")))
    say_estimate(longer, {"train-student"}, CPU)
    assert capsys.readouterr().out.splitlines()[1:] == ["no estimate: no"]
    monkeypatch.setattr(estimate, "train_student", fails(MemoryShortage("too little")))
    with pytest.raises(MemoryShortage):
        say_estimate(longer, {"train-student"}, CPU)
    assert not project.work("rehearsal").exists()


def test_how_long_is_said_in_seconds_below_two_minutes() -> None:
    """Lines that a reader adds up must agree with their sum."""
    said = [estimate.roughly(seconds) for seconds in (0.3, 2.6, 38, 117, 118, 750, 7200)]
    assert said == ["a few seconds", "about 5 s", "about 40 s", "about 115 s", "about 2 min", "about 12 min", "about 2.0 hours"]


def test_one_run_says_once_that_teachers_are_weak(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    (project.results / "compare-teachers/metrics.json").unlink()
    for steps in (5, 6):  # with compare-teachers and without
        run_project(again(project, f"student.steps={steps}"), CPU)
        said = capsys.readouterr().out
        assert said.count("the student may learn little from its teachers") == 1
        assert ("compare-teachers: up to date" in said) == (steps == 6)


@pytest.mark.parametrize(("patience", "expected"), [(0.0, [2]), (1e9, [2, 5])])
def test_trainings_of_long_steps_are_measured_by_one_step(
    project: Project, monkeypatch: pytest.MonkeyPatch, patience: float, expected: list[int]
) -> None:
    """Beside the first one, which is none of the counted."""
    steps: list[int] = []
    real = estimate.train_student

    def train(small: Project, *arguments: object, **options: object) -> None:
        steps.append(small.params.student.steps)
        real(small, *arguments, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(estimate, "train_student", train)
    monkeypatch.setattr(estimate, "_PATIENCE", patience)
    say_estimate(again(project, "student.steps=60"), {"train-student"}, CPU)
    assert steps == expected
