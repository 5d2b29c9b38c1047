"""doctor: says that a good project is good, and names each planted fault and its remedy, without stumbling over any."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import re
import shutil
import warnings
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from conftest import run as shell
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.networks import encoders as networks
from mgd_stages.cli import app
from mgd_stages.doctor import data as doctor_data
from mgd_stages.doctor import dvc as doctor_dvc
from mgd_stages.doctor.checks import Check
from mgd_stages.doctor.dvc import dvc_cache, link_types
from mgd_stages.doctor.machine import devices, versions
from mgd_stages.doctor.run import look
from mgd_stages.projects.init import QUICK, init_project
from mgd_stages.run import progress
from mgd_stages.run.project import Project, open_project
from test_init import folder_tree


def invoke(base: Path, command: str, *arguments: str) -> Any:
    return CliRunner().invoke(app, [command, "--config", str(base / "params.yaml"), *arguments])


def run(base: Path, *arguments: str) -> Any:
    return invoke(base, "doctor", *arguments)


def faults(base: Path, *overrides: str) -> list[Check]:
    """What is not ok in a project, but for the machine that the tests run on and for its having no repository."""
    checks = look(base / "params.yaml", overrides, quiet=True)
    return [check for check in checks if check.mark != "ok" and check.area not in ("versions", "devices", "dvc")]


def fault(base: Path, *overrides: str) -> Check:
    """The only one."""
    (check,) = faults(base, *overrides)
    return check


def said(base: Path, *overrides: str) -> str:
    return "\n".join(str(check) for check in look(base / "params.yaml", overrides, quiet=True))


def repository(base: Path, config: str = "") -> None:
    """What `git init` and `dvc init` make."""
    shell(base, "git", "init")
    (base / ".dvc").mkdir()
    (base / ".dvc/config").write_text(config)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def free(monkeypatch: pytest.MonkeyPatch, most: int, targets: int | None = None) -> None:
    """Bytes that are free on every disk, and on the one of the targets."""
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=most if targets is None or path.name != "targets" else targets)
    )


def picture(path: Path, value: int, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)


def test_a_good_project(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(project.base, "[cache]\n    type = hardlink,symlink\n    dir = shared\n")
    free(monkeypatch, 10**10)  # else others may write to this disk between the two runs that are compared below
    before = {path for path in project.base.rglob("*") if ".dvc/tmp" not in str(path)}
    result = run(project.base)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and lines[-1].endswith("problems: 0")
    assert [line for line in lines if line.startswith(("warning", "problem")) and " devices: " not in line] == []
    for words in (
        "versions: Python 3.",
        "params.yaml is valid: shapes, partition 1/4, teachers wide, deep",
        "data: shapes, 9 classes: 24 train images (6 labelled, 18 unlabelled), 2 val, 5 test",
        "data: all 31 images and their masks were read in full, nothing is wrong with them",
        "data: images of 72 x 48 pixels (width x height)",
        "data: pixels of all 6 labelled masks: background 5",
        "wide.safetensors fits deeplabv3plus with tu-test_resnet and the 9 classes",
        "deep.safetensors fits fpn with tu-test_efficientnet and the 9 classes",
        "disk: no targets are left to compute; 10.00 GB are free in .mgd/work, 10.00 GB in data",
        "disk: .mgd/work and data/targets are on one file system",
        f"cache {project.base / '.dvc/shared'}, cache.type hardlink,symlink: files are linked by hardlink",
    ):
        assert sum(line.startswith("ok ") and words in line for line in lines) == 1, words
    assert {path for path in project.base.rglob("*") if ".dvc/tmp" not in str(path)} == before, "it changes nothing"

    printed = json.loads(run(project.base, "--json").stdout)
    kept = [line for line in lines if line.startswith(("ok ", "warning", "problem"))]
    assert [str(Check(**check)) for check in printed["checks"]] == kept
    assert printed["problem"] == 0 and printed["ok"] == sum(check["mark"] == "ok" for check in printed["checks"])


def test_weights_that_are_missing_or_damaged(project: Project) -> None:
    wide = project.teacher("wide")
    content = wide.read_bytes()
    wide.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    damaged = str(fault(project.base))
    assert damaged.startswith("problem ") and str(wide) in damaged and "is damaged" in damaged and run(project.base).exit_code == 1
    wide.unlink()
    assert faults(project.base) == [], "train-teacher will make it"
    assert "teachers.wide is not trained yet: `mgd-pipeline train-teacher --teacher wide` makes" in said(project.base)
    missing = f"teachers.wide.weights: {wide}: no such file; put it there, or name wide in train_teachers"
    assert str(fault(project.base, "train_teachers=[deep]")) == f"problem  weights: {missing}"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["student.network.encoder_weights=gone.safetensors"],
            "gone.safetensors: no such file; put the state dict of tu-test_effi",
        ),
        (
            [f"student.network.{part}" for part in ("decoder=fpn", "decoder_channels=32", "encoder=tu-mobilevitv2_050")],
            "student.network: decoder fpn cannot see 64 x 96 pixels with encoder tu-mobilevitv2_050",
        ),
        (
            [
                "teachers.wide={timm: resnet10t, weights: data/teachers/x.safetensors, fixed_size: resize}",
                "losses.pixel_teachers=[deep]",
            ],
            "teachers.wide.fixed_size: resize is for networks of one input size, and this one takes every size",
        ),
        (
            ["teachers.wide.decoder=deeplabv3plus", "teachers.wide.encoder=vgg11_bn"],
            "teachers.wide: decoder deeplabv3plus cannot be built with encoder vgg",
        ),
    ],
)
def test_networks_that_cannot_be_used_are_named(project: Project, overrides: list[str], words: str) -> None:
    """Of the student and of every teacher; a published teacher before it is fetched."""
    crop = ["views.crop=[64,64]"] if "mobilevit" in words else []
    problem = str(fault(project.base, *overrides, *crop))
    assert problem.startswith("problem  weights: ") and words in problem


def test_weights_of_the_hub_are_neither_fetched_nor_waited_for(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise AssertionError("doctor went to the network")

    monkeypatch.setattr(networks, "reachable", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    imagenet = ("student.network.encoder=resnet18", "student.network.encoder_weights=imagenet")
    absent = fault(project.base, *imagenet)
    assert absent.mark == "warning" and absent.found == "student.network: ImageNet weights of resnet18 are not on this machine"
    assert "copy a connected machine's hub cache" in absent.remedy
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fault(project.base, *imagenet).mark == "problem"


def test_a_teacher_of_other_classes_or_of_another_partition(project: Project) -> None:
    another = "warning  data: the manifest has another partition than params.yaml asks for now; run `mgd-pipeline prepare-data`"
    assert another in said(project.base, "data.partition_seed=3")
    subsets = read_manifest(project.manifest, project.base).subsets
    others = sorted(image_id for image_id, subset in subsets.items() if subset == "unlabelled")[:6]
    (project.base / "other.txt").write_text("\n".join(others))
    other = "data.partition={labelled: other.txt}"
    assert invoke(project.base, "prepare-data", "--set", other).exit_code == 0
    wide, deep = map(str, faults(project.base, other))
    assert wide.startswith("problem  weights: teachers.wide") and deep.startswith("problem  weights: teachers.deep")
    remedy = "run `mgd-pipeline train-teacher --teacher wide`, or set losses.other_partition"
    assert f"was trained on the labels of another partition; {remedy}" in wide
    assert faults(project.base, other, "losses.other_partition=true") == []


def test_damaged_and_changed_images(project: Project) -> None:
    root = project.base / "data/raw/shapes"
    broken, changed = root / "images/train/train_00003.png", root / "images/val/val_00001.png"
    broken.write_bytes(broken.read_bytes()[:200])
    Image.new("RGB", (72, 48)).save(changed)
    first, second = map(str, faults(project.base))
    assert first.startswith(f"problem  data: {broken}: cannot be decoded")
    assert first.endswith("; the file is damaged, replace or remove it")
    assert second.startswith(f"problem  data: {changed}: image or mask has changed") and "`mgd-pipeline prepare-data`" in second
    assert run(project.base).exit_code == 1
    remove(project.manifest)
    assert str(fault(project.base)) == first, "without a manifest, too"


def test_files_that_dvc_cannot_read(project: Project) -> None:
    images = project.base / "data/raw/shapes/images"
    (images / ".#lock").symlink_to("gone")
    (images / "more").symlink_to(project.results)
    dangling, folder = faults(project.base)
    assert (dangling.mark, folder.mark) == ("warning", "warning"), "without DVC the files do no harm"
    assert dangling.found.startswith(f"{images}/.#lock: is a link that leads to no file")
    assert folder.found.startswith(f"{images}/more: is a link to a folder, and `dvc repro` does not notice")
    (project.base / ".dvc").mkdir()
    assert [check.mark for check in faults(project.base)] == ["problem", "warning"]


def test_a_sample_is_said_to_be_one_and_many_bad_files_are_summed_up(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 10**12)  # it is said, too, and changes with whatever else this machine does
    with monkeypatch.context() as patched:
        patched.setattr(doctor_data, "_SAMPLE", 8)
        lines = said(project.base)
        sample = "a sample of 8 of the 31 images and their masks were read in full"
        assert f"{sample}, nothing is wrong with them (--full reads all)" in lines
        assert "pixels of 4 of the 6 labelled masks" in lines and said(project.base) == lines, "seeded"
        assert "all 31 images" in run(project.base, "--full").stdout
    for path in (project.base / "data/raw/shapes/images/train").iterdir():
        path.write_bytes(b"no image")
    checks = faults(project.base)
    assert len([check for check in checks if "not a readable image" in check.found]) == 10
    assert checks[10].found == "... and 14 more files" and "--on-error skip" in checks[10].remedy


def test_a_disk_that_is_too_small(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    remove(project.base / "data/targets")
    remove(project.base / ".mgd/work")
    assert faults(project.base) == []
    # What is built in .mgd/work ends in data/targets: the smaller of the two decides.
    (project.base / "data/targets").mkdir()
    free(monkeypatch, 10**9, 100_000)
    assert fault(project.base).mark == "problem"
    free(monkeypatch, 100_000, 10**9)
    small = fault(project.base)
    needed, _, shown = small.found.partition("; ")
    assert small.mark == "problem" and needed.startswith("targets to make: ") and "wide" in needed and "deep" in needed
    assert shown.startswith("100.0 kB are free in .mgd/work")
    assert small.remedy.startswith("free some (`mgd-pipeline cache gc`") and "targets.stride 8" in small.remedy
    # The stage itself refuses, for one teacher, with the same remedy.
    result = invoke(project.base, "precompute-teachers", "--device", "cpu")
    assert result.exit_code == 3 and small.remedy in result.stderr
    remove(project.manifest)
    assert fault(project.base).found.partition("; ")[0] == needed, "the data set itself says as much"
    monkeypatch.setattr(doctor_data, "_SAMPLE", 8)
    estimated = fault(project.base).found
    about, exactly = (float(re.findall(r"([\d.]+) MB", text)[0]) for text in (estimated, needed))
    assert estimated.startswith("targets to make: about ") and about == pytest.approx(exactly, rel=0.2)


def test_targets_on_another_file_system(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed that could not be moved to its place afterwards."""
    rename = os.rename

    def between_disks(source: Path, target: Path) -> None:
        if Path(target).is_relative_to(project.base / "data/targets") and not Path(source).is_relative_to(project.base / "data"):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target)

    monkeypatch.setattr(os, "rename", between_disks)
    there = f"{project.base / '.mgd/work'} and {project.base / 'data/targets'} are on different file systems"
    apart = fault(project.base)
    assert apart.mark == "problem" and apart.found.startswith(there)
    assert apart.remedy == "link .mgd and data to folders of the same disk, or move the whole project there"
    remove(project.targets("wide"))
    remove(project.base / ".mgd/work")
    result = invoke(project.base, "precompute-teachers", "--device", "cpu")
    assert result.exit_code == 1 and f"error: {there}" in result.stderr and apart.remedy in result.stderr
    assert "images" not in result.stdout and not list(project.base.rglob(".write-test*"))
    # What is complete may lie on another disk, or on one that nobody may write to.
    result = invoke(project.base, "precompute-teachers", "--teacher", "deep")
    assert result.exit_code == 0 and "targets of deep: all images were there already" in result.stdout


def dvc_faults(base: Path) -> list[tuple[str, str, str]]:
    checks = look(base / "params.yaml", [], quiet=True)
    return [(check.mark, check.found, check.remedy) for check in checks if check.area == "dvc" and check.mark != "ok"]


def test_no_repository(tmp_path: Path) -> None:
    init_project("shapes", None, "1/8", tmp_path)
    (tmp_path / "dvc.yaml").unlink()
    (file, git) = dvc_faults(tmp_path)
    assert file[:2] == ("warning", f"{tmp_path / 'dvc.yaml'}: no such file") and "mgd-pipeline dvc-yaml" in file[2]
    assert git[:2] == ("warning", f"{tmp_path} is in no git repository") and git[2].startswith("git init && dvc init")
    shell(tmp_path, "git", "init")
    assert dvc_faults(tmp_path)[1][1].endswith("but in no DVC repository") and dvc_faults(tmp_path)[1][2].startswith("dvc init,")


def test_right_after_installation_nothing_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that somebody names must be there."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0 and "problem  params" not in result.stdout
    assert f"ok       params: no project is here ({tmp_path / 'params.yaml'}): `mgd-pipeline init` begins one" in result.stdout
    assert json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["problem"] == 0
    assert CliRunner().invoke(app, ["doctor", "--config", "typo.yaml"]).exit_code == 2
    os.symlink("gone.yaml", "params.yaml")
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 2


def test_what_a_project_has_not_made_yet_is_no_problem(project: Project) -> None:
    """The stages of a project's life, from the end back to the beginning."""
    for made in (
        ["results", "students", "targets"],
        ["teachers/deep.safetensors"],
        ["teachers/wide.safetensors", "manifest"],
        ["raw"],
    ):
        for name in made:
            remove(project.base / "data" / name)
        assert faults(project.base) == [], made


def test_invalid_params_exit_2_after_the_machine_was_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init_project("shapes", None, "1/8", tmp_path)
    result = run(tmp_path, "--set", "studet=1", "--set", "student.steps=0")
    assert result.exit_code == 2
    problems = [line for line in result.stdout.splitlines() if line.startswith("problem")]
    assert problems == [
        "problem  params: --set student.steps=0: must be greater than 0",
        "problem  params: --set studet=1: unknown key; nearest is 'student'",
    ]
    assert "versions: Python" in result.stdout
    # --quiet leaves what the doctor was called for
    monkeypatch.setattr(progress.console, "quiet", False)  # as it is found afterwards
    line = ["--quiet", "doctor", "--config", str(tmp_path / "params.yaml"), "--set", "seed=-1"]
    assert "problem  params: --set seed=-1" in CliRunner().invoke(app, line).stdout
    assert json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)["problem"] == 1
    (tmp_path / "params.yaml").unlink()
    assert run(tmp_path).exit_code == 2 and "`mgd-pipeline init`" in run(tmp_path).stdout


def test_a_fresh_project_of_ones_own_images(tmp_path: Path) -> None:
    for number, split in enumerate(["train"] * 8 + ["val"]):
        picture(tmp_path / f"own/images/{split}/{number}.png", 10 * number, (20, 30))
        picture(tmp_path / f"own/masks/{split}/{number}.png", number % 2, (20, 30))
    init_project("folder", tmp_path / "own", "1/4", tmp_path / "fresh")
    lines = said(tmp_path / "fresh", "student.network.encoder_weights=none", "evaluation.split=test")
    for line in (
        "data: there is no manifest yet: `mgd-pipeline prepare-data` makes it",
        "data: fresh, 2 classes: 8 train images (2 labelled, 6 unlabelled), 1 val, 0 test",
        "weights: teachers.deep is not trained yet: `mgd-pipeline train-teacher --teacher deep` makes",
        "disk: targets to make: ",
    ):
        assert f"ok       {line}" in lines
    assert re.findall("^problem +(.*?;)", lines, re.M) == ["data: evaluation.split is test, which has no images;"]

    (tmp_path / "own").rename(tmp_path / "moved")
    assert "folder: is a link to " in said(tmp_path / "fresh")
    init_project("shapes", None, "1/8", tmp_path / "built-in")
    assert "scenes is not there yet: `mgd-pipeline prepare-data` renders it" in said(tmp_path / "built-in")
    assert run(tmp_path / "built-in").exit_code == 0


@pytest.mark.parametrize(
    ("broken", "area", "how"),
    [
        ("data/manifest/images.parquet", "data", "garbage"),
        ("data/manifest/partition.parquet", "data", "folder"),
        ("data/teachers/deep.safetensors", "weights", "garbage"),
        ("data/teachers/deep.safetensors", "weights", "folder"),
        ("data/targets/wide.zarr", "disk", "garbage"),
        ("data/targets/wide.zarr", "disk", "folder"),
        ("data/raw/shapes", "data", "garbage"),
    ],
)
def test_it_never_stumbles_over_a_broken_project(project: Project, broken: str, area: str, how: str) -> None:
    path = project.base / broken
    remove(path)
    path.write_bytes(b"garbage") if how == "garbage" else path.mkdir()
    result = run(project.base)
    assert result.exit_code == 1, result.exception
    lines = result.stdout.splitlines()
    assert any(line.startswith(f"problem  {area}: ") and str(path) in line for line in lines), result.stdout
    assert "checks, warnings: " in lines[-1]
    assert {"versions", "devices", "params", "disk", "dvc"} <= {line[9:].partition(":")[0] for line in lines}, "all was looked at"


@pytest.mark.parametrize(
    ("denied", "area"),
    [
        ("params.yaml", "params"),
        ("data/manifest", "data"),
        ("data/raw/shapes", "data"),
        ("data/raw/shapes/images/train/train_00003.png", "data"),
        ("data/teachers", "weights"),
        ("data/targets", "disk"),
        ("dvc.yaml", "dvc"),
    ],
)
def test_what_may_not_be_read_is_a_line_with_its_remedy(
    project: Project, monkeypatch: pytest.MonkeyPatch, denied: str, area: str
) -> None:
    """Tests may run as root, whom no mode keeps out: so each call that names a path there is refused."""

    def refuse(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if f"{path}/".startswith(f"{project.base / denied}/"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr(owner, name, call)

    for owner, names in ((os, ("stat", "lstat", "open", "scandir", "statvfs")), (io, ("open",)), (builtins, ("open",))):
        for name in names:
            refuse(owner, name)
    result = run(project.base)
    assert isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.stdout.splitlines() if not line.startswith("doctor: read")]
    refused = [line for line in lines if "ermission denied" in line]
    assert result.exit_code == (2 if area == "params" else 1)
    assert any(line.startswith(f"problem  {area}: ") and f"{project.base / denied}" in line for line in refused), result.stdout
    assert all("; check " in line for line in refused) and len(set(lines)) == len(lines)
    assert lines[-1].startswith(f"{len(lines) - 1} checks, ")


def test_a_disk_that_vanished(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(shutil, "disk_usage", gone)
    lost, remedy = f"{project.base}/.mgd/work: Input/output error", "check its permissions and the disk"
    assert str(fault(project.base)) == f"problem  disk: {lost}; {remedy}"
    monkeypatch.undo()
    monkeypatch.setattr(doctor_dvc, "link_types", lambda cache, place: gone(place))
    repository(project.base)
    assert dvc_faults(project.base) == [("problem", lost, remedy)]


# --- DVC and the machine


def test_settings_of_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dvc itself says the settings, in about a second; that it is asked is shown on a good project and on a broken file."""
    init_project("shapes", None, "1/8", tmp_path / "street")
    project, cache = open_project(tmp_path / "street/params.yaml"), tmp_path / "cache"
    monkeypatch.setattr(doctor_dvc, "link_types", lambda *_: ["hardlink", "symlink", "copy"])

    def said(cache: Path, **settings: str) -> list[str]:
        checks = dvc_cache(project, project.base, cache, {f"cache.{key}": value for key, value in settings.items()})
        return [str(check) for check in checks if check.mark != "ok"]

    own, links = project.base / ".dvc/cache", "; dvc config cache.type hardlink,symlink"
    only_copy = (
        f"cache {own}, cache.type reflink,copy (the default): only copy works here, so every teacher cache takes its space twice"
    )
    assert said(own) == [f"warning  dvc: {only_copy}{links}"]
    (none,) = said(own, type="reflink")
    assert none.startswith("problem ") and "none of them works between cache and project" in none and none.endswith(links)
    assert said(own, type="hardlink,symlink") == []

    cache.mkdir(mode=0o755)
    ours, alone = said(cache, type="hardlink")
    assert f"dvc: {cache} lies outside of the project" in ours and ours.endswith("dvc config cache.shared group")
    assert "dvc: cache.type hardlink alone" in alone and alone.endswith(links)
    (mode,) = said(cache, type="hardlink,symlink", shared="group")
    assert "its mode is 755" in mode and f"; chmod -R 2775 {cache}" in mode
    cache.chmod(0o2775)
    assert said(cache, type="hardlink,symlink", shared="group") == []
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)
    (closed,) = said(cache)
    assert closed.startswith("problem ") and "you may not write there" in closed


CONFLICT = "<<<<<<< HEAD\na: 1\n=======\na: 2\n>>>>>>> other\n"


def test_files_of_dvc_that_are_broken_or_in_conflict(tmp_path: Path) -> None:
    init_project("shapes", None, "1/8", tmp_path)
    repository(tmp_path, "[cache\n")
    (broken,) = dvc_faults(tmp_path)
    assert broken[0] == "problem" and broken[1].startswith(f"{tmp_path / '.dvc/config'}: ") and broken[2].startswith("correct it")
    names = ["dvc.lock", "dvc.yaml", ".dvc/config", ".dvc/config.local"]
    for name in names:
        (tmp_path / name).write_text(CONFLICT)
    remedies = {fact: remedy for mark, fact, remedy in dvc_faults(tmp_path) if mark == "problem"}
    for name in names:
        remedy = remedies[f"{tmp_path / name}: a merge left <<<<<<< in line 1, ======= in line 3, >>>>>>> in line 5"]
        assert remedy.startswith("git checkout --ours dvc.lock && dvc repro" if name == "dvc.lock" else "keep one version")
    assert run(tmp_path).exit_code == 1
    (tmp_path / "params.yaml").write_text(CONFLICT)
    result = run(tmp_path)
    named = {line.partition(": a merge left")[0] for line in result.stdout.splitlines() if ": a merge left" in line}
    assert (
        result.exit_code == 2
        and {f"problem  params: {tmp_path / 'params.yaml'}", f"problem  dvc: {tmp_path / 'dvc.yaml'}"} <= named
    )


def test_experiments_in_a_copy_are_told_what_they_lack(tmp_path: Path) -> None:
    """As docs/sharing.md says; DVC's own message comes before any code of ours."""
    base = tmp_path / "project"
    init_project("folder", folder_tree(tmp_path / "source", ("train", "val", "test")), "1/2", base, preset_name=QUICK)
    repository(base)
    for overrides, options in (
        ([], "need -C data/raw,"),
        (["train_teachers=[wide]", "teachers.deep.weights=data/own/deep.safetensors"], "need -C data/raw -C data/own,"),
    ):
        (line,) = [str(check) for check in look(base / "params.yaml", overrides, quiet=True) if "dvc exp run --temp" in check.found]
        assert line.startswith("ok       dvc: ") and options in line


def test_links_are_tried_and_leave_nothing(tmp_path: Path) -> None:
    assert {"hardlink", "symlink", "copy"} <= set(link_types(tmp_path, tmp_path)) <= {"reflink", "hardlink", "symlink", "copy"}
    assert list(tmp_path.iterdir()) == []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
        assert "hardlink" not in link_types(tmp_path, tmp_path)


def test_versions_that_are_too_old_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, old = metadata.version, {"zarr": "3.0.1", "dvc": "3.1", "dask": ""}

    def version(name: str) -> str:
        if old.get(name) == "":
            raise metadata.PackageNotFoundError(name)
        return old.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    wanted = ["zarr>=3.1", "dask>=2025.1", "torch>=2.11", "dvc>=3.67; extra == 'dvc'", "nowhere-to-be-found>=1; extra == 'bench'"]
    monkeypatch.setattr(metadata, "requires", lambda _: wanted)
    lines = [str(check) for check in versions()]
    assert lines[:3] == [
        "problem  versions: zarr 3.0.1 is here, >=3.1 is needed; pip install 'zarr>=3.1'",
        "problem  versions: dask is not installed; pip install 'dask>=2025.1'",
        "warning  versions: dvc 3.1 is here, >=3.67 is needed; pip install 'dvc>=3.67'",
    ]
    assert len(lines) == 4 and lines[3].startswith("ok       versions: Python 3.")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    first, second = devices()
    assert first.mark == "ok" and "CPU cores" in first.found and "GB of memory" in first.found
    assert second.mark == "warning" and second.found.startswith("torch is built for CUDA 13.2, but finds ")
    assert second.remedy.startswith("install NVIDIA's driver, or go on with the CPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [str(check) for check in devices()][1] == (
        "warning  devices: no GPU: CUDA_VISIBLE_DEVICES is ''; unset it, or go on with the CPU"
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    assert next(check.mark for check in devices()) == "ok"

    def warns() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return True

    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "is_available", warns)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=140_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    assert [str(check) for check in devices()][1:] == [
        "ok       devices: cuda:0: NVIDIA H200, 140.0 GB",
        "warning  devices: torch says: The NVIDIA driver on your system is too old; install a torch that fits driver and GPU",
    ]

    def lost(_: int) -> None:
        raise RuntimeError("CUDA error: device lost\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lost)
    (said,) = [str(check) for check in devices()][1:]
    assert said.startswith("warning  devices: torch says: CUDA error: device lost CUDA kernel errors")
    assert said.endswith("; install a torch that fits driver and GPU")
