"""The student as an ONNX file, for any batch and size or a fixed one, in float32 or int8; and ONNX Runtime, which runs it.

Letters: B batch, K classes, H W pixels.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mgd_pipeline.exports.deployed import (
    EXAMPLE,
    Calibration,
    DeployedStudent,
    Run,
    Size,
    cannot_load,
    cannot_run,
    converting,
    describe,
    of_size,
)
from mgd_pipeline.networks.inference import as_large_as
from mgd_pipeline.networks.scaling import resample, scaled_lines
from mgd_pipeline.students.student import Student


def write(student: Student, path: Path, size: Size | None = None) -> None:
    """Raises WeightsError for a network that torch cannot export."""
    path.write_bytes(to_onnx(student, size))


def to_onnx(student: Student, size: Size | None = None) -> bytes:
    """An ONNX model with `describe` in its metadata; batch, height and width are dynamic unless a `size` is given. Raises
    WeightsError."""
    with converting(student, "torch cannot export it to ONNX"):
        if size is not None:
            network, images = of_size(student, size)
            proto = _exported(network, {"images": _Input(images, {})}, ["logits"])
        elif student.long_side is None:
            proto = _exported(DeployedStudent(student), {"images": _IMAGES}, ["logits"])
        else:
            network = DeployedStudent(student)
            network.long_side = None
            proto = _scaled(network, student.long_side)
    _set_metadata(proto, describe(student, size))
    return proto.SerializeToString()


class _Input(NamedTuple):
    """An example input of a graph, and the names of its axes that may have any length."""

    example: Tensor
    axes: dict[int, str]


PIECES = _SIZES, _SCALE, _ENLARGE = "sizes_", "scale_", "enlarge_"
"""How names begin in the graphs around a network that scales; torch's own names begin with node_."""
_IMAGES = _Input(torch.zeros(EXAMPLE), {0: "batch", 2: "height", 3: "width"})


def _scaled(network: nn.Module, long_side: int) -> Any:
    """The ModelProto of a network between scaling down and bringing the logits back, exported in pieces and joined.

    The sizes of a scaled image are long formulas. In one graph, torch's exporter carries them into every layer and did not
    finish within minutes; each piece knows the sizes of its inputs by a name.
    """
    from onnx.compose import merge_models
    from onnx.helper import make_opsetid

    rows, columns = _Input(torch.arange(40), {0: "scaled_height"}), _Input(torch.arange(70), {0: "scaled_width"})
    scaled = _Input(torch.zeros(EXAMPLE), {0: "batch", 2: "scaled_height", 3: "scaled_width"})
    with torch.no_grad():
        logits = _Input(network(scaled.example), scaled.axes)
    frames = _Input(_IMAGES.example, {2: "height", 3: "width"})  # only these two axes are read

    def sizes(images_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return images_B3HW, *scaled_lines(images_B3HW, long_side)

    proto = _piece(_SIZES, sizes, {"images": _IMAGES}, ["frames", "rows", "columns"])
    for piece, outputs in (
        (_piece(_SCALE, resample, {"frames": _IMAGES, "rows": rows, "columns": columns}, ["scaled"]), ["frames", "scaled"]),
        (_exported(network, {"scaled": scaled}, ["scaled_logits"]), ["frames", "scaled_logits"]),
        (_piece(_ENLARGE, as_large_as, {"scaled_logits": logits, "frames": frames}, ["logits"]), ["logits"]),
    ):
        names = [(value.name, value.name) for value in piece.graph.input]
        proto = merge_models(proto, piece, names, outputs=outputs, name="student", doc_string="", producer_name="pytorch")
    # Joining lists the operators' version once for each piece; ONNX Runtime's quantiser wants it once.
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    del proto.opset_import[:]
    proto.opset_import.extend(make_opsetid(*entry) for entry in versions.items())
    return proto


class _Function(nn.Module):
    """A function as a module: torch exports modules only."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def _piece(prefix: str, function: Callable[..., Any], inputs: dict[str, _Input], outputs: list[str]) -> Any:
    """The ModelProto of a function, whose inner names begin with `prefix`, so that it can be joined with other pieces."""
    from onnx.compose import add_prefix

    proto = _exported(_Function(function), inputs, outputs)
    # Each piece calls its unnamed lengths u0, u1 ...; a runtime would take equal names for equal lengths.
    del proto.graph.value_info[:]
    return add_prefix(proto, prefix, rename_inputs=False, rename_outputs=False)


def _exported(module: nn.Module, inputs: dict[str, _Input], outputs: list[str]) -> Any:
    """The ModelProto that torch makes of a module."""
    lengths = [{axis: torch.export.Dim(name) for axis, name in value.axes.items()} for value in inputs.values()]
    program = torch.onnx.export(
        module,
        tuple(value.example for value in inputs.values()),
        dynamo=True,
        dynamic_shapes=(tuple(lengths),) if isinstance(module, _Function) else tuple(lengths),
        input_names=list(inputs),
        output_names=outputs,
        external_data=False,
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def _faults() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its errors have no class in common but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # pyright: ignore[reportAttributeAccessIssue]

    faults = state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile, state.NotImplemented
    return *faults, state.RuntimeException


def load(path: Path) -> Run:
    """ONNX Runtime on the CPU, with as many threads as torch has. Raises WeightsError for a file that it cannot load."""
    import onnxruntime

    faults, options = _faults(), onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except faults as error:
        raise cannot_load("ONNX Runtime", path, error) from None

    def run(images_B3HW: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(["logits"], {"images": images_B3HW.numpy()})[0])
        except faults as error:
            raise cannot_run("ONNX Runtime", images_B3HW, error) from None

    return run


_FLOAT = ("InstanceNormalization", "GroupNormalization", "LayerNormalization")
"""Operators that stay float32 in int8 models: divisions by an image's own deviation."""


def _stays_float(node: Any, weights: set[str]) -> bool:
    """Whether a node stays float32: one of _FLOAT, a product of two activations, or a node that scales pixels or logits.

    Such products are attention and UPerNet's pools, which have no weights to shrink.
    """
    has_no_weights = node.op_type == "MatMul" and weights.isdisjoint(node.input)
    return has_no_weights or node.op_type in _FLOAT or node.name.startswith(PIECES)


def quantise(student: Student, written: Path, path: Path, size: Size | None, calibration: Calibration) -> None:
    """Writes the model that `write` has written with int8 weights, a scale for each channel, and uint8 activations, whose ranges
    are the smallest and largest values on the photos. Raises WeightsError for a network that ONNX Runtime cannot quantise."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            image = next(self.images, None)
            return None if image is None else {"images": image.numpy()}

    given = onnx.load(written)
    refused = converting(student, "ONNX Runtime cannot quantise it", _faults())
    with refused, tempfile.TemporaryDirectory() as folder:
        prepared, small = (str(Path(folder, name)) for name in ("prepared.onnx", "int8.onnx"))
        # torch's exporter has optimised the graph already; this call only sets a mark without which the next step warns.
        quant_pre_process(given, prepared, skip_optimization=True, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        weights = {tensor.name for tensor in graph.initializer}
        quantize_static(
            prepared,
            small,
            Reader(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[node.name for node in graph.node if _stays_float(node, weights)],
        )
        proto = onnx.load(small)
    _set_metadata(proto, {**describe(student, size), "int8": calibration.note})
    path.write_bytes(proto.SerializeToString())


def read_notes(path: Path) -> dict[str, Any]:
    """`describe` of the student that a file is of. Raises WeightsError for a file that is no ONNX model."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        notes = onnx.load(path, load_external_data=False).metadata_props
    except DecodeError as error:
        raise cannot_load("ONNX", path, error) from None
    return {entry.key: json.loads(entry.value) for entry in notes}


def _set_metadata(proto: Any, content: dict[str, Any]) -> None:
    """One entry for each key, its value in JSON; replaces the notes of exporter and quantiser."""
    import onnx

    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {key: json.dumps(value, allow_nan=False) for key, value in content.items()})
