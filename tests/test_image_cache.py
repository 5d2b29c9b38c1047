"""Decoded images on disk: the same bytes, made once, never a damaged one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mgd_pipeline.data.decoded import decoded
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.errors import DataError
from mgd_stages.run.machine import Machine
from mgd_stages.run.outputs import image_cache
from mgd_stages.run.project import Project
from mgd_stages.stages.train_student import train_student

CPU = torch.device("cpu")


def test_an_array_is_made_once_and_again_where_its_file_is_damaged(tmp_path: Path) -> None:
    made: list[int] = []
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)

    def decode() -> np.ndarray:
        made.append(1)
        return values

    for _ in range(2):
        array = decoded(tmp_path, ("a", 1), decode)
        assert np.array_equal(array, values) and array.dtype == np.uint8 and len(made) == 1
    (path,) = tmp_path.glob("*/*")
    decoded(tmp_path, ("a", 2), decode)
    assert len(made) == 2
    good = path.read_bytes()
    bad = [b"", good[:3], good[:-1], good + b"\0", bytes(len(good))]
    bad += [bytes(byte ^ (1 << 3) if i == place else byte for i, byte in enumerate(good)) for place in range(0, len(good), 11)]
    for content in bad:
        path.write_bytes(content)
        assert np.array_equal(decoded(tmp_path, ("a", 1), decode), values) and path.read_bytes() == good
    assert len(made) == 2 + len(bad)


def test_a_student_is_the_same_with_and_without(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgd_pipeline.training.dataset._MEMO_BYTES", 0)
    before = project.student("distilled").read_bytes()
    manifest = read_manifest(project.manifest, project.base)

    def distil(num_workers: int = 0, cache_images: bool = True) -> bytes:
        train_student(project, Machine(CPU, num_workers=num_workers, resume=False, cache_images=cache_images))
        return project.student("distilled").read_bytes()

    assert distil() == before
    # Only decoded ones are read now.
    for row in manifest.training:
        (project.base / manifest.root / row.image_path).unlink()
    assert distil(num_workers=2) == before
    with pytest.raises(DataError, match="no such file"):
        distil(cache_images=False)


def test_its_size_is_said_and_a_disk_too_small_is_refused(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(project.manifest, project.base)
    image_cache(project, manifest, unlabelled=True)
    assert f"at most {(6 * 4 + 18 * 3) * 48 * 72 / 1e6:,.0f} MB" in capsys.readouterr().out
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(DataError, match=r"decoded images need 0\.00 GB, 0\.00 GB are free; make room, or train without --cache-i"):
        image_cache(project, manifest, unlabelled=True)
