"""Fetches the published weights of a teacher that nobody needs to train, and writes all that building it takes into one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from mgd_pipeline.errors import ParamsError, WeightsError, shell_command
from mgd_pipeline.networks import reachable, resolve_encoder_weights
from mgd_pipeline.params import TeacherParams, TimmTeacher, TorchvisionTeacher, TransformersTeacher
from mgd_pipeline.teacher_networks import check_torchvision, import_transformers
from mgd_pipeline.weights import read_state_dict, save_weights


def fetch_teacher(name: str, params: TeacherParams, base: Path) -> None:
    """Writes `params.weights` from the published weights of a network that nobody needs to train.

    Raises WeightsError, within two seconds where a hub cannot be reached, that says which file goes where.
    """
    match params:
        case TorchvisionTeacher():
            _fetch_torchvision(name, params, base / params.weights)
        case TransformersTeacher():
            _fetch_transformers(params, base)
        case TimmTeacher():
            weights = resolve_encoder_weights(f"tu-{params.timm}", "imagenet")
            assert weights is not None
            save_weights(base / params.weights, read_state_dict(weights), {"kind": "timm", "timm": params.timm})
        case _:
            raise ParamsError(f"train_teachers: {name} is the group's own function; only it can make {params.weights}")


def _fetch_torchvision(name: str, params: TorchvisionTeacher, path: Path) -> None:
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


def _fetch_transformers(params: TransformersTeacher, base: Path) -> None:
    from huggingface_hub import constants, try_to_load_from_cache

    transformers = import_transformers()
    local = base / params.transformers
    source: Any = str(local) if local.is_dir() else params.transformers
    here = local.is_dir() or isinstance(try_to_load_from_cache(params.transformers, "config.json"), str)
    if not here and (constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT)):
        raise WeightsError(
            f"transformers: {params.transformers} is not on this machine and the hub cannot be reached. On a connected machine run "
            f"`{shell_command('hf', 'download', params.transformers, '--local-dir', 'FOLDER')}`, copy the folder here and write "
            "its path instead of the name"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        processor = transformers.AutoImageProcessor.from_pretrained(source)
        architecture = (config.architectures or ["unknown"])[0]
        if not architecture.endswith(("ForSemanticSegmentation", "ForUniversalSegmentation", "MaskFormerForInstanceSegmentation")):
            raise WeightsError(f"transformers: {params.transformers} is a {architecture}, not a network for semantic segmentation")
        model = getattr(transformers, architecture).from_pretrained(source)
    except (OSError, ValueError) as error:
        raise WeightsError(f"transformers: {params.transformers}: {' '.join(str(error).split())[:300]}") from None
    unit = 1.0 if not processor.do_rescale else 1 / processor.rescale_factor
    none = ([0.0] * 3, [1.0] * 3)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else none
    save_weights(
        base / params.weights,
        {key: value.contiguous().clone() for key, value in model.state_dict().items()},
        {
            "kind": "transformers",
            "architecture": architecture,
            "config": {key: value for key, value in config.to_dict().items() if key != "_name_or_path"},
            "classes": [config.id2label[i] for i in range(config.num_labels)],
            "normalisation": [[unit * value for value in mean], [unit * value for value in std]],
        },
    )
