"""Simulated 8-bit arithmetic: a finished student that is fine-tuned under it keeps its accuracy in the int8 files of every runtime.

Runtimes fold BatchNorm into the weights before it, round weights to int8 with a scale for each output channel, and activations to
uint8 with one scale and one zero point for the whole tensor. Here the rounded values stay float32, and gradients pass the
rounding as if it were not there (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018). BatchNorm keeps the statistics of the finished student, because they are constants
in every runtime (Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", arXiv 1806.08342).

Letters: O output channels, H W pixels.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.func import functional_call

from mgd_pipeline.errors import ParamsError
from mgd_pipeline.networks.segmentation import SegmentationNetwork
from mgd_pipeline.params import Params

SHARE = 10
"""The fine-tuning has a tenth of the steps of the training."""
_MOMENTUM = 0.01
"""Share of the newest batch in the moving average of a range; torch's own quantisation-aware training has the same."""
_SAME = 0.01
"""Largest difference between the logits of a network and those with BatchNorm folded, as a share of the largest logit; TF32 gives
a tenth of it."""
_LAYERS = (nn.Conv2d, nn.Linear)


def last_tenth(params: Params) -> Params:
    """The settings of the fine-tuning: the last tenth of the training of the student once more.

    The learning rate begins where the schedule of the training stands after nine tenths of its steps, and ends as that one does.
    The feature term is left out: a student lacks its projections, and new ones would teach it noise.
    """
    student = params.student
    methods = student.without_teachers.model_copy(update={"consistency_rampup": 0.0})  # it was over before
    rate = student.learning_rate * (1 / SHARE) ** student.poly_power
    update = {"steps": max(1, student.steps // SHARE), "learning_rate": rate, "without_teachers": methods}
    losses = params.losses.model_copy(update={"feature": 0.0})
    return params.model_copy(update={"student": student.model_copy(update=update), "losses": losses})


class ActivationRange(nn.Module):
    """Rounds a tensor to 256 levels between the moving averages of its smallest and its largest value, 0 among the levels.

    In training mode the batch joins the averages first; where processes share it, the values of all of them. Values outside are
    cut, and have no gradient.
    """

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def forward(self, values: Tensor) -> Tensor:
        """Any shape and floating dtype to the same."""
        whole = values.float()
        if self.training:
            low, high = _of_all_ranks(*whole.detach().aminmax())
            new = self.low == self.high  # the first batch is the range
            self.low.copy_(torch.where(new, low, self.low.lerp(low, _MOMENTUM)).clamp(max=0))
            self.high.copy_(torch.where(new, high, self.high.lerp(high, _MOMENTUM)).clamp(min=0))
        scale = ((self.high - self.low) / 255).clamp(min=torch.finfo(torch.float32).eps)
        zero = (-self.low / scale).round().clamp(0, 255).to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(whole, scale, zero, 0, 255).to(values.dtype)


def _of_all_ranks(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value over all processes of a training."""
    if not dist.is_initialized():
        return low, high
    ends = torch.stack([-low, high])
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return -ends[0], ends[1]


def rounded_weights(weights: Tensor) -> Tensor:
    """(O, ...) float32 to the same: each output channel rounded to whole multiples -127 to 127 of its own scale."""
    scales = (weights.detach().flatten(1).abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).eps)
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weights, scales, zeros, 0, -127, 127)


class Int8Layer(nn.Module):
    """A convolution or a linear layer as an int8 runtime computes it, the BatchNorm that follows it in its weights."""

    def __init__(self, layer: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        self.layer: Any = layer
        self.norm: Any = norm
        self.input: nn.Module = nn.Identity()
        self.output: nn.Module = nn.Identity()
        self.rounds = False
        """Whether anything is rounded; without it the layer computes what layer and BatchNorm do in eval mode."""

    def forward(self, values: Tensor) -> Tensor:
        weights, bias = self.folded()
        if self.rounds:
            values, weights = self.input(values), rounded_weights(weights)
        values = functional_call(self.layer, {"weight": weights} if bias is None else {"weight": weights, "bias": bias}, (values,))
        return self.output(values) if self.rounds else values

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """(O, ...) weights and (O,) bias of layer and BatchNorm together."""
        weights, bias, norm = self.layer.weight, self.layer.bias, self.norm
        if norm is None:
            return weights, bias
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.running_mean if bias is None else norm.running_mean - bias
        return weights * scale.view(-1, *[1] * (weights.dim() - 1)), norm.bias - shift * scale


def in_simulated_int8(network: SegmentationNetwork, size: Sequence[int]) -> SegmentationNetwork:
    """The network with simulated 8-bit arithmetic. It shares its weights and buffers with the network: training it trains both.

    `size` is the height and width of one of its inputs. Convolutions and linear layers round their inputs and their weights, and
    their outputs where no activation follows. Raises ParamsError for a network whose BatchNorm cannot be folded.
    """
    device, training = next(network.parameters()).device, network.training
    pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    calls, expected = _calls(network.eval(), pixels)
    network.train(training)
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    simulated = copy.deepcopy(network, shared)
    layers = _replace(simulated, calls)
    with torch.no_grad():
        difference = float((simulated.eval()(pixels).logits - expected).abs().max())
    simulated.train(training)
    if not difference <= _SAME * float(expected.abs().max()):
        raise ParamsError(
            f"student.network: with BatchNorm folded, its logits differ by {difference:.2g}, so 8-bit arithmetic cannot be "
            "simulated; leave --quantised out, or choose another encoder"
        )
    for layer in layers:
        layer.rounds = True
    return simulated


class _Call(NamedTuple):
    """One call of a module, by its name in the network."""

    name: str
    module: nn.Module
    given: Tensor
    made: Tensor


def _calls(network: nn.Module, pixels: Tensor) -> tuple[list[_Call], Tensor]:
    """The calls of layers, BatchNorm and modules without parameters, in their order, and the logits."""
    calls: list[_Call] = []
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, (*_LAYERS, nn.BatchNorm2d)) or next(module.parameters(), None) is None:

            def note(module: nn.Module, given: Any, made: Any, name: str = name) -> None:
                if given and isinstance(given[0], Tensor) and isinstance(made, Tensor):
                    calls.append(_Call(name, module, given[0], made))

            hooks.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            return calls, network(pixels).logits
    finally:
        for hook in hooks:
            hook.remove()


def _replace(simulated: nn.Module, calls: list[_Call]) -> list[Int8Layer]:
    """Puts an Int8Layer in the place of each layer of `calls`, and what is behind a folded BatchNorm in the place of that."""
    times = Counter(call.name for call in calls)
    once = {id(call.made): call.name for call in calls if isinstance(call.module, _LAYERS) and times[call.name] == 1}
    folded = [call for call in calls if _folds(call.module) and times[call.name] == 1]
    norms = {once[id(call.given)]: call for call in folded if id(call.given) in once}
    activated = {id(call.given) for call in calls if not isinstance(call.module, (*_LAYERS, nn.BatchNorm2d, nn.Identity))}
    layers: dict[str, Int8Layer] = {}
    rounded = set[int]()
    for name, layer, given, made in calls:
        if not isinstance(layer, _LAYERS):
            continue
        folding = norms.get(name)
        result = id(made if folding is None else folding.made)
        if name not in layers:
            inner = None if folding is None else simulated.get_submodule(folding.name)
            layers[name] = Int8Layer(simulated.get_submodule(name), inner)
        if id(given) not in rounded:  # else it is the output of a layer that rounds it
            layers[name].input = ActivationRange()
        if result not in activated:
            layers[name].output = ActivationRange()
            rounded.add(result)
    for name, replacement in layers.items():
        simulated.set_submodule(name, replacement)
    for call in norms.values():
        norm, is_timm = call.module, isinstance(call.module, BatchNormAct2d)
        behind = nn.Sequential(norm.drop, norm.act) if is_timm else nn.Identity()  # pyright: ignore[reportArgumentType]
        simulated.set_submodule(call.name, copy.deepcopy(behind))
    return list(layers.values())


def _folds(module: Any) -> bool:
    """Whether a module is BatchNorm with constants of its own; timm's has an activation behind it."""
    return type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.affine and module.track_running_stats
