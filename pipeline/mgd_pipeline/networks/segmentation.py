"""Students and teachers: segmentation-models-pytorch networks, their grid, and which decoder fits which encoder.

Letters: B batch, K classes, D decoder channels, H W pixels, h w cells at the head's native stride.
"""

from __future__ import annotations

import functools
import gc
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder
from torch import Tensor, nn

from mgd_pipeline.errors import ParamsError, WeightsError
from mgd_pipeline.networks.encoders import any_size, check_encoder, load_encoder, resolve_encoder_weights
from mgd_pipeline.networks.weights import fitting_state, read_state_dict
from mgd_pipeline.params import NetworkParams, TeacherNetworkParams
from mgd_pipeline.views import Grid

MULTIPLE = 32
"""Sides of a student's input are padded to multiples of this many pixels; those of teacher caches, too."""
STRIDE = 4
"""Pixels between two cells of the logits and features of every student's decoder."""


class DenseOutputs(NamedTuple):
    """The outputs of a network for a batch, at its native stride."""

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
        self.multiple = _dpt_multiple(model) if isinstance(model, smp.DPT) else MULTIPLE
        """Sides of the input must be multiples of this many pixels."""
        self.frozen_encoder = False

    def forward(self, images_B3HW: Tensor) -> DenseOutputs:
        """(B, 3, H, W) normalised, H and W multiples of `multiple`, to DenseOutputs of h = H/4, w = W/4, except for dpt."""
        return self.decode(self.encode(images_B3HW))

    def encode(self, images_B3HW: Tensor) -> Any:
        """What `decode` takes; without gradients if the encoder is frozen."""
        if not self.frozen_encoder:
            return self.model.encoder(images_B3HW)
        with torch.no_grad():
            return self.model.encoder(images_B3HW)

    def decode(self, encoded: Any) -> DenseOutputs:
        if isinstance(self.model, smp.DPT):
            *layers, classifier = self.model.segmentation_head.head
            features = nn.Sequential(*layers)(self.model.decoder(*encoded))
        else:
            features, classifier = self.model.decoder(encoded), self.model.segmentation_head[0]
        return DenseOutputs(classifier(features), features)

    def freeze_encoder(self) -> None:
        """The encoder keeps its weights and stays in eval mode, so that its BatchNorm statistics stay, too."""
        self.frozen_encoder = True
        self.model.encoder.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> SegmentationNetwork:
        super().train(mode)
        if self.frozen_encoder:
            self.model.encoder.eval()
        return self


def upsample(logits_BKhw: Tensor, size: tuple[int, int]) -> Tensor:
    """The network's own last step: native logits to (B, K, *size), bilinear with aligned corners."""
    return F.interpolate(logits_BKhw, size=size, mode="bilinear", align_corners=True)


def run_branches(branches: Sequence[Callable[[Tensor], DenseOutputs]], pixels_B3HW: Tensor) -> list[Tensor]:
    """(B, 3, H, W) normalised, any size, to (B, K, H, W) logits of each network: padded, through the network, upsampled, cut back.

    The networks are of one architecture. A frozen encoder that all of them have runs once.
    """
    height, width = pixels_B3HW.shape[-2:]
    networks = [branch for branch in branches if isinstance(branch, SegmentationNetwork)]
    padded = pad_to_multiple(pixels_B3HW, networks[0].multiple if networks else MULTIPLE)
    frozen = [network for network in networks if network.frozen_encoder and network.model.encoder is networks[0].model.encoder]
    if len(frozen) == len(branches):
        encoded = networks[0].encode(padded)
        native = [network.decode(encoded).logits for network in networks]
    else:
        native = [branch(padded).logits for branch in branches]
    return [upsample(logits.float(), (padded.shape[-2], padded.shape[-1]))[..., :height, :width] for logits in native]


def pad_to_multiple(images_B3HW: Tensor, multiple: int = MULTIPLE) -> Tensor:
    """Pads at the bottom and right with 0, the mean colour, to sides that are multiples of `multiple` pixels."""
    height, width = images_B3HW.shape[-2:]
    return F.pad(images_B3HW, (0, -width % multiple, 0, -height % multiple))


def output_grid(sizes: list[tuple[int, int]], stride: int = STRIDE) -> Grid:
    """Where the cells of a network's outputs lie, for images of `sizes` (height, width) padded by `pad_to_multiple`; with another
    `stride`, the cells of a teacher cache."""
    frames = -(-np.array(sizes) // MULTIPLE) * MULTIPLE
    return Grid(cells=frames // stride, frames=frames, align_corners=True)


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
        raise  # the cause lies elsewhere, such as a machine without memory
    if weights is not None:
        load_encoder(network.model.encoder, encoder, weights)
    return network


def build_branches(
    params: NetworkParams, classes: int, count: int, *, base: Path = Path(), frozen_encoder: bool = False
) -> list[SegmentationNetwork]:
    """Several networks of one architecture, which differ in what is random. Frozen encoders have the same weights, so all networks
    get the first one's. Raises what `build_network` raises."""
    networks = [build_network(params, classes, base=base) for _ in range(count)]
    if frozen_encoder:
        for network in networks:
            network.model.encoder = networks[0].model.encoder
            network.freeze_encoder()
    return networks


def load_network(params: NetworkParams, classes: int, path: str | Path) -> SegmentationNetwork:
    """Builds a network and loads a whole checkpoint (keys of the plain smp model), strictly.

    Raises WeightsError that names the file, and the tensors that are missing, foreign or of another shape.
    """
    network = build_network(params, classes, initialise=False)
    wanted, name = network.model.state_dict(), f"{params.decoder} with {params.encoder} and {classes} classes"
    network.model.load_state_dict(fitting_state(wanted, read_state_dict(path), path, name))
    return network


def _plain_network(params: NetworkParams, classes: int) -> SegmentationNetwork:
    """The network with random weights; raises what smp and timm raise for networks that they cannot build."""
    channels = params.decoder_channels
    by_decoder: dict[str, dict[str, Any]] = {
        # MGD's dilations; smp's own defaults are twice as large. No dropout, as in MGD.
        "deeplabv3plus": {"decoder_channels": channels, "decoder_atrous_rates": (6, 12, 18), "decoder_aspp_dropout": 0.0},
        "fpn": {"decoder_pyramid_channels": channels, "decoder_segmentation_channels": channels, "decoder_dropout": 0.0},
        "upernet": {"decoder_channels": channels},
        "dpt": {"decoder_fusion_channels": channels},
    }
    options = by_decoder[params.decoder]
    if params.decoder == "dpt" and params.encoder.startswith("tu-"):  # smp refuses all others
        options |= any_size(params.encoder[3:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model: Any = smp.create_model(
            params.decoder,
            encoder_name=params.encoder,
            encoder_weights=None,
            classes=classes,
            **options,
        )
        if isinstance(model, smp.DPT):
            _fit_dpt(model, channels)
    for layer in model.modules():
        if type(layer) is nn.GroupNorm:  # timm has kinds of its own, with an activation
            layer.__class__ = _GroupNorm
    return SegmentationNetwork(model)


def _fit_dpt(model: Any, channels: int) -> None:
    """Makes smp's DPT work for patches of any size, and takes its dropout away, as other decoders have none here.

    smp scales the maps of four blocks by patch / 4, patch / 8 and so on, cut to whole numbers, and adds each map to the doubled
    one before it. With patches of 14 pixels these do not fit. Here 14 scales as 16 does, as in DINOv2's own DPT heads: cells are
    then 14/8 pixels apart instead of 2.
    """
    strides = model.encoder.output_strides
    if len(set(strides)) > 1:
        raise ValueError(f"dpt takes plain ViTs, and the maps of this encoder have strides {', '.join(map(str, strides))}")
    if (rounded := _next_power_of_two(strides[0])) != strides[0]:
        model.decoder = DPTDecoder(
            model.encoder.out_channels,
            [rounded] * len(strides),
            model.encoder.has_prefix_tokens,
            fusion_channels=channels,
        )
        initialize_decoder(model.decoder)
    for layer in model.segmentation_head.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0


def _dpt_multiple(model: Any) -> int:
    """The patch, times what the coarsest map is smaller than the patches' own: DPT doubles a map that was halved before it adds it
    to the next one, so the number of patches must be even if a patch has 14 or 16 pixels."""
    patch = model.encoder.output_strides[0]
    return patch * max(1, 32 // _next_power_of_two(patch))


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


class _GroupNorm(nn.GroupNorm):
    """torch refuses groups of a single value, which fpn with 32 channels has at 32 x 32 pixels, where an image is alone in its
    batch. A value that is its own mean is normalised to 0, which leaves the bias; in larger batches torch computes the same."""

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() == self.num_groups:
            return self.bias[:, None, None].expand_as(input)
        return super().forward(input)


REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, ZeroDivisionError)
"""What smp, timm and transformers raise where they cannot build a network, or where a network cannot take a size."""


class Fault(NamedTuple):
    """Why a network is of no use here."""

    size: tuple[int, int] | None
    """Height and width of the input that it cannot take; None if it cannot be built"""
    said: str
    """The library's words, one line"""


def find_fault(build: Callable[[], nn.Module], sizes: Iterable[tuple[int, int]], *, stride: int | None = None) -> Fault | None:
    """Builds a network without memory for its weights (torch's meta device) and shows it inputs of `sizes`, height and width; a
    network with a `multiple` of its own gets them padded to it.

    With `stride` its logits must have one cell for each `stride` pixels. A network that asks for values, which the meta device
    does not have, is built on the CPU instead. The state of torch's random numbers stays as it was.
    """
    sizes = list(dict.fromkeys(sizes))
    with torch.random.fork_rng(devices=[]), torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for device in ("meta", "cpu"):
            fault = _fault_on(device, build, sizes, stride)
            for kept in _kept_inputs(sum(name.startswith("transformers.models.") for name in sys.modules)):
                kept.cache_clear()
            if fault is None or "meta" not in fault.said.lower():
                return fault
    return None


def _fault_on(device: str, build: Callable[[], nn.Module], sizes: list[tuple[int, int]], stride: int | None) -> Fault | None:
    size = None
    try:
        with torch.device(device):
            network = build().eval()
            for size in sizes:
                outputs = network(pad_to_multiple(torch.zeros(1, 3, *size), getattr(network, "multiple", 1)))
                if stride is None:
                    continue
                cells, wanted = tuple(outputs.logits.shape[-2:]), (size[0] // stride, size[1] // stride)
                if cells != wanted:
                    return Fault(size, f"its logits are {cells[0]} x {cells[1]} cells, not {wanted[0]} x {wanted[1]}")
    except REFUSALS as error:
        return Fault(size, " ".join(str(error).split())[:160] or type(error).__name__)
    return None


@functools.cache  # the search takes a second
def _kept_inputs(loaded: int) -> list[Any]:
    """What networks of transformers keep of earlier inputs, if so many of its modules are loaded.

    BEiT keeps the indices of its positions by size alone: a network with values would take the indices of the meta device, which
    have none, and read memory that nobody wrote.
    """
    kinds = (kept for kept in gc.get_objects() if type(kept) is functools._lru_cache_wrapper) if loaded else ()
    return [kept for kept in kinds if kept.__module__.startswith("transformers.models.")]


def misfit(params: NetworkParams, sizes: Iterable[tuple[int, int]]) -> str | None:
    """What is wrong with decoder and encoder together, and the remedy; None if the network can be built and takes inputs of
    `sizes`, height and width in pixels, multiples of 32."""
    decoders = ["deeplabv3plus", "fpn", "upernet", *(["dpt"] if isinstance(params, TeacherNetworkParams) else [])]
    # Without the further keys of a teacher: a class_map has no hash.
    params, sizes = TeacherNetworkParams(**params.model_dump(include=set(NetworkParams.model_fields))), tuple(sizes)
    fault = _pair_fault(params, sizes)  # pyright: ignore[reportArgumentType]  (frozen, so it has a hash)
    if fault is None:
        return None
    others = [name for name in decoders if name != params.decoder]
    channels = -(-params.decoder_channels // 32) * 32  # as fpn needs them
    changed = [params.model_copy(update={"decoder": name, "decoder_channels": channels}) for name in others]
    fitting = [one.decoder for one in changed if _pair_fault(one, sizes) is None]  # pyright: ignore[reportArgumentType]
    decoder = f"take decoder: {' or '.join(fitting)}, or " if fitting else "take "
    such = "tu-vit_base_patch14_dinov2" if params.decoder == "dpt" else "resnet50, efficientnet-b0 or tu-convnext_tiny"
    remedy = f"{decoder}another encoder, such as {such}"
    cannot = "cannot be built with" if fault.size is None else f"cannot see {fault.size[0]} x {fault.size[1]} pixels with"
    return f"decoder {params.decoder} {cannot} encoder {params.encoder} ({fault.said}); {remedy}"


@functools.cache  # each stage asks, and a build takes seconds
def _pair_fault(params: NetworkParams, sizes: tuple[tuple[int, int], ...]) -> Fault | None:
    return find_fault(lambda: _plain_network(params, 2), sizes, stride=None if params.decoder == "dpt" else STRIDE)


def check_network(key: str, params: NetworkParams, sizes: Iterable[tuple[int, int]]) -> None:
    """Raises ParamsError, naming `key`, for a network that cannot be built or cannot take inputs of `sizes` (height, width;
    multiples of 32). No weights are read, and nothing is fetched."""
    try:
        check_encoder(params.encoder)
    except WeightsError as error:
        raise ParamsError(f"{key}.encoder: {error}") from None
    if problem := misfit(params, sizes):
        raise ParamsError(f"{key}: {problem}")
