"""What an export leaves on the disk: killed, on a full disk, beside other files, and after mistakes in the call."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import tiny_student
from mgd_pipeline import durable
from mgd_pipeline.errors import DataError, WeightsError
from mgd_pipeline.exports import formats
from mgd_pipeline.exports.deployed import converting
from mgd_pipeline.exports.formats import FORMATS, Format
from mgd_pipeline.students.student import Student, load_student
from mgd_stages.projects.init import init_project
from mgd_stages.run.project import open_project
from mgd_stages.stages.prepare_data import prepare_data
from mgd_stages.tools import export as export_tool
from mgd_stages.tools.export import staging
from test_export import NAMES, run, runtime_of
from test_predict import save


def test_a_size_that_is_left_out_is_the_student_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A square of `long_side`; the line says so before the work begins."""
    sizes = []

    def write(student: Student, path: Path, size: Any) -> None:
        sizes.append(size)
        raise WeightsError("enough")

    monkeypatch.setitem(FORMATS, "executorch", Format("executorch", ".pte", write, lambda path: lambda images: images, fixed=True))
    for long_side, side in ((72, 72), (None, 512)):
        result = run(tiny_student(tmp_path / "student.safetensors", long_side=long_side), tmp_path / "a.pte")
        assert f"a file of --format executorch takes images of one size: {side}x{side}, a square, to which" in result.stdout
        assert sizes.pop() == (side, side) and result.stderr == "error: enough\n" and not (tmp_path / "a.pte").exists()
    # In a project it is the size of most of its images, unless the project has other classes than the student.
    random = np.random.default_rng(0)
    for name, shape in (("a", (40, 64)), ("b", (48, 80)), ("c", (48, 80))):
        save(tmp_path / f"set/images/train/{name}.png", random.integers(0, 256, (*shape, 3), dtype=np.uint8))
        save(tmp_path / f"set/masks/train/{name}.png", random.integers(0, 4, shape, dtype=np.uint8))
    init_project("folder", tmp_path / "set", "1/1", tmp_path / "project")
    for classes, (height, width) in (("sky,sea,sand,salt", (48, 80)), ("cat,dog,cow,hen,pig", (512, 512))):
        options = ["--config", tmp_path / "project/params.yaml", "--set", f"data.classes=[{classes}]"]
        prepare_data(open_project(tmp_path / "project/params.yaml", options[-1:]), "stop")
        result = run(tiny_student(tmp_path / "student.safetensors"), tmp_path / "a.pte", *options)
        assert f"images of one size: {height}x{width}, " in result.stdout and sizes.pop() == (height, width), result.output
        assert ("most of the project's images" in result.stdout) == (height == 48)


def test_a_killed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing where the file would be, even with SIGKILL; what it left in the temporary folder goes with the next export."""
    student = tiny_student(tmp_path / "student.safetensors")
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "mgd_stages.cli", "export", str(student), str(tmp_path / "out/a.pt2")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "exporting to torch-export" in process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    left = list((tmp_path / "temporary").glob("mgd-export-*"))
    assert len(left) == 1
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with staging() as folder:
        assert list((tmp_path / "temporary").glob("mgd-export-*")) == [folder] != left
        with tempfile.TemporaryDirectory() as library:  # as converters make one, and leave it when they are killed
            assert Path(library).is_relative_to(folder)
    assert not folder.exists() and tempfile.gettempdir() == str(tmp_path / "temporary")


FULL = r"mgd-export-\S+: needs [\d.]+ MB, and the disk at \S+ has 0\.0 MB free; make room there, then run the same command again"


@pytest.mark.parametrize(
    ("fault", "free", "said"),
    [
        (WeightsError("fpn: torch cannot export it (file write failed)"), 0, FULL),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device")]), 0, FULL),
        (OSError(28, "No space left on device"), 10**9, r"mgd-export-\S+: No space left on device; the disk at .*; make room .*"),
        (WeightsError("fpn: torch cannot export it"), 10**9, "fpn: torch cannot export it"),
    ],
)
def test_a_full_temporary_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, free: int, said: str
) -> None:
    """torch and OpenVINO say only that they cannot write, as if it were the network's fault."""

    def full(student: Student, path: Path, size: Any) -> None:
        raise fault

    monkeypatch.setitem(FORMATS, "onnx", Format("onnx", ".onnx", full, lambda path: lambda images: images))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free, total=10**10))
    result = run(tiny_student(tmp_path / "student.safetensors"), tmp_path / "a.onnx")
    assert result.exit_code == 1 and re.fullmatch(rf"error: (/\S+/)?{said}\n", result.stderr), result.stderr


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
from mgd_stages.cli import app
app(["export", *sys.argv[1:], "--size", "40x51"])
"""


@pytest.mark.parametrize("kind", ["torch-export", "openvino", "coreml"])
def test_a_file_that_cannot_be_written_whole_is_one_line(kind: str, tmp_path: Path) -> None:
    """By libraries that write themselves; torch's writer ended the process. A limit on the size of files stands for a full disk."""
    runtime_of(kind)
    student, made = tiny_student(tmp_path / "student.safetensors"), tmp_path / "new" / NAMES[kind]
    done = subprocess.run([sys.executable, "-c", LIMITED, student, made], capture_output=True, text=True, check=False)
    said = r"error: \S+: needs 2\.6 MB, and this process may write files of 0\.1 MB; raise the limit \(`ulimit -f unlimited`\).*\n"
    assert done.returncode == 1 and re.fullmatch(said, done.stderr), done.stderr
    assert not made.parent.exists()


def test_no_temporary_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    student = tiny_student(tmp_path / "student.safetensors")
    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    result = run(student, tmp_path / "a.pt2")
    said = "No usable temporary directory found in ['/tmp']; make room in one of them, or name another folder by TMPDIR"
    assert result.exit_code == 1 and result.stderr == f"error: {said}\n"


def test_files_that_belong_together_are_never_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure between two files leaves the old ones; exports at once to one name leave one whole set."""
    weights, model = tmp_path / "a.bin", tmp_path / "a.xml"
    durable.replace_together({weights: b"1", model: b"1"})
    for name in (".a.bin", ".a.xml"):  # a full disk, whichever file meets it first

        def full(path: Path, data: bytes, name: str = name) -> None:
            if path.name.startswith(name):
                raise OSError(28, "No space left on device")
            path.write_bytes(data)

        with monkeypatch.context() as patch:
            patch.setattr(durable, "write_synced", full)
            with pytest.raises(OSError, match=r"No space left on device: '.*/a\.xml'"):
                durable.replace_together({weights: b"2", model: b"2"})
        assert weights.read_bytes() == model.read_bytes() == b"1" and sorted(tmp_path.iterdir()) == [weights, model]
    rename = os.rename
    for place in (weights, model):

        def fails(source: Path, target: Path, place: Path = place) -> None:
            if target == place and source.read_bytes() == b"2":
                raise OSError(5, "Input/output error")
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", fails)
            with pytest.raises(OSError, match="Input/output error"):
                durable.replace_together({weights: b"2", model: b"2"})
        assert weights.read_bytes() == model.read_bytes() == b"1" and sorted(tmp_path.iterdir()) == [weights, model]
    threads = [
        Thread(target=lambda k=k: [durable.replace_together({weights: k, model: k}) for _ in range(30)]) for k in (b"x", b"y", b"z")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert weights.read_bytes() == model.read_bytes()
    assert sorted(tmp_path.iterdir()) == [weights, model]


def test_folders_are_replaced_whole(tmp_path: Path) -> None:
    place = tmp_path / "a.mlpackage"
    for name in "xy":
        staged = tmp_path / f"staged-{name}"
        (staged / "data").mkdir(parents=True)
        (staged / "data" / name).write_text(name)
    threads = [
        Thread(target=lambda name=name: [durable.copy_folder(tmp_path / f"staged-{name}", place, replace=True) for _ in range(20)])
        for name in "xy"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (kept,) = (place / "data").iterdir()
    assert kept.read_text() == kept.name and not durable.copy_folder(tmp_path / "staged-x", place, replace=False)
    assert list((place / "data").iterdir()) == [kept]
    assert {path.name for path in tmp_path.iterdir()} == {"a.mlpackage", "staged-x", "staged-y"}
    link, file, long = tmp_path / "link.mlpackage", tmp_path / "file.mlpackage", tmp_path / f"{'ü' * 122}.mlpackage"
    link.symlink_to(place)
    file.write_text("")
    for name in (link, file, long):
        assert durable.copy_folder(tmp_path / "staged-x", name, replace=True)
        assert not name.is_symlink() and (name / "data/x").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {
        *("a.mlpackage", "staged-x", "staged-y", link.name, file.name, long.name)
    }, "only a link itself goes, and nothing is left beside"


CALLS = ("open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir")
"""Of `os`: what replaces outputs."""


def stopped(action: Callable[[], object], number: int, kind: signal.Signals) -> bool:
    """Runs `action` in a process that a signal hits before a call of `os`, the one of this number; False where there are fewer."""
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        calls = 0

        def counting(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == number:
                    signal.raise_signal(kind)
                return call(*arguments, **options)

            return counted

        for name in CALLS:
            setattr(os, name, counting(getattr(os, name)))
        try:
            action()
        except KeyboardInterrupt:
            os._exit(3)
        os._exit(4 if calls < number else 5)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (4, -9 if kind == signal.SIGKILL else 3)
    return code != 4


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("folder", [False, True])
def test_an_output_is_whole_wherever_its_replacement_is_stopped(tmp_path: Path, kind: signal.Signals, folder: bool) -> None:
    """Before each call of the system. Ctrl-C leaves the old output or the new one, and nothing else. SIGKILL may leave none between
    two calls, never a mixed one, and the next export may take the name and removes what was left."""
    for content in "12":
        (tmp_path / content / "data").mkdir(parents=True)
        for name in ("data/a", "b"):
            (tmp_path / content / name).write_text(content)

    def export(content: str) -> None:
        if folder:
            durable.copy_folder(tmp_path / content, out / "demo", replace=True)
        else:
            durable.replace_together({out / "a.bin": content.encode(), out / "a.xml": content.encode()})

    def kept() -> list[str]:
        paths = [path for path in sorted(out.rglob("*")) if path.is_file()]
        return [path.read_text() for path in paths if not path.relative_to(out).parts[0].startswith(".")]

    out, last, seen = tmp_path / "out", "demo" if folder else "a.xml", set[tuple[str, ...]]()
    for number in range(1, 200):
        out.mkdir()
        export("1")
        if not stopped(lambda: export("2"), number, kind):
            break
        there = (out / last).exists()
        seen.add(tuple(kept()))
        assert kept() in (["1", "1"], ["2", "2"]) if there else kind == signal.SIGKILL
        if kind == signal.SIGINT:
            assert not [path for path in out.iterdir() if path.name.startswith(".")]
        if not there and not folder:
            export_tool._check(FORMATS["openvino"], out / last, None, False, None, None)
        export("2")
        assert kept() == ["2", "2"] and not [path for path in out.iterdir() if path.name.startswith(".")]
        shutil.rmtree(out)
    assert number > 10 and {("1", "1"), ("2", "2")} <= seen


# --- mistakes


def test_a_missing_extra_names_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the student is read: there is none."""
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name in ("onnxruntime", "coremltools") else name)
    for name, missing, extra in (("a.onnx", "onnxruntime", "onnx"), ("a.mlpackage", "coremltools", "coreml")):
        result = run(tmp_path / "student.safetensors", tmp_path / name)
        said = f"error: {missing}: not installed, and needed for --format {extra}; pip install 'mgd-pipeline[{extra}]'\n"
        assert (result.exit_code, result.stderr) == (2, said)
    web = run(tmp_path / "student.safetensors", tmp_path / "demo", "--format", "web")
    assert web.stderr == "error: onnxruntime: not installed, and needed for --format web; pip install 'mgd-pipeline[onnx]'\n"


def test_a_runtime_for_another_torch_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "requires", lambda name: ["numpy", "torch<2.5,>=2.4", "torch<1; extra == 'old'"])
    monkeypatch.setattr(formats, "version", lambda name: "0.1")
    result = run(tmp_path / "student.safetensors", tmp_path / "a.onnx")
    needs = f"onnx 0.1: needs torch <2.5,>=2.4, and torch {torch.__version__} is installed"
    remedy = "pip install 'mgd-pipeline[onnx]' in an environment of its own"
    assert (result.exit_code, result.stderr) == (2, f"error: {needs}; {remedy}\n")
    monkeypatch.setattr(formats, "requires", lambda name: [])

    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _ZN2at4\nmore")

    monkeypatch.setattr(formats.importlib, "import_module", broken)
    result = run(tmp_path / "student.safetensors", tmp_path / "a.onnx")
    said = f"error: onnx: cannot be imported beside torch {torch.__version__} (undefined symbol: _ZN2at4); pip install "
    assert result.exit_code == 2 and result.stderr.startswith(said) and len(result.stderr.splitlines()) == 1


def test_a_photo_that_cannot_be_read_is_not_the_network_s_fault(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="photo: damaged"), converting(load_student(tiny_student(tmp_path / "s.safetensors")), ""):
        raise DataError("photo: damaged")


def test_an_encoder_that_torch_cannot_export_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.onnx.OnnxExporterError("Failed to export the model.\nmore\nlines")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    result = run(tiny_student(tmp_path / "student.safetensors"), tmp_path / "a.onnx")
    assert result.exit_code == 1
    said = "fpn with tu-test_resnet: torch cannot export it to ONNX (Failed to export the model.); try another --format"
    assert result.stderr == f"error: {said}\n"


def test_mistakes_are_one_line_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    student = tiny_student(tmp_path / "student.safetensors")
    (tmp_path / "empty").mkdir()
    tiny_student(tmp_path / "long.safetensors", long_side=72)
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "a.mlpackage").mkdir()
    (tmp_path / "file.mlpackage").write_bytes(b"mine")
    (tmp_path / "dead").symlink_to("nowhere")
    (tmp_path / "notes.bin").write_bytes(b"mine")
    for arguments, code, message in (
        (["gone.safetensors", "a.onnx"], 1, "gone.safetensors: no such file; there is student.safetensors"),
        (["empty", "a.onnx"], 1, "empty: is a folder; name the file of weights in it"),
        ([student, "a.PT"], 2, "a.PT: its suffix tells no format; TorchScript is retired, and .pt2 takes its place; write .onnx"),
        ([student, "a.pt"], 2, "a.pt: its suffix tells no format; TorchScript is retired, and .pt2 takes its place; write .onnx"),
        (
            [student, "a"],
            2,
            "a: its suffix tells no format; write .onnx, .pte, .xml, .mlpackage, .tflite, .pt2, or --format smp or web",
        ),
        ([student, "a.onnx", "--format", "executorch"], 2, "a.onnx: a file of --format executorch ends in .pte"),
        ([student, "a.pt2", "--format", "smp"], 2, "a.pt2: ends in .pt2, the suffix of torch-export; --format smp writes a folder"),
        ([student, "a.pt2", "--size", "64"], 2, "--size 64: write height x width in pixels, such as 512x512"),
        ([student, "a.pt2", "--size", "64x9000"], 2, "--size 64x9000: too large; name 58x8192"),
        (["long.safetensors", "a.pt2", "--size", "64x73"], 2, "the student sees at most 72 pixels along the longer side"),
        (
            [student, "new", "--format", "smp", "--size", "64x64"],
            2,
            "--size: is not for --format smp, whose network takes any size",
        ),
        (
            [student, "notes.xml"],
            2,
            "notes.bin: exists without notes.xml, and --format openvino would replace it; name another file",
        ),
        (
            [student, "file.mlpackage"],
            2,
            "file.mlpackage: is a file, and --format coreml writes a folder; move it away, or name another",
        ),
        ([student, "a.mlpackage"], 2, "a.mlpackage: is a folder, and not one that this command made; name another"),
        ([student, "a.onnx", "--int8"], 2, "--int8: needs images to calibrate on; name a folder by --images"),
        ([student, "a.pt2", "--int8"], 2, "--int8: is for --format onnx or executorch or openvino, not torch-export"),
        ([student, "a.onnx", "--images", "empty"], 2, "--images empty: are for --int8 alone"),
        ([student, "a.onnx", "--int8", "--images", "empty"], 1, "empty: holds no images (.jpg"),
        ([student, "a.onnx", "--int8", "--images", "gone"], 2, "--images gone: no such folder"),
        ([student, "a\nb.onnx"], 1, r"'a\nb.onnx': a line break, tab or control character in the name"),
        ([student, os.fsdecode(b"\xff.onnx")], 1, r"'\udcff.onnx': the file name is not UTF-8"),
        ([student, "folder.onnx"], 2, "folder.onnx: is a folder; name a file"),
        ([student, "student.safetensors/a.onnx"], 2, "student.safetensors: is not a folder, so nothing can be written below it"),
        ([student, "dead", "--format", "smp"], 2, "dead: exists; remove it, or name another folder"),
        ([student, "empty", "--format", "smp"], 2, "empty: exists; remove it, or name another folder"),
    ):
        result = run(*arguments)
        assert result.exit_code == code, (arguments, result.stderr)
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
    kept = {"student.safetensors", "long.safetensors", "empty", "folder.onnx", "a.mlpackage", "file.mlpackage", "dead", "notes.bin"}
    assert {path.name for path in tmp_path.iterdir()} == kept
