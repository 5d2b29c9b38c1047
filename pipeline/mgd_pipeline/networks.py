"""Students and teachers: segmentation-models-pytorch networks, their weights and their grid.

Letters: B batch, K classes, D decoder channels, H W pixels, h w cells at the head's native stride.
"""

from __future__ import annotations

import socket
import threading
import warnings
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import numpy as np
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.encoders import encoders as smp_encoders
from torch import Tensor, nn

from mgd_pipeline.errors import WeightsError
from mgd_pipeline.params import NetworkParams
from mgd_pipeline.views import Grid
from mgd_pipeline.weights import read_state_dict
from mgd_pipeline.words import counted

MULTIPLE = 32
"""Sides of a network's input are padded to multiples of this many pixels."""
STRIDE = 4
"""Pixels between two cells of the logits and features of every decoder that params.py admits."""


class Normalisation(NamedTuple):
    """Per channel R, G, B, in units of 0 to 255: input = (pixel - mean) / std."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""ImageNet's, from torchvision's documentation."""


class DenseOutputs(NamedTuple):
    """What a network says of a batch, at its native stride."""

    logits: Tensor
    """(B, K, h, w)"""
    features: Tensor
    """(B, D, h, w): the decoder's output, of which the logits are a 1x1 convolution."""


class SegmentationNetwork(nn.Module):
    """An smp model whose forward returns both its features and its logits before the final upsampling.

    The final upsampling of smp aligns corners: cell 0 and the last cell lie on the first and the last pixel. `model` is the
    plain smp model; its state dict is what is saved.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        # Any: smp's models have an encoder, a decoder and a segmentation_head, but no common type that says so.
        self.model: Any = model

    def forward(self, images_B3HW: Tensor) -> DenseOutputs:
        """(B, 3, H, W) normalised, H and W multiples of 32, to DenseOutputs of h = H/4, w = W/4."""
        stages = self.model.encoder(images_B3HW)
        # smp's FPN takes the stages as one list, as all its decoders do since 0.4.
        features = self.model.decoder(stages)
        return DenseOutputs(self.model.segmentation_head[0](features), features)


def upsample(logits_BKhw: Tensor, size: tuple[int, int]) -> Tensor:
    """The network's own last step: native logits to (B, K, *size), bilinear with aligned corners."""
    return F.interpolate(logits_BKhw, size=size, mode="bilinear", align_corners=True)


def pad_to_multiple(images_B3HW: Tensor, multiple: int = MULTIPLE) -> Tensor:
    """Pads at the bottom and right with 0, the mean colour, to sides that are multiples of 32, or of `multiple`."""
    height, width = images_B3HW.shape[-2:]
    return F.pad(images_B3HW, (0, -width % multiple, 0, -height % multiple))


def output_grid(sizes: list[tuple[int, int]], stride: int = STRIDE) -> Grid:
    """Where the cells of a network's outputs lie, for images of `sizes` (height, width) padded by `pad_to_multiple`; with another
    `stride` those of a store."""
    frames = -(-np.array(sizes) // MULTIPLE) * MULTIPLE
    return Grid(cells=frames // stride, frames=frames, align_corners=True)


def normalisation(encoder: str) -> Normalisation:
    """The input normalisation with which the encoder's ImageNet weights were trained."""
    if encoder.startswith("tu-") and timm.is_model_pretrained(encoder[3:]):
        config = timm.get_pretrained_cfg(encoder[3:])
        if config is not None:
            red, green, blue = (float(v) * 255 for v in config.mean)
            red_std, green_std, blue_std = (float(v) * 255 for v in config.std)
            return Normalisation((red, green, blue), (red_std, green_std, blue_std))
    return IMAGENET


def check_encoder(encoder: str) -> None:
    """Raises WeightsError for an encoder that nobody can build."""
    if encoder.startswith("tu-"):
        name, _, tag = encoder[3:].partition(".")
        known = timm.is_model(name) and (not tag or timm.is_model_pretrained(encoder[3:]))
    else:
        known = encoder in smp_encoders
    if not known:
        raise WeightsError(f"encoder {encoder!r} is unknown to segmentation-models-pytorch; timm's are written tu-<name>")


def build_network(params: NetworkParams, classes: int, *, base: Path = Path(), initialise: bool = True) -> SegmentationNetwork:
    """Builds the network; with `initialise` the encoder's weights are loaded as `params.encoder_weights` says, files below `base`.

    Raises WeightsError for an unknown encoder and for weights that are missing or do not fit, within two seconds and before
    anything is built.
    """
    encoder = params.encoder
    check_encoder(encoder)
    weights = resolve_encoder_weights(encoder, params.encoder_weights, base) if initialise else None
    channels = params.decoder_channels
    by_decoder: dict[str, dict[str, object]] = {
        # MGD's dilations (method.md 1.1); smp's own defaults are twice as large. No dropout, as MGD.
        "deeplabv3plus": {
            "decoder_channels": channels,
            "decoder_atrous_rates": (6, 12, 18),
            "decoder_aspp_dropout": 0.0,
        },
        "fpn": {"decoder_pyramid_channels": channels, "decoder_segmentation_channels": channels, "decoder_dropout": 0.0},
        "upernet": {"decoder_channels": channels},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model: Any = smp.create_model(
            params.decoder,
            encoder_name=encoder,
            encoder_weights=None,
            classes=classes,
            **by_decoder[params.decoder],  # pyright: ignore[reportArgumentType]
        )
    if weights is not None:
        _load_encoder(model.encoder, encoder, weights)
    return SegmentationNetwork(model)


def resolve_encoder_weights(encoder: str, weights: str, base: Path = Path(), *, fetch: bool = True) -> Path | None:
    """The file that holds an encoder's initial weights; None for `none`.

    `imagenet` is looked up in the local hub cache and fetched where the hub can be reached; where it cannot, the
    WeightsError comes at once (the hub's own client retries for most of a minute) and says which file goes where.
    Without `fetch` nothing is fetched and nobody waits: None, too, where the weights are published but not on this machine.
    """
    if weights == "none":
        return None
    if weights != "imagenet":
        path = base / weights
        if not path.is_file():
            raise WeightsError(
                f"encoder_weights: {path}: no such file; put the state dict of {encoder} there, or write none or imagenet"
            )
        return path
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    if encoder.startswith("tu-"):
        config = timm.get_pretrained_cfg(encoder[3:])
        repository, revision = (config.hf_hub_id if config is not None else None), None
    else:
        settings = smp_encoders[encoder]["pretrained_settings"].get("imagenet", {})
        repository, revision = settings.get("repo_id"), settings.get("revision")
    if repository is None:
        raise WeightsError(f"encoder {encoder}: no ImageNet weights are published for it; use encoder_weights: none or a file")
    name = "model.safetensors"
    cached = try_to_load_from_cache(repository, name, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    if not fetch:
        return None
    if not constants.HF_HUB_OFFLINE and reachable(constants.ENDPOINT):
        return Path(hf_hub_download(repository, name, revision=revision))
    raise WeightsError(
        f"ImageNet weights of {encoder} are not on this machine and the hub cannot be reached. On a connected machine run "
        f"`hf download {repository} {name}{f' --revision {revision}' if revision else ''}`, copy the file here and write its "
        f"path as encoder_weights (or copy the hub's cache folder to {constants.HF_HUB_CACHE})"
    )


def reachable(endpoint: str) -> bool:
    """Whether the host of a URL accepts a connection within 1.5 s, the look-up of its name included (that has no time-out)."""
    url = urlparse(endpoint)
    connected = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((url.hostname or "", url.port or 443), timeout=1.5).close()
        except OSError:
            return
        connected.set()

    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(1.5)
    return connected.is_set()


def _load_encoder(encoder: nn.Module, name: str, path: Path) -> None:
    """Strict: each tensor of the encoder is set, and only a classifier's tensors may stay unused."""
    state = {key.removeprefix("module."): value for key, value in read_state_dict(path).items()}
    target, classifier = encoder, {"fc.weight", "fc.bias", "classifier.1.weight", "classifier.1.bias"}
    if name.startswith("tu-"):
        target = encoder.get_submodule("model")
        with torch.device("meta"):
            classifier = set(timm.create_model(name[3:], pretrained=False).state_dict())
    wanted = target.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    foreign = [key for key in state if key not in wanted and key not in classifier]
    shapes = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    for problem, keys in (("lacks", missing), ("holds foreign", foreign), ("has another shape for", shapes)):
        if keys:
            some = f"{counted(len(keys), 'tensor')}: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"
            raise WeightsError(f"{path}: does not fit {name}: {problem} {some}")
    nn.Module.load_state_dict(target, {key: state[key] for key in wanted if key in state}, strict=False)


def load_network(params: NetworkParams, classes: int, path: str | Path) -> SegmentationNetwork:
    """Builds a network and loads a whole checkpoint (keys of the plain smp model), strictly.

    Raises WeightsError that names the file, and the tensors that are missing, foreign or of another shape.
    """
    network = build_network(params, classes, initialise=False)
    state = read_state_dict(path)
    check_state(network.model.state_dict(), state, path, f"{params.decoder} with {params.encoder} and {classes} classes")
    network.model.load_state_dict(state)
    return network


def check_state(wanted: dict[str, Tensor], state: dict[str, Tensor], path: str | Path, network: str) -> None:
    """Raises WeightsError that names the tensors of a file which are missing, foreign or of another shape."""
    problems = {
        "lacks": [key for key in wanted if key not in state],
        "holds foreign": [key for key in state if key not in wanted],
        "has another shape for": [key for key in wanted if key in state and state[key].shape != wanted[key].shape],
    }
    for problem, keys in problems.items():
        if keys:
            raise WeightsError(
                f"{path}: does not fit {network}: "
                f"{problem} {counted(len(keys), 'tensor')}: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"
            )


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def multiply_accumulates(network: nn.Module, height: int, width: int, multiple: int = MULTIPLE) -> int:
    """Multiply-accumulate operations of one image of height x width (padded to multiples of 32, or of `multiple`), by torch's
    counter."""
    from torch.utils.flop_counter import FlopCounterMode

    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        # Two images: torch refuses to normalise a single value, which one 32 x 32 image is in FPN's last stage.
        network(pad_to_multiple(torch.zeros(2, 3, height, width, device=device), multiple))
    network.train(was_training)
    return counter.get_total_flops() // 4
