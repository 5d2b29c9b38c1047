"""The parts that teacher and student training share: optimiser, schedule, moving average, colour jitter."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mgd_pipeline.params import OptimisationParams


def build_optimizer(network: nn.Module, params: OptimisationParams) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW; weight decay on weights of two or more dimensions only, as in MGD."""
    weights = [p for p in network.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in network.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": params.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = any(p.is_cuda for p in others)  # one kernel for all weights
    if params.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=params.learning_rate, momentum=params.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=params.learning_rate, fused=fused)


def build_schedule(optimizer: torch.optim.Optimizer, params: OptimisationParams) -> torch.optim.lr_scheduler.PolynomialLR:
    """learning_rate * (1 - t / steps) ** poly_power, to be stepped once a step."""
    return torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=params.steps, power=params.poly_power)


def build_average(network: nn.Module, params: OptimisationParams) -> nn.Module | None:
    """A copy of the network that `update_average` makes its moving average; None where `ema` is 0."""
    return copy.deepcopy(network).requires_grad_(False) if params.ema else None


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, ema: float, step: int) -> None:
    """The exponential moving average of weights and BatchNorm statistics after step 0, 1, ...; integers are copied.

    Warm-up: the decay of step n is at most (1 + n) / (10 + n), so that the random initial weights leave the average of a short
    run; with a constant 0.99 they would still weigh 11 % after 220 steps. Not torch's AveragedModel: that waits for the GPU.
    """
    decay = min(ema, (1 + step) / (10 + step)) if step else 0.0
    pairs = [
        *zip(average.parameters(), network.parameters(), strict=True),
        *zip(average.buffers(), network.buffers(), strict=True),
    ]
    floating = [pair for pair in pairs if pair[0].is_floating_point()]
    get_ema_multi_avg_fn(decay)([mean for mean, _ in floating], [value for _, value in floating], 0)
    for mean, value in pairs:
        if not mean.is_floating_point():
            mean.copy_(value)


def draw_jitter(seed: int, batch: int) -> Tensor:
    """(B, 6) float32 uniform in -1 .. 1, the draws of `jitter_colours` for a batch of images."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.rand(batch, count, generator=generator) for count in (1, 1, 3, 1)]
    return torch.cat(draws, 1) * 2 - 1


def jitter_colours(images_B3HW: Tensor, strength: float, draws_B6: Tensor) -> Tensor:
    """Random contrast, saturation, channel gain and brightness of normalised images, one draw an image; strength 0 is identity.

    Factors are within 1 - strength .. 1 + strength (of the gain 0.3 strength), shifts within +-strength; the unit is the
    input's standard deviation. Geometry is untouched, so targets stay aligned; the teacher's targets never see it.
    """
    contrast, saturation, gain, brightness = (d[:, :, None, None] for d in (draws_B6 * strength).split([1, 1, 3, 1], 1))
    mean = images_B3HW.mean((2, 3), keepdim=True).mean(1, keepdim=True)
    jittered = (images_B3HW - mean) * (1 + contrast) + mean
    grey = jittered.mean(1, keepdim=True)
    jittered = grey + (jittered - grey) * (1 + saturation)
    return jittered * (1 + 0.3 * gain) + brightness
