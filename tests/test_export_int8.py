"""Students in int8, in each runtime that has it: calibrated, close to float32, and measured where they run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mgd_stages.tools.export as tool
from conftest import tiny_student
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.exports import executorch as executorch_files
from mgd_pipeline.exports import onnx as onnx_files
from mgd_pipeline.exports import openvino as openvino_files
from mgd_pipeline.exports.deployed import Calibration, Size, to_batch
from mgd_pipeline.exports.formats import FORMATS, require
from mgd_pipeline.students.student import Student, load_student
from mgd_stages.cli import app
from mgd_stages.projects.init import init_project
from mgd_stages.run.held_out import evaluate_network
from mgd_stages.run.project import open_project
from mgd_stages.stages.prepare_data import prepare_data

QUANTISERS = {"onnx": "onnxruntime", "executorch": "torchao", "openvino": "nncf"}
PIXELS = (64, 96)
GRAPHS: dict[Size | None, bytes] = {}


@pytest.fixture(autouse=True)
def each_graph_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's exporter takes many seconds, and all students here have the same weights; what comes after it is real."""
    write = onnx_files.to_onnx

    def kept(student: Student, size: Size | None = None) -> bytes:
        if size not in GRAPHS:
            GRAPHS[size] = write(student, size)
        return GRAPHS[size]

    for module in (onnx_files, openvino_files):
        monkeypatch.setattr(module, "to_onnx", kept)


def a_student(folder: Path, **changes: Any) -> Path:
    return tiny_student(folder / "student.safetensors", decoder="deeplabv3plus", **changes)


def export(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)], catch_exceptions=False)


def test_these_formats_have_int8() -> None:
    assert {name: one.quantiser for name, one in FORMATS.items() if one.quantise} == QUANTISERS


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(4):
        pixels = np.kron(random.integers(0, 256, (8, 12, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def said_in(kind: str, made: Path) -> str:
    """The note about int8, read without this package."""
    if kind == "onnx":
        import onnx

        return next(json.loads(entry.value) for entry in onnx.load(made).metadata_props if entry.key == "int8")
    if kind == "openvino":
        import openvino

        return json.loads(openvino.Core().read_model(made).get_rt_info(["mgd", "int8"]).astype(str))
    return json.loads(Path(f"{made}.json").read_text(encoding="utf-8"))["int8"]


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_int8_is_close_to_the_student_in_each_runtime(kind: str, photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Calibrated on a folder of photos; formats of any size keep that, and the file is small."""
    monkeypatch.chdir(tmp_path)
    form, path = FORMATS[kind], a_student(tmp_path)
    made = tmp_path / f"int8{form.suffix}"
    size = ["--size", f"{PIXELS[0]}x{PIXELS[1]}"] if form.fixed else []
    result = export(path, made, "--int8", "--images", photos, *size)
    assert result.exit_code == 0, result.output
    assert re.search(r"^int8: \S+ % of the pixels of 4 images keep their class$", result.stdout, re.M)
    beside = [*tmp_path.glob("int8*")]
    assert sum(file.stat().st_size for file in beside) < 0.5 * path.stat().st_size
    assert len(beside) == 1 + len(form.beside)
    assert re.fullmatch(rf"calibrated on 4 images \(images of a folder\) by {QUANTISERS[kind]} \d\S+", said_in(kind, made))
    run, student = form.load(made), load_student(path)
    images = [to_batch(np.asarray(Image.open(photo))) for photo in sorted(photos.iterdir())]
    with torch.no_grad():
        expected, logits = student(torch.cat(images)), torch.cat([run(image) for image in images])
    assert float((logits.argmax(1) == expected.argmax(1)).double().mean()) > tool.AGREEMENT
    assert not torch.allclose(logits, expected, rtol=0, atol=1e-3 * float(expected.abs().max())), "8 bits are coarser"
    if not form.fixed:
        assert run(255 * torch.rand(2, 3, 70, 51)).shape == (2, 4, 70, 51)


def test_a_damaged_photo_is_told_of_before_the_export(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(*_: object) -> None:
        raise AssertionError("the export takes minutes")

    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos/z.png").write_bytes((photos / "0.png").read_bytes()[:100])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], write=too_late))
    result = export(a_student(tmp_path), "a.onnx", "--int8", "--images", "photos")
    assert result.exit_code == 1 and result.stderr.startswith("error: photos/z.png: cannot be decoded"), result.stderr


def test_products_with_weights_are_quantised_and_others_are_not(photos: Path, tmp_path: Path) -> None:
    """The linear layers of a transformer are most of its weights; attention has none."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).normal(size=(PIXELS[1], 200)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["images", "weights"], ["tokens"], "linear"),
        helper.make_node("Transpose", ["tokens"], ["turned"], "turn", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["tokens", "turned"], ["logits"], "attention"),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, PIXELS[0], width])
        for name, width in (("images", PIXELS[1]), ("logits", PIXELS[0]))
    ]
    graph = helper.make_graph(nodes, "student", values[:1], values[1:], [numpy_helper.from_array(weights, "weights")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "written.onnx").write_bytes(model.SerializeToString())
    student, made = load_student(a_student(tmp_path)), tmp_path / "int8.onnx"
    calibration = Calibration(tuple(photos.iterdir()), student.photo_rules, None, None, "calibrated")
    onnx_files.quantise(student, tmp_path / "written.onnx", made, None, calibration)
    assert made.stat().st_size < 0.5 * (tmp_path / "written.onnx").stat().st_size
    small = {node.name: node for node in onnx.load(made).graph.node}
    assert all("Dequantize" in name for name in small["linear"].input)
    assert list(small["attention"].output) == ["logits"], "else its result would be rounded before it gets this name"


@pytest.mark.parametrize("decoder", ["fpn", "deeplabv3plus"])
def test_int8_of_executorch_in_a_process_of_its_own(decoder: str, photos: Path, tmp_path: Path) -> None:
    """As a person calls it. This DeepLabV3+ adds a margin before a pool, which XNNPACK loads with its input's scale alone."""
    student, made = tiny_student(tmp_path / "student.safetensors", decoder=decoder), tmp_path / "int8.pte"
    command = [sys.executable, "-m", "mgd_stages.cli", "export", student, made, "--int8", "--images", photos, "--size", "64x96"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert re.search(r"^int8: \S+ % of the pixels of 4 images keep their class$", done.stdout, re.M)
    assert "calibrated on 4 images (images of a folder) by torchao" in said_in("executorch", made)
    assert made.stat().st_size < 0.5 * student.stat().st_size


def test_int8_of_executorch_rounds_behind_relu6(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution and its ReLU6 are one step. What is between them reaches to 765 here, and would have steps of 4."""
    require(FORMATS["executorch"], int8=True)
    layer = torch.nn.Conv2d(3, 4, 1, bias=False)
    network = torch.nn.Sequential(layer, torch.nn.ReLU6()).eval().requires_grad_(False)
    layer.weight.copy_(torch.tensor([[1, 1, 1], [1, -1, 1], [-1, 1, -1], [1, -1, 0]])[:, :, None, None])
    program = torch.export.export(network, (torch.zeros(1, 3, *PIXELS),))
    monkeypatch.setattr(executorch_files, "to_program", lambda student, size: program)
    student, made = load_student(a_student(tmp_path)), tmp_path / "int8.pte"
    files = tuple(sorted(photos.iterdir()))
    executorch_files.quantise(student, made, made, PIXELS, Calibration(files, student.photo_rules, None, PIXELS, "calibrated"))
    images = torch.randint(0, 256, (1, 3, *PIXELS), generator=torch.Generator().manual_seed(0)).float()
    expected, found = network(images), executorch_files.load(made)(images)
    assert ((expected > 0) & (expected < 6)).sum() > 100
    assert float((found - expected).abs().max()) < 6 / 255


REPORTS = """
import sys
from openvino_telemetry.backend.backend_ga4 import GA4Backend
GA4Backend.send = lambda self, message: print("sent", message)
if sys.argv[1:] == ["by itself"]:
    import openvino, nncf
from mgd_pipeline.exports.formats import FORMATS, require
require(FORMATS["openvino"], int8=True)
from nncf.telemetry import telemetry
telemetry.send_event("a", "b", "c")
"""


@pytest.mark.parametrize("by_itself", [False, True])
def test_nothing_is_reported_to_anybody(by_itself: bool) -> None:
    """OpenVINO and NNCF report imports and uses by themselves, where CI is not set; from here they do not."""
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "NNCF_CI", "NNCF_DEV")}
    command = [sys.executable, "-c", REPORTS, *(["by itself"] if by_itself else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert ("sent" in done.stdout) == by_itself, done.stdout


COMPILED = """
import faulthandler, signal
from pathlib import Path
faulthandler.enable()
import numpy, openvino
from openvino import opset13 as ops
from mgd_pipeline.exports.openvino import load
images = ops.parameter([1, 3, 16, 16], numpy.float32)
weights = ops.constant(numpy.ones((8, 3, 3, 3), numpy.float32))
model = openvino.Model([ops.convolution(images, weights, [1, 1], [1, 1], [1, 1], [1, 1])], [images])
openvino.save_model(model, "a.xml")
first, second = load(Path("a.xml")), load(Path("a.xml"))
del first
del second
signal.signal(signal.SIGINT, lambda *_: print("heard"))
signal.raise_signal(signal.SIGINT)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signal stacks are OpenVINO's on Linux")
def test_signals_are_heard_after_two_models_of_openvino(tmp_path: Path) -> None:
    """OpenVINO itself leaves a freed stack for signals behind. This ended long test runs when the next child process ended."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def test_int8_that_changes_most_pixels_is_refused(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrated on black images: every range is wrong."""
    whole, black = tool.check_agreement, [True]

    def seen(self: Calibration) -> Any:
        return (
            0 * to_batch(np.asarray(Image.open(path))) if black[0] else to_batch(np.asarray(Image.open(path)))
            for path in self.paths
        )

    def check(*arguments: Any) -> None:
        black[0] = False
        whole(*arguments)

    monkeypatch.setattr(Calibration, "__iter__", seen)
    monkeypatch.setattr(tool, "check_agreement", check)
    monkeypatch.chdir(tmp_path)
    result = export(a_student(tmp_path), "int8.onnx", "--int8", "--images", photos)
    assert result.exit_code == 1 and re.search(r"^error: int8: \S+ % of the pixels .* fewer than 80 %", result.stderr)
    assert not Path("int8.onnx").exists()


def test_int8_in_a_project_is_measured_in_miou(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Calibrated on its labelled images; the mIoU of float32 is the one that evaluate gives the student."""
    path = a_student(tmp_path)
    random = np.random.default_rng(0)
    for name in ("train/a", "train/b", "val/c", "val/d"):
        for kind, shape, top in (("images", (40, 64, 3), 256), ("masks", (40, 64), 4)):
            file = tmp_path / f"set/{kind}/{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, top, shape, dtype=np.uint8)).save(file)
    (tmp_path / "set/masks/train/b.png").unlink()
    init_project("folder", tmp_path / "set", "1/1", tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    classes = "data.classes=[sky,sea,sand,salt]"
    project = open_project(Path("params.yaml"), [classes])
    prepare_data(project, "stop")
    result = export(path, "int8.onnx", "--int8", "--set", classes)
    assert result.exit_code == 0, result.stderr
    assert "int8: calibrating on 1 image\n" in result.stdout, "the one with a mask"
    assert said_in("onnx", Path("int8.onnx")).startswith(
        "calibrated on 1 image (the labelled images of the project) by onnxruntime"
    )
    said = r"int8: mIoU (\S+) %, (\S+) points from the (\S+) % of float32 \(split val, 2 images, each as a whole\)"
    ((after, change, before),) = [map(float, numbers) for numbers in re.findall(said, result.stdout)]
    student = load_student(path)
    manifest = read_manifest(project.manifest, project.base)
    expected = evaluate_network(project, manifest, student.network, student.normalisation, "").miou
    assert before == pytest.approx(100 * expected, abs=0.02) and change == pytest.approx(after - before, abs=0.011)
    assert change != 0

    def at_one_size(images: torch.Tensor) -> torch.Tensor:
        assert images.shape == (1, 3, *PIXELS)
        return student(images)

    # --- in a file of one size, and beside an int8 that sees nothing
    mends = "`mgd-pipeline train-student --quantised` makes a student that loses less"
    for metadata, remedy in (({}, mends), ({"int8_fine_tuning": {}}, "this student is fine-tuned for int8 already; calibrate on")):
        student.metadata |= metadata
        capsys.readouterr()
        tool.show_cost(project, student, torch.no_grad()(at_one_size), lambda images: torch.zeros(1, 4, *PIXELS), PIXELS)
        out = " ".join(capsys.readouterr().out.split())
        assert "(split val, 2 images, each scaled to 64 x 96)" in out
        assert f"int8: that is more than 0.5 points; {remedy}" in out

    other = tiny_student(tmp_path / "other.safetensors", classes=["sea", "sky", "sand", "salt"])
    refused = export(other, "other.onnx", "--int8", "--set", classes)
    assert refused.exit_code == 1 and "has other classes than the student" in refused.stderr and not Path("other.onnx").exists()
