"""Training on several devices: the processes of torchrun, and what they share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mgd_pipeline.errors import ParamsError
from mgd_pipeline.params import OptimisationParams


def ranks_of_torchrun() -> tuple[int, int]:
    """(rank, ranks) as torchrun sets them; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def check_ranks(settings: OptimisationParams, ranks: int) -> None:
    """Raises ParamsError if the images of a step cannot be shared out evenly."""
    for name, images in (("labelled_batch", settings.labelled_batch), ("unlabelled_batch", settings.unlabelled_batch)):
        if images % ranks or images < 2 * ranks:
            raise ParamsError(f"student.{name} is {images}: must be a multiple of the {ranks} processes, two images each at least")


@contextmanager
def process_group(device: torch.device, ranks: int) -> Iterator[None]:
    """Joins the other processes of torchrun, if there are any."""
    if ranks == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def on_ranks(network: nn.Module, device: torch.device, ranks: int, *, compiled: bool) -> Callable[[Tensor], Any]:
    """The network's forward pass. Gradients are averaged over the ranks; on GPUs BatchNorm uses the images of all ranks."""
    if ranks > 1 and device.type == "cuda":
        network = convert_sync_batchnorm(network)  # torch's own drops the activations inside timm's BatchNorm
    if compiled:
        network.compile()
    return network if ranks == 1 else DistributedDataParallel(network)


def share_buffers(network: nn.Module, ranks: int) -> None:
    """Gives every rank the buffers of the first rank: on CPUs, each rank has BatchNorm statistics of its own images."""
    if ranks > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def mean_over_ranks(values: Tensor, ranks: int) -> list[float]:
    if ranks > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= ranks
    return values.tolist()


def any_rank(flag: bool, device: torch.device, ranks: int) -> bool:
    if ranks == 1:
        return flag
    any_of_them = torch.tensor(float(flag), device=device)
    dist.all_reduce(any_of_them, dist.ReduceOp.MAX)
    return bool(any_of_them)
