"""The benchmarks and the scripts of experiments run. No test asserts a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from conftest import run

REPOSITORY = Path(__file__).parents[1]


def test_the_reader_benchmark_prints_its_tables(tmp_path: Path) -> None:
    output = run(REPOSITORY, sys.executable, "benchmarks/reader.py", "--quick", "--folder", str(tmp_path))
    tables = output.split("### ")[1:]
    titles = [f"Whole records ({name})" for name in ("smallest", "CamVid", "VOC")]
    expected = [titles[0], "One array", "The same", *titles[1:], "Writing 32 images", "Growth", "One array"]
    assert [table.split(",")[0].split("\n")[0] for table in tables] == expected
    growth = tables.pop(-2)
    for table in tables:
        assert "| **ours" in table and "| limit: " in table
    for line in (line for line in output.splitlines() if line.startswith("|")):
        assert "nan" not in line and "inf" not in line
    assert "| 600 |" in growth
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


def test_the_benchmark_of_stage_one_has_every_arm(tmp_path: Path) -> None:
    output = run(REPOSITORY, sys.executable, "benchmarks/stage_one.py", "--quick", "--device", "cpu")
    rows = [line.split(" | ") for line in output.splitlines() if line.startswith("| built-in")]
    arms = ["bare forward passes", "in bfloat16", "channels first", "images decoded first", "targets, in memory", "the stage"]
    assert [row[1] for row in rows] == arms
    assert all(("% same class, largest change" in row[4]) == (row[1] in ("in bfloat16", "channels first")) for row in rows)


def test_targets_are_measured_on_unlabelled_images(finished_project: Path) -> None:
    other = finished_project / "data/students/supervised/student.safetensors"
    output = run(REPOSITORY, sys.executable, "docs/experiments/unlabelled.py", str(finished_project), f"again={other}")
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in output.splitlines()[4:]}
    assert list(rows) == ["distilled", "supervised", "again", "targets of wide", "targets of deep", "mean of the targets"]
    assert rows["again"] == rows["supervised"] != rows["distilled"]
    assert all(len(values) == 1 + 9 and 0 < float(values[0]) < 100 for values in rows.values())


def test_a_shift_of_zero_is_the_student_that_was_evaluated(finished_project: Path) -> None:
    """A shift of 5 changes its classes. tests/test_stages.py checks that the shift itself is right."""
    measured = json.loads((finished_project / "data/results/evaluation/metrics.json").read_text())
    output = run(REPOSITORY, sys.executable, "docs/experiments/logit_shift.py", str(finished_project), "--shift", "0", "5")
    lines = [line.strip(" |").split(" | ") for line in output.splitlines() if line.startswith(f"| {finished_project} ")]
    rows = {cells[0].split()[-1]: cells[1:] for cells in lines}
    assert list(rows) == ["distilled", "supervised"]
    for name, (plain, shifted) in rows.items():
        assert plain == f"{100 * measured[name]['miou']:.1f}" != shifted


def test_cached_targets_on_whole_images_are_the_live_ones(finished_project: Path, tmp_path: Path) -> None:
    """Up to the rounding of uint8 logits and the means of regions. A crop hides the context, so its regions differ more."""
    picture = tmp_path / "views.png"
    script = "docs/experiments/live_vs_cached.py"
    output = run(REPOSITORY, sys.executable, script, str(finished_project), "--images", "8", "--picture", str(picture))
    table = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]
    assert [row[0] for row in table if row[1] == "live right, %"] == ["wide", "deep"] and len(table) == 2 * 12
    assert picture.stat().st_size > 0
    for rows in ({row[0]: row[3:] for row in table[1:12]}, {row[0]: row[3:] for row in table[13:]}):
        same, kl, regions, _ = rows["the cache on whole images (uint8)"]
        assert float(same) > 99 and abs(float(kl)) < 0.001
        assert float(regions) < float(rows["drawn views: all together, without CutMix"][2])
