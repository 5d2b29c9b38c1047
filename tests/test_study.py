"""The study: every variant runs, a killed one goes on, and its statistics are right."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from conftest import TINY
from mgd_pipeline.errors import MGDError, ParamsError
from mgd_pipeline.params import SmpTeacher
from mgd_pipeline.params_file import override_params
from mgd_stages.cli import app
from mgd_stages.projects.presets import preset, quick, render_params
from mgd_stages.run.machine import Machine
from mgd_stages.run.processes import _NAME, PRELOADED, attempt, task_threads
from mgd_stages.run.project import open_project
from mgd_stages.stages.train_student import train_student
from mgd_stages.study.matrix import Matrix, Run, projects_and_runs, write_projects
from mgd_stages.study.results import _NO_GAP, _SCHEMA, by_variant, compared, markdown, paired_difference, plot
from mgd_stages.study.variants import Variant, named_variants, parse_variant
from test_data_notes import data_set

PARAMS = override_params(preset("shapes", "data/raw/shapes", "1/4"), TINY)

FLIPS = "targets.tta={flip: true}"
ONE_TEACHER = ["--set", "losses.pixel_teachers=[wide]", "--set", "losses.image=0"]
"""Fewer processes to start."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(render_params(PARAMS), encoding="utf-8")
    return path


def command(config: Path, output: Path, *more: str) -> list[str]:
    return ["study", str(output), "--config", str(config), "--device", "cpu", "--threads", "1", *more]


def run_study(config: Path, output: Path, *more: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, command(config, output, *more))
    assert done.exit_code == code, done.output
    return done.output


def measured(output: Path, metric: str = "miou") -> dict[tuple[str, str], dict[int, float]]:
    return by_variant(pq.read_table(output / "results.parquet"), metric)


def moments(output: Path, pattern: str) -> dict[Path, int]:
    """When files were written."""
    return {path: path.stat().st_mtime_ns for path in output.glob(pattern)}


def test_processes_begin_with_torch_loaded() -> None:
    """A name that is none would be passed over in silence, and each process would load torch itself."""
    assert all(find_spec(name) for name in PRELOADED)


def test_a_matrix_runs_shares_teachers_and_grows(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "study"
    first = run_study(config, output, "--variant", "distilled", "--seeds", "2", "--jobs", "2", *ONE_TEACHER)
    log, folder = output / "1-4/train-teacher-wide.log", output / "1-4/runs/distilled"
    assert f"study: train-teacher-wide begins; its output: {log}" in first, "what runs is said where there is no terminal"
    assert f"study: run of {folder / '1'} is done" in first and log.exists()
    evaluated = [json.loads((folder / f"{seed}/data/results/evaluation/metrics.json").read_text()) for seed in (0, 1)]
    mious = measured(output)
    assert list(mious) == [("1/4", "distilled"), ("1/4", "teacher wide")]
    assert mious["1/4", "distilled"] == {seed: evaluated[seed]["distilled"]["miou"] for seed in (0, 1)}
    rare = measured(output, "rare_miou")
    assert rare["1/4", "distilled"] == {seed: evaluated[seed]["distilled"]["rare_miou"] for seed in (0, 1)}
    of_teacher = json.loads((output / "1-4/data/results/teachers/wide.json").read_text())
    assert rare["1/4", "teacher wide"] == {0: of_teacher["rare_miou"]}
    assert of_teacher["rare_classes"] == evaluated[0]["distilled"]["rare_classes"] == evaluated[1]["distilled"]["rare_classes"]
    named = ", ".join(of_teacher["rare_classes"][:-1]) + f" and {of_teacher['rare_classes'][-1]}"
    assert f"Partition 1/4, rare third: the mean IoU of {named}" in (output / "table.md").read_text()
    for metric, least in (("seconds_per_step", 0), ("peak_memory_mb", 100)):
        assert all(value > least for value in measured(output, metric)["1/4", "distilled"].values())

    # --- more of everything, and nothing again; a run that fails does not stop another
    done = moments(output, "**/run.json") | moments(output, "1-4/data/teachers/*")
    assert [path.name for path in done] == ["run.json", "run.json", "wide.safetensors"], "only the teacher that is used"
    variants = ("distilled", "broken: student.learning_rate=1e30", "live", "tta")
    more = [*(part for name in variants for part in ("--variant", name)), "--seeds", "1", "--jobs", "2", *ONE_TEACHER]
    second = run_study(config, output, *more, code=1)
    assert "4 runs, 1 of them finished already" in second and "| 1/4 | tta | 1 |" in second
    assert "runs/broken/0/run.log: train-student distilled: not finite" in second
    assert "these runs have no result; the same command tries them again" in second
    now = moments(output, "**/run.json") | moments(output, "1-4/data/teachers/*")
    assert done.items() <= now.items() and len(now) == len(done) + 2
    # --- each student is measured beside the teacher as its own targets show it
    mious, rows = measured(output), (output / "table.md").read_text().splitlines()
    assert "broken" not in {variant for _, variant in mious}
    for variant, teacher in (("live", "teacher wide"), ("tta", "teacher wide, tta-scales-0.75-1.0-1.25-flip-true")):
        row = next(line for line in rows if line.startswith(f"| 1/4 | {variant} |"))
        assert f"| {100 * mious['1/4', variant][0] / mious['1/4', teacher][0]:.1f} |" in row
    students = [open_project(output / f"1-4/runs/{name}/0/params.yaml") for name in ("distilled", "live", "tta")]
    weights = [run.student("distilled").read_bytes() for run in students]
    assert len(set(weights)) == 3
    # --- a run is an ordinary project: its stage, called by hand, makes the same student
    train_student(students[-1], Machine(torch.device("cpu"), resume=False))
    assert students[-1].student("distilled").read_bytes() == weights[-1]
    # --- other parameters are refused
    assert "holds other parameters than this study" in run_study(config, output, *more, "--set", "student.steps=5", code=2)


def test_a_smaller_matrix_keeps_the_results_of_the_larger_one(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "study"
    study = partial(run_study, config, output, "--variant", "supervised")

    def seeds() -> dict[str, list[int]]:
        return {share: sorted(values) for (share, _), values in measured(output).items()}

    both, weights = ("--partition", "1/4", "--partition", "1/2", "--seeds", "2"), "*/runs/**/student.safetensors"
    assert "study: 4 runs, 0 of them finished already" in study(*both)
    made = moments(output, weights)
    full = {name: (output / name).read_bytes() for name in ("results.parquet", "table.md", "plot.png")}
    smaller = study("--partition", "1/2", "--seeds", "1")
    assert "study: 1 run, 1 of them finished already" in smaller
    assert "3 runs of earlier calls are in the results, too: 1/2 supervised (seed 1) and 1/4 supervised (seeds 0 and 1)" in smaller
    assert seeds() == {"1/2": [0, 1], "1/4": [0, 1]} and "| 1/4 | supervised | 2 |" in smaller

    # --- a run whose evaluation was removed is evaluated again, one whose folder is gone is named and kept elsewhere
    (output / "1-4/runs/supervised/0/data/results/evaluation/metrics.json").unlink()
    assert "study: 4 runs, 3 of them finished already" in study(*both)
    assert {name: (output / name).read_bytes() for name in full} == full, "nothing is different"
    assert moments(output, weights) == made and len(made) == 4, "or trained again"
    shutil.rmtree(output / "1-4/runs/supervised/1")
    said = study("--partition", "1/2", "--seeds", "1")
    assert "the results had runs that are no longer below" in said and "1/4 supervised (seed 1); " in said
    assert seeds() == {"1/2": [0, 1], "1/4": [0]}
    assert (output / "results.earlier.parquet").read_bytes() == full["results.parquet"]

    # --- other settings are never mixed, whatever was asked for
    other = study("--partition", "1/8", "--seeds", "1", "--set", "student.steps=5", code=2)
    assert "params.yaml: holds other parameters than this study, and one table would mix their runs" in other
    assert not (output / "1-8").exists() and seeds() == {"1/2": [0, 1], "1/4": [0]}
    own = output / "1-4/runs/supervised/0/params.yaml"
    own.write_text(own.read_text().replace("steps: 4", "steps: 7"))
    assert "the variant supervised has other parameters than in" in study("--partition", "1/2", "--seeds", "1", code=2)


def test_a_task_ends_alone(tmp_path: Path) -> None:
    """What a task leaves is its own matter; what the user or a bug ends, is raised where the task was asked for."""
    log = tmp_path / "log"
    with task_threads(2) as pool:
        tasks = [partial(signal.raise_signal, signal.SIGKILL), partial(print, "here"), partial(open, tmp_path / "no")]
        killed, done, failed = (task.result() for task in [pool.submit(attempt, task, log, 1) for task in tasks])
    assert killed is not None and killed.killed and f"{log}: the system ended the process (SIGKILL)" in killed.reason
    assert done is None and log.read_text() == "here\n"
    assert failed is not None and not failed.killed and str(tmp_path / "no") in failed.reason
    assert attempt(partial(print, "never"), log, 1, None, failed) is failed and log.read_text() == "here\n"
    with pytest.raises(MGDError, match="was ended from outside \\(exit code -15\\)"):
        attempt(partial(signal.raise_signal, signal.SIGTERM), log, 1)
    with pytest.raises(KeyboardInterrupt):
        attempt(partial(signal.default_int_handler, signal.SIGINT, None), log, 1)
    with pytest.raises(ZeroDivisionError) as raised:
        attempt(partial(divmod, 1, 0), log, 1)
    assert "in _do" in "".join(raised.value.__notes__), "the traceback of the other process"
    with pytest.raises(KeyboardInterrupt), task_threads(1) as pool:
        os.mkfifo(tmp_path / "pipe")
        waiting = pool.submit(attempt, partial(print), tmp_path / "pipe", 1)
        never = pool.submit(attempt, partial(print), log, 1)
        while all(process.name != _NAME for process in multiprocessing.active_children()):
            assert not waiting.done()
        raise KeyboardInterrupt
    assert never.cancelled()
    with pytest.raises(MGDError, match="exit code -15"):
        waiting.result()


def test_a_killed_study_leaves_no_process_and_goes_on(config: Path, tmp_path: Path) -> None:
    """The training is killed at its first saved state, as for want of memory; then the study itself at the next one."""
    output = tmp_path / "study"
    arguments = command(config, output, "--variant", "distilled", "--seeds", "1", "--set", "student.steps=30", *ONE_TEACHER)
    folder, program = output / "1-4/runs/distilled/0", "from mgd_stages.run.processes import PRELOADED; "
    program += "PRELOADED.append('killed_training'); from mgd_stages.cli import app; app()"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])

    def run(killed: str) -> tuple[int, str]:
        """All processes hold the stream of errors, so it ends with the last of them."""
        words, variables = [sys.executable, "-c", program, *arguments], os.environ | {"PYTHONPATH": paths, "KILLED": killed}
        done = subprocess.run(words, env=variables, stderr=subprocess.PIPE, text=True, timeout=600)
        return done.returncode, done.stderr

    code, message = run("training")
    assert code == 1 and message.startswith(f"error: {folder}/run.log: the system ended the process (SIGKILL)"), message
    assert "these runs have no result; the same command tries them again" in message
    code, message = run("study")
    assert code == -signal.SIGKILL, message
    teacher = moments(output, "1-4/data/teachers/*")
    assert len(teacher) == 1 and not (folder / "data/results/run.json").exists()

    # --- and called again
    assert CliRunner().invoke(app, arguments).exit_code == 0
    said = re.findall(r"goes on at step (\d+)", (folder / "run.log").read_text())
    assert said == ["10", "20"] and moments(output, "1-4/data/teachers/*") == teacher
    assert json.loads((folder / "data/results/run.json").read_text())["seconds_per_step"] > 0
    project = open_project(folder / "params.yaml")
    weights = project.student("distilled").read_bytes()
    train_student(project, Machine(torch.device("cpu"), resume=False))
    assert project.student("distilled").read_bytes() == weights


def test_a_data_set_that_is_refused_stops_before_any_training(tmp_path: Path) -> None:
    root = data_set(tmp_path / "data")
    (root / "images/train/i00.jpg").write_bytes(b"damaged")
    params = quick(preset("folder", str(root), "1/1", {"classes": ["a", "b"]}))
    config = tmp_path / "params.yaml"
    tiny = [text for text in TINY if not text.startswith("data.") or text.startswith("data.partition")]
    config.write_text(render_params(override_params(params, [*tiny, "student.steps=1"])), encoding="utf-8")
    asked = command(config, tmp_path / "study", "--variant", "distilled", "--variant", "supervised", "--seeds", "1", "--jobs", "2")
    stopped = CliRunner().invoke(app, asked)
    assert stopped.exit_code == 1 and "--on-error skip" in stopped.stderr, stopped.output
    assert stopped.stderr.count("images/train/i00.jpg: ") == 1 == len(stopped.stderr.splitlines())
    assert re.findall(r"^study: (\S+) begins", stopped.stdout, re.MULTILINE) == ["prepare-data"]
    skipping = command(config, tmp_path / "study", "--variant", "supervised", "--seeds", "1", "--on-error", "skip")
    assert CliRunner().invoke(app, skipping).exit_code == 0


def test_every_variant_has_parameters() -> None:
    variants = named_variants(PARAMS)
    for variant in variants.values():
        changed = override_params(PARAMS, list(variant.overrides))
        if variant.name not in ("supervised", "distilled", "live", "hard", "uint8"):
            assert changed != PARAMS, f"{variant.name} changes nothing"
    assert variants["without-deep"].overrides == (
        "losses.pixel_teachers=[wide]",
        "losses.region_teacher=[wide]",
        "losses.image_teacher=wide",
    )
    assert variants["without-wide"].overrides == ("losses.pixel_teachers=[deep]", "losses.region_teacher=[deep]")
    agreeing = override_params(PARAMS, ["losses.pixel_weights=[agreement, edges]", "losses.region_teacher=[deep, wide]"])
    without = override_params(agreeing, list(named_variants(agreeing)["without-deep"].overrides))
    assert without.losses.pixel_weights == ["edges"] and without.losses.used_teachers == ["wide"]
    third = override_params(agreeing, ["teachers.extra={encoder: resnet18, weights: x}", "losses.image_teacher=extra"])
    kept = override_params(third, list(named_variants(third)["without-extra"].overrides))
    assert kept.losses.pixel_weights == ["agreement", "edges"], "both teachers that agree are there"
    assert variants["feature"].overrides == ("losses.feature=1", "losses.feature_teachers=[wide, deep]")
    assert variants["double-length"].overrides == ("student.steps=8",)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("distiled", "--variant distiled: unknown; nearest is distilled; or write one of your own"),
        ("x", "--variant x: unknown; there are supervised, distilled,"),
        ("own: data.partition=1/4", "data.partition=1/4 would change what all runs share; change losses, targets, student"),
        ("soft: losses.pixel=2", "soft is the name of a variant that every study knows"),
        ("A/b: losses.pixel=2", "the name 'A/b' names a folder"),
        ("own: 'losses.pixel=2", "No closing quotation"),
        ("own: supervised", "changes nothing; write 'name: key=value'"),
        ("own: supervisd student.steps=5", "supervisd is neither key=value nor a variant; there are supervised, distilled,"),
        ("own: live supervised student.steps=5", "a student without teachers has no live ones"),
    ],
)
def test_variants_that_cannot_be_are_named(text: str, problem: str) -> None:
    with pytest.raises(ParamsError, match=re.escape(problem)):
        parse_variant(text, PARAMS)


@pytest.mark.parametrize(
    ("text", "variant", "targets"),
    [
        ("soft", Variant("soft", ("losses.pixel_labels=soft",)), ()),
        ("own: losses.pixel=2 'targets.tta={flip: true}'", Variant("own", ("losses.pixel=2", FLIPS)), (FLIPS,)),
        ("own: flips losses.pixel=2", Variant("own", (FLIPS, "losses.pixel=2")), (FLIPS,)),
        ("alone: supervised student.steps=5", Variant("alone", ("student.steps=5",), supervised_only=True), ()),
        ("own: live soft losses.pixel=2", Variant("own", ("losses.pixel_labels=soft", "losses.pixel=2"), live=True), ()),
    ],
)
def test_own_variants_may_start_from_known_ones(text: str, variant: Variant, targets: tuple[str, ...]) -> None:
    """Only variants with the same overrides of targets share teacher caches."""
    assert parse_variant(text, PARAMS) == variant and variant.targets == targets


def matrix(*variants: str, partitions: tuple[str, ...] = ("1/4",)) -> Matrix:
    return Matrix(partitions, 1, [parse_variant(name, PARAMS) for name in variants])


def test_only_other_targets_get_a_cache_of_their_own(config: Path, tmp_path: Path) -> None:
    _, runs = projects_and_runs(config, [], tmp_path, matrix("uint8", "flips", "soft", partitions=("1/4", "1/2", "1/4")))
    assert [(run.partition, run.caching.relative_to(run.shared).as_posix()) for run in runs] == [
        (share, folder) for share in ("1/4", "1/2") for folder in (".", "stores/tta-flip-true", ".")
    ]


@pytest.mark.parametrize("base", ["uint8", "log-probability"])
def test_every_variant_is_possible_whatever_the_teacher_caches_keep(base: str, config: Path, tmp_path: Path) -> None:
    """Log-probabilities do not feed every loss: variants with another loss or another cache bring what they need."""
    given = [f"targets.logits={base}", *(["losses.image_distance=log-probability"] if base == "log-probability" else [])]
    given.append("losses.prior_adjustment=0.5")
    params = override_params(PARAMS, given)
    variants = Matrix(("1/4",), 1, list(named_variants(params).values()))
    projects, runs = projects_and_runs(config, given, tmp_path, variants)
    caching = {run.variant.name: projects[run.caching].targets.logits for run in runs}
    assert caching["distilled"] == base and caching["channel"] == caching["ttm"] == "uint8"
    assert caching["small"] == "log-probability"
    assert all(projects[run.caching].targets == projects[run.folder].targets for run in runs)


def test_projects_are_written_whole_or_not_at_all(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that is killed there goes on. A copy that followed links is named: its runs would have manifests of their own."""
    output = tmp_path / "study"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "fsync", killed)
        write_projects(*projects_and_runs(config, [], output, matrix("soft")))
    for _ in range(2):
        write_projects(*projects_and_runs(config, [], output, matrix("soft")))
    folder = output / "1-4/runs/soft/0"
    assert open_project(folder / "params.yaml").params.data == PARAMS.data
    for name in ("manifest", "targets"):
        link = folder / "data" / name
        link.unlink()
        link.mkdir()
        assert f"error: {link}: must be a link to " in run_study(config, output, "--variant", "soft", "--seeds", "1", code=2)
        link.rmdir()


def test_a_data_set_of_ones_own_is_read_where_it_is(tmp_path: Path) -> None:
    base = preset("folder", "data/raw/mine", "1/8", {"classes": ["a", "b"]})
    (tmp_path / "encoder.safetensors").write_bytes(b"")
    own = override_params(base, ["train_teachers=[wide]", "student.network.encoder_weights=encoder.safetensors"])
    (tmp_path / "params.yaml").write_text(render_params(own), encoding="utf-8")
    soft = Matrix(["1/2"], 1, [parse_variant("soft", own)])
    projects, (run,) = projects_and_runs(tmp_path / "params.yaml", [], tmp_path / "study", soft)
    params = projects[run.folder]
    assert params.data.root == str(tmp_path / "data/raw/mine") and params.data.partition == "1/2"
    assert params.teachers["deep"].weights == str(tmp_path / "data/teachers/deep.safetensors"), "the group's own"
    assert params.teachers["wide"].weights == "data/teachers/wide.safetensors", "made by the study"
    assert params.student.network.encoder_weights == str(tmp_path / "encoder.safetensors")
    deep = params.teachers["deep"]
    assert isinstance(deep, SmpTeacher) and deep.encoder_weights == "imagenet"


def test_a_wrong_variant_or_reference_starts_nothing(config: Path, tmp_path: Path) -> None:
    for more in (["--variant", "own: student.stps=5"], ["--variant", "soft", "--reference", "hard"], ["--variant", "x"]):
        run_study(config, tmp_path / "study", *more, code=2)
        assert not (tmp_path / "study").exists()


def table_of(*rows: tuple[str, str, str, int, float | None] | tuple[str, str, str, int, float | None, str]) -> pa.Table:
    """Rows of metric, partition, variant, seed and value, and of a class where there is one."""
    named = [dict(zip(("metric", "partition", "variant", "seed", "value", "class"), row, strict=False)) for row in rows]
    return pa.Table.from_pylist([{"split": "val", "class": None, **row} for row in named], schema=_SCHEMA)


def test_the_table_by_hand() -> None:
    """Twin 40 and 44, student 45 and 47: +4 on average, of the 8 to the better teacher, whose 50 it reaches to 92 %. A variant
    that is compared with a student of teachers closes no gap to them. Another one has other targets, whose teacher has 64: 75 %,
    and 8 of the 24 points; one learns from the weaker teacher alone."""
    of_eighth = [("alone", 0, 0.40), ("alone", 1, 0.44), ("taught", 0, 0.45), ("taught", 1, 0.47), ("soft", 0, 0.46)]
    of_eighth += [("tta", 0, 0.48), ("teacher wide", 0, 0.50), ("teacher deep", 0, 0.48), ("teacher wide, tta", 0, 0.64)]
    table = table_of(
        *(("miou", "1/8", *row) for row in of_eighth),
        *(("miou", "1/4", name, 0, value) for name, value in (("alone", 0.60), ("taught", 0.57), ("teacher wide", 0.6))),
        ("miou", "1/2", "taught", 0, 0.50),
        *(("miou", "1/3", name, 0, value) for name, value in (("alone", 0.50), ("taught", 0.48), ("teacher wide", 0.51))),
        *(("iou", "1/8", "taught", seed, value, "car") for seed, value in enumerate((0.7, 0.8))),
        ("iou", "1/8", "taught", 0, 0.1, "pole"),
        ("iou", "1/8", "teacher wide", 0, 0.9, "car"),
        ("seconds_per_step", "1/8", "taught", 0, 0.25),
        *(("rare_miou", "1/8", *row) for row in (("alone", 0, 0.1), ("alone", 1, 0.2), ("taught", 0, 0.13), ("taught", 1, 0.25))),
        *(("rare_miou", *row) for row in (("1/8", "soft", 0, 0.11), ("1/8", "teacher wide", 0, 0.3), ("1/3", "taught", 0, 0.2))),
    )
    against = {"taught": "alone", "soft": "taught", "tta": "alone"}
    both = ["teacher wide", "teacher deep"]
    teachers = {"alone": both, "taught": both, "soft": ["teacher deep"], "tta": ["teacher wide, tta"]}
    assert markdown(table, against, {"alone"}, teachers, {"1/8": ("pole",)}).splitlines()[2:] == [
        "| 1/8 | alone | 2 | 42.0 | 2.8 | - | - | 15.0 | - | 84.0 | - | - | - |",
        "| 1/8 | taught | 2 | 46.0 | 1.4 | alone | +4.0 [-8.7, +16.7] | 19.0 | +4.0 [-8.7, +16.7] | 92.0 | 50 | 0.250 | - |",
        "| 1/8 | soft | 1 | 46.0 | - | taught | +1.0 | 11.0 | -2.0 | 95.8 | - | - | - |",
        "| 1/8 | tta | 1 | 48.0 | - | alone | +8.0 | - | - | 75.0 | 33 | - | - |",
        "| 1/8 | teacher wide | 1 | 50.0 | - | - | - | 30.0 | - | - | - | - | - |",
        "| 1/8 | teacher deep | 1 | 48.0 | - | - | - | - | - | - | - | - | - |",
        "| 1/8 | teacher wide, tta | 1 | 64.0 | - | - | - | - | - | - | - | - | - |",
        "| 1/4 | alone | 1 | 60.0 | - | - | - | - | - | 100.0 | - | - | - |",
        "| 1/4 | taught | 1 | 57.0 | - | alone | -3.0 | - | - | 95.0 | - | - | - |",
        "| 1/4 | teacher wide | 1 | 60.0 | - | - | - | - | - | - | - | - | - |",
        "| 1/2 | taught | 1 | 50.0 | - | alone | - | - | - | - | - | - | - |",
        "| 1/3 | alone | 1 | 50.0 | - | - | - | - | - | 98.0 | - | - | - |",
        "| 1/3 | taught | 1 | 48.0 | - | alone | -2.0 | 20.0 | - | 94.1 | - | - | - |",
        "| 1/3 | teacher wide | 1 | 51.0 | - | - | - | - | - | - | - | - | - |",
        "",
        "Partition 1/8, rare third: the mean IoU of pole, which has the fewest pixels in the labelled images.",
        "",
        _NO_GAP,
        "",
        "| partition | variant | car | pole |",
        "|---|---|---|---|",
        "| 1/8 | taught | 75.0 | 10.0 |",
        "| 1/8 | teacher wide | 90.0 | - |",
    ]


def test_the_table_of_undefined_and_equal_mious(tmp_path: Path) -> None:
    """A run without an mIoU is in the table, with the reason below it; what makes no difference has no sign."""
    plot(table_of(("miou", "1/8", "alone", 0, None)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size
    table = table_of(
        ("miou", "1/8", "alone", 0, None),
        ("miou", "1/8", "taught", 0, math.nan),
        ("seconds_per_step", "1/8", "taught", 0, 0.25),
        *(("miou", "1/4", name, 0, value) for name, value in (("alone", 0.4), ("taught", 0.39999), ("teacher wide", 0.6))),
    )
    text = markdown(table, {"taught": "alone"}, {"alone"}, {"taught": ["teacher wide"]}, {})
    assert text.splitlines()[2:8] == [
        "| 1/8 | alone | 0 of 1 | - | - | - | - | - | - | - | - | - | - |",
        "| 1/8 | taught | 0 of 1 | - | - | alone | - | - | - | - | - | 0.250 | - |",
        "| 1/4 | alone | 1 | 40.0 | - | - | - | - | - | - | - | - | - |",
        "| 1/4 | taught | 1 | 40.0 | - | alone | 0.0 | - | - | 66.7 | 0 | - | - |",
        "| 1/4 | teacher wide | 1 | 60.0 | - | - | - | - | - | - | - | - | - |",
        "",
    ]
    assert "No mIoU, and not counted among the runs: no pixel of the val split has a class." in text and "nan" not in text


def test_students_of_other_networks_are_compared_with_their_own_twins(tmp_path: Path) -> None:
    wider, deeper = "student.network.decoder_channels=64", "student.network.encoder=resnet18"
    texts = ("supervised", "distilled", "soft", f"wide: {wider}", f"wide-alone: supervised {wider}", f"deep: {deeper}")
    longer = f"{wider} student.steps=77"
    texts += (f"wide-long-alone: supervised {longer}", f"wide-long: {longer}", f"wide-short: {wider} student.steps=7")
    variants = [parse_variant(text, PARAMS) for text in texts]
    runs = []
    for variant in variants:
        folder = tmp_path / variant.name
        folder.mkdir()
        (folder / "params.yaml").write_text(render_params(override_params(PARAMS, list(variant.overrides))), encoding="utf-8")
        runs.append(Run("1/4", variant, 0, folder, tmp_path, tmp_path))
    own = {"distilled": "supervised", "soft": "supervised", "wide": "wide-alone", "deep": "supervised"}
    own |= {"wide-long-alone": "wide-alone", "wide-long": "wide-long-alone", "wide-short": "wide-alone"}
    assert compared(runs, None) == own  # nobody trained a twin of `deep`
    without_supervised = {name: base for name, base in own.items() if base != "supervised"}
    assert compared(runs[1:], None) == without_supervised | {"soft": "distilled", "deep": "distilled"}
    assert compared(runs, "soft") == {name.split(":")[0]: "soft" for name in texts if name != "soft"}
    assert compared([], None) == {}


def test_paired_difference_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.302653 (any table)."""
    half = 4.302653 / math.sqrt(3)
    assert paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0]) == pytest.approx((2, 2 - half, 2 + half), rel=1e-6)
    alone = paired_difference([3.0], [1.0])
    assert alone.mean == 2 and math.isnan(alone.low)
