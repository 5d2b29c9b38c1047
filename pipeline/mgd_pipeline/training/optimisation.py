"""What teacher and student training share: optimiser, schedule, moving average."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mgd_pipeline.networks.segmentation import SegmentationNetwork
from mgd_pipeline.params import MethodParams, OptimisationParams, StudentParams, TeacherTrainingParams
from mgd_pipeline.training.distillation_sgd import DistillationSGD


class StepLoss(NamedTuple):
    """The loss of one step."""

    total: Tensor
    """The weighted sum of the terms"""
    terms: dict[str, Tensor]
    """By name, unweighted"""
    parts: tuple[Tensor, Tensor] | None = None
    """The total in two, what teachers say and what labels say, where each has a momentum of its own"""


def backward(loss: StepLoss, optimizer: torch.optim.Optimizer) -> None:
    """Gives the parameters the gradients of a step, and the optimiser those of distillation first, if it treats them apart."""
    if loss.parts is None or not isinstance(optimizer, DistillationSGD):
        loss.total.backward()
        return
    distillation, task = loss.parts
    distillation.backward(retain_graph=True)
    optimizer.step_distillation()
    task.backward()


def build_optimizer(network: nn.Module, params: OptimisationParams) -> torch.optim.Optimizer:
    """SGD with momentum, or with two (`DistillationSGD`), or AdamW; weight decay on weights of two or more dimensions, as in MGD.

    Encoders have parameter groups of their own if they have a learning rate of their own. Frozen weights are in no group.
    """
    rate = params.encoder_learning_rate if isinstance(params, TeacherTrainingParams) else None
    networks = [module for module in network.modules() if isinstance(module, SegmentationNetwork)]
    encoders = {parameter for one in networks for parameter in one.model.encoder.parameters()} if rate else set()
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = []
    for own, lr in ((False, params.learning_rate), *([(True, rate)] if rate else [])):
        members = [p for p in trained if (p in encoders) == own]
        groups.append({"params": [p for p in members if p.dim() > 1], "weight_decay": params.weight_decay, "lr": lr})
        groups.append({"params": [p for p in members if p.dim() <= 1], "weight_decay": 0.0, "lr": lr})
    fused = any(p.is_cuda for p in trained)  # one kernel for all weights
    if isinstance(params, StudentParams) and params.distillation_momentum:
        return DistillationSGD(groups, params.learning_rate, params.momentum, params.distillation_momentum)
    if params.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=params.learning_rate, momentum=params.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=params.learning_rate, fused=fused)


def build_schedule(optimizer: torch.optim.Optimizer, params: OptimisationParams) -> torch.optim.lr_scheduler.PolynomialLR:
    """learning_rate * (1 - t / steps) ** poly_power; to be stepped once a step."""
    return torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=params.steps, power=params.poly_power)


def consistency_weight(params: MethodParams, step: int, steps: int) -> float:
    """The weight of the term on unlabelled images at a step: a straight line from near 0 to `consistency` over the first
    `consistency_rampup` of the steps.

    The ramp is not MGD's; Temporal Ensembling (Laine and Aila, ICLR 2017) has one, a Gaussian. The first pseudo labels of
    networks without pre-trained weights are wrong, and a short run does not recover from them (figures in docs/log.md).
    """
    return params.consistency * min(1.0, (step + 1) / max(1.0, params.consistency_rampup * steps))


def build_average(network: nn.Module, params: OptimisationParams) -> nn.Module | None:
    """A copy of the network, which `update_average` turns into its moving average; None if `ema` is 0. Both have one frozen
    encoder, which is its own average."""
    networks = [module for module in network.modules() if isinstance(module, SegmentationNetwork) and module.frozen_encoder]
    shared = {id(one.model.encoder): one.model.encoder for one in networks}
    return copy.deepcopy(network, shared).requires_grad_(False) if params.ema else None


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, ema: float, step: int) -> None:
    """The exponential moving average of weights and BatchNorm statistics after step 0, 1, ...; integers are copied.

    Warm-up: the decay of step n is at most (1 + n) / (10 + n), so that the random initial weights leave the average of a short
    run. With a constant 0.99 they would still weigh 11 % after 220 steps. torch's AveragedModel would wait for the GPU.
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
