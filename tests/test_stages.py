"""The stages as a user meets them: the whole way, killed and resumed runs, missing teachers, refused caches."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from conftest import TINY, training_set
from mgd_pipeline import load_student
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.data.build import build_manifest
from mgd_pipeline.data.images import read_image, read_raw_mask
from mgd_pipeline.data.manifest import read_manifest, write_manifest
from mgd_pipeline.errors import (
    CacheIncomplete,
    DataError,
    ParamsError,
    StaleTarget,
)
from mgd_pipeline.metrics import confusion_matrix, mean_iou
from mgd_pipeline.networks.weights import read_metadata, save_weights
from mgd_pipeline.params import STUDENTS
from mgd_pipeline.pictures.overlays import blend
from mgd_stages.cli import app
from mgd_stages.demo import demo
from mgd_stages.reports.page import report
from mgd_stages.run.machine import Machine
from mgd_stages.run.pictures import read_masks
from mgd_stages.run.project import Project, open_project
from mgd_stages.run.verdicts import LABELS
from mgd_stages.stages.compare_teachers import compare_teachers
from mgd_stages.stages.evaluate import evaluate, show_table
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.prepare_data import prepare_data
from mgd_stages.stages.train_student import adjust_logits, train_student
from mgd_stages.stages.train_teacher import train_teacher

CPU = torch.device("cpu")


def distil(project: Project, *, supervised_only: bool = False, **changes: object) -> None:
    """`changes` are of the machine."""
    train_student(project, Machine(CPU, **changes), supervised_only=supervised_only)  # type: ignore[arg-type]


def weights(project: Project, name: str = "distilled") -> bytes:
    return project.student(name).read_bytes()


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_whole_way_where_every_training_image_is_labelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*TINY, "data.partition=1/1"]
    demo(tmp_path / "all", full=True, seed=0, overrides=overrides, device=CPU)
    said = " ".join(capsys.readouterr().out.split())
    assert "all 24 training images are labelled: they stand in as unlabelled images, too" in said
    assert "24 train images (24 labelled, 0 unlabelled), 2 val, 5 test" in said
    project = open_project(tmp_path / "all/params.yaml")
    for name in ("cross", "supervised"):  # CPS trains, too
        rows = (project.results / f"train-teacher-wide/plots/{name}.tsv").read_text().split()[2:]
        assert all(float(value) > 0 for value in rows[1::2])
    terms = {path.stem for path in (project.results / "train-student-distilled/plots").glob("*.tsv")}
    assert {"pixel_labelled_wide", "pixel_unlabelled_wide", "region", "image"} <= terms
    assert {path.name for path in project.results.iterdir()} >= {"evaluation", "report.html", "compare-teachers"}
    only = open_project(tmp_path / "all/params.yaml", ["losses.images=[unlabelled]"])
    for stage in (prepare_data, distil):
        with pytest.raises(ParamsError, match=r"losses\.images: is \[unlabelled\], but all 24 training images are labelled; write"):
            stage(only)


def test_an_image_that_is_labelled_and_stands_in_keeps_its_mask(project: Project) -> None:
    """The images that were decoded are kept; the stream of unlabelled ones is often the first to decode one."""
    prepare_data(replaced := open_project(project.base / "params.yaml", [*TINY, "data.partition=1/1", "student.steps=12"]))
    dataset, first = training_set(replaced), training_set(replaced)
    for step in range(12):
        batch = dataset[step]
        assert batch.unlabelled is not None and batch.unlabelled.labels is None
        assert batch.labelled.labels is not None and (batch.labelled.labels != 255).flatten(1).any(1).all()
        again = training_set(replaced)[step].labelled.labels
        assert again is not None and torch.equal(batch.labelled.labels, again)
    assert {row.image_id for row in first[0].sources[1].rows} <= {row.image_id for row in dataset.manifest.labelled}


def test_whole_way_makes_what_it_promises(finished_project: Path) -> None:
    data = finished_project / "data"
    for name in (
        *("manifest/images.parquet", "manifest/partition.parquet", "teachers/wide.safetensors", "teachers/deep.safetensors"),
        *("targets/wide.zarr/zarr.json", "targets/deep.zarr/commit.json"),
        *("students/distilled/student.safetensors", "students/supervised/student.safetensors"),
        *(f"results/evaluation/{name}" for name in ("metrics.json", *(f"overlays/{x}_1.png" for x in ("worst", "median", "best")))),
        *("results/train-student-distilled/plots/loss.tsv", "results/train-student-distilled/metrics.json"),
    ):
        assert (data / name).is_file(), name
    assert {path.name for path in data.iterdir()} == {"raw", "manifest", "teachers", "targets", "students", "results"}
    assert not list((finished_project / ".mgd/work").rglob("*.pt")), "finished stages leave no checkpoint behind"
    metrics = json.loads((data / "results/evaluation/metrics.json").read_text())
    assert set(metrics) == {"split", "distilled", "supervised"} and 0 < metrics["distilled"]["miou"] < 1
    log = (data / "results/train-student-distilled/plots/loss.tsv").read_text().splitlines()
    assert log[0] == "step\tloss" and log[-1].startswith("4\t")
    stored = {key.image_id for key in open_cache(data / "targets/wide.zarr").index.keys}
    assert stored == {row.image_id for row in read_manifest(data / "manifest", finished_project).training}


def test_student_trains_with_the_teachers_files_deleted(project: Project) -> None:
    """Neither weights nor code of the teachers: the module that runs them cannot even be imported."""
    before = weights(project)
    shutil.rmtree(project.base / "data/teachers")
    project.student("distilled").unlink()
    script = (
        "import sys; sys.modules['mgd_pipeline.teachers.teacher'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from mgd_stages.run.machine import Machine\n"
        "from mgd_stages.run.project import open_project\n"
        "from mgd_stages.stages.train_student import train_student\n"
        "project = open_project(Path(sys.argv[1]) / 'params.yaml', sys.argv[2:])\n"
        "train_student(project, Machine(torch.device('cpu')))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(project.base), *TINY], check=True, capture_output=True)
    assert weights(project) == before, "and the result is the same to the bit"


def test_workers_change_nothing(project: Project) -> None:
    """Neither the student nor a cache that it reads."""
    before = weights(project), files_below(project.base / "data/targets")
    distil(project, num_workers=2)
    assert (weights(project), files_below(project.base / "data/targets")) == before


def test_supervised_only_student_never_opens_a_cache_or_an_unlabelled_image(project: Project) -> None:
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
    train_teacher(plain, "wide", Machine(CPU))
    assert read_metadata(plain.teacher("wide"))["trained_on"] == manifest.partition_fingerprint
    cross = (plain.results / "train-teacher-wide/plots/cross.tsv").read_text().splitlines()
    assert float(cross[-1].split("\t")[1]) == 0
    with pytest.raises(DataError, match="no such file"):
        train_teacher(project, "wide", Machine(CPU))


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


@pytest.mark.parametrize("supervised_only", [True, False])
def test_logit_adjustment_changes_the_last_bias_by_the_labelled_shares_and_nothing_else(
    project: Project, supervised_only: bool
) -> None:
    before = load_student(project.student("supervised" if supervised_only else "distilled")).network
    adjusted = open_project(project.base / "params.yaml", [*TINY, "student.logit_adjustment=0.5"])
    distil(adjusted, supervised_only=supervised_only)
    after = load_student(adjusted.student("supervised" if supervised_only else "distilled")).network

    manifest = read_manifest(project.manifest, project.base)
    masks = [np.asarray(Image.open(project.base / manifest.root / row.mask_path)) for row in manifest.labelled if row.mask_path]
    shares = np.array([np.mean([mask == k for mask in masks]) for k in range(len(manifest.classes))])
    assert len(masks) > 1 and shares.min() > 0 and shares.sum() == pytest.approx(1)
    name = "model.segmentation_head.0.bias"
    change = after.state_dict()[name].numpy() - before.state_dict()[name].numpy()
    np.testing.assert_allclose(change, -0.5 * np.log(shares), atol=1e-5)
    differ = [key for key, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[key])]
    assert differ == [name]
    adjust_logits(after, np.array([30, 0, 10, *[0] * (len(shares) - 3)]), 2.0)
    again = after.state_dict()[name].numpy() - before.state_dict()[name].numpy() - change
    expected = [-2 * np.log(0.75), 0, -2 * np.log(0.25), *[0] * (len(shares) - 3)]
    np.testing.assert_allclose(again, expected, atol=1e-5, err_msg="the share of a class without pixels is not known")


def run_command(arguments: list[str]) -> None:
    """`mgd-pipeline` in this process."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        app(arguments)


def test_killed_stages_continue_and_outputs_hold_nothing_or_the_finished_thing(project: Project) -> None:
    """SIGKILL at several moments of teacher training, precomputing and student training; then the same commands again."""
    outputs = {
        "train-teacher": (["--teacher", "wide"], project.teacher("wide")),
        "precompute-teachers": (["--teacher", "wide"], project.targets("wide")),
        "train-student": ([], project.student("distilled")),
    }

    def contents() -> list[object]:
        return [files_below(output) if output.is_dir() else output.read_bytes() for _, output in outputs.values()]

    reference = contents()
    # Forked from a server that has imported everything: a kill hits the stage's work, not the import of torch.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([f"mgd_stages.{stage.replace('-', '_')}" for stage in outputs])

    def begin(stage: str) -> BaseProcess:
        overrides = [part for override in TINY for part in ("--set", override)]
        line = [stage, *outputs[stage][0], "--config", str(project.base / "params.yaml"), *overrides]
        process = processes.Process(target=run_command, args=(line,))
        process.start()
        return process

    def finish(stage: str) -> float:
        began, process = time.monotonic(), begin(stage)
        process.join()
        assert process.exitcode == 0
        return time.monotonic() - began

    def remove(output: Path) -> None:
        shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
        shutil.rmtree(project.base / ".mgd", ignore_errors=True)  # where shards of a finished cache are kept

    rng = np.random.default_rng(0)
    finish("train-student")  # the server has started
    for stage, (_, output) in outputs.items():
        remove(output)
        duration = finish(stage)
        for moment in rng.uniform(0.3, 1.0, 3) * duration:
            remove(output)
            process = begin(stage)
            time.sleep(moment)
            process.kill()
            process.join()
            if output.is_dir():
                assert (output / "commit.json").is_file(), "a cache at the output path is a finished one"
        finish(stage)
    assert contents() == reference


def change_images(project: Project, *, prepared: bool) -> None:
    """One bit of every training image; `prepared` says that prepare-data ran again."""
    manifest = read_manifest(project.manifest, project.base)
    for row in manifest.training:
        Image.fromarray(read_image(manifest.image_file(row)) ^ 1).save(manifest.image_file(row))
    if prepared:
        write_manifest(build_manifest(project.params.data, project.base), project.manifest)


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda project: (project.targets("deep") / "commit.json").unlink(), CacheIncomplete, "is not finished"),
        (lambda project: shutil.rmtree(project.targets("deep")), CacheIncomplete, "does not exist"),
        (lambda project: change_images(project, prepared=False), DataError, "has changed since"),
        (lambda project: change_images(project, prepared=True), StaleTarget, "train_00000"),
    ],
)
def test_caches_of_something_else_are_refused(
    project: Project, spoil: Callable[[Project], None], error: type[Exception], said: str
) -> None:
    spoil(project)
    with pytest.raises(error, match=said):
        distil(project)


def test_an_image_added_after_the_teachers_ran_is_named(project: Project) -> None:
    """Its cache lacks it: an error, never a row of zeros."""
    manifest = read_manifest(project.manifest, project.base)
    (project.base / "labelled.txt").write_text("\n".join(row.image_id for row in manifest.labelled))
    lists = [*TINY, "data.train=25", "data.partition={labelled: labelled.txt}"]
    prepare_data(grown := open_project(project.base / "params.yaml", lists))
    with pytest.raises(CacheIncomplete, match="train_00024"):
        distil(grown)


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
        train_teacher(bare, "wide", Machine(CPU))


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


def test_evaluation_through_windows_says_how_predict_gives_its_masks(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(project.manifest, project.base)
    root = project.base / manifest.root
    images = {row.image_id: root / row.image_path for row in manifest.split("test")}
    for overlap in ("0.3333333333333333", "0.55"):
        set_ = [*TINY, "evaluation.window=[32,40]", f"evaluation.overlap={overlap}"]
        evaluate(open_project(project.base / "params.yaml", set_), device=CPU)
        printed = " ".join(capsys.readouterr().out.split())
        same = re.search(
            r"measured through windows \(evaluation\.window\); `mgd-pipeline predict ([^`]*)` gives the same masks", printed
        )
        assert same is not None, printed
        student, out = project.student("distilled"), tmp_path / overlap
        arguments = ["predict", str(student), *map(str, images.values()), "--output", str(out), *same[1].split()]
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
        masks = {
            one.image_id: one.mask for one in read_masks(project.results / "evaluation/masks.parquet") if one.network == "distilled"
        }
        assert set(masks) == set(images)
        for image_id, path in images.items():
            assert np.array_equal(read_raw_mask(out / f"masks/{path.stem}.png"), masks[image_id])
    evaluate(project, device=CPU)
    assert "through windows" not in capsys.readouterr().out, "predict without options sees whole images, as evaluate does"


@pytest.mark.parametrize(
    ("student", "note", "said"),
    [
        ("distilled", {"long_side": 40}, r"with data\.long_side 40, and the data set is prepared with None; run `mgd-pipeline"),
        (
            "supervised",
            {"classes": list("abcdefghi")},
            r"supervised/student\.safetensors: was trained for the classes a, b",
        ),
    ],
)
def test_a_student_that_does_not_fit_is_refused_before_the_first_image(
    project: Project, capsys: pytest.CaptureFixture[str], student: str, note: dict[str, object], said: str
) -> None:
    """Either of the two: nothing is computed of the first."""
    path = project.student(student)
    save_weights(path, load_student(path).network.model.state_dict(), {**read_metadata(path), **note})
    with pytest.raises(DataError, match=said):
        evaluate(project, device=CPU)
    assert "images" not in capsys.readouterr().out
    shutil.rmtree(project.base / "data/students")
    with pytest.raises(DataError, match="train-student"):
        evaluate(project, device=CPU)


def test_results_that_cannot_be_read_are_named_before_the_first_image(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """The table after the last image shows them, too."""
    for name in ("teachers/wide.json", "teachers/deep-confusion.csv", "train-student-supervised/metrics.json"):
        path = project.results / name
        whole = path.read_bytes()
        path.write_bytes(whole[:9])
        with pytest.raises(DataError, match=re.escape(name)):
            evaluate(project, device=CPU)
        assert "images" not in capsys.readouterr().out
        path.write_bytes(whole)


def test_pictures_of_earlier_calls_make_room_whatever_stands_there(project: Project, tmp_path: Path) -> None:
    """A folder, or a link to one elsewhere, whose files are somebody's."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/own.png").write_bytes(b"")
    for name, call in (
        ("evaluation/overlays", lambda: evaluate(project, device=CPU)),
        ("compare-teachers/disagreement", lambda: compare_teachers(project)),
    ):
        folder = project.results / name
        (folder / "of_an_earlier_call.png").write_bytes(b"")
        call()
        assert folder.is_dir() and not (folder / "of_an_earlier_call.png").exists()
        shutil.rmtree(folder)
        folder.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        call()
        assert not folder.is_symlink() and list(folder.glob("*.png"))
    assert os.listdir(tmp_path / "elsewhere") == ["own.png"]


def test_overlays_show_the_better_student_and_say_so(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """The two students exchanged: the better one has the other name."""
    one, other = (project.student(name) for name in STUDENTS)
    shown = []
    for _ in range(2):
        evaluate(project, device=CPU)
        mious = json.loads((project.results / "evaluation/metrics.json").read_text())
        better = max(STUDENTS, key=lambda name: mious[name]["miou"])
        assert f"overlays show the {LABELS[better]}" in capsys.readouterr().out
        shown.append(better)
        one.rename(project.base / "kept")
        other.rename(one)
        (project.base / "kept").rename(other)
    assert set(shown) == set(STUDENTS)


def test_a_student_trained_again_is_not_taken_for_the_evaluated_one(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """Old numbers beside a new file: whoever reads them is told, on the terminal and on the page."""
    shutil.rmtree(project.results / "evaluation")
    evaluate(project, device=CPU)
    said = capsys.readouterr().out
    assert "trained again" not in said and "compared on 5 images (test), which says little" in said
    path = project.student("distilled")
    save_weights(path, load_student(path).network.model.state_dict(), {**read_metadata(path), "labelled_images": 1})
    line = "the distilled student was trained again after the evaluation, whose numbers and pictures are of the earlier training"
    show_table(project)
    assert line in " ".join(capsys.readouterr().out.split())
    assert line[1:] in report(project).read_text(encoding="utf-8")
    metrics = project.results / "evaluation/metrics.json"
    measured = json.loads(metrics.read_text())
    for key in ("distilled", "supervised"):  # as version 0.1.0 wrote it
        del measured[key]["sha256"]
    metrics.write_text(json.dumps(measured))
    show_table(project)
    assert "trained again" not in capsys.readouterr().out


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
