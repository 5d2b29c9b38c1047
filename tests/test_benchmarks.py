"""The benchmarks and the scripts of experiments run, in this process. No test asserts a time."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script, and returns what it printed."""

    def run(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.syspath_prepend(str((REPOSITORY / script).parent))
        capsys.readouterr()
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def cells(line: str) -> list[str]:
    return line.strip("| ").split(" | ")


def test_make_bench_writes_every_table(tmp_path: Path, printed: Callable[..., str]) -> None:
    (tmp_path / "work").mkdir()
    printed("benchmarks/report.py", "--quick", "--device", "cpu", "--folder", tmp_path / "work", "--output", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    tables = {
        table.partition("\n")[0]: [line for line in table.splitlines() if line.startswith("|")] for table in page.split("\n## ")
    }
    whole = {name: f"Whole records ({name})" for name in ("smallest", "CamVid", "VOC")}
    peers = ["The newest zarr on our teacher cache", "Formats of training data"]
    readers = [whole["smallest"], "One array", "The same", whole["CamVid"], whole["VOC"], *peers, "Writing 32 images"]
    others = ["Growth", "One array", "Memory of the loader", "Stage one on cpu", "Training steps on cpu"]
    others.append("Training steps with small caches on cpu")
    assert [title.split(",")[0] for title in tables] == ["# Benchmarks", *readers, *others]
    documented = [line for line in (REPOSITORY / "docs/benchmarks.md").read_text().splitlines() if line.startswith("## ")]
    assert [title.split(",")[0] for title in documented if "Writing" not in title] == [
        f"## {title.split(',')[0]}" for title in list(tables)[1:] if "Writing" not in title
    ], "the page in the repository has the same tables"
    for title, lines in tables.items():
        assert not any(word in line for word in ("nan", "inf") for line in lines)
        if title.split(",")[0] in (*readers, "One array"):
            assert any("| **ours" in line for line in lines) and (title in peers[1:] or any("| limit: " in line for line in lines))
    assert [cells(tables[title][2])[0] for title in ("Growth", "Memory of the loader")] == ["600", "600"]
    assert [cells(line)[:2] for line in tables[peers[1]][2:] if "litdata" not in line] == [
        [size, name] for size in ("CamVid", "VOC") for name in ("**ours**", "safetensors in tar")
    ]
    assert f"zarr {version('zarr')}" in [cells(line)[1] for line in tables[peers[0]]], "without --newest the zarr that is installed"
    stage_one = {cells(line)[1]: line for line in tables["Stage one on cpu"][2:]}
    ways = ["in bfloat16", "channels first"]
    arms = ["bare forward passes", *ways, "images decoded first", "targets, in memory", "the stage"]
    assert list(stage_one) == arms
    assert [arm for arm, line in stage_one.items() if "% same class, largest change" in line] == ways
    assert float(cells(tables["Training steps with small caches on cpu"][2])[-1]) < 0.6
    assert cells(tables["Training steps on cpu"][2])[0] == "tiny" and "An epoch has 10,000 images." in page
    assert not list((tmp_path / "work").iterdir()), "it leaves nothing behind"


def test_logits_of_150_classes_take_a_seventh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is simulated; at 11 classes it is as sure of its classes as a real one (0.83 to 0.90), and compresses as well."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    simulated = importlib.import_module("simulated")
    generator = torch.Generator().manual_seed(0)
    few, many = (
        simulated.facts(simulated.simulated(*size, generator) for _ in range(3)) for size in ((11, 48, 64, 7), (150, 128, 172, 12))
    )
    assert 0.8 < float(few["largest probability"]) < 0.95 and 0.15 < float(few["log-probability with zstd"]) < 0.35
    assert float(many["log-probability with zstd"]) <= 0.15


def test_targets_are_measured_on_unlabelled_images(finished_project: Path, printed: Callable[..., str]) -> None:
    other = finished_project / "data/students/supervised/student.safetensors"
    output = printed("docs/experiments/unlabelled.py", finished_project, f"again={other}")
    rows = {cells(line)[0]: cells(line)[1:] for line in output.splitlines()[4:]}
    assert list(rows) == ["distilled", "supervised", "again", "targets of wide", "targets of deep", "mean of the targets"]
    assert rows["again"] == rows["supervised"] != rows["distilled"]
    assert all(len(values) == 1 + 9 and 0 < float(values[0]) < 100 for values in rows.values())


def test_a_shift_of_zero_is_the_student_that_was_evaluated(finished_project: Path, printed: Callable[..., str]) -> None:
    """A shift of 5 changes its classes. tests/test_stages.py checks that the shift itself is right."""
    measured = json.loads((finished_project / "data/results/evaluation/metrics.json").read_text())
    output = printed("docs/experiments/logit_shift.py", finished_project, "--shift", 0, 5)
    lines = [cells(line) for line in output.splitlines() if line.startswith(f"| {finished_project} ")]
    assert [line[0].split()[-1] for line in lines] == ["distilled", "supervised"]
    for name, plain, shifted in lines:
        assert plain == f"{100 * measured[name.split()[-1]]['miou']:.1f}" != shifted


def test_cached_targets_on_whole_images_are_the_live_ones(finished_project: Path, printed: Callable[..., str]) -> None:
    """Up to the rounding of uint8 logits and the means of regions. A crop hides the context, so its regions differ more."""
    output = printed("docs/experiments/live_vs_cached.py", finished_project, "--images", 8)
    table = [cells(line) for line in output.splitlines() if line.startswith("| ")]
    assert [row[0] for row in table if row[1] == "live right, %"] == ["wide", "deep"] and len(table) == 2 * 12
    for rows in ({row[0]: row[3:] for row in table[1:12]}, {row[0]: row[3:] for row in table[13:]}):
        same, kl, regions, _ = rows["the cache on whole images (uint8)"]
        assert float(same) > 99 and abs(float(kl)) < 0.001
        assert float(regions) < float(rows["drawn views: all together, without CutMix"][2])
