"""The student as an OpenVINO model (.xml, with its weights in .bin), for any batch and size or a fixed one.

Letters: B batch, K classes, H W pixels.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgd_pipeline.exports.deployed import Calibration, Run, Size, cannot_load, cannot_run, converting, describe, unreported
from mgd_pipeline.exports.onnx import PIECES, to_onnx
from mgd_pipeline.students.student import Student

NOTES = "mgd"
"""The section of the file's rt_info that holds `describe`, each value in JSON."""


class _SignalStack(ctypes.Structure):
    """`stack_t` of sigaltstack(2)"""

    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Gives this thread the signal stack back that it had before OpenVINO compiled a model.

    Each `openvino.Core` sets a stack of its own for the thread (OpenVINO 2026.4 on Linux). When two are dropped in the order in
    which they were made, the thread is left with a freed stack, and its next signal, such as Ctrl-C, is a segmentation fault.
    """
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None, use_errno=True), _SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


def write(student: Student, path: Path, size: Size | None = None) -> None:
    """Converted from ONNX. Raises WeightsError for a network that cannot be converted."""
    import io

    with unreported():
        import openvino

    model = to_onnx(student, size)
    with converting(student, "OpenVINO cannot convert it"):
        converted = openvino.Core().read_model(io.BytesIO(model))
        _note(converted, describe(student, size))
        openvino.save_model(converted, path, compress_to_fp16=False)


def quantise(student: Student, written: Path, path: Path, size: Size | None, calibration: Calibration) -> None:
    """Writes the model that `write` has written, quantised by NNCF: int8 weights, a scale for each channel, and uint8 activations.

    Scaling images down and bringing logits back stay float32.
    """
    with unreported():
        import nncf
        import openvino

    with kept_signal_stack(), converting(student, "NNCF cannot quantise it"):
        model = openvino.Core().read_model(written)
        small = nncf.quantize(
            model,
            nncf.Dataset(calibration, lambda images: images.numpy()),
            preset=nncf.QuantizationPreset.MIXED,  # the zero point of activations is free, as ONNX Runtime and XNNPACK have it
            subset_size=len(calibration),
            ignored_scope=nncf.IgnoredScope(patterns=[f".*{piece}.*" for piece in PIECES], validate=False),
        )
        _note(small, {**describe(student, size), "int8": calibration.note})
        openvino.save_model(small, path, compress_to_fp16=False)


def _note(model: Any, content: dict[str, Any]) -> None:
    for key, value in content.items():
        model.set_rt_info(json.dumps(value, ensure_ascii=False, allow_nan=False), [NOTES, key])


def read_notes(path: Path) -> dict[str, Any]:
    """`describe` of the student that a file is of."""
    with unreported():
        import openvino

    with kept_signal_stack():
        model = openvino.Core().read_model(path)
    return {key: json.loads(value) for key, value in model.get_rt_info(NOTES).value.items()} if model.has_rt_info(NOTES) else {}


def load(path: Path) -> Run:
    """OpenVINO on the CPU in float32, with as many threads as torch has. By itself it takes bfloat16 where the processor has it."""
    with unreported():
        import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    try:
        with kept_signal_stack():
            compiled = openvino.compile_model(path, "CPU", settings)
    except RuntimeError as error:
        raise cannot_load("OpenVINO", path, error) from None

    def run(images_B3HW: Tensor) -> Tensor:
        try:
            return torch.from_numpy(compiled(images_B3HW.numpy())["logits"].copy())
        except RuntimeError as error:
            raise cannot_run("OpenVINO", images_B3HW, error) from None

    return run
