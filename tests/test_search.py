"""The search: short trials first, nothing lost or counted twice, and a comparison on images that no trial saw."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from conftest import TINY
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.errors import CacheError, MGDError, NonFiniteError, ParamsError
from mgd_pipeline.networks.weights import read_metadata
from mgd_pipeline.params_file import load_params, override_params
from mgd_stages.cli import app
from mgd_stages.projects.presets import preset, preset_names, read_preset
from mgd_stages.run.machine import Machine
from mgd_stages.run.processes import Failure, _do
from mgd_stages.run.progress import write_json
from mgd_stages.run.project import Project, open_project
from mgd_stages.search import run as search_run
from mgd_stages.search.halving import (
    Job,
    Trial,
    affordable,
    all_failed,
    bias_sentence,
    cost,
    next_job,
    rungs_of,
    trainings,
    winner,
)
from mgd_stages.search.held_back import search_manifest
from mgd_stages.search.results import write_search_results
from mgd_stages.search.space import default_space, read_space, render_space
from mgd_stages.search.trials import STUDENTS, Search, make_project, propose, read_trials, write_failure
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.train_student import train_student

PARAMS = override_params(preset("shapes", "data/raw/shapes", "1/4"), [*TINY, "student.steps=9", "evaluation.split=val"])
SPACE = """\
losses.region: {low: 1, high: 100, log: true}
losses.pixel_labels: {choose: [hard, soft]}
student.labelled_batch, student.unlabelled_batch: {choose: [[2, 2], [2, 3]]}
"""


# --- halving, by pure functions alone


def simulated(planned: int, rungs: int, score: Callable[[Job], float | None], jobs: int = 1) -> tuple[list[Trial], list[Job]]:
    """A search without trainings: `jobs` run at a time and the oldest ends first; None is a failure."""
    trials: list[Trial] = []
    running: list[Job] = []
    done = []
    while True:
        while len(running) < jobs and (job := next_job(trials, planned, rungs, {one.trial for one in running})) is not None:
            trial = Trial(job.trial, {}) if job.trial == len(trials) else replace(trials[job.trial], begun=job.rung + 1)
            trials[job.trial :] = [trial, *trials[job.trial + 1 :]]
            running.append(job)
        if not running:
            return trials, done
        job = running.pop(0)
        result = score(job)
        changed = {"failure": "fails"} if result is None else {"scores": (*trials[job.trial].scores, result)}
        trials[job.trial] = replace(trials[job.trial], **changed)
        done.append(job)


@pytest.mark.parametrize("jobs", [1, 2, 7])
@pytest.mark.parametrize(("planned", "counts"), [(1, [1, 1, 1]), (4, [4, 1, 1]), (9, [9, 3, 1]), (30, [30, 10, 3])])
def test_the_best_third_of_each_length_goes_on_once(planned: int, counts: list[int], jobs: int) -> None:
    trials, done = simulated(planned, 3, lambda job: (job.trial * 7 % planned) / planned, jobs)
    lengths = Counter(job.rung for job in done)
    assert len(set(done)) == len(done) and trainings(planned, 3) == counts and lengths[0] == planned
    assert all(counts[rung] <= lengths[rung] <= 1.5 * counts[rung] for rung in range(3)), "some were in the best third for a while"
    best = winner(trials, 3)
    assert best is not None and best.scores[0] == (planned - 1) / planned, "here the best trial is the best at each length"


def test_a_failure_takes_no_place_of_another_trial() -> None:
    """The best trials fail at full length, so the next one goes there."""
    trials, done = simulated(6, 2, lambda job: None if job.rung and job.trial > 2 else float(job.trial))
    best = winner(trials, 2)
    assert best is not None and best.number <= 2 and Counter(job.trial for job in done if job.rung).keys() >= {3, 4, 5}
    assert all_failed(trials, 6) is None
    nothing, done = simulated(5, 2, lambda _: None)
    assert len(done) == 5 and winner(nothing, 2) is None
    assert all_failed(nothing[:2], 5) is None and all_failed(nothing[:3], 5) == "fails" == all_failed(nothing[:1], 1)


def test_lengths_and_hours() -> None:
    assert rungs_of(900) == (100, 300, 900) and rungs_of(2) == (1, 2) and rungs_of(1) == (1,)
    seconds = (10.0, 30.0, 90.0)
    assert cost(9, seconds, 1) == 9 * 10 + 3 * 30 + 90 + 6 * 90 and cost(9, seconds, 4) == 270 / 4 + 2 * 90
    for budget in (669.0, 670.0, 1000.0, 5000.0):
        count = affordable(budget, seconds, 1)
        assert cost(count + 1, seconds, 1) > budget and (not count or cost(count, seconds, 1) <= budget)
    assert affordable(600.0, seconds, 1) == 0


def test_the_bias_in_plain_words() -> None:
    assert "had 50.0 % in the search, and with 3 new seeds it has 47.0 % on average, 3.0 points less." in bias_sentence(
        0.50, [0.46, 0.47, 0.48], 30
    )
    assert "has 51.0 % on average, no less." in bias_sentence(0.50, [0.51], 30)


# --- the space


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("losses.regoin: {choose: [1, 2]}", "losses.regoin = 1: unknown key; nearest is 'region'"),
        ("losses.pixel: {low: -1, high: 1}", "losses.pixel = -1: must be at least 0"),
        ("losses.pixel_labels: {choose: [hard, firm]}", "losses.pixel_labels = 'firm': must be one of hard, soft"),
        ("student.steps: {low: 1, high: 9}", "student.steps: the search itself decides how long a trial is trained"),
        ("targets.stride: {choose: [4, 8]}", "targets.stride: all trials share data, teachers and teacher caches"),
        ("cutmix.boxes: {low: 0.5, high: 3}", "cutmix.boxes = 0.5: must be a whole number"),
        ("losses.pixel: {low: 1}", "losses.pixel: is {low: 1}; write {choose: [...]}"),
        ("losses.pixel: {low: 0, high: 1, log: true}", "losses.pixel: low is 0; with log: true it must be above 0"),
        ("losses.pixel: {low: 2, high: 1}", "losses.pixel: low is 2, and high is 1; low must be smaller"),
        ("losses.pixel: {choose: [1]}", "losses.pixel: choose must be a list of two values or more"),
        ("losses.pixel, losses.image: {choose: [[1, 2], 3]}", "each choice must be a list of 2 values, one for each key; not 3"),
        ("losses.pixel: {choose: [1, 2]}\nlosses.pixel, losses.image: {choose: [[1, 2], [2, 3]]}", "losses.pixel stands twice"),
        ("- losses.pixel", "names no key; write lines such as"),
        ("losses: [", "not valid YAML"),
    ],
)
def test_a_space_that_cannot_be_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(ParamsError, match=re.escape(problem)) as raised:
        read_space(tmp_path / "space.yaml", PARAMS)
    assert str(raised.value).startswith(str(tmp_path / "space.yaml"))


@pytest.mark.parametrize("name", ["shapes", *preset_names()])
def test_the_default_space_suits_every_preset(name: str, tmp_path: Path) -> None:
    params = PARAMS if name == "shapes" else read_preset(name)[1]
    (tmp_path / "space.yaml").write_text(render_space(default_space(params)))
    space = read_space(tmp_path / "space.yaml", params)
    axes = {axis.name: axis for axis in space}
    assert axes["student.learning_rate"].has(params.student.learning_rate) and not axes["student.learning_rate"].whole
    sums = {sum(pair) for pair in axes["student.labelled_batch, student.unlabelled_batch"].choices} if name != "shapes" else set()
    assert len(sums) <= 1, "all trials see as many images"
    assert not re.search(r"[&*]id\d", (tmp_path / "space.yaml").read_text()), "every value stands where it is read"


def test_the_default_space_suits_what_is_set_otherwise(tmp_path: Path) -> None:
    """Stored too little for some distances; no term of unlabelled images, and so no use of the cache of deep."""
    own = ["targets.top_k=3", "losses.images=[labelled]", "losses.pixel_teachers=[wide]", "losses.pixel_distance=kl"]
    params = override_params(PARAMS, own)
    (tmp_path / "space.yaml").write_text(render_space(default_space(params)))
    axes = {axis.name: axis for axis in read_space(tmp_path / "space.yaml", params)}
    assert axes["losses.pixel_distance"].choices == ("cross-entropy", "kl") and "losses.channel" not in axes
    assert axes["losses.pixel_weights"].choices == ([], ["correct"], ["edges"], ["balance"])
    assert axes["losses.feature, losses.feature_teachers"].choices[1] == [0.3, ["wide"]]
    space = default_space(override_params(PARAMS, ["losses.region=0", "losses.pixel_teachers=[deep]"]))
    assert "losses.region" not in space and [1.0, ["deep"]] in space["losses.feature, losses.feature_teachers"]["choose"]
    space = default_space(override_params(PARAMS, ["targets.logits=log-probability", "losses.image=0"]))
    assert "losses.image" not in space and "ttm" not in space["losses.pixel_distance"]["choose"]


# --- proposals and what is on the disk


def search_of(folder: Path, text: str = SPACE, **changes: Any) -> Search:
    folder.mkdir(exist_ok=True)
    (folder / "space.yaml").write_text(text)
    of = Search(folder, PARAMS, read_space(folder / "space.yaml", PARAMS), rungs_of(PARAMS.student.steps), "miou")
    return replace(of, **changes)


def fake_training(folder: Path, miou: float | None, split: str = "val", **more: float) -> None:
    """What a training of a search leaves behind."""
    results = folder / "data/results"
    write_json(results / "evaluation/metrics.json", {"split": split, "distilled": {"miou": miou, **more}})
    (results / "evaluation/class_iou.tsv").write_text("class\tdistilled\nbackground\t50.0\n")
    write_json(results / "run.json", {"seconds": 12.0, "student": "distilled"})


def fake_search(search: Search, planned: int, score: Callable[[Search, Job], float | None]) -> list[Trial]:
    """A whole search whose trainings are made up."""
    while (job := next_job(trials := read_trials(search), planned, len(search.rungs), ())) is not None:
        if job.trial == len(trials):
            write_json(search.of_trial(job.trial) / "trial.json", propose(search, trials, ()))
        if (miou := score(search, job)) is None:
            write_failure(search.of_job(job), "train-student distilled: not finite")
        else:
            make_project(search, search.of_job(job), search.base)
            fake_training(search.of_job(job), miou)
    return trials


def made_up(search: Search, job: Job) -> float | None:
    """Best at a region weight of 40, the project's own is 10; soft labels fail."""
    params = search.parameters(json.loads((search.of_trial(job.trial) / "trial.json").read_text()), 9, 0)
    return None if params.losses.pixel_labels == "soft" else 0.5 - abs(math.log10(params.losses.region / 40)) / 10 + 0.01 * job.rung


def test_proposals_follow_from_the_seed_and_the_folders(tmp_path: Path) -> None:
    trials = [fake_search(search_of(tmp_path / name), 14, made_up) for name in ("a", "b")]
    assert [trial.values for trial in trials[0]] == [trial.values for trial in trials[1]]
    assert trials[0][0].values == {} and len({json.dumps(trial.values) for trial in trials[0]}) == 14
    other = search_of(tmp_path / "c", base=override_params(PARAMS, ["seed=1"]))
    assert fake_search(other, 3, made_up)[2].values != trials[0][2].values
    failed = [trial for trial in trials[0] if trial.failure]
    assert failed and all(trial.values["losses.pixel_labels"] == "soft" for trial in failed)


def test_recipes_that_cannot_be_are_not_drawn(tmp_path: Path) -> None:
    """Agreement is of two teachers, and a student that teaches is a third."""
    search = search_of(tmp_path / "search", "losses.pixel_weights: {choose: [[], [agreement]]}\n")
    write_json(search.folder / "students.json", {"students": ["trial-0001"]})
    drawn = [propose(search, [Trial(number, {}) for number in range(count)], ["trial-0001"]) for count in range(1, 25)]
    kinds = {(STUDENTS in values, bool(values["losses.pixel_weights"])) for values in drawn}
    assert kinds == {(False, False), (False, True), (True, False)}
    weights = "losses.pixel_weights: {choose: [[correct, agreement], [correct, margin]]}\n"
    search = search_of(tmp_path / "none", weights + "losses.images: {choose: [[labelled], [unlabelled]]}\n")
    with pytest.raises(ParamsError, match="another --output; the last recipe: losses: pixel_weights: "):
        propose(search, [Trial(0, {})], ())


def test_the_objective_may_count_rare_classes(tmp_path: Path) -> None:
    search = search_of(tmp_path / "search", objective="miou+rare")
    write_json(search.of_trial(0) / "trial.json", {})
    fake_training(search.of_job(Job(0, 0)), 0.5)
    with pytest.raises(MGDError, match="has no rare_miou, which --objective miou"):
        read_trials(search)
    fake_training(search.of_job(Job(0, 0)), 0.5, rare_miou=0.1)
    assert read_trials(search)[0].scores == (0.3,)
    fake_training(search.of_job(Job(0, 0)), None, rare_miou=0.1)
    assert "no pixel of the val split has a class" in str(read_trials(search)[0].failure)


def test_results_and_page(tmp_path: Path) -> None:
    """Trials by a made-up objective; the winner is 2 points better on test, with known intervals, and 1 point worse on val."""
    search = search_of(tmp_path / "search")
    trials = fake_search(search, 24, made_up)
    best = winner(trials, 3)
    assert best is not None and best.number
    for number, gain in ((0, 0.0), (best.number, 0.02)):
        for seed in (1, 2, 3):
            folder = search.of_final(number, seed)
            make_project(search, folder, search.parameters(trials[number].values, 9, seed))
            make_project(search, folder / "test", search.parameters(trials[number].values, 9, seed))
            fake_training(folder, best.scores[-1] - 0.01)
            fake_training(folder / "test", 0.40 + gain + 0.001 * seed * bool(number), "test")
            write_json(folder / "measured.json", {})
    outcome = search_run.Outcome(search, trials, best, [0, best.number], [1, 2, 3], [], [])
    write_search_results(outcome)
    page = (search.folder / "search.html").read_text()
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert f"has +2.2 [+{2.2 - half:.1f}, +{2.2 + half:.1f}] points of mIoU against the project&#39;s own parameters" in page
    assert "it is better" in page and "1.0 points less" in page and "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/png;base64,") == 2 and "train-student distilled: not finite" in page and "losses.region" in page
    rows = pq.read_table(search.folder / "results.parquet").to_pylist()
    finals = {(row["variant"], row["split"], row["seed"]) for row in rows if row["final"]}
    assert len(finals) == 12 and {row["steps"] for row in rows} == {1, 3, 9}
    counts = Counter(row["steps"] for row in rows if row["metric"] == "miou" and not row["final"])
    assert counts == {steps: sum(len(trial.scores) > rung for trial in trials) for rung, steps in enumerate(search.rungs)}


# --- images that no trial sees


def test_half_of_val_is_held_back_where_there_is_no_test_split(project: Project) -> None:
    manifest = read_manifest(project.manifest, project.base)
    whole, held_back = search_manifest(manifest, False)
    assert held_back == [] and whole.rows == manifest.rows, "there is a test split"
    rows = {name: replace(row, split="val") if row.split == "test" else row for name, row in manifest.rows.items()}
    without = replace(manifest, rows=rows)
    with pytest.raises(
        ParamsError, match=re.escape("val's 7 images would be halved: 4 for the search, 3 for the final comparison")
    ):
        search_manifest(without, False)
    halved, held_back = search_manifest(without, True)
    assert [row.image_id for row in halved.split("test")] == held_back and len(held_back) == 3 and len(halved.split("val")) == 4
    assert halved.partition_fingerprint == manifest.partition_fingerprint and halved.root.is_absolute()
    more = {
        f"{name}-{i}": replace(row, image_id=f"{name}-{i}") for name, row in rows.items() if row.split == "val" for i in range(3)
    }
    larger, held_back = search_manifest(replace(without, rows={**rows, **more}), False)
    assert len(held_back) == 14 == len(larger.split("val")), "ten in each half are enough"


# --- the whole command


def command(project: Project, output: Path, *more: str) -> list[str]:
    return ["search", str(project.base), "--output", str(output), "--device", "cpu", "--threads", "1", *more]


def run_search(project: Project, output: Path, *more: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, command(project, output, *more))
    assert done.exit_code == code, done.output
    return done.output


def test_a_killed_search_goes_on_and_loses_nothing(project: Project, tmp_path: Path) -> None:
    """Some trials have a loss that is not finite. The search is killed in the middle; what was finished stays as it is."""
    output = tmp_path / "search"
    output.mkdir()
    (output / "space.yaml").write_text("student.learning_rate: {choose: [0.01, 1.0e+30]}\nlosses.region: {choose: [0, 1, 5]}\n")
    arguments = command(project, output, "--trials", "4", "--jobs", "2", "--set", "student.steps=9")
    with open(tmp_path / "log", "w") as log:
        killed = subprocess.Popen([sys.executable, "-m", "mgd_stages.cli", *arguments], stdout=log, stderr=log)
        while not list(output.glob("trials/*/*/data/results/run.json")):
            assert killed.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    proposed = {path: path.read_text() for path in output.glob("trials/*/trial.json")}
    finished = {path: path.stat().st_mtime_ns for path in output.glob("trials/*/*/data/results/run.json")}
    assert finished and proposed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_run, "attempt", _do)
        said = run_search(project, output, "--trials", "4", "--set", "student.steps=9")
        for path, moment in finished.items():
            assert path.stat().st_mtime_ns == moment, "a finished training is not done again"
        assert all(path.read_text() == text for path, text in proposed.items())
        trials = sorted(path.name for path in (output / "trials").iterdir())
        assert trials == ["0000", "0001", "0002", "0003"]
        assert re.search(r"trial \d, 1 step: failed: .*not finite", said) or "1.0e+30" not in str(proposed)
        made = {path: path.stat().st_mtime_ns for path in output.glob("*/**/student.safetensors")}
        assert "final comparison on test" in run_search(project, output, "--trials", "4", "--set", "student.steps=9")
        assert {path: path.stat().st_mtime_ns for path in output.glob("*/**/student.safetensors")} == made
    best = load_params(output / "best.yaml")
    assert best.evaluation == project.params.evaluation and best.student.steps == 9
    assert (output / "search.html").exists() and pq.read_table(output / "results.parquet").num_rows

    # --- another search does not mix with this one
    refused = run_search(project, output, "--trials", "4", "--set", "student.steps=18", code=2)
    assert "this folder holds a search with other parameters and steps" in refused
    (output / "space.yaml").write_text("losses.region: {choose: [0, 1]}\n")
    assert "with other space; choose" in run_search(project, output, "--trials", "4", "--set", "student.steps=9", code=2)


def test_what_cannot_be_searched_is_refused_before_a_trial(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "search"
    assert "--trials 1 --hours 1: choose one" in run_search(project, output, "--trials", "1", "--hours", "1", code=2)
    assert "space.yaml can be edited until the first trial; say how long" in run_search(project, output)
    assert [path.name for path in output.iterdir()] == ["space.yaml"]
    (tmp_path / "own.yaml").write_text("losses.pixle: {choose: [0, 1]}")
    said = run_search(project, output, "--trials", "1", "--space", str(tmp_path / "own.yaml"), code=2)
    assert "own.yaml: losses.pixle = 0: unknown key; nearest is 'pixel'" in said and not (output / "trials").exists()
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "run `pip install 'mgd-pipeline[search]'`" in run_search(project, output, "--trials", "1", code=1)
    monkeypatch.undo()
    os.rename(project.targets("deep"), tmp_path / "away.zarr")
    assert "deep.zarr" in run_search(project, output, "--trials", "1", code=4) and not (output / "trials").exists()


def test_a_search_whose_trials_all_fail_stops(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(*_: object) -> None:
        raise NonFiniteError("train-student distilled: not finite")

    monkeypatch.setattr(search_run, "attempt", _do)
    monkeypatch.setattr(search_run, "learn", learn)
    said = run_search(project, tmp_path / "search", "--trials", "9", code=1)
    assert "search: trial 2, 1 step: failed: train-student distilled: not finite" in said and "trial 3" not in said
    assert "search: the first trials all fail: train-student distilled: not finite; after a change remove" in said


def test_a_training_that_is_killed_is_a_failed_trial(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the training of trial 1 takes more memory than there is; the others are made up."""

    def attempt(work: Callable[[], None], log: Path, threads: int) -> Failure | None:
        return Failure(f"{log}: killed", killed=True) if log.parts[-3] == "0001" else _do(work, log, threads)

    def learn(_: object, __: object, config: Path, ___: str) -> None:
        for folder in (config.parent, config.parent / "test"):
            fake_training(folder, 0.3)

    monkeypatch.setattr(search_run, "attempt", attempt)
    monkeypatch.setattr(search_run, "learn", learn)
    monkeypatch.setattr("mgd_stages.stages.evaluate.evaluate", lambda *_, **__: None)
    folder = tmp_path / "search/trials/0001/1"
    said = " ".join(run_search(project, tmp_path / "search", "--trials", "3", "--set", "student.steps=1").split())
    reason = f"{folder / 'run.log'}: killed; remove {folder}, and the same command tries this training again"
    assert f"search: trial 1, 1 step: failed: {reason}" in said and "search: trial 2, 1 step: 30.0 %" in said


def test_good_students_become_teachers(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Students above the median of full length are cached, and later trials may listen to them. Trainings are made up."""
    output = project.base / "data/search"
    output.mkdir()
    (output / "space.yaml").write_text("losses.region: {choose: [0, 1, 5]}\n")

    def learn(_: object, __: object, config: Path, ___: str) -> None:
        made = open_project(config)
        made.student("distilled").parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(project.student("distilled"), made.student("distilled"))
        fake_training(config.parent, 0.3 + 0.1 * made.params.losses.region)

    with monkeypatch.context() as patch:
        patch.setattr(search_run, "attempt", _do)
        patch.setattr(search_run, "learn", learn)
        hours = ("--hours", str((8 * 12 + 6 * 12) / 3600 + 1e-6), "--self-teach", "--set", "student.steps=1")
        said = run_search(project, output, *hours)
    assert "search: 8 trials planned (about 8 x 1 steps), then 6 trainings" in said
    names = json.loads((output / "students.json").read_text())["students"]
    assert 1 <= len(names) <= 2 and f"search: the student of {names[0]} teaches from now on" in said
    listening = [path.parent for path in output.glob("trials/*/trial.json") if STUDENTS in json.loads(path.read_text())]
    heard = open_project(listening[0] / "1/params.yaml")
    assert heard.params.losses.pixel_teachers[:2] == ["wide", "deep"] and set(heard.params.losses.pixel_teachers[2:]) <= set(names)
    heard.student("distilled").unlink()
    search_run.learn(False, False, heard.base / "params.yaml", "cpu")
    assert set(read_metadata(heard.student("distilled"))["teachers"]) >= {*heard.params.losses.pixel_teachers}

    # --- best.yaml as the params.yaml of a copy of the project, whose trials are gone
    base = search_run._trial_parameters(project)
    search = Search(output, base, read_space(output / "space.yaml", base), (1,), "miou")
    search_run.write_best(project, search, Trial(9, {"losses.region": 5, STUDENTS: names[:1]}))
    copy = shutil.copytree(project.base, tmp_path / "copy", symlinks=True)
    shutil.rmtree(copy / "data/search/trials")
    os.rename(project.base, tmp_path / "away")
    shutil.copyfile(copy / "data/search/best.yaml", copy / "params.yaml")
    copied = open_project(copy / "params.yaml")
    assert copied.params.teachers[names[0]].weights == f"data/search/teachers/{names[0]}.safetensors"
    with pytest.raises(CacheError, match=f"{names[0]}.zarr: does not exist; run `mgd-pipeline precompute-teachers`"):
        train_student(copied, Machine(torch.device("cpu")))
    precompute_teachers(copied, names[0], device=torch.device("cpu"))
    train_student(copied, Machine(torch.device("cpu")))
    assert names[0] in read_metadata(copied.student("distilled"))["teachers"]
