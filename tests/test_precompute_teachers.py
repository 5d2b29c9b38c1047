"""Stage one as a user meets it: nothing is computed twice, caches grow, and what is refused is named."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mgd_pipeline.caches.shards as shards
import mgd_stages.run.teacher_batches as stage
from conftest import TINY
from mgd_pipeline import errors
from mgd_pipeline.caches.format import plan_layout
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.networks.weights import read_metadata, read_state_dict, save_weights
from mgd_stages.cli import app
from mgd_stages.run.project import Project, open_project
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.prepare_data import prepare_data
from test_stages import CPU, distil, files_below


@pytest.fixture
def emptied(project: Project) -> Project:
    """The project before its teacher `wide` has run; the cache that it had is before.zarr."""
    shutil.rmtree(project.base / ".mgd")
    shutil.move(project.targets("wide"), project.base / "before.zarr")
    return project


def assert_the_same_targets(project: Project) -> None:
    """But for the last bits, which depend on the size of the batches."""
    after, before = open_cache(project.targets("wide")), open_cache(project.base / "before.zarr")
    assert after.index.keys == before.index.keys
    assert np.abs(after.read(after.index.rows).logits.astype(int) - before.read(before.index.rows).logits).max() <= 1


def watch_batches(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
    """Calls `before` with the number of images that the teacher is about to see."""
    real = stage.dense_targets

    def watched(teacher: Any, images: list[np.ndarray], *others: Any) -> Any:
        before(len(images))
        return real(teacher, images, *others)

    monkeypatch.setattr(stage, "dense_targets", watched)


def test_a_batch_that_fits_the_memory_is_found(emptied: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than three images are too many for this teacher; whoever asks for four is told, whoever asks for none gets two."""
    seen: list[int] = []

    def small(images: int) -> None:
        seen.append(images)
        if images > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    watch_batches(monkeypatch, small)
    with pytest.raises(errors.MemoryShortage, match="out of memory with --batch-size 4; lower it, such as --batch-size 2"):
        precompute_teachers(emptied, "wide", device=CPU, batch_size=4)
    assert seen == [4]
    precompute_teachers(emptied, "wide", device=CPU)
    assert seen[1:4] == [8, 4, 2] and set(seen[3:]) == {2} and sum(seen[3:]) == 24
    assert_the_same_targets(emptied)


def test_a_killed_precompute_recomputes_only_what_is_missing(emptied: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgd_stages.run.teacher_cache.plan_layout", partial(plan_layout, shard_bytes=8 * 9 * 16 * 24))
    seen: list[int] = []

    def killed_once(images: int) -> None:
        seen.append(images)
        if sum(seen) == 20:
            raise KeyboardInterrupt

    watch_batches(monkeypatch, killed_once)
    with pytest.raises(KeyboardInterrupt):
        precompute_teachers(emptied, "wide", device=CPU, batch_size=4)
    assert not emptied.targets("wide").exists() and sum(seen) == 20
    seen.clear()
    precompute_teachers(emptied, "wide", device=CPU, batch_size=4)
    assert sum(seen) == 24 - 16, "two shards of eight images were finished before"
    assert_the_same_targets(emptied)


@pytest.mark.parametrize("aside", [(), ("cpu",)])
def test_two_batches_are_in_memory_at_most(emptied: Project, monkeypatch: pytest.MonkeyPatch, aside: tuple[str, ...]) -> None:
    """One is computed while the next is decoded; with a GPU one is computed while the one before is written. The same cache."""
    batch, counts = 4, {"decoded": 0, "computed": 0, "written": 0}
    most = {"images": 0, "targets": 0}
    pixels, dense_targets, append = stage.Shown.pixels, stage.dense_targets, shards.ShardWriter.append

    def decoded(self: stage.Shown, *others: object) -> np.ndarray:
        image = pixels(self, *others)  # type: ignore[arg-type]
        counts["decoded"] += 1
        most["images"] = max(most["images"], counts["decoded"] - counts["computed"])
        return image

    def computed(teacher: object, images: list[np.ndarray], *others: object) -> object:
        made = dense_targets(teacher, images, *others)  # type: ignore[arg-type]
        counts["computed"] += len(images)
        most["targets"] = max(most["targets"], counts["computed"] - counts["written"])
        return made

    def written(self: object, *others: object) -> None:
        append(self, *others)  # type: ignore[arg-type]
        until = time.monotonic() + 10
        while aside and counts["computed"] < min(24, counts["written"] + batch + 1) and time.monotonic() < until:
            time.sleep(0.001)  # the next batch is computed meanwhile
        counts["written"] += 1

    monkeypatch.setattr(stage.Shown, "pixels", decoded)
    monkeypatch.setattr(stage, "dense_targets", computed)
    monkeypatch.setattr(shards.ShardWriter, "append", written)
    monkeypatch.setattr(stage, "_ASIDE", aside)
    precompute_teachers(emptied, "wide", device=CPU, batch_size=batch)
    assert counts == dict.fromkeys(counts, 24)
    assert batch < most["images"] <= 2 * batch + 1, "the one that is asked for next, besides"
    assert most["targets"] <= (2 * batch + 1 if aside else batch) and (most["targets"] > batch) == bool(aside)
    assert_the_same_targets(emptied)


def test_a_finished_cache_is_not_computed_twice(project: Project, batches_seen: list[int]) -> None:
    before = files_below(project.targets("wide"))
    precompute_teachers(project, "wide", device=CPU)
    assert not batches_seen and files_below(project.targets("wide")) == before
    shard = project.targets("wide") / "logits/c/0/0/0/0"
    shard.unlink()
    precompute_teachers(project, "wide", device=CPU)
    assert not batches_seen and files_below(project.targets("wide")) == before, "its other name is in the work folder"
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[:-9])  # under both names: it is made again
    precompute_teachers(project, "wide", device=CPU)
    assert sum(batches_seen) == 24 and files_below(project.targets("wide")) == before


def test_caches_of_something_else_are_refused_with_the_difference_named(project: Project) -> None:
    def changed(*overrides: str) -> Project:
        return open_project(project.base / "params.yaml", [*TINY, *overrides])

    for override, said in (
        ("teachers.wide.encoder=resnet18", "teacher.encoder"),
        ("targets.logits=float16", "encoding.logits"),
        ("teachers.wide.short_side=64", "preprocessing.short_side: the cache has None, the parameters say 64"),
    ):
        with pytest.raises(errors.ProvenanceMismatch, match=re.escape(said)):
            distil(changed(override))
    prepare_data(repartitioned := changed("data.partition=1/3"))
    with pytest.raises(errors.ProvenanceMismatch, match=r"another partition .*losses\.other_partition to true"):
        distil(repartitioned)
    distil(changed("data.partition=1/3", "losses.other_partition=true"))


SMALL = ["targets.logits=log-probability", "targets.region_embeddings=uint8", "targets.compression=zstd"]


def test_small_caches_are_built_measured_rechecked_and_learnt_from(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.base)
    plain = open_cache(project.targets("wide"))
    overrides = [*TINY, *SMALL, "losses.image_distance=log-probability"]
    small = open_project(project.base / "params.yaml", overrides)
    for name in ("wide", "deep"):
        precompute_teachers(small, name, device=CPU)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"24 images, at most .* of targets", said) and "same class in 100.00 % of the cells" in said
    cache = open_cache(small.targets("wide"))
    assert cache.provenance["encoding"].items() >= {"floor": 9.2, "levels": 64, "region_levels": 128, "compression": "zstd"}.items()
    assert cache.fingerprint != plain.fingerprint and cache.layout.region_encoding == "uint8"
    for name in ("wide", "deep"):
        info = json.loads(CliRunner().invoke(app, ["cache", "info", str(small.targets(name)), "--json"]).stdout)
        kept = info["encoding"]
        assert kept["kl"] < 2e-3 and kept["same_class"] == 1 and kept["cosine"] < 2e-3 and kept["size"] < 0.8
    asked = ["cache", "recheck", "--teacher", "wide", "--sample", "20%", *(part for one in overrides for part in ("--set", one))]
    again = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert again["same_class"] == 1 and again["errors"]["logits"]["largest"] <= again["largest_uint8_step"] * 1.01
    distil(small)
    with pytest.raises(errors.ProvenanceMismatch, match=r"encoding\.levels: the cache has 64, the parameters say 32"):
        distil(open_project(project.base / "params.yaml", [*overrides, "targets.levels=32"]))


def test_a_student_is_the_next_teacher_of_its_own_partition_only(project: Project) -> None:
    """As docs/teachers.md shows it; what the student was taught came from the labels of its partition, too."""
    network = project.params.student.network
    teacher = {"decoder": network.decoder, "encoder": network.encoder, "decoder_channels": network.decoder_channels}
    file = project.student("distilled").relative_to(project.base)
    second = {**teacher, "encoder_weights": "none", "weights": str(file)}
    overrides = [*TINY, f"teachers={{second: {json.dumps(second)}}}", "train_teachers=[]"]
    overrides += ["losses.pixel_teachers=[second]", "losses.region_teacher=second", "losses.image_teacher=second"]
    generation = open_project(project.base / "params.yaml", overrides)
    precompute_teachers(generation, "second", device=CPU, batch_size=8)
    distil(generation)
    other = open_project(project.base / "params.yaml", [*overrides, "data.partition=1/3"])
    prepare_data(other)
    with pytest.raises(errors.ProvenanceMismatch, match="another partition"):
        distil(other)


def test_new_images_are_appended_and_only_they_are_computed(
    project: Project, batches_seen: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless one of them is larger than all images before, which is said."""
    manifest = read_manifest(project.manifest, project.base)
    (project.base / "labelled.txt").write_text("\n".join(row.image_id for row in manifest.labelled))
    before = {name: data for name, data in files_below(project.targets("wide")).items() if "/c/" in name}
    grown = open_project(project.base / "params.yaml", [*TINY, "data.train=29", "data.partition={labelled: labelled.txt}"])
    prepare_data(grown)
    for name in ("wide", "deep"):
        shutil.rmtree(grown.targets(name))  # as DVC does before it runs the stage
        precompute_teachers(grown, name, device=CPU)
    assert batches_seen == [5, 5]
    assert before.items() <= files_below(grown.targets("wide")).items()
    assert open_cache(grown.targets("wide")).generation == 2
    distil(grown)
    assert read_metadata(grown.student("distilled"))["teachers"]["wide"][1] == 2

    wider = open_project(project.base / "params.yaml", [*TINY, "data.width=100"])
    prepare_data(wider)
    said = (
        "has room for images up to 64 pixels high and 96 wide, and an image is larger: the targets of all images are computed again"
    )
    for is_said in (False, True, False):
        assert (said in capsys.readouterr().out) == is_said
        precompute_teachers(wider, "wide", device=CPU)


def test_images_that_cannot_be_read_stop_or_are_recorded(emptied: Project) -> None:
    manifest = read_manifest(emptied.manifest, emptied.base)
    row = manifest.unlabelled[2]
    (emptied.base / manifest.root / row.image_path).write_bytes(b"overwritten")
    said = f"{row.image_id}.*has changed since .*restore the file.*; or leave it out .*--on-error skip"
    with pytest.raises(errors.DataError, match=said):
        precompute_teachers(emptied, "wide", device=CPU)
    precompute_teachers(emptied, "wide", device=CPU, on_error="skip")
    with pytest.raises(errors.CacheIncomplete, match=f"{row.image_id}.*it was skipped: .*has changed since"):
        distil(emptied)


def test_a_cache_that_does_not_fit_the_disk_is_not_begun(emptied: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10_000})())
    with pytest.raises(errors.CacheError, match=r"[kM]B are needed, 10.0 kB are free; free some"):
        precompute_teachers(emptied, "wide", device=CPU)
    assert not list((emptied.base / ".mgd").rglob("stage-*"))


@pytest.mark.parametrize(
    ("factor", "what"), [(float("inf"), "model.decoder.* holds NaN or infinity"), (1e30, "its scores of images/train/")]
)
def test_a_teacher_that_says_nan_stores_nothing(emptied: Project, factor: float, what: str) -> None:
    state = read_state_dict(emptied.teacher("wide"))
    for key in [key for key in state if key.startswith(("decoder", "segmentation_head")) and key.endswith("weight")]:
        state[key].fill_(factor)
    save_weights(emptied.teacher("wide"), state, read_metadata(emptied.teacher("wide")))
    with pytest.raises(errors.NonFiniteError, match=f"teacher wide: .*wide.safetensors: {what}"):
        precompute_teachers(emptied, "wide", device=CPU, batch_size=4)
    assert not emptied.targets("wide").exists()


def test_missing_and_foreign_teachers_are_named(project: Project) -> None:
    project.teacher("deep").rename(project.teacher("deep").with_suffix(".away"))
    with pytest.raises(errors.WeightsError, match=r"train-teacher --teacher deep"):
        precompute_teachers(project, "deep", device=CPU, batch_size=4)
    shutil.copy(project.teacher("wide"), project.teacher("deep"))
    with pytest.raises(errors.WeightsError, match=r"does not fit .*test_efficientnet"):
        precompute_teachers(project, "deep", device=CPU, batch_size=4)
