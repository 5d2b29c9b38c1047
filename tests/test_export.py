"""Exported students: the same logits at any size and batch, what goes with them, and the refusal of anything else."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
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
from mgd_pipeline.errors import ParamsError, WeightsError
from mgd_pipeline.exports import coreml, deployed, formats
from mgd_pipeline.exports import onnx as onnx_files
from mgd_pipeline.exports import openvino as openvino_files
from mgd_pipeline.exports import smp as smp_folders
from mgd_pipeline.exports import torch_export as programs
from mgd_pipeline.exports.deployed import DeployedStudent, _AveragePool, _fixed_padding, quiet
from mgd_pipeline.exports.formats import FORMATS, Format
from mgd_pipeline.networks.inference import run_whole
from mgd_pipeline.networks.weights import read_state_dict, sha256_of_state
from mgd_pipeline.students.student import Student, load_student
from mgd_stages.cli import app
from mgd_stages.tools.export import PHOTOS, SIZES

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
        assert re.fullmatch(r"executorch \d\S+", note["made_by"])
        assert note["classes"] == classes and len(note["palette"]) == count and note["size"] == list(size)
    images = torch.randint(0, 256, (1, 3, *size)).float()
    with torch.no_grad():
        expected, logits = load_student(path)(images), RUNTIMES[kind](tmp_path / name)(images)
    bound = 2e-2 if kind == "coreml" else 5e-5
    torch.testing.assert_close(logits, expected, rtol=0, atol=bound * float(expected.abs().max()))


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
