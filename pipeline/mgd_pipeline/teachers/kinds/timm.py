"""Teachers of timm: backbones without classes, whose last feature map is stored. Letters: B batch, H W pixels."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from torch import Tensor, nn

from mgd_pipeline.errors import ParamsError
from mgd_pipeline.networks.encoders import any_size, resolve_encoder_weights, timm_normalisation
from mgd_pipeline.networks.segmentation import MULTIPLE
from mgd_pipeline.networks.weights import fitting_state, read_state_dict, save_weights
from mgd_pipeline.params import TimmTeacher
from mgd_pipeline.teachers.probing import Sizes, check_size, fault_of, only_size
from mgd_pipeline.teachers.teacher import Teacher, TeacherOutputs


def timm_teacher(name: str, params: TimmTeacher, path: Path) -> Teacher:
    model = _backbone(params.timm)
    wanted = model.state_dict()
    with torch.device("meta"):
        head = set(timm.create_model(params.timm, pretrained=False).state_dict()) - set(wanted)
    model.load_state_dict(fitting_state(wanted, read_state_dict(path), path, params.timm, unused=head))
    network, multiple = _LastFeatures(model).eval(), _multiple(model)
    size = only_size(name, partial(fault_of, network), multiple, _published_size(model), params.fixed_size)
    return Teacher(network, timm_normalisation(params.timm), align_corners=False, multiple=multiple, size=size)


def check_backbone(name: str, params: TimmTeacher, sizes: Sizes) -> None:
    """Raises WeightsError for a timm model that cannot give features of inputs of `sizes`, ParamsError for an unknown model.
    No weights are read, and nothing is fetched."""
    with torch.device("meta"):
        model = _backbone(params.timm)
    check_size(
        name, lambda: _LastFeatures(_backbone(params.timm)), _multiple(model), _published_size(model), params.fixed_size, sizes
    )


def fetch_timm(name: str, params: TimmTeacher, path: Path, sizes: Sizes) -> None:
    """Writes `path` from the published weights; raises what `check_backbone` and `resolve_encoder_weights` raise."""
    check_backbone(name, params, sizes)
    weights = resolve_encoder_weights(f"tu-{params.timm}", "imagenet")
    assert weights is not None
    save_weights(path, read_state_dict(weights), {"kind": "timm", "timm": params.timm})


class _LastFeatures(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images_B3HW: Tensor) -> TeacherOutputs:
        normed = not isinstance(self.model, (Hiera, HieraDet))  # which have no norm before their head
        maps = self.model.forward_intermediates(images_B3HW, indices=1, norm=normed, output_fmt="NCHW", intermediates_only=True)
        return TeacherOutputs(None, maps[-1])


def _multiple(model: Any) -> int:
    """The sides of the input must be multiples of this many pixels: the patch of a ViT, or the pixels of a cell of the last map
    where a network has patches (Swin) or none and merges them further."""
    patches, info = getattr(model, "patch_embed", None), model.feature_info
    if isinstance(patches, nn.ModuleList):  # CrossViT, which resizes its input itself; its reductions are rounded
        return MULTIPLE
    patch = getattr(patches, "patch_size", None)
    multiple = MULTIPLE if patch is None else patch if isinstance(patch, int) else max(patch)
    cell = info[-1]["reduction"] if isinstance(info, list) else info.reduction()[-1]
    return multiple if multiple % cell == 0 else cell


def _published_size(model: Any) -> tuple[int, int]:
    _, height, width = model.pretrained_cfg["input_size"]
    return height, width


def _backbone(name: str) -> nn.Module:
    if not timm.is_model(name.partition(".")[0]):
        raise ParamsError(f"timm: {name!r} is no model of it; `timm.list_models()` has their names")
    return timm.create_model(name, pretrained=False, num_classes=0, **any_size(name))
