"""Teachers of torchvision: its segmentation networks, and their published weights."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import nn

from mgd_pipeline.errors import ParamsError, WeightsError
from mgd_pipeline.networks.encoders import reachable
from mgd_pipeline.networks.normalisation import IMAGENET
from mgd_pipeline.networks.weights import fitting_state, read_metadata, read_state_dict, save_weights
from mgd_pipeline.params import TorchvisionTeacher
from mgd_pipeline.teachers.class_map import nearest
from mgd_pipeline.teachers.kinds.shared import BeforeClassifier, channels_of, noted_normalisation
from mgd_pipeline.teachers.teacher import Teacher


def torchvision_teacher(params: TorchvisionTeacher, path: Path) -> Teacher:
    from torchvision.models import get_model

    check_torchvision(params.torchvision)
    state, notes = read_state_dict(path), read_metadata(path)
    last = "classifier.low_classifier.weight" if params.torchvision.startswith("lraspp") else "classifier.4.weight"
    count = channels_of(state, last, path)
    model = get_model(params.torchvision, weights=None, weights_backbone=None, num_classes=count)
    # The auxiliary classifier only helps while training. A wrapper's prefix may stand before its name.
    start = "aux_classifier."
    auxiliary = {start + name.rpartition(start)[2] for name in state if start in name}
    model.load_state_dict(fitting_state(model.state_dict(), state, path, params.torchvision, unused=auxiliary))
    return Teacher(
        BeforeClassifier(model, lambda model, images: model(images)["out"], _classifier(model, last)),
        noted_normalisation(notes, IMAGENET),
        align_corners=False,
        labels=tuple(notes["classes"]) if "classes" in notes else None,
    )


def _classifier(model: nn.Module, weight: str) -> nn.Module:
    """The layer whose input is the features. LR-ASPP adds the scores of two branches, so neither classifier is the last step; its
    features are the output of the context branch."""
    return model.get_submodule("classifier.cbr" if "low_classifier" in weight else weight.removesuffix(".weight"))


def check_torchvision(name: str) -> None:
    """Raises ParamsError for a name that is no segmentation network of torchvision's."""
    from torchvision.models import list_models, segmentation

    if name not in (names := list_models(module=segmentation)):
        raise ParamsError(f"torchvision: {name!r} is no segmentation network of it; {nearest(name, names)}")


def fetch_torchvision(name: str, params: TorchvisionTeacher, path: Path) -> None:
    """Writes `path` from published weights. Raises ParamsError for unknown ones, WeightsError if they cannot be fetched."""
    from torchvision.models import get_model_weights

    check_torchvision(params.torchvision)
    published = {member.name: member for member in get_model_weights(params.torchvision)}
    if params.pretrained not in published:
        raise ParamsError(
            f"teachers.{name}.pretrained: {params.pretrained!r} are no published weights of {params.torchvision}; "
            f"there are {', '.join(published)}"
        )
    weights = published[params.pretrained]
    place = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
    if not place.is_file() and not reachable(weights.url):
        raise WeightsError(
            f"teachers.{name}: {params.pretrained} of {params.torchvision} are not on this machine and cannot be fetched. On a "
            f"connected machine download {weights.url}, and put the file here as {place}"
        )
    state = weights.get_state_dict(progress=True, check_hash=True)
    shown = weights.transforms()
    save_weights(
        path,
        {key: value for key, value in state.items() if not key.startswith("aux_classifier.")},
        {
            "kind": "torchvision",
            "classes": list(weights.meta["categories"]),
            "normalisation": [[255 * value for value in shown.mean], [255 * value for value in shown.std]],
        },
    )
