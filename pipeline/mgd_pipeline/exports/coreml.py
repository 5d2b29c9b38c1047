"""The student as a Core ML package (.mlpackage) for one image of a fixed size, in float16, which the Neural Engine computes.

Core ML runs on Macs, iPhones and iPads only. Elsewhere `load` reads the package and computes its program operator by operator
with torch: this proves the conversion, and it imitates the rounding to float16.

Letters: B batch, K classes, H W pixels.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_pipeline.errors import WeightsError
from mgd_pipeline.exports.deployed import Run, Size, cannot_run, converting, describe, quiet
from mgd_pipeline.exports.torch_export import to_program
from mgd_pipeline.networks.segmentation import REFUSALS
from mgd_pipeline.students.student import Student

NOT_RUN = (
    "Core ML itself has not run it, because Core ML runs on Apple's systems only; torch computed its program, operator by operator"
)


def write(student: Student, path: Path, size: Size | None) -> None:
    """For iOS 16, macOS 13 and later. Raises WeightsError for a network that Core ML Tools cannot convert."""
    import coremltools

    with converting(student, "Core ML Tools cannot convert it"):
        model: Any = coremltools.convert(
            _without_aliases(to_program(student, size).run_decompositions({})),
            convert_to="mlprogram",
            outputs=[coremltools.TensorType(name="logits")],
            compute_precision=coremltools.precision.FLOAT16,
            minimum_deployment_target=coremltools.target.iOS16,
            skip_model_load=True,
        )
        notes = describe(student, size) | ({} if _on_a_mac() else {"compared": f"not run: {NOT_RUN}"})
        for key, value in notes.items():
            model.user_defined_metadata[key] = json.dumps(value, ensure_ascii=False, allow_nan=False)
        model.save(str(path))
        (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # no part of a package


def _without_aliases(program: Any) -> Any:
    """The program without steps that do nothing, such as cutting 0 pixels away, for which Core ML Tools has no word."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            program.graph_signature.replace_all_uses(node.name, node.args[0].name)
            program.graph.erase_node(node)
    return program


def _on_a_mac() -> bool:
    return sys.platform == "darwin"


def read_notes(path: Path) -> dict[str, Any]:
    """`describe` of the student that a package is of."""
    import coremltools

    with quiet():
        notes = coremltools.models.MLModel(str(path), skip_model_load=True).user_defined_metadata
    return {key: json.loads(value) for key, value in notes.items() if not key.startswith("com.github.")}


def load(path: Path) -> Run:
    """Core ML on a Mac; elsewhere torch, operator by operator. Raises WeightsError for an operator that torch cannot imitate."""
    import coremltools

    with quiet():
        model: Any = coremltools.models.MLModel(str(path), skip_model_load=not _on_a_mac())
    if not _on_a_mac():
        return _in_torch(model)

    def run(images_B3HW: Tensor) -> Tensor:
        try:
            logits = [model.predict({"images": image[None].numpy()})["logits"] for image in images_B3HW]
        except REFUSALS as error:
            raise cannot_run("Core ML", images_B3HW, error) from None
        return torch.from_numpy(np.concatenate(logits)).float()

    return run


def _in_torch(model: Any) -> Run:
    from coremltools.converters.mil.frontend.milproto.load import load as read_program

    specification = model.get_spec()
    program: Any = read_program(specification, specification.specificationVersion, file_weights_dir=model.weights_dir)
    function = program.functions["main"]
    steps = [step for step in function.operations if step.op_type != "const"]
    if unknown := {step.op_type for step in steps} - OPERATORS.keys():
        raise WeightsError(f"Core ML: {', '.join(sorted(unknown))} cannot be compared here; export on a Mac")
    constants = {
        value.name: _constant(value.val)
        for step in steps
        for given in step.inputs.values()
        for value in (given if isinstance(given, (list, tuple)) else [given])
        if value.val is not None
    }

    @torch.no_grad()
    def run(images_B3HW: Tensor) -> Tensor:
        logits = []
        for image in images_B3HW:
            values = {**constants, "images": image[None]}
            try:
                for step in steps:
                    given = {name: _look_up(value, values) for name, value in step.inputs.items()}
                    (made,) = step.outputs
                    values[made.name] = OPERATORS[step.op_type](**given)
                    if tuple(values[made.name].shape) != tuple(made.shape):
                        raise ValueError(f"{made.name} is {tuple(values[made.name].shape)}, not {tuple(made.shape)}")
            except REFUSALS as error:
                raise cannot_run("torch, in the place of Core ML,", images_B3HW, error) from None
            logits.append(values["logits"].float())
        return torch.cat(logits)

    return run


def _constant(value: Any) -> Any:
    """Arrays as tensors; short lists of whole numbers, which say how an operator works, as they are; numbers as Python's."""
    if isinstance(value, np.ndarray) and value.ndim:
        return value.tolist() if value.dtype.kind in "ib" and value.ndim == 1 else torch.from_numpy(value.copy())
    return value.item() if isinstance(value, (np.generic, np.ndarray)) else value


def _look_up(given: Any, values: dict[str, Any]) -> Any:
    return [values[value.name] for value in given] if isinstance(given, (list, tuple)) else values[given.name]


# --- the operators of Core ML's intermediate language that students have, with the language's own names of arguments


def _margins(x: Tensor, pad_type: str, pad: list[int], kernel: list[int], strides: list[int], dilations: list[int]) -> list[int]:
    """Margins of two axes in F.pad's order."""
    if pad_type == "valid":
        return [0, 0, 0, 0]
    if pad_type == "custom":
        return [pad[2], pad[3], pad[0], pad[1]]
    totals = [
        max((-(-side // stride) - 1) * stride + (length - 1) * dilation + 1 - side, 0)
        for side, length, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    lower = pad_type == "same_lower"
    before = [-(-total // 2) if lower else total // 2 for total in totals]
    return [before[1], totals[1] - before[1], before[0], totals[0] - before[0]]


def _conv(
    x: Tensor,
    weight: Tensor,
    strides: list[int],
    pad_type: str,
    dilations: list[int],
    groups: int,
    pad: Any = None,
    bias: Any = None,
) -> Tensor:
    margins = _margins(x, pad_type, pad, list(weight.shape[2:]), strides, dilations)
    return F.conv2d(F.pad(x, margins), weight, bias, strides, 0, dilations, groups)


def _pool(kind: str) -> Callable[..., Tensor]:
    def pool(
        x: Tensor,
        kernel_sizes: list[int],
        strides: list[int],
        pad_type: str,
        pad: Any = None,
        ceil_mode: bool = False,
        exclude_padding_from_average: bool = False,
    ) -> Tensor:
        margins = _margins(x, pad_type, pad, kernel_sizes, strides, [1, 1])
        if kind == "max":
            return F.max_pool2d(F.pad(x, margins, value=-torch.inf), kernel_sizes, strides, ceil_mode=ceil_mode)
        sums = F.avg_pool2d(F.pad(x, margins), kernel_sizes, strides, ceil_mode=ceil_mode)
        if not exclude_padding_from_average:
            return sums
        return sums / F.avg_pool2d(F.pad(torch.ones_like(x), margins), kernel_sizes, strides, ceil_mode=ceil_mode)

    return pool


def _slice(x: Tensor, begin: list[int], end: list[int], **further: Any) -> Tensor:
    steps = further.get("stride") or x.ndim * [1]
    masks = [further.get(name) or x.ndim * [False] for name in ("begin_mask", "end_mask", "squeeze_mask")]
    places = zip(begin, end, steps, *masks, strict=True)
    return x[
        tuple(
            first if single else slice(None if from_start else first, None if to_end else last, step)
            for first, last, step, from_start, to_end, single in places
        )
    ]


def _pad(x: Tensor, pad: list[int], mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    margins = [pad[2 * axis + side] for axis in reversed(range(len(pad) // 2)) for side in (0, 1)]
    return F.pad(x, margins, mode, constant_val) if mode == "constant" else F.pad(x, margins, {"reflect": "reflect"}[mode])


def _upsample(x: Tensor, scale_factor_height: float, scale_factor_width: float, align_corners: bool) -> Tensor:
    size = [round(side * scale) for side, scale in zip(x.shape[2:], (scale_factor_height, scale_factor_width), strict=True)]
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def _nearest(x: Tensor, scale_factor_height: float, scale_factor_width: float) -> Tensor:
    size = [round(side * scale) for side, scale in zip(x.shape[2:], (scale_factor_height, scale_factor_width), strict=True)]
    return F.interpolate(x, size=size, mode="nearest")


def _matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _reduced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, axes, keep_dims=False: function(x, dim=axes, keepdim=keep_dims)


def _batch_norm(x: Tensor, mean: Tensor, variance: Tensor, gamma: Any = None, beta: Any = None, epsilon: float = 1e-5) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


def _layer_norm(x: Tensor, axes: list[int], gamma: Any = None, beta: Any = None, epsilon: float = 1e-5) -> Tensor:
    return F.layer_norm(x, [x.shape[axis] for axis in axes], gamma, beta, epsilon)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "add": lambda x, y: x + y,
    "avg_pool": _pool("avg"),
    "batch_norm": _batch_norm,
    "cast": lambda x, dtype: x.to({"fp16": torch.float16, "fp32": torch.float32, "int32": torch.int32}[dtype]),
    "clip": lambda x, alpha, beta: x.clamp(alpha, beta),
    "concat": lambda values, axis, interleave=False: torch.cat(values, axis),
    "conv": _conv,
    "exp": lambda x: x.exp(),
    "expand_dims": lambda x, axes: x.reshape(_expanded(list(x.shape), axes)),
    "gelu": lambda x, mode="EXACT": F.gelu(x, approximate="none" if mode == "EXACT" else "tanh"),
    "layer_norm": _layer_norm,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": _matmul,
    "max_pool": _pool("max"),
    "maximum": lambda x, y: torch.maximum(torch.as_tensor(x), torch.as_tensor(y)),
    "minimum": lambda x, y: torch.minimum(torch.as_tensor(x), torch.as_tensor(y)),
    "mul": lambda x, y: x * y,
    "pad": _pad,
    "real_div": lambda x, y: x / y,
    "reduce_mean": _reduced(torch.mean),
    "reduce_sum": _reduced(torch.sum),
    "relu": lambda x: x.relu(),
    "relu6": lambda x: F.relu6(x),
    "reshape": lambda x, shape: x.reshape(shape),
    "rsqrt": lambda x, epsilon=0.0: (x + epsilon).rsqrt(),
    "sigmoid": lambda x: x.sigmoid(),
    "sigmoid_hard": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "silu": lambda x: F.silu(x),
    "slice_by_index": _slice,
    "softmax": lambda x, axis: x.softmax(axis),
    "sqrt": lambda x: x.sqrt(),
    "square": lambda x: x * x,
    "squeeze": lambda x, axes: x.squeeze(tuple(axes)),
    "stack": lambda values, axis: torch.stack(values, axis),
    "sub": lambda x, y: x - y,
    "tanh": lambda x: x.tanh(),
    "thresholded_relu": lambda x, alpha: torch.where(x >= alpha, x, 0),
    "transpose": lambda x, perm: x.permute(perm),
    "upsample_bilinear": _upsample,
    "upsample_nearest_neighbor": _nearest,
}


def _expanded(shape: list[int], axes: list[int]) -> list[int]:
    for axis in sorted(axis if axis >= 0 else axis + len(shape) + len(axes) for axis in axes):
        shape.insert(axis, 1)
    return shape
