"""doctor: says that a good project is good, and names each planted fault and its remedy, without stumbling over any."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from conftest import run as shell
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.networks import encoders as networks
from mgd_stages.cli import app
from mgd_stages.doctor import data as doctor_data
from mgd_stages.doctor import dvc as doctor_dvc
from mgd_stages.doctor.checks import Check
from mgd_stages.doctor.run import look
from mgd_stages.projects.init import init_project
from mgd_stages.run import progress
from mgd_stages.run.project import Project


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


def in_a_repository(project: Project) -> None:
    shell(project.base, "git", "init")
    shell(project.base, "dvc", "init")
    (project.base / ".dvc/config").write_text("[cache]\n    type = hardlink,symlink\n    dir = shared\n")


def free(monkeypatch: pytest.MonkeyPatch, most: int, targets: int | None = None) -> None:
    """Bytes that are free on every disk, and on the one of the targets."""
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=most if targets is None or path.name != "targets" else targets)
    )


def picture(path: Path, value: int, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)


def test_a_good_project(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_repository(project)
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
    encoder = str(fault(project.base, "student.network.encoder_weights=gone.safetensors"))
    assert encoder.startswith("problem ") and f"{project.base / 'gone.safetensors'}: no such file" in encoder
    assert "; put the state dict of tu-test_efficientnet there" in encoder
    assert "encoder 'resnet19' is unknown" in str(fault(project.base, "student.network.encoder=resnet19"))


def test_networks_that_cannot_be_used_are_named(project: Project) -> None:
    """Of the student and of every teacher; a published teacher of one input size before it is fetched."""
    small = [f"student.network.{part}" for part in ("decoder=fpn", "decoder_channels=32", "encoder=tu-mobilevitv2_050")]
    vit = "teachers.wide={timm: maxvit_tiny_tf_224, weights: data/teachers/vit.safetensors}"
    sees = "student.network: decoder fpn cannot see 64 x 96 pixels with encoder tu-mobilevitv2_050"
    for overrides, words in (
        ([*small, "views.crop=[64,64]"], sees),
        ([vit, "losses.pixel_teachers=[deep]"], "teachers.wide: cannot see images of 64 x 64 pixels"),
    ):
        assert str(fault(project.base, *overrides)).startswith(f"problem  weights: {words}")
    for key in ("student.network", "teachers.wide"):
        problem = fault(project.base, f"{key}.decoder=deeplabv3plus", f"{key}.encoder=vgg11_bn")
        assert problem.found.startswith(f"{key}: decoder deeplabv3plus cannot be built with encoder vgg")
        assert problem.mark == "problem" and problem.remedy.startswith("take decoder: fpn or upernet")


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
    shutil.rmtree(project.manifest)
    assert str(fault(project.base)) == first, "without a manifest, too"


def test_files_that_dvc_cannot_read(tmp_path: Path) -> None:
    for name in ("train/t0", "train/t1", "train/t2", "train/t3", "val/v0", "val/v1"):
        picture(tmp_path / f"source/images/{name}.png", 9)
        picture(tmp_path / f"source/masks/{name}.png", int(name[-1]) % 2)
    init_project("folder", tmp_path / "source", "1/2", tmp_path / "project")
    (tmp_path / "source/images/.#lock").symlink_to("gone")
    (tmp_path / "more").mkdir()
    (tmp_path / "source/images/train/more").symlink_to(tmp_path / "more")

    def of_links() -> list[Check]:
        return [check for check in faults(tmp_path / "project") if "is a link to a folder" in check.found or "#lock" in check.found]

    dangling, folder = of_links()
    assert (dangling.mark, folder.mark) == ("warning", "warning"), "without DVC the files do no harm"
    read = "is a link that leads to no file, and DVC reads every file; restore what it links to, or remove the link"
    assert str(dangling).endswith(f"images/.#lock: {read}")
    assert folder.found.endswith("train/more: is a link to a folder, and `dvc repro` does not notice changes behind it")
    (tmp_path / ".dvc").mkdir()
    assert [check.mark for check in of_links()] == ["problem", "warning"]


def test_many_bad_files_are_summed_up(project: Project) -> None:
    for path in (project.base / "data/raw/shapes/images/train").iterdir():
        path.write_bytes(b"no image")
    checks = faults(project.base)
    assert len([check for check in checks if "not a readable image" in check.found]) == 10
    assert checks[10].found == "... and 14 more files" and "--on-error skip" in checks[10].remedy


def test_a_sample_is_said_to_be_one(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_data, "_SAMPLE", 8)
    free(monkeypatch, 10**12)  # it is said, too, and changes with whatever else this machine does
    lines = said(project.base)
    sample = "a sample of 8 of the 31 images and their masks were read in full"
    assert f"{sample}, nothing is wrong with them (--full reads all)" in lines
    assert "pixels of 4 of the 6 labelled masks" in lines and said(project.base) == lines, "seeded"
    assert "all 31 images" in run(project.base, "--full").stdout


def test_a_disk_that_is_too_small(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(project.base / "data/targets")
    shutil.rmtree(project.base / ".mgd/work")
    assert faults(project.base) == []
    # What is built in .mgd/work ends in data/targets: the smaller of the two decides.
    (project.base / "data/targets").mkdir()
    for most, targets in ((100_000, 10**9), (10**9, 100_000)):
        free(monkeypatch, most, targets)
        assert fault(project.base).mark == "problem"
    free(monkeypatch, 100_000)
    small = fault(project.base)
    needed = small.found.partition(";")[0]
    assert small.mark == "problem" and needed.startswith("targets to make: ") and "wide" in needed and "deep" in needed
    assert "100.0 kB are free in .mgd/work" in small.found
    assert small.remedy.startswith("free some (`mgd-pipeline cache gc`") and "targets.stride 8" in small.remedy
    # The stage itself refuses, for one teacher, with the same remedy.
    result = invoke(project.base, "precompute-teachers", "--device", "cpu")
    assert result.exit_code == 3 and small.remedy in result.stderr
    shutil.rmtree(project.manifest)
    assert fault(project.base).found.partition(";")[0] == needed, "the data set itself says as much"
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
    apart = fault(project.base)
    there = f"{project.base / '.mgd/work'} and {project.base / 'data/targets'} are on different file systems"
    assert apart.mark == "problem" and apart.found.startswith(there)
    assert apart.remedy == "link .mgd and data to folders of the same disk, or move the whole project there"
    shutil.rmtree(project.targets("wide"))
    shutil.rmtree(project.base / ".mgd/work")
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
    """Every stage of a project's life, from the end back to the beginning."""
    for made in ("results", "students", "targets", "teachers/deep.safetensors", "teachers/wide.safetensors", "manifest", "raw"):
        path = project.base / "data" / made
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert faults(project.base) == [], made


def test_invalid_params_exit_2_after_the_machine_was_looked_at(tmp_path: Path) -> None:
    init_project("shapes", None, "1/8", tmp_path)
    result = run(tmp_path, "--set", "studet=1", "--set", "student.steps=0")
    assert result.exit_code == 2
    problems = [line for line in result.stdout.splitlines() if line.startswith("problem")]
    assert problems == [
        "problem  params: --set student.steps=0: must be greater than 0",
        "problem  params: --set studet=1: unknown key; nearest is 'student'",
    ]
    assert "versions: Python" in result.stdout
    assert json.loads(run(tmp_path, "--json", "--set", "seed=-1").stdout)["problem"] == 1
    (tmp_path / "params.yaml").unlink()
    assert run(tmp_path).exit_code == 2 and "`mgd-pipeline init`" in run(tmp_path).stdout


def test_quiet_leaves_what_the_doctor_was_called_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.console, "quiet", False)  # as it is found afterwards
    init_project("shapes", None, "1/8", tmp_path)
    line = ["--quiet", "doctor", "--config", str(tmp_path / "params.yaml"), "--set", "seed=-1"]
    assert "problem  params: --set seed=-1" in CliRunner().invoke(app, line).stdout
    assert json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)["problem"] == 1


def test_a_fresh_project_of_ones_own_images(tmp_path: Path) -> None:
    for number, split in enumerate(["train"] * 8 + ["val"]):
        picture(tmp_path / f"own/images/{split}/{number}.png", 10 * number, (20, 30))
        picture(tmp_path / f"own/masks/{split}/{number}.png", number % 2, (20, 30))
    init_project("folder", tmp_path / "own", "1/4", tmp_path / "fresh")
    lines = said(tmp_path / "fresh", "student.network.encoder_weights=none")
    for line in (
        "data: there is no manifest yet: `mgd-pipeline prepare-data` makes it",
        "data: folder, 2 classes: 8 train images (2 labelled, 6 unlabelled), 1 val, 0 test",
        "weights: teachers.deep is not trained yet: `mgd-pipeline train-teacher --teacher deep` makes",
        "disk: targets to make: ",
    ):
        assert f"ok       {line}" in lines and "problem" not in lines
    no_test = said(tmp_path / "fresh", "evaluation.split=test")
    assert "problem  data: evaluation.split is test, which has no images; choose the other split" in no_test

    (tmp_path / "own").rename(tmp_path / "moved")
    assert "folder: is a link to " in said(tmp_path / "fresh") and "link it again: ln -sfn" in said(tmp_path / "fresh")
    built_in = tmp_path / "built-in"
    init_project("shapes", None, "1/8", built_in)
    assert "scenes is not there yet: `mgd-pipeline prepare-data` renders it" in said(built_in)
    assert run(built_in).exit_code == 0


@pytest.mark.parametrize(
    ("broken", "area"),
    [
        ("data/manifest/images.parquet", "data"),
        ("data/manifest/partition.parquet", "data"),
        ("data/teachers/deep.safetensors", "weights"),
        ("data/targets/wide.zarr", "disk"),
        ("data/raw/shapes", "data"),
    ],
)
@pytest.mark.parametrize("how", ["garbage", "folder"])
def test_it_never_stumbles_over_a_broken_project(project: Project, broken: str, area: str, how: str) -> None:
    path = project.base / broken
    shutil.rmtree(path) if path.is_dir() else path.unlink()
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
        (".mgd/work", "disk"),
        ("data/targets", "disk"),
        ("dvc.yaml", "dvc"),
    ],
)
def test_what_may_not_be_read_is_a_line_with_its_remedy(
    project: Project, monkeypatch: pytest.MonkeyPatch, denied: str, area: str
) -> None:
    """Tests may run as root, whom no mode keeps out: so each call that names a path there is refused."""

    def refuse(real: Any) -> Any:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if f"{path}/".startswith(f"{project.base / denied}/"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *arguments, **options)

        return call

    calls = [(os, name) for name in ("stat", "lstat", "open", "scandir", "statvfs")]
    for owner, name in [*calls, (io, "open"), (builtins, "open")]:
        monkeypatch.setattr(owner, name, refuse(getattr(owner, name)))
    result = run(project.base)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.stdout.splitlines() if not line.startswith("doctor: read")]
    refused = [line for line in lines if "ermission denied" in line]
    assert result.exit_code == (2 if area == "params" else 1) and refused, result.stdout
    assert any(line.startswith(f"problem  {area}: ") and f"{project.base / denied}" in line for line in refused)
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
    in_a_repository(project)
    assert dvc_faults(project.base) == [("problem", lost, remedy)]
