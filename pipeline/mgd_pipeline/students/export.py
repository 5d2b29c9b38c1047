"""The student for other runtimes: a TorchScript file, a plain segmentation-models-pytorch folder; `students.onnx` makes ONNX files.

ONNX and TorchScript files contain everything that `Student.forward` does, for any batch and size: scaling down to the size of
training, normalisation, padding, upsampling. An smp folder contains the network alone, and a note that says the rest. Each
format has a function that writes it and one that runs the result.

Letters: B batch, K classes, H W pixels.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
from safetensors import SafetensorError
from timm.layers import Conv2dSame  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from mgd_pipeline.data.images import resize_image, scaled_size
from mgd_pipeline.durable import replace_file
from mgd_pipeline.errors import WeightsError
from mgd_pipeline.networks.inference import run_whole
from mgd_pipeline.networks.segmentation import MULTIPLE
from mgd_pipeline.students.student import Student

Run = Callable[[Tensor], Tensor]
"""(B, 3, H, W) float32 RGB, whole numbers in 0 to 255, to (B, K, H, W) float32 logits."""

SMP_NOTE = "mgd.json"
"""The file in an smp folder that holds what smp's own files lack: normalisation, classes, palette."""

_FACTS = ("classes", "palette", "long_side")
EXAMPLE = (2, 3, 96, 160)
"""Sizes for tracing: none is 1, and none equals another, so no tracer takes one for a constant."""


class DeployedStudent(nn.Module):
    """The network for export: `Student.forward`, with equivalent layers that exporters can follow."""

    mean: Tensor
    std: Tensor

    def __init__(self, student: Student, *, pools: bool) -> None:
        """`pools`: also replace adaptive pooling, which ONNX has for fixed sizes only."""
        super().__init__()
        self.network = copy.deepcopy(student.network)
        for name, layer in list(self.network.named_modules()):
            if isinstance(layer, Conv2dSame):
                self.network.set_submodule(name, _fixed_padding(layer))
            elif pools and isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size not in (1, (1, 1)):
                assert isinstance(layer.output_size, int)
                self.network.set_submodule(name, _AveragePool(layer.output_size))
        self.long_side = student.long_side
        for name, values in (("mean", student.normalisation.mean), ("std", student.normalisation.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        self.eval()

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """As `Student.forward`."""
        return run_whole(self.network, images_B3HW, self.mean, self.std, self.long_side)


def _fixed_padding(layer: Any) -> nn.Module:
    """TensorFlow's SAME padding without looking at the size.

    Sides are multiples of 32 here, hence multiples of every layer's stride, so the padding is the same for all sizes.
    torch's exporter takes seven minutes for timm's formula with unknown sizes, and 20 s for this one.
    """
    margins = []
    for axis in (1, 0):  # F.pad's order
        total = max(layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1 - layer.stride[axis], 0)
        margins += [total // 2, total - total // 2]
    geometry = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
    plain = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, **geometry, bias=layer.bias is not None)
    plain.weight, plain.bias = layer.weight, layer.bias
    return nn.Sequential(nn.ZeroPad2d(tuple(margins)), plain)


class _AveragePool(nn.Module):
    """nn.AdaptiveAvgPool2d as two matrix products: row i averages the positions floor(i L / n) to ceil((i + 1) L / n)."""

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, features_BCHW: Tensor) -> Tensor:
        return self._means(features_BCHW.shape[-2]) @ features_BCHW @ self._means(features_BCHW.shape[-1]).T

    def _means(self, length: int) -> Tensor:
        cell, position = torch.arange(self.cells)[:, None], torch.arange(length)[None]
        start, end = cell * length // self.cells, -(-(cell + 1) * length // self.cells)
        return ((position >= start) & (position < end)).float() / (end - start)


def describe(student: Student) -> dict[str, Any]:
    """The description of an exported network, as plain JSON."""
    steps = "normalisation and padding are inside"
    if student.long_side is not None:
        steps = f"scaling down to a long side of {student.long_side} pixels, {steps}"
    return {
        "input": f"images: float32 (batch, 3, height, width), RGB, whole numbers 0 to 255, any size; {steps}",
        "output": "logits: float32 (batch, class, height, width); the class of a pixel is the argmax over axis 1",
        **{name: getattr(student, name) for name in _FACTS},
    }


def to_batch(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 to the exported networks' input, (1, 3, H, W) float32."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)[None])).float()


def cannot_run(runtime: str, images: Tensor, error: Exception) -> WeightsError:
    reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    size = " x ".join(map(str, images.shape))
    return WeightsError(f"{runtime} cannot run the exported network at {size} ({reason.strip()[:300]}); nothing is written")


@contextlib.contextmanager
def _torchscript() -> Iterator[None]:
    """Silences torch's warning that TorchScript is deprecated: users of this format have a device that runs nothing else."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is (deprecated|not supported)", category)
        # group_norm checks its input in Python; the sizes themselves are traced, as the comparison proves.
        warnings.filterwarnings("ignore", "Converting a tensor to a Python boolean", torch.jit.TracerWarning)  # pyright: ignore
        yield


def to_torchscript(student: Student) -> bytes:
    """A traced module; `describe` lies in the archive as extra/metadata.json (torch.jit.load's `_extra_files`)."""
    buffer = io.BytesIO()
    with _torchscript(), torch.no_grad():
        # Without torch's own check, which compares the traced size alone: the caller compares other sizes.
        traced = torch.jit.trace(DeployedStudent(student, pools=False), (torch.zeros(EXAMPLE),), check_trace=False)
        torch.jit.save(traced, buffer, _extra_files={"metadata.json": json.dumps(describe(student), allow_nan=False)})
    return buffer.getvalue()


def run_torchscript(model: bytes) -> Run:
    with _torchscript():
        module = torch.jit.load(io.BytesIO(model), map_location="cpu")

    @torch.no_grad()
    def run(images_B3HW: Tensor) -> Tensor:
        try:
            return module(images_B3HW)
        except RuntimeError as error:
            raise cannot_run("TorchScript", images_B3HW, error) from None

    return run


def to_smp(student: Student, folder: Path) -> None:
    """A folder that `smp.from_pretrained` reads; normalisation, classes and palette stand beside it in mgd.json."""
    try:
        student.network.model.save_pretrained(folder)
    except SafetensorError as error:  # its text alone has the number
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from None
    steps = f"RGB; (pixel - mean) / std with pixels in 0 to 255; sides padded with 0 to multiples of {MULTIPLE}"
    if student.long_side is not None:
        steps = (
            f"{steps}. Before that, scale an image whose longer side exceeds {student.long_side} pixels down to it (Pillow's "
            "Resampling.BILINEAR; the other side in proportion, halves rounded up, at least 1). After that, cut the logits to the "
            "scaled image and bring them to the size of the image (bilinear, half-pixel centres)"
        )
    mean, std = student.normalisation[:2]
    note = {"input": steps, "mean": mean, "std": std, **{name: getattr(student, name) for name in _FACTS}}
    replace_file(folder / SMP_NOTE, (json.dumps(note, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def run_smp(folder: Path) -> Run:
    """As a user of smp would run it: scaled, normalised, padded, cut and brought back as mgd.json says."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it loads
        model = smp.from_pretrained(str(folder)).eval()
    note = json.loads((folder / SMP_NOTE).read_text(encoding="utf-8"))
    mean, std = (torch.tensor(note[name]).view(1, 3, 1, 1) for name in ("mean", "std"))

    @torch.no_grad()
    def run(images_B3HW: Tensor) -> Tensor:
        size = images_B3HW.shape[2], images_B3HW.shape[3]
        height, width = scaled_size(*size, note["long_side"])
        arrays = images_B3HW.permute(0, 2, 3, 1).to(torch.uint8).numpy()
        small = torch.cat([to_batch(resize_image(array, height, width)) for array in arrays])
        padded = nn.functional.pad((small - mean) / std, (0, -width % MULTIPLE, 0, -height % MULTIPLE))
        return nn.functional.interpolate(model(padded)[..., :height, :width], size=size, mode="bilinear", align_corners=False)

    return run
