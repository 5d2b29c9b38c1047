"""Exported students: the same logits at any size and batch, what goes with them, and the refusal of anything else."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import Conv2dSame  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from typer.testing import CliRunner

from conftest import tiny_student
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.networks.inference import run_whole
from mgd_pipeline.students import export as deployment
from mgd_pipeline.students import onnx as onnx_files
from mgd_pipeline.students.export import DeployedStudent, _AveragePool, _fixed_padding
from mgd_pipeline.students.student import Student, load_student
from mgd_stages.cli import app
from mgd_stages.projects.init import init_project
from mgd_stages.run.held_out import evaluate_network
from mgd_stages.run.project import open_project
from mgd_stages.stages.prepare_data import prepare_data
from mgd_stages.tools.export import PHOTOS, SIZES

LONG_SIDE = 72
"""Of the student that scales; most of the sizes here exceed it."""
STUDENTS = {"fpn": LONG_SIDE, "deeplabv3plus": None, "upernet": None}
"""Long sides by decoder. The smallest of the three scales: exporting the scaling takes torch's exporter longest."""
NAMES = {"onnx": "student.onnx", "torchscript": "student.pt", "smp": "smp"}


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
            folder = tmp_path_factory.mktemp(f"{kind}-{decoder}")
            student = tiny_student(folder / "student.safetensors", decoder=decoder, long_side=STUDENTS[decoder])
            result = run(student, folder / "new" / NAMES[kind], "--format", kind)
            assert result.exit_code == 0, result.stderr
            made[kind, decoder] = student, folder / "new" / NAMES[kind], result.stdout
        return made[kind, decoder]

    return export


@pytest.fixture
def cached_onnx(exported: Export, monkeypatch: pytest.MonkeyPatch) -> Exported:
    """The exporter itself takes many seconds; here it is quick, and all that comes after it is real."""
    made = exported("onnx", "fpn")
    monkeypatch.setattr(onnx_files, "to_onnx", lambda student: made[1].read_bytes())
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
    return onnx_files.run_onnx(path.read_bytes())


RUNTIMES = {"onnx": in_onnxruntime, "torchscript": lambda path: deployment.run_torchscript(path.read_bytes()), "smp": in_smp}


def metadata_of(path: Path) -> dict[str, Any]:
    return {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}


def random_sizes(count: int = 4) -> list[tuple[int, int, int, int]]:
    """Other ones than the command compares."""
    random = np.random.default_rng(7)
    sizes = [(int(random.integers(1, 4)), 3, int(random.integers(33, 150)), int(random.integers(33, 150))) for _ in range(count)]
    assert not set(sizes) & set(SIZES)
    return sizes


# --- the same network


@pytest.mark.parametrize("decoder", STUDENTS)
@pytest.mark.parametrize("kind", NAMES)
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
        mask = network(deployment.to_batch(image)).argmax(1)[0].numpy()
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


@pytest.mark.parametrize("decoder", ["fpn", "upernet"])
@pytest.mark.parametrize("kind", NAMES)
def test_files_say_what_goes_in_and_what_comes_out(kind: str, decoder: str, exported: Export) -> None:
    """One file or folder, and all that a user of it needs to know."""
    path, made, _ = exported(kind, decoder)
    assert list(made.parent.iterdir()) == [made]
    student, extra = load_student(path), {"metadata.json": ""}
    if kind == "onnx":
        model = onnx.load(made)
        onnx.checker.check_model(model)
        values = (*model.graph.input, *model.graph.output)
        dims = {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
        assert dims == {"images": ["batch", 3, "height", "width"], "logits": ["batch", 4, "height", "width"]}
        said = metadata_of(made)
    elif kind == "torchscript":
        with warnings.catch_warnings(action="ignore"):
            torch.jit.load(made, _extra_files=extra)
        said = json.loads(extra["metadata.json"])
    else:
        said = json.loads((made / "mgd.json").read_text())
    assert said["classes"] == student.classes and said["palette"] == student.palette
    assert said["long_side"] == student.long_side
    steps = "padded with 0 to multiples of 32" if kind == "smp" else "normalisation and padding are inside"
    scaling = "longer side exceeds 72 pixels" if kind == "smp" else "scaling down to a long side of 72 pixels"
    assert steps in said["input"] and (scaling in said["input"]) == (decoder == "fpn")


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (7, 4, 1), (2, 2, 1), (1, 2, 1), (4, 1, 1), (3, 2, 3)]
)
def test_fixed_padding_is_the_same_as_tensorflow_s(kernel: int, stride: int, dilation: int) -> None:
    layer = Conv2dSame(4, 6, kernel, stride=stride, dilation=dilation, groups=2)
    fixed = _fixed_padding(layer)
    for size in ((32, 64), (8, 4), (4, 96)):
        images = torch.randn(2, 4, *size)
        assert torch.equal(fixed(images), layer(images)), size


@pytest.mark.parametrize("cells", [1, 2, 3, 6])
def test_average_pools_are_torch_s(cells: int) -> None:
    for size in ((1, 1), (1, 5), (7, 3), (12, 6), (13, 31)):
        features = torch.randn(2, 3, *size)
        torch.testing.assert_close(_AveragePool(cells)(features), nn.AdaptiveAvgPool2d(cells)(features), rtol=0, atol=1e-6)


def test_the_student_itself_stays_as_it_is(tmp_path: Path) -> None:
    student = load_student(tiny_student(tmp_path / "student.safetensors", decoder="upernet"))
    DeployedStudent(student, pools=True)
    assert not any(isinstance(layer, _AveragePool) for layer in student.modules())


# --- another network is refused


def fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    write = onnx_files.to_onnx

    def to_onnx(student: Student) -> bytes:
        proto = onnx.load_from_string(write(student))
        proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 96
        return proto.SerializeToString()

    monkeypatch.setattr(onnx_files, "to_onnx", to_onnx)


def baked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upsampled and cut to the traced size, as `int(...)` in the wrong place would do."""
    resized = partial(F.interpolate, size=(96, 160), mode="bilinear", align_corners=True)
    monkeypatch.setattr(deployment, "run_whole", lambda *arguments: resized(run_whole(*arguments)))


def no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = lambda images: torch.nan * images.mean(1, keepdim=True).expand(-1, 4, -1, -1)  # noqa: E731
    monkeypatch.setattr(deployment, "run_torchscript", lambda model: nothing)


def other_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and predict must be one: here the logits are forward's, and the masks are not predict's."""
    predict = Student.predict

    def other(self: Student, image: np.ndarray) -> np.ndarray:
        mask = predict(self, image).copy()
        mask[: -(-mask.shape[0] // 50)] += 1
        return mask

    monkeypatch.setattr(Student, "predict", other)


def other_std(monkeypatch: pytest.MonkeyPatch) -> None:
    write = deployment.to_smp

    def wrong(student: Any, folder: Path) -> None:
        write(student, folder)
        note = json.loads((folder / "mgd.json").read_text())
        (folder / "mgd.json").write_text(json.dumps({**note, "std": [58.0, 57.0, 57.0]}))

    monkeypatch.setattr(deployment, "to_smp", wrong)


@pytest.mark.parametrize(
    ("fault", "kind", "long_side", "said"),
    [
        (fixed_size, "onnx", LONG_SIDE, r"ONNX Runtime cannot run the exported network at 1 x 3 x 97 x 130 \(.*"),
        (baked, "torchscript", None, r"export: 1 x 3 x 97 x 130 gives \(1, 4, 96, 160\), not \(1, 4, 97, 130\); nothing .*"),
        (no_numbers, "torchscript", None, ".* largest difference nan.*"),
        (other_masks, "torchscript", LONG_SIDE, r"export: photo of 32 x 43 pixels: 97\..*"),
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


# --- mistakes


def test_a_missing_extra_names_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "find_spec", lambda name: None if name == "onnxruntime" else name)
    result = run(tiny_student(tmp_path / "student.safetensors"), tmp_path / "a.onnx")
    assert result.exit_code == 2
    assert result.stderr == "error: onnxruntime: not installed, and needed for ONNX; pip install 'mgd-pipeline[export]'\n"


def test_an_encoder_that_torch_cannot_export_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.onnx.OnnxExporterError("Failed to export the model.\nmore\nlines")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    result = run(tiny_student(tmp_path / "student.safetensors"), tmp_path / "a.onnx")
    assert result.exit_code == 1
    assert result.stderr == "error: tu-test_resnet: torch cannot export it to ONNX (Failed to export the model.)\n"


def test_mistakes_are_one_line_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    student = tiny_student(tmp_path / "student.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "dead").symlink_to("nowhere")
    for arguments, code, message in (
        (["gone.safetensors", "a.onnx"], 1, "gone.safetensors: no such file; there is student.safetensors"),
        (["empty", "a.onnx"], 1, "empty: is a folder; name the file of weights in it"),
        ([student, "a.pt"], 2, "a.pt: a file of --format onnx ends in .onnx"),
        ([student, "a.onnx", "--format", "torchscript"], 2, "a.onnx: a file of --format torchscript ends in .pt"),
        ([student, "a.onnx", "--int8"], 2, "--int8: needs images to calibrate on; name a folder by --images"),
        ([student, "a.pt", "--format", "torchscript", "--int8"], 2, "--int8: is for --format onnx, not torchscript"),
        ([student, "a.onnx", "--images", "empty"], 2, "--images empty: are for --int8 alone"),
        ([student, "a.onnx", "--int8", "--images", "empty"], 1, "empty: holds no images (.jpg"),
        ([student, "a.onnx", "--int8", "--images", "gone"], 2, "--images gone: no such folder"),
        ([student, "folder.onnx"], 2, "folder.onnx: is a folder; name a file"),
        ([student, "student.safetensors/a.onnx"], 2, "student.safetensors: is not a folder, so nothing can be written below it"),
        ([student, "dead", "--format", "smp"], 2, "dead: exists; remove it, or name another folder"),
        ([student, "empty", "--format", "smp"], 2, "empty: exists; remove it, or name another folder"),
    ):
        result = run(*arguments)
        assert result.exit_code == code, (arguments, result.stderr)
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"student.safetensors", "empty", "folder.onnx", "dead"}
