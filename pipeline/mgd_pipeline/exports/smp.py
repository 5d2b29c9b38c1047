"""The student as a folder that segmentation-models-pytorch reads: the network alone, and a note that says the rest."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mgd_pipeline.data.images import resize_image, scaled_size
from mgd_pipeline.exports.deployed import FACTS, Run, Size, quiet, to_batch
from mgd_pipeline.networks.segmentation import MULTIPLE
from mgd_pipeline.students.student import Student

NOTE = "mgd.json"
"""The file in an smp folder that holds what smp's own files lack: normalisation, classes, palette."""


def write(student: Student, path: Path, size: Size | None = None) -> None:
    """A folder that `smp.from_pretrained` reads; normalisation, classes and palette stand beside it in mgd.json."""
    try:
        student.network.model.save_pretrained(path)
    except SafetensorError as error:  # its text alone has the number
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    steps = f"RGB; (pixel - mean) / std with pixels in 0 to 255; sides padded with 0 to multiples of {MULTIPLE}"
    if student.long_side is not None:
        steps = (
            f"{steps}. Before that, scale an image whose longer side exceeds {student.long_side} pixels down to it (Pillow's "
            "Resampling.BILINEAR; the other side in proportion, halves rounded up, at least 1). After that, cut the logits to the "
            "scaled image and bring them to the size of the image (bilinear, half-pixel centres)"
        )
    mean, std = student.normalisation[:2]
    note = {"input": steps, "mean": mean, "std": std, **{name: getattr(student, name) for name in FACTS}}
    (path / NOTE).write_text(json.dumps(note, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_notes(path: Path) -> dict[str, Any]:
    """The content of mgd.json."""
    return json.loads((path / NOTE).read_text(encoding="utf-8"))


def load(path: Path) -> Run:
    """As a user of smp would run it: scaled, normalised, padded, cut and brought back as mgd.json says."""
    with quiet():  # it prints that it loads
        model = smp.from_pretrained(str(path)).eval()
    note = read_notes(path)
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
