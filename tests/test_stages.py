"""The stages as a user meets them: the whole way, killed and resumed runs, missing teachers, refused stores."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from conftest import TINY
from mgd_pipeline import load_student
from mgd_pipeline.cache import open_cache
from mgd_pipeline.cache_format import plan_layout
from mgd_pipeline.errors import (
    CacheError,
    CacheIncomplete,
    DataError,
    MemoryShortage,
    NonFiniteError,
    ParamsError,
    ProvenanceMismatch,
    StaleTarget,
    WeightsError,
)
from mgd_pipeline.images import read_image
from mgd_pipeline.manifest import build_manifest, read_manifest, write_manifest
from mgd_pipeline.metrics import confusion_matrix, mean_iou
from mgd_pipeline.overlays import blend
from mgd_pipeline.weights import read_metadata, read_state_dict, save_weights
from mgd_stages.demo import demo
from mgd_stages.evaluate import evaluate
from mgd_stages.precompute_teachers import precompute_teachers
from mgd_stages.prepare_data import prepare_data
from mgd_stages.project import Project, open_project
from mgd_stages.train_student import train_student
from mgd_stages.train_teacher import train_teacher

CPU = torch.device("cpu")


def distil(project: Project, **changes: object) -> None:
    train_student(project, **{"supervised_only": False, "device": CPU, "num_workers": 0, "resume": True, **changes})  # type: ignore[arg-type]


def weights(project: Project, name: str = "distilled") -> bytes:
    return project.student(name).read_bytes()


def metrics_of(project: Project) -> dict[str, bytes]:
    """What train-student wrote of its losses; not speed.json, which is of the machine."""
    return {name: data for name, data in files_below(project.results / "train-student-distilled").items() if name != "speed.json"}


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_whole_way_makes_what_it_promises(finished_project: Path) -> None:
    data = finished_project / "data"
    made = {str(path.relative_to(data)) for path in data.rglob("*") if path.is_file()}
    for name in (
        "manifest/images.parquet",
        "manifest/partition.parquet",
        "teachers/wide.safetensors",
        "teachers/deep.safetensors",
        "targets/wide.zarr/zarr.json",
        "targets/deep.zarr/commit.json",
        "students/distilled/student.safetensors",
        "students/supervised/student.safetensors",
        "results/evaluation/metrics.json",
        "results/evaluation/overlays/worst_1.png",
        "results/evaluation/overlays/median_1.png",
        "results/evaluation/overlays/best_1.png",
        "results/train-student-distilled/plots/loss.tsv",
        "results/train-student-distilled/metrics.json",
    ):
        assert name in made
    assert {path.name for path in data.iterdir()} == {"raw", "manifest", "teachers", "targets", "students", "results"}
    assert not list((finished_project / ".mgd/work").rglob("*.pt")), "finished stages leave no checkpoint behind"
    metrics = json.loads((data / "results/evaluation/metrics.json").read_text())
    assert set(metrics) == {"split", "distilled", "supervised"} and 0 < metrics["distilled"]["miou"] < 1
    log = (data / "results/train-student-distilled/plots/loss.tsv").read_text().splitlines()
    assert log[0] == "step\tloss" and log[-1].startswith("4\t")


def test_a_teacher_sees_only_training_images(project: Project) -> None:
    manifest = read_manifest(project.manifest, project.base)
    held_out = {row.image_id for split in ("val", "test") for row in manifest.split(split)}
    group = zarr.open_group(project.targets("wide"), mode="r")
    ids = [key.image_id for key in open_cache(project.targets("wide")).index.keys]
    assert len(ids) == group["logits"].shape[0] == 24  # type: ignore[union-attr]
    assert set(ids) == {row.image_id for row in manifest.training} and not held_out & set(ids)


def test_student_trains_with_the_teachers_files_deleted(project: Project) -> None:
    """Neither weights nor code of the teachers: the module that runs them cannot even be imported."""
    before = weights(project)
    shutil.rmtree(project.base / "data/teachers")
    project.student("distilled").unlink()
    script = (
        "import sys; sys.modules['mgd_pipeline.teachers'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from mgd_stages.project import open_project\n"
        "from mgd_stages.train_student import train_student\n"
        "project = open_project(Path(sys.argv[1]) / 'params.yaml', sys.argv[2:])\n"
        "train_student(project, supervised_only=False, device=torch.device('cpu'), num_workers=0, resume=True)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(project.base), *TINY], check=True, capture_output=True)
    assert weights(project) == before, "and the result is the same to the bit"


def test_training_does_not_change_the_stores(project: Project) -> None:
    before = {name: files_below(project.targets(name)) for name in ("wide", "deep")}
    distil(project)
    assert before == {name: files_below(project.targets(name)) for name in ("wide", "deep")}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(project: Project, workers: int) -> None:
    before = weights(project)
    distil(project, num_workers=workers)
    assert weights(project) == before


def test_supervised_only_student_never_opens_a_store_or_an_unlabelled_image(project: Project) -> None:
    before = weights(project, "supervised")
    manifest = read_manifest(project.manifest, project.base)
    shutil.rmtree(project.base / "data/targets")
    for row in manifest.unlabelled:
        (project.base / manifest.root / row.image_path).unlink()
    distil(project, supervised_only=True)
    assert weights(project, "supervised") == before


def test_a_teacher_without_cps_needs_no_unlabelled_image(project: Project) -> None:
    project.teacher("wide").unlink()
    manifest = read_manifest(project.manifest, project.base)
    for row in manifest.unlabelled:
        (project.base / manifest.root / row.image_path).unlink()
    plain = open_project(project.base / "params.yaml", [*TINY, "teacher_training.cps=0"])
    train_teacher(plain, "wide", device=CPU, num_workers=0, resume=True)
    assert read_metadata(plain.teacher("wide"))["trained_on"] == manifest.partition_fingerprint
    cross = (plain.results / "train-teacher-wide/plots/cross.tsv").read_text().splitlines()
    assert float(cross[-1].split("\t")[1]) == 0
    with pytest.raises(DataError, match="no such file"):
        train_teacher(project, "wide", device=CPU, num_workers=0, resume=True)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["losses.images=[labelled]"], {"pixel_labelled_wide", "pixel_labelled_deep"}),
        (["losses.images=[unlabelled]"], {"pixel_unlabelled_wide", "pixel_unlabelled_deep", "region", "image"}),
        (["losses.pixel_teachers=[deep]", "losses.region=0"], {"pixel_labelled_deep", "pixel_unlabelled_deep", "image"}),
        (["losses.pixel=0", "losses.image=0"], {"region"}),
        (["losses.pixel_ensemble=true"], {"pixel_labelled_ensemble", "pixel_unlabelled_ensemble", "region", "image"}),
    ],
)
def test_only_the_terms_asked_for_are_computed(project: Project, overrides: list[str], expected: set[str]) -> None:
    changed = open_project(project.base / "params.yaml", [*TINY, *overrides])
    for teacher in set(changed.params.teachers) - set(changed.params.losses.used_teachers):
        shutil.rmtree(changed.targets(teacher))
    shutil.rmtree(changed.results / "train-student-distilled")
    distil(changed)
    written = {path.stem for path in (changed.results / "train-student-distilled/plots").iterdir()}
    assert written == {"loss", "supervised", *expected}


def test_interrupted_students_go_on_where_they_were(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    import mgd_stages.train_student as stage

    before = weights(project)
    log_before = metrics_of(project)
    monkeypatch.setattr("mgd_stages.training_loop._STEPS_PER_LOOK", 1)
    monkeypatch.setattr("mgd_stages.training_loop._CHECKPOINT_SHARE", float("inf"))
    distil(project)
    looked_at = metrics_of(project)  # a line for every step, not for the last alone
    assert weights(project) == before and looked_at != log_before
    steps = []
    real = stage.total_loss

    def stop_at_third(*args: object) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "total_loss", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        distil(project)
    distil(project)
    assert len(steps) == 3 + 2, "two steps were done, the third interrupted, and only two were left"
    assert weights(project) == before and metrics_of(project) == looked_at
    steps.clear()
    steps.extend([1] * 10)  # another learning rate is another run: nothing is resumed
    changed = project.params.model_copy(update={"student": project.params.student.model_copy(update={"learning_rate": 0.02})})
    distil(replace(project, params=changed))
    assert len(steps) == 10 + 4 and weights(project) != before


def test_killed_stages_continue_and_outputs_hold_nothing_or_the_finished_thing(project: Project) -> None:
    """SIGKILL at several moments of teacher training, precomputing and student training; then the same commands again."""
    reference = {name: project.teacher(name).read_bytes() for name in ("wide",)}
    student = weights(project)
    store = files_below(project.targets("wide"))
    arguments = [part for override in TINY for part in ("--set", override)]
    command = [sys.executable, "-m", "mgd_stages.cli"]
    outputs = {
        "train-teacher": (["--teacher", "wide"], project.teacher("wide")),
        "precompute-teachers": (["--teacher", "wide"], project.targets("wide")),
        "train-student": ([], project.student("distilled")),
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    rng = np.random.default_rng(0)
    for stage, (options, output) in outputs.items():
        line = [*command, stage, *options, "--config", str(project.base / "params.yaml"), *arguments]
        began = time.monotonic()
        subprocess.run(line, check=True, capture_output=True, env=environment)
        duration = time.monotonic() - began
        for moment in rng.uniform(0.5, 1.0, 2) * duration:
            shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
            shutil.rmtree(project.base / ".mgd", ignore_errors=True)  # where shards of a finished store are kept
            process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            process.wait()
            if output.is_dir():
                assert (output / "commit.json").is_file(), "a store at the output path is a finished one"
        subprocess.run(line, check=True, capture_output=True, env=environment)
    assert project.teacher("wide").read_bytes() == reference["wide"]
    assert files_below(project.targets("wide")) == store
    assert weights(project) == student


def test_a_batch_that_fits_the_memory_is_found(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than three images are too many for this teacher; whoever asks for four is told, whoever asks for none gets two."""
    import mgd_stages.precompute_teachers as stage

    before = open_cache(project.targets("wide"))
    seen: list[int] = []
    real = stage.dense_targets

    def small(teacher: object, images: list[np.ndarray], *others: object) -> object:
        seen.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(teacher, images, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "dense_targets", small)
    shutil.rmtree(project.base / ".mgd", ignore_errors=True)
    shutil.move(project.targets("wide"), project.base / "before.zarr")
    with pytest.raises(MemoryShortage, match="out of memory with --batch-size 4; lower it, such as --batch-size 2"):
        precompute_teachers(project, "wide", device=CPU, batch_size=4)
    assert seen == [4]
    precompute_teachers(project, "wide", device=CPU)
    assert seen[1:4] == [8, 4, 2] and set(seen[3:]) == {2} and sum(seen[3:]) == 24
    after, before = open_cache(project.targets("wide")), open_cache(project.base / "before.zarr")
    assert np.abs(after.read(after.index.rows).logits.astype(int) - before.read(before.index.rows).logits).max() <= 1


def test_a_finished_store_is_not_computed_twice(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    import mgd_stages.precompute_teachers as stage

    store = files_below(project.targets("wide"))
    seen: list[int] = []
    real = stage.dense_targets

    def counting(network: object, images: list[np.ndarray], *others: object) -> object:
        seen.append(len(images))
        return real(network, images, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "dense_targets", counting)
    precompute_teachers(project, "wide", device=CPU)
    assert not seen and files_below(project.targets("wide")) == store
    shard = project.targets("wide") / "logits/c/0/0/0/0"
    shard.unlink()
    precompute_teachers(project, "wide", device=CPU)
    assert not seen and files_below(project.targets("wide")) == store, "its other name is in the work folder"
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[:-9])  # under both names: it is made again
    precompute_teachers(project, "wide", device=CPU)
    assert sum(seen) == 24 and files_below(project.targets("wide")) == store


def test_a_killed_precompute_recomputes_only_what_is_missing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    import mgd_stages.precompute_teachers as stage

    monkeypatch.setattr(stage, "plan_layout", partial(plan_layout, shard_bytes=8 * 9 * 16 * 24))
    seen: list[int] = []
    real = stage.dense_targets

    def counting(network: object, images: list[np.ndarray], *others: object) -> object:
        seen.append(len(images))
        if sum(seen) == 20:
            raise KeyboardInterrupt
        return real(network, images, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "dense_targets", counting)
    shutil.rmtree(project.targets("wide"))
    shutil.rmtree(project.base / ".mgd")
    with pytest.raises(KeyboardInterrupt):
        precompute_teachers(project, "wide", device=CPU, batch_size=4)
    assert not project.targets("wide").exists()
    done = sum(seen)
    seen.clear()
    precompute_teachers(project, "wide", device=CPU, batch_size=4)
    assert done == 20 and sum(seen) == 24 - 16, "two shards of eight images were finished before"
    assert zarr.open_group(project.targets("wide"), mode="r")["logits"].shape[0] == 24  # type: ignore[union-attr]


def test_stores_of_something_else_are_refused_with_the_difference_named(project: Project) -> None:
    params = project.params
    foreign = params.teachers["wide"].model_copy(update={"encoder": "resnet18"})
    cases = {
        "teacher.encoder": {"teachers": {**params.teachers, "wide": foreign}},
        "encoding.logits": {"targets": params.targets.model_copy(update={"logits": "float16"})},
    }
    for field, update in cases.items():
        with pytest.raises(ProvenanceMismatch, match=re.escape(field)):
            distil(replace(project, params=params.model_copy(update=update)))
    data = params.data.model_copy(update={"partition": "1/3"})
    repartitioned = replace(project, params=params.model_copy(update={"data": data}))
    prepare_data(repartitioned)
    with pytest.raises(ProvenanceMismatch, match=r"another partition .*losses\.other_partition to true"):
        distil(repartitioned)
    losses = params.losses.model_copy(update={"other_partition": True})
    distil(replace(repartitioned, params=repartitioned.params.model_copy(update={"losses": losses})))


def test_new_images_are_appended_and_only_they_are_computed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    import mgd_stages.precompute_teachers as stage

    manifest = read_manifest(project.manifest, project.base)
    (project.base / "labelled.txt").write_text("\n".join(row.image_id for row in manifest.labelled))
    before = {name: data for name, data in files_below(project.targets("wide")).items() if "/c/" in name}
    grown = open_project(project.base / "params.yaml", [*TINY, "data.train=29", "data.partition={labelled: labelled.txt}"])
    prepare_data(grown)
    seen: list[int] = []
    real = stage.dense_targets

    def counting(network: object, images: list[np.ndarray], *others: object) -> object:
        seen.append(len(images))
        return real(network, images, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "dense_targets", counting)
    for name in ("wide", "deep"):
        shutil.rmtree(grown.targets(name))  # as DVC does before it runs the stage
        precompute_teachers(grown, name, device=CPU)
    assert seen == [5, 5]
    assert before.items() <= files_below(grown.targets("wide")).items()
    assert open_cache(grown.targets("wide")).generation == 2
    distil(grown)
    assert read_metadata(grown.student("distilled"))["teachers"]["wide"][1] == 2


def test_images_that_cannot_be_read_stop_or_are_recorded(project: Project) -> None:
    manifest = read_manifest(project.manifest, project.base)
    row = manifest.unlabelled[2]
    (project.base / manifest.root / row.image_path).write_bytes(b"overwritten")
    for folder in (project.base / ".mgd", project.targets("wide")):
        shutil.rmtree(folder)
    with pytest.raises(DataError, match=f"{row.image_id}.*has changed since .*restore the file"):
        precompute_teachers(project, "wide", device=CPU)
    precompute_teachers(project, "wide", device=CPU, on_error="skip")
    with pytest.raises(CacheIncomplete, match=f"{row.image_id}.*it was skipped: .*has changed since"):
        distil(project)


def test_a_store_that_does_not_fit_the_disk_is_not_begun(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (project.base / ".mgd", project.targets("wide")):
        shutil.rmtree(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10_000})())
    with pytest.raises(CacheError, match=r"GB are needed, 0.00 GB are free; free some"):
        precompute_teachers(project, "wide", device=CPU)
    assert not list((project.base / ".mgd").rglob("stage-*"))


def test_a_file_that_changed_under_the_student_is_named(project: Project) -> None:
    """Its stored targets are not those of what the student would see."""
    manifest = read_manifest(project.manifest, project.base)
    for row in manifest.training:
        path = project.base / manifest.root / row.image_path
        Image.fromarray(read_image(path) ^ 1).save(path)
    with pytest.raises(DataError, match="has changed since"):
        distil(project)


def test_unfinished_and_stale_stores_are_refused(project: Project) -> None:
    (project.targets("deep") / "commit.json").unlink()
    with pytest.raises(CacheIncomplete, match="is not finished"):
        distil(project)
    shutil.rmtree(project.targets("deep"))
    with pytest.raises(CacheIncomplete, match="does not exist"):
        distil(project)


def test_a_changed_pixel_makes_its_row_stale_by_name(project: Project) -> None:
    manifest = read_manifest(project.manifest, project.base)
    row = manifest.unlabelled[3]
    path = project.base / manifest.root / row.image_path
    image = np.asarray(Image.open(path)).copy()
    image[0, 0] ^= 1
    Image.fromarray(image).save(path)
    write_manifest(build_manifest(project.params.data, project.base), project.manifest)
    with pytest.raises(StaleTarget, match=row.image_id):
        distil(project)


def test_an_image_added_after_the_teachers_ran_is_named(project: Project) -> None:
    """The store lacks it: an error, never a row of zeros."""
    manifest = read_manifest(project.manifest, project.base)
    (project.base / "labelled.txt").write_text("\n".join(row.image_id for row in manifest.labelled))
    overrides = [*TINY, "data.train=25", "data.partition={labelled: labelled.txt}"]
    grown = open_project(project.base / "params.yaml", overrides)
    prepare_data(grown)
    assert len(read_manifest(project.manifest, project.base).unlabelled) == len(manifest.unlabelled) + 1
    with pytest.raises(CacheIncomplete, match="train_00024"):
        distil(grown)


def test_a_teacher_that_says_nan_stores_nothing(project: Project) -> None:
    state = read_state_dict(project.teacher("wide"))
    state["segmentation_head.0.bias"][0] = float("nan")
    save_weights(project.teacher("wide"), state, read_metadata(project.teacher("wide")))
    shutil.rmtree(project.targets("wide"))
    with pytest.raises(NonFiniteError, match=r"teacher wide: image train_\d+: logits"):
        precompute_teachers(project, "wide", device=CPU, batch_size=4)
    assert not project.targets("wide").exists()


def test_missing_and_foreign_teachers_are_named(project: Project) -> None:
    project.teacher("deep").rename(project.teacher("deep").with_suffix(".away"))
    with pytest.raises(WeightsError, match=r"train-teacher --teacher deep"):
        precompute_teachers(project, "deep", device=CPU, batch_size=4)
    shutil.copy(project.teacher("wide"), project.teacher("deep"))
    with pytest.raises(WeightsError, match=r"does not fit .*test_efficientnet"):
        precompute_teachers(project, "deep", device=CPU, batch_size=4)


def test_a_groups_own_teacher_needs_no_training(project: Project) -> None:
    """`train_teachers: []` and a checkpoint of one's own, without our metadata."""
    from safetensors.torch import load_file, save_file

    own = project.base / "own/wide.safetensors"
    own.parent.mkdir()
    save_file(load_file(project.teacher("wide")), own)
    overrides = [*TINY, "train_teachers=[]", "teachers.wide.weights=own/wide.safetensors"]
    bare = open_project(project.base / "params.yaml", overrides)
    project.teacher("wide").unlink()
    precompute_teachers(bare, "wide", device=CPU, batch_size=4)
    distil(bare)
    with pytest.raises(ValueError, match="not in train_teachers"):
        train_teacher(bare, "wide", device=CPU, num_workers=0, resume=True)


def test_a_diverging_student_names_the_term_and_the_images(project: Project) -> None:
    wild = project.params.student.model_copy(update={"learning_rate": 1e30, "ema": 0.0})
    with pytest.raises(NonFiniteError, match=r"not finite at step \d+: .*images train_"):
        distil(replace(project, params=project.params.model_copy(update={"student": wild})))


def test_evaluation_equals_the_students_own_predictions(project: Project) -> None:
    """The table's mIoU is what a user gets from load_student(...).predict on the same images."""
    evaluate(project, device=CPU)
    manifest = read_manifest(project.manifest, project.base)
    student = load_student(project.student("distilled"))
    total = np.zeros((9, 9), np.int64)
    for row in manifest.split("test"):
        assert row.mask_path is not None
        root = project.base / manifest.root
        truth = np.asarray(Image.open(root / row.mask_path))
        total += confusion_matrix(truth, student.predict(read_image(root / row.image_path)), 9)
    metrics = json.loads((project.results / "evaluation/metrics.json").read_text())
    assert metrics["distilled"]["miou"] == pytest.approx(mean_iou(total), abs=1e-6)


def test_evaluate_without_students_says_what_to_run(project: Project) -> None:
    shutil.rmtree(project.base / "data/students")
    with pytest.raises(DataError, match="train-student"):
        evaluate(project, device=CPU)


def test_demo_checks_before_it_writes_and_keeps_what_is_finished(finished_project: Path, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"student\.step"):
        demo(tmp_path / "new", full=False, seed=0, overrides=["student.step=3"], device=CPU)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ParamsError, match="other parameters"):
        demo(finished_project, full=True, seed=1, overrides=TINY, device=CPU)
    before = (finished_project / "data/students/distilled/student.safetensors").stat().st_mtime_ns
    demo(finished_project, full=True, seed=0, overrides=TINY, device=CPU)
    assert (finished_project / "data/students/distilled/student.safetensors").stat().st_mtime_ns == before


def test_overlays_show_image_truth_and_prediction(finished_project: Path) -> None:
    picture = Image.open(finished_project / "data/results/evaluation/overlays/best_1.png").convert("RGB")
    assert picture.width > 800 and len(picture.getcolors(maxcolors=2**24) or []) > 50


def test_a_black_class_is_told_from_void() -> None:
    """CamVid's sky is class 0, black in VOC's palette: void must look otherwise."""
    image, mask = np.full((1, 3, 3), 200, np.uint8), np.array([[0, 1, 255]], np.uint8)
    sky, other, void = blend(image, mask, [(0, 0, 0), (128, 0, 0)], opacity=0.5)[0].tolist()
    assert sky == [100, 100, 100] and other == [164, 100, 100] and min(void) > 190
