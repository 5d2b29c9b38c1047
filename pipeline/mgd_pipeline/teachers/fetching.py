"""Fetches the published weights of a teacher that nobody needs to train into one file that holds all that building it takes."""

from __future__ import annotations

from pathlib import Path

from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import PromptsTeacher, TeacherParams, TimmTeacher, TorchvisionTeacher, TransformersTeacher
from mgd_pipeline.teachers.kinds.prompts import check_prompted, fetch_prompts
from mgd_pipeline.teachers.kinds.timm import check_backbone, fetch_timm
from mgd_pipeline.teachers.kinds.torchvision import fetch_torchvision
from mgd_pipeline.teachers.kinds.transformers import check_transformers, fetch_transformers
from mgd_pipeline.teachers.probing import Sizes, no_sizes


def fetch_teacher(name: str, params: TeacherParams, base: Path, sizes: Sizes = no_sizes) -> None:
    """Writes `params.weights` from published weights.

    Raises WeightsError for a network that does not take inputs of `sizes`, before its weights are fetched. If a hub cannot be
    reached, a WeightsError says within two seconds which file goes where.
    """
    match params:
        case TorchvisionTeacher():
            fetch_torchvision(name, params, base / params.weights)
        case TransformersTeacher():
            fetch_transformers(name, params, base, sizes)
        case PromptsTeacher():
            fetch_prompts(name, params, base)
        case TimmTeacher():
            fetch_timm(name, params, base / params.weights, sizes)
        case _:
            raise ParamsError(f"train_teachers: {name} is the group's own function; only it can make {params.weights}")


def check_published(name: str, params: TeacherParams, base: Path, sizes: Sizes = no_sizes) -> None:
    """Raises what `fetch_teacher` would raise of a network of timm, and of one of transformers whose configuration is in a folder
    or in the hub's cache. Nothing is fetched or written."""
    if isinstance(params, TimmTeacher):
        check_backbone(name, params, sizes)
    elif isinstance(params, TransformersTeacher):
        check_transformers(name, params, base, sizes)
    elif isinstance(params, PromptsTeacher):
        check_prompted(params, base)
