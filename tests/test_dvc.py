"""Under DVC: a second repro runs nothing, and a change reruns exactly what depends on it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from conftest import TINY, run, stages_run
from mgd_pipeline.params_file import load_params
from mgd_stages.init import init_project
from mgd_stages.presets import render_params

pytestmark = pytest.mark.skipif(shutil.which("dvc", path=str(Path(sys.executable).parent)) is None, reason="dvc is an extra")


@pytest.mark.timeout(600)
def test_repro_runs_what_is_out_of_date_and_nothing_else(tmp_path: Path) -> None:
    project = tmp_path / "project"
    init_project("shapes", None, "1/4", project)
    tiny = render_params(load_params(project / "params.yaml", TINY))
    (project / "params.yaml").write_text(tiny, encoding="utf-8")
    run(project, "git", "init", "-q")
    run(project, "dvc", "init", "-q")
    everything = {
        "prepare-data",
        "train-teacher@wide",
        "train-teacher@deep",
        "precompute-teachers@wide",
        "precompute-teachers@deep",
        "compare-teachers",
        "train-student",
        "train-student-supervised",
        "evaluate",
        "report",
    }
    assert stages_run(run(project, "dvc", "repro")) == everything
    assert stages_run(run(project, "dvc", "repro")) == set()
    ignored = run(project, "git", "status", "--porcelain", "--untracked-files=all").splitlines()
    assert not [line for line in ignored if "data/" in line or ".mgd" in line], "git sees no data"
    stores = {path: path.read_bytes() for path in (project / "data/targets").rglob("*") if path.is_file()}

    # Another learning rate of the student: no teacher runs, and the way back is free.
    before = (project / "data/students/distilled/student.safetensors").read_bytes()
    (project / "params.yaml").write_text(tiny.replace("  region: 10.0", "  region: 5.0"), encoding="utf-8")
    assert stages_run(run(project, "dvc", "repro")) == {"train-student", "evaluate", "report"}
    assert (project / "data/students/distilled/student.safetensors").read_bytes() != before
    (project / "params.yaml").write_text(tiny, encoding="utf-8")
    assert stages_run(run(project, "dvc", "repro", "train-student")) == set(), "restored from the run cache"
    assert (project / "data/students/distilled/student.safetensors").read_bytes() == before
    assert stores == {path: path.read_bytes() for path in (project / "data/targets").rglob("*") if path.is_file()}

    assert "miou" in run(project, "dvc", "metrics", "show")


def test_the_repository_holds_one_dvc_yaml() -> None:
    """DVC reads every dvc.yaml below the repository's root: a template of that name breaks `dvc repro` there."""
    root = Path(__file__).parents[1]
    found = [path for folder in ("pipeline", "stages", "tests", "docs", "configs") for path in (root / folder).rglob("dvc.yaml")]
    assert not found and (root / "dvc.yaml").is_file()
