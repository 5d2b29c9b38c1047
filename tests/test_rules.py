"""Three rules of CONTRIBUTING.md that hold for the whole program."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mgd_pipeline
import mgd_stages
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.data.shapes import CLASSES
from mgd_pipeline.networks.weights import read_metadata, read_state_dict, save_weights
from mgd_stages.cli import app
from mgd_stages.run.loaded_teacher import load_teacher
from mgd_stages.run.progress import answer_json, write_json
from mgd_stages.run.project import Project
from mgd_stages.run.teacher_quality import evaluate_teacher
from mgd_stages.stages.compare_teachers import compare_teachers
from mgd_stages.stages.evaluate import evaluate
from mgd_stages.study import results as study_results

CPU = torch.device("cpu")


# --- JSON files are strict JSON ----------------------------------------------------------------------------------------


def strictly(text: str) -> object:
    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_nothing_was_measured_for_become_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"a": float("nan"), "b": [np.float64("inf"), 1.5, "NaN"], "c": ({"d": -float("inf")}, None, True, 3)}
    expected = {"a": None, "b": [None, 1.5, "NaN"], "c": [{"d": None}, None, True, 3]}
    write_json(tmp_path / "x.json", content)
    answer_json(content)
    assert strictly((tmp_path / "x.json").read_text()) == strictly(capsys.readouterr().out) == expected


def test_every_json_that_is_written_is_strict_by_its_own_call() -> None:
    """`write_json` and `answer_json` are the way for results; whoever calls json.dumps itself forbids NaN."""
    calls = 0
    for package in (mgd_pipeline, mgd_stages):
        for path in Path(next(iter(package.__path__))).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                place = f"{path}:{getattr(node, 'lineno', 0)}"
                assert not (isinstance(node, ast.ImportFrom) and node.module == "json"), f"{place}: import json, for this test"
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
                    calls += 1
                    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    assert given.get("allow_nan") == "False", f"{place}: allow_nan=False is missing"
    assert calls > 5


# --- results are written before pictures -------------------------------------------------------------------------------


PICTURES = (
    *("stages.evaluate.save_overlay", "stages.compare_teachers.save_overlay"),
    *("run.teacher_quality.write_masks", "study.results.plot"),
)


def test_numbers_are_written_before_pictures(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a picture cannot show, what was measured is kept."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no picture")

    for name in PICTURES:
        monkeypatch.setattr(f"mgd_stages.{name}", broken)
    manifest = read_manifest(project.manifest, project.base)
    table = pa.Table.from_pylist([], schema=study_results._SCHEMA)
    monkeypatch.setattr(study_results, "collect", lambda runs: table)
    shutil.rmtree(project.results)
    for call, files in (
        (
            lambda: evaluate(project, device=CPU),
            ["evaluation/metrics.json", "evaluation/confusion.csv", "evaluation/class_iou.tsv"],
        ),
        (lambda: compare_teachers(project), ["metrics.json", "wide-confusion.csv", "disagreement/class_agreement.tsv"]),
        (
            lambda: evaluate_teacher(load_teacher(project, "wide", manifest, CPU)),
            ["teachers/wide.json", "teachers/wide-confusion.csv"],
        ),
        (lambda: study_results.write_results(project.results, [], None), ["results.parquet", "table.md"]),
    ):
        with pytest.raises(RuntimeError, match="no picture"):
            call()
        for file in files:
            assert list(project.results.rglob(file)), file


# --- nothing that can be known before the first step is learnt after the last ------------------------------------------


WORK = (
    "mgd_stages.stages.train_student.train",
    "mgd_stages.stages.train_teacher.train",
    "mgd_stages.stages.precompute_teachers.build_shards",
    "mgd_stages.stages.precompute_teachers.evaluate_teacher",
    "mgd_stages.stages.evaluate.evaluate_network",
    "mgd_stages.tools.predict._predict",
)
"""What takes the time of a stage: hours, of real networks and images."""


def void_masks(project: Project, split: str, labelled_only: bool = False) -> None:
    """Masks without a class, in a manifest of 0.1.0, whose prepare-data accepted them: all of a split, or the labelled ones."""
    folder = project.base / "data/raw/shapes/masks" / split
    manifest = read_manifest(project.manifest, project.base)
    for row in manifest.labelled if labelled_only else manifest.split(split):
        Image.new("L", (row.width, row.height), 255).save(folder / Path(str(row.mask_path)).name)


def note(project: Project, student: str, **notes: object) -> None:
    """A student file of another data set."""
    path = project.student(student)
    save_weights(path, read_state_dict(path), {**read_metadata(path), **notes})


def cut(project: Project, name: str) -> None:
    """A result of an earlier stage cannot be read; `evaluate` shows it after its last image."""
    (project.results / name).write_bytes((project.results / name).read_bytes()[:9])


def block(project: Project, place: str) -> None:
    """A folder where a result would be written."""
    path = project.base / "data" / place
    path.unlink(missing_ok=True)
    path.mkdir(parents=True)


PAIR = ["--set", "student.network.decoder=deeplabv3plus", "--set", "student.network.encoder=densenet121"]
SMALL = [f"student.network.{part}" for part in ("decoder=fpn", "decoder_channels=32", "encoder=tu-mobilevitv2_050")]
VIEWS = [part for text in (*SMALL, "views.crop=[64,64]") for part in ("--set", text)]
TEACHER = ["--set", "teachers.wide.decoder=deeplabv3plus", "--set", "teachers.wide.encoder=densenet121"]


RESULTS = {
    "students/distilled/student.safetensors": ["train-student"],
    "results/train-student-distilled/metrics.json": ["train-student"],
    "students/best.safetensors": ["evaluate"],
    "teachers/wide.safetensors": ["train-teacher", "--teacher", "wide"],
    "results/evaluation/metrics.json": ["evaluate"],
    "results/teachers/wide.json": ["precompute-teachers"],
}
CUT = ("teachers/wide.json", "teachers/deep-confusion.csv", "train-student-supervised/metrics.json")


@pytest.mark.parametrize(
    ("command", "spoil", "said"),
    [
        (["prepare-data", *PAIR], None, "student.network: decoder deeplabv3plus"),
        (["prepare-data", *VIEWS], None, "student.network: decoder fpn cannot see 64 x 96 pixels"),
        (["train-student", *PAIR], None, "student.network: decoder deeplabv3plus"),
        (["train-teacher", "--teacher", "wide", *TEACHER], None, "teachers.wide: decoder deeplabv3plus"),
        (["train-student"], partial(void_masks, split="train", labelled_only=True), "holds no class"),
        (["train-teacher", "--teacher", "wide"], partial(void_masks, split="train", labelled_only=True), "holds no class"),
        (["precompute-teachers"], partial(void_masks, split="test"), "holds no class"),
        (["evaluate"], partial(void_masks, split="test"), "holds no class"),
        (["evaluate"], partial(note, student="supervised", classes=CLASSES[::-1]), "'crescent', which is class 8 of the project"),
        (["evaluate"], partial(note, student="distilled", long_side=40), "data.long_side 40, and the data set is prepared with"),
        (["evaluate"], lambda project: shutil.rmtree(project.base / "data/students"), "run `mgd-pipeline train-student`"),
        *((["evaluate"], partial(cut, name=name), name) for name in CUT),
        *((command, partial(block, place=place), "is a folder") for place, command in RESULTS.items()),
        (["train-student", "--set", "losses.region_teacher=tall"], None, "losses.region_teacher"),
        (["train-student", "--log-to", "mlflow"], None, "pip install 'mgd-pipeline[mlflow]'"),
        (["train-student", "--device", "cuda"], None, "--device cuda"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_can_be_known_is_said_before_the_work(
    project: Project, monkeypatch: pytest.MonkeyPatch, command: list[str], spoil: Callable[[Project], None] | None, said: str
) -> None:
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("this machine has a GPU: --device cuda is right here")
    shutil.rmtree(project.base / ".mgd/work", ignore_errors=True)
    if command[0] == "precompute-teachers":
        shutil.rmtree(project.targets("wide"))
    if spoil is not None:  # or the parameters alone are wrong
        spoil(project)

    def begun(*_: Any, **__: Any) -> None:
        raise AssertionError("the work has begun")

    for name in WORK:
        monkeypatch.setattr(name, begun)
    result = CliRunner().invoke(app, [*command, "--config", str(project.base / "params.yaml")])
    assert not isinstance(result.exception, AssertionError), "the work has begun"
    assert result.exit_code in (1, 2) and result.exception.__class__ is SystemExit, (result.exception, result.output)
    assert any(said in line for line in result.stderr.splitlines() if line.startswith("error: ")), result.stderr
