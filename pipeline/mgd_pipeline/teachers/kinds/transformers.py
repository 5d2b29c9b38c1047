"""Teachers of transformers: its segmenters, and their published weights. Letters: B batch, L classes, H W pixels, Q queries."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mgd_pipeline.errors import MGDError, WeightsError, shell_command
from mgd_pipeline.networks.encoders import reachable
from mgd_pipeline.networks.inference import to_input
from mgd_pipeline.networks.normalisation import IMAGENET, Normalisation
from mgd_pipeline.networks.segmentation import MULTIPLE
from mgd_pipeline.networks.weights import fitting_state, read_metadata, read_state_dict, save_weights
from mgd_pipeline.params import TransformersTeacher
from mgd_pipeline.teachers.kinds.shared import BeforeClassifier, noted_normalisation
from mgd_pipeline.teachers.probing import Sizes, check_sees
from mgd_pipeline.teachers.teacher import Teacher, TeacherOutputs


def transformers_teacher(params: TransformersTeacher, path: Path) -> Teacher:
    transformers = import_transformers()
    state, notes = read_state_dict(path), read_metadata(path)
    if notes.get("kind") != "transformers":
        raise WeightsError(
            f"{path}: holds no network's configuration; `mgd-pipeline train-teacher` makes such a file of {params.transformers}"
        )
    if "channels" not in notes and notes["architecture"].startswith("MobileViT"):
        raise WeightsError(
            f"{path}: does not say in which order the network takes red and blue, and {notes['architecture']} takes blue first; "
            "version 0.1.0 made the file: fetch it again by `mgd-pipeline train-teacher`"
        )
    config = transformers.AutoConfig.for_model(**notes["config"])
    model = getattr(transformers, notes["architecture"])(config)
    model.load_state_dict(fitting_state(model.state_dict(), state, path, notes["architecture"]))
    network, labels = _segmenter(model, len(notes["classes"])), tuple(notes["classes"])
    return Teacher(network, noted_normalisation(notes, IMAGENET), align_corners=False, labels=labels)


def _segmenter(model: nn.Module, count: int) -> nn.Module:
    """A model of transformers behind the contract; WeightsError if it has neither queries nor a classifier."""
    if hasattr(model, "class_predictor"):
        return _Queries(model)
    convolutions = [module for key, module in model.named_modules() if isinstance(module, nn.Conv2d) and "auxiliary" not in key]
    classifiers = [module for module in convolutions if module.out_channels == count and module.kernel_size == (1, 1)]
    if not classifiers:
        raise WeightsError(f"{type(model).__name__}: has no 1x1 convolution to {count} classes; wrap it by a function (import:)")
    return BeforeClassifier(model, lambda model, images: model(pixel_values=images).logits, classifiers[-1])


class _Queries(nn.Module):
    """MaskFormer and its kin: a pixel's score for a class is the sum over queries of P(class | query) * P(pixel | query)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_B3HW: Tensor) -> TeacherOutputs:
        outputs: Any = self.model(pixel_values=images_B3HW)
        classes = outputs.class_queries_logits.float().softmax(-1)[..., :-1]  # without "no object"
        masks = outputs.masks_queries_logits.float().sigmoid()
        scores = torch.einsum("bql,bqhw->blhw", classes, masks)
        # Scores do not sum to 1; their logarithm is a logit, up to a constant for each pixel. 1e-4 bounds it from below.
        return TeacherOutputs(scores.clamp(min=1e-4).log(), getattr(outputs, "pixel_decoder_last_hidden_state", None))


def import_transformers() -> Any:
    """The library, which is an extra; MGDError that names what installs it."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise MGDError("transformers is not installed; run `pip install 'mgd-pipeline[hub]'`") from None
    return transformers


def fetch_transformers(name: str, params: TransformersTeacher, base: Path, sizes: Sizes) -> None:
    """Writes `params.weights`: weights, configuration and input of a published network. Raises WeightsError."""
    transformers = import_transformers()
    source = published_source(params.transformers, base)
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        processor = transformers.AutoImageProcessor.from_pretrained(source)
        architecture = _check_architecture(name, params, config, sizes)
        normalisation = normalisation_of(params.transformers, processor)
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


def check_transformers(name: str, params: TransformersTeacher, base: Path, sizes: Sizes) -> None:
    """Raises what `fetch_transformers` would raise of a network whose configuration is on this machine; fetches nothing."""
    if (config := configuration_here(params.transformers, base)) is not None:
        _check_architecture(name, params, config, sizes)


def published_source(published: str, base: Path) -> str:
    """Where transformers finds a published network: a folder, or its name. WeightsError if it can only come from a hub that cannot
    be reached."""
    from huggingface_hub import constants

    source = _on_this_machine(published, base)
    if source is None and (constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT)):
        raise WeightsError(
            f"transformers: {published} is not on this machine and the hub cannot be reached. On a connected machine run "
            f"`{shell_command('hf', 'download', published, '--local-dir', 'FOLDER')}`, copy the folder here and write "
            "its path instead of the name"
        )
    return source or published


def configuration_here(published: str, base: Path) -> Any:
    """The configuration of a published network, None if it is not on this machine. Fetches nothing; raises WeightsError."""
    if (source := _on_this_machine(published, base)) is None:
        return None
    try:
        return import_transformers().AutoConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"transformers: {published}: {' '.join(str(error).split())[:300]}") from None


def _on_this_machine(published: str, base: Path) -> str | None:
    """The source for transformers: a folder, or a name that the hub's cache has; None if the network is not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    if (base / published).is_dir():
        return str(base / published)
    return published if isinstance(try_to_load_from_cache(published, "config.json"), str) else None


def _check_architecture(name: str, params: TransformersTeacher, config: Any, sizes: Sizes) -> str:
    """The class of a network that segments and takes inputs of `sizes`; WeightsError otherwise, before weights are fetched."""
    architecture = (config.architectures or ["unknown"])[0]
    if not architecture.endswith(("ForSemanticSegmentation", "ForUniversalSegmentation", "MaskFormerForInstanceSegmentation")):
        hint = "; it takes phrases: add prompts" if config.model_type in ("clipseg", "sam3", "sam3_video") else ""
        raise WeightsError(
            f"transformers: {params.transformers} is a {architecture}, not a network for semantic segmentation{hint}"
        )
    built = getattr(import_transformers(), architecture, None)
    if built is None:
        raise WeightsError(f"transformers: {params.transformers} is a {architecture}, which the installed version does not have")
    check_sees(name, lambda: _segmenter(built(copy.deepcopy(config)), config.num_labels), MULTIPLE, sizes(MULTIPLE))
    return architecture


def normalisation_of(source: str, processor: Any) -> Normalisation:
    """What a processor of transformers does to the colours of an image, tried on one; WeightsError if it does anything else.

    Resizing, cropping and padding are left out: here a teacher sees whole images at their working size or its short_side.
    """
    processor = copy.deepcopy(processor)
    for step in ("do_resize", "do_center_crop", "do_pad", "do_split_image"):
        setattr(processor, step, False)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    given = torch.as_tensor(processor(images=[image], return_tensors="pt")["pixel_values"])
    for normalised in (True, False):  # some have fields that they do not use
        for channels in ("RGB", "BGR"):
            tried = _by_fields(processor, normalised)._replace(channels=channels)
            ours = to_input(image, tried, torch.device("cpu"))
            if given.shape == ours.shape and torch.allclose(given.float(), ours, rtol=1e-4, atol=1e-4 * float(ours.std())):
                return tried
    raise WeightsError(
        f"transformers: {source}: its {type(processor).__name__} does more to the colours of an image than mgd-pipeline can do; "
        "wrap the network by a function that does the same (import: in params.yaml)"
    )


def _by_fields(processor: Any, normalised: bool) -> Normalisation:
    unit = 1 / processor.rescale_factor if getattr(processor, "do_rescale", False) else 1.0
    none = ([0.0] * 3, [1.0] * 3)
    used = normalised and getattr(processor, "do_normalize", False)
    mean, std = (np.broadcast_to(values, 3) for values in ((processor.image_mean, processor.image_std) if used else none))
    return Normalisation(tuple((unit * mean).tolist()), tuple((unit * std).tolist()))
