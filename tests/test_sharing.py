"""Two members, two clones, one DVC cache: the teachers run once, and what is shared is read and never written.

Everything is real: git, DVC, the stages as processes, an S3 server (moto). Permission bits do not bind root, who runs some CI
machines: that nothing was written is therefore shown by hashes and times, not by an error that did not come.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import TINY, run, stages_run
from mgd_pipeline.caches.reader import open_cache
from mgd_pipeline.params_file import load_params
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

pytestmark = [
    pytest.mark.skipif(shutil.which("dvc", path=str(Path(sys.executable).parent)) is None, reason="dvc is an extra"),
    pytest.mark.timeout(600),
]
CPU = torch.device("cpu")
WITHOUT_TEACHERS = """#!{python}
import sys
for module in ("pipeline.teachers", "pipeline.training.live", "stages.stages.train_teacher", "stages.stages.precompute_teachers"):
    sys.modules[f"mgd_{module}"] = None  # importing it is an error from here on
from mgd_stages.cli import app
app()
"""
"""`mgd-pipeline` of a member who has no code that trains or runs a teacher."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lab/one, the first member's project, finished and committed; lab/cache, the cache of all; lab/bin, see WITHOUT_TEACHERS."""
    lab = tmp_path_factory.mktemp("lab")
    project, cache, program = lab / "one", lab / "cache", lab / "bin/mgd-pipeline"
    init_project("shapes", None, "1/4", project)
    (project / "params.yaml").write_text(render_params(load_params(project / "params.yaml", TINY)), encoding="utf-8")
    run(project, "git", "init", "-q")
    run(project, "dvc", "init", "-q")
    cache.mkdir()
    run(project, "dvc", "cache", "dir", str(cache))
    run(project, "dvc", "config", "cache.shared", "group")
    run(project, "dvc", "config", "cache.type", "hardlink,symlink")
    assert "precompute-teachers@deep" in stages_run(run(project, "dvc", "repro"))
    run(project, "git", "add", ".")
    run(project, "git", "commit", "-q", "-m", "teachers and their targets")
    program.parent.mkdir()
    program.write_text(WITHOUT_TEACHERS.format(python=sys.executable))
    program.chmod(0o755)
    return lab


@pytest.fixture
def clone(lab: Path, tmp_path: Path) -> Path:
    """A second member's clone of lab/one, with nothing but what git has."""
    run(tmp_path, "git", "clone", "-q", str(lab / "one"), "two")
    assert not (tmp_path / "two/data").exists()
    return tmp_path / "two"


def without_teachers(lab: Path) -> dict[str, str]:
    return {"PATH": os.pathsep.join([str(lab / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])}


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


def test_the_second_member_computes_no_teacher(lab: Path, clone: Path, tmp_path: Path) -> None:
    before = contents(lab / "cache")
    change_student(clone, 5.0)
    assert stages_run(run(clone, "dvc", "repro", **without_teachers(lab))) == {"train-student", "evaluate", "report"}
    after = contents(lab / "cache")
    assert before.items() <= after.items() and len(after) > len(before), "objects are added, none is changed"
    assert run(clone, "git", "status", "--porcelain").split() == ["M", "dvc.lock", "M", "params.yaml"]

    # A third member asks for the same student, and nobody trains again.
    run(tmp_path, "git", "clone", "-q", str(lab / "one"), "three")
    change_student(tmp_path / "three", 5.0)
    assert stages_run(run(tmp_path / "three", "dvc", "repro")) == set()
    student = "data/students/distilled/student.safetensors"
    assert (tmp_path / "three" / student).read_bytes() == (clone / student).read_bytes()


def test_a_checkout_is_complete(clone: Path) -> None:
    """Metrics and plots too: git ignores data/, so what DVC does not keep is nowhere."""
    run(clone, "dvc", "checkout")
    assert "up to date" in run(clone, "dvc", "status")
    assert run(clone, "git", "status", "--porcelain") == ""


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_a_bare_clone_pulls_targets_and_trains(
    kind: str, lab: Path, clone: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    address = request.getfixturevalue("s3_server") if kind == "s3" else None
    environment = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    for project in (lab / "one", clone):
        url = "s3://lab/mgd" if address else str(tmp_path / "remote")
        run(project, "dvc", "remote", "add", "--local", "-f", "-d", "store", url)
        if address:
            run(project, "dvc", "remote", "modify", "--local", "store", "endpointurl", address)
    run(lab / "one", "dvc", "push", **environment)
    environment |= without_teachers(lab)

    run(clone, "dvc", "cache", "dir", "--local", ".dvc/cache")
    change_student(clone, 6.0)
    repro = ["dvc", "repro", "--pull", "--allow-missing"]
    assert stages_run(run(clone, *repro, "train-student", **environment)) == {"train-student"}
    assert {path.name for path in (clone / "data").iterdir()} == {"raw", "manifest", "targets", "students", "results"}
    assert stages_run(run(clone, *repro, **environment)) == {"evaluate", "report"}
    assert not (clone / "data/teachers").exists()
    weights = {hashlib.md5(path.read_bytes()).hexdigest() for path in (lab / "one/data/teachers").iterdir()}
    pulled = {path.parent.name + path.name for path in (clone / ".dvc/cache/files/md5").rglob("*") if path.is_file()}
    assert len(weights) == 2 and len(pulled) > 50 and not weights & pulled, "not in the clone's cache either"


def test_a_linked_data_set_may_lie_elsewhere(lab: Path, tmp_path: Path) -> None:
    """Nobody pushes a linked data set; each member links a copy, and neither path is in anything that is shared."""
    first, second, remote = tmp_path / "anna/street", tmp_path / "ben/street", tmp_path / "remote"
    one, two = tmp_path / "one", tmp_path / "two"
    for copy in (first, second):
        shutil.copytree(lab / "one/data/raw/shapes", copy)
    init_project("folder", first, "1/4", one)
    tiny = [setting for setting in TINY if not setting.startswith("data.")]
    random = [f"{network}.encoder_weights=none" for network in ("teachers.wide", "teachers.deep", "student.network")]
    (one / "params.yaml").write_text(render_params(load_params(one / "params.yaml", [*tiny, *random])), encoding="utf-8")
    run(one, "git", "init", "-q")
    run(one, "dvc", "init", "-q")
    run(one, "dvc", "remote", "add", "-d", "store", str(remote))
    run(one, "dvc", "repro", "train-student")
    run(one, "dvc", "push")
    run(one, "git", "add", ".")
    run(one, "git", "commit", "-q", "-m", "targets")

    run(tmp_path, "git", "clone", "-q", str(one), "two")
    (two / "data/raw").mkdir(parents=True)
    (two / "data/raw/folder").symlink_to(second)
    (second / ".DS_Store").write_bytes(b"x")  # the copies differ in what is no image: prepare-data looks, and finds nothing new
    change_student(two, 6.0)
    output = run(two, "dvc", "repro", "--pull", "--allow-missing", "train-student", **without_teachers(lab))
    assert stages_run(output) == {"prepare-data", "train-student"}
    shared = [one / "dvc.lock", *(path for path in remote.rglob("*") if path.is_file())]
    assert not [path for path in shared if str(tmp_path).encode() in path.read_bytes()]


def link_to_cache(path: Path) -> str:
    if path.is_symlink():
        return "symlink"
    return "hardlink" if path.stat().st_nlink > 1 else "copy"


@pytest.mark.parametrize(
    ("cache_type", "made"),
    [
        ("copy", "copy"),
        ("hardlink", "hardlink"),
        ("symlink", "symlink"),
        ("hardlink,symlink", "hardlink"),
        ("reflink", "copy"),  # looks like a copy, but shares its blocks
    ],
)
def test_linked_stores_are_read_and_never_written(cache_type: str, made: str, lab: Path, clone: Path, tmp_path: Path) -> None:
    if cache_type == "reflink":
        (tmp_path / "a").write_bytes(b"x")
        if subprocess.run(["cp", "--reflink=always", "a", "b"], cwd=tmp_path, capture_output=True).returncode:
            pytest.skip("this file system has no reflinks")
    run(clone, "dvc", "config", "--local", "cache.type", cache_type)
    run(clone, "dvc", "checkout")
    project = open_project(clone / "params.yaml", ["losses.region=7.0"])
    caches = [project.targets(name) for name in project.params.teachers]
    for folder in caches:
        assert {link_to_cache(path) for path in folder.rglob("*") if path.is_file()} == {made}
    before = [contents(folder) for folder in (lab / "cache", *caches)]

    for folder in caches:
        cache = open_cache(folder)
        assert len(cache.read(cache.index.rows).logits) == 24
        cache.close()
    student = project.student("distilled").read_bytes()
    train_student(project, Machine(CPU, resume=False))
    assert project.student("distilled").read_bytes() != student
    assert [contents(folder) for folder in (lab / "cache", *caches)] == before


def test_stages_called_by_hand_replace_links_and_write_through_none(lab: Path, clone: Path) -> None:
    """Each with other parameters, so that every output differs from what the link leads to."""
    run(clone, "dvc", "config", "--local", "cache.type", "symlink")
    run(clone, "dvc", "checkout")
    before, linked = contents(lab / "cache"), contents(clone / "data")
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


def test_a_read_only_store_is_enough(lab: Path, clone: Path) -> None:
    """Manifest, data set and targets on a read-only share: 0444 files in 0555 folders; only results are written."""
    project = open_project(clone / "params.yaml")
    shared = [clone / f"data/{name}" for name in ("manifest", "raw", "targets")]
    for folder in shared:
        shutil.copytree(lab / "one" / folder.relative_to(clone), folder)
    paths = [path for folder in shared for path in (folder, *folder.rglob("*"))]
    before = [contents(folder) for folder in shared]
    names = sorted(paths)
    try:
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        times = [path.stat().st_mtime_ns for path in names]
        train_student(project, Machine(CPU, resume=False))
        assert sorted(path for folder in shared for path in (folder, *folder.rglob("*"))) == names
        assert [path.stat().st_mtime_ns for path in names] == times, "nor did a temporary file come and go"
        assert [contents(folder) for folder in shared] == before
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert project.student("distilled").is_file()
