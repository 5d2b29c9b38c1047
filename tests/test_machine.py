"""What a machine refuses: places that cannot be written, full disks, limits; each one line with file, reason and remedy."""

from __future__ import annotations

import errno
import os
import pwd
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import DataError, OutputError
from mgd_pipeline.training.checkpoint import TrainingCheckpoint
from mgd_stages.cli import app
from mgd_stages.doctor.run import look
from mgd_stages.projects.init import init_project
from mgd_stages.run import machine
from mgd_stages.run.machine import Machine, explain, mount_point, require_room, require_writable, unwritable
from mgd_stages.run.project import Project, open_project, output_folders
from mgd_stages.stages.train_student import train_student
from mgd_stages.stages.train_teacher import train_teacher
from mgd_stages.tools.export import require_renewable

NUMBERS = [
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE),
    *(errno.EXDEV, errno.EIO, errno.ESTALE, errno.EBUSY, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ETIMEDOUT),
]


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
def test_errors_of_the_disk_name_file_reason_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Also those of descriptors, which have no file name, through everything that writes results."""
    place = tmp_path / "results/metrics.json"

    def fails(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    for call in ("write", "fsync"):
        with monkeypatch.context() as patched, pytest.raises(OSError) as caught:
            patched.setattr(os, call, fails)
            replace_file(place, b"content")
        said = explain(caught.value)
        assert said is not None and said.startswith(f"{place}: {os.strerror(number)}; ") and len(said.partition("; ")[2]) > 20
        assert "\n" not in said and "None" not in said
        if number in (errno.ENOSPC, errno.EDQUOT):
            assert str(mount_point(place)) in said and "make room there" in said
    assert not list(place.parent.iterdir())


def test_a_name_that_is_too_long_is_named_and_a_bug_is_no_error_of_the_machine(tmp_path: Path) -> None:
    """By whatever makes a file or a folder; `replace_file` says so itself."""
    place = tmp_path / ("n" * 300)
    with pytest.raises(OSError) as caught:
        place.mkdir()
    said = explain(caught.value)
    assert said is not None and said.startswith(f"{place}: ") and "255 bytes" in said
    with pytest.raises(DataError, match=r"the name \(300 bytes\)"):
        replace_file(place, b"")
    bugs = OSError(errno.EINVAL, "Invalid argument"), FileNotFoundError(2, "No such file"), RuntimeError("shape"), ValueError()
    assert [explain(bug) for bug in bugs] == [None] * 4


def test_a_disk_without_room_for_further_files_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        os, "statvfs", lambda _: SimpleNamespace(f_files=10, f_favail=0, f_frsize=1, f_blocks=9, f_bfree=9, f_bavail=9)
    )
    said = explain(OSError(errno.ENOSPC, "", str(tmp_path / "new")))
    assert said is not None and "has no room for further files (`df -i`)" in said


def test_what_stands_in_the_place_of_a_folder_or_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "fine").mkdir()
    (tmp_path / "fine/protected").touch(0o444)
    with pytest.raises(OutputError) as caught:
        require_writable([tmp_path / "file/a/b", tmp_path / "link", tmp_path / "fine/deep"], [tmp_path / "folder.json"])
    lines = str(caught.value).splitlines()
    assert [line.split("; ")[0] for line in lines] == [
        f"{tmp_path / 'file'}: is not a folder, so nothing can be written below it",
        f"{tmp_path / 'link'}: is a link that leads nowhere, so nothing can be written below it",
        f"{tmp_path / 'folder.json'}: is a folder, so no file of that name can be written",
    ]
    require_writable([tmp_path / "fine/a/b"], [tmp_path / "fine/protected"])  # DVC protects what it has stored
    assert [path.name for path in (tmp_path / "fine").iterdir()] == ["protected"], "nothing is left behind"


def test_a_file_that_is_mounted_by_itself_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As containers mount single files: writing to it works, renaming onto it does not."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    require_writable(files=[tmp_path / "file"])
    monkeypatch.setattr(machine, "mount_point", Path.resolve)
    said = re.escape(f"{tmp_path / 'file'}: is mounted by itself, as containers mount a file, so it cannot be replaced; mount its")
    with pytest.raises(OutputError, match=said):
        require_writable(files=[tmp_path / "file"])
    require_writable(files=[tmp_path / "link"])  # the link alone is replaced


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_folder_that_could_not_be_removed_is_refused_before_it_is_made_anew() -> None:
    """An export replaces the whole folder; one whose parts are locked would stay beside the new one under a hidden name."""
    readable, writable = os.pipe()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "demo/runtime")
        folder.mkdir(parents=True)
        for place, mode in ((folder, 0o555), (folder.parent, 0o755), (Path(name), 0o755)):
            os.chown(place, 54321, 54321)
            os.chmod(place, mode)
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setgid(54321)
                os.setuid(54321)
                try:
                    require_renewable(folder.parent)
                except OutputError as error:
                    os.write(writable, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(writable)
        said = os.read(readable, 10000).decode()
        os.close(readable)
        assert said.startswith(f"{folder}: Permission denied; {folder} belongs to 54321, mode 555"), said
        require_renewable(Path(name, "new"))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="Linux alone has /proc")
def test_a_file_system_that_takes_no_files_is_one_line() -> None:
    """Whatever it says: /proc says that the new file is not there, which is no error of a disk."""
    said = "takes no new files (No such file or directory); name another place"
    assert unwritable(Path("/proc/new/deep")) == f"/proc: {said}" and unwritable(Path("/proc/self/fd")) == f"/proc/self/fd: {said}"
    result = CliRunner().invoke(app, ["export", "student.safetensors", "/proc/new/a.pt2"])
    assert result.exit_code == 1 and result.stderr == f"error: /proc: {said}\n"


def test_a_folder_of_somebody_else_is_noticed_with_owner_and_mode() -> None:
    """Permissions mean nothing to root: a child becomes another user, which only root may do."""
    readable, writable = os.pipe()
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setgid(54321)
                os.setuid(54321)
                os.write(writable, str(unwritable(Path(name, "deep"))).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(writable)
        said = os.read(readable, 10000).decode()
        os.close(readable)
        if not said:
            pytest.skip("only root may become another user")
        owner = pwd.getpwuid(os.geteuid()).pw_name
        assert said.startswith(
            f"{name}: Permission denied; {name} belongs to {owner}, mode 755, and this is user 54321; change its"
        )


def test_stages_try_to_write_before_they_begin(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage, by the one function; nothing is computed, and nothing that was there has changed."""
    whole, reason = os.open, os.strerror(errno.EROFS)

    def refuses(path: Any, flags: int, *others: Any, **named: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith((str(project.base), str(project.base.parent))):
            raise OSError(errno.EROFS, reason, str(path))
        return whole(path, flags, *others, **named)

    def begun(*_: object, **__: object) -> Any:
        raise AssertionError("a training has begun")

    monkeypatch.setattr(TrainingCheckpoint, "restore", begun)
    monkeypatch.setattr(os, "open", refuses)
    monkeypatch.setattr("mgd_stages.run.progress.console.quiet", False)  # and given back, after -q
    student, new = str(project.student("distilled")), str(project.base / "new")
    config = ("--config", str(project.base / "params.yaml"))
    stages = ["prepare-data", "precompute-teachers", "compare-teachers", "train-student", "evaluate", "report", "bench"]
    for command in (
        *([name, *config] for name in stages),
        ["train-teacher", "--teacher", "wide", *config],
        ["study", str(project.base / "study"), "--variant", "supervised", *config],
        ["predict", student, str(project.base / "data/raw/shapes/images/test"), "--output", new],
        ["export", student, f"{new}.pt2"],
        ["convert-weights", student, f"{new}.safetensors"],
        ["init", "--output", new],
    ):
        result = CliRunner().invoke(app, ["-q", *command])
        assert result.exit_code == 1 and result.exception.__class__ is SystemExit, (command, result.exception, result.stderr)
        lines = result.stderr.splitlines()
        assert all(line.startswith("error: ") and f"{reason}; " in line for line in lines) and lines, (command, lines)
        assert str(project.base) in lines[0], command


def test_doctor_names_folders_that_cannot_be_written(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.results / "evaluation").mkdir(exist_ok=True)
    assert {project.results, project.results / "evaluation", project.base / ".mgd/work"} <= set(output_folders(project))

    def problems() -> list[str]:
        return [str(check) for check in look(project.base / "params.yaml", []) if check.area == "disk" and check.mark == "problem"]

    assert problems() == []
    shutil.rmtree(project.results)
    project.results.write_text("a file")
    (problem,) = problems()
    assert problem.startswith(
        f"problem  disk: {project.results}: is not a folder, so nothing can be written below it; move it away"
    )


def test_weights_that_will_not_fit_the_disk_are_told_before_the_first_step(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000, total=10**6))
    cpu = torch.device("cpu")
    with pytest.raises(OutputError, match=r"student\.safetensors: needs [\d.]+ MB, and the disk at .* has 0\.0 MB free; make room"):
        train_student(project, Machine(cpu), supervised_only=True)
    with pytest.raises(OutputError, match=r"wide\.safetensors: needs [\d.]+ MB"):
        train_teacher(open_project(project.base / "params.yaml"), "wide", Machine(cpu))
    require_room(project.base / "small", 999)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (500, 500))
    with pytest.raises(OutputError, match=r"may write files of 0\.0 MB; raise the limit \(`ulimit -f unlimited`\)"):
        require_room(project.base / "small", 999)


OF_MEMORY = "may use 2.0 GB of addresses (`ulimit -v`, as a queue's memory limit sets it)"
OF_PROCESSES = "`ulimit -u` (2000000000 for this user) or by the container; raise the limit, or take fewer --threads, --num-workers"


@pytest.mark.parametrize(
    ("limit", "error", "said"),
    [
        ("AS", ImportError("libtorch_cpu.so: failed to map segment from shared object"), OF_MEMORY),
        ("AS", RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), OF_MEMORY),
        ("AS", OSError(errno.ENOMEM, "Cannot allocate memory"), OF_MEMORY),
        ("AS", RuntimeError("std::bad_alloc"), OF_MEMORY),
        ("AS", RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), None),
        ("AS", ImportError("libcudart.so: cannot open shared object file"), None),
        ("", ImportError("libtorch_cpu.so: failed to map segment from shared object"), None),
        ("", MemoryError(), "too little memory"),
        ("NPROC", RuntimeError("can't start new thread"), OF_PROCESSES),
        ("NPROC", BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), OF_PROCESSES),
        ("", FileNotFoundError(2, "No such file", "/nowhere/kept"), "and torch makes its folder TORCHINDUCTOR_CACHE_DIR there"),
        ("", FileNotFoundError(2, "No such file", "/nowhere/else"), None),
    ],
)
def test_a_limit_or_a_variable_that_stops_torch_is_named(
    monkeypatch: pytest.MonkeyPatch, limit: str, error: Exception, said: str | None
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/nowhere/kept")
    limited = getattr(resource, f"RLIMIT_{limit}", None)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2 * 10**9 if kind == limited else resource.RLIM_INFINITY, 0))
    assert said in explained if (explained := explain(error)) is not None and said is not None else explained is said


@pytest.mark.parametrize("command", ["doctor", "train-student"])
def test_under_a_limit_on_memory_the_command_names_it(tmp_path: Path, command: str) -> None:
    """In processes of their own, whose torch cannot be loaded."""
    init_project("shapes", None, "1/8", tmp_path / "street")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (600 * 2**20, 600 * 2**20))

    done = subprocess.run(
        [sys.executable, "-m", "mgd_stages.cli", command],
        cwd=tmp_path / "street",
        capture_output=True,
        text=True,
        preexec_fn=limited,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "`ulimit -v`" in said and "Traceback" not in said and "again, together" not in said
    assert done.stderr.startswith("warning: this process may use 0.6 GB of addresses")
