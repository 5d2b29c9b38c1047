"""Metrics of a training elsewhere than in DVC's files."""

from __future__ import annotations

import re
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import TINY
from mgd_stages.cli import app
from mgd_stages.run.project import Project


def trained(project: Project, *arguments: str, command: str = "train-student") -> Any:
    overrides = [part for key in (*TINY, "student.steps=23", "teacher_training.steps=11") for part in ("--set", key)]
    named = ["--teacher", "wide"] if command == "train-teacher" else []
    return CliRunner().invoke(app, [command, *named, "--config", str(project.base / "params.yaml"), *overrides, *arguments])


def written(project: Project, name: str = "loss", run: str = "train-student-distilled") -> dict[int, float]:
    """What DVC's file has: steps and values."""
    lines = (project.results / run / f"plots/{name}.tsv").read_text().splitlines()[1:]
    return {int(step): float(value) for step, value in (line.split("\t") for line in lines)}


def test_tensorboard_has_what_dvc_has(project: Project) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert not (project.base / ".mgd/tensorboard").exists(), "nothing is logged unasked"
    assert trained(project, "--log-to", "tensorboard").exit_code == 0
    events = EventAccumulator(str(project.base / ".mgd/tensorboard/train-student-distilled")).Reload()
    names = {path.stem for path in (project.results / "train-student-distilled/plots").iterdir()}
    assert set(events.Tags()["scalars"]) == names and "loss" in names
    for name in names:
        logged_values = {event.step: event.value for event in events.Scalars(name)}
        assert logged_values == pytest.approx(written(project, name), rel=1e-5) and len(logged_values) == 3
    assert trained(project, "--log-to", "tensorboard", command="train-teacher").exit_code == 0
    assert list((project.base / ".mgd/tensorboard/train-teacher-wide").glob("events.*"))


def test_a_sink_that_is_not_installed_is_named(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    done = trained(project, "--log-to", "mlflow")
    assert done.exit_code == 2
    assert re.fullmatch(r"error: --log-to mlflow: .*mlflow.*; pip install 'mgd-pipeline\[mlflow\]'\n", done.stderr)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install 'mgd-pipeline[tensorboard]'" in trained(project, "--log-to", "tensorboard").stderr


def test_mlflow_has_what_dvc_has(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("mlflow") is None:
        pytest.skip("mlflow is not part of the dev extra: it brings thirty packages")
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

    address = (tmp_path / "runs").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    assert trained(project, "--log-to", "mlflow").exit_code == 0
    client = MlflowClient(address)
    (run,) = client.search_runs(["0"])
    assert run.info.run_name == "train-student-distilled" and run.info.status == "FINISHED"
    logged_values = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "loss")}
    assert logged_values == pytest.approx(written(project), rel=1e-5) and len(logged_values) == 3


def test_wandb_is_called_as_it_documents(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with W&B's names: the real one needs an account, or writes files that only its server reads."""
    logged: dict[int, float] = {}
    settings: dict[str, Any] = {}

    class Run(ExitStack):
        def log(self, values: dict[str, float], step: int) -> None:
            logged[step] = values["loss"]

    def init(**options: Any) -> Run:
        settings.update(options)
        run = Run()
        run.callback(settings.update, ended=True)
        return run

    wandb: Any = ModuleType("wandb")
    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert trained(project, "--log-to", "wandb").exit_code == 0
    assert logged == pytest.approx(written(project), rel=1e-5)
    assert settings["name"] == "train-student-distilled" and settings["config"]["student"]["steps"] == 23 and settings["ended"]
