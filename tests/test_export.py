"""Exported students: the same logits at any size and batch, what goes with them, and the refusal of anything else."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import AvgPool2dSame, Conv2dSame  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from typer.testing import CliRunner

from conftest import tiny_student
from mgd_pipeline import durable
from mgd_pipeline.errors import DataError, ParamsError, WeightsError
from mgd_pipeline.exports import coreml, deployed, formats
from mgd_pipeline.exports import onnx as onnx_files
from mgd_pipeline.exports import openvino as openvino_files
from mgd_pipeline.exports import smp as smp_folders
from mgd_pipeline.exports import torch_export as programs
from mgd_pipeline.exports.deployed import DeployedStudent, _AveragePool, _fixed_padding, converting, quiet
from mgd_pipeline.exports.formats import FORMATS, Format
from mgd_pipeline.networks.inference import run_whole
from mgd_pipeline.networks.weights import read_state_dict, sha256_of_state
from mgd_pipeline.students.student import Student, load_student
from mgd_stages.cli import app
from mgd_stages.projects.init import init_project
from mgd_stages.run.project import open_project
from mgd_stages.stages.prepare_data import prepare_data
from mgd_stages.tools import export as export_tool
from mgd_stages.tools.export import PHOTOS, SIZES, staging
from test_predict import save

LONG_SIDE = 72
"""Of the student that scales; most of the sizes here exceed it."""
STUDENTS = {"fpn": LONG_SIDE, "deeplabv3plus": None, "upernet": None}
"""Long sides by decoder. The smallest of the three scales: exporting the scaling takes torch's exporter longest."""
NAMES = {
    "onnx": "student.onnx",
    "openvino": "student.xml",
    "torch-export": "student.pt2",
    "smp": "smp",
    "executorch": "student.pte",
    "litert": "student.tflite",
    "coreml": "student.mlpackage",
}
DYNAMIC = [(kind, decoder) for kind in ("onnx", "torch-export", "smp") for decoder in STUDENTS] + [("openvino", "fpn")]
"""OpenVINO's file is made from ONNX's, so one decoder says enough."""
FIXED = ["executorch", "litert", "coreml"]
SIZE = (40, 51)
"""Height and width of the images of files for one size."""


def runtime_of(kind: str) -> None:
    """Skips where the runtime is not installed, or does not fit torch: each format has an extra of its own."""
    try:
        formats.require(FORMATS[kind])
    except ParamsError as error:
        pytest.skip(str(error))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)], catch_exceptions=False)


Exported = tuple[Path, Path, str]
"""A student file, what the command made of it, and what the command said."""
Export = Callable[[str, str], Exported]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports a student to a format, by format and decoder; each is made once."""
    made: dict[tuple[str, str], Exported] = {}

    def export(kind: str, decoder: str) -> Exported:
        if (kind, decoder) not in made:
            runtime_of(kind)
            folder = tmp_path_factory.mktemp(f"{kind}-{decoder}")
            names: dict[str, Any] = {} if kind == "onnx" else {"classes": ["sky", "sea", "Straße", "道路"]}
            student = tiny_student(folder / "student.safetensors", decoder=decoder, long_side=STUDENTS[decoder], **names)
            fixed = ["--size", f"{SIZE[0]}x{SIZE[1]}"] if kind in FIXED else []
            with pytest.MonkeyPatch.context() as patch:
                if kind == "openvino":  # torch's exporter is slow, and its result is the same
                    model = export("onnx", decoder)[1].read_bytes()
                    patch.setattr(openvino_files, "to_onnx", lambda student, size: model)
                told = ["--format", kind] if kind == "smp" else []
                result = run(student, folder / "new" / NAMES[kind], *told, *fixed)
            assert result.exit_code == 0, result.stderr
            made[kind, decoder] = student, folder / "new" / NAMES[kind], result.stdout
        return made[kind, decoder]

    return export


@pytest.fixture
def cached_onnx(exported: Export, monkeypatch: pytest.MonkeyPatch) -> Exported:
    """The exporter itself takes many seconds; here it is quick, and all that comes after it is real."""
    made = exported("onnx", "fpn")
    monkeypatch.setattr(onnx_files, "to_onnx", lambda student, size: made[1].read_bytes())
    return made


def in_smp(folder: Path) -> Callable[[Tensor], Tensor]:
    """Loaded by smp alone; scaled, normalised and padded by hand as mgd.json says."""
    model, note = smp.from_pretrained(str(folder)).eval(), json.loads((folder / "mgd.json").read_text())
    mean, std = (torch.tensor(note[name])[:, None, None] for name in ("mean", "std"))

    def by_hand(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        long_side = note["long_side"]
        if long_side is not None and max(height, width) > long_side:
            tall, wide = (max(1, int(side * long_side / max(height, width) + 0.5)) for side in (height, width))
            pictures = (Image.fromarray(image.permute(1, 2, 0).byte().numpy()) for image in images)
            small = [np.array(picture.resize((wide, tall), Image.Resampling.BILINEAR)) for picture in pictures]
            logits = by_hand(torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float())
            return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
        return model(F.pad((images - mean) / std, (0, -width % 32, 0, -height % 32)))[..., :height, :width]

    return by_hand


def in_onnxruntime(path: Path) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(path)
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def in_openvino(path: Path) -> Callable[[Tensor], Tensor]:
    import openvino

    with openvino_files.kept_signal_stack():
        model = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(model(images.numpy())["logits"].copy())


def in_executorch(path: Path) -> Callable[[Tensor], Tensor]:
    from executorch.runtime import Runtime

    method: Any = Runtime.get().load_program(path).load_method("forward")
    return lambda images: method.execute([images])[0].clone()


def in_litert(path: Path) -> Callable[[Tensor], Tensor]:
    from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]

    interpreter = Interpreter(model_path=str(path))
    model = interpreter.get_signature_runner()
    (name,) = model.get_input_details()
    return lambda images: torch.from_numpy(next(iter(model(**{name: images.numpy()}).values())))


RUNTIMES: dict[str, Callable[[Path], Callable[[Tensor], Tensor]]] = {
    "onnx": in_onnxruntime,
    "openvino": in_openvino,
    "torch-export": lambda path: torch.export.load(path).module(),
    "smp": in_smp,
    "executorch": in_executorch,
    "litert": in_litert,
    "coreml": coreml.load,  # Core ML itself needs a Mac
}
"""Each format in its plain runtime, as docs/students.md says."""


def metadata_of(path: Path) -> dict[str, Any]:
    return {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}


def random_sizes(count: int = 4) -> list[tuple[int, int, int, int]]:
    """Other ones than the command compares."""
    random = np.random.default_rng(7)
    sizes = [(int(random.integers(1, 4)), 3, int(random.integers(33, 150)), int(random.integers(33, 150))) for _ in range(count)]
    assert not set(sizes) & set(SIZES)
    return sizes


# --- the same network


@pytest.mark.parametrize(("kind", "decoder"), DYNAMIC)
def test_exported_networks_are_the_student(kind: str, decoder: str, exported: Export) -> None:
    """Its logits at sizes that the command has not compared, and the masks of `predict` for whole photos: smaller and larger than
    LONG_SIDE, wide and tall ones, as somebody sends them who has read no metadata."""
    path, made, said = exported(kind, decoder)
    student, network = load_student(path), torch.no_grad()(RUNTIMES[kind](made))
    for size in random_sizes():
        images = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(sum(size))).float()
        with torch.no_grad():
            expected, logits = student(images), network(images)
        assert logits.shape == expected.shape == (size[0], 4, *size[2:]) and logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5 * float(expected.abs().max()))
        assert expected.argmax(1).unique().numel() > 1
    random = np.random.default_rng(3)
    for height, width in ((40, 51), (72, 72), (73, 71), (270, 480), (131, 97), (31, 400), (500, 160), (99, 1), (1, 1)):
        image = random.integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
        image = image.repeat(4, 0).repeat(4, 1)[:height, :width]
        mask = network(deployed.to_batch(image)).argmax(1)[0].numpy()
        assert mask.shape == (height, width) and (mask == student.predict(image)).mean() >= 0.999, (height, width)

    lines = re.findall(r"^(\d+ x 3 x \d+ x \d+): logits up to .*, largest difference (\S+), (\S+) % the same class$", said, re.M)
    assert [line[0] for line in lines] == [" x ".join(map(str, size)) for size in SIZES]
    assert all(float(line[1]) < 1e-3 and float(line[2]) > 99 for line in lines)
    photos = re.findall(r"^photo of (\d+) x (\d+) pixels: (\S+) % of them have the class that predict gives them$", said, re.M)
    assert len(photos) == len(PHOTOS) and min(float(share) for *_, share in photos) >= 99.9
    assert sum(max(int(width), int(height)) > LONG_SIDE for width, height, _ in photos) >= 3
    assert kind == "smp" or re.search(rf"torch \d+ ms \(1\.00\), {kind} \d+ ms \(\d+\.\d\d\)", said)
    inside = "of any size; larger ones are scaled down to a long side of 72 pixels inside, as predict does"
    before = "mgd.json says how images are scaled down to a long side of 72 pixels before, and normalised"
    assert (inside in said, before in said) == (decoder == "fpn" and kind != "smp", decoder == "fpn" and kind == "smp")


@pytest.mark.parametrize("kind", FIXED)
def test_files_for_one_size_are_the_student(kind: str, exported: Export) -> None:
    """Images of the size that the file was made for, as noise and as photos; any other size is refused in one line."""
    path, made, said = exported(kind, "fpn")
    student, network = load_student(path), RUNTIMES[kind](made)
    random = np.random.default_rng(5)
    for image in (*random.integers(0, 256, (2, *SIZE, 3), dtype=np.uint8), np.full((*SIZE, 3), 255, np.uint8)):
        images = deployed.to_batch(image)
        with torch.no_grad():
            expected, logits = student(images), network(images)
        assert logits.shape == expected.shape == (1, 4, *SIZE) and logits.dtype == torch.float32
        bound = 2e-2 if kind == "coreml" else 5e-5
        torch.testing.assert_close(logits, expected, rtol=0, atol=bound * float(expected.abs().max()))
        least = 0.99 if kind == "coreml" else 0.999
        assert (logits.argmax(1)[0].numpy() == student.predict(image)).mean() >= least
    assert said.count("1 x 3 x 40 x 51: logits up to") == 2 and said.count("photo of 51 x 40 pixels: ") == 3
    assert "an image is RGB, 0 to 255, of 40 x 51 pixels (height x width)" in said
    with pytest.raises(WeightsError, match=r"cannot run the exported network at 1 x 3 x 64 x 64 \("):
        FORMATS[kind].load(made)(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(("kind", "decoder"), [*DYNAMIC, *((kind, "fpn") for kind in FIXED)])
def test_files_say_what_goes_in_and_what_comes_out(kind: str, decoder: str, exported: Export) -> None:
    """One file or folder, or two files, and all that a user of it needs to know."""
    path, made, printed = exported(kind, decoder)
    beside = {"openvino": ["student.bin"], "executorch": ["student.pte.json"], "litert": ["student.tflite.json"]}.get(kind, [])
    assert sorted(file.name for file in made.parent.iterdir()) == sorted([made.name, *beside])
    student, extra = load_student(path), {"metadata.json": ""}
    if kind == "onnx":
        model = onnx.load(made)
        onnx.checker.check_model(model)
        values = (*model.graph.input, *model.graph.output)
        dims = {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
        assert dims == {"images": ["batch", 3, "height", "width"], "logits": ["batch", 4, "height", "width"]}
        said = metadata_of(made)
    elif kind == "torch-export":
        torch.export.load(made, extra_files=extra)
        said = json.loads(extra["metadata.json"])
    elif kind == "openvino":
        import openvino

        notes = openvino.Core().read_model(made).get_rt_info("mgd").value
        said = {key: json.loads(value) for key, value in notes.items()}
    elif kind == "coreml":
        import coremltools

        with quiet():
            model = coremltools.models.MLModel(str(made), skip_model_load=True)
        said = {k: json.loads(v) for k, v in model.user_defined_metadata.items() if not k.startswith("com.github")}
        assert sys.platform == "darwin" or (said["compared"].startswith("not run: Core ML") and "not run: Core ML" in printed)
        assert [value.name for value in (*model.get_spec().description.input, *model.get_spec().description.output)] == [
            "images",
            "logits",
        ]
    else:
        said = json.loads((made / "mgd.json" if kind == "smp" else Path(f"{made}.json")).read_text())
    assert FORMATS[kind].read_notes(made) == said
    assert said["weights_sha256"] == student.weights_sha256 == sha256_of_state(read_state_dict(path))
    assert said["classes"] == student.classes and said["palette"] == student.palette
    assert said["long_side"] == student.long_side
    steps = "padded with 0 to multiples of 32" if kind == "smp" else "normalisation and padding are inside"
    scaling = "longer side exceeds 72 pixels" if kind == "smp" else "scaling down to a long side of 72 pixels"
    assert steps in said["input"] and (scaling in said["input"]) == (decoder == "fpn" and kind not in FIXED)
    assert said.get("size") == (list(SIZE) if kind in FIXED else None)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (7, 4, 1), (2, 2, 1), (1, 2, 1), (4, 1, 1), (3, 2, 3)]
)
def test_fixed_padding_is_the_same_as_tensorflow_s(kernel: int, stride: int, dilation: int) -> None:
    layer = Conv2dSame(4, 6, kernel, stride=stride, dilation=dilation, groups=2)
    pool = AvgPool2dSame(kernel, stride, count_include_pad=False)
    for size in ((32, 64), (8, 4), (4, 96)):
        images = torch.randn(2, 4, *size)
        assert torch.equal(_fixed_padding(layer)(images), layer(images)), size
        assert torch.equal(_fixed_padding(pool)(images), pool(images)), size


@pytest.mark.parametrize("cells", [1, 2, 3, 6])
def test_average_pools_are_torch_s(cells: int) -> None:
    for size in ((1, 1), (1, 5), (7, 3), (12, 6), (13, 31)):
        features = torch.randn(2, 3, *size)
        torch.testing.assert_close(_AveragePool(cells)(features), nn.AdaptiveAvgPool2d(cells)(features), rtol=0, atol=1e-6)


def test_the_student_itself_stays_as_it_is(tmp_path: Path) -> None:
    student = load_student(tiny_student(tmp_path / "student.safetensors", decoder="upernet"))
    DeployedStudent(student)
    assert not any(isinstance(layer, _AveragePool) for layer in student.modules())


# --- another network is refused


def fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    write = onnx_files.to_onnx

    def to_onnx(student: Student, size: None) -> bytes:
        proto = onnx.load_from_string(write(student, size))
        proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 96
        return proto.SerializeToString()

    monkeypatch.setattr(onnx_files, "to_onnx", to_onnx)


def baked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upsampled and cut to the traced size, as `int(...)` in the wrong place would do."""
    resized = partial(F.interpolate, size=(96, 160), mode="bilinear", align_corners=True)
    monkeypatch.setattr(deployed, "run_whole", lambda *arguments: resized(run_whole(*arguments)))
    program = lambda student, size: torch.export.export(DeployedStudent(student), (torch.zeros(1, 3, 97, 130),))  # noqa: E731
    monkeypatch.setattr(programs, "to_program", program)


def no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = lambda images: torch.nan * images.mean(1, keepdim=True).expand(-1, 4, -1, -1)  # noqa: E731
    monkeypatch.setitem(FORMATS, "onnx", Format("onnx", ".onnx", onnx_files.write, lambda path: nothing))


def other_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and predict must be one: here the logits are forward's, and the masks are not predict's."""
    predict = Student.predict

    def other(self: Student, image: np.ndarray) -> np.ndarray:
        mask = predict(self, image).copy()
        mask[: -(-mask.shape[0] // 50)] += 1
        return mask

    monkeypatch.setattr(Student, "predict", other)


def other_std(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(student: Any, folder: Path, size: Any) -> None:
        smp_folders.write(student, folder)
        note = json.loads((folder / "mgd.json").read_text())
        (folder / "mgd.json").write_text(json.dumps({**note, "std": [58.0, 57.0, 57.0]}))

    monkeypatch.setitem(FORMATS, "smp", Format("smp", "", wrong, smp_folders.load))


@pytest.mark.parametrize(
    ("fault", "kind", "long_side", "said"),
    [
        (fixed_size, "onnx", LONG_SIDE, r"ONNX Runtime cannot run the exported network at 1 x 3 x 97 x 130 \(.*"),
        (baked, "torch-export", None, r"export: 1 x 3 x 97 x 130 gives \(1, 4, 96, 160\), not \(1, 4, 97, 130\); nothing .*"),
        (no_numbers, "onnx", LONG_SIDE, ".* largest difference nan.*"),
        (other_masks, "onnx", LONG_SIDE, r"export: photo of 32 x 43 pixels: 97\..*"),
        (other_std, "smp", None, r"export: 1 x 3 x 97 x 130: .* more than 0\.0001 of the largest logit, so nothing is written"),
    ],
)
@pytest.mark.usefixtures("cached_onnx")
def test_another_network_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None], kind: str, long_side: int | None, said: str
) -> None:
    student, path = tiny_student(tmp_path / "student.safetensors", long_side=long_side), tmp_path / NAMES[kind]
    if kind != "smp":
        path.write_bytes(b"what was there before")
    fault(monkeypatch)
    result = run(student, path, "--format", kind)
    assert result.exit_code == 1 and re.fullmatch(f"error: {said}\n", result.stderr), result.stderr
    assert set(tmp_path.iterdir()) == ({student} if kind == "smp" else {student, path})
    assert kind == "smp" or path.read_bytes() == b"what was there before"


# --- edges


@pytest.mark.parametrize(
    ("count", "size", "name"), [(2, (1, 1), "a.pt2"), (200, (33, 7), "a.pt2"), (200, (1, 1), "a.pte"), (2, (32, 64), "a.mlpackage")]
)
def test_few_and_many_classes_in_small_images(tmp_path: Path, count: int, size: tuple[int, int], name: str) -> None:
    """Their names in any script, in the file's description; sizes that need padding, and one that needs none."""
    kind = formats.format_of(Path(name), None).name
    runtime_of(kind)
    classes = [f"Straße 道路 {i}" for i in range(count)]
    path = tiny_student(tmp_path / "student.safetensors", classes=classes, palette=[[i, 0, 255 - i] for i in range(count)])
    result = run(path, tmp_path / name, "--size", f"{size[0]}x{size[1]}")
    assert result.exit_code == 0, result.stderr
    if name == "a.pte":
        note = json.loads((tmp_path / "a.pte.json").read_text(encoding="utf-8"))
        assert note["classes"] == classes and len(note["palette"]) == count and note["size"] == list(size)
    images = torch.randint(0, 256, (1, 3, *size)).float()
    with torch.no_grad():
        expected, logits = load_student(path)(images), RUNTIMES[kind](tmp_path / name)(images)
    bound = 2e-2 if kind == "coreml" else 5e-5
    torch.testing.assert_close(logits, expected, rtol=0, atol=bound * float(expected.abs().max()))


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


def test_a_suffix_in_upper_case_tells_the_format(tmp_path: Path, cached_onnx: Exported) -> None:
    """The file has the name that was asked for, where the format's runtime opens it."""
    result = run(cached_onnx[0], tmp_path / "new/A.ONNX")
    assert result.exit_code == 0 and [path.name for path in (tmp_path / "new").iterdir()] == ["A.ONNX"], result.stderr
    assert in_onnxruntime(tmp_path / "new/A.ONNX")(torch.zeros(1, 3, 40, 51)).shape == (1, 4, 40, 51)
    assert [formats.format_of(Path(f"a{suffix}"), None).name for suffix in (".PTE", ".Tflite")] == ["executorch", "litert"]
    for name, kind, named in (("A.XML", "openvino", "A.xml"), ("a.Pt2", "torch-export", "a.pt2"), ("a.MLPACKAGE", "coreml", None)):
        with pytest.raises(ParamsError) as caught:
            formats.format_of(tmp_path / name, None)
        said = f"files of --format {kind} open only with the suffix in lower case; name it {named or 'a.mlpackage'}"
        assert str(caught.value) == f"{tmp_path / name}: {said}"


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
