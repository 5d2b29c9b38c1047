"""Teachers of every kind behind the one contract of `Teacher`. Each module builds one kind, and fetches it where it is published.

| kind in params.yaml | network | logits | features |
|---|---|---|---|
| decoder, encoder | segmentation-models-pytorch | native | the decoder's output |
| torchvision | its segmentation networks | native | input of the last 1x1 convolution |
| transformers | its segmenters | native; with queries their sum | input of the last 1x1 convolution; pixel decoder's output |
| timm | any backbone | none | the last feature map |
| import | the result of the group's function | | |

A finished teacher is one weights file. A file that `fetch_teacher` wrote holds everything that is needed to build the network,
so stage one needs no hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mgd_pipeline.params import SmpTeacher, TeacherParams, TimmTeacher, TorchvisionTeacher, TransformersTeacher
from mgd_pipeline.teachers.class_map import class_groups
from mgd_pipeline.teachers.kinds.imported import imported_teacher
from mgd_pipeline.teachers.kinds.smp import smp_teacher
from mgd_pipeline.teachers.kinds.timm import timm_teacher
from mgd_pipeline.teachers.kinds.torchvision import torchvision_teacher
from mgd_pipeline.teachers.kinds.transformers import transformers_teacher
from mgd_pipeline.teachers.probing import output_channels
from mgd_pipeline.teachers.teacher import Teacher


def build_teacher(name: str, params: TeacherParams, classes: Sequence[str], base: Path) -> Teacher:
    """A teacher of params.yaml in eval mode on the CPU, its weights loaded strictly, its outputs in the data set's classes.

    `base` is the project's folder. Raises WeightsError for weights that do not fit, ParamsError for a class_map that does not.
    """
    path = base / params.weights
    match params:
        case SmpTeacher():
            teacher = smp_teacher(params, path)
        case TorchvisionTeacher():
            teacher = torchvision_teacher(params, path)
        case TransformersTeacher():
            teacher = transformers_teacher(params, path)
        case TimmTeacher():
            teacher = timm_teacher(params, path)
        case _:
            teacher = imported_teacher(name, params, path, classes, base)
    teacher.network.eval().requires_grad_(False)
    count, _ = output_channels(name, teacher)
    if count == 0:
        return replace(teacher, short_side=params.short_side)
    groups = class_groups(f"teachers.{name}", params.class_map, tuple(classes), teacher.labels, count)
    return replace(teacher, short_side=params.short_side, groups=groups)
