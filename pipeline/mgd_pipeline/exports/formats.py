"""The formats of exported students: what a file is called, what it needs, and the functions that write and run it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from mgd_pipeline.errors import ParamsError
from mgd_pipeline.exports import coreml, executorch, litert, onnx, openvino, smp, torch_export
from mgd_pipeline.exports.deployed import Calibration, Run, Size, notes_beside, quiet, unreported
from mgd_pipeline.students.student import Student

TOLERANCE = 1e-4
"""In float32 another order of sums gives a tenth of it."""
SAME_MASK = 0.999


@dataclass(frozen=True)
class Format:
    """A format: one function writes its files, another runs them."""

    name: str
    """of --format"""
    suffix: str
    """of the file or package, in lower case; empty for a folder of any name"""
    write: Callable[[Student, Path, Size | None], None]
    """student, path, size: writes a new file; raises WeightsError for a network that cannot be converted"""
    load: Callable[[Path], Run]
    """loads a file in its own runtime on this machine's CPU, with as many threads as torch has where the runtime lets choose"""
    extra: str | None = None
    """of mgd-pipeline; None if it needs nothing else"""
    modules: tuple[str, ...] = ()
    """that the extra installs and that are imported"""
    fixed: bool = False
    """whether a file takes one image of one size; else any batch and size, unless a size is given"""
    quantise: Callable[[Student, Path, Path, Size | None, Calibration], None] | None = None
    """student, the float32 file, path, size, photos: writes a new file in int8; None where there is no --int8"""
    quantiser: str = ""
    """the library that quantises, which the extra installs and that is imported"""
    beside: tuple[str, ...] = ()
    """further files, by their suffixes: `.bin` replaces the suffix, `+.json` is appended to the name"""
    tolerance: float = TOLERANCE
    """largest difference from the student's logits as a share of the largest logit"""
    same_mask: float = SAME_MASK
    """least share of each photo's pixels with the class that `predict` gives them"""
    lower_case: bool = False
    """whether the runtime opens only names whose suffix is in lower case"""
    read_notes: Callable[[Path], dict[str, Any]] = notes_beside
    """`describe` of a file, by default from the file beside it; empty where there is none"""

    @property
    def folder(self) -> bool:
        return self.suffix in ("", ".mlpackage")

    def files_beside(self, path: Path) -> list[Path]:
        """What lies beside a file of this format and belongs to it."""
        return [Path(f"{path}{end[1:]}") if end[0] == "+" else path.with_suffix(end) for end in self.beside]


FORMATS = {
    one.name: one
    for one in (
        Format(
            *("onnx", ".onnx", onnx.write, onnx.load, "onnx", ("onnx", "onnxscript", "onnxruntime")),
            quantise=onnx.quantise,
            quantiser="onnxruntime",
            read_notes=onnx.read_notes,
        ),
        Format(
            "executorch",
            ".pte",
            executorch.write,
            executorch.load,
            "executorch",
            ("executorch.exir", "executorch.runtime"),
            fixed=True,
            quantise=executorch.quantise,
            quantiser="torchao",
            beside=("+.json",),
        ),
        Format(
            *("openvino", ".xml", openvino.write, openvino.load, "openvino", ("openvino", "onnx", "onnxscript")),
            quantise=openvino.quantise,
            quantiser="nncf",
            beside=(".bin",),
            lower_case=True,
            read_notes=openvino.read_notes,
        ),
        Format(
            "coreml",
            ".mlpackage",
            coreml.write,
            coreml.load,
            "coreml",
            ("coremltools",),
            fixed=True,
            tolerance=2e-2,  # float16 has 11 bits
            same_mask=0.99,
            lower_case=True,
            read_notes=coreml.read_notes,
        ),
        Format(
            "litert",
            ".tflite",
            litert.write,
            litert.load,
            "litert",
            ("litert_torch", "ai_edge_litert.interpreter"),
            fixed=True,
            beside=("+.json",),
        ),
        Format("torch-export", ".pt2", torch_export.write, torch_export.load, lower_case=True, read_notes=torch_export.read_notes),
        Format("smp", "", smp.write, smp.load, read_notes=smp.read_notes),
    )
}
"""By the names of --format."""


def format_of(path: Path, name: str | None) -> Format:
    """The format that the suffix of `path`, in any case, or the name tells. Raises ParamsError where they tell none, or different
    ones, and for a suffix in upper case with which the format's runtime opens no file."""
    told = next((one for one in FORMATS.values() if one.suffix and one.suffix == path.suffix.lower()), None)
    if name is None:
        if told is None:
            suffixes = ", ".join(one.suffix for one in FORMATS.values() if one.suffix)
            retired = "TorchScript is retired, and .pt2 takes its place; " if path.suffix.lower() == ".pt" else ""
            raise ParamsError(f"{path}: its suffix tells no format; {retired}write {suffixes}, or --format smp or web for a folder")
        return _opened(told, path)
    chosen = FORMATS[name]
    if chosen.suffix and chosen is not told:
        raise ParamsError(f"{path}: a file of --format {name} ends in {chosen.suffix}")
    if not chosen.suffix and told is not None:
        raise ParamsError(
            f"{path}: ends in {path.suffix}, the suffix of {told.name}; --format {name} writes a folder, so name a folder"
        )
    return _opened(chosen, path)


def _opened(one: Format, path: Path) -> Format:
    if one.lower_case and path.suffix != one.suffix:
        raise ParamsError(
            f"{path}: files of --format {one.name} open only with the suffix in lower case; "
            f"name it {path.with_suffix(one.suffix).name}"
        )
    return one


def require(one: Format, *, int8: bool = False) -> None:
    """Imports what a format needs. Raises ParamsError if it is missing, or does not fit the installed torch."""
    remedy = f"pip install 'mgd-pipeline[{one.extra}]'"
    modules = list(dict.fromkeys((*one.modules, one.quantiser) if int8 else one.modules))
    packages = [name.partition(".")[0] for name in modules]
    if missing := [name for name in dict.fromkeys(packages) if find_spec(name) is None]:
        raise ParamsError(f"{', '.join(missing)}: not installed, and needed for --format {one.name}; {remedy}")
    for name, package in zip(modules, packages, strict=True):
        if wanted := _other_torch(package.replace("_", "-")):
            raise ParamsError(f"{wanted}, and torch {torch.__version__} is installed; {remedy} in an environment of its own")
        try:
            with quiet(), unreported():
                importlib.import_module(name)
        except (ImportError, OSError, AttributeError, RuntimeError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ParamsError(
                f"{name}: cannot be imported beside torch {torch.__version__} ({reason.strip()[:200]}); {remedy} --upgrade"
            ) from error


def _other_torch(package: str) -> str | None:
    """Which torch an installed package asks for, if the installed one is another."""
    try:
        requirements = [Requirement(line) for line in requires(package) or []]
    except PackageNotFoundError:
        return None
    for one in requirements:
        if one.name == "torch" and one.marker is None and not one.specifier.contains(torch.__version__, prereleases=True):
            return f"{package} {version(package)}: needs torch {one.specifier}"
    return None
