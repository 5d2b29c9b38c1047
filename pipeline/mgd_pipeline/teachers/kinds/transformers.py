"""Teachers of transformers: its segmenters, and their published weights. Letters: B batch, L classes, H W pixels, Q queries."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mgd_pipeline.errors import MGDError, WeightsError, shell_command
from mgd_pipeline.networks.encoders import reachable
from mgd_pipeline.networks.inference import to_input
from mgd_pipeline.networks.normalisation import IMAGENET, Normalisation
from mgd_pipeline.networks.segmentation import MULTIPLE, find_fault
from mgd_pipeline.networks.weights import fitting_state, read_metadata, read_state_dict, save_weights
from mgd_pipeline.params import TransformersTeacher
from mgd_pipeline.teachers.class_map import some
from mgd_pipeline.teachers.kinds.shared import BeforeClassifier, noted_normalisation
from mgd_pipeline.teachers.probing import Sizes, check_size, fault_of, only_size, small_input
from mgd_pipeline.teachers.teacher import Teacher, TeacherOutputs
from mgd_pipeline.words import counted


def transformers_teacher(name: str, params: TransformersTeacher, path: Path) -> Teacher:
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
    _check_masks(model, path)
    network = _segmenter(model, len(notes["classes"]), notes.get("task")).eval()
    multiple = _multiple(config)
    published = _input_size(config, notes.get("size"))
    size = only_size(name, partial(fault_of, network), multiple, published, params.fixed_size)
    normalisation, labels = noted_normalisation(notes, IMAGENET), tuple(notes["classes"])
    return Teacher(network, normalisation, align_corners=False, multiple=multiple, labels=labels, size=size)


def _check_masks(model: Any, source: object) -> None:
    """Raises WeightsError for an EoMT whose training was not finished: its masks fade from 1 to 0, and are drawn in between."""
    probabilities = getattr(model, "attn_mask_probs", None)
    if probabilities is not None and ((probabilities > 0) & (probabilities < 1)).any():
        shown = ", ".join(f"{value:g}" for value in probabilities.tolist())
        raise WeightsError(
            f"{source}: its attn_mask_probs are {shown}; between 0 and 1 the network draws random numbers for each image: take the "
            "weights of its finished training, in which they are 0"
        )


def _segmenter(model: Any, count: int, task: list[int] | None = None) -> nn.Module:
    """A model of transformers behind the contract; WeightsError if it has neither queries nor a classifier.

    `task`: tokens of the sentence that says what OneFormer shall do.
    """
    if hasattr(model, "class_predictor") or hasattr(model.config, "task_seq_len"):
        return _Queries(model, task)
    convolutions = [module for key, module in model.named_modules() if isinstance(module, nn.Conv2d) and "auxiliary" not in key]
    classifiers = [module for module in convolutions if module.out_channels == count and module.kernel_size == (1, 1)]
    if not classifiers:
        raise WeightsError(f"{type(model).__name__}: has no 1x1 convolution to {count} classes; wrap it by a function (import:)")
    return BeforeClassifier(model, lambda model, images: model(pixel_values=images).logits, classifiers[-1])


class _Queries(nn.Module):
    """MaskFormer and its kin: a pixel's score for a class is the sum over queries of P(class | query) * P(pixel | query)."""

    task_1T: Tensor | None

    def __init__(self, model: nn.Module, task: list[int] | None = None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("task_1T", None if task is None else torch.tensor([task]), persistent=False)

    def forward(self, images_B3HW: Tensor) -> TeacherOutputs:
        task: dict[str, Any] = {}
        if self.task_1T is not None:
            task = {"task_inputs": self.task_1T.expand(len(images_B3HW), -1), "output_hidden_states": True}
        outputs: Any = self.model(pixel_values=images_B3HW, **task)
        features = getattr(outputs, "pixel_decoder_last_hidden_state", None)
        if task:
            features = outputs.pixel_decoder_hidden_states[0]
        classes = outputs.class_queries_logits.float().softmax(-1)[..., :-1]  # without "no object"
        masks = outputs.masks_queries_logits.float().sigmoid()
        scores = torch.einsum("bql,bqhw->blhw", classes, masks)
        # Scores do not sum to 1; their logarithm is a logit, up to a constant for each pixel. 1e-4 bounds it from below.
        return TeacherOutputs(scores.clamp(min=1e-4).log(), features)


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
        config = _configuration(source)
        processor = _processor(source, config)
        architecture, size = _check_architecture(name, params, config, _published_size(processor), sizes)
        normalisation = normalisation_of(params.transformers, processor)
        task = _task(source, config, processor)
        built = getattr(transformers, architecture)
        model, loading = built.from_pretrained(source, config=copy.deepcopy(config), output_loading_info=True)
    except (OSError, ValueError) as error:
        if isinstance(error, MGDError):
            raise
        raise WeightsError(f"transformers: {params.transformers}: {' '.join(str(error).split())[:300]}") from None
    _check_masks(model, f"transformers: {params.transformers}")
    _check_complete(params.transformers, _segmenter(model, config.num_labels, task), loading["missing_keys"], size)
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
            "size": _published_size(processor),
            **({} if task is None else {"task": task}),
        },
    )


def _configuration(source: str, **options: Any) -> Any:
    config = import_transformers().AutoConfig.from_pretrained(source, **options)
    if hasattr(config, "is_training"):  # OneFormer's: it would ask for texts, and draw random numbers in eval mode
        config.is_training = False
    return config


def _processor(source: str, config: Any) -> Any:
    # OneFormer's reads a table of things and stuff from another place of the hub, which nobody needs here.
    options: dict[str, Any] = {"class_info_file": None} if config.model_type == "oneformer" else {}
    return import_transformers().AutoImageProcessor.from_pretrained(source, **options)


def _task(source: str, config: Any, processor: Any) -> list[int] | None:
    """Tokens of OneFormer's task, which is always "semantic"; None for other networks."""
    if config.model_type != "oneformer":
        return None
    transformers = import_transformers()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    both = transformers.OneFormerProcessor(processor, tokenizer, task_seq_length=config.task_seq_len)
    return both(images=[np.zeros((64, 64, 3), np.uint8)], task_inputs=["semantic"], return_tensors="pt")["task_inputs"][0].tolist()


def _published_size(processor: Any) -> int | list[int] | None:
    """The size to which a processor brings images, pixels: the shorter side, or height and width; None if it does not resize."""
    if not getattr(processor, "do_resize", False):
        return None
    cropped = getattr(processor, "do_center_crop", False)
    size = processor.to_dict().get("crop_size" if cropped else "size") or {}
    return [size["height"], size["width"]] if size.get("height") else size.get("shortest_edge")


def _input_size(config: Any, published: int | list[int] | None) -> tuple[int, int] | None:
    """Height and width, pixels, of a network's input if it takes one size only: as its processor says, or its configuration."""
    backbone = getattr(config, "backbone_config", None)
    size = published or getattr(config, "image_size", None) or getattr(backbone, "image_size", None)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return None if height is None or width is None else (height, width)


def _check_complete(source: str, network: nn.Module, missing: Iterable[str], size: tuple[int, int]) -> None:
    """Raises WeightsError if a published file lacks parameters that the outputs depend on: they would be random numbers. `missing`
    has all that it lacks; some published networks have parameters that nothing uses."""
    trial: Any = copy.deepcopy(network).float().eval().requires_grad_(True)
    lacking = [parameter for parameter in trial.model.named_parameters() if parameter[0] in set(missing)]
    if not lacking:
        return
    outputs = trial(torch.zeros(1, 3, *size))
    total = torch.stack([values.sum() for values in outputs if values is not None]).sum()
    gradients = torch.autograd.grad(total, [value for _, value in lacking], allow_unused=True)
    if used := [key for (key, _), gradient in zip(lacking, gradients, strict=True) if gradient is not None]:
        raise WeightsError(
            f"transformers: {source}: its weights lack {counted(len(used), 'tensor')} that the network uses ({some(used)}), "
            "which would be random numbers; name the network that these weights belong to"
        )


def check_transformers(name: str, params: TransformersTeacher, base: Path, sizes: Sizes) -> None:
    """Raises what `fetch_transformers` would raise of a network whose configuration is on this machine; fetches nothing."""
    if (source := _on_this_machine(params.transformers, base)) is None:
        return
    config = configuration_here(params.transformers, base)
    try:
        published = _published_size(_processor(source, config))
    except (OSError, ValueError) as error:
        raise WeightsError(f"transformers: {params.transformers}: {' '.join(str(error).split())[:300]}") from None
    _check_architecture(name, params, config, published, sizes)


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
        return _configuration(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"transformers: {published}: {' '.join(str(error).split())[:300]}") from None


def _on_this_machine(published: str, base: Path) -> str | None:
    """The source for transformers: a folder, or a name that the hub's cache has; None if the network is not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    if (base / published).is_dir():
        return str(base / published)
    return published if isinstance(try_to_load_from_cache(published, "config.json"), str) else None


def _check_architecture(
    name: str, params: TransformersTeacher, config: Any, published: int | list[int] | None, sizes: Sizes
) -> tuple[str, tuple[int, int]]:
    """The class of a network that segments and takes inputs of `sizes`, or one size only, and an input that it takes; WeightsError
    otherwise, before weights are fetched."""
    architecture = (config.architectures or ["unknown"])[0]
    if not architecture.endswith(("ForSemanticSegmentation", "ForUniversalSegmentation", "MaskFormerForInstanceSegmentation")):
        hint = "; it takes phrases: add prompts" if config.model_type in ("clipseg", "sam3", "sam3_video") else ""
        raise WeightsError(
            f"transformers: {params.transformers} is a {architecture}, not a network for semantic segmentation{hint}"
        )
    built = getattr(import_transformers(), architecture, None)
    if built is None:
        raise WeightsError(f"transformers: {params.transformers} is a {architecture}, which the installed version does not have")
    if sorted(config.id2label) != list(range(config.num_labels)):
        raise WeightsError(f"transformers: {params.transformers}: id2label in its configuration does not number its classes from 0")

    def build() -> nn.Module:
        task = [0] * config.task_seq_len if config.model_type == "oneformer" else None
        return _segmenter(built(copy.deepcopy(config)), config.num_labels, task)

    multiple, said, own = _multiple(config), _input_size(config, published), _input_size(config, None)
    try:
        size = check_size(name, build, multiple, said, params.fixed_size, sizes)
    except WeightsError:
        if said is None or own is None or find_fault(build, [own]) or not find_fault(build, [said]):
            raise
        raise WeightsError(
            f"transformers: {params.transformers}: takes images of {own[0]} x {own[1]} pixels, but its processor makes them "
            f"{said[0]} x {said[1]}; mend size in preprocessor_config.json of a copy, and name the copy's folder instead"
        ) from None
    return architecture, size or small_input(multiple)


def _multiple(config: Any) -> int:
    """The sides of the input must be multiples of this many pixels: 32, or a ViT's patch that does not divide 32, such as 14."""
    patch = getattr(config, "patch_size", None) or getattr(getattr(config, "backbone_config", None), "patch_size", None) or 1
    patch = patch if isinstance(patch, int) else max(patch)
    return MULTIPLE if MULTIPLE % patch == 0 else patch


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
