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
import onnxruntime
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import Conv2dSame  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from typer.testing import CliRunner

from conftest import tiny_student
from mgd_pipeline.data.images import resize_image, scaled_size
from mgd_pipeline.data.manifest import read_manifest
from mgd_pipeline.networks.inference import run_whole
from mgd_pipeline.networks.segmentation import build_network
from mgd_pipeline.networks.weights import save_weights
from mgd_pipeline.params import NetworkParams
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
"""Of the students that scale; most of the sizes here exceed it."""
DECODERS = ("fpn", "deeplabv3plus", "upernet")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)], catch_exceptions=False)


def random_sizes(count: int = 4) -> list[tuple[int, int, int, int]]:
    """Other ones than the command compares."""
    random = np.random.default_rng(7)
    sizes = [(int(random.integers(1, 4)), 3, int(random.integers(33, 150)), int(random.integers(33, 150))) for _ in range(count)]
    assert not set(sizes) & set(SIZES)
    return sizes


def assert_same_network(path: Path, exported: Callable[[Tensor], Tensor]) -> None:
    """`exported` gives the student's logits, and they are no constants."""
    student = load_student(path)
    for size in random_sizes():
        images = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(sum(size))).float()
        with torch.no_grad():
            expected, logits = student(images), exported(images)
        assert logits.shape == expected.shape == (size[0], 4, *size[2:]) and logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5 * float(expected.abs().max()))
        assert expected.argmax(1).unique().numel() > 1


def metadata_of(path: Path) -> dict[str, Any]:
    return {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}


def torchscript(path: Path, **options: Any) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated")
        return torch.jit.load(path, **options)


def in_onnxruntime(path: Path) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, str]]:
    """A student of each decoder and its ONNX file, as the command made it and with what it said; each is made once."""
    made: dict[str, tuple[Path, Path, str]] = {}

    def export(kind: str) -> tuple[Path, Path, str]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind.replace(" ", "-"))
            # The smallest of the three: exporting the scaling takes torch's exporter longest.
            decoder, long_side = ("fpn", LONG_SIDE) if kind == "scaling fpn" else (kind, None)
            student = tiny_student(folder / "student.safetensors", decoder=decoder, long_side=long_side)
            result = run(student, folder / "new/student.onnx")
            assert result.exit_code == 0, result.stderr
            made[kind] = student, folder / "new/student.onnx", result.stdout
        return made[kind]

    return export


@pytest.fixture
def cached_onnx(exported: Callable[[str], tuple[Path, Path, str]], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The exporter itself takes many seconds; here it is quick, and all that comes after it is real."""
    student, model, _ = exported("fpn")
    monkeypatch.setattr(onnx_files, "to_onnx", lambda student: model.read_bytes())
    return student, model


# --- the same network


@pytest.mark.parametrize("decoder", DECODERS)
def test_onnx_gives_the_logits_of_the_student(decoder: str, exported: Callable[[str], tuple[Path, Path, str]]) -> None:
    student, model, said = exported(decoder)
    assert_same_network(student, in_onnxruntime(model))
    lines = re.findall(r"^(\d+ x 3 x \d+ x \d+): logits up to .*, largest difference (\S+), (\S+) % the same class$", said, re.M)
    assert [line[0] for line in lines] == [" x ".join(map(str, size)) for size in SIZES]
    assert all(float(line[1]) < 1e-3 and float(line[2]) > 99 for line in lines)
    assert re.search(r"torch \d+ ms \(1\.00\), onnx \d+ ms \(\d+\.\d\d\)", said)


def test_onnx_says_what_goes_in_and_what_comes_out(exported: Callable[[str], tuple[Path, Path, str]]) -> None:
    """One file, the three sizes named, and all that a user of it needs to know."""
    student, path, _ = exported("fpn")
    assert list(path.parent.iterdir()) == [path]
    model = onnx.load(path)
    onnx.checker.check_model(model)
    dims = [
        (value.name, [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in (*model.graph.input, *model.graph.output)
    ]
    assert dims == [("images", ["batch", 3, "height", "width"]), ("logits", ["batch", 4, "height", "width"])]
    metadata, loaded = metadata_of(path), load_student(student)
    assert metadata["classes"] == loaded.classes and metadata["palette"] == loaded.palette and metadata["long_side"] is None
    assert "normalisation and padding are inside" in metadata["input"]


def assert_predict_s_masks(path: Path, exported: Callable[[Tensor], Tensor]) -> None:
    """Of whole photos, smaller and larger than LONG_SIDE, wide and tall ones, as somebody sends them who has read no metadata."""
    student = load_student(path)
    assert student.long_side == LONG_SIDE
    random = np.random.default_rng(3)
    for height, width in ((40, 51), (72, 72), (73, 71), (270, 480), (131, 97), (31, 400), (500, 160), (99, 1), (1, 1)):
        image = random.integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
        image = image.repeat(4, 0).repeat(4, 1)[:height, :width]
        mask = exported(torch.from_numpy(image).permute(2, 0, 1)[None].float()).argmax(1)[0].numpy()
        assert mask.shape == (height, width) and (mask == student.predict(image)).mean() >= 0.999, (height, width)


def test_whole_photos_get_predict_s_masks_from_onnx(exported: Callable[[str], tuple[Path, Path, str]]) -> None:
    student, model, said = exported("scaling fpn")
    assert_predict_s_masks(student, in_onnxruntime(model))
    assert "any size; scaling down to a long side of 72 pixels, normalisation and padding are inside" in metadata_of(model)["input"]
    assert f"of any size; larger ones are scaled down to a long side of {LONG_SIDE} pixels inside, as predict does" in said
    photos = re.findall(r"^photo of (\d+) x (\d+) pixels: (\S+) % of them have the class that predict gives them$", said, re.M)
    assert len(photos) == len(PHOTOS) and min(float(share) for *_, share in photos) >= 99.9
    assert sum(max(int(width), int(height)) > LONG_SIDE for width, height, _ in photos) >= 3


def test_whole_photos_get_predict_s_masks_from_torchscript(tmp_path: Path) -> None:
    student, path = tiny_student(tmp_path / "student.safetensors", long_side=LONG_SIDE), tmp_path / "student.pt"
    assert run(student, path, "--format", "torchscript").exit_code == 0
    assert_predict_s_masks(student, torchscript(path))


def test_an_smp_folder_says_how_images_are_scaled(tmp_path: Path) -> None:
    student, folder = tiny_student(tmp_path / "student.safetensors", long_side=LONG_SIDE), tmp_path / "smp"
    result = run(student, folder, "--format", "smp")
    assert result.exit_code == 0, result.stderr
    assert f"mgd.json says how images are scaled down to a long side of {LONG_SIDE} pixels before, and normalised" in result.stdout
    note = json.loads((folder / "mgd.json").read_text())
    assert note["long_side"] == LONG_SIDE and "longer side exceeds 72 pixels" in note["input"]
    assert_predict_s_masks(student, deployment.run_smp(folder))


@pytest.mark.parametrize("classes", [2, 254])
def test_students_of_few_and_of_many_classes(tmp_path: Path, classes: int) -> None:
    params = NetworkParams(encoder="tu-test_resnet", decoder="fpn", decoder_channels=64)
    names, palette = [f"class {i}" for i in range(classes)], [[i, i, i] for i in range(classes)]
    changes = {"classes": names, "palette": palette, "long_side": 40, "network": params.model_dump()}
    template = load_student(tiny_student(tmp_path / "template.safetensors"))
    path = tmp_path / "student.safetensors"
    save_weights(path, build_network(params, classes).model.state_dict(), {**template.metadata, **changes})
    result = run(path, tmp_path / "student.pt", "--format", "torchscript")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("decoder", DECODERS)
def test_torchscript_gives_the_logits_of_the_student(tmp_path: Path, decoder: str) -> None:
    student, path = tiny_student(tmp_path / "student.safetensors", decoder=decoder), tmp_path / "student.pt"
    result = run(student, path, "--format", "torchscript")
    assert result.exit_code == 0, result.stderr
    extra = {"metadata.json": ""}
    assert_same_network(student, torchscript(path, _extra_files=extra))
    assert json.loads(extra["metadata.json"])["classes"] == ["sky", "sea", "sand", "salt"]


@pytest.mark.parametrize("decoder", DECODERS)
def test_smp_gives_the_logits_of_the_student(tmp_path: Path, decoder: str) -> None:
    """Loaded by smp alone, normalised and padded by hand as mgd.json says."""
    student = tiny_student(tmp_path / "student.safetensors", decoder=decoder)
    folder = tmp_path / "new/smp"
    assert run(student, folder, "--format", "smp").exit_code == 0
    assert [path.name for path in folder.parent.iterdir()] == ["smp"]
    model, note = smp.from_pretrained(str(folder)).eval(), json.loads((folder / "mgd.json").read_text())
    mean, std = (torch.tensor(note[name])[:, None, None] for name in ("mean", "std"))

    def plain(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        return model(F.pad((images - mean) / std, (0, -width % 32, 0, -height % 32)))[..., :height, :width]

    assert_same_network(student, plain)
    assert note["classes"] == ["sky", "sea", "sand", "salt"] and "multiples of 32" in note["input"]
    again = run(student, folder, "--format", "smp")
    assert again.exit_code == 2 and again.stderr == f"error: {folder}: exists; remove it, or name another folder\n"


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


def zero_mean(proto: onnx.ModelProto) -> None:
    """The normalisation left out by half: the first subtraction takes zero away."""
    (mean,) = [tensor for tensor in proto.graph.initializer if tensor.name == "mean"]
    mean.CopyFrom(onnx.numpy_helper.from_array(np.zeros((1, 3, 1, 1), np.float32), "mean"))


def fixed_size(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 96


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (zero_mean, r"error: export: 1 x 3 x 97 x 130: .* more than 0\.0001 of the largest logit, .*\n"),
        (fixed_size, r"error: ONNX Runtime cannot run the exported network at 1 x 3 x 97 x 130 \(.*\n"),
    ],
)
def test_another_onnx_file_is_refused(
    cached_onnx: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[onnx.ModelProto], None],
    said: str,
) -> None:
    student, model = cached_onnx
    proto = onnx.load(model)
    change(proto)
    monkeypatch.setattr(onnx_files, "to_onnx", lambda student: proto.SerializeToString())
    path = model.with_name("bad.onnx")
    path.write_bytes(b"what was there before")
    result = run(student, path)
    assert result.exit_code == 1 and re.fullmatch(said, result.stderr)
    assert path.read_bytes() == b"what was there before"
    path.unlink()


def unscaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As 0.1.0 exported it."""
    whole = lambda network, images, mean, std, _: run_whole(network, images, mean, std, None)  # noqa: E731
    monkeypatch.setattr(deployment, "run_whole", whole)


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


@pytest.mark.parametrize(
    ("fault", "long_side", "said"),
    [
        (unscaled, LONG_SIDE, "more than 0.0001 of the largest logit, so nothing is written"),
        (baked, None, "export: 1 x 3 x 97 x 130 gives (1, 4, 96, 160), not (1, 4, 97, 130); nothing is written"),
        (no_numbers, None, "largest difference nan"),
        (other_masks, LONG_SIDE, "export: photo of 32 x 43 pixels: 97."),
    ],
)
def test_another_torchscript_file_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
    long_side: int | None,
    said: str,
) -> None:
    student = tiny_student(tmp_path / "student.safetensors", long_side=long_side)
    fault(monkeypatch)
    result = run(student, tmp_path / "bad.pt", "--format", "torchscript")
    assert result.exit_code == 1 and said in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "bad.pt").exists()


def test_a_wrong_normalisation_beside_smp_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = deployment.to_smp

    def wrong(student: Any, folder: Path) -> None:
        write(student, folder)
        note = json.loads((folder / "mgd.json").read_text())
        (folder / "mgd.json").write_text(json.dumps({**note, "std": [58.0, 57.0, 57.0]}))

    monkeypatch.setattr(deployment, "to_smp", wrong)
    student = tiny_student(tmp_path / "student.safetensors")
    result = run(student, tmp_path / "smp", "--format", "smp")
    assert result.exit_code == 1 and "of the largest logit" in result.stderr
    assert list(tmp_path.iterdir()) == [student]


# --- int8


def test_int8_is_calibrated_on_a_folder(cached_onnx: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agreement that is printed is the written file's."""
    student, model = cached_onnx
    random = np.random.default_rng(0)
    photos = [random.integers(0, 256, (40 + i, 64, 3), dtype=np.uint8) for i in range(6)]
    (tmp_path / "images").mkdir()
    for i, pixels in enumerate(photos):
        Image.fromarray(pixels).save(tmp_path / f"images/{i}.png")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "int8.onnx"
    result = run(student, path, "--int8", "--images", "images")
    assert result.exit_code == 0, result.stderr
    assert "Please consider" not in result.output
    assert path.stat().st_size < 0.5 * model.stat().st_size
    proto = onnx.load(path)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in proto.graph.node}
    metadata = metadata_of(path)
    assert metadata["classes"] == ["sky", "sea", "sand", "salt"] and metadata["int8"] == "calibrated on 6 images"
    whole, small = in_onnxruntime(model), in_onnxruntime(path)
    batches = [torch.from_numpy(pixels).permute(2, 0, 1)[None].float() for pixels in photos]
    same = [(whole(images).argmax(1) == small(images).argmax(1)).numpy().ravel() for images in batches]
    share = 100 * float(np.concatenate(same).mean())
    assert share < 100 and f"int8: {share:.2f} % of the pixels of 6 images keep their class" in result.stdout
    for size in random_sizes(2):
        assert small(255 * torch.rand(size)).shape == (size[0], 4, *size[2:])


def test_int8_scales_as_float32_does(exported: Callable[[str], tuple[Path, Path, str]], tmp_path: Path) -> None:
    """Neither the scaling of pixels nor that of logits is coarse: photos that are scaled lose as little as photos that are not."""
    student, model, _ = exported("scaling fpn")
    random = np.random.default_rng(0)
    photos = [np.kron(random.integers(0, 256, (12, 18, 3)), np.ones((12, 12, 1))).astype(np.uint8) for _ in range(4)]
    small = [resize_image(photo, *scaled_size(photo.shape[0], photo.shape[1], LONG_SIDE)) for photo in photos]
    path = tmp_path / "int8.onnx"
    path.write_bytes(onnx_files.quantise(model.read_bytes(), small, {"int8": "calibrated on 4 images"}))
    loaded, int8 = load_student(student), in_onnxruntime(path)
    shares = [
        np.mean([(int8(deployment.to_batch(image)).argmax(1)[0].numpy() == loaded.predict(image)).mean() for image in images])
        for images in (small, photos)
    ]
    assert abs(shares[0] - shares[1]) < 0.02 and min(shares) > 0.8, shares
    metadata = metadata_of(path)
    assert metadata["long_side"] == LONG_SIDE and metadata["int8"] == "calibrated on 4 images"


def test_int8_that_changes_most_pixels_is_refused(
    cached_onnx: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibrated on black images: every range is wrong."""
    student, _ = cached_onnx
    quantise = onnx_files.quantise
    monkeypatch.setattr(onnx_files, "quantise", lambda model, images, note: quantise(model, [0 * image for image in images], note))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    result = run(student, "int8.onnx", "--int8", "--images", ".")
    assert result.exit_code == 1 and re.search(r"^error: int8: \S+ % of the pixels .* fewer than 80 %", result.stderr)
    assert not Path("int8.onnx").exists()


def test_int8_in_a_project_is_measured_in_miou(
    cached_onnx: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibrated on its labelled images; the mIoU of float32 is the one that evaluate gives the student."""
    student, _ = cached_onnx
    random = np.random.default_rng(0)
    for name in ("train/a", "train/b", "val/c", "val/d"):
        for kind, shape, top in (("images", (40, 64, 3), 256), ("masks", (40, 64), 4)):
            path = tmp_path / f"set/{kind}/{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, top, shape, dtype=np.uint8)).save(path)
    (tmp_path / "set/masks/train/b.png").unlink()
    init_project("folder", tmp_path / "set", "1/1", tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    classes = "data.classes=[sky,sea,sand,salt]"
    project = open_project(Path("params.yaml"), [classes])
    prepare_data(project, "stop")
    result = run(student, "int8.onnx", "--int8", "--set", classes)
    assert result.exit_code == 0, result.stderr
    assert "int8: calibrating on 1 image\n" in result.stdout, "the one with a mask"
    said = r"int8: mIoU (\S+) %, (\S+) points from the (\S+) % of float32 \(split val, 2 images, each as a whole\)"
    ((after, change, before),) = [map(float, numbers) for numbers in re.findall(said, result.stdout)]
    loaded = load_student(student)
    manifest = read_manifest(project.manifest, project.base)
    expected = evaluate_network(project, manifest, loaded.network, loaded.normalisation, "").miou
    assert before == pytest.approx(100 * expected, abs=0.02) and change == pytest.approx(after - before, abs=0.011)
    assert change != 0

    other = tiny_student(tmp_path / "other.safetensors", classes=["a", "b", "c", "d"])
    refused = run(other, "other.onnx", "--int8", "--set", classes)
    assert refused.exit_code == 1 and "has other classes than the student" in refused.stderr and not Path("other.onnx").exists()


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
    ):
        result = run(*arguments)
        assert result.exit_code == code, (arguments, result.stderr)
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"student.safetensors", "empty", "folder.onnx", "dead"}
