"""What 0.1.0 wrote stays readable: its parameters, manifest, teacher, teacher cache and student.

`version_0_1_0.tar.xz` is a finished project of commit 5d240b1: the built-in data set with four small training images, one teacher
of 32 channels and a student, a few steps each. `expected.npz` holds the logits that 0.1.0 computed for the test image.
"""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from caches import file_bytes
from mgd_pipeline import load_student
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.caches.verify import verify_cache
from mgd_pipeline.data.images import read_image
from mgd_pipeline.data.manifest import read_manifest, write_manifest
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import Project, open_project
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.train_student import train_student

ARCHIVE = Path(__file__).parent / "version_0_1_0.tar.xz"
CPU = torch.device("cpu")


@pytest.fixture
def old(tmp_path: Path) -> Project:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return open_project(tmp_path / "params.yaml")


def test_the_student_predicts_what_it_did(old: Project) -> None:
    student = load_student(old.student("distilled"))
    image = read_image(old.base / "data/raw/shapes/images/test/test_00000.png")
    expected = np.load(old.base / "expected.npz")
    with torch.inference_mode():
        logits = student(torch.from_numpy(image).permute(2, 0, 1)[None].float())[0].numpy()
    # Another processor adds in another order.
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert (student.predict(image) == expected["mask"]).mean() > 0.99


def test_the_teacher_cache_is_whole_and_nothing_is_computed_again(old: Project, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(old.manifest, old.base)
    before = file_bytes(old.targets("wide"))
    cache = open_cache(old.targets("wide"))
    damage: list[str] = []
    verify_cache(old.targets("wide"), 1.0, damage.append)
    assert damage == []
    assert {key.image_id for key in cache.index.place} == {row.image_id for row in manifest.training}
    precompute_teachers(old, "wide", device=CPU)
    assert "all images were there already" in capsys.readouterr().out
    assert file_bytes(old.targets("wide")) == before


def test_the_manifest_of_today_keeps_the_cache(old: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """0.1.0 wrote the names of the classes into images.parquet."""
    manifest, before = read_manifest(old.manifest, old.base), file_bytes(old.targets("wide"))
    partition = (old.manifest / "partition.parquet").read_bytes()
    names = tuple(name.title() for name in manifest.classes)
    write_manifest(replace(manifest, classes=names), old.manifest)
    assert read_manifest(old.manifest, old.base) == replace(manifest, classes=names)
    assert (old.manifest / "partition.parquet").read_bytes() == partition
    precompute_teachers(old, "wide", device=CPU)
    assert (
        "all images were there already" in (said := capsys.readouterr().out) and "teacher wide calls class 0 'background'" in said
    )
    train_student(old, Machine(CPU))
    assert load_student(old.student("distilled")).classes == list(names) and file_bytes(old.targets("wide")) == before


def test_a_student_trains_from_the_cache(old: Project) -> None:
    old.student("distilled").unlink()
    train_student(old, Machine(CPU))
    assert load_student(old.student("distilled")).classes == list(read_manifest(old.manifest, old.base).classes)
