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
    # Two images: torch refuses to normalise a single value, which one 32 x 32 image is in FPN's last stage.
    images = torch.zeros(2, 3, height, width, device=next(network.parameters()).device)
    return multiply_accumulates_on(network, pad_to_multiple(images, multiple)) // 2


def multiply_accumulates_on(network: nn.Module, inputs: torch.Tensor) -> int:
    """Multiply-accumulate operations of one forward pass; the network's mode stays as it was."""
    from torch.utils.flop_counter import FlopCounterMode

    was_training = network.training
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(inputs)
    network.train(was_training)
    return counter.get_total_flops() // 2
