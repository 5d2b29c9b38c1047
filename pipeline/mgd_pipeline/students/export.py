"""The student as other runtimes run it: an ONNX file, a TorchScript file, a plain segmentation-models-pytorch folder.

ONNX and TorchScript hold all that `Student.forward` does, for any batch and size: scaling down to the size of training,
normalisation, padding, upsampling. An smp folder holds the network alone, and a note that says the rest. Each has a function
that writes it and one that runs what was written.

Letters: B batch, K classes, H W pixels.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import segmentation_models_pytorch as smp
import torch
from safetensors import SafetensorError
from timm.layers import Conv2dSame  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from mgd_pipeline.data.images import resize_image, scaled_size
from mgd_pipeline.durable import naming, replace_file
from mgd_pipeline.errors import ParamsError, WeightsError
from mgd_pipeline.networks.inference import as_large_as, run_whole
from mgd_pipeline.networks.scaling import resample, scaled_lines
from mgd_pipeline.networks.segmentation import MULTIPLE
from mgd_pipeline.students.student import Student

Run = Callable[[Tensor], Tensor]
"""(B, 3, H, W) float32 RGB, whole numbers in 0 to 255, to (B, K, H, W) float32 logits."""

SMP_NOTE = "mgd.json"
"""The file in an smp folder that says what smp's own files do not: normalisation, classes, palette."""

_EXAMPLE = (2, 3, 96, 160)
"""Sizes that are traced: none is 1, none equals another, so none is taken for a constant."""


class DeployedStudent(nn.Module):
    """What is exported: `Student.forward`, with layers that do the same in a form that exporters can follow."""

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

    Sides are multiples of 32 here, hence multiples of the stride wherever a layer has one, and then the padding is the
    same for all. Following timm's formula through unknown sizes takes torch's exporter seven minutes instead of 20 s.
    """

    def margins(axis: int) -> tuple[int, int]:
        total = max(layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1 - layer.stride[axis], 0)
        return total // 2, total - total // 2

    plain = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        0,
        layer.dilation,
        layer.groups,
        layer.bias is not None,
    )
    plain.weight, plain.bias = layer.weight, layer.bias
    return nn.Sequential(nn.ZeroPad2d((*margins(1), *margins(0))), plain)


class _AveragePool(nn.Module):
    """nn.AdaptiveAvgPool2d as two matrix products: row i averages the positions floor(i L / n) to ceil((i + 1) L / n)."""

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, features_BCHW: Tensor) -> Tensor:
        height, width = features_BCHW.shape[-2:]
        return self._means(height) @ features_BCHW @ self._means(width).T

    def _means(self, length: int) -> Tensor:
        cell, position = torch.arange(self.cells)[:, None], torch.arange(length)[None]
        start, end = cell * length // self.cells, -(-(cell + 1) * length // self.cells)
        return ((position >= start) & (position < end)).float() / (end - start)


def describe(student: Student) -> dict[str, Any]:
    """What goes with an exported network, as plain JSON."""
    steps = "normalisation and padding are inside"
    if student.long_side is not None:
        steps = f"scaling down to a long side of {student.long_side} pixels, {steps}"
    return {
        "input": f"images: float32 (batch, 3, height, width), RGB, whole numbers 0 to 255, any size; {steps}",
        "output": "logits: float32 (batch, class, height, width); the class of a pixel is the argmax over axis 1",
        "classes": student.classes,
        "palette": student.palette,
        "long_side": student.long_side,
    }


def _cannot_run(runtime: str, images: Tensor, error: Exception) -> WeightsError:
    reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    size = " x ".join(map(str, images.shape))
    return WeightsError(f"{runtime} cannot run the exported network at {size} ({reason.strip()[:300]}); nothing is written")


# --- ONNX


def require_onnx() -> None:
    """Raises ParamsError where the extra `export` is not installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ParamsError(f"{', '.join(missing)}: not installed, and needed for ONNX; pip install 'mgd-pipeline[export]'")


def to_onnx(student: Student) -> bytes:
    """An ONNX model with dynamic batch, height and width, and `describe` in its metadata. Raises WeightsError."""
    network = DeployedStudent(student, pools=True)
    try:
        if student.long_side is None:
            proto = _exported(network, {"images": _IMAGES}, ["logits"])
        else:
            network.long_side = None
            proto = _scaled(network, student.long_side)
    except torch.onnx.OnnxExporterError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise WeightsError(f"{student.metadata['network']['encoder']}: torch cannot export it to ONNX ({reason})") from error
    _set_metadata(proto, describe(student))
    return proto.SerializeToString()


class _Input(NamedTuple):
    """An example of an input of a graph, and the names of those of its axes that may have any length."""

    example: Tensor
    axes: dict[int, str]


_PIECES = _SIZES, _SCALE, _ENLARGE = "sizes_", "scale_", "enlarge_"
"""How the names begin in the graphs around a network that scales; torch begins its own with node_."""
_IMAGES = _Input(torch.zeros(_EXAMPLE), {0: "batch", 2: "height", 3: "width"})


def _scaled(network: nn.Module, long_side: int) -> Any:
    """The ModelProto of a network between scaling down and bringing the logits back, exported in pieces and joined.

    The sizes of a scaled image are long formulas. In one graph, torch's exporter carries them into every layer and did not
    finish within minutes; each piece knows the sizes of its inputs by a name.
    """
    from onnx.compose import merge_models
    from onnx.helper import make_opsetid

    rows, columns = _Input(torch.arange(40), {0: "scaled_height"}), _Input(torch.arange(70), {0: "scaled_width"})
    scaled = _Input(torch.zeros(_EXAMPLE), {0: "batch", 2: "scaled_height", 3: "scaled_width"})
    with torch.no_grad():
        logits = _Input(network(scaled.example), scaled.axes)
    frames = _Input(_IMAGES.example, {2: "height", 3: "width"})  # only these two are looked at

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
    # Joining lists the operators' version once a piece, and ONNX Runtime's quantiser wants it once.
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    del proto.opset_import[:]
    proto.opset_import.extend(make_opsetid(*entry) for entry in versions.items())
    return proto


class _Function(nn.Module):
    """A function as a module, which is what torch exports."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def _piece(prefix: str, function: Callable[..., Any], inputs: dict[str, _Input], outputs: list[str]) -> Any:
    """The ModelProto of a function, whose inner names begin with `prefix`, so that it can be joined with others."""
    from onnx.compose import add_prefix

    proto = _exported(_Function(function), inputs, outputs)
    # Unnamed lengths are called u0, u1 ... in each piece; a runtime would take the same name for the same length.
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


def run_onnx(model: bytes) -> Run:
    """ONNX Runtime on the CPU, with as many threads as torch has."""
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException  # pyright: ignore

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(images_B3HW: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(["logits"], {"images": images_B3HW.numpy()})[0])
        except (Fail, InvalidArgument, RuntimeException) as error:
            raise _cannot_run("ONNX Runtime", images_B3HW, error) from None

    return run


_FLOAT = ("InstanceNormalization", "GroupNormalization", "LayerNormalization", "MatMul")
"""Stay float32 in int8 models: what divides by an image's own deviation, and UPerNet's pools, which cost nothing."""


def quantise(model: bytes, images: Iterable[np.ndarray], note: dict[str, Any]) -> bytes:
    """The ONNX model with int8 weights (per channel) and uint8 activations.

    Their ranges are the smallest and largest values on `images`, (H, W, 3) uint8; `note` joins the metadata.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            image = next(self.images, None)
            return None if image is None else {"images": to_batch(image).numpy()}

    described = _metadata(model)
    with tempfile.TemporaryDirectory() as folder:
        whole, prepared, small = (str(Path(folder, name)) for name in ("whole.onnx", "prepared.onnx", "int8.onnx"))
        with naming(Path(whole)):
            Path(whole).write_bytes(model)
        # torch's exporter has optimised the graph; what is left is a mark without which the next step warns.
        quant_pre_process(whole, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            small,
            Reader(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_kept(onnx.load(prepared).graph.node),
        )
        proto = onnx.load(small)
    _set_metadata(proto, {**described, **note})
    return proto.SerializeToString()


def _kept(nodes: Iterable[Any]) -> list[str]:
    """Names of the nodes that stay float32: by their kind, and all that scale pixels or logits."""
    return [node.name for node in nodes if node.op_type in _FLOAT or node.name.startswith(_PIECES)]


def to_batch(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 to the exported networks' input, (1, 3, H, W) float32."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)[None])).float()


def _metadata(model: bytes) -> dict[str, Any]:
    import onnx

    return {entry.key: json.loads(entry.value) for entry in onnx.load_from_string(model).metadata_props}


def _set_metadata(proto: Any, content: dict[str, Any]) -> None:
    """One entry a key, its value in JSON; what the exporter and the quantiser noted for themselves is dropped."""
    import onnx

    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {key: json.dumps(value, allow_nan=False) for key, value in content.items()})


# --- TorchScript


@contextlib.contextmanager
def _torchscript() -> Iterator[None]:
    """torch says that TorchScript is deprecated; whoever asks for it knows, and has a device that runs nothing else."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is (deprecated|not supported)", category)
        # Of group_norm's own check of its input; the sizes themselves are traced, which the comparison proves.
        warnings.filterwarnings("ignore", "Converting a tensor to a Python boolean", torch.jit.TracerWarning)  # pyright: ignore
        yield


def to_torchscript(student: Student) -> bytes:
    """A traced module; `describe` lies in the archive as extra/metadata.json (torch.jit.load's `_extra_files`)."""
    buffer = io.BytesIO()
    with _torchscript(), torch.no_grad():
        # Not compared with itself, as trace would on the traced size: the caller compares other sizes.
        traced = torch.jit.trace(DeployedStudent(student, pools=False), (torch.zeros(_EXAMPLE),), check_trace=False)
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
            raise _cannot_run("TorchScript", images_B3HW, error) from None

    return run


# --- segmentation-models-pytorch


def to_smp(student: Student, folder: Path) -> None:
    """A folder that `smp.from_pretrained` reads; normalisation, classes and palette stand beside it in mgd.json."""
    try:
        student.network.model.save_pretrained(folder)
    except SafetensorError as error:  # which has the number in its text alone
        if (found := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from None
    steps = f"RGB; (pixel - mean) / std with pixels in 0 to 255; sides padded with 0 to multiples of {MULTIPLE}"
    if student.long_side is not None:
        steps = (
            f"{steps}. Before that, scale an image whose longer side exceeds {student.long_side} pixels down to it (Pillow's "
            "Resampling.BILINEAR; the other side in proportion, rounded). After that, cut the logits to the scaled image and "
            "bring them to the size of the image (bilinear, half-pixel centres)"
        )
    note = {
        "input": steps,
        "mean": student.normalisation.mean,
        "std": student.normalisation.std,
        "classes": student.classes,
        "palette": student.palette,
        "long_side": student.long_side,
    }
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
