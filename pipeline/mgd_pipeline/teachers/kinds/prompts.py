"""Text-prompted teachers: CLIPSeg and SAM 3 of transformers, which score the pixels of an image for a phrase.

Letters: B batch, P phrases, K classes of the data set, H W pixels, h w cells of an output, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgd_pipeline.data.classes import check_prompts
from mgd_pipeline.errors import MGDError, WeightsError, shell_command
from mgd_pipeline.networks.normalisation import IMAGENET
from mgd_pipeline.networks.weights import fitting_state, read_metadata, read_state_dict, save_weights
from mgd_pipeline.params import PromptsTeacher
from mgd_pipeline.teachers.kinds.shared import noted_normalisation
from mgd_pipeline.teachers.kinds.transformers import configuration_here, import_transformers, normalisation_of, published_source
from mgd_pipeline.teachers.teacher import Teacher, TeacherOutputs

_NETWORKS = {"clipseg": "CLIPSegForImageSegmentation", "sam3": "Sam3Model", "sam3_video": "Sam3Model"}
"""By the model_type of a configuration. facebook/sam3 is published as the tracker of videos that contains the network."""
_LEAST = -14.0
"""Bound of a logit from below: a score of about 1e-6. The stored logits of an image have one scale, which smaller scores
would coarsen."""


def prompts_teacher(name: str, params: PromptsTeacher, path: Path, classes: Sequence[str]) -> Teacher:
    """Raises ParamsError for prompts of other classes, WeightsError for a file of another kind, or without a phrase's tokens."""
    check_prompts(f"teachers.{name}", params.prompts, classes)
    transformers = import_transformers()
    state, notes = read_state_dict(path), read_metadata(path)
    fetch = f"by `{shell_command('mgd-pipeline', 'train-teacher', '--teacher', name)}`"
    if notes.get("kind") != "prompts":
        raise WeightsError(f"{path}: holds no text-prompted network; make such a file of {params.transformers} {fetch}")
    phrases = [phrase for label in classes for phrase in params.prompts[label]]
    if unknown := next((phrase for phrase in phrases if phrase not in notes["tokens"]), None):
        raise WeightsError(f"teachers.{name}.prompts: {path} was made without the phrase {unknown!r}; fetch it again {fetch}")
    _check_different(name, params, notes["tokens"])
    config = transformers.AutoConfig.for_model(**notes["config"])
    model = getattr(transformers, notes["architecture"])(config).float()  # parts of it may be published in half precision
    model.load_state_dict(fitting_state(model.state_dict(), state, path, notes["architecture"]))
    network = _Prompted(
        model,
        [notes["tokens"][phrase] for phrase in phrases],
        [[phrases.index(phrase) for phrase in params.prompts[label]] for label in classes],
        (notes["size"][0], notes["size"][1]),
    )
    normalise = noted_normalisation(notes, IMAGENET)
    return Teacher(network, normalise, align_corners=False, multiple=1, labels=tuple(classes))


class _Prompted(nn.Module):
    """A class's score is the largest of its phrases' scores, each between 0 and 1; a class without a phrase has 1 - the largest of
    all. Logits are the logarithms of the scores."""

    def __init__(
        self, model: nn.Module, tokens: Sequence[Sequence[int]], groups: Sequence[Sequence[int]], size: tuple[int, int]
    ) -> None:
        """`tokens` of each phrase; for each class the numbers of its phrases; height and width of the input in pixels."""
        super().__init__()
        self.model, self._groups, self._size = model, groups, size
        # Buffers belong to the hash of the weights, and so to a teacher cache's identity.
        self.register_buffer("input_size", torch.tensor(size))
        self._answers = _answers_of_clipseg if hasattr(model, "clip") else _answers_of_sam3
        for number, ids in enumerate(tokens):
            self.register_buffer(f"phrase_{number}", torch.tensor([ids]))
        self._count = len(tokens)

    def forward(self, images_B3HW: Tensor) -> TeacherOutputs:
        # --- THE FIXED INPUT SIZE: the whole input is brought to the size of the network, as the published processors do, and the
        # outputs are a grid over the whole input. Only the buffer `input_size` says the same, for the hash.
        images = F.interpolate(images_B3HW, self._size, mode="bilinear", align_corners=False, antialias=True)
        # ---
        tokens = [self.get_buffer(f"phrase_{number}") for number in range(self._count)]
        answers = self._answers(self.model, images, tokens).float()
        largest = torch.stack([answers[:, list(group)].amax(1) if group else -answers.amax(1) for group in self._groups], 1)
        # Of an answer x the score is sigmoid(x). 1 - sigmoid(x) is sigmoid(-x), and the logarithm is finite for every x.
        return TeacherOutputs(F.logsigmoid(largest).clamp(min=_LEAST), None)


def _answers_of_clipseg(model: Any, images_B3HW: Tensor, tokens_1T: Sequence[Tensor]) -> Tensor:
    """(B, P, h, w) answers of CLIPSeg. The image is encoded once."""
    seen = model.clip.vision_model(pixel_values=images_B3HW, interpolate_pos_encoding=True, output_hidden_states=True)
    activations = [seen.hidden_states[layer + 1] for layer in model.extract_layers]  # the first one is the input of layer 0
    answers = []
    for ids in tokens_1T:
        condition = model.get_conditional_embeddings(batch_size=1, input_ids=ids, attention_mask=torch.ones_like(ids))
        answers.append(model.decoder(activations, condition.expand(len(images_B3HW), -1)).logits)
    return torch.stack(answers, 1)


def _answers_of_sam3(model: Any, images_B3HW: Tensor, tokens_1T: Sequence[Tensor]) -> Tensor:
    """(B, P, h, w) answers of SAM 3's semantic head. The image is encoded once."""
    seen, answers = model.get_vision_features(pixel_values=images_B3HW), []
    for ids in tokens_1T:
        ids = ids.expand(len(images_B3HW), -1)
        answers.append(model(vision_embeds=seen, input_ids=ids, attention_mask=torch.ones_like(ids)).semantic_seg)
    return torch.cat(answers, 1)


def fetch_prompts(name: str, params: PromptsTeacher, base: Path) -> None:
    """Writes `params.weights`: weights, configuration and input of a published network, and the tokens of all phrases. Raises
    WeightsError."""
    transformers = import_transformers()
    source = published_source(params.transformers, base)
    try:
        architecture = _architecture(params, transformers.AutoConfig.from_pretrained(source))
        processor = transformers.AutoImageProcessor.from_pretrained(source)
        normalisation = normalisation_of(params.transformers, processor)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = getattr(transformers, architecture).from_pretrained(source)
    except (OSError, ValueError) as error:
        if isinstance(error, MGDError):
            raise
        raise WeightsError(f"transformers: {params.transformers}: {' '.join(str(error).split())[:300]}") from None
    most = model.config.text_config.max_position_embeddings
    phrases = [phrase for members in params.prompts.values() for phrase in members]
    tokens = {phrase: _tokens(f"teachers.{name}.prompts", tokenizer, phrase, most) for phrase in phrases}
    _check_different(name, params, tokens)
    save_weights(
        base / params.weights,
        {key: value.contiguous().clone() for key, value in model.state_dict().items()},
        {
            "kind": "prompts",
            "architecture": architecture,
            "config": {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"},
            "size": _size_of(params, processor),
            "normalisation": [list(normalisation.mean), list(normalisation.std)],
            "channels": normalisation.channels,
            "tokens": tokens,
        },
    )


def check_prompted(params: PromptsTeacher, base: Path) -> None:
    """Raises what `fetch_prompts` would raise of a network whose configuration is on this machine; fetches nothing."""
    if (config := configuration_here(params.transformers, base)) is not None:
        _architecture(params, config)


def _architecture(params: PromptsTeacher, config: Any) -> str:
    """The class of a network that takes phrases; WeightsError for any other network."""
    architecture = _NETWORKS.get(config.model_type)
    if architecture is None:
        published = (config.architectures or ["unknown"])[0]
        raise WeightsError(f"transformers: {params.transformers} is a {published}, which takes no phrases; name a CLIPSeg or SAM 3")
    if not hasattr(import_transformers(), architecture):
        raise WeightsError(f"transformers: {params.transformers} is a {architecture}, which the installed version does not have")
    return architecture


def _size_of(params: PromptsTeacher, processor: Any) -> list[int]:
    """Height and width, pixels, to which a processor brings an image. WeightsError for anything but squares."""
    size = dict(processor.size)
    side = size.get("height")
    if side is None or side != size.get("width"):
        raise WeightsError(f"transformers: {params.transformers}: its processor makes images of {size}, not squares of one size")
    return [side, side]


def _tokens(key: str, tokenizer: Any, phrase: str, most: int) -> list[int]:
    """The tokens of a phrase, without padding. WeightsError for a phrase without any, and for one that is too long."""
    ids = tokenizer(phrase)["input_ids"]
    if len(ids) <= len(tokenizer("")["input_ids"]):
        raise WeightsError(f"{key}: {phrase!r} has no word that the network knows; write other words")
    if len(ids) > most:
        raise WeightsError(f"{key}: {phrase!r} has {len(ids)} tokens, and the network takes {most}; shorten it")
    return list(ids)


def _check_different(name: str, params: PromptsTeacher, tokens: dict[str, list[int]]) -> None:
    """Raises WeightsError for phrases of two classes with the same tokens, as of Road and road: the first class would win."""
    first: dict[tuple[int, ...], tuple[str, str]] = {}
    for label, phrase in ((label, phrase) for label, phrases in params.prompts.items() for phrase in phrases):
        other_label, other = first.setdefault(tuple(tokens[phrase]), (label, phrase))
        if other_label != label:
            raise WeightsError(
                f"teachers.{name}.prompts: {other!r} of {other_label} and {phrase!r} of {label} are the same words to the network; "
                "write other words for one of the two"
            )
