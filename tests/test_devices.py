"""mgd-pipeline benchmark-device: every form has its figures, from processes of their own that take turns. No time is judged."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import tiny_student
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.errors import ParamsError, WeightsError
from mgd_pipeline.exports import deployed
from mgd_pipeline.exports.formats import FORMATS
from mgd_pipeline.students.student import load_student
from mgd_stages.cli import app
from mgd_stages.projects.init import init_project
from mgd_stages.run.held_out import evaluate_network
from mgd_stages.run.project import Project, open_project
from mgd_stages.stages.prepare_data import prepare_data
from mgd_stages.tools import device_processes, devices
from test_predict import files_below, save

CLASSES = "data.classes=[sky,sea,sand,salt]"
WRITE = FORMATS["torch-export"].write


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["benchmark-device", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student; exported for any size and for one; and a file that no runtime can load."""
    folder = tmp_path_factory.mktemp("files")
    student = load_student(tiny_student(folder / "student.safetensors"))
    WRITE(student, folder / "any.pt2", None)
    WRITE(student, folder / "fixed.pt2", (64, 96))
    (folder / "broken.pt2").write_bytes((folder / "fixed.pt2").read_bytes()[:100_000])
    return folder


def prepared(folder: Path) -> Project:
    """A project of random images with two in val."""
    random = np.random.default_rng(0)
    for name in ("train/a", "val/c", "val/d"):
        save(folder / f"set/images/{name}.png", random.integers(0, 256, (40, 64, 3), dtype=np.uint8))
        save(folder / f"set/masks/{name}.png", random.integers(0, 4, (40, 64), dtype=np.uint8))
    init_project("folder", folder / "set", "1/1", folder / "project")
    project = open_project(folder / "project/params.yaml", [CLASSES])
    prepare_data(project, "stop")
    return project


def test_every_form_has_its_figures(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mIoU of a form that takes any size is evaluate's; a form for one size sees images scaled, and has no other figures."""
    project = prepared(tmp_path)
    monkeypatch.setattr(devices, "cores", lambda: 1)
    names = ["any.pt2", "fixed.pt2", "broken.pt2"]
    options = ["--size", "64x96", "--size", "40x48", "--rounds", "2", "--config", project.base / "params.yaml", "--set", CLASSES]
    result = run(files / "student.safetensors", *(files / name for name in names), *options)
    lost = "error: broken.pt2: without figures, for the reasons above; export again, or leave out\n"
    assert result.exit_code == 1 and result.stderr == lost, result.stderr
    said = json.loads((project.results / "devices.json").read_text())
    rows = {(row["form"], tuple(row["size"])): row for row in said["rows"]}
    assert list(rows) == [(name, size) for name in ("torch", *names) for size in ((64, 96), (40, 48))]
    runs = {key: set(row["times"]) for key, row in rows.items() if row["times"]}
    assert runs == {key: {"1"} for key in rows if key[0] in ("torch", "any.pt2") or key == ("fixed.pt2", (64, 96))}
    for key in runs:
        assert all(0 < time["median_ms"] <= time["p95_ms"] for time in rows[key]["times"].values())
        assert 0 < rows[key]["memory_mb"] < 2000
    for name in names:
        assert rows[name, (64, 96)]["bytes"] == (files / name).stat().st_size
    manifest, student = read_manifest(project.manifest, project.base), load_student(files / "student.safetensors")
    expected = evaluate_network(project, manifest, student.network, student.normalisation, "").miou
    mious = {key: row["miou"] for key, row in rows.items()}
    assert mious["torch", (64, 96)] == mious["torch", (40, 48)] == pytest.approx(expected, abs=1e-6)
    assert mious["any.pt2", (40, 48)] == pytest.approx(expected, abs=1e-3)
    assert mious["fixed.pt2", (64, 96)] not in (None, mious["torch", (64, 96)]) and mious["fixed.pt2", (40, 48)] is None
    assert [row["form"] for row in said["rows"] if row["faults"]] == ["fixed.pt2", "broken.pt2", "broken.pt2"]
    assert said["threads"] == [1] and said["split"] == "val" and said["images"] == 2
    assert said["machine"]["processor"] and {"python", "torch"} <= set(said["versions"])
    table = (project.results / "devices.md").read_text()
    head, rule, *lines = [line for line in table.splitlines() if line.startswith("|")]
    assert table in result.stdout and re.fullmatch(
        r"\| form +\| file, MB \| image \| +1 thread, ms \| memory, MB \| mIoU, % \|", head
    )
    assert re.fullmatch(r"\| -+ (\| -+: ){5}\|", rule) and {len(line) for line in lines} == {len(head)}
    assert "Files with * see it scaled" in table and [line.endswith("* |") for line in lines] == [
        key == ("fixed.pt2", (64, 96)) for key in rows
    ]
    assert "`mgd-pipeline report` puts the table into the report\n" in result.stdout
    assert sum(line.startswith("|") for line in table.splitlines()) == 2 + len(rows)
    assert "broken.pt2, 64x96: broken.pt2: torch cannot load it (" in result.stdout and "fixed.pt2, 40x48: " in result.stdout


def test_left_out_sizes_are_those_of_the_files(files: Path, tmp_path: Path) -> None:
    """A size at which a file can have no figures is refused before anything is measured."""
    names = [files / name for name in ("student.safetensors", "any.pt2", "fixed.pt2")]
    result = run(*names, "--rounds", "1", "--output", tmp_path)
    assert result.exit_code == 0, result.stderr
    written = (tmp_path / "devices.json").read_text()
    assert {tuple(row["size"]) for row in json.loads(written)["rows"]} == {(64, 96)}
    result = run(*names, "--size", "512x512", "--output", tmp_path)
    expected = f"error: {files / 'fixed.pt2'}: takes images of 64x96 only; name --size 64x96, or leave --size out"
    assert result.stderr.splitlines()[0] == expected
    assert (tmp_path / "devices.json").read_text() == written


def test_left_out_sizes_are_those_of_the_project(files: Path, tmp_path: Path) -> None:
    project = prepared(tmp_path)
    rows = list(read_manifest(project.manifest, project.base).rows.values())
    student = load_student(files / "student.safetensors")
    assert devices.typical_size(student, []) == (512, 512) and devices.typical_size(student, rows) == (40, 64)
    student.long_side = 32
    assert devices.typical_size(student, []) == (32, 32) and devices.typical_size(student, rows) == (20, 32)


class Scripted(devices.Arm):
    """An arm without a process, which notes what it is asked."""

    asked: list[tuple[str, Any]]

    def ask(self, question: str, *about: Any) -> tuple[Any, str | None]:
        self.asked.append((self.form.name, about[0]))
        return (1.0, None) if about[0][0] < 50 else (None, "too large")


def test_forms_take_turns() -> None:
    asked: list[tuple[str, Any]] = []
    sizes = ((32, 32), (64, 64), (48, 48))
    fixed = replace(FORMATS["torch-export"], fixed=True)
    forms = [devices.Form(name, fixed, Path(__file__), sizes, 4) for name in "ab"]
    arms = [Scripted(form, threads, None, None) for form, threads in zip(forms, (1, 2), strict=True)]  # pyright: ignore
    for arm in arms:
        arm.asked = asked
    devices.in_turns(arms, 3)
    warm = [(name, size) for name in "ab" for size in sizes]
    assert asked == warm + 3 * [(name, size) for name in "ab" for size in (sizes[0], sizes[2])]
    assert [arm.seconds for arm in arms] == 2 * [{(32, 32): [1.0] * 3, (48, 48): [1.0] * 3}]
    assert [arm.faults for arm in arms] == 2 * [{(64, 64): "too large"}]
    rows = [devices._row(size, arms, 12_300_000, None) for size in sizes[:2]]
    assert rows[0]["times"] == {str(threads): {"median_ms": 1000.0, "p95_ms": 1000.0} for threads in (1, 2)}
    assert rows[1]["times"] == {} and rows[1]["faults"] == ["too large"]
    content = {"rows": rows, "threads": [1, 2], "split": None, "machine": {"processor": "x|y"}, "rounds": 3}
    lines = devices.markdown(content).splitlines()[:4]
    assert len({len(line) for line in lines}) == 1, "a table that is read in a terminal"
    head, _, first, second = (re.sub(" +", " ", line) for line in lines)
    size = f"{Path(__file__).stat().st_size / 1e6:.2f}"
    assert head == "| form | file, MB | image | 1 thread, ms | 2 threads, ms | memory, MB |"
    assert first == f"| a | {size} | 32x32 | 1000.0 (1000.0) | 1000.0 (1000.0) | 12 |"
    assert second == f"| a | {size} | 64x64 | - | - | 12 |"


class Here(devices.Arm):
    """An arm that runs in this process."""

    def ask(self, question: str, *about: Any) -> tuple[Any, str | None]:
        if question == "notes":
            return self.form.format.read_notes(self.form.path) if self.form.format else {}, None
        try:
            return getattr(device_processes, f"_{question}")(self.form.load(), *about), None
        except device_processes.FAULTS as error:
            return None, str(error)


def test_files_of_other_students_are_doubted(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other classes are a fault, so that no mIoU is counted from them; other weights are said, or else other masks."""
    size, one, student = (96, 160), FORMATS["torch-export"], load_student(files / "student.safetensors")
    more = tiny_student(tmp_path / "more.safetensors", classes=list("abcde"), palette=[[k, 0, 0] for k in range(5)])
    WRITE(load_student(more), tmp_path / "more.pt2", size)
    other = load_student(tiny_student(tmp_path / "old.safetensors", seed=1))
    WRITE(other, tmp_path / "old.pt2", size)
    with monkeypatch.context() as patch:  # as in a file that another program has made of the student
        patch.setattr(deployed, "FACTS", ("classes", "palette", "long_side"))
        WRITE(other, tmp_path / "unnamed.pt2", size)
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    paths = [*(tmp_path / name for name in ("more.pt2", "old.pt2", "unnamed.pt2", "broken.onnx")), files / "any.pt2"]
    forms = [devices.Form(path.name, FORMATS["onnx"] if path.suffix == ".onnx" else one, path, (size,), 4) for path in paths]
    arms = [Here(form, 1, None, None) for form in forms]  # pyright: ignore[reportArgumentType]
    devices.in_turns(arms, 1)
    devices.doubt_files(arms, student)
    said_more, old, unnamed, broken, fresh = (arm.faults.get(size, "") for arm in arms)
    assert said_more == "has 5 classes, and the student has 4: it is another student's file"
    assert unnamed.endswith(" % of a test picture have the student's class; is it another student's file?")
    hashes = f"{other.weights_sha256[:12]}..., not {student.weights_sha256[:12]}..."
    assert old == f"was exported from another student (SHA-256 of its weights: {hashes})"
    assert broken.startswith("broken.onnx: ONNX Runtime cannot load it (")
    assert fresh == "" and [len(arm.seconds) for arm in arms] == [0, 1, 1, 0, 1]
    assert [arm.whole for arm in arms] == [False, False, False, False, True]  # though 96x160 is a size that is tried


def test_a_process_that_dies_has_a_fault(files: Path) -> None:
    form = devices.Form("torch", None, files / "student.safetensors", ((32, 32),), 4)
    with devices.running([form], [1]) as (arm,):
        arm.process.kill()
        devices.in_turns([arm], 2)
        assert not arm.seconds and arm.faults == {(32, 32): "its process ended with code -9"}
    assert not arm.process.is_alive()


def test_ctrl_c_is_heard_by_the_process_that_asks_alone(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also while a process still loads its modules."""
    form = devices.Form("torch", None, files / "student.safetensors", ((32, 32),), 4)
    with devices.running([form], [1]) as (arm,):
        os.kill(arm.process.pid or 0, signal.SIGINT)
        assert arm.ask("time", (32, 32))[1] is None
        os.kill(arm.process.pid or 0, signal.SIGINT)
        assert arm.ask("time", (32, 32))[1] is None
    assert arm.process.exitcode == 0 and "Traceback" not in capfd.readouterr().err
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


MASK = """
import sys
from pathlib import Path
from mgd_stages.tools import device_processes, devices
form = devices.Form("torch", None, Path(sys.argv[1]), ((32, 32),), 4)
if __name__ == "__main__":
    with devices.running([form], [1, 1]) as arms:
        for arm in arms:
            status = Path(f"/proc/{arm.process.pid}/status").read_text().splitlines()
            print(next(line.split()[1] for line in status if line.startswith("SigBlk")))
        raise KeyboardInterrupt
"""


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="Linux alone has /proc")
def test_not_even_the_first_process_hears_ctrl_c_and_none_outlives_it(files: Path, tmp_path: Path) -> None:
    """In a program that has started no process before. The processes are still loading, and nobody waits for that."""
    (tmp_path / "mask.py").write_text(MASK)
    command = [sys.executable, tmp_path / "mask.py", files / "student.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    masks = [int(mask, 16) for mask in done.stdout.split()]
    assert len(masks) == 2 and all(mask & 1 << signal.SIGINT - 1 for mask in masks), done.stderr


def test_processes_end_at_once_after_an_error(files: Path) -> None:
    form = devices.Form("torch", None, files / "student.safetensors", ((32, 32),), 4)
    with pytest.raises(KeyboardInterrupt), devices.running([form], [1]) as (arm,):
        raise KeyboardInterrupt
    assert arm.process.exitcode == -signal.SIGKILL


def test_without_files_every_installed_format_is_exported(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file for all sizes, or for each; formats whose runtime is missing, and networks that a format cannot hold, are told of."""

    def refuse(*_: object) -> None:
        raise WeightsError("fpn with x: cannot be converted")

    def copied(student: Any, path: Path, size: Any) -> None:
        shutil.copy(files / ("any.pt2" if size is None else "fixed.pt2"), path)

    one = replace(FORMATS["torch-export"], write=copied)
    changed = {
        "any": one,
        "fixed": replace(one, name="fixed", fixed=True),
        "absent": replace(one, name="absent", modules=("no_such_module",), extra="absent"),
        "refused": replace(one, name="refused", write=refuse),
        "folder": replace(one, name="folder", suffix=""),
    }
    monkeypatch.setattr(devices, "FORMATS", changed)
    student = load_student(tiny_student(tmp_path / "student.safetensors", long_side=100))
    forms = devices.exported(student, [(64, 96), (128, 128)], tmp_path)
    assert [(form.name, form.sizes) for form in forms] == [("torch-export", ((64, 96), (128, 128))), ("fixed", ((64, 96),))]
    assert all(form.bytes == form.path.stat().st_size > 1000 for form in forms)
    said = capsys.readouterr().out
    assert "absent is left out: no_such_module: not installed" in said and "pip install 'mgd-pipeline[absent]'" in said
    assert "refused is left out: fpn with x: cannot be converted" in said
    assert "fixed is left out: the student sees at most 100 pixels along the longer side" in said


def test_in_a_project_forms_are_quantised_too(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the project's labelled images, at the size of the file; what cannot be quantised leaves its float32 form."""
    calibrated: list[tuple[int, Any]] = []

    def copied(student: Any, path: Path, size: Any) -> None:
        shutil.copy(files / ("any.pt2" if size is None else "fixed.pt2"), path)

    def quantised(student: Any, written: Path, path: Path, size: Any, calibration: Any) -> None:
        calibrated.append((len(calibration), calibration.size))
        shutil.copy(written, path)

    def refuse(*_: object) -> None:
        raise WeightsError("no int8 here")

    one = replace(FORMATS["torch-export"], write=copied, quantise=quantised, quantiser="torch")
    changed = {"any": one, "fixed": replace(one, name="fixed", fixed=True), "refused": replace(one, name="float", quantise=refuse)}
    monkeypatch.setattr(devices, "FORMATS", changed)
    student = load_student(files / "student.safetensors")
    forms = devices.exported(student, [(64, 96)], tmp_path / "files", prepared(tmp_path))
    assert [form.name for form in forms] == ["torch-export", "torch-export int8", "fixed", "fixed int8", "float"]
    assert calibrated == [(1, None), (1, (64, 96))]
    assert len({form.path for form in forms}) == 5 and all(form.sizes == ((64, 96),) for form in forms)
    assert "float int8 is left out: no int8 here" in capsys.readouterr().out


def test_mistakes_are_one_line(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    student = files / "student.safetensors"
    for arguments, said in (
        ([student, "gone.onnx"], "gone.onnx: no such file"),
        ([student, student], f"{student}: its suffix tells no format"),
        ([student, "--size", "64"], "--size 64: write height x width in pixels"),
        ([student, "--output", student], f"{student}: is not a folder"),
    ):
        result = run(*arguments)
        assert result.exit_code != 0 and result.stderr.startswith(f"error: {said}"), result.stderr
        assert len(result.stderr.splitlines()) == 1
    monkeypatch.setattr(devices, "require", lambda form: (_ for _ in ()).throw(ParamsError(f"{form.name}: not installed")))
    assert run(student, files / "any.pt2").stderr == "error: torch-export: not installed\n"
    assert not files_below(tmp_path)
