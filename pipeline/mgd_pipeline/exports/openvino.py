"""The student as an OpenVINO model (.xml, with its weights in .bin), for any batch and size or a fixed one.

Letters: B batch, K classes, H W pixels.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from mgd_pipeline.exports.deployed import Run, Size, cannot_run, converting, describe
from mgd_pipeline.exports.onnx import to_onnx
from mgd_pipeline.students.student import Student

NOTES = "mgd"
"""The section of the file's rt_info that holds `describe`, each value in JSON."""


def write(student: Student, path: Path, size: Size | None = None) -> None:
    """Converted from ONNX. Raises WeightsError for a network that cannot be converted."""
    import io

    import openvino

    model = to_onnx(student, size)
    with converting(student, "OpenVINO cannot convert it"):
        converted = openvino.convert_model(io.BytesIO(model))
        for key, value in describe(student, size).items():
            converted.set_rt_info(json.dumps(value, ensure_ascii=False, allow_nan=False), [NOTES, key])
        openvino.save_model(converted, path, compress_to_fp16=False)


def load(path: Path) -> Run:
    """OpenVINO on the CPU in float32, with as many threads as torch has. By itself it takes bfloat16 where the processor has it."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(path, "CPU", settings)

    def run(images_B3HW: Tensor) -> Tensor:
        try:
            return torch.from_numpy(compiled(images_B3HW.numpy())["logits"].copy())
        except RuntimeError as error:
            raise cannot_run("OpenVINO", images_B3HW, error) from None

    return run
