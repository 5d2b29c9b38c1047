"""The smallest and the strangest data sets that a person may bring: each goes the whole way, or one line says at once why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from conftest import TINY
from mgd_pipeline import load_student
from mgd_stages.cli import app
from mgd_stages.projects.init import QUICK, init_project, stage_commands
from mgd_stages.run.project import open_project

SETTINGS = [setting for setting in TINY if not setting.startswith("data.")]


def data_set(root: Path, classes: int, **counts: int) -> Path:
    """Folders with so many labelled, unlabelled, val and test images of 40 x 56 pixels, in which every class occurs."""
    generator = np.random.default_rng(0)
    for kind, count in counts.items():
        split = "train" if kind in ("labelled", "unlabelled") else kind
        for number in range(count):
            blocks = np.resize(generator.permutation(np.resize(np.arange(classes), max(classes, 140))), (10, 14))
            if classes > 140:
                blocks = np.resize(np.arange(classes, dtype=int), (15, 14))
            mask = blocks.astype(np.uint8).repeat(4, 0).repeat(4, 1)
            image = np.stack([mask, mask // 2, 255 - mask], 2) + generator.integers(0, 9, (*mask.shape, 3), np.uint8)
            for folder, pixels in (("images", image), ("masks", mask)):
                if folder == "images" or kind != "unlabelled":
                    (root / folder / split).mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(root / folder / split / f"{kind}{number}.png")
    return root


@pytest.mark.parametrize(
    ("classes", "counts"),
    [
        (2, {"labelled": 1, "unlabelled": 3, "val": 2}),
        (2, {"labelled": 1, "val": 1}),
        (3, {"labelled": 2, "unlabelled": 1, "val": 1}),
        (3, {"labelled": 2, "val": 1}),
        (2, {"labelled": 2, "test": 2}),
        (150, {"labelled": 2, "unlabelled": 1, "val": 1}),
    ],
    ids=str,
)
def test_the_whole_way(tmp_path: Path, classes: int, counts: dict[str, int]) -> None:
    said = init_project("folder", data_set(tmp_path / "photos", classes, **counts), "1/1", tmp_path / "project", preset_name=QUICK)
    assert classes < 150 or any("the masks hold the values 0 to 149: " in line for line in said)
    config = tmp_path / "project/params.yaml"
    project = open_project(config, SETTINGS)
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    for command in stage_commands(project.params):
        done = CliRunner().invoke(app, [*command.split(), "--config", str(config), *sets])
        assert done.exit_code == 0, (command, done.output)
        assert "nan" not in done.output.lower().split(), done.output
    student = load_student(project.best_student)
    assert len(student.classes) == classes and set(student.metadata["best"]["miou"]) == {"distilled", "supervised"}
    assert student.metadata["best"]["images"] == counts.get("val", counts.get("test")), "no image of another split is drawn"
    assert (project.results / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (
            {"labelled": 1, "unlabelled": 3},
            "evaluation.split: val has no images; only 1 image has a mask, and train",
        ),
        (
            {"unlabelled": 3, "val": 2},
            "data.partition: no train image has a mask (val has 2); move images",
        ),
    ],
)
def test_what_cannot_be_trained_or_measured_is_said_before_an_image_is_read(
    tmp_path: Path, counts: dict[str, int], said: str
) -> None:
    noted = init_project("folder", data_set(tmp_path / "photos", 2, **counts), "1/1", tmp_path / "project", preset_name=QUICK)
    assert any(line.startswith(f"warning: prepare-data will refuse this data set: {said}") for line in noted)
    done = CliRunner().invoke(app, ["prepare-data", "--config", str(tmp_path / "project/params.yaml")])
    assert done.exit_code == 1 and done.output.startswith(f"error: {said}") and done.output.count("\n") == 1
