"""The student as an ExecuTorch program (.pte) for one image of a fixed size; XNNPACK computes it on phones and small boards.

Letters: B batch, K classes, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgd_pipeline.exports.deployed import Calibration, Run, Size, cannot_load, cannot_run, converting
from mgd_pipeline.exports.torch_export import to_program
from mgd_pipeline.networks.segmentation import REFUSALS
from mgd_pipeline.students.student import Student


def write(student: Student, path: Path, size: Size | None) -> None:
    """Raises WeightsError for a network that ExecuTorch cannot convert."""
    with converting(student, "ExecuTorch cannot convert it"):
        _save(to_program(student, size), path)


def quantise(student: Student, written: Path, path: Path, size: Size | None, calibration: Calibration) -> None:
    """Writes a program with int8 weights, a scale for each channel, and int8 activations of any zero point (PT2E, XNNPACK)."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer_utils import propagate_annotation
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    class Quantizer(XNNPACKQuantizer):
        def annotate(self, model: Any) -> Any:
            _quantise_behind_relu6(model, self.global_config)
            model = super().annotate(model)
            _quantise_margins(model)
            propagate_annotation(model)  # to what follows a margin
            return model

    with converting(student, "XNNPACK cannot quantise it"), torch.no_grad():
        program = to_program(student, size)
        prepared: Any = prepare_pt2e(
            program.module(), Quantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        )
        for images in calibration:
            prepared(images)
        _save(torch.export.export(convert_pt2e(prepared), program.example_inputs[0]), path)


def _quantise_behind_relu6(model: Any, config: Any) -> None:
    """Rounds what is behind a convolution and its ReLU6, as XNNPACK computes them, in one step.

    The quantiser of ExecuTorch 1.5 knows this of ReLU alone. With ReLU6 it rounds what the convolution gives, whose range reaches
    far beyond 0 to 6: the networks of mobile phones then keep few of the 256 levels.
    """
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    operators = torch.ops.aten
    for node in model.graph.nodes:
        if node.target not in (operators.hardtanh.default, operators.hardtanh_.default):
            continue
        layer = node.args[0]
        if layer.target is operators.conv2d.default and len(layer.users) == 1:
            given = {layer.args[0]: config.input_activation, layer.args[1]: config.weight}
            layer.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(given, _annotated=True)
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation({}, config.output_activation, _annotated=True)


def _quantise_margins(model: Any) -> None:
    """Gives a margin the scale and the zero point of what it surrounds: XNNPACK (of ExecuTorch 1.5) loads no program in which they
    differ, or in which the margin alone is float32."""
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, SharedQuantizationSpec
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

    for node in model.graph.nodes:
        if node.target is torch.ops.aten.pad.default:
            before = node.args[0].meta.get(Q_ANNOTATION_KEY)
            if before is not None and before.output_qspec is not None:
                shared = SharedQuantizationSpec(node.args[0])
                node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation({node.args[0]: shared}, shared, _annotated=True)


def _save(program: Any, path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    path.write_bytes(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


@cache
def _share_threads() -> None:
    """Gives ExecuTorch as many threads as torch has, once in a process: programs that are loaded keep a pointer to its pool."""
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count, _unsafe_reset_threadpool

    with _unsaid():
        if _threadpool_get_thread_count() != torch.get_num_threads():
            _unsafe_reset_threadpool(torch.get_num_threads())


@contextmanager
def _unsaid() -> Iterator[None]:
    """Keeps from the user what C++ writes to standard error: of any x86 processor, that files of Arm's are missing; and where in
    its own files it refused a program."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def load(path: Path) -> Run:
    """ExecuTorch on the CPU, with as many threads as torch had when the process loaded its first program."""
    from executorch.runtime import Runtime

    _share_threads()
    try:
        with _unsaid():
            program = Runtime.get().load_program(path)
            method = program.load_method("forward")
    except RuntimeError as error:
        raise cannot_load("ExecuTorch", path, error) from None
    assert method is not None

    def run(images_B3HW: Tensor) -> Tensor:
        try:
            return torch.cat([method.execute([image[None].contiguous()])[0].clone() for image in images_B3HW])
        except REFUSALS as error:
            raise cannot_run("ExecuTorch", images_B3HW, error) from None

    return run
