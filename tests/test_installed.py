"""The package as a stranger gets it: built, installed away from the checkout, and described for git's hosts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import mgd_pipeline
from conftest import TINY, run

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from the sdist alone; built from the files that git has."""
    folder = tmp_path_factory.mktemp("built")
    checkout = folder / "checkout"
    tracked = run(REPOSITORY, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    names = [name for name in tracked if name and (REPOSITORY / name).is_file()]
    for name in names:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, checkout / name)
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    run(checkout, sys.executable, "-c", build, PYTHONPATH="")
    (sdist,) = folder.glob("*.tar.gz")
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run(folder, *wheel, "--wheel-dir", str(folder), str(sdist), PYTHONPATH="")
    return folder


@pytest.fixture(scope="module")
def installed(built: Path) -> Path:
    """The folder of the commands of an environment that has the wheel, and sees this environment's torch and what belongs to it."""
    environment = built / "environment"
    run(built, sys.executable, "-m", "venv", "--without-pip", str(environment))
    (wheel,) = built.glob("*.whl")
    python = environment / "bin/python"
    options = ["--quiet", "--no-deps", "--no-index", "--no-warn-script-location"]
    run(built, sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel), PYTHONPATH="")
    (packages,) = environment.glob("lib/python*/site-packages")
    # A path in a .pth file brings the packages there, but not their .pth files: the checkout that is installed there stays out.
    (packages / "outside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.mark.timeout(600)
def test_the_wheel_works_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    command, away = str(installed / "mgd-pipeline"), {"PYTHONPATH": ""}
    where = "import mgd_pipeline, mgd_stages; print(mgd_pipeline.__file__, mgd_stages.__file__)"
    for place in run(tmp_path, str(installed / "python"), "-c", where, **away).split():
        assert Path(place).is_relative_to(installed.parent), place
    assert run(tmp_path, command, "--version", **away) == f"mgd-pipeline {mgd_pipeline.__version__}\n"
    assert "precompute-teachers" in run(tmp_path, command, "--help", **away)
    assert "camvid-lite0" in run(tmp_path, command, "init", "--preset", "list", **away)
    run(tmp_path, command, "init", "--output", "project", **away)
    project = tmp_path / "project"
    assert {path.name for path in project.iterdir()} >= {"params.yaml", "dvc.yaml", "dvc-confusion.json", ".gitignore"}
    small = [option for value in TINY for option in ("--set", value)]
    run(project, command, "prepare-data", *small, **away)
    run(project, command, "train-student", "--supervised-only", *small, "--set", "student.steps=2", **away)
    images = sorted((project / "data/raw/shapes").rglob("*.png"))[:1]
    run(project, command, "predict", "data/students/supervised/student.safetensors", *map(str, images), "--output", "masks", **away)
    assert [path.name for path in (project / "masks").rglob("*.png")] == [images[0].name]


def test_the_sdist_and_the_wheel_hold_what_is_needed(built: Path, installed: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "stages/mgd_stages/templates/report.html"} <= names
    (packages,) = installed.parent.glob("lib/python*/site-packages")
    for package, source in (("mgd_pipeline", "pipeline"), ("mgd_stages", "stages")):
        here = {path.relative_to(REPOSITORY / source) for path in (REPOSITORY / source / package).rglob("*") if path.is_file()}
        there = {path.relative_to(packages) for path in (packages / package).rglob("*") if path.is_file()}
        assert {path for path in here ^ there if "__pycache__" not in path.parts} == set()


def check_schema(schema: str, *paths: Path) -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is in the dev extra")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_is_one() -> None:
    """By the schema of GitHub's workflows; it covers every Python that the package names."""
    workflow = REPOSITORY / ".github/workflows/ci.yaml"
    check_schema("vendor.github-workflows", workflow)
    check_schema("custom.github-workflows-require-timeout", workflow)
    jobs = YAML(typ="safe").load(workflow)["jobs"]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    versions = [kind.rpartition(" ")[2] for kind in project["classifiers"] if re.search(r":: 3\.\d+$", kind)]
    assert jobs["test"]["strategy"]["matrix"]["python"] == versions and project["requires-python"] == f">={versions[0]}"


def test_the_citation_is_one() -> None:
    check_schema("vendor.citation-file-format", REPOSITORY / "CITATION.cff")
    citation = YAML(typ="safe").load(REPOSITORY / "CITATION.cff")
    assert citation["version"] == mgd_pipeline.__version__
    assert citation["preferred-citation"]["title"] in " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())


def test_hooks_before_a_commit_are_those_of_make_lint() -> None:
    (local,) = YAML(typ="safe").load(REPOSITORY / ".pre-commit-config.yaml")["repos"]
    makefile = (REPOSITORY / "Makefile").read_text()
    for hook in local["hooks"]:
        program, *arguments = hook["entry"].removeprefix(".venv/bin/").split()
        assert re.search(rf"^\t{' '.join([program, *arguments[:1]])}\b", makefile, re.MULTILINE), hook["entry"]


LINUX_ALONE = {
    "os": "sched_getaffinity sched_setaffinity posix_fadvise posix_fallocate copy_file_range memfd_create eventfd splice pipe2 "
    "process_cpu_count O_DIRECT O_TMPFILE O_PATH O_NOATIME",
    "resource": "prlimit RUSAGE_THREAD RLIMIT_MSGQUEUE RLIMIT_NICE RLIMIT_RTPRIO RLIMIT_RTTIME RLIMIT_SIGPENDING RLIMIT_OFILE",
    "signal": "SIGPOLL SIGPWR SIGRTMAX SIGRTMIN SIGSTKFLT sigtimedwait sigwaitinfo",
    "fcntl": "F_OFD_SETLK F_OFD_SETLKW F_OFD_GETLK F_NOTIFY F_SETSIG F_SETPIPE_SZ F_ADD_SEALS F_SETLEASE",
    "socket": "AF_NETLINK AF_PACKET SO_BINDTODEVICE SOCK_CLOEXEC SOCK_NONBLOCK",
}
"""What these modules have on Linux and not on macOS."""


def test_nothing_is_imported_that_macos_lacks() -> None:
    """All modules of ours, after the libraries, in a process that has forgotten what is Linux's alone."""
    ours = sorted(
        ".".join(path.relative_to(REPOSITORY / source).with_suffix("").parts)
        for source in ("pipeline", "stages")
        for path in (REPOSITORY / source).rglob("*.py")
        if not path.name.startswith("__")
    )
    libraries = ["torch", "torchvision", "segmentation_models_pytorch", "timm", "zarr", "dask", "distributed", "pyarrow.parquet"]
    script = (
        "import sys\nfrom importlib import import_module\n"
        f"for name in {libraries}: import_module(name)\n"
        f"for module, names in {LINUX_ALONE}.items():\n"
        "    for name in names.split(): vars(import_module(module)).pop(name, None)\n"
        f"sys.platform = 'darwin'\nfor name in {ours}: import_module(name)\n"
        "from mgd_stages.run.machine import cores\nassert cores() >= 1\nprint('all')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "all\n", done.stderr
