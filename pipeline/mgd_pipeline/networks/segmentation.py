"""Students and teachers: segmentation-models-pytorch networks, their weights and their grid.

Letters: B batch, K classes, D decoder channels, H W pixels, h w cells at the head's native stride.
"""

from __future__ import annotations

import difflib
import socket
import threading
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlparse

import numpy as np
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.encoders import encoders as smp_encoders
from torch import Tensor, nn

from mgd_pipeline.errors import ParamsError, WeightsError
from mgd_pipeline.networks.weights import read_state_dict, without_prefix
from mgd_pipeline.params import NetworkParams
from mgd_pipeline.views import Grid
from mgd_pipeline.words import counted

MULTIPLE = 32
"""Sides of a network's input are padded to multiples of this many pixels."""
STRIDE = 4
"""Pixels between two cells of the logits and features of every decoder that params.py admits."""


class Normalisation(NamedTuple):
    """Per channel R, G, B, in units of 0 to 255: input = (pixel - mean) / std."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channels: Literal["RGB", "BGR"] = "RGB"
    """Order in which the network is given the channels; mean and std are those of R, G, B in either case."""


IMAGENET = Normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""ImageNet's, from torchvision's documentation."""
_MINUS_ONE_TO_ONE = Normalisation((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))
_DPN = Normalisation((124.0, 117.0, 104.0), (1 / 0.0167, 1 / 0.0167, 1 / 0.0167))
_PUBLISHED = {
    "dpn": _DPN,
    "inceptionresnetv2": _MINUS_ONE_TO_ONE,
    "inceptionv4": _MINUS_ONE_TO_ONE,
    "timm-tf_efficientnet_lite": _MINUS_ONE_TO_ONE,
    "xception": _MINUS_ONE_TO_ONE,
}
"""Input of smp's own encoders whose ImageNet weights were trained with another one than ImageNet's, by how their names begin.
smp 0.6 keeps these numbers on the hub, in config.json beside the weights; smp 0.4 had them in its code."""


def in_order(images_B3HW: Tensor, normalisation: Normalisation) -> Tensor:
    """Channels R, G, B in the order in which the network is given them."""
    return images_B3HW.flip(1) if normalisation.channels == "BGR" else images_B3HW


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
    if encoder.startswith("tu-"):
        return timm_normalisation(encoder[3:])
    return next((found for start, found in _PUBLISHED.items() if encoder.startswith(start)), IMAGENET)


def timm_normalisation(name: str) -> Normalisation:
    """The input normalisation of a model of timm, as its published weights have it; ImageNet's where there are none."""
    config = timm.get_pretrained_cfg(name) if timm.is_model_pretrained(name) else None
    if config is None:
        return IMAGENET
    red, green, blue = (float(v) * 255 for v in config.mean)
    red_std, green_std, blue_std = (float(v) * 255 for v in config.std)
    return Normalisation((red, green, blue), (red_std, green_std, blue_std))


def unrecorded_normalisation(encoder: str) -> Normalisation:
    """The input normalisation of a network that was trained by version 0.1.0, which did not note it: that version knew timm's own
    numbers and ImageNet's."""
    return timm_normalisation(encoder[3:]) if encoder.startswith("tu-") else IMAGENET


def check_encoder(encoder: str) -> None:
    """Raises WeightsError for an encoder that nobody can build."""
    if encoder.startswith("tu-"):
        name, _, tag = encoder[3:].partition(".")
        if not timm.is_model(name) or (tag and not timm.is_model_pretrained(encoder[3:])):
            raise WeightsError(f"encoder {encoder!r} is unknown to timm{_nearest(name, timm.list_models(), 'tu-')}")
    elif encoder not in smp_encoders:
        timms = f"tu-{encoder}" if timm.is_model(encoder) else "tu-<name>"
        near = "" if timm.is_model(encoder) else _nearest(encoder, smp_encoders, "")
        raise WeightsError(f"encoder {encoder!r} is unknown to segmentation-models-pytorch{near}; timm's are written {timms}")


def _nearest(name: str, known: Iterable[str], prefix: str) -> str:
    found = difflib.get_close_matches(name.strip().lower(), known, n=1)
    return f"; nearest is {prefix}{found[0]}" if found else ""


def build_network(params: NetworkParams, classes: int, *, base: Path = Path(), initialise: bool = True) -> SegmentationNetwork:
    """Builds the network; with `initialise` the encoder's weights are loaded as `params.encoder_weights` says, files below `base`.

    Raises WeightsError for an unknown encoder and for weights that are missing or do not fit, within two seconds and before
    anything is built; ParamsError for an encoder that the decoder cannot take.
    """
    encoder = params.encoder
    check_encoder(encoder)
    weights = resolve_encoder_weights(encoder, params.encoder_weights, base) if initialise else None
    try:
        network = _plain_network(params, classes)
    except REFUSALS:
        if reason := misfit(params, []):
            raise ParamsError(reason) from None
        raise  # a machine without memory, such as that
    if weights is not None:
        _load_encoder(network.model.encoder, encoder, weights)
    return network


def _plain_network(params: NetworkParams, classes: int) -> SegmentationNetwork:
    """The network with random weights; what smp and timm raise for what they cannot build."""
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
            encoder_name=params.encoder,
            encoder_weights=None,
            classes=classes,
            **by_decoder[params.decoder],  # pyright: ignore[reportArgumentType]
        )
    for layer in model.modules():
        if type(layer) is nn.GroupNorm:  # timm has kinds of its own, with an activation
            layer.__class__ = _GroupNorm
    return SegmentationNetwork(model)


class _GroupNorm(nn.GroupNorm):
    """torch refuses groups of a single value, which fpn with 32 channels has at 32 x 32 pixels, where an image is alone in its
    batch. A value that is its own mean is normalised to 0, which leaves the bias; in larger batches torch computes the same."""

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() == self.num_groups:
            return self.bias[:, None, None].expand_as(input)
        return super().forward(input)


# --- what fits what ---------------------------------------------------------------------------------------------------

REFUSALS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    ZeroDivisionError,
)
"""What smp, timm and transformers raise where they cannot build a network, or where a network cannot see a size."""
_GOOD_ENCODERS = "resnet50, efficientnet-b0 or tu-convnext_tiny"


class Fault(NamedTuple):
    """Why a network is of no use here."""

    size: tuple[int, int] | None
    """Height and width of the input that it cannot see; None where it cannot be built"""
    said: str
    """The library's words, one line"""


def find_fault(build: Callable[[], nn.Module], sizes: Iterable[tuple[int, int]], *, stride: int | None = None) -> Fault | None:
    """Builds a network without memory for its weights (torch's meta device) and shows it inputs of `sizes`, height and width.

    With `stride` its logits must have one cell for each `stride` pixels. Where the network asks for values, which the meta device
    does not have, it is built on the CPU. Random numbers are drawn as if nothing had been built.
    """
    sizes = list(dict.fromkeys(sizes))
    with torch.random.fork_rng(devices=[]), torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for device in ("meta", "cpu"):
            found = _fault_on(device, build, sizes, stride)
            if found is None or "meta" not in found.said.lower():
                return found
    return None


def _fault_on(device: str, build: Callable[[], nn.Module], sizes: list[tuple[int, int]], stride: int | None) -> Fault | None:
    size = None
    try:
        with torch.device(device):
            network = build().eval()
            for size in sizes:
                outputs = network(torch.zeros(1, 3, *size))
                if stride is None:
                    continue
                cells, wanted = tuple(outputs.logits.shape[-2:]), (size[0] // stride, size[1] // stride)
                if cells != wanted:
                    return Fault(size, f"its logits are {cells[0]} x {cells[1]} cells, not {wanted[0]} x {wanted[1]}")
    except REFUSALS as error:
        return Fault(size, " ".join(str(error).split())[:160] or type(error).__name__)
    return None


def misfit(params: NetworkParams, sizes: Iterable[tuple[int, int]]) -> str | None:
    """What is wrong with decoder and encoder together, and the remedy; None where the network can be built and takes inputs of
    `sizes`, height and width in pixels, multiples of 32."""
    sizes = list(sizes)
    fault = _pair_fault(params, sizes)
    if fault is None:
        return None
    others = [name for name in ("deeplabv3plus", "fpn", "upernet") if name != params.decoder]
    channels = -(-params.decoder_channels // 32) * 32  # as fpn needs them
    changed = [params.model_copy(update={"decoder": name, "decoder_channels": channels}) for name in others]
    fitting = [one.decoder for one in changed if _pair_fault(one, sizes) is None]
    decoder = f"take decoder: {' or '.join(fitting)}, or " if fitting else "take "
    remedy = f"{decoder}another encoder, such as {_GOOD_ENCODERS}"
    cannot = "cannot be built with" if fault.size is None else f"cannot see {fault.size[0]} x {fault.size[1]} pixels with"
    return f"decoder {params.decoder} {cannot} encoder {params.encoder} ({fault.said}); {remedy}"


def _pair_fault(params: NetworkParams, sizes: list[tuple[int, int]]) -> Fault | None:
    return find_fault(lambda: _plain_network(params, 2), sizes, stride=STRIDE)


def check_network(key: str, params: NetworkParams, sizes: Iterable[tuple[int, int]]) -> None:
    """Raises ParamsError, naming `key`, for a network that cannot be built or cannot see inputs of `sizes` (height, width;
    multiples of 32). No weights are read, and nothing is fetched."""
    try:
        check_encoder(params.encoder)
    except WeightsError as error:
        raise ParamsError(f"{key}.encoder: {error}") from None
    if problem := misfit(params, sizes):
        raise ParamsError(f"{key}: {problem}")


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
    target, classifier = encoder, {"fc.weight", "fc.bias", "classifier.1.weight", "classifier.1.bias"}
    if name.startswith("tu-"):
        target = encoder.get_submodule("model")
        with torch.device("meta"):
            classifier = set(timm.create_model(name[3:], pretrained=False).state_dict())
    wanted = target.state_dict()
    state = without_prefix(read_state_dict(path), wanted, path, unused=classifier)
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
    wanted, name = network.model.state_dict(), f"{params.decoder} with {params.encoder} and {classes} classes"
    network.model.load_state_dict(fitting_state(wanted, read_state_dict(path), path, name))
    return network


def fitting_state(
    wanted: dict[str, Tensor], state: dict[str, Tensor], path: str | Path, network: str, unused: Collection[str] = ()
) -> dict[str, Tensor]:
    """The tensors of a file under the names of `wanted`: a prefix that wrappers put before all names is removed, see
    `weights.without_prefix`, and those of the `unused` names are left out.

    Raises WeightsError that names the tensors of the file which are missing, foreign or of another shape.
    """
    named = without_prefix(state, wanted, path, unused=unused)
    state = {key: value for key, value in named.items() if key in wanted or key not in unused}
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
    return state


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
