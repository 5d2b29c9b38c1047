"""Under DVC: a second repro runs nothing, and a change reruns exactly what depends on it."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import vl_convert

from conftest import TINY, run, stages_run
from mgd_pipeline.params_file import load_params
from mgd_stages.projects.init import init_project
from mgd_stages.projects.presets import render_params
from test_init import REPOSITORY

pytestmark = pytest.mark.skipif(shutil.which("dvc", path=str(Path(sys.executable).parent)) is None, reason="dvc is an extra")


@pytest.mark.timeout(600)
def test_repro_runs_what_is_out_of_date_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    caches = {path: path.read_bytes() for path in (project / "data/targets").rglob("*") if path.is_file()}

    # Another learning rate of the student: no teacher runs, and the way back is free.
    before = (project / "data/students/distilled/student.safetensors").read_bytes()
    (project / "params.yaml").write_text(tiny.replace("  region: 10.0", "  region: 5.0"), encoding="utf-8")
    assert stages_run(run(project, "dvc", "repro")) == {"train-student", "evaluate", "report"}
    assert (project / "data/students/distilled/student.safetensors").read_bytes() != before
    (project / "params.yaml").write_text(tiny, encoding="utf-8")
    assert stages_run(run(project, "dvc", "repro", "train-student")) == set(), "restored from the run cache"
    assert (project / "data/students/distilled/student.safetensors").read_bytes() == before
    assert caches == {path: path.read_bytes() for path in (project / "data/targets").rglob("*") if path.is_file()}

    shown = run(project, "dvc", "metrics", "show")
    assert "distilled.miou" in shown and "crescent" not in shown, "what there is of every class is in plots"
    assert 10 < len(re.split(r"\s{2,}", shown.splitlines()[0].strip())) <= 25

    # Its page of plots, without a network: as docs/training.md has it.
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/training.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(project)
    exec(compile(code, "docs/training.md", "exec"), {})
    run(project, "dvc", "config", "--local", "plots.html_template", "plots.html")
    run(project, "dvc", "plots", "show")
    page = (project / "dvc_plots/index.html").read_text(encoding="utf-8")
    assert "<script src" not in page and "vegaEmbed" in page
    for name in ("teachers/wide-confusion.csv", "evaluation/class_iou.tsv", "train-student-distilled/plots/loss.tsv"):
        assert f"data/results/{name}" in page, name
    curves = [path.read_text(encoding="utf-8").splitlines()[1:] for path in (project / "data/results").glob("train-*/plots/*.tsv")]
    steps = {line.split("\t")[0] for curve in curves for line in curve}
    assert set(re.findall(r'"step": "(\d+)"', page)) == steps, "and not the numbers of the lines, as DVC would have it"


def test_a_confusion_matrix_is_drawn_by_its_pixels() -> None:
    """Not by its lines, as DVC's own template does it; the classes in their own order; two states side by side."""
    from dvc_render.vega import VegaRenderer

    names, pixels = ["road", "cat", "sky", "never"], [[90, 10, 0, 0], [30, 40, 5, 0], [1, 2, 7, 0], [0, 0, 0, 0]]
    lines = [
        {"actual": actual, "predicted": predicted, "pixels": str(pixels[i][j]), "rev": rev}
        for rev in ("main", "workspace")
        for i, actual in enumerate(names)
        for j, predicted in enumerate(names)
    ]
    shown = VegaRenderer(
        lines, "confusion.csv", template=str(REPOSITORY / "dvc-confusion.json"), x="predicted", y="actual", title="matrix"
    )
    drawing = vl_convert.vegalite_to_svg(shown.get_filled_template())
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", drawing)
    shares = [text for text in texts if re.fullmatch(r"\d+\.\d%", text)]
    expected = [f"{100 * cell / sum(row):.1f}%" for row in pixels[:3] for cell in row]
    assert sorted(shares) == sorted(expected * 2), "once for each state, and a class that does not occur has no row"
    assert {"main", "workspace", "matrix"} <= set(texts)
    assert [text for text in texts if text in names] == [*names[:3], *names, *names], "in truth downwards, predicted to the right"


def test_the_repository_holds_one_dvc_yaml() -> None:
    """DVC reads every dvc.yaml below the repository's root: a template of that name breaks `dvc repro` there."""
    root = Path(__file__).parents[1]
    others = [path for folder in ("pipeline", "stages", "tests", "docs") for path in (root / folder).rglob("dvc.yaml")]
    assert not others and (root / "dvc.yaml").is_file()
