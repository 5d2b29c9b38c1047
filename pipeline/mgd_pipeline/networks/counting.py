"""What a network costs: parameters and multiply-accumulate operations."""

from __future__ import annotations

import torch
from torch import nn

from mgd_pipeline.networks.segmentation import MULTIPLE, pad_to_multiple


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def multiply_accumulates(network: nn.Module, height: int, width: int, multiple: int = MULTIPLE) -> int:
    """Multiply-accumulate operations for one image of height x width pixels, padded to multiples of `multiple` pixels.

    torch's counter counts them; the network's mode stays as it was.
    """
    from torch.utils.flop_counter import FlopCounterMode

    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        # Two images: torch refuses to normalise a single value, which one 32 x 32 image is in FPN's last stage.
        network(pad_to_multiple(torch.zeros(2, 3, height, width, device=device), multiple))
    network.train(was_training)
    return counter.get_total_flops() // 4
