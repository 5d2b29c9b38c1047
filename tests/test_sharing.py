"""Under DVC: what is out of date runs, and nothing else; two members, two clones, one DVC cache: the teachers run once, and what is
shared is read and never written.

Everything is real: git, DVC, an S3 server (moto); most calls are forks of one process (`forks`). Permission bits do not bind root,
who runs some CI machines: that nothing was written is therefore shown by hashes and times, not by an error that did not come.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from conftest import TINY, Forks, as_folder, run, stages_run
from mgd_pipeline.data.shapes import CLASSES
from mgd_pipeline.params_file import load_params
from mgd_stages.projects.dvc_yaml import write_dvc
from mgd_stages.projects.init import init_project
from mgd_stages.projects.presets import render_params
from mgd_stages.reports.page import report
from mgd_stages.run.machine import Machine
from mgd_stages.run.project import open_project
from mgd_stages.stages.compare_teachers import compare_teachers
from mgd_stages.stages.evaluate import evaluate
from mgd_stages.stages.precompute_teachers import precompute_teachers
from mgd_stages.stages.prepare_data import prepare_data
from mgd_stages.stages.train_student import train_student
from mgd_stages.stages.train_teacher import train_teacher
from mgd_stages.whole.by_dvc import adopt_from_dvc
from mgd_stages.whole.records import Records
from mgd_stages.whole.run import run_project
from test_init import REPOSITORY

pytestmark = [
    pytest.mark.skipif(shutil.which("dvc", path=str(Path(sys.executable).parent)) is None, reason="dvc is an extra"),
    pytest.mark.timeout(600),
]
CPU = torch.device("cpu")
STUDENT = "data/students/distilled/student.safetensors"


def begin(project: Path, overrides: list[str]) -> None:
    """A project as `init` made it becomes a repository, with overrides in its params.yaml."""
    config = project / "params.yaml"
    config.write_text(render_params(load_params(config, overrides)), encoding="utf-8")
    run(project, "git", "init", "-q")
    run(project, "dvc", "init", "-q")


def commit(project: Path) -> None:
    run(project, "git", "add", ".")
    run(project, "git", "commit", "-q", "-m", "teachers and their targets")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """lab/one, the first member's project, finished and committed; lab/cache, the cache of all."""
    lab = tmp_path_factory.mktemp("lab")
    project, cache = lab / "one", lab / "cache"
    init_project("shapes", None, "1/4", project)
    begin(project, TINY)
    cache.mkdir()
    for setting in ("dir", str(cache)), ("shared", "group"), ("type", "hardlink,symlink"):
        forks.run(project, "dvc", "config", f"cache.{setting[0]}", setting[1])
    assert stages_run(forks.run(project, "dvc", "repro")) == {
        *(f"{stage}@{teacher}" for stage in ("train-teacher", "precompute-teachers") for teacher in ("wide", "deep")),
        *("prepare-data", "compare-teachers", "train-student", "train-student-supervised", "evaluate", "report"),
    }
    commit(project)
    return lab


def clone_of(project: Path, folder: Path) -> Path:
    """Another member's clone, with nothing but what git has."""
    run(folder.parent, "git", "clone", "-q", str(project), folder.name)
    assert not (folder / "data").exists() and not (folder / ".mgd").exists()
    return folder


@pytest.fixture
def clone(lab: Path, tmp_path: Path) -> Path:
    return clone_of(lab / "one", tmp_path / "two")


def change_student(project: Path, region: float) -> None:
    """Another weight of a loss: a student that nobody has trained yet."""
    text = (project / "params.yaml").read_text()
    changed, count = re.subn(r"^  region: .*$", f"  region: {region}", text, flags=re.MULTILINE)
    assert count == 1 and changed != text
    (project / "params.yaml").write_text(changed)


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 and time of the last change of every file below a folder, links followed."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert files
    return {
        path.relative_to(folder).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in files
    }


def test_another_student_runs_no_teacher_and_nobody_trains_it_again(lab: Path, clone: Path, tmp_path: Path, forks: Forks) -> None:
    """The second member's `dvc repro` runs the installed commands, each in a process of its own."""
    before = contents(lab / "cache")
    change_student(clone, 5.0)
    assert stages_run(run(clone, "dvc", "repro")) == {"train-student", "evaluate", "report"}
    after = contents(lab / "cache")
    assert before.items() <= after.items() and len(after) > len(before), "objects are added, none is changed"
    assert run(clone, "git", "status", "--porcelain").split() == ["M", "dvc.lock", "M", "params.yaml"]
    trained = (clone / STUDENT).read_bytes()

    third = clone_of(lab / "one", tmp_path / "three")
    change_student(third, 5.0)
    assert stages_run(forks.run(third, "dvc", "repro")) == set()
    assert (third / STUDENT).read_bytes() == trained

    run(clone, "git", "checkout", "params.yaml")
    assert stages_run(forks.run(clone, "dvc", "repro", "train-student")) == set(), "the way back is free"
    assert (clone / STUDENT).read_bytes() == (lab / "one" / STUDENT).read_bytes() != trained


def test_run_in_a_clone_believes_dvc_lock(clone: Path, capsys: pytest.CaptureFixture[str], forks: Forks) -> None:
    """`.mgd` stays with the member who made the files: without dvc.lock, `mgd-pipeline run` would train everything again."""
    forks.run(clone, "dvc", "checkout")
    project = open_project(clone / "params.yaml")
    records = Records(project)
    changed = open_project(clone / "params.yaml", ["losses.region=5.0"])
    adopt_from_dvc(changed, Records(changed))
    assert not any(map(records.has, records.stages.values())), "DVC knows the parameters of the file, not those of --set"
    before = contents(clone / "data")
    run_project(project, Machine(CPU))
    said = capsys.readouterr().out
    assert "10 stages are up to date by dvc.lock" in said and "runs, because" not in said
    assert contents(clone / "data") == before and all(map(records.has, records.stages.values()))

    shutil.rmtree(clone / ".mgd")
    change_student(clone, 5.0)
    run_project(open_project(clone / "params.yaml"), Machine(CPU))
    ran = {line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if "runs, because" in line}
    assert ran == {"train-student distilled", "evaluate", "report"}


def test_a_checkout_is_complete(clone: Path, forks: Forks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics and plots too: git ignores data/, so what DVC does not keep is nowhere."""
    forks.run(clone, "dvc", "checkout")
    assert "up to date" in forks.run(clone, "dvc", "status")
    assert stages_run(forks.run(clone, "dvc", "repro")) == set()
    assert run(clone, "git", "status", "--porcelain") == ""

    shown = forks.run(clone, "dvc", "metrics", "show")
    assert "distilled.miou" in shown and "crescent" not in shown, "what there is of every class is in plots"
    assert 10 < len(re.split(r"\s{2,}", shown.splitlines()[0].strip())) <= 30

    # Its page of plots, without a network: as docs/training.md has it.
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/training.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(clone)
    exec(compile(code, "docs/training.md", "exec"), {})
    forks.run(clone, "dvc", "config", "--local", "plots.html_template", "plots.html")
    forks.run(clone, "dvc", "plots", "show")
    page = (clone / "dvc_plots/index.html").read_text(encoding="utf-8")
    assert "<script src" not in page and "vegaEmbed" in page
    for name in ("teachers/wide-confusion.csv", "evaluation/class_iou.tsv", "train-student-distilled/plots/loss.tsv"):
        assert f"data/results/{name}" in page, name
    curves = [path.read_text(encoding="utf-8").splitlines()[1:] for path in (clone / "data/results").glob("train-*/plots/*.tsv")]
    steps = {line.split("\t")[0] for curve in curves for line in curve}
    assert set(re.findall(r'"step": "(\d+)"', page)) == steps, "and not the numbers of the lines, as DVC would have it"


def test_renaming_a_class_trains_nothing(finished_project: Path, tmp_path: Path, forks: Forks) -> None:
    shutil.copytree(finished_project, tmp_path / "project", symlinks=True)
    project = as_folder(open_project(tmp_path / "project/params.yaml", TINY), CLASSES)
    config = project.base / "params.yaml"
    config.write_text(render_params(project.params), encoding="utf-8")
    (project.base / "dvc.yaml").unlink()
    write_dvc(project)
    prepare_data(project)
    report(project)
    run(project.base, "git", "init", "-q")
    run(project.base, "dvc", "init", "-q")
    forks.run(project.base, "dvc", "commit", "-f", "-q")
    config.write_text(config.read_text().replace("star", "Stern"), encoding="utf-8")
    assert stages_run(forks.run(project.base, "dvc", "repro")) == {"prepare-data", "evaluate", "report"}
    assert "Stern" in (project.results / "evaluation/class_iou.tsv").read_text()


def test_a_bare_clone_pulls_targets_and_trains(lab: Path, clone: Path, forks: Forks, s3_server: str) -> None:
    environment = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    for project in (lab / "one", clone):
        forks.run(project, "dvc", "remote", "add", "--local", "-d", "store", "s3://lab/mgd")
        forks.run(project, "dvc", "remote", "modify", "--local", "store", "endpointurl", s3_server)
    forks.run(lab / "one", "dvc", "push", **environment)
    forks.run(clone, "dvc", "config", "--local", "cache.dir", ".dvc/cache")
    change_student(clone, 6.0)
    output = forks.run(clone, "dvc", "repro", "--pull", "--allow-missing", **environment)
    assert stages_run(output) == {"train-student", "evaluate", "report"}
    assert {path.name for path in (clone / "data").iterdir()} == {"raw", "manifest", "targets", "students", "results"}
    weights = {hashlib.md5(path.read_bytes()).hexdigest() for path in (lab / "one/data/teachers").iterdir()}
    pulled = {path.parent.name + path.name for path in (clone / ".dvc/cache/files/md5").rglob("*") if path.is_file()}
    assert len(weights) == 2 and len(pulled) > 50 and not weights & pulled, "not in the clone's cache either"


def test_a_linked_data_set_may_lie_elsewhere(lab: Path, tmp_path: Path, forks: Forks) -> None:
    """Nobody pushes a linked data set; each member links a copy, and neither path is in anything that is shared."""
    first, second, remote = tmp_path / "anna/street", tmp_path / "ben/street", tmp_path / "remote"
    for copy in (first, second):
        shutil.copytree(lab / "one/data/raw/shapes", copy)
    init_project("folder", first, "1/4", one := tmp_path / "one")
    random = [f"{network}.encoder_weights=none" for network in ("teachers.wide", "teachers.deep", "student.network")]
    begin(one, [*(setting for setting in TINY if not setting.startswith("data.")), *random])
    forks.run(one, "dvc", "remote", "add", "-d", "store", str(remote))
    forks.run(one, "dvc", "repro", "train-student")
    forks.run(one, "dvc", "push")
    commit(one)

    two = clone_of(one, tmp_path / "two")
    (two / "data/raw").mkdir(parents=True)
    (two / "data/raw/folder").symlink_to(second)
    (second / ".DS_Store").write_bytes(b"x")  # the copies differ in what is no image: prepare-data looks, and finds nothing new
    change_student(two, 6.0)
    output = forks.run(two, "dvc", "repro", "--pull", "--allow-missing", "train-student")
    assert stages_run(output) == {"prepare-data", "train-student"}
    shared = [one / "dvc.lock", *(path for path in remote.rglob("*") if path.is_file())]
    assert not [path for path in shared if str(tmp_path).encode() in path.read_bytes()]


def test_new_photos_train_no_teacher_again(lab: Path, tmp_path: Path, forks: Forks) -> None:
    """Three photos without labels compute three targets; a changed mask trains the teachers again; another choice does not."""
    photos, project = tmp_path / "photos", tmp_path / "project"
    shutil.copytree(lab / "one/data/raw/shapes", photos)
    for number in range(3):
        (photos / f"images/train/train_0000{number}.png").rename(tmp_path / f"{number}.png")
        (photos / f"masks/train/train_0000{number}.png").unlink()
    init_project("folder", photos, "1/1", project)
    random = [f"{network}.encoder_weights=none" for network in ("teachers.wide", "teachers.deep", "student.network")]
    begin(project, [*(setting for setting in TINY if not setting.startswith("data.")), *random, "teacher_training.method=cps"])
    wide = "precompute-teachers@wide"
    forks.run(project, "dvc", "repro", wide)

    for number in range(3):
        (tmp_path / f"{number}.png").rename(photos / f"images/train/new_{number}.png")
    output = forks.run(project, "dvc", "repro", wide)
    assert stages_run(output) == {"prepare-data", wide} and "targets of wide: 3 of 24 images computed" in output
    kept = "teacher wide is kept: it was trained with other unlabelled images (0 then, 3 now); `dvc repro --force --single-item "
    assert f"{kept}train-teacher@wide` trains it again" in " ".join(output.split())

    config = project / "params.yaml"
    for choice in ("new-images", "new-labels"):
        config.write_text(render_params(load_params(config, [f"retrain_teachers={choice}"])), encoding="utf-8")
        said = forks.run(project, "mgd-pipeline", "dvc-yaml")
        for command in re.findall("`(mgd-pipeline prepare-data)`, then `(dvc commit .*)`", said)[0]:
            forks.run(project, *command.split())
        assert stages_run(forks.run(project, "dvc", "repro", wide)) == set()

    (mask,) = (photos / "masks/train").glob("*00005.png")
    shutil.copy(photos / "masks/train/train_00006.png", mask)
    assert stages_run(forks.run(project, "dvc", "repro", wide)) == {"prepare-data", "train-teacher@wide", wide}


@pytest.mark.parametrize("link", ["hardlink", "symlink"])
def test_stages_called_by_hand_replace_links_and_write_through_none(link: str, lab: Path, clone: Path, forks: Forks) -> None:
    """The student trains from linked caches; then each stage has other parameters, and every output differs from the link's."""
    forks.run(clone, "dvc", "config", "--local", "cache.type", link)
    forks.run(clone, "dvc", "checkout")
    files = [path for path in (clone / "data/targets").rglob("*") if path.is_file()]
    assert all(path.is_symlink() if link == "symlink" else path.stat().st_nlink > 1 for path in files)
    before, linked = contents(lab / "cache"), contents(clone / "data")
    train_student(open_project(clone / "params.yaml", ["losses.region=7.0"]), Machine(CPU, resume=False))
    assert contents(clone / "data/targets").items() == contents(lab / "one/data/targets").items()

    project = open_project(
        clone / "params.yaml",
        ["data.render_seed=1", "data.partition=1/3", "seed=1", "targets.logits=float16", "evaluation.split=val"],
    )
    prepare_data(project)
    for name in project.params.teachers:
        train_teacher(project, name, Machine(CPU, resume=False))
        precompute_teachers(project, name, device=CPU)
    compare_teachers(project)
    for supervised_only in (False, True):
        train_student(project, Machine(CPU, resume=False), supervised_only=supervised_only)
    evaluate(project, device=CPU)
    report(project)
    written = contents(clone / "data")
    assert all(written.get(name) != entry for name, entry in linked.items()), "every output was made anew, or is no more"
    assert contents(lab / "cache") == before


def test_a_read_only_cache_is_enough(lab: Path, clone: Path) -> None:
    """Manifest, data set and targets on a read-only share: 0444 files in 0555 folders; only results are written."""
    shared = [clone / f"data/{name}" for name in ("manifest", "raw", "targets")]
    for folder in shared:
        shutil.copytree(lab / "one" / folder.relative_to(clone), folder)

    def state() -> object:
        times = {path: path.stat().st_mtime_ns for folder in shared for path in (folder, *folder.rglob("*"))}
        return times, [contents(folder) for folder in shared]

    paths = [path for folder in shared for path in (folder, *folder.rglob("*"))]
    try:
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = state()
        train_student(open_project(clone / "params.yaml"), Machine(CPU, resume=False))
        assert state() == before, "nor did a temporary file come and go"
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert (clone / STUDENT).is_file()
