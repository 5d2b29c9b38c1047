"""The student as a program of torch.export (.pt2), for any batch and size or a fixed one; torch runs it without this package.

Letters: B batch, K classes, H W pixels.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgd_pipeline.exports.deployed import (
    EXAMPLE,
    DeployedStudent,
    Run,
    Size,
    cannot_load,
    cannot_run,
    converting,
    describe,
    of_size,
    quiet,
)
from mgd_pipeline.networks.inference import as_large_as
from mgd_pipeline.networks.scaling import resample, scaled_lengths
from mgd_pipeline.networks.segmentation import MULTIPLE, REFUSALS, upsample
from mgd_pipeline.students.student import Student

METADATA = "metadata.json"
"""The file in the archive that holds `describe`."""


def write(student: Student, path: Path, size: Size | None = None) -> None:
    """Raises WeightsError for a network that torch cannot export."""
    with converting(student, "torch cannot export it"):
        program = to_program(student, size)
        metadata = json.dumps(describe(student, size), ensure_ascii=False, allow_nan=False)
        content = io.BytesIO()  # on a full disk torch's own writer ends the process
        torch.export.save(program, content, extra_files={METADATA: metadata})
    path.write_bytes(content.getvalue())


def to_program(student: Student, size: Size | None) -> Any:
    """The torch.export.ExportedProgram of the whole student; input `images`, output the logits."""
    if size is not None:
        network, images = of_size(student, size)
        return torch.export.export(_OneSize(network), (images,))
    axes = {axis: torch.export.Dim.DYNAMIC(min=1) for axis in (0, 2, 3)}
    return torch.export.export(_AnySize(student), (torch.zeros(EXAMPLE),), dynamic_shapes={"images": axes})


class _OneSize(nn.Module):
    """Calls the input of the program `images`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class _AnySize(nn.Module):
    """`Student.forward` for torch's exporter, which carries the formula of every size into every layer.

    Formulas that begin with an image's own sides make it assume what holds for the example alone, or take minutes. Here it
    forgets the formulas of the scaled and of the padded sides, and knows these sides by names.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = DeployedStudent(student)
        for name, layer in list(self.student.named_modules()):
            if isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1)):
                self.student.set_submodule(name, _Mean())  # torch's own asks whether a side is 1
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """As `run_whole`."""
        student, seen = self.student, images
        if student.long_side is not None:
            height, width = (_named(length) for length in scaled_lengths(images, student.long_side))
            seen = resample(images, torch.arange(height), torch.arange(width))
        height, width = seen.shape[-2:]
        tall, wide = (MULTIPLE * _named((side + MULTIPLE - 1) // MULTIPLE) for side in (height, width))
        torch._check(tall >= height)
        torch._check(wide >= width)
        padded = nn.functional.pad((seen - student.mean) / student.std, (0, wide - width, 0, tall - height))
        logits = upsample(student.network(padded).logits, (tall, wide)).narrow(2, 0, height).narrow(3, 0, width)
        return logits if student.long_side is None else as_large_as(logits, images)


class _Mean(nn.Module):
    """nn.AdaptiveAvgPool2d(1)."""

    def forward(self, features_BCHW: Tensor) -> Tensor:
        return features_BCHW.mean((2, 3), keepdim=True)


def _named(length: int) -> int:
    """The same length, at least 1, whose formula torch's exporter has forgotten."""
    name: Any = torch.scalar_tensor(length, dtype=torch.int64).item()
    torch._check(name >= 1)
    return name


def read_notes(path: Path) -> dict[str, Any]:
    """`describe` of the student that a file is of. Raises WeightsError for a file that is no archive of torch."""
    try:
        with zipfile.ZipFile(path) as archive:
            places = [name for name in archive.namelist() if name.endswith(f"/extra/{METADATA}")]
            return json.loads(archive.read(places[0])) if places else {}
    except zipfile.BadZipFile as error:
        raise cannot_load("torch", path, error) from None


def load(path: Path) -> Run:
    """torch on the CPU. Raises WeightsError for a file that it cannot load."""
    try:
        with quiet():
            network = torch.export.load(path).module()
    except (zipfile.BadZipFile, *REFUSALS) as error:
        raise cannot_load("torch", path, error) from None

    @torch.no_grad()
    def run(images_B3HW: Tensor) -> Tensor:
        try:
            return network(images_B3HW)
        except REFUSALS as error:
            raise cannot_run("torch.export", images_B3HW, error) from None

    return run
