"""`mgd-pipeline bench`: every arm runs and its numbers add up. Nothing is said about how large a time is."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.errors import CacheError, DataError
from mgd_pipeline.training.batches import view_targets
from mgd_stages.run.project import Project
from mgd_stages.tools.bench import HELD_STEPS, HeldTrainingSet, Steps, bench, saving_lines, training_set


def test_a_project_is_measured(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    def measured() -> tuple[dict, str]:
        bench(project, device=torch.device("cpu"), num_workers=0, rounds=1, steps=1)
        return json.loads((project.results / "bench.json").read_text()), capsys.readouterr().out

    times, said = measured()
    assert set(times["reading"]) == {"wide", "deep"}
    assert all(value > 0 for table in (*times["reading"].values(), times["steps"]) for value in table.values())
    assert "an epoch of 24 images" in said and "live teachers" in said and "zarr-python" in said

    project.teacher("wide").unlink()
    times, said = measured()
    assert times["steps"]["live"] is None and times["steps"]["build"] is None and times["steps"]["cached"] > 0
    assert "live" not in said, "without teachers the live arm is left out"


def test_what_is_held_in_memory_is_read_no_more(project: Project) -> None:
    """The same batches as from the teacher caches; after the first round neither caches nor images are needed."""
    dataset = training_set(project, read_manifest(project.manifest, project.base))
    held = HeldTrainingSet(**{field.name: getattr(dataset, field.name) for field in dataclasses.fields(dataset)})
    first, expected = ([one[step] for step in range(HELD_STEPS)] for one in (held, dataset))
    for file in (*project.base.rglob("*.zarr/*/c/**/0"), *project.base.rglob("*.png")):
        if file.is_file():
            file.write_bytes(b"")
    for step in range(HELD_STEPS):
        for batch in (first[step], held[HELD_STEPS + step]):
            for source, wanted in zip(batch.sources, expected[step].sources, strict=True):
                assert torch.equal(source.images, wanted.images)
                for name, targets in wanted.targets.items():
                    pairs = zip(view_targets(source, name), view_targets(wanted, name), strict=True)
                    assert all(torch.equal(one, other) for one, other in pairs)
                    assert torch.equal(source.targets[name].logits, targets.logits)
    with pytest.raises((CacheError, DataError)):
        training_set(project, read_manifest(project.manifest, project.base))[0]


def test_savings_by_hand() -> None:
    """100 images in steps of 10: an epoch saves 10 * (3 - 1) s, building takes 100 * 0.4 s, two epochs' worth."""
    lines = saving_lines(Steps(labels=0.5, prepared=0.9, memory=0.95, cached=1.0, live=3.0, build=0.4), 100, 10)
    assert lines[0] == "an epoch of 100 images: 10.0 s cached, 30.0 s live; 3.00 x as fast, at most 3.33 x"
    assert lines[1] == "the teacher caches cost 40.0 s once and have paid for themselves after 2.00 epochs"
    assert lines[2] == "1 student of 50 epochs: 2.78 x"
    assert saving_lines(Steps(0.5, 0.9, 0.95, 3.1, 3.0, 0.4), 100, 10)[-1] == "live teachers are no slower here"
    assert saving_lines(Steps(0.5, 0.9, 0.95, 3.1, None, None), 100, 10) == []
