"""The stages as a user meets them: the whole way, killed and resumed runs, missing teachers, refused caches."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from caches import file_bytes as files_below
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
from mgd_pipeline.metrics import class_iou, confusion_matrix, mean_iou
from mgd_pipeline.networks.weights import read_metadata, read_state_dict, save_weights, sha256_of_state
from mgd_pipeline.params import STUDENTS
from mgd_pipeline.pictures.overlays import blend
from mgd_pipeline.training.knowledge import knowledge_of
from mgd_pipeline.training.priors import adjust_logits
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
from mgd_stages.stages.train_student import train_student
from mgd_stages.stages.train_teacher import train_teacher

CPU = torch.device("cpu")


def distil(project: Project, *, supervised_only: bool = False, **changes: object) -> None:
    """`changes` are of the machine."""
    train_student(project, Machine(CPU, **changes), supervised_only=supervised_only)  # type: ignore[arg-type]


def weights(project: Project, name: str = "distilled") -> bytes:
    return project.student(name).read_bytes()


def test_where_every_training_image_is_labelled_they_stand_in_as_unlabelled_ones(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["data.partition=1/1", "losses.other_partition=true", "student.steps=12"]
    all_labelled = open_project(project.base / "params.yaml", settings)
    prepare_data(all_labelled)
    said = " ".join(capsys.readouterr().out.split())
    assert "all 24 training images are labelled: they stand in as unlabelled images, too" in said
    assert "24 train images (24 labelled, 0 unlabelled), 2 val, 5 test" in said

    # Decoded images are kept; the stream of unlabelled ones, which has no labels, is often the first to decode one.
    dataset, first = training_set(all_labelled), training_set(all_labelled)
    for step in range(12):
        batch = dataset[step]
        assert batch.unlabelled is not None and batch.unlabelled.labels is None
        assert batch.labelled.labels is not None and (batch.labelled.labels != 255).flatten(1).any(1).all()
        again = training_set(all_labelled)[step].labelled.labels
        assert again is not None and torch.equal(batch.labelled.labels, again)
    assert {row.image_id for row in first[0].sources[1].rows} <= {row.image_id for row in dataset.manifest.labelled}

    distil(all_labelled)
    terms = {path.stem for path in (project.results / "train-student-distilled/plots").glob("*.tsv")}
    assert {"pixel_labelled_wide", "pixel_unlabelled_wide", "region", "image"} <= terms
    train_teacher(all_labelled, "wide", Machine(CPU))
    for name in ("cross", "supervised"):  # CPS trains, too
        rows = (project.results / f"train-teacher-wide/plots/{name}.tsv").read_text().split()[2:]
        assert all(float(value) > 0 for value in rows[1::2])
    only = open_project(project.base / "params.yaml", ["data.partition=1/1", "losses.images=[unlabelled]"])
    for stage in (prepare_data, distil):
        with pytest.raises(ParamsError, match=r"losses\.images: is \[unlabelled\], but all 24 training images are labelled; write"):
            stage(only)


def test_whole_way_makes_what_it_promises(finished_project: Path) -> None:
    """DVC sees that every file is there (test_sharing.py)."""
    data = finished_project / "data"
    assert {path.name for path in data.iterdir()} == {"raw", "manifest", "teachers", "targets", "students", "results"}
    assert not list((finished_project / ".mgd/work").rglob("*.pt")), "finished stages leave no checkpoint behind"
    metrics = json.loads((data / "results/evaluation/metrics.json").read_text())
    assert set(metrics) == {"split", "distilled", "supervised"} and 0 < metrics["distilled"]["miou"] < 1
    log = (data / "results/train-student-distilled/plots/loss.tsv").read_text().splitlines()
    assert log[0] == "step\tloss" and log[-1].startswith("4\t")
    stored = {key.image_id for key in open_cache(data / "targets/wide.zarr").index.keys}
    assert stored == {row.image_id for row in read_manifest(data / "manifest", finished_project).training}


def test_student_trains_without_files_and_code_of_the_teachers(project: Project) -> None:
    """And is evaluated and reported by a member who has no module that trains or runs a teacher."""
    before = weights(project)
    shutil.rmtree(project.base / "data/teachers")
    project.student("distilled").unlink()
    script = (
        "import sys\n"
        "for module in ('pipeline.teachers', 'pipeline.training.live', 'stages.stages.train_teacher', "
        "'stages.stages.precompute_teachers'):\n"
        "    sys.modules[f'mgd_{module}'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "from mgd_stages.cli import app\n"
        "for stage in ('train-student', 'evaluate', 'report'):\n"
        "    app([stage, '--config', sys.argv[1]], standalone_mode=False)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(project.base / "params.yaml")], check=True, capture_output=True)
    assert weights(project) == before, "and the result is the same to the bit"


def remove_unlabelled_images(project: Project) -> None:
    manifest = read_manifest(project.manifest, project.base)
    for row in manifest.unlabelled:
        manifest.image_file(row).unlink()


def test_supervised_only_student_never_opens_a_cache_or_an_unlabelled_image(project: Project) -> None:
    """Workers change nothing, either."""
    before = weights(project, "supervised")
    shutil.rmtree(project.base / "data/targets")
    remove_unlabelled_images(project)
    distil(project, supervised_only=True, num_workers=2)
    assert weights(project, "supervised") == before


def test_a_teacher_without_cps_needs_no_unlabelled_image(project: Project) -> None:
    """The curve of the term that it lacks is gone, too; an earlier training had it."""
    project.teacher("wide").unlink()
    remove_unlabelled_images(project)
    plots = project.results / "train-teacher-wide/plots"
    assert (plots / "cross.tsv").exists()
    train_teacher(open_project(project.base / "params.yaml", ["teacher_training.method=supervised"]), "wide", Machine(CPU))
    fingerprint = read_manifest(project.manifest, project.base).partition_fingerprint
    assert read_metadata(project.teacher("wide"))["trained_on"] == fingerprint
    assert (plots / "supervised.tsv").exists() and not (plots / "cross.tsv").exists()
    with pytest.raises(DataError, match="no such file"):
        train_teacher(project, "wide", Machine(CPU))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["losses.images=[labelled]"], {"pixel_labelled_wide", "pixel_labelled_deep"}),
        (["losses.images=[unlabelled]"], {"pixel_unlabelled_wide", "pixel_unlabelled_deep", "region", "image"}),
        (["losses.pixel_teachers=[deep]", "losses.region=0"], {"pixel_labelled_deep", "pixel_unlabelled_deep", "image"}),
        (["losses.pixel=0", "losses.image=0"], {"region"}),
        (
            ["losses.pixel=0", "losses.channel=3", "losses.images=[labelled]", "losses.pixel_choice=by-class"],
            {"channel_labelled_by-class"},
        ),
        (["losses.pixel_choice=ensemble"], {"pixel_labelled_ensemble", "pixel_unlabelled_ensemble", "region", "image"}),
    ],
)
def test_only_the_terms_asked_for_are_computed(project: Project, overrides: list[str], expected: set[str]) -> None:
    changed = open_project(project.base / "params.yaml", overrides)
    for teacher in set(changed.params.teachers) - set(changed.params.losses.used_teachers):
        shutil.rmtree(changed.targets(teacher))
    shutil.rmtree(changed.results / "train-student-distilled")
    distil(changed)
    written = {path.stem for path in (changed.results / "train-student-distilled/plots").iterdir()}
    assert written == {"loss", "supervised", *expected}


def test_logit_adjustment_changes_the_last_bias_by_the_labelled_shares_and_nothing_else(project: Project) -> None:
    before = load_student(project.student("supervised")).network
    distil(open_project(project.base / "params.yaml", ["student.logit_adjustment=0.5"]), supervised_only=True)
    after = load_student(project.student("supervised")).network

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


def test_prior_adjustment_takes_the_labelled_shares_off_the_targets_of_unlabelled_images(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logit of a class without pixels stays. What comes off which targets: tests/test_terms.py."""
    adjusting = open_project(project.base / "params.yaml", ["losses.prior_adjustment=2.0"]).params
    manifest = read_manifest(project.manifest, project.base)
    with monkeypatch.context() as patched:
        patched.setattr("mgd_pipeline.training.knowledge.labelled_pixels", lambda manifest: np.array([30, 0, 10]))
        offsets = knowledge_of(adjusting, manifest, {}, CPU).offsets
    assert offsets is not None and offsets.shape == (3, 1, 1)
    np.testing.assert_allclose(offsets.flatten(), [2 * np.log(0.75), 0, 2 * np.log(0.25)], rtol=1e-6)

    small = ["targets.logits=log-probability", "losses.image_distance=log-probability", "losses.prior_adjustment=2.0"]
    soft = 4 + np.log(len(manifest.classes)) + 4.372
    for labels, floor, lift in (("hard", 8.8, None), ("hard", 8.0, 4.0), ("soft", soft + 0.1, None), ("soft", soft - 0.4, 3.972)):
        params = open_project(
            project.base / "params.yaml", [*small, f"targets.floor={floor}", f"losses.pixel_labels={labels}"]
        ).params
        with monkeypatch.context() as patched:
            # 2 log(89 / 10) = 4.372 nats.
            patched.setattr("mgd_pipeline.training.knowledge.labelled_pixels", lambda manifest: np.array([89, 10, 10]))
            knowledge = knowledge_of(params, manifest, {}, CPU)
        assert knowledge.offsets is not None
        frequent = 2 * np.log(89 / 109)
        expected = [frequent, *[frequent - (lift or 4.372)] * 2]
        np.testing.assert_allclose(knowledge.offsets.flatten(), expected, atol=1e-3)
        assert (knowledge.bounded is None) == (lift is None)
        assert lift is None or f"lifts the rarest class by {lift:.1f} nats, not by 4.4" in str(knowledge.bounded)

    before = load_student(project.student("distilled")).network.state_dict()
    distil(open_project(project.base / "params.yaml", ["losses.prior_adjustment=5.0"]))
    after = load_student(project.student("distilled")).network.state_dict()
    assert any(not torch.equal(value, after[key]) for key, value in before.items()), "the parameter reaches the training"


def run_command(arguments: list[str]) -> None:
    """`mgd-pipeline` in this process."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        app(arguments)


def test_killed_stages_continue_and_outputs_hold_nothing_or_the_finished_thing(project: Project) -> None:
    """SIGKILL again and again in teacher training and precomputing, each time of what the kills before have left."""
    outputs = {"train-teacher": project.teacher("wide"), "precompute-teachers": project.targets("wide")}

    def contents() -> list[object]:
        return [files_below(output) if output.is_dir() else output.read_bytes() for output in outputs.values()]

    reference = contents()
    # Forked from a server that has imported everything: a kill hits the stage's work, not the import of torch.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([*(f"mgd_stages.stages.{stage.replace('-', '_')}" for stage in outputs), "test_stages"])

    def run(stage: str, seconds: float | None = None) -> float:
        """Killed after so many seconds; returns how long it ran."""
        line = [stage, "--teacher", "wide", "--config", str(project.base / "params.yaml")]
        process = processes.Process(target=run_command, args=(line,))
        began = time.monotonic()
        process.start()
        process.join(seconds)
        assert process.exitcode == 0 or seconds is not None
        process.kill()
        process.join()
        return time.monotonic() - began

    def remove(output: Path) -> None:
        shutil.rmtree(output) if output.is_dir() else output.unlink()
        shutil.rmtree(project.base / ".mgd", ignore_errors=True)  # where shards of a finished cache are kept

    rng = np.random.default_rng(0)
    run("train-teacher")  # the server has started
    for stage, output in outputs.items():
        remove(output)
        duration = run(stage)
        remove(output)
        for moment in rng.uniform(0.3, 0.8, 3) * duration:
            run(stage, moment)
            assert not output.is_dir() or (output / "commit.json").is_file(), "a cache at the output path is a finished one"
        run(stage)
    assert contents() == reference


def change_images(project: Project, *, prepared: bool) -> None:
    """One bit of every training image; `prepared` says that prepare-data ran again."""
    manifest = read_manifest(project.manifest, project.base)
    for row in manifest.training:
        Image.fromarray(read_image(manifest.image_file(row)) ^ 1).save(manifest.image_file(row))
    if prepared:
        write_manifest(build_manifest(project.params.data, project.base), project.manifest)


def add_image(project: Project) -> None:
    """After the teachers ran: their caches lack it, which is an error, never a row of zeros."""
    manifest = read_manifest(project.manifest, project.base)
    (project.base / "labelled.txt").write_text("\n".join(row.image_id for row in manifest.labelled))
    prepare_data(open_project(project.base / "params.yaml", ["data.train=25", "data.partition={labelled: labelled.txt}"]))


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda project: shutil.rmtree(project.targets("deep")), CacheIncomplete, "does not exist"),
        (lambda project: change_images(project, prepared=False), DataError, "has changed since"),
        (lambda project: change_images(project, prepared=True), StaleTarget, "train_00000"),
        (add_image, CacheIncomplete, "train_00024"),
    ],
)
def test_caches_of_something_else_are_refused(
    project: Project, spoil: Callable[[Project], None], error: type[Exception], said: str
) -> None:
    spoil(project)
    with pytest.raises(error, match=said):
        distil(project)


def test_a_groups_own_teacher_needs_no_training(project: Project) -> None:
    """`train_teachers: []` and a checkpoint of one's own, without our metadata."""
    from safetensors.torch import load_file, save_file

    own = project.base / "own/wide.safetensors"
    own.parent.mkdir()
    save_file(load_file(project.teacher("wide")), own)
    overrides = ["train_teachers=[]", "teachers.wide.weights=own/wide.safetensors"]
    bare = open_project(project.base / "params.yaml", overrides)
    project.teacher("wide").unlink()
    precompute_teachers(bare, "wide", device=CPU, batch_size=4)
    distil(bare)
    with pytest.raises(ValueError, match="not in train_teachers"):
        train_teacher(bare, "wide", Machine(CPU))


def test_evaluation_gives_what_predict_gives(project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through windows the table says with which options; whole images need none."""
    manifest = read_manifest(project.manifest, project.base)
    images = {row.image_id: manifest.image_file(row) for row in manifest.split("test")}
    student = str(project.student("distilled"))
    for overlap, options in ((None, ""), (1 / 3, "--window 32x40"), (0.75, "--window 32x40 --overlap 0.75")):
        windows = ["evaluation.window=[32,40]", f"evaluation.overlap={overlap}"] if overlap else []
        evaluate(open_project(project.base / "params.yaml", windows), device=CPU)
        printed = " ".join(capsys.readouterr().out.split())
        said = f"measured through windows (evaluation.window); `mgd-pipeline predict {options}` gives the same masks"
        assert said in printed if options else "measured through windows" not in printed
        out = tmp_path / str(overlap)
        arguments = ["predict", student, *map(str, images.values()), "--output", str(out), *options.split()]
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
        predicted = {image_id: read_raw_mask(out / f"masks/{path.stem}.png") for image_id, path in images.items()}
        kept = [one for one in read_masks(project.results / "evaluation/masks.parquet") if one.network == "distilled"]
        assert {one.image_id for one in kept} == set(images)
        assert all(np.array_equal(predicted[one.image_id], one.mask) for one in kept)
        total = sum(confusion_matrix(manifest.mask(manifest.rows[image_id]), mask, 9) for image_id, mask in predicted.items())
        metrics = json.loads((project.results / "evaluation/metrics.json").read_text())
        assert metrics["distilled"]["miou"] == pytest.approx(mean_iou(np.asarray(total)), abs=1e-6)
        labelled = np.concatenate([manifest.mask(row).ravel() for row in manifest.labelled])
        rarest = sorted(np.flatnonzero(np.sum(total, 1)), key=lambda k: (labelled == k).sum())[:3]
        assert np.count_nonzero(np.sum(total, 1)) in (7, 8, 9) and metrics["distilled"]["rare_classes"] == [
            manifest.classes[k] for k in rarest
        ]
        assert metrics["distilled"]["rare_miou"] == pytest.approx(np.mean(class_iou(np.asarray(total))[rarest]), abs=1e-6)


def test_older_evaluations_and_machines_without_labelled_masks_show_no_rare_third(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project.results / "evaluation/metrics.json"
    measured = json.loads(path.read_text())
    for key in STUDENTS:
        del measured[key]["rare_miou"], measured[key]["rare_classes"]
    path.write_text(json.dumps(measured))
    show_table(project)
    printed = capsys.readouterr().out
    assert "third, %" in printed and "rare third:" not in printed
    report(project)
    manifest = read_manifest(project.manifest, project.base)
    manifest.mask_file(manifest.labelled[0]).unlink()
    evaluate(project, device=CPU)
    assert (
        "the rare third of the classes is not known, because a mask of the labelled images cannot be read"
        in capsys.readouterr().out
    )
    assert json.loads(path.read_text())["distilled"].keys() == measured["distilled"].keys()


def test_pictures_of_earlier_calls_make_room_whatever_stands_there(project: Project, tmp_path: Path) -> None:
    """A folder, or a link to one elsewhere, whose files are somebody's."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/own.png").write_bytes(b"")
    overlays, disagreement = project.results / "evaluation/overlays", project.results / "compare-teachers/disagreement"
    shutil.rmtree(overlays)
    overlays.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (disagreement / "own.png").write_bytes(b"")
    evaluate(project, device=CPU)
    compare_teachers(project)
    for folder in (overlays, disagreement):
        assert not folder.is_symlink() and list(folder.glob("*.png")) and not (folder / "own.png").exists()
    assert os.listdir(tmp_path / "elsewhere") == ["own.png"]
    picture = Image.open(overlays / "best_1.png").convert("RGB")
    assert picture.width > 800 and len(picture.getcolors(maxcolors=2**24) or []) > 50


def test_the_better_student_is_copied_and_shown_with_the_reason(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """The two students exchanged: the better one has the other name."""
    one, other = (project.student(name) for name in STUDENTS)
    state = read_state_dict(other)
    state["segmentation_head.0.bias"][0] += 100  # the background everywhere is better than four steps of training, on every image
    save_weights(other, state, read_metadata(other))
    shown = set()
    for _ in range(2):
        evaluate(project, device=CPU)
        mious = json.loads((project.results / "evaluation/metrics.json").read_text())
        shown.add(better := max(STUDENTS, key=lambda name: mious[name]["miou"]))
        printed = capsys.readouterr().out
        assert f"overlays show the {LABELS[better]}" in printed
        copy, metadata = load_student(project.best_student), read_metadata(project.student(better))
        why = copy.metadata["best"].pop("why")
        assert f"`data/students/best.safetensors` is the {LABELS[better]}: {why}" in " ".join(printed.split())
        assert why in report(project).read_text(encoding="utf-8")
        of_file = hashlib.sha256(project.student(better).read_bytes()).hexdigest()
        numbers = {name: mious[name]["miou"] for name in STUDENTS}
        assert copy.metadata == {
            **metadata,
            "best": {"student": better, "miou": numbers, "split": "test", "images": 5, "sha256": of_file},
        }
        tensors, copied = (read_state_dict(path) for path in (project.student(better), project.best_student))
        assert sha256_of_state(tensors) == sha256_of_state(copied)
        files = one.read_bytes(), other.read_bytes()
        other.write_bytes(files[0])
        one.write_bytes(files[1])
    assert shown == set(STUDENTS)


def test_a_student_trained_again_is_not_taken_for_the_evaluated_one(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """Old numbers beside a new file: whoever reads them is told, on the terminal and on the page."""
    show_table(project)
    assert "trained again" not in capsys.readouterr().out
    path = project.student("distilled")
    save_weights(path, load_student(path).network.model.state_dict(), {**read_metadata(path), "labelled_images": 1})
    line = "the distilled student was trained again after the evaluation, whose numbers and pictures are of the earlier training"
    show_table(project)
    assert line in " ".join(capsys.readouterr().out.split())
    assert line[1:] in report(project).read_text(encoding="utf-8")
    metrics = project.results / "evaluation/metrics.json"
    measured = json.loads(metrics.read_text())
    for key in STUDENTS:  # as version 0.1.0 wrote it
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


def test_a_black_class_is_told_from_void() -> None:
    """CamVid's sky is class 0, black in VOC's palette: void must look otherwise."""
    image, mask = np.full((1, 3, 3), 200, np.uint8), np.array([[0, 1, 255]], np.uint8)
    sky, other, void = blend(image, mask, [(0, 0, 0), (128, 0, 0)], opacity=0.5)[0].tolist()
    assert sky == [100, 100, 100] and other == [164, 100, 100] and min(void) > 190
