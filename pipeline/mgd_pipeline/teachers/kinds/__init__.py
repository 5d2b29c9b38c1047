"""Teachers of every kind behind the one contract of `Teacher`. Modules build and fetch the published kinds.

| kind in params.yaml | network | logits | features |
|---|---|---|---|
| decoder, encoder | segmentation-models-pytorch | native | the decoder's output |
| torchvision | its segmentation networks | native | input of the last 1x1 convolution |
| transformers | its segmenters | native; with queries their sum | input of the last 1x1 convolution; pixel decoder's output |
| prompts, transformers | CLIPSeg, SAM 3 | log of the scores of phrases | none |
| timm | any backbone | none | the last feature map |
| import | the result of the group's function | | |

A finished teacher is one weights file. A file that `fetch_teacher` wrote holds everything that is needed to build the network,
so stage one needs no hub.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mgd_pipeline.errors import ParamsError
from mgd_pipeline.networks.encoders import normalisation, unrecorded_normalisation
from mgd_pipeline.networks.segmentation import load_network
from mgd_pipeline.networks.weights import read_metadata, read_state_dict
from mgd_pipeline.params import (
    FixedSizeTeacher,
    HeadTeacher,
    ImportedTeacher,
    PromptsTeacher,
    SmpTeacher,
    TeacherParams,
    TimmTeacher,
    TorchvisionTeacher,
    TransformersTeacher,
)
from mgd_pipeline.teachers.class_map import class_groups
from mgd_pipeline.teachers.kinds.prompts import prompts_teacher
from mgd_pipeline.teachers.kinds.shared import channels_of, noted_normalisation
from mgd_pipeline.teachers.kinds.timm import timm_teacher
from mgd_pipeline.teachers.kinds.torchvision import torchvision_teacher
from mgd_pipeline.teachers.kinds.transformers import transformers_teacher
from mgd_pipeline.teachers.probing import check_repeats, output_channels
from mgd_pipeline.teachers.teacher import Teacher


def build_teacher(name: str, params: TeacherParams, classes: Sequence[str], base: Path) -> Teacher:
    """A teacher of params.yaml in eval mode on the CPU, its weights loaded strictly, its outputs in the data set's classes.

    `base` is the project's folder. Raises WeightsError for weights that do not fit, ParamsError for a class_map that does not.
    """
    path = base / params.weights
    match params:
        case SmpTeacher():
            teacher = _smp_teacher(params, path)
        case TorchvisionTeacher():
            teacher = torchvision_teacher(params, path)
        case TransformersTeacher():
            teacher = transformers_teacher(name, params, path)
        case PromptsTeacher():
            teacher = prompts_teacher(name, params, path, classes)
        case TimmTeacher():
            teacher = timm_teacher(name, params, path)
        case HeadTeacher():
            raise ParamsError(f"teachers.{name}: is a head on the cached embeddings of {params.of}, and cannot see images")
        case _:
            teacher = _imported_teacher(name, params, path, classes, base)
    teacher.network.eval().requires_grad_(False)
    if isinstance(params, FixedSizeTeacher) and teacher.size is not None and params.fixed_size is not None:
        teacher = replace(teacher, fixed_size=params.fixed_size)
    count, _ = output_channels(name, teacher)
    check_repeats(name, teacher)
    if count == 0:
        return replace(teacher, short_side=params.short_side)
    own = isinstance(params, SmpTeacher)
    groups = class_groups(f"teachers.{name}", params.class_map, tuple(classes), teacher.labels, count, own=own)
    return replace(teacher, short_side=params.short_side, groups=groups)


def _smp_teacher(params: SmpTeacher, path: Path) -> Teacher:
    notes = read_metadata(path)
    labels = notes.get("classes")
    last = "segmentation_head.head.4.weight" if params.decoder == "dpt" else "segmentation_head.0.weight"
    count = len(labels) if labels else channels_of(read_state_dict(path), last, path)
    network = load_network(params, count, path)
    # Version 0.1.0 wrote notes without the input. A file without any notes is the group's own, trained as smp trains it.
    default = unrecorded_normalisation(params.encoder) if notes else normalisation(params.encoder)
    normalise = noted_normalisation(notes, default)
    labels = tuple(labels) if labels else None
    return Teacher(network, normalise, align_corners=True, multiple=network.multiple, labels=labels)


def _imported_teacher(name: str, params: ImportedTeacher, path: Path, classes: Sequence[str], base: Path) -> Teacher:
    """Raises ParamsError for a module or function that does not exist, and for a result that is no plain Teacher."""
    module, _, function = params.import_.partition(":")
    if str(base.resolve()) not in sys.path:  # a module beside params.yaml needs no installation
        sys.path.insert(0, str(base.resolve()))
    try:
        build = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the group's module exists, and another module that it imports does not
        raise ParamsError(f"teachers.{name}.import: no module {module!r}; install it, or put it beside params.yaml") from None
    if build is None:
        raise ParamsError(f"teachers.{name}.import: {module} has no {function!r}")
    teacher = build(weights=path, classes=tuple(classes), **params.options)
    if not isinstance(teacher, Teacher):
        kind = type(teacher).__name__
        raise ParamsError(f"teachers.{name}.import: {params.import_} returned {kind}, not mgd_pipeline.teachers.Teacher")
    # The provenance would not record them.
    if teacher.short_side is not None or teacher.groups is not None or teacher.fixed_size != Teacher.fixed_size:
        raise ParamsError(
            f"teachers.{name}.import: {params.import_} sets short_side, groups or fixed_size; write short_side, class_map or "
            "fixed_size here instead"
        )
    if params.fixed_size is not None and teacher.size is None:
        raise ParamsError(
            f"teachers.{name}.fixed_size: {params.fixed_size} is for networks of one input size, and {params.import_} names no "
            "size; leave it out, or return a Teacher with a size"
        )
    if (size := teacher.size) is None:
        return teacher
    if not (isinstance(size, (tuple, list)) and [type(side) for side in size] == [int, int] and min(size) > 0):
        raise ParamsError(
            f"teachers.{name}.import: {params.import_} returned a Teacher with the size {size!r}; return height and width in "
            "pixels, such as (512, 512)"
        )
    return replace(teacher, size=(size[0], size[1]))
