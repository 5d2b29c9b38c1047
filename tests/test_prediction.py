"""Prediction, the student as a user holds it, and the files in which weights and unfinished trainings are kept."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import mgd_pipeline
from conftest import tiny_student
from mgd_pipeline.data.images import resize_image, scaled_size
from mgd_pipeline.durable import private_name, replace_file
from mgd_pipeline.errors import DataError, WeightsError
from mgd_pipeline.networks.encoders import normalisation
from mgd_pipeline.networks.inference import predict_logits, resize_logits, to_input, windows
from mgd_pipeline.networks.normalisation import Normalisation
from mgd_pipeline.networks.scaling import scale_down
from mgd_pipeline.networks.segmentation import SegmentationNetwork, build_network
from mgd_pipeline.networks.weights import save_weights
from mgd_pipeline.params import NetworkParams
from mgd_pipeline.students.student import load_student

PARAMS = NetworkParams(encoder="tu-test_resnet", decoder="fpn", decoder_channels=64)
PLAIN = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CLASSES = ["sky", "sea", "sand"]


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def batch(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()


@pytest.fixture(scope="module")
def network() -> SegmentationNetwork:
    torch.manual_seed(0)
    return build_network(PARAMS, len(CLASSES)).eval()


def metadata(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "student",
        "network": PARAMS.model_dump(),
        "classes": CLASSES,
        "palette": [[0, 0, 0], [0, 0, 255], [255, 255, 0]],
        "normalisation": normalisation(PARAMS.encoder),
        "long_side": None,
        **changes,
    }


# --- whole images and windows


@pytest.mark.parametrize("window", [None, (64, 64)])
@pytest.mark.parametrize("size", [(64, 96), (1, 1), (70, 33), (33, 70)])
def test_logits_have_the_size_of_the_image(
    network: SegmentationNetwork, size: tuple[int, int], window: tuple[int, int] | None
) -> None:
    logits = predict_logits(network, photo(*size), PLAIN, window=window)
    assert logits.shape == (3, *size) and logits.dtype == torch.float32 and logits.isfinite().all()


def test_the_input_is_normalised_by_channel() -> None:
    pixels = np.zeros((1, 2, 3), np.uint8)
    pixels[0, 1] = (10, 20, 30)
    tensor = to_input(pixels, Normalisation((10.0, 10.0, 10.0), (1.0, 2.0, 4.0)), torch.device("cpu"))
    assert tensor.shape == (1, 3, 1, 2)
    assert tensor[0, :, 0, 0].tolist() == [-10.0, -5.0, -2.5] and tensor[0, :, 0, 1].tolist() == [0.0, 5.0, 5.0]


def test_windows_are_predicted_one_by_one_and_averaged(network: SegmentationNetwork) -> None:
    """Along one axis with overlap one half: windows at 0, 16 and 32 of 64 columns, all averaged by hand."""
    image = photo(32, 64)
    total, count = torch.zeros(3, 32, 64), torch.zeros(64)
    for left in (0, 16, 32):
        total[..., left : left + 32] += predict_logits(network, image[:, left : left + 32], PLAIN)
        count[left : left + 32] += 1
    expected = total / count
    torch.testing.assert_close(predict_logits(network, image, PLAIN, window=(32, 32), overlap=0.5), expected, rtol=0, atol=1e-5)
    for window in ((32, 64), (1000, 1000)):  # as large as the image
        assert torch.equal(predict_logits(network, image, PLAIN, window=window), predict_logits(network, image, PLAIN))


@given(st.integers(1, 400), st.integers(1, 200), st.floats(0, 0.99), st.floats(0, 50))
def test_windows_cover_every_pixel_and_stay_inside(length: int, window: int, overlap: float, margin: float) -> None:
    starts, size = windows(length, window, overlap)
    assert size == min(window, length) and starts == sorted(set(starts)) and starts[0] == 0 and starts[-1] == length - size
    pixels, first = np.arange(length), np.array(starts)[:, None]
    shows = (first <= pixels) & (pixels < first + size)
    assert np.array_equal(windows(length, window, overlap).counting(pixels), shows) and shows.any(0).all()
    counting = windows(length, window, overlap).counting(pixels, margin)
    assert counting.any(0).all() and not (counting & ~shows).any()
    reach = np.minimum(pixels - first, first + size - 1 - pixels) + 0.5
    assert (reach[counting & ((reach >= margin).any(0))] >= margin).all(), "one near its border counts only where no other does"


def test_windows_of_mgd_on_cityscapes() -> None:
    """800 pixels with a stride of 2/3: 533 pixels here."""
    assert windows(1024, 800, 1 / 3) == ([0, 224], 800)
    assert windows(2048, 800, 1 / 3) == ([0, 533, 1066, 1248], 800)
    assert windows(1024, None, 1 / 3) == windows(1024, 2000, 1 / 3) == ([0], 1024)


def test_a_network_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a network in eval mode"):
        predict_logits(build_network(PARAMS, 3).train(), photo(32, 32), PLAIN)


def test_logits_are_resized_between_half_pixel_centres() -> None:
    ramp = torch.arange(4.0).expand(1, 2, 4)
    assert resize_logits(ramp, (2, 4)) is ramp
    assert resize_logits(ramp, (2, 8))[0, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]


# --- scaling inside the graph: Pillow's pixels, to the bit


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 200), st.booleans())
@example(1, 1, 1, False)
@example(1, 100, 64, False)
@example(480, 640, 320, True)  # halves: every second mean lies between two whole numbers
@example(97, 130, 128, False)
@example(300, 149, 100, False)  # Pillow 13 scales columns first: 200 rows fewer, 99 columns fewer
@example(300, 150, 100, False)  # rows first: 200 rows fewer, 100 columns fewer
@example(239, 114, 227, False)  # rows first, though more than twice as tall as wide
@example(1, 268, 1, True)  # 268 taps
@example(200, 100, 11, False)  # columns first, though not
def test_scaled_pixels_are_pillow_s(height: int, width: int, long_side: int, extreme: bool) -> None:
    """Each image of a batch is scaled alone, and images that are not larger pass through."""
    image = photo(height, width)
    if extreme:
        image = (image > 127).astype(np.uint8) * 255
    expected = resize_image(image, *scaled_size(height, width, long_side))
    scaled = scale_down(batch(image, 255 - image, image), long_side)
    assert np.array_equal(scaled[0].permute(1, 2, 0).numpy(), expected) and torch.equal(scaled[0], scaled[2])


def test_gradients_of_scaling_are_those_without_rounding() -> None:
    """Each target pixel is a mean of weights that sum to 1: its gradient spreads 1 over the source."""
    images = batch(photo(50, 75)).requires_grad_()
    scale_down(images, 30).sum().backward()
    assert images.grad is not None and images.grad.min() >= 0
    assert float(images.grad.sum()) == pytest.approx(3 * 20 * 30, rel=1e-5)
    fractions = 255 * torch.rand(2, 3, 30, 47)
    assert torch.equal(scale_down(fractions, 47), fractions), "an image that is not larger keeps its fractions"


# --- the student


@pytest.fixture
def file(tmp_path: Path, network: SegmentationNetwork) -> Path:
    path = tmp_path / "student.safetensors"
    save_weights(path, network.model.state_dict(), metadata())
    return path


@pytest.mark.parametrize("size", [(32, 32), (37, 61), (64, 64), (65, 64), (200, 150), (33, 300), (1, 90), (1, 1)])
@pytest.mark.parametrize("long_side", [None, 64])
def test_a_student_predicts_class_ids_in_the_size_of_the_image(
    tmp_path: Path, size: tuple[int, int], long_side: int | None
) -> None:
    """Images larger than long_side are seen at that size, and answered at their own; in the module's graph as by `predict`."""
    student, image = load_student(tiny_student(tmp_path / "s.safetensors", long_side=long_side)), photo(*size)
    prediction = student.predict(image)
    assert prediction.shape == size and prediction.dtype == np.uint8 and prediction.max() < 4
    with torch.no_grad():
        assert np.array_equal(student(batch(image)).argmax(1)[0].numpy(), prediction)
    if long_side is None or max(size) <= long_side:
        logits = predict_logits(student.network, image, student.normalisation)
        assert np.array_equal(prediction, logits.argmax(0).numpy())


def test_arrays_pictures_and_paths_give_the_same(tmp_path: Path, file: Path) -> None:
    student, pixels = mgd_pipeline.load_student(file), photo(37, 61)
    pixels.flags.writeable = False  # as np.asarray(picture) gives it: no reason for a warning
    Image.fromarray(pixels).save(tmp_path / "image.png")
    expected = student.predict(pixels)
    for image in (Image.fromarray(pixels), tmp_path / "image.png", str(tmp_path / "image.png")):
        assert np.array_equal(student.predict(image), expected)
    student.train()
    assert np.array_equal(student.predict(pixels), expected), "predict never uses batch statistics"
    for mode in ("L", "RGBA", "CMYK"):
        picture = Image.fromarray(pixels).convert(mode)
        assert np.array_equal(student.predict(picture), student.predict(np.asarray(picture.convert("RGB")))), mode


ARRAYS = r"predict takes \(H, W, 3\) uint8 RGB, not \(8, 8"


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((8, 8), np.uint8), ValueError, ARRAYS),
        (np.zeros((8, 8, 4), np.uint8), ValueError, ARRAYS),
        (np.zeros((8, 8, 3), np.float32), ValueError, ARRAYS),
        (
            Image.fromarray(np.full((8, 8), 30_000, np.uint16)),
            DataError,
            "the image: holds values of uint16",
        ),
        (Image.new("RGBA", (8, 8), (1, 2, 3, 200)), DataError, "the image: 100 % of the pixels are transparent"),
    ],
)
def test_images_that_training_refuses_are_refused(file: Path, image: Any, error: type[Exception], message: str) -> None:
    """Pillow would make pictures RGB without a word, with other pixels than they show."""
    with pytest.raises(error, match=message):
        load_student(file).predict(image)


@pytest.mark.parametrize("long_side", [None, 32])
def test_a_student_is_a_module_with_gradients(file: Path, network: SegmentationNetwork, long_side: int | None) -> None:
    save_weights(file, network.model.state_dict(), metadata(long_side=long_side))
    student = load_student(file)
    images = batch(photo(37, 61)).requires_grad_()
    logits = student(images)
    if long_side is None:
        expected = predict_logits(network, photo(37, 61), normalisation(PARAMS.encoder))
        torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-5)
    logits.square().sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert student.classes == CLASSES and student.palette[1] == [0, 0, 255]


def test_the_file_of_a_student_loads_into_the_plain_smp_model(file: Path, network: SegmentationNetwork) -> None:
    """No part of this project is needed to use what it made."""
    plain: Any = smp.FPN(
        "tu-test_resnet", encoder_weights=None, classes=3, decoder_pyramid_channels=64, decoder_segmentation_channels=64
    )
    plain.load_state_dict(load_file(file), strict=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images), network.model(images), rtol=0, atol=1e-6)


def test_other_files_are_no_students(tmp_path: Path, network: SegmentationNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the message names students below this folder, and a clone in which `make run` ran has some
    state = network.model.state_dict()
    save_weights(tmp_path / "teacher.safetensors", state, {"kind": "teacher"})
    save_file(state, tmp_path / "plain.safetensors")
    torch.save(state, tmp_path / "plain.pth")
    no_palette = {key: value for key, value in metadata().items() if key != "palette"}
    save_weights(tmp_path / "old.safetensors", state, no_palette)
    save_weights(tmp_path / "new.safetensors", state, metadata(network={**PARAMS.model_dump(), "skips": 2}))
    contents = {"zero": b"", "short": b"short", "ff": b"\xff" * 64, "oops": b"\x04" + b"\0" * 7 + b"oops"}
    for name, content in contents.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    for name, said in (
        *((name, "not a student made by `mgd-pipeline train-student`") for name in ("teacher", "plain")),
        ("a/b/gone", "no such file; make one by `mgd-pipeline train-student`"),
        ("old", r".*another version of mgd-pipeline \(differs in palette\)"),
        ("new", r".*another version of mgd-pipeline \(differs in network\.skips\)"),
        *((name, "not a " if content else "holds no weights; the file is empty") for name, content in contents.items()),
    ):
        with pytest.raises(WeightsError, match=rf"{name}\.safetensors: {said}"):
            load_student(tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=r"plain\.pth: not a student"):
        load_student(tmp_path / "plain.pth")


# --- files


def test_files_are_synced_before_they_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut could leave the new name with no content."""
    done: list[str] = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: (done.append("sync"), sync(*a)))
    monkeypatch.setattr(os, "replace", lambda *a: (done.append("rename"), rename(*a)))
    replace_file(tmp_path / "new/file", b"content")
    assert (tmp_path / "new/file").read_bytes() == b"content" and done[:2] == ["sync", "rename"]


def test_what_a_killed_process_left_beside_a_file_is_removed(tmp_path: Path) -> None:
    """Else it would lie in a folder that DVC tracks; files that living processes write now stay."""
    script = (
        "import os, sys; from pathlib import Path; from mgd_pipeline.durable import private_name, replace_file\n"
        "os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        "replace_file(Path(sys.argv[1]), b'half')\n"
    )
    path = tmp_path / "file[1]-a.tsv"
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    parent = f"-{os.getppid()}-"
    living = tmp_path / f"{private_name(f'.{path.name}')}.tmp".replace(f"-{os.getpid()}-", parent)
    living.write_bytes(b"being written")
    replace_file(path, b"whole")
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, living.name} and path.read_bytes() == b"whole"


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "道" * 85, "." + "n" * 254])
def test_files_of_the_longest_names_are_replaced(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host of a long name, too: what is written beside has a name of its own."""
    monkeypatch.setattr(socket, "gethostname", lambda: "h" * 64)
    for content in (b"old", b"new"):
        replace_file(tmp_path / name, content)
        assert (tmp_path / name).read_bytes() == content and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(DataError, match=r"the name \(256 bytes\) or the path \(\d+ bytes\) is too long for the file system"):
        replace_file(tmp_path / ("n" * 256), b"")
    assert len(list(tmp_path.iterdir())) == 1
