"""Fetches the published weights of a teacher that nobody needs to train, and writes all that building it takes into one file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch

from mgd_pipeline.errors import MGDError, ParamsError, WeightsError, shell_command
from mgd_pipeline.networks.inference import to_input
from mgd_pipeline.networks.segmentation import MULTIPLE, Normalisation, reachable, resolve_encoder_weights
from mgd_pipeline.networks.weights import read_state_dict, save_weights
from mgd_pipeline.params import TeacherParams, TimmTeacher, TorchvisionTeacher, TransformersTeacher
from mgd_pipeline.teachers.kinds import check_backbone, check_sees, check_torchvision, import_transformers, segmenter

Sizes = Callable[[int], Sequence[tuple[int, int]]]
"""Height and width of inputs that a network will be given, if their sides must be multiples of so many pixels."""


def no_sizes(multiple: int) -> Sequence[tuple[int, int]]:
    """For whom does not know the images yet."""
    return []


def fetch_teacher(name: str, params: TeacherParams, base: Path, sizes: Sizes = no_sizes) -> None:
    """Writes `params.weights` from the published weights of a network that nobody needs to train.

    Raises WeightsError for one that does not take inputs of `sizes`, before its weights are fetched; and, within two seconds where
    a hub cannot be reached, that says which file goes where.
    """
    match params:
        case TorchvisionTeacher():
            _fetch_torchvision(name, params, base / params.weights)
        case TransformersTeacher():
            _fetch_transformers(name, params, base, sizes)
        case TimmTeacher():
            check_backbone(name, params, sizes)
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


def _fetch_transformers(name: str, params: TransformersTeacher, base: Path, sizes: Sizes) -> None:
    from huggingface_hub import constants

    transformers = import_transformers()
    source = _here(params, base)
    if source is None and (constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT)):
        raise WeightsError(
            f"transformers: {params.transformers} is not on this machine and the hub cannot be reached. On a connected machine run "
            f"`{shell_command('hf', 'download', params.transformers, '--local-dir', 'FOLDER')}`, copy the folder here and write "
            "its path instead of the name"
        )
    source = source or params.transformers
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        processor = transformers.AutoImageProcessor.from_pretrained(source)
        architecture = _check_architecture(name, params, config, sizes)
        normalisation = _normalisation(params.transformers, processor)
        model = getattr(transformers, architecture).from_pretrained(source)
    except (OSError, ValueError) as error:
        if isinstance(error, MGDError):
            raise
        raise WeightsError(f"transformers: {params.transformers}: {' '.join(str(error).split())[:300]}") from None
    save_weights(
        base / params.weights,
        {key: value.contiguous().clone() for key, value in model.state_dict().items()},
        {
            "kind": "transformers",
            "architecture": architecture,
            "config": {key: value for key, value in config.to_dict().items() if key != "_name_or_path"},
            "classes": [config.id2label[i] for i in range(config.num_labels)],
            "normalisation": [list(normalisation.mean), list(normalisation.std)],
            "channels": normalisation.channels,
        },
    )


def check_published(name: str, params: TeacherParams, base: Path, sizes: Sizes = no_sizes) -> None:
    """Raises what `fetch_teacher` would raise of a network whose configuration is on this machine: of timm's, and of those of
    transformers in a folder or in the hub's cache. Nothing is fetched or written."""
    if isinstance(params, TimmTeacher):
        check_backbone(name, params, sizes)
    elif isinstance(params, TransformersTeacher) and (source := _here(params, base)) is not None:
        try:
            config = import_transformers().AutoConfig.from_pretrained(source, local_files_only=True)
        except (OSError, ValueError) as error:
            raise WeightsError(f"transformers: {params.transformers}: {' '.join(str(error).split())[:300]}") from None
        _check_architecture(name, params, config, sizes)


def _here(params: TransformersTeacher, base: Path) -> str | None:
    """What transformers is asked for where the network is on this machine: a folder, or a name that the hub's cache has."""
    from huggingface_hub import try_to_load_from_cache

    if (base / params.transformers).is_dir():
        return str(base / params.transformers)
    return params.transformers if isinstance(try_to_load_from_cache(params.transformers, "config.json"), str) else None


def _check_architecture(name: str, params: TransformersTeacher, config: Any, sizes: Sizes) -> str:
    """The class of a network that segments and takes inputs of such sizes; WeightsError for others, before weights are fetched."""
    architecture = (config.architectures or ["unknown"])[0]
    if not architecture.endswith(("ForSemanticSegmentation", "ForUniversalSegmentation", "MaskFormerForInstanceSegmentation")):
        raise WeightsError(f"transformers: {params.transformers} is a {architecture}, not a network for semantic segmentation")
    built = getattr(import_transformers(), architecture, None)
    if built is None:
        raise WeightsError(f"transformers: {params.transformers} is a {architecture}, which the installed version does not have")
    check_sees(name, lambda: segmenter(built(copy.deepcopy(config)), config.num_labels), MULTIPLE, sizes(MULTIPLE))
    return architecture


def _normalisation(source: str, processor: Any) -> Normalisation:
    """What a processor of transformers does to the colours of an image, tried on one; WeightsError where it does more than that.

    Resizing, cropping and padding are left out: here a teacher sees whole images at their working size or its short_side.
    """
    processor = copy.deepcopy(processor)
    for step in ("do_resize", "do_center_crop", "do_pad", "do_split_image"):
        setattr(processor, step, False)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    given = torch.as_tensor(processor(images=[image], return_tensors="pt")["pixel_values"])
    for normalised in (True, False):  # some have fields that they do not use
        for channels in ("RGB", "BGR"):
            found = _by_fields(processor, normalised)._replace(channels=channels)
            seen = to_input(image, found, torch.device("cpu"))
            if given.shape == seen.shape and torch.allclose(given.float(), seen, rtol=1e-4, atol=1e-4 * float(seen.std())):
                return found
    raise WeightsError(
        f"transformers: {source}: its {type(processor).__name__} does more to the colours of an image than mgd-pipeline can do; "
        "wrap the network by a function that does the same (import: in params.yaml)"
    )


def _by_fields(processor: Any, normalised: bool) -> Normalisation:
    unit = 1 / processor.rescale_factor if getattr(processor, "do_rescale", False) else 1.0
    none = ([0.0] * 3, [1.0] * 3)
    used = normalised and getattr(processor, "do_normalize", False)
    mean, std = (np.broadcast_to(values, 3) for values in ((processor.image_mean, processor.image_std) if used else none))
    return Normalisation(_three(unit * mean), _three(unit * std))


def _three(values: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
