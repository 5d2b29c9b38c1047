"""What all exported forms of a student share: the network for export, its description, and the faults of converters.

An exported file contains everything that `Student.forward` does: scaling down to the size of training, normalisation, padding,
upsampling. Each runtime's module writes a file (`write`) and runs it (`load`).

Letters: B batch, K classes, H W pixels.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import AvgPool2dSame, Conv2dSame, to_2tuple  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from mgd_pipeline.data.images import PhotoRules, read_photo, resize_image
from mgd_pipeline.errors import MGDError, WeightsError
from mgd_pipeline.networks.inference import run_whole
from mgd_pipeline.networks.segmentation import REFUSALS
from mgd_pipeline.students.student import Student

Run = Callable[[Tensor], Tensor]
"""(B, 3, H, W) float32 RGB, whole numbers in 0 to 255, to (B, K, H, W) float32 logits."""
Size = tuple[int, int]
"""Height and width in pixels."""

FACTS = ("classes", "palette", "long_side", "weights_sha256")
EXAMPLE = (2, 3, 96, 160)
"""Sizes for tracing: none is 1, and none equals another, so no tracer takes one for a constant."""


class DeployedStudent(nn.Module):
    """The network for export: `Student.forward`, with equivalent layers that exporters can follow."""

    mean: Tensor
    std: Tensor

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.network = copy.deepcopy(student.network)
        for name, layer in list(self.network.named_modules()):
            if isinstance(layer, (Conv2dSame, AvgPool2dSame)):
                self.network.set_submodule(name, _fixed_padding(layer))
            elif isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size not in (1, (1, 1)):
                assert isinstance(layer.output_size, int)
                self.network.set_submodule(name, _AveragePool(layer.output_size))
        self.long_side = student.long_side
        for name, values in (("mean", student.normalisation.mean), ("std", student.normalisation.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        self.eval()

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """As `Student.forward`."""
        return run_whole(self.network, images_B3HW, self.mean, self.std, self.long_side)


def of_size(student: Student, size: Size) -> tuple[DeployedStudent, Tensor]:
    """The network for one image of a fixed size, which is not larger than `long_side`, and an example input."""
    network = DeployedStudent(student)
    network.long_side = None
    return network, torch.zeros(1, 3, *size)


def _fixed_padding(layer: Any) -> nn.Module:
    """TensorFlow's SAME padding without looking at the size.

    Sides are multiples of 32 here, hence multiples of every layer's stride, so the padding is the same for all sizes.
    torch's exporter takes seven minutes for timm's formula with unknown sizes, and 20 s for this one.
    """
    convolves = hasattr(layer, "weight")
    pair: Any = to_2tuple
    kernel, stride, dilation = pair(layer.kernel_size), pair(layer.stride), pair(layer.dilation if convolves else 1)
    margins = []
    for axis in (1, 0):  # F.pad's order
        total = max(dilation[axis] * (kernel[axis] - 1) + 1 - stride[axis], 0)
        margins += [total // 2, total - total // 2]
    if convolves:
        geometry = {"stride": stride, "dilation": dilation, "groups": layer.groups}
        plain = nn.Conv2d(layer.in_channels, layer.out_channels, kernel, **geometry, bias=layer.bias is not None)
        plain.weight, plain.bias = layer.weight, layer.bias
    else:
        plain = nn.AvgPool2d(kernel, stride, 0, layer.ceil_mode, layer.count_include_pad)
    return nn.Sequential(nn.ZeroPad2d(tuple(margins)), plain)


class _AveragePool(nn.Module):
    """nn.AdaptiveAvgPool2d as two matrix products: row i averages the positions floor(i L / n) to ceil((i + 1) L / n).

    Runtimes have adaptive pooling for fixed sizes only, or for sides that the cells divide.
    """

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, features_BCHW: Tensor) -> Tensor:
        # Products of a matrix with rows, which ask no runtime or exporter whether a side is 1.
        rows = nn.functional.linear(features_BCHW, self._means(features_BCHW.shape[-1]))
        return nn.functional.linear(rows.transpose(2, 3), self._means(features_BCHW.shape[-2])).transpose(2, 3)

    def _means(self, length: int) -> Tensor:
        if isinstance(length, int):  # a known size: a constant, which asks nothing of a runtime
            ends = [(i * length // self.cells, -(-(i + 1) * length // self.cells)) for i in range(self.cells)]
            return torch.tensor([[(start <= place < end) / (end - start) for place in range(length)] for start, end in ends])
        cell, position = torch.arange(self.cells)[:, None], torch.arange(length)[None]
        start, end = cell * length // self.cells, -(-(cell + 1) * length // self.cells)
        return ((position >= start) & (position < end)).float() / (end - start)


def describe(student: Student, size: Size | None) -> dict[str, Any]:
    """The description of an exported network, as plain JSON; `size` is None where a file takes any number of images of any size."""
    steps = "normalisation and padding are inside"
    if size is not None:
        shape, kind = f"(1, 3, {size[0]}, {size[1]})", "one image of this size"
    else:
        shape, kind = "(batch, 3, height, width)", "any size"
        if student.long_side is not None:
            steps = f"scaling down to a long side of {student.long_side} pixels, {steps}"
    return {
        "input": f"images: float32 {shape}, RGB, whole numbers 0 to 255, {kind}; {steps}",
        "output": "logits: float32 (batch, class, height, width); the class of a pixel is the argmax over axis 1",
        **({} if size is None else {"size": list(size)}),
        **{name: getattr(student, name) for name in FACTS},
    }


def notes_beside(path: Path) -> dict[str, Any]:
    """`describe` of a file whose format has no place for it: the JSON file beside it; nothing where that was left behind."""
    beside = Path(f"{path}.json")
    notes = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return notes if isinstance(notes, dict) else {}  # a file of the user's own


def to_batch(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 to the exported networks' input, (1, 3, H, W) float32."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)[None])).float()


def cannot_run(runtime: str, images: Tensor, error: Exception) -> WeightsError:
    reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    size = " x ".join(map(str, images.shape))
    return WeightsError(f"{runtime} cannot run the exported network at {size} ({reason.strip()[:300]})")


def cannot_load(runtime: str, path: Path, error: Exception) -> WeightsError:
    places = "Exception from ", "Check '"  # OpenVINO's first lines say where in its sources
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith(places)]
    reason = lines[0] if lines else type(error).__name__
    return WeightsError(f"{path.name}: {runtime} cannot load it ({reason.strip()[:300]}); export it again, or try another --format")


@dataclass(frozen=True)
class Calibration:
    """Photos from which a quantiser learns the ranges of activations, read anew by each loop over them."""

    paths: tuple[Path, ...]
    rules: PhotoRules
    long_side: int | None
    size: Size | None
    """All are scaled to it, if it is given"""
    note: str
    """For the metadata: what was calibrated by what"""

    def __iter__(self) -> Iterator[Tensor]:
        """(1, 3, H, W) float32."""
        for path in self.paths:
            pixels = read_photo(path, self.rules, self.long_side)[0]
            yield to_batch(pixels if self.size is None else resize_image(pixels, *self.size))

    def __len__(self) -> int:
        return len(self.paths)


@contextlib.contextmanager
def converting(student: Student, what: str, faults: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Silences a converter, and says in one line that names the network what it cannot convert. Raises WeightsError.

    `faults` are errors of the converter's own that are none of REFUSALS.
    """
    try:
        with quiet():
            yield
    except MGDError:  # of a photo, for instance, which is no fault of the network
        raise
    except (*REFUSALS, *faults) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        network = student.metadata["network"]
        pair = f"{network['decoder']} with {network['encoder']}"
        raise WeightsError(f"{pair}: {what} ({reason.strip()[:300]}); try another --format") from error


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """Imports OpenVINO and NNCF without openvino_telemetry, by which they report each import and each use to Intel."""
    name = "openvino_telemetry"
    before = {key: sys.modules.pop(key) for key in list(sys.modules) if key.partition(".")[0] == name}
    sys.modules[name] = None  # pyright: ignore[reportArgumentType]  # Python's own way to say that there is no such module
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what converters print, warn and log from the user, who can do nothing about it."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(disabled)
