"""The benchmarks run; how fast anything is, no test says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import zarr
from PIL import Image
from scipy.stats import spearmanr

from conftest import run
from mgd_pipeline.data.manifest import read_manifest
from mgd_stages.run.project import open_project

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
    output = run(REPOSITORY, sys.executable, "benchmarks/unlabelled.py", str(finished_project), f"again={other}")
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in output.splitlines()[4:]}
    assert list(rows) == ["distilled", "supervised", "again", "targets of wide", "targets of deep", "mean of the targets"]
    assert rows["again"] == rows["supervised"] != rows["distilled"]
    assert all(len(values) == 1 + 9 and 0 < float(values[0]) < 100 for values in rows.values())


def test_what_is_in_the_images_is_what_masks_and_plain_zarr_say(finished_project: Path) -> None:
    output = run(REPOSITORY, sys.executable, "benchmarks/class_shares.py", str(finished_project))
    split = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]
    (_, masks, wide, _), (_, wide_ranks, descriptor_ranks, *_) = split[:4], split[4:]

    project = open_project(finished_project / "params.yaml")
    manifest = read_manifest(project.manifest, project.base)
    rows = [row for row in manifest.unlabelled if row.mask_path]
    truth = [np.asarray(Image.open(project.base / manifest.root / str(row.mask_path))) for row in rows]
    shown = np.concatenate([mask[mask < 9] for mask in truth])
    assert masks == ["masks", *(f"{100 * (shown == k).mean():.2f}" for k in range(9))]

    group = zarr.open_group(project.targets("wide"), mode="r")
    images = pq.read_table(project.targets("wide") / "images.parquet").to_pylist()
    places = [{image["image_id"]: image["row"] for image in images}[row.image_id] for row in rows]
    cells = np.asarray(group["logits"])[places].argmax(1)  # images of shapes fill the canvas
    assert wide == ["cells of wide", *(f"{100 * (cells == k).mean():.2f}" for k in range(9))]

    background = [(mask == 0).sum() / (mask < 9).sum() for mask in truth]
    told = (cells == 0).mean((1, 2)), np.asarray(group["global_descriptors"])[places, 0]
    for row, values in zip((wide_ranks, descriptor_ranks), told, strict=True):
        assert row[1] == (f"{spearmanr(values, background)[0]:.2f}" if np.ptp(values) else "-")


def test_a_shift_of_zero_is_the_student_that_was_evaluated(finished_project: Path) -> None:
    """And another one changes what it names; that the shift is the right one, test_stages.py says."""
    measured = json.loads((finished_project / "data/results/evaluation/metrics.json").read_text())
    output = run(REPOSITORY, sys.executable, "benchmarks/logit_shift.py", str(finished_project), "--shift", "0", "5")
    lines = [line.strip(" |").split(" | ") for line in output.splitlines() if line.startswith(f"| {finished_project} ")]
    rows = {cells[0].split()[-1]: cells[1:] for cells in lines}
    assert list(rows) == ["distilled", "supervised"]
    for name, (plain, shifted) in rows.items():
        assert plain == f"{100 * measured[name]['miou']:.1f}" != shifted
