"""The parts that teacher and student training share: optimiser, schedule, moving average, colour jitter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mgd_pipeline.params import OptimisationParams


def build_optimizer(network: nn.Module, params: OptimisationParams) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW; weight decay on weights of two or more dimensions only, as in MGD."""
    weights = [p for p in network.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in network.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": params.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if params.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=params.learning_rate, momentum=params.momentum)
    return torch.optim.AdamW(groups, lr=params.learning_rate)


def build_schedule(optimizer: torch.optim.Optimizer, params: OptimisationParams) -> torch.optim.lr_scheduler.PolynomialLR:
    """learning_rate * (1 - t / steps) ** poly_power, to be stepped once a step."""
    return torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=params.steps, power=params.poly_power)


def build_average(network: nn.Module, params: OptimisationParams) -> AveragedModel | None:
    """The exponential moving average of weights and BatchNorm statistics; None where `ema` is 0."""
    if params.ema == 0:
        return None

    def lerp(averages: Any, currents: Any, count: Any) -> None:
        # Warm-up: at step n the decay is at most (1 + n) / (10 + n), so that the random initial weights leave the average
        # of a short run; with a constant 0.99 they would still weigh 11 % after 220 steps.
        decay = min(params.ema, (1 + int(count)) / (10 + int(count)))
        for average, current in zip(averages, currents, strict=True):
            if average.is_floating_point():
                average.lerp_(current, 1 - decay)
            else:
                average.copy_(current)

    return AveragedModel(network, multi_avg_fn=lerp, use_buffers=True)


def jitter_colours(images_B3HW: Tensor, strength: float, seed: int) -> Tensor:
    """Random contrast, brightness and channel gain of normalised images, one draw an image; 0 leaves them unchanged.

    Factors are uniform in [1 - strength, 1 + strength], shifts in [-strength, strength] (the unit is the input's standard
    deviation). Geometry is untouched, so targets stay aligned; the teacher's targets never see it.
    """
    if strength == 0:
        return images_B3HW
    generator = torch.Generator().manual_seed(seed)
    batch = images_B3HW.shape[0]

    def uniform(*shape: int) -> Tensor:
        return ((torch.rand(shape, generator=generator) * 2 - 1) * strength).to(images_B3HW.device)

    mean = images_B3HW.mean((2, 3), keepdim=True).mean(1, keepdim=True)
    contrast, saturation = 1 + uniform(batch, 1, 1, 1), 1 + uniform(batch, 1, 1, 1)
    gain = 1 + 0.3 * uniform(batch, 3, 1, 1)
    jittered = (images_B3HW - mean) * contrast + mean
    grey = jittered.mean(1, keepdim=True)
    jittered = grey + (jittered - grey) * saturation
    return jittered * gain + uniform(batch, 1, 1, 1)
